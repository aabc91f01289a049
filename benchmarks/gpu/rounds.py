"""What a round takes beside the network: milliseconds, kernels, copies and waits of the host."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.device import Lab
from benchmarks.problems import Denoiser
from parasolver_core import DDIM, DDPM, Method, NoiseSchedule, ParallelIntegralSolver

PART = "rounds"
CUDA = torch.autograd.DeviceType.CUDA
SCHEDULE = NoiseSchedule.linear()
EVENTS = ((16, 2), (4, 64, 64), (4, 128, 128))
WINDOWS = (8, 16, 64)
BATCHES = (4, 16)
ROUNDS = 16  # at most, of a run
FIRST, WATCHED = 3, 3  # rounds before, and under, the profiler


def cheap_network(device: torch.device) -> Denoiser:
    """A few small kernels without a matrix product, that take as many rounds as real networks do."""
    slope = torch.from_numpy(1 - SCHEDULE.alphas_cumprod).sqrt().float().to(device)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return slope[t].reshape(-1, *[1] * (x.ndim - 1)) * (x + 0.3 * torch.sin(3 * x))

    return network


@dataclass(frozen=True)
class Job:
    """A kind of run whose rounds are looked at.

    Args:
        event: shape of a sample.
        window, batch: as in ``solve``.
        sampler: "DDIM" or "DDPM".
        spread: the steps of a run with nodes spread over the trajectory; 0: the window slides.
    """

    event: tuple[int, ...]
    window: int
    batch: int = 1
    sampler: str = "DDIM"
    spread: int = 0

    @property
    def name(self) -> str:
        kind = f"spread over {self.spread} steps" if self.spread else "sliding"
        return f"{'x'.join(map(str, self.event))}, window {self.window}, batch {self.batch}, {self.sampler}, {kind}"


JOBS = [
    *(Job(event, window) for event in EVENTS for window in WINDOWS),
    Job((4, 64, 64), 32, sampler="DDPM"),
    Job((3, 256, 256), 32, sampler="DDPM"),
    Job((4, 64, 64), 32, spread=1000),
    Job((16, 2), 64, spread=1000),
    *(Job(event, window, batch) for batch in BATCHES for event in EVENTS for window in WINDOWS),
]
TINY = [Job((16, 2), 8), Job((16, 2), 8, sampler="DDPM"), Job((16, 2), 16, spread=200)]


class Watched:
    """A run by hand.

    Args:
        lab: where.
        job: which.
    """

    def __init__(self, lab: Lab, job: Job) -> None:
        self.lab, self.job = lab, job
        self.network = cheap_network(lab.device)
        self.x_T = torch.randn(job.batch, *job.event, generator=torch.Generator().manual_seed(0)).to(lab.device)

    def milliseconds(self) -> float:
        """Median over the rounds of a second run."""
        return [statistics.median(self._rounds()) for _ in range(2)][-1]

    def _rounds(self, watch: Any = None) -> list[float]:
        job, rule = self.job, DDIM(SCHEDULE) if self.job.sampler == "DDIM" else DDPM(SCHEDULE)
        method = Method(spread=job.spread > 0)
        solver = ParallelIntegralSolver(rule, job.window, method=method, check=False)
        state = solver.init(self.network, self.x_T, SCHEDULE.timesteps(job.spread or 4 * job.window))
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
        """A round's kernels, copies, waits and milliseconds of a busy card, from the profiler; nothing on a CPU."""
        if not self.lab.cuda:
            return {}
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        watch = torch.profiler.profile(activities=kinds)
        rounds = len(self._rounds(watch)) - FIRST
        watch.stop()
        seen = Counter(_kind(event.name, event.device_type) for event in watch.events())
        counts = {name: round(count / rounds, 1) for name, count in seen.items() if name}
        busy = sum(one.time_range.elapsed_us() for one in watch.events() if one.device_type == CUDA)
        return {**counts, "busy": busy / 1e3 / rounds}

    def found(self) -> dict[str, Any]:
        """A line of results."""
        together = self.milliseconds()
        rows = self.job.window * len(self.x_T)
        x = torch.randn(rows, *self.x_T.shape[1:], device=self.lab.device)
        t = torch.randint(0, SCHEDULE.train_steps, (rows,), device=self.lab.device)
        network = self.lab.milliseconds(lambda: self.network(x, t), seconds=0.05)
        return {"ok": True, "ms": together, "network": network, "own": together - network, **self.counts()}


def _kind(name: str, device: Any) -> str:
    """What an event of the profiler is counted as."""
    if device != CUDA:
        # every wait for a copy to or from pageable memory is one of these too
        return "waits" if name.startswith("cuda") and name.endswith("Synchronize") else ""
    if name.startswith("Memcpy HtoD"):
        return "copies to the card"
    if name.startswith("Memcpy DtoH"):
        return "copies to the host"
    return "" if name.startswith(("Memcpy", "Memset")) else "kernels"


def run(lab: Lab) -> None:
    """All jobs, as far as the time reaches."""
    with torch.no_grad():
        for job in TINY if lab.tiny else JOBS:
            lab.measure(PART, job.name, Watched(lab, job).found)
