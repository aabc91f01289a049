"""The processes that torchrun started for one command, or this one alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from parasolver_core.denoiser.contract import DenoiserFn

_TIMEOUT = 600.0  # seconds; the slowest process may take long to read its checkpoint, and one that dies is noticed


@dataclass(frozen=True)
class Processes:
    """Who takes part.

    Args:
        device: where this process computes.
        count: how many share the rows of a round.
        rank: of this process; the first, 0, is the one that writes files.
    """

    device: str
    count: int = 1
    rank: int = 0

    def share(self, denoiser: DenoiserFn, max_rows: int) -> DenoiserFn:
        """The denoiser with its rows shared by all, of which each takes at most so many in one call."""
        if self.count == 1:
            return denoiser
        from parasolver_adapters.distributed import DistributedDenoiser

        return DistributedDenoiser(denoiser, timeout=_TIMEOUT, max_rows=max_rows)


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Those of torchrun while the block runs, on the device given; "auto": a GPU each if there are some."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(_usable(device, "cuda" if torch.cuda.is_available() else "cpu"))
        return
    from parasolver_adapters.distributed import process_group

    with process_group(_TIMEOUT) as own:
        yield Processes(_usable(device, str(own)), count, int(os.environ["RANK"]))


def _usable(device: str, own: str) -> str:
    device = own if device == "auto" else device
    try:
        torch.zeros(1, device=device).cpu()  # "meta" can be made, but holds nothing
    except (RuntimeError, AssertionError) as error:  # the latter from a PyTorch that was built without it
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: {device!r} cannot be used ({reason}); try cpu, or leave it out") from error
    return device
