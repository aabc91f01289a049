"""What a round costs for whole batches, beside another checkout: ``python -m benchmarks.rounds --against DIR``.

Both are loaded into one process and measured in turns, so that a slow machine slows both. Four things:

* on the accelerator's path, tried with tensors of a CPU: the array operations of a round and its uploads, without the
  network's own, and the peak memory in windows of states;
* the solver's own time in a round, NumPy, 32 numbers a sample;
* wall-clock of the policy network, DDIM-100, against ``solve_sequential`` and a bare loop, with the best window.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.latency.timings import bare_loop, timed
from benchmarks.problems import PROBLEMS
from benchmarks.tables import markdown, show
from benchmarks.torch_memory import TorchMemory

CORE = "parasolver_core"
SIZE, STEPS, WINDOW = 32, 50, 16  # of the own time
BATCHES = (1, 16, 64, 256)
POLICY_BATCHES, POLICY_WINDOWS, POLICY_STEPS = (1, 16, 64), (8, 16, 32, 48, 100), 100
COUNTED_ROUND = 4  # the window has opened by then
VIEWS = {"view", "slice", "select", "reshape", "expand", "unsqueeze", "permute", "transpose", "detach", "alias", "t"}
VIEWS |= {"_unsafe_view", "unbind", "lift_fresh", "split", "squeeze", "as_strided", "split_with_sizes"}
Row = dict[str, str]


class Release:
    """The core of one checkout, loaded beside others.

    Args:
        name: in the tables.
        root: the folder that holds ``parasolver_core``; None: the one that is imported already.
    """

    def __init__(self, name: str, root: Path | None = None) -> None:
        self.name, self._modules = name, {}
        if root is None:
            self.core: Any = importlib.import_module(CORE)
            self._modules = _own()
            self.method = importlib.import_module(f"{CORE}.methods").Method(spread=False)
            return
        if not (root / CORE).is_dir():
            raise typer.BadParameter(f"--against: expected a checkout with a folder {CORE}, got {root}")
        sys.path.insert(0, str(root))
        try:
            with self.active():
                self.core = importlib.import_module(CORE)
                self.method = importlib.import_module(f"{CORE}.methods").Method(spread=False)
        finally:
            sys.path.remove(str(root))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the block, what it imports later comes from this checkout too."""
        others = _own()
        _replace(self._modules)
        try:
            yield
        finally:
            self._modules = _own()
            _replace(others)

    @contextmanager
    def as_on_a_device(self) -> Iterator[None]:
        """Within the block, tensors of the CPU take the accelerator's path: none is read as NumPy's."""
        with self.active():
            held = {module: module.host_view for module in _own().values() if hasattr(module, "host_view")}
            for module in held:
                vars(module)["host_view"] = lambda array: array
            try:
                yield
            finally:
                for module, host_view in held.items():
                    vars(module)["host_view"] = host_view

    def rule(self, name: str, **options: Any) -> Any:
        """A step rule and its schedule."""
        schedule = self.core.NoiseSchedule.scaled_linear()
        made = {"DDIM": self.core.DDIM, "DDPM": self.core.DDPM, "2M": lambda one: self.core.DPMSolver(one, 2)}
        return made[name](schedule, **options), schedule

    def solver(self, rule: Any, window: int) -> Any:
        """A sliding window."""
        return self.core.ParallelIntegralSolver(rule, window, method=self.method, check=False)


def _own() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] == CORE}


def _replace(modules: dict[str, ModuleType]) -> None:
    for name in _own():
        del sys.modules[name]
    sys.modules.update(modules)


class Operations(TorchDispatchMode):
    """Counts operations that are not views, and uploads; those of :meth:`without` not."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self._counting = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += self._counting
        return func(*args, **(kwargs or {}))

    def without(self, network: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """The network, uncounted."""

        def called(x: Any, t: Any) -> Any:
            self._counting = False
            try:
                return network(x, t)
            finally:
                self._counting = True

        return called

    @property
    def work(self) -> int:
        return sum(count for name, count in self.seen.items() if name not in VIEWS)

    @property
    def uploads(self) -> int:
        return self.seen["lift_fresh"]


def device_network(x: Any, t: Any) -> Any:
    """Allocates its result only, and what it makes it from."""
    return torch.sin(3 * x).mul_(0.15).add_(0.3 * x)


def operations(release: Release, sampler: str, window: int, batch: int) -> tuple[int, int]:
    """Array operations and uploads of one round with whole windows."""
    rule, schedule = release.rule(sampler)
    with release.as_on_a_device(), Operations() as seen:
        x_T = torch.randn(batch, SIZE, generator=torch.Generator().manual_seed(0))
        solver = release.solver(rule, window)
        state = solver.init(seen.without(device_network), x_T, schedule.timesteps(100))
        for _ in range(COUNTED_ROUND):
            seen.seen.clear()
            solver.step(state)
    return seen.work, seen.uploads


def memory(release: Release, sampler: str, window: int, batch: int) -> float:
    """Peak of a run's tensors on the accelerator's path, in windows of states of 4x32x32."""
    rule, schedule = release.rule(sampler)
    x_T = torch.randn(batch, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    with release.as_on_a_device():
        problem = device_network, x_T, schedule.timesteps(4 * window)
        release.solver(rule, window).solve(*problem)  # what is cached in a first run is not a run's
        with TorchMemory() as seen:
            release.solver(rule, window).solve(*problem)
    return seen.peak / (4 * x_T.numel() * window)


def host_network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    """A small perceptron with random weights."""
    return np.tanh(x @ _INTO + (t / 1000).astype(x.dtype)[:, None]) @ _OUT


_RNG = np.random.default_rng(0)
_INTO, _OUT = ((_RNG.standard_normal(shape) / 6).astype(np.float32) for shape in ((SIZE, 40), (40, SIZE)))


def own_times(releases: list[Release], batch: int, repeats: int) -> dict[str, tuple[float, int, int]]:
    """For each, seconds a round (the least of the runs' medians), rounds and evaluations."""
    x_T = np.random.default_rng(1).standard_normal((batch, SIZE)).astype(np.float32)
    least: dict[str, tuple[float, int, int]] = {}
    for _ in range(repeats + 1):
        for one in releases:
            rule, schedule = one.rule("DDIM")
            with one.active():
                stats = one.solver(rule, WINDOW).solve(host_network, x_T, schedule.timesteps(STEPS)).stats
            seconds = float(np.median([part.seconds - part.seconds_denoiser for part in stats.history]))
            least[one.name] = min(least.get(one.name, (np.inf, 0, 0)), (seconds, stats.rounds, stats.evaluations))
    return least


def policy_times(releases: list[Release], batch: int, repeats: int) -> dict[str, float]:
    """Median seconds of the bare loop, and of each release: sequential, and parallel with each window."""
    problem = PROBLEMS["policy"]
    denoiser: Any = problem.make()
    found: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):
        x_T = problem.starts(batch)
        runs: dict[str, tuple[Release, Callable[[], Any]]] = {}
        for one in releases:
            schedule = one.core.NoiseSchedule.squared_cosine()
            rule, timesteps = one.core.DDIM(schedule, prediction_type="v_prediction"), schedule.timesteps(POLICY_STEPS)
            given = denoiser, x_T, timesteps, rule
            if one is releases[-1]:
                runs["bare loop"] = one, lambda g=given: bare_loop(*g, torch.Generator())
            runs[f"{one.name}, sequential"] = one, lambda o=one, g=given: o.core.solve_sequential(*g)
            for window in POLICY_WINDOWS:
                runs[f"{one.name}, window {window}"] = one, lambda o=one, g=given, w=window: o.core.solve(*g, w)
        for name, (one, run) in runs.items():
            with one.active():
                seconds, _ = timed(run)
            if repeat:  # the first is a rehearsal
                found.setdefault(name, []).append(seconds)
    return {name: float(np.median(seconds)) for name, seconds in found.items()}


def device_table(releases: list[Release]) -> list[Row]:
    """Counts, which are the same on any machine."""
    rows = []
    for sampler in ("DDIM", "2M", "DDPM"):
        for window, batch in ((8, 1), (8, 16), (32, 1), (32, 16)):
            row = {"sampler": sampler, "window": str(window), "batch": str(batch)}
            for one in releases:
                work, uploads = operations(one, sampler, window, batch)
                row[f"{one.name}: operations, uploads"] = f"{work}, {uploads}"
                row[f"{one.name}: memory, windows"] = f"{memory(one, sampler, window, batch):.1f}"
            rows.append(row)
    return rows


def own_table(releases: list[Release], repeats: int) -> list[Row]:
    rows = []
    for batch in BATCHES:
        found = own_times(releases, batch, max(repeats * 16 // batch, repeats // 4, 2))
        first, row = found[releases[0].name][0], {"batch": str(batch)}
        for name, (seconds, rounds, evaluations) in found.items():
            row[f"{name}: ms a round"] = f"{1e3 * seconds:.2f}"
            row[f"{name}: rounds, evaluations"] = f"{rounds}, {evaluations / batch:.1f}"
        row["ratio"] = f"{found[releases[-1].name][0] / first:.3f}"
        rows.append(row)
    return rows


def policy_table(releases: list[Release], repeats: int) -> list[Row]:
    rows = []
    for batch in POLICY_BATCHES:
        found = policy_times(releases, batch, repeats)
        row = {"batch": str(batch), "ms: bare loop": f"{1e3 * found['bare loop']:.1f}"}
        for one in releases:
            best = min(POLICY_WINDOWS, key=lambda window, o=one: found[f"{o.name}, window {window}"])
            sequential, parallel = found[f"{one.name}, sequential"], found[f"{one.name}, window {best}"]
            row[f"{one.name}, ms: sequential / parallel (window)"] = (
                f"{1e3 * sequential:.1f} / {1e3 * parallel:.1f} ({best})"
            )
            row[f"{one.name}, speed-up: sequential / bare"] = (
                f"{sequential / parallel:.2f} / {found['bare loop'] / parallel:.2f}"
            )
        rows.append(row)
    return rows


def main(
    against: Annotated[Path | None, typer.Option(help="Another checkout, measured in turns with this one.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 16,
    counts: Annotated[bool, typer.Option(help="Only count: nothing that depends on the machine.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("rounds-output"),
) -> None:
    """A round's operations, memory and time; write table.md and results.json."""
    torch.set_num_threads(1)
    releases = [Release("now")] if against is None else [Release("before", against.resolve()), Release("now")]
    started = time.perf_counter()
    with torch.no_grad():
        tables = {"On a device: operations and uploads of a round, peak memory": device_table(releases)}
        if not counts:
            tables[f"The solver's own time, {SIZE} numbers, window {WINDOW}"] = own_table(releases, repeats)
            tables[f"Policy network, DDIM-{POLICY_STEPS}, one thread"] = policy_table(releases, repeats)
    console = Console()
    for title, rows in tables.items():
        show(console, title, rows)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text("".join(markdown(title, rows) for title, rows in tables.items()))
    (out / "results.json").write_text(json.dumps(tables, indent=1) + "\n")
    console.print(f"Written to {out} in {time.perf_counter() - started:.0f} s: table.md and results.json.")


if __name__ == "__main__":
    typer.run(main)
