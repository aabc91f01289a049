"""What a round takes beside the network: milliseconds, kernels, copies and waits of the host."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.device import Lab
from benchmarks.problems import Denoiser
from parasolver_core import DDIM, NoiseSchedule, ParallelIntegralSolver

PART = "rounds"
SCHEDULE = NoiseSchedule.linear()
EVENTS = ((16, 2), (4, 64, 64), (4, 128, 128))
WINDOWS = (8, 16, 64)
BATCHES = (1, 4, 16)
ROUNDS = 16  # at most, of a run
FIRST, WATCHED = 3, 3  # rounds before, and under, the profiler


def cheap_network(device: torch.device) -> Denoiser:
    """A few small kernels without a matrix product, that take as many rounds as real networks do."""
    slope = torch.from_numpy(1 - SCHEDULE.alphas_cumprod).sqrt().float().to(device)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return slope[t].reshape(-1, *[1] * (x.ndim - 1)) * (x + 0.3 * torch.sin(3 * x))

    return network


class Watched:
    """A run by hand of a window that slides.

    Args:
        lab: where.
        event: shape of a sample.
        window, batch: as in ``solve``.
    """

    def __init__(self, lab: Lab, event: tuple[int, ...], window: int, batch: int) -> None:
        self.lab, self.window = lab, window
        self.network = cheap_network(lab.device)
        self.x_T = torch.randn(batch, *event, generator=torch.Generator().manual_seed(0)).to(lab.device)

    def milliseconds(self) -> float:
        """Median over the rounds of a second run."""
        return [statistics.median(self._rounds()) for _ in range(2)][-1]

    def _rounds(self, watch: Any = None) -> list[float]:
        solver = ParallelIntegralSolver(DDIM(SCHEDULE), self.window)
        state = solver.init(self.network, self.x_T, SCHEDULE.timesteps(4 * self.window))
        times: list[float] = []
        while not solver.done(state) and len(times) < ROUNDS:
            if watch is not None and len(times) == FIRST:
                watch.start()
            started = time.perf_counter()
            solver.step(state)
            self.lab.wait()
            times.append(1e3 * (time.perf_counter() - started))
            if watch is not None and len(times) == FIRST + WATCHED:
                break
        return times

    def counts(self) -> dict[str, float]:
        """A round's kernels, copies and waits, from the profiler; nothing on a CPU."""
        if not self.lab.cuda:
            return {}
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        watch = torch.profiler.profile(activities=kinds)
        rounds = len(self._rounds(watch)) - FIRST
        watch.stop()
        seen = Counter(_kind(event.name, event.device_type) for event in watch.events())
        return {name: round(count / rounds, 1) for name, count in seen.items() if name}

    def found(self) -> dict[str, Any]:
        """A line of results."""
        together = self.milliseconds()
        rows = self.window * len(self.x_T)
        x = torch.randn(rows, *self.x_T.shape[1:], device=self.lab.device)
        t = torch.randint(0, SCHEDULE.train_steps, (rows,), device=self.lab.device)
        network = self.lab.milliseconds(lambda: self.network(x, t), seconds=0.05)
        return {"ok": True, "ms": together, "network": network, "own": together - network, **self.counts()}


def _kind(name: str, device: Any) -> str:
    """What an event of the profiler is counted as."""
    if device != torch.autograd.DeviceType.CUDA:
        # every wait for a copy to or from pageable memory is one of these too
        return "waits" if name.startswith("cuda") and name.endswith("Synchronize") else ""
    if name.startswith("Memcpy HtoD"):
        return "copies to the card"
    if name.startswith("Memcpy DtoH"):
        return "copies to the host"
    return "" if name.startswith(("Memcpy", "Memset")) else "kernels"


def run(lab: Lab) -> None:
    """All shapes, windows and batches; in small, one of them."""
    for batch in BATCHES[: 1 if lab.tiny else None]:
        for event in EVENTS[: 1 if lab.tiny else None]:
            for window in WINDOWS[: 1 if lab.tiny else None]:
                name = f"{'x'.join(map(str, event))}, window {window}, batch {batch}"
                with torch.no_grad():
                    lab.measure(PART, name, Watched(lab, event, window, batch).found)
