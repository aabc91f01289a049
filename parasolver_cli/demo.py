"""``parasolver demo``: where parallel sampling is faster here, then the embedded model through three samplers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress

from parasolver_adapters.embedded import SCHEDULE, EmbeddedDenoiser
from parasolver_cli import figures, report, terminal
from parasolver_cli.faster import paths, pendulum
from parasolver_cli.folder import prepared, write_record
from parasolver_cli.meter import Callback, bar, bars
from parasolver_cli.outcome import COLUMNS, Case, Look, Outcome, Row
from parasolver_cli.sample import machine
from parasolver_cli.watching import Watch, first_sample, relative_errors
from parasolver_core import DDIM, DDPM, DPMSolver, Solution, StepRule, __version__, solve, solve_sequential

MAX_ROWS = 128  # a larger batch is no faster on a CPU and only takes memory
FEW = 4  # samples of a sampler with so many steps that all of them would take too long
_LEAD = (
    "Rounds: calls one after another, sequentially → in parallel (of the slowest sample). Error: distance to the "
    "sequential result, relative to its size."
)
_WHY = (
    "A batch of pictures keeps a CPU busy: more rows in a call take as much longer, so the seconds of the pictures "
    "follow the evaluations and do not fall here. They fall where larger calls are nearly as fast, on a GPU with room "
    "to spare or on several. parasolver bench tells whether it pays on a machine."
)


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


@dataclass
class Found:
    """What was finished."""

    rows: list[Row] = field(default_factory=list)
    stories: list[report.Story] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    interrupted: bool = False

    def add(self, outcome: Outcome, tolerance: float) -> None:
        """One more sampler of pictures."""
        self.outcomes.append(outcome)
        self.rows.append(outcome.row(tolerance))
        self.stories.append(_story(outcome))


def run(settings: Settings, as_json: bool = False) -> bool:
    """Sample, draw and report; False if the user broke it off."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    found = Found()
    try:
        _collect(settings, found)
    except KeyboardInterrupt:
        if not found.rows:
            raise
        found.interrupted = True
    with prepared(settings.out) as folder:
        files = _save(found, settings)
        record = write_record(folder, summary(found, settings), files)
    if as_json:
        terminal.print_json(record)
    _tell(found, settings, as_json)
    return not found.interrupted


def _collect(settings: Settings, found: Found) -> None:
    console = terminal.progress()

    def told(row: Row) -> None:
        console.print(row.line, highlight=False, markup=False)

    if not settings.quick:
        console.print("This takes some minutes. Ctrl-C keeps what is finished.", highlight=False)
    with console.status("A pendulum, step after step and all steps at once"):
        found.rows.append(pendulum(settings.quick))
    told(found.rows[-1])
    with console.status("Robot paths"):
        row, story = paths(settings.seed, settings.tolerance)
        found.rows.append(row)
        found.stories.append(story)
    told(found.rows[-1])
    with console.status("Loading the embedded model"):
        denoiser = EmbeddedDenoiser()
        generator = torch.Generator().manual_seed(settings.seed)
        x_T = torch.randn(settings.count, 1, 28, 28, generator=generator)
        denoiser(x_T, torch.full((settings.count,), 500))  # a network's first call is slower than the rest
    with bars(console) as progress:
        for case in cases(settings):
            found.add(_sample(case, denoiser, x_T, settings, progress), settings.tolerance)
            told(found.rows[-1])


def cases(settings: Settings) -> list[Case]:
    """The three samplers on the schedule that the embedded model was trained with."""
    ddim, dpm, ddpm = (20, 10, 50) if settings.quick else (50, 25, 1000)
    few = min(settings.count, 1 if settings.quick else FEW)
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
    arguments: Any = (denoiser, x_T, case.timesteps, case.step_rule)
    steps = len(case.timesteps) * case.samples
    sequential, seconds_sequential = _timed(
        lambda callback: solve_sequential(*arguments, callback=callback, **common),
        bar(progress, f"{case.name}, sequential", steps),
    )
    watch = Watch(report.SHOWN, bar(progress, f"{case.name}, in parallel", steps))
    parallel, seconds_parallel = _timed(
        lambda callback: solve(
            *arguments, window=case.window, tolerance=settings.tolerance, callback=callback, **common
        ),
        watch,
    )
    watch.finish(parallel.stats.rounds, parallel.sample)
    truth = _pictures(sequential.sample)
    estimates = np.stack([_pictures(frame) for frame in watch.frames])
    errors = np.array([relative_errors(frame[:1], truth[:1])[0] for frame in estimates])
    return Outcome(
        case=case,
        sequential=truth,
        parallel=_pictures(parallel.sample),
        rounds=parallel.stats.rounds,
        evaluations=parallel.stats.evaluations / case.samples,
        errors=relative_errors(_pictures(parallel.sample), truth),
        seconds_sequential=seconds_sequential,
        seconds_parallel=seconds_parallel - watch.seconds,
        look=Look(watch.rounds, estimates, errors, first_sample(parallel.stats)),
    )


def _timed(sample: Callable[[Callback], Solution], callback: Callback) -> tuple[Solution, float]:
    started = time.perf_counter()
    return sample(callback), time.perf_counter() - started


def _pictures(sample: torch.Tensor) -> NDArray[np.float32]:
    return sample[:, 0].numpy(force=True)


def _levels(pictures: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.round((np.clip(pictures, -1, 1) + 1) * 127.5).astype(np.uint8)[..., None]


def _story(one: Outcome) -> report.Story:
    sequential, parallel = _levels(one.sequential), _levels(one.parallel)
    gain = report.round_gain(one.parallel, one.sequential, 2.0)
    signed = report.differences(127.5 * one.parallel[..., None], 127.5 * one.sequential[..., None], gain)
    ends = {
        "sequential": report.grid(sequential),
        "parallel": report.grid(parallel),
        f"difference × {gain:g}": report.grid(signed),
    }
    frames = [report.grid(_levels(frame)) for frame in one.look.estimates]
    return report.Story(
        one.case.name,
        one.steps,
        one.rounds,
        one.look.rounds,
        frames,
        one.look.errors.tolist(),
        ends,
        one.look.records,
    )


def _save(found: Found, settings: Settings) -> list[str]:
    """The figures and the report; their names."""
    with terminal.progress().status("Drawing"):
        files = figures.draw_all(found.outcomes, settings.out) if found.outcomes else []
        cells = [row.cells() for row in found.rows]
        lead = "\n".join(_remarks(found))
        columns = [name.replace("\n", " ") for name in COLUMNS]
        text = report.page("ParaSolver: the same samples, in fewer rounds", lead, columns, cells, found.stories)
        (settings.out / "report.html").write_text(text, encoding="utf-8")
    return [*files, "report.html"]


def _tell(found: Found, settings: Settings, as_json: bool) -> None:
    console = terminal.progress() if as_json else terminal.results()
    columns = [terminal.Column(name, words=name in ("", "verdict")) for name in COLUMNS]
    terminal.print_table(console, "One step after another → in parallel", columns, [row.cells() for row in found.rows])
    told = _remarks(found)
    told.append(f"Look at {settings.out / 'report.html'}; the figures and result.json are beside it.")
    console.print("\n".join(told), highlight=False, markup=False)


def _remarks(found: Found) -> list[str]:
    """What is to be said to the table."""
    told = [_LEAD]
    if found.outcomes:
        told.append(_WHY)
    if not all(row.kept for row in found.rows):
        told.append("!: further away than the tolerance, which is kept by an estimate; a smaller one is nearer.")
    if found.interrupted:
        told.append("Interrupted; what was finished is kept.")
    return told


def summary(found: Found, settings: Settings) -> dict[str, Any]:
    """All figures of the table, and what they depend on, ready for JSON."""
    return {
        "version": __version__,
        "settings": asdict(settings) | {"out": str(settings.out)},
        "machine": machine("cpu"),
        "interrupted": found.interrupted,
        "table": [asdict(row) | {"verdict": row.verdict} for row in found.rows],
        "samplers": [
            {
                "name": one.case.name,
                "steps": one.steps,
                "samples": one.case.samples,
                "window": one.case.window,
                "rounds": one.rounds,
                "rounds_of_first": one.own_rounds,
                "evaluations_per_sample": one.evaluations,
                "error_mean": float(one.errors.mean()),
                "error_worst": float(one.errors.max()),
                "errors": one.errors.tolist(),
                "within_tolerance": bool((one.errors <= settings.tolerance).all()),
                "seconds_sequential": one.seconds_sequential,
                "seconds_parallel": one.seconds_parallel,
                "rounds_shown": one.look.rounds,
                "errors_after_round": one.look.errors.tolist(),
            }
            for one in found.outcomes
        ],
    }
