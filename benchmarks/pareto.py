"""Which method needs the fewest rounds and evaluations for the same true error? ``python -m benchmarks.pareto``.

Every method runs with several tolerances on the same samples; its error is the relative distance to the sequential
sample, so that a method is never judged by what its own tolerance means. Results are kept in a JSON file after every
run, from which an interrupted benchmark goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, cast

import matplotlib as mpl
import numpy as np
import torch
import typer
from diffusers import HeunDiscreteScheduler, UniPCMultistepScheduler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.baselines import parareal
from benchmarks.problems import PROBLEMS, Denoiser, Problem, flow_denoiser
from parasolver_adapters.diffusers import step_rule_from_scheduler
from parasolver_cli.figures import MUTED, STYLE
from parasolver_core import DDIM, DDPM, DPMSolver, Euler, NoiseSchedule, Solution, StepRule, solve, solve_sequential

SCHEDULERS = {"UniPC": UniPCMultistepScheduler, "Heun": HeunDiscreteScheduler}
OURS, IDENTITY, PUBLISHED = "secant", "identity", ("paradigms", "parasolver", "parataa", "parareal")
MAX_ROWS = 256


@dataclass(frozen=True)
class Setting:
    """A sampler, its number of steps and the window; a step of Heun's method has two nodes."""

    name: str
    sampler: str
    steps: int
    window: int

    @property
    def noisy(self) -> bool:
        return self.sampler == "DDPM"


SETTINGS = {
    one.name: one
    for one in (
        Setting("DDIM-50, window 16", "DDIM", 50, 16),
        Setting("DDIM-50, window 8", "DDIM", 50, 8),
        Setting("DDIM-50, window 50", "DDIM", 50, 50),
        Setting("DDIM-100, window 5", "DDIM", 100, 5),
        Setting("2M-25, window 8", "2M", 25, 8),
        Setting("3M-25, window 8", "3M", 25, 8),
        Setting("UniPC-25, window 8", "UniPC", 25, 8),
        Setting("Heun-25, window 16", "Heun", 25, 16),
        Setting("flow Euler-50, window 16", "flow", 50, 16),
        Setting("flow Euler-28, window 8", "flow", 28, 8),
        Setting("flow Euler-28, window 28", "flow", 28, 28),
        Setting("DDIM-1000, window 32", "DDIM", 1000, 32),
        Setting("DDPM-100, window 16", "DDPM", 100, 16),
        Setting("DDPM-1000, window 100", "DDPM", 1000, 100),
    )
}
QUICK = {
    "policy": (
        "DDIM-50, window 16",
        "DDIM-50, window 50",
        "2M-25, window 8",
        "DDIM-1000, window 32",
        "DDPM-1000, window 100",
    ),
    "mixture": (
        "DDIM-50, window 16",
        "DDIM-50, window 50",
        "2M-25, window 8",
        "DDIM-1000, window 32",
        "DDPM-1000, window 100",
    ),
    "clothes": ("DDIM-50, window 16", "DDIM-50, window 50", "2M-25, window 8"),
    "emoji": ("DDIM-50, window 16",),
}
FULL = {name: tuple(SETTINGS) for name in PROBLEMS}


@dataclass(frozen=True)
class Target:
    """What is asked of our method: at most these shares of a baseline's rounds and evaluations at an error."""

    setting: str
    error: float
    rounds: float
    evaluations: float
    baseline: str = "parasolver"


TARGETS = (
    Target("DDIM-50, window 16", 1e-2, 0.75, 0.75),
    Target("DDIM-50, window 50", 1e-2, 0.70, 0.60),
    Target("2M-25, window 8", 1e-2, 0.85, 0.80, IDENTITY),
    Target("DDIM-1000, window 32", 1e-2, 0.30, 0.35),
    Target("DDPM-1000, window 100", 1e-2, 0.8, 1.1),
    Target("DDPM-1000, window 100", 5e-2, 0.65, 1.0),
)
ERRORS = (5e-2, 2e-2, 1e-2, 4e-3)


def step_rule(problem: Problem, setting: Setting, steps: int | None = None) -> tuple[StepRule, np.ndarray]:
    """The sampler on the problem's schedule, and its timesteps."""
    schedule, kind, steps = problem.schedule, problem.prediction_type, steps or setting.steps
    if setting.sampler in SCHEDULERS:
        betas = 1 - schedule.alphas_cumprod / np.append(1.0, schedule.alphas_cumprod[:-1])
        scheduler = SCHEDULERS[setting.sampler](
            trained_betas=betas.tolist(), prediction_type=kind, timestep_spacing="trailing"
        )
        rule = step_rule_from_scheduler(scheduler, steps)
        return rule, rule.timesteps
    if setting.sampler == "flow":
        path = NoiseSchedule.flow_matching()
        return Euler(path), path.timesteps(steps)
    options: dict[str, Any] = {"prediction_type": kind}
    rules: dict[str, Callable[[], StepRule]] = {
        "DDIM": lambda: DDIM(schedule, **options),
        "DDPM": lambda: DDPM(schedule, **options),
        "2M": lambda: DPMSolver(schedule, 2, **options),
        "3M": lambda: DPMSolver(schedule, 3, **options),
    }
    return rules[setting.sampler](), schedule.timesteps(steps)


def tolerances(method: str, setting: Setting) -> tuple[float, ...]:
    """From loose to tight, so that the errors of all methods reach from about 0.1 to 1e-3."""
    if method in (OURS, IDENTITY):
        return (0.99, 0.6, 0.3, 0.1, 0.05, 0.03, 0.01, 3e-3)
    if method == "parataa":
        return (0.99, 0.3, 0.1, 0.03, 0.01, 3e-3)
    return (0.99, 0.55, 0.3, 0.1, 0.03) if setting.noisy else (0.99, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3)


@dataclass(frozen=True)
class Point:
    """One method with one tolerance on all samples of a problem and setting.

    Args:
        errors: of each sample.
        rounds, evaluations: of each sample.
    """

    problem: str
    setting: str
    method: str
    tolerance: float
    errors: list[float]
    rounds: list[int]
    evaluations: list[int]
    seconds: float

    @property
    def error(self) -> float:
        """Geometric mean."""
        return float(np.exp(np.mean(np.log(np.maximum(self.errors, 1e-12)))))

    @property
    def key(self) -> tuple[str, str, str, float]:
        return self.problem, self.setting, self.method, self.tolerance


class Bench:
    """Samples of one problem and setting, by their seeds from ``first`` on, and their sequential truth."""

    def __init__(self, problem: Problem, setting: Setting, denoiser: Denoiser, seeds: int, first: int = 0) -> None:
        self.problem, self.setting = problem, setting
        self.denoiser = flow_denoiser(denoiser, problem) if setting.sampler == "flow" else denoiser
        self.rule, self.timesteps = step_rule(problem, setting)
        self.x_T = problem.starts(seeds, first) * getattr(self.rule, "init_noise_sigma", 1.0)
        self.seeds = list(range(first, first + seeds))

    @cached_property
    def truth(self) -> torch.Tensor:
        """The sequential samples."""
        return solve_sequential(self.denoiser, self.x_T, self.timesteps, self.rule, seed=self.seeds).sample

    def errors(self, sample: torch.Tensor) -> list[float]:
        """Relative RMS distance of each sample to the truth."""
        truth = self.truth.flatten(1).double()
        return ((sample.flatten(1).double() - truth).norm(dim=1) / truth.norm(dim=1)).tolist()

    def points(self, method: str, done: set[tuple[str, str, str, float]]) -> Iterator[Point]:
        """What is not done yet of a method."""
        if method == "parareal":
            yield from self._parareal(done)
            return
        if method == "few steps":
            yield from self._few_steps(done)
            return
        for tolerance in tolerances(method, self.setting):
            if (self.problem.name, self.setting.name, method, tolerance) in done:
                continue
            warmup = 4 if method == "parasolver" and self.setting.noisy else 0
            started = time.perf_counter()
            solution = solve(
                self.denoiser,
                self.x_T,
                self.timesteps,
                self.rule,
                self.setting.window,
                tolerance=tolerance,
                method=method,
                warmup_steps=warmup,
                seed=self.seeds,
                check=False,
                max_rows=MAX_ROWS,
            )
            yield self._point(method, tolerance, solution.sample, *spent(solution, len(self.seeds)), started)

    def _point(
        self,
        method: str,
        tolerance: float,
        sample: torch.Tensor,
        rounds: list[int],
        evaluations: list[int],
        started: float,
    ) -> Point:
        return Point(
            self.problem.name,
            self.setting.name,
            method,
            tolerance,
            self.errors(sample),
            rounds,
            evaluations,
            time.perf_counter() - started,
        )

    def _parareal(self, done: set[tuple[str, str, str, float]]) -> Iterator[Point]:
        if (self.problem.name, self.setting.name, "parareal", 0.0) in done:
            return
        started, points, many = time.perf_counter(), [], len(self.seeds)
        for k, one in enumerate(parareal(self.denoiser, self.x_T, self.timesteps, self.rule)):
            points.append(
                self._point("parareal", float(k), one.sample, [one.rounds] * many, [one.evaluations] * many, started)
            )
            if points[-1].error < 1e-3:
                break
        yield from points  # all at once: an interrupted benchmark begins its iterations anew

    def _few_steps(self, done: set[tuple[str, str, str, float]]) -> Iterator[Point]:
        """What a user would take instead: fewer steps of a good sequential sampler."""
        for sampler in ("2M", "UniPC"):
            for steps in (4, 6, 8, 10, 12, 15, 20, 25, 30, 40):
                if (self.problem.name, self.setting.name, sampler, float(steps)) in done:
                    continue
                rule, timesteps = step_rule(self.problem, Setting("", sampler, steps, 1))
                started = time.perf_counter()
                sample = solve_sequential(self.denoiser, self.x_T, timesteps, rule).sample
                many = len(self.seeds)
                yield self._point(sampler, float(steps), sample, [steps] * many, [steps] * many, started)


def spent(solution: Solution, batch: int) -> tuple[list[int], list[int]]:
    """Rounds and evaluations of each sample."""
    records = [one for part in solution.stats.history for one in part.samples]
    rounds, evaluations = [0] * batch, [0] * batch
    for one in records:
        rounds[one.sample] += 1
        evaluations[one.sample] += len(one.nodes)
    return rounds, evaluations


def at_error(points: list[Point], error: float) -> tuple[float, float] | None:
    """Mean rounds and evaluations at an error, interpolated in its logarithm; None if the points do not reach it."""
    ordered = sorted(points, key=lambda one: one.error)
    best: list[Point] = []  # what no other point beats in error and evaluations
    for one in ordered:
        if not best or np.mean(one.rounds) < np.mean(best[-1].rounds):
            best.append(one)
    logs = np.log([one.error for one in best])
    if not best or not logs[0] <= np.log(error):
        return None
    rounds, evaluations = (
        float(np.interp(np.log(error), logs, [np.mean(getattr(one, what)) for one in best]))
        for what in ("rounds", "evaluations")
    )
    return rounds, evaluations


class Results:
    """All points, kept in a file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.points = [Point(**one) for one in json.loads(file.read_text())] if file.exists() else []

    def add(self, point: Point) -> None:
        self.points.append(point)
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps([asdict(one) for one in self.points]))
        temporary.replace(self.file)

    def of(self, problem: str, setting: str, method: str) -> list[Point]:
        return [one for one in self.points if (one.problem, one.setting, one.method) == (problem, setting, method)]

    def methods(self, problem: str, setting: str) -> list[str]:
        """In the order in which they ran."""
        return list(
            dict.fromkeys(one.method for one in self.points if (one.problem, one.setting) == (problem, setting))
        )

    def at(self, problem: str, setting: str, method: str, error: float) -> tuple[float, float] | None:
        return at_error(self.of(problem, setting, method), error)


def methods_for(setting: Setting) -> tuple[str, ...]:
    """The published methods where they are defined; fewer steps where there is no noise to follow."""
    if setting.sampler == "DDIM":
        return (OURS, IDENTITY, *PUBLISHED, "few steps")
    if setting.sampler == "DDPM":
        return (OURS, IDENTITY, "paradigms", "parasolver", "parataa")
    if setting.sampler in ("Heun", "flow"):  # which start or end elsewhere than the alternatives
        return (OURS, IDENTITY, "paradigms", "parasolver")
    return (OURS, IDENTITY, "paradigms", "parasolver", "few steps")


def run(plan: dict[str, tuple[str, ...]], seeds: int, results: Results, methods: list[str] | None = None) -> None:
    """Everything of the plan that the results do not hold yet; None: all methods."""
    for name, settings in plan.items():
        denoiser = PROBLEMS[name].make()
        for setting in (SETTINGS[one] for one in settings):
            bench = Bench(PROBLEMS[name], setting, denoiser, seeds)
            wanted = [one for one in methods_for(setting) if methods is None or one in methods]
            for method in track(wanted, f"{name}, {setting.name}"):
                for point in bench.points(method, {one.key for one in results.points}):
                    results.add(point)


def figure(value: tuple[float, float] | None) -> str:
    """Rounds / evaluations."""
    return "-" if value is None else f"{value[0]:.1f} / {value[1]:.0f}"


def method_table(results: Results) -> list[dict[str, str]]:
    """One row a problem, setting and method, one column an error."""
    rows = []
    for problem, setting in dict.fromkeys((one.problem, one.setting) for one in results.points):
        for method in results.methods(problem, setting):
            row = {"problem": problem, "setting": setting, "method": method}
            rows.append(row | {f"{e:.1%}": figure(results.at(problem, setting, method, e)) for e in ERRORS})
    return rows


def overview(results: Results, error: float) -> list[dict[str, str]]:
    """One row a problem and setting, one column a method: rounds / evaluations at an error."""
    cases = dict.fromkeys((one.problem, one.setting) for one in results.points)
    methods = [one for one in COLORS if any(point.method == one for point in results.points)]
    return [
        {"problem": problem, "setting": setting}
        | {method: figure(results.at(problem, setting, method, error)) for method in methods}
        for problem, setting in cases
    ]


def target_table(results: Results) -> list[dict[str, str]]:
    """One row a target and problem: our share of the baseline's rounds and evaluations."""
    rows = []
    for target in TARGETS:
        for problem in dict.fromkeys(one.problem for one in results.points if one.setting == target.setting):
            ours = results.at(problem, target.setting, OURS, target.error)
            base = results.at(problem, target.setting, target.baseline, target.error)
            row = {"setting": target.setting, "error": f"{target.error:.0%}", "problem": problem}
            row |= {"ours": figure(ours), "baseline": f"{figure(base)} ({target.baseline})"}
            if ours is None or base is None:
                shares, met = ("-", "-"), "not reached"
            else:
                share = (ours[0] / base[0], ours[1] / base[1])
                shares = (f"{share[0]:.2f}", f"{share[1]:.2f}")
                met = "yes" if share[0] <= target.rounds and share[1] <= target.evaluations else "no"
            row |= {
                "rounds": f"{shares[0]} (<= {target.rounds})",
                "evaluations": f"{shares[1]} (<= {target.evaluations})",
            }
            rows.append(row | {"met": met})
    return rows


def worst_excess(results: Results) -> list[dict[str, str]]:
    """Where our rounds exceed the best published method's, at any error: the largest excess first."""
    rows = []
    for problem, setting in dict.fromkeys((one.problem, one.setting) for one in results.points):
        for error in ERRORS:
            ours = results.at(problem, setting, OURS, error)
            others = {m: results.at(problem, setting, m, error) for m in (*PUBLISHED, IDENTITY)}
            reached = {method: value for method, value in others.items() if value is not None}
            if ours is None or not reached:
                continue
            best = min(reached, key=lambda method: reached[method][0])
            rows.append(
                (ours[0] - reached[best][0], problem, setting, error, figure(ours), figure(reached[best]), best)
            )
    names = ("excess", "problem", "setting", "error", "ours", "best other", "method")
    return [
        dict(zip(names, (f"{r[0]:+.1f}", r[1], r[2], f"{r[3]:.1%}", *r[4:]), strict=True))
        for r in sorted(rows, reverse=True, key=lambda r: r[0])
    ]


def show(console: Console, title: str, rows: list[dict[str, str]]) -> None:
    """Print as a table."""
    if not rows:
        return
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*row.values())
    console.print(table)


def markdown(title: str, rows: list[dict[str, str]]) -> str:
    """The same for a file."""
    if not rows:
        return ""
    lines = [f"## {title}", "", "| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(row.values()) + " |" for row in rows), "", ""])


COLORS = {
    OURS: "#e8590c",
    IDENTITY: "#f0a868",
    "paradigms": "#8a9099",
    "parasolver": "#1c6fb5",
    "parataa": "#2b8a3e",
    "parareal": "#9c36b5",
    "2M": "#c2c7cd",
    "UniPC": "#9aa1a9",
}
LABELS = {
    OURS: "ParaSolver, default",
    IDENTITY: "with the identity slope",
    "paradigms": "ParaDiGMS",
    "parasolver": "ParaSolver, ICLR 2025",
    "parataa": "ParaTAA",
    "parareal": "Parareal (SRDS)",
    "2M": "DPM-Solver++(2M), S steps",
    "UniPC": "UniPC, S steps",
}


def draw(results: Results, folder: Path) -> None:
    """One picture a setting: error against rounds, and against evaluations, a column a problem."""
    with mpl.rc_context(cast(Any, STYLE)):
        for setting in dict.fromkeys(one.setting for one in results.points):
            problems = list(dict.fromkeys(one.problem for one in results.points if one.setting == setting))
            picture = Figure(figsize=(max(3.6 * len(problems), 7.2) + 0.6, 7.6), layout="constrained")
            axes = picture.subplots(2, len(problems), sharey=True, squeeze=False)
            for column, problem in enumerate(problems):
                for row, what in enumerate(("rounds", "evaluations")):
                    _curves(axes[row][column], results, problem, SETTINGS[setting], what)
                axes[0][column].set_title(problem)
            for row in axes:
                row[0].set_ylabel("relative error")
            handles = {
                text: line for ax in axes.flat for line, text in zip(*ax.get_legend_handles_labels(), strict=True)
            }
            picture.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
            picture.suptitle(setting, fontweight="bold", x=0.01, ha="left")
            name = setting.lower().replace(", window ", "-w")
            FigureCanvasAgg(picture).print_png(folder / f"pareto-{name}.png")


def _curves(ax: Axes, results: Results, problem: str, setting: Setting, what: str) -> None:
    for method in results.methods(problem, setting.name):
        points = sorted(results.of(problem, setting.name, method), key=lambda one: one.error)
        few = method in ("2M", "UniPC")
        style: dict[str, Any] = {"ls": ":" if few else "-", "marker": "" if few else "o", "ms": 3.5}
        style |= {"lw": 2.4 if method == OURS else 1.3, "zorder": 3 if method == OURS else 2}
        at = [np.mean(getattr(one, what)) for one in points]
        ax.plot(at, [one.error for one in points], color=COLORS[method], label=LABELS[method], **style)
    limit = setting.steps / setting.window if what == "rounds" else setting.steps
    text, place = (f"N / window = {limit:.3g}" if what == "rounds" else f"N = {limit}"), (limit, 0.985)
    ax.axvline(limit, color=MUTED, lw=0.8, ls="--")
    ax.annotate(
        text,
        place,
        xycoords=("data", "axes fraction"),
        fontsize=8,
        color=MUTED,
        rotation=90,
        va="top",
        ha="right",
    )
    ax.set(xscale="log", yscale="log", xlabel=what + " per sample", ylim=(5e-5, 1.5))
    left, right = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if right < 100 * left else (1.0, 3.0)))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(True, which="major", lw=0.4, color="#e3e6e8")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def main(
    full: Annotated[
        bool, typer.Option("--full", help="Everything: hours on two cores. Without: some minutes, few runs of U-Nets.")
    ] = False,
    problem: Annotated[list[str] | None, typer.Option(help="Only these problems.")] = None,
    setting: Annotated[list[str] | None, typer.Option(help="Only these settings.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only these methods.")] = None,
    seeds: Annotated[int, typer.Option(help="Samples of each problem.")] = 8,
    out: Annotated[Path, typer.Option(help="Folder for the table, JSON and pictures.")] = Path("pareto-output"),
) -> None:
    """Compare all methods; write table.md, results.json and a picture for each setting."""
    plan = FULL if full or problem or setting else QUICK
    known_methods = (OURS, IDENTITY, *PUBLISHED, "few steps")
    for value, known, name in (
        (problem, PROBLEMS, "problem"),
        (setting, SETTINGS, "setting"),
        (method, known_methods, "method"),
    ):
        if unknown := set(value or ()) - set(known):
            raise typer.BadParameter(f"{unknown.pop()!r} is not one of {', '.join(known)}", param_hint=name)
    plan = {
        name: tuple(one for one in settings if not setting or one in setting)
        for name, settings in plan.items()
        if not problem or name in problem
    }
    out.mkdir(parents=True, exist_ok=True)
    results = Results(out / "results.json")
    run(plan, seeds, results, method)
    console, tables = (
        Console(),
        {
            "Rounds / evaluations at a true error of 1 %": overview(results, 1e-2),
            f"Rounds / evaluations at a true error, mean of {seeds} samples": method_table(results),
            "Targets": target_table(results),
            "Rounds beyond the best other method": worst_excess(results)[:12],
        },
    )
    for title, rows in tables.items():
        show(console, title, rows)
    (out / "table.md").write_text("".join(markdown(title, rows) for title, rows in tables.items()))
    draw(results, out)
    console.print(f"Written to {out}: table.md, results.json and a picture for each setting.")


if __name__ == "__main__":
    typer.run(main)
