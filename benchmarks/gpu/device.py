"""The device, its clock, and where results go; with stand-ins for a CPU."""

from __future__ import annotations

import gc
import importlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parasolver_adapters.graphs import captured


@dataclass(frozen=True)
class Lab:
    """Where measurements are made and kept.

    Args:
        device: of networks and states.
        file: of results, one JSON object a line.
        tiny: whether everything is made small, for a trial on a CPU.
        until: the ``time.monotonic()`` at which a part has to be over.
    """

    device: torch.device
    file: Path
    tiny: bool
    until: float

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    def put(self, part: str, name: str, **values: Any) -> None:
        """One line of results, at once on disk."""
        with self.file.open("a") as file:
            file.write(json.dumps({"part": part, "name": name, **values}, default=str) + "\n")

    def measure(self, part: str, name: str, found: Callable[[], dict[str, Any]]) -> None:
        """A line with what is found, or with what went wrong, which is no reason to stop."""
        if self.left <= 0:
            self.put(part, name, ok=False, error="no time left")
            return
        try:
            values = found()
        except Exception as error:
            values = {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
        self.put(part, name, **values)
        self.empty()

    def empty(self) -> None:
        """Give back the memory that nobody uses any more."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.cuda:
            torch.cuda.synchronize()

    def milliseconds(self, call: Callable[[], Any], seconds: float = 0.4, most: int = 15) -> float:
        """Median of calls, warm, each until the device has done it."""
        if self.tiny:
            seconds, most = 0.0, 1
        for _ in range(min(most, 2)):
            call()
        self.wait()
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < min(most, 3) or (time.perf_counter() < end and len(times) < most):
            started = time.perf_counter()
            call()
            self.wait()
            times.append(1e3 * (time.perf_counter() - started))
        return statistics.median(times)

    def captured(self, call: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        """What replays a CUDA graph of the call, and the tensor that it writes to; on a CPU the call itself."""
        if not self.cuda:
            return call, call()
        return captured(call)


def distance(found: Tensor, truth: Tensor) -> float:
    """Relative RMS distance, in float64."""
    found, truth = found.double(), truth.double().to(found.device)
    return float((found - truth).norm() / truth.norm())


def run_part(part: str, device: str, file: Path, tiny: bool, until: float) -> None:
    """One part, in a process of its own, until a ``time.monotonic()``, which is the same in all processes."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    with tempfile.TemporaryDirectory() as costs:  # measured costs of window="auto" are not the user's
        os.environ["XDG_CACHE_HOME"] = costs
        lab = Lab(torch.device(device), file, tiny, until)
        importlib.import_module(f"benchmarks.gpu.{part}").run(lab)
