"""Read the ``*-ubyte.gz`` files of Fashion-MNIST (Xiao et al. 2017, https://arxiv.org/abs/1708.07747)."""

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes, the format of MNIST and its relatives.

    Args:
        path: File whose name ends in ``-ubyte.gz``.

    Returns:
        The array, uint8, with the shape given in the file's header.

    Raises:
        ValueError: If the file does not hold unsigned bytes in IDX format.
    """
    with gzip.open(path, "rb") as file:
        content = file.read()
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes; got header {content[:4]!r}")
    rank = content[3]
    shape = np.frombuffer(content, dtype=">u4", count=rank, offset=4).astype(int)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)


def load_split(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """Load one split of Fashion-MNIST.

    Args:
        data: Folder that holds the four ``*-ubyte.gz`` files.
        split: ``"train"`` (60,000 pictures) or ``"t10k"`` (10,000 pictures).

    Returns:
        Pictures, float32 (n, 1, 28, 28) in [-1, 1], and labels, int64 (n,) in 0 .. 9.
    """
    images = torch.from_numpy(read_idx(data / f"{split}-images-idx3-ubyte.gz").astype(np.float32))
    labels = torch.from_numpy(read_idx(data / f"{split}-labels-idx1-ubyte.gz").astype(np.int64))
    return (images / 127.5 - 1.0)[:, None], labels
