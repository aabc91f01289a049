"""What the solver itself costs: ``python -m benchmarks.overhead``.

The network is replaced by a cheap elementwise function, whose own time is taken off, so that what remains of a round is
the solver, the copy that it gives to the network included. Its time is counted in copies: the time to copy one window
of states, measured between the rounds of the same run, so that a slow machine slows both. With one thread both are CPU
time, which other programs on the machine disturb least. Memory is counted in windows: the peak of all that is allocated
during a run, network output included, over the bytes of one window of states.

Small states cost calls and not copies: their rounds are given in microseconds.
"""

from __future__ import annotations

import json
import math
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from parasolver_core import DDIM, Method, NoiseSchedule, ParallelIntegralSolver

SCHEDULE = NoiseSchedule.linear()
LIBRARIES = ("numpy", "torch")
EVENTS = ((4, 64, 64), (4, 128, 128), (16, 21, 60, 104))  # images of 512 and 1024 pixels; a video
WINDOWS = (8, 32)
SMALL = ((16, 2), 16)  # event and window of a policy
BATCHES = (1, 16)
SECONDS = 6.0  # of measurement for each line of the table
WARM_ROUNDS = 2  # the window opens in the first rounds


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Args:
        library, event, window: what was measured; N is four windows.
        rounds: how many rounds of full windows the medians are over.
        accepted: nodes that became final in a round, on average: each costs, and each is filled in again.
        batch: samples.
        seconds: the solver's own time of a round, median.
        copy_seconds: time of one copy of the window's states into memory at hand, median.
        copies: median of the ratio of the two, each round against the copy after it.
        memory_windows: peak of extra memory over the window's bytes.
    """

    library: str
    event: tuple[int, ...]
    window: int
    batch: int
    rounds: int
    accepted: float
    seconds: float
    copy_seconds: float
    copies: float
    memory_windows: float


def measure(library: str, event: tuple[int, ...], window: int, seconds: float = SECONDS, batch: int = 1) -> Line:
    """Time and memory of one setting."""
    kind = _NumpyRuns if library == "numpy" else _TorchRuns
    runs = kind(event, window, batch)
    own, copy, accepted = [], [], []
    runs.timed()
    end = time.perf_counter() + seconds
    while not own or time.perf_counter() < end:
        for own_seconds, copied, nodes in runs.timed():
            own.append(own_seconds)
            copy.append(copied)
            accepted.append(nodes / batch)
    return Line(
        library=library,
        event=event,
        window=window,
        batch=batch,
        rounds=len(own),
        accepted=float(np.mean(accepted)),
        seconds=float(np.median(own)),
        copy_seconds=float(np.median(copy)),
        copies=float(np.median(np.array(own) / np.array(copy))),
        memory_windows=runs.peak_bytes() / (4 * batch * window * math.prod(event)),
    )


class _Runs:
    """Runs of one setting, stepped by hand."""

    clock = staticmethod(time.thread_time)

    def __init__(self, event: tuple[int, ...], window: int, batch: int) -> None:
        self.window, self.batch, self.size = window, batch, math.prod(event)
        self.solver = ParallelIntegralSolver(DDIM(SCHEDULE), window, method=Method(spread=False))
        self.timesteps = SCHEDULE.timesteps(4 * window)
        alpha, sigma = SCHEDULE.levels(np.arange(SCHEDULE.train_steps))
        # epsilon of Gaussian data of standard deviation 0.5 is this times x
        self.slope = (sigma / (alpha**2 / 4 + sigma**2))[:-1].astype(np.float32)
        self.start = np.random.default_rng(0).standard_normal((batch, *event), dtype=np.float32)
        self.network = 0.0  # seconds

    def timed(self) -> list[tuple[float, float, int]]:
        """One run: of each round with a full window the own seconds, those of a copy after it, and nodes accepted."""
        copy = self._copier()
        state = self.solver.init(self._timed_denoiser, self._start(), self.timesteps)
        rounds = []
        while not self.solver.done(state):
            started, network = self.clock(), self.network
            self.solver.step(state)
            ended = self.clock()
            copy()
            copied = self.clock() - ended
            record = state.stats.history[-1]
            if record.round > WARM_ROUNDS and record.window == self.window:
                rounds.append((ended - started - (self.network - network), copied, record.accepted))
        return rounds

    def peak_bytes(self) -> int:
        """Peak of what a run allocates."""
        self._peak()  # what is imported or cached in a first run is not a run's
        tracemalloc.start()
        try:
            return self._peak()
        finally:
            tracemalloc.stop()

    def _peak(self) -> int:
        raise NotImplementedError

    def _run(self, start: Any) -> None:
        self.solver.solve(self._denoiser, start, self.timesteps)

    def _start(self) -> Any:
        raise NotImplementedError

    def _copier(self) -> Callable[[], Any]:
        raise NotImplementedError

    def _timed_denoiser(self, x: Any, t: Any) -> Any:
        started = self.clock()
        out = self._denoiser(x, t)
        self.network += self.clock() - started
        return out

    def _denoiser(self, x: Any, t: Any) -> Any:
        """Gaussian data made nonlinear, ``k (x + sin(3 x) / 2)``: as many rounds as image models take.

        Allocates its result only.
        """
        raise NotImplementedError


class _NumpyRuns(_Runs):
    def _start(self) -> Any:
        return self.start

    def _copier(self) -> Callable[[], Any]:
        source, target = (np.ones((self.batch * self.window, self.size), dtype=np.float32) for _ in range(2))
        return lambda: np.copyto(target, source)

    def _denoiser(self, x: Any, t: Any) -> Any:
        out = 3 * x
        np.sin(out, out=out)
        out *= 0.5
        out += x
        out *= self.slope[t].reshape(-1, *[1] * (x.ndim - 1))
        return out

    def _peak(self) -> int:
        self._run(self._start())
        return tracemalloc.get_traced_memory()[1]


class _TorchRuns(_Runs):
    def _start(self) -> Any:
        import torch

        return torch.from_numpy(self.start)

    def _copier(self) -> Callable[[], Any]:
        import torch

        source, target = (torch.ones(self.batch * self.window, self.size) for _ in range(2))
        return lambda: target.copy_(source)

    def _denoiser(self, x: Any, t: Any) -> Any:
        import torch

        slope = torch.from_numpy(self.slope)[t].reshape(-1, *[1] * (x.ndim - 1))
        return (3 * x).sin_().mul_(0.5).add_(x).mul_(slope)

    def _peak(self) -> int:
        from benchmarks.torch_memory import TorchMemory

        with TorchMemory() as memory:
            self._run(self._start())
        return memory.peak


def table(lines: list[Line]) -> Table:
    """The lines as the reader sees them."""
    shown = Table(title="The solver's own cost of a round (float32, CPU)", title_justify="left", collapse_padding=True)
    for name in (
        "library",
        "state",
        "window",
        "accepted",
        "own, ms",
        "copy, ms",
        "copies",
        "memory,\nwindows",
    ):
        shown.add_column(name, justify="left" if name in ("library", "state") else "right", no_wrap=True)
    for line in lines:
        shown.add_row(
            line.library,
            "x".join(map(str, line.event)),
            str(line.window),
            f"{line.accepted:.1f}",
            f"{1e3 * line.seconds:.2f}",
            f"{1e3 * line.copy_seconds:.3f}",
            f"{line.copies:.1f}",
            f"{line.memory_windows:.1f}",
        )
    return shown


def small_table(lines: list[Line]) -> Table:
    """The lines of small states."""
    shown = Table(title="Small states", title_justify="left", collapse_padding=True)
    for name in ("library", "state", "window", "batch", "own, us"):
        shown.add_column(name, justify="left" if name in ("library", "state") else "right", no_wrap=True)
    for line in lines:
        state = "x".join(map(str, line.event))
        shown.add_row(line.library, state, str(line.window), str(line.batch), f"{1e6 * line.seconds:.0f}")
    return shown


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the lines to this file.")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Seconds of measurement for each line.")] = SECONDS,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch; NumPy obeys OMP_NUM_THREADS.")] = 1,
) -> None:
    """Time and memory of the solver itself, next to a plain copy."""
    import torch

    torch.set_num_threads(threads)
    _Runs.clock = staticmethod(time.thread_time if threads == 1 else time.perf_counter)
    console = Console()
    lines, small = [], []
    with console.status("Measuring") as status:
        for event in EVENTS:
            for window in WINDOWS:
                for library in LIBRARIES:
                    status.update(f"{library}, {'x'.join(map(str, event))}, window {window}")
                    lines.append(measure(library, event, window, seconds))
        for batch in BATCHES:
            small += [measure(library, *SMALL, seconds, batch) for library in LIBRARIES]
    console.print(table(lines))
    console.print(small_table(small))
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(line) for line in lines + small], indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
