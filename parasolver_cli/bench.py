"""``parasolver bench``: whether parallel sampling pays with a network on this machine, measured."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parasolver_cli import terminal
from parasolver_cli.faster import OBSTACLES
from parasolver_cli.models import EMBEDDED, ModelSettings, load
from parasolver_cli.outcome import percent, told_seconds
from parasolver_cli.processes import processes
from parasolver_cli.sample import SAMPLERS as SAMPLERS
from parasolver_cli.sample import machine, sampler_of
from parasolver_cli.watching import relative_errors
from parasolver_core import (
    DDIM,
    DDPM,
    DPMSolver,
    NoiseSchedule,
    Rows,
    Solution,
    StepRule,
    __version__,
    solve,
    solve_sequential,
)
from parasolver_core.denoiser.contract import takes_rows

_PAYS = 1.1  # times as fast, below which the difference is no more than that of two timings
_CHEAP = 4.0  # so many times as long, and a larger call is no reason why it does not pay
_MOST_ROWS = 256
_RULES: dict[str, Callable[..., StepRule]] = {"ddim": DDIM, "dpm": DPMSolver, "ddpm": DDPM}


@dataclass(frozen=True)
class Settings:
    """The options of the command."""

    networks: tuple[str, ...]
    checkpoint: Path | None
    preset: str
    sampler: str
    steps: int
    tolerance: float
    batch: int
    device: str
    dtype: str
    threads: int | None
    budget: float


@dataclass(frozen=True)
class Problem:
    """What is sampled."""

    name: str
    denoiser: Any
    x_T: Tensor
    timesteps: Any
    step_rule: StepRule


@dataclass(frozen=True)
class Timing:
    """One window; 1 is sequential sampling."""

    window: int
    rounds: int
    evaluations: float
    seconds: float
    error: float


@dataclass(frozen=True)
class Measured:
    """What one network gave.

    Args:
        name: of the network.
        timings: sequential sampling first.
        call: how many times as long as of one row a call of 16 rows takes.
    """

    name: str
    timings: list[Timing]
    call: float

    @property
    def best(self) -> Timing | None:
        """The fastest window; None if there was no time for any."""
        return min(self.timings[1:], key=lambda one: one.seconds, default=None)

    @property
    def verdict(self) -> str:
        """In plain words."""
        sequential, best = self.timings[0].seconds, self.best
        if best is None:
            return "no time for a window within the budget; give a larger --budget"
        gain, times = sequential / best.seconds, f"{told_seconds(best.seconds)} instead of {told_seconds(sequential)}"
        if gain >= _PAYS:
            return f"pays: {gain:.3g}x at window {best.window} ({times})"
        why = "it pays where that is less" if self.call > _CHEAP else "but the solver's own time counts with it"
        return (
            f"does not pay here: at best {gain:.2g}x, at window {best.window} ({times}). A call of 16 rows takes "
            f"{self.call:.3g} times as long as one of one row; {why}"
        )


def run(settings: Settings, as_json: bool = False) -> list[Measured]:
    """Measure and report."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    networks = (settings.preset,) if settings.checkpoint is not None else settings.networks
    found = []
    with processes(settings.device) as team:
        if team.count > 1:
            raise ValueError("network: this measures one process; start it without torchrun")
        for name in networks:
            with terminal.progress().status(f"Sampling {name}"):
                found.append(
                    _measured(_problem(name, settings, team.device), settings, settings.budget / len(networks))
                )
            if not as_json:
                _tell(found[-1], settings)
    if as_json:
        terminal.print_json(_record(found, settings, team.device))
    return found


def _measured(problem: Problem, settings: Settings, budget: float) -> Measured:
    started = time.perf_counter()
    call = _call_ratio(problem)
    sequential, seconds = _timed(lambda: _run(problem, None, settings), problem)
    batch, truth = len(problem.x_T), sequential.sample.numpy(force=True)
    timings = [Timing(1, len(problem.timesteps), len(problem.timesteps), seconds, 0.0)]
    for window in _windows(len(problem.timesteps)):
        spent = time.perf_counter() - started
        if len(timings) > 1 and (spent + timings[-1].seconds > budget or _hopeless(timings)):
            break
        found, seconds = _timed(lambda window=window: _run(problem, window, settings), problem)
        error = float(relative_errors(found.sample.numpy(force=True), truth).max())
        timings.append(Timing(window, found.stats.rounds, found.stats.evaluations / batch, seconds, error))
    return _again(Measured(problem.name, timings, call), problem, settings, budget - (time.perf_counter() - started))


def _again(found: Measured, problem: Problem, settings: Settings, left: float) -> Measured:
    """The best window and sequential sampling once more, in turn, as far as the time allows: the least counts."""
    best = found.best
    timings = {one.window: one for one in found.timings}
    for _ in range(3):
        if best is None or left < timings[1].seconds + best.seconds:
            break
        for window in (1, best.window):
            _, seconds = _timed(lambda window=window: _run(problem, None if window == 1 else window, settings), problem)
            left -= seconds
            one = timings[window]
            timings[window] = replace(one, seconds=min(one.seconds, seconds))
    return Measured(found.name, [*timings.values()], found.call)


def _hopeless(timings: list[Timing]) -> bool:
    """Whether the last two windows were ever slower."""
    return len(timings) > 3 and timings[-1].seconds > timings[-2].seconds > timings[-3].seconds


def _windows(steps: int) -> Iterator[int]:
    window = 2
    while window < steps:
        yield window
        window *= 2
    yield steps


def _run(problem: Problem, window: int | None, settings: Settings) -> Solution:
    arguments = (problem.denoiser, problem.x_T, problem.timesteps, problem.step_rule)
    options: dict[str, Any] = {"seed": 0, "max_rows": _MOST_ROWS}
    if window is None:
        return solve_sequential(*arguments, **options)
    return solve(*arguments, window=window, tolerance=settings.tolerance, **options)


def _timed(work: Callable[[], Solution], problem: Problem) -> tuple[Solution, float]:
    started = time.perf_counter()
    found = work()
    _wait(problem.x_T)
    return found, time.perf_counter() - started


def _wait(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


def _call_ratio(problem: Problem) -> float:
    """Seconds of a call of 16 rows over those of one row."""
    recurrence, seconds = problem.step_rule.recurrence(problem.timesteps), []
    for rows in (1, 16):
        x = problem.x_T[:1].expand(rows, *problem.x_T.shape[1:]).contiguous()
        nowhere = np.zeros(rows, dtype=np.int64)
        t = torch.as_tensor(np.asarray(problem.timesteps)[nowhere], device=x.device)
        of_one = Rows(
            nowhere, nowhere, recurrence, lambda step, sample: torch.zeros_like(problem.x_T[0]), len(problem.x_T)
        )
        times = []
        for _ in range(4):
            started = time.perf_counter()
            with torch.no_grad():
                problem.denoiser(x, t, of_one) if takes_rows(problem.denoiser) else problem.denoiser(x, t)
            _wait(x)
            times.append(time.perf_counter() - started)
        seconds.append(min(times))
    return seconds[1] / seconds[0]


def _problem(name: str, settings: Settings, device: str) -> Problem:
    generator = torch.Generator().manual_seed(0)
    if name == "policy":
        return _policy(settings, device, generator)
    if ":" in name:
        return _own(name, settings, device)
    if name != settings.preset and name != EMBEDDED:
        raise ValueError(f"network: expected fashion-mnist, policy, or file.py:function, got {name}")
    chosen = ModelSettings(
        checkpoint=settings.checkpoint, preset=name, count=settings.batch, device=device, dtype=settings.dtype
    )
    loaded = load(chosen)
    denoiser, rule = sampler_of(loaded.model, settings.sampler)
    x_T = torch.randn(settings.batch, *loaded.event, generator=generator).to(device)
    return Problem(name, denoiser, x_T, loaded.model.timesteps(settings.steps), rule)


def _policy(settings: Settings, device: str, generator: torch.Generator) -> Problem:
    from parasolver_adapters.embedded import policy

    network, told = policy.load_policy().to(device), torch.tensor([OBSTACLES[0]], device=device)
    x_T = torch.randn(settings.batch, policy.WAYPOINTS, 2, generator=generator).to(device)
    rule = _RULES[settings.sampler](policy.SCHEDULE, prediction_type=policy.PREDICTION_TYPE)
    return Problem(
        "policy",
        lambda x, t: network(x, t, told.expand(len(x), -1)),
        x_T,
        policy.SCHEDULE.timesteps(settings.steps),
        rule,
    )


def _own(name: str, settings: Settings, device: str) -> Problem:
    """What a function of the user's returns."""
    file, _, function = name.rpartition(":")
    spec = importlib.util.spec_from_file_location("network_of_the_user", file)
    if not Path(file).is_file() or spec is None or spec.loader is None:
        raise ValueError(f"network: there is no Python file {file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make = getattr(module, function, None)
    if not callable(make):
        raise ValueError(f"network: {file} has no function {function!r}")
    made = make(device)
    if not (isinstance(made, tuple) and len(made) in (2, 3) and callable(made[0]) and isinstance(made[1], Tensor)):
        raise TypeError(
            f"network: {function} should return (denoiser, x_T) or (denoiser, x_T, step_rule), got {made!r}"
        )
    schedule = NoiseSchedule.linear()
    rule = made[2] if len(made) == 3 else _RULES[settings.sampler](schedule)
    timesteps = getattr(rule, "schedule", schedule).timesteps(settings.steps)
    return Problem(function, made[0], made[1], timesteps, rule)


def _tell(found: Measured, settings: Settings) -> None:
    console = terminal.results()
    columns = [terminal.Column(name) for name in ("window", "rounds", "evaluations\na sample", "time", "gain", "error")]
    rows = [
        [
            "sequential" if one.window == 1 else str(one.window),
            str(one.rounds),
            f"{one.evaluations:.0f}",
            told_seconds(one.seconds),
            f"{found.timings[0].seconds / one.seconds:.2f}x",
            "" if one.window == 1 else percent(one.error),
        ]
        for one in found.timings
    ]
    title = f"{found.name}, {settings.sampler.upper()}-{settings.steps}, tolerance {100 * settings.tolerance:g} %"
    terminal.print_table(console, title, columns, rows)
    console.print(f"{found.name} {found.verdict}.\n", highlight=False, markup=False)


def _record(found: list[Measured], settings: Settings, device: str) -> dict[str, Any]:
    given = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}
    return {
        "version": __version__,
        "settings": given,
        "machine": machine(device),
        "networks": [asdict(one) | {"verdict": one.verdict} for one in found],
    }
