"""Reading other people's checkpoints without running their code, and refusing those that do not fit.

A ``.pt`` file is a pickle, which can run any code when it is read. Here it is read by PyTorch's restricted reader,
which knows tensors and plain containers only. A ``.safetensors`` file cannot hold code at all: prefer it if you can
choose.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

StateDict = Mapping[str, Tensor]

_SHOWN = 3  # offending keys that an error names
_WRAPPERS = ("module.", "_orig_mod.")  # put before each key by data-parallel training and by torch.compile
_DEEPEST = 4  # nested so often at most: a dictionary may hold itself
_NESTED = ("ema", "state_dict", "model")  # where training scripts keep the weights, the averaged ones first


class CheckpointError(ValueError):
    """A checkpoint that is damaged, not safe to read, or not of the network it was to be loaded into."""


def read_state_dict(path: str | Path) -> StateDict:
    """The weights in a checkpoint file, on the CPU, as they were saved.

    Args:
        path: a ``.safetensors`` file, or a file of ``torch.save`` that holds tensors in plain containers: a state dict,
            or a dictionary with one under "ema", "state_dict" or "model" (the first of these that is there).

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, holds code (none of which has been run), or no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}")
    state = _find_state_dict(_read_safetensors(path) if _is_safetensors(path) else _read_pickle(path), path)
    for prefix in _WRAPPERS * 2:  # in either order
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def check_weights(network: nn.Module, state: StateDict, source: str) -> None:
    """Refuse weights that do not fit the network exactly.

    Args:
        network: may be on the "meta" device.
        state: its weights.
        source: what the error calls them.

    Raises:
        CheckpointError: naming the first keys that are missing, unexpected, or of another shape or kind.
    """
    expected = network.state_dict()
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    shapes = [
        f"{key} is {tuple(state[key].shape)} for {tuple(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    kinds = [f"{key} is {state[key].dtype}" for key in expected if key in state and not _is_real(state[key])]
    faults = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": shapes,
        "not plain floating-point numbers": kinds,
    }
    if any(faults.values()):
        found = "; ".join(f"{len(keys)} {name} ({_first(keys)})" for name, keys in faults.items() if keys)
        raise CheckpointError(
            f"{source}: does not fit {type(network).__name__}, which has {len(expected)} tensors: {found}. Choose the "
            "preset or the configuration that the checkpoint was trained with"
        )


def load_weights(network: nn.Module, state: StateDict, source: str, dtype: torch.dtype = torch.float32) -> None:
    """Give a network its weights; every key must match.

    The network may have been made on the "meta" device, so that it takes no memory twice.

    Args:
        network: the network.
        state: its weights, in any floating-point type.
        source: what an error calls them.
        dtype: what they are converted to.
    """
    check_weights(network, state, source)  # before the copy: a few bytes can claim any shape
    copies = {
        key: value.to(dtype=dtype, memory_format=torch.contiguous_format, copy=True) for key, value in state.items()
    }
    network.load_state_dict(copies, strict=True, assign=True)


def _is_safetensors(path: Path) -> bool:
    """By content: the length of a header, in eight bytes, and the brace that it begins with."""
    with path.open("rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or (len(start) == 9 and start[8:] == b"{" and start[6:8] == b"\0\0")


def _read_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error}); it may be truncated") from error


def _read_pickle(path: Path) -> Any:
    try:
        # DiT's training script saves its command line along; a Namespace holds values and has no code to run
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a foreign pickle is refused below if it cannot be read
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise CheckpointError(f"{path}: cannot be read; it is damaged or no checkpoint of torch.save") from error
        raise CheckpointError(
            f"{path}: refused, as it asks for {named[1]}, which is not a tensor; nothing was run. If you trust where "
            "it comes from, load it there with torch.load and save its state dict as safetensors"
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "weights_only" in reason:  # PyTorch advises to read such a file without it, which would run its code
            raise CheckpointError(
                f"{path}: refused, as it is a TorchScript archive or of PyTorch's oldest format, which hold code; "
                "nothing was run. If you trust where it comes from, load it there and save its weights as safetensors"
            ) from None
        raise CheckpointError(f"{path}: cannot be read ({reason}); it may be truncated") from error


def _find_state_dict(content: Any, path: Path, deepest: int = _DEEPEST) -> StateDict:
    if isinstance(content, Mapping) and content:
        if all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
            return dict(content)
        for name in _NESTED:
            if isinstance(content.get(name), Mapping) and deepest:
                return _find_state_dict(content[name], path, deepest - 1)
    got = f"keys {_first(list(content))}" if isinstance(content, Mapping) and content else type(content).__name__
    names = ", ".join(map(repr, _NESTED))
    raise CheckpointError(f"{path}: expected a dictionary of tensors, or one under {names}; got {got}")


def _is_real(value: Tensor) -> bool:
    return value.is_floating_point() and value.layout is torch.strided and not value.is_quantized


def _first(keys: list[Any]) -> str:
    return ", ".join(map(str, keys[:_SHOWN])) + (", ..." if len(keys) > _SHOWN else "")
