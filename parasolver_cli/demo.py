"""``parasolver demo``: the embedded model through three samplers, sequentially and in parallel."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from parasolver_adapters.embedded import SCHEDULE, EmbeddedDenoiser
from parasolver_cli import figures
from parasolver_cli.meter import Callback, bar, bars
from parasolver_cli.outcome import Case, Look, Outcome
from parasolver_core import (
    DDIM,
    DDPM,
    DPMSolver,
    ParallelIntegralSolver,
    Solution,
    StepRule,
    __version__,
    solve,
    solve_sequential,
)

DOCS = "docs/benchmarks.md"
MAX_ROWS = 128  # a larger batch is no faster on a CPU and only takes memory
FEW = 4  # samples of a sampler with so many steps that all of them would take too long


@dataclass(frozen=True)
class Settings:
    """The options of the command."""

    out: Path
    count: int
    seed: int
    window: int
    tolerance: float
    threads: int | None
    quick: bool


def run(settings: Settings, console: Console) -> list[Outcome]:
    """Sample, draw and report."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with console.status("Loading the embedded model"):
        denoiser = EmbeddedDenoiser()
        generator = torch.Generator().manual_seed(settings.seed)
        x_T = torch.randn(settings.count, 1, 28, 28, generator=generator)
        denoiser(x_T, torch.full((settings.count,), 500))  # a network's first call is slower than the rest
    with bars(console) as progress:
        outcomes = [_sample(case, denoiser, x_T, settings, progress) for case in cases(settings)]
    _save(outcomes, settings, console)
    console.print(_table(outcomes, settings.tolerance))
    console.print(_note(outcomes, settings.count), highlight=False)
    console.print(f"Pictures and figures are in [bold]{settings.out}[/].", highlight=False)
    return outcomes


def cases(settings: Settings) -> list[Case]:
    """The three samplers on the schedule that the embedded model was trained with."""
    ddim, dpm, ddpm = (20, 10, 50) if settings.quick else (50, 25, 1000)
    few = min(settings.count, FEW)
    rows: list[tuple[str, StepRule, int, int, int]] = [
        ("DDIM", DDIM(SCHEDULE), ddim, settings.window, settings.count),
        ("DPM-Solver++(2M)", DPMSolver(SCHEDULE, order=2), dpm, settings.window, settings.count),
        ("DDPM", DDPM(SCHEDULE), ddpm, 4 * settings.window, few),
    ]
    return [
        Case(f"{name}-{steps}", rule, SCHEDULE.timesteps(steps), min(window, steps), samples)
        for name, rule, steps, window, samples in rows
    ]


def _sample(
    case: Case, denoiser: EmbeddedDenoiser, x_T: torch.Tensor, settings: Settings, progress: Progress
) -> Outcome:
    x_T = x_T[: case.samples]
    common: dict[str, Any] = {"seed": settings.seed, "max_rows": MAX_ROWS}
    arguments, steps = (denoiser, x_T, case.timesteps, case.step_rule), len(case.timesteps) * case.samples
    sequential, seconds_sequential = _timed(
        lambda callback: solve_sequential(*arguments, callback=callback, **common),
        bar(progress, f"{case.name}, sequential", steps),
    )
    parallel, seconds_parallel = _timed(
        lambda callback: solve(
            *arguments, window=case.window, tolerance=settings.tolerance, callback=callback, **common
        ),
        bar(progress, f"{case.name}, in parallel", steps),
    )
    truth = _pictures(sequential.sample)
    return Outcome(
        case=case,
        sequential=truth,
        parallel=_pictures(parallel.sample),
        rounds=parallel.stats.rounds,
        evaluations=parallel.stats.evaluations / case.samples,
        errors=relative_error(_pictures(parallel.sample), truth),
        seconds_sequential=seconds_sequential,
        seconds_parallel=seconds_parallel,
        look=_look(case, denoiser, x_T[:1], truth[0], settings),
    )


def _look(
    case: Case, denoiser: EmbeddedDenoiser, x_T: torch.Tensor, truth: NDArray[np.float32], settings: Settings
) -> Look:
    """Sample the first picture once more by itself, so that looking at it does not count in the seconds."""
    solver = ParallelIntegralSolver(case.step_rule, case.window, tolerance=settings.tolerance, max_rows=MAX_ROWS)
    state = solver.init(denoiser, x_T, case.timesteps, seed=settings.seed)
    estimates = []
    while not solver.done(state):
        solver.step(state)
        estimates.append(_pictures(state.estimate())[0])
    pictures = np.stack(estimates)
    records = [record.samples[0] for record in state.stats.history]
    return Look(pictures, relative_error(pictures, truth), records)


def relative_error(pictures: NDArray[np.float32], truth: NDArray[np.float32]) -> NDArray[np.float64]:
    """RMS distance of each picture to the true one over the RMS of the latter."""
    difference = np.mean((pictures - truth).astype(np.float64) ** 2, axis=(-2, -1))
    return np.sqrt(difference / np.mean(truth.astype(np.float64) ** 2, axis=(-2, -1)))


def _timed(sample: Callable[[Callback], Solution], callback: Callback) -> tuple[Solution, float]:
    started = time.perf_counter()
    return sample(callback), time.perf_counter() - started


def _pictures(sample: torch.Tensor) -> NDArray[np.float32]:
    return sample[:, 0].numpy(force=True)


def _table(outcomes: list[Outcome], tolerance: float) -> Table:
    table = Table(
        title="Sequential→parallel",
        title_style="bold",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("sampler")
    for name in (
        "window",
        "rounds",
        "evals per\nsample",
        "error, %\nmean / worst",
        f"within\n{100 * tolerance:g} %",
        "seconds",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for one in outcomes:
        within = np.count_nonzero(one.errors <= tolerance)
        style = "green" if within == len(one.errors) else "red"
        table.add_row(
            one.case.name,
            str(one.case.window),
            f"{one.steps}→[bold]{one.rounds}[/]",
            f"{one.steps}→{one.evaluations:.0f}",
            f"{100 * one.errors.mean():.2f} / {100 * one.errors.max():.2f}",
            f"[{style}]{within}/{len(one.errors)}[/]",
            f"{_seconds(one.seconds_sequential)}→{_seconds(one.seconds_parallel)}",
        )
    return table


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _note(outcomes: list[Outcome], count: int) -> str:
    note = (
        "Error: RMS distance to the sequential picture, relative to it. Rounds: batched network calls, one "
        "after another. On one CPU a batch costs as much as its rows, so the seconds do not fall here: they "
        "follow the evaluations. Rounds are what falls, and what counts where a batch is nearly free (a GPU "
        f"with room to spare, or several). See {DOCS}."
    )
    fewer = [one for one in outcomes if one.case.samples < count]
    if fewer:
        name, samples = fewer[0].case.name, fewer[0].case.samples
        note += f"\n{name} takes the first {samples} pictures only, to save your time."
    return note


def _save(outcomes: list[Outcome], settings: Settings, console: Console) -> None:
    with console.status("Drawing"):
        figures.draw_all(outcomes, settings.out)
    (settings.out / "result.json").write_text(json.dumps(summary(outcomes, settings), indent=2) + "\n")


def summary(outcomes: list[Outcome], settings: Settings) -> dict[str, Any]:
    """All figures of the table, and what they depend on, ready for JSON."""
    return {
        "version": __version__,
        "settings": asdict(settings) | {"out": str(settings.out)},
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "samplers": [
            {
                "name": one.case.name,
                "steps": one.steps,
                "samples": one.case.samples,
                "window": one.case.window,
                "rounds": one.rounds,
                "evaluations_per_sample": one.evaluations,
                "error_mean": float(one.errors.mean()),
                "error_worst": float(one.errors.max()),
                "errors": one.errors.tolist(),
                "within_tolerance": bool((one.errors <= settings.tolerance).all()),
                "seconds_sequential": one.seconds_sequential,
                "seconds_parallel": one.seconds_parallel,
                "errors_after_round": one.look.errors.tolist(),
            }
            for one in outcomes
        ],
    }
