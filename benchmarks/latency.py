"""When does it pay? Seconds on small networks, and a simulation of other machines: ``python -m benchmarks.latency``.

Measured: one sample at a time (what a robot waits for), sequential and parallel in turns within one process, medians,
with everything that the user waits for. Against two sequential samplers: ``solve_sequential``, and a bare loop without
any checks, the least that a sampler can do.

Simulated: the rows of every round of real runs are replayed on a machine on which a batch costs what is assumed of it:
as much as one row up to k rows, in proportion to its rows beyond. Clearly not a measurement.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import matplotlib as mpl
import numpy as np
import torch
import typer
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks.pareto import MAX_ROWS, Setting, markdown, show, step_rule
from benchmarks.problems import PROBLEMS, Denoiser, Problem
from parasolver_cli.figures import FRONT, MUTED, STYLE
from parasolver_core import Solution, StepRule, solve, solve_sequential

SAMPLERS = (("DDIM", 50), ("DDIM", 100), ("DDPM", 100), ("2M", 50))
WINDOWS = (16, 32, 100)  # the last holds all steps of these samplers
TOLERANCES = (5e-2, 1e-2, 1e-3)
DRAWN = 1e-2
MEASURED = ("policy", "mixture")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 100)

REPLAYED = {
    "clothes": (("DDIM", 50, (8, 16, 50)), ("2M", 25, (8, 25)), ("DDIM", 100, (16, 100)), ("DDPM", 1000, (100,))),
    "policy": (("DDIM", 100, (16, 100)), ("DDPM", 100, (16, 100)), ("DDIM", 1000, (32,))),
    "mixture": (("DDIM", 100, (16, 100)), ("DDPM", 1000, (100,))),
}
REPLAY_TOLERANCE = 1e-2
GPUS = (1, 2, 4, 8)
FREE = (1, 2, 4, 8, 16, 32, 64, 128, 256)
OVERHEAD = 0.05  # of a call: what a round costs besides the network


@dataclass(frozen=True)
class Device:
    """A simulated machine; its unit of time is the network's call with one row.

    Args:
        free: k, how many rows a GPU takes in the time of one; more take time in proportion.
        gpus: how many share the rows of a round equally.
        overhead: what a round costs besides, for the solver and between the GPUs.
    """

    free: float
    gpus: int = 1
    overhead: float = OVERHEAD

    def call(self, rows: int) -> float:
        """The time of one call with so many rows."""
        return max(1.0, math.ceil(rows / self.gpus) / self.free)

    def speedup(self, steps: int, rounds: Sequence[int]) -> float:
        """How many times as long the sequential sampler takes as rounds of these rows."""
        return steps / sum(self.call(rows) + self.overhead for rows in rounds)


def break_even(steps: int, histories: list[list[int]], gpus: int, overhead: float) -> int | None:
    """The smallest k at which the rounds take no longer than the sequential sampler; None if there is none."""
    most = max(max(rounds) for rounds in histories)
    for free in range(1, most + 1):
        if mean_speedup(steps, histories, Device(free, gpus, overhead)) >= 1:
            return free
    return None


def mean_speedup(steps: int, histories: list[list[int]], device: Device) -> float:
    """Of the mean time of all samples."""
    return 1 / float(np.mean([1 / device.speedup(steps, rounds) for rounds in histories]))


@dataclass(frozen=True)
class BatchCost:
    """What a call of a network takes on this machine, measured.

    Args:
        rows: increasing.
        seconds: medians.
    """

    problem: str
    rows: list[int]
    seconds: list[float]

    def __call__(self, rows: int) -> float:
        """Interpolated; beyond the last measurement in proportion."""
        beyond = max(rows / self.rows[-1], 1.0)
        return beyond * float(np.interp(rows, self.rows, self.seconds))

    @property
    def free(self) -> float:
        """Rows of the largest batch in the time of one: the k that this machine shows."""
        return self.rows[-1] * self.seconds[0] / self.seconds[-1]


@dataclass(frozen=True)
class Timing:
    """One sampler, window and tolerance, measured; all seconds are medians.

    Args:
        sequential: seconds of ``solve_sequential``.
        bare: seconds of the bare loop.
        parallel: seconds of ``solve``.
        network: its share that the network took.
        rounds, evaluations: means over the samples.
        error: geometric mean of the relative errors; ``worst`` the largest.
        predicted: seconds that the measured cost of a batch makes of the rounds' rows, without the solver's own time.
    """

    problem: str
    sampler: str
    steps: int
    window: int
    tolerance: float
    sequential: float
    bare: float
    parallel: float
    network: float
    rounds: float
    evaluations: float
    error: float
    worst: float
    predicted: float

    @property
    def own(self) -> float:
        """What is not the network."""
        return self.parallel - self.network


@dataclass(frozen=True)
class Replay:
    """The rows of each round of real runs, a list for each sample, and how far the samples were off."""

    problem: str
    sampler: str
    steps: int
    window: int
    rounds: list[list[int]]
    error: float

    @property
    def name(self) -> str:
        return f"{self.sampler}-{self.steps}, window {self.window}"


def bare_loop(
    denoiser: Denoiser, x_T: Tensor, timesteps: NDArray[Any], rule: StepRule, generator: torch.Generator
) -> Tensor:
    """Nothing but the network and the arithmetic of the steps."""
    recurrence = rule.recurrence(timesteps)
    memory, times = recurrence.memory, torch.from_numpy(timesteps)
    xs, ms = [x_T], []
    for i in range(len(recurrence)):
        ms = [denoiser(xs[0], times[i].expand(len(x_T))), *ms[: memory - 1]]
        z = torch.randn(x_T.shape, generator=generator, dtype=x_T.dtype) if recurrence.c[i] != 0 else None
        xs = [recurrence.advance(i, xs, ms, z), *xs[: memory - 1]]
    return xs[0]


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what was returned."""
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


def relative(sample: Tensor, truth: Tensor) -> float:
    """Relative RMS distance."""
    return float((sample.double() - truth.double()).norm() / truth.double().norm())


def geometric_mean(errors: Sequence[float]) -> float:
    """Never 0."""
    return float(np.exp(np.mean(np.log(np.maximum(errors, 1e-12)))))


def batch_cost(problem: Problem, denoiser: Denoiser, repeats: int, batches: Sequence[int] = BATCHES) -> BatchCost:
    """Sizes in turns."""
    found: dict[int, list[float]] = {rows: [] for rows in batches}
    for _ in range(repeats + 1):
        for rows in batches:
            x, t = torch.randn(rows, *problem.shape, dtype=problem.dtype), torch.full((rows,), 500)
            found[rows].append(timed(lambda x=x, t=t: denoiser(x, t))[0])
    return BatchCost(problem.name, list(batches), [float(np.median(one[1:])) for one in found.values()])


class Clock:
    """All windows and tolerances of one sampler, and the sequential samplers, in turns."""

    def __init__(self, problem: Problem, denoiser: Denoiser, sampler: str, steps: int, cost: BatchCost) -> None:
        self.problem, self.denoiser, self.sampler, self.steps, self.cost = problem, denoiser, sampler, steps, cost
        self.rule, self.timesteps = step_rule(problem, Setting("", sampler, steps, 1))
        self.windows = sorted({min(window, steps) for window in WINDOWS})
        self.choices = [(window, tolerance) for window in self.windows for tolerance in TOLERANCES]

    def timings(self, repeats: int, seeds: int) -> list[Timing]:
        """A repetition times everything once, with the next sample; the first, a rehearsal, does not count."""
        starts = self.problem.starts(seeds)
        sequential, bare = [], []
        runs: dict[tuple[int, float], list[tuple[float, Solution, float]]] = {choice: [] for choice in self.choices}
        for repeat in range(repeats + 1):
            seed = repeat % seeds
            x_T, generator = starts[seed : seed + 1], torch.Generator().manual_seed(seed)
            arguments = (self.denoiser, x_T, self.timesteps, self.rule)
            seconds, truth = timed(lambda a=arguments, s=seed: solve_sequential(*a, seed=s))
            sequential.append(seconds)
            bare.append(timed(lambda a=arguments, g=generator: bare_loop(*a, g))[0])
            for choice in self.choices:
                seconds, solution = timed(lambda a=arguments, c=choice, s=seed: solve(*a, c[0], tolerance=c[1], seed=s))
                runs[choice].append((seconds, solution, relative(solution.sample, truth.sample)))
        once = float(np.median(sequential[1:])), float(np.median(bare[1:]))
        return [self._timing(*choice, *once, found[1:]) for choice, found in runs.items()]

    def _timing(
        self, window: int, tolerance: float, sequential: float, bare: float, runs: list[tuple[float, Solution, float]]
    ) -> Timing:
        stats, errors = [solution.stats for _, solution, _ in runs], [error for _, _, error in runs]
        predicted = [sum(self.cost(part.evaluations) for part in one.history) for one in stats]
        return Timing(
            self.problem.name,
            self.sampler,
            self.steps,
            window,
            tolerance,
            sequential,
            bare,
            float(np.median([seconds for seconds, _, _ in runs])),
            float(np.median([one.seconds_denoiser for one in stats])),
            float(np.mean([one.rounds for one in stats])),
            float(np.mean([one.evaluations for one in stats])),
            geometric_mean(errors),
            max(errors),
            float(np.median(predicted)),
        )


def replay(
    problem: Problem, denoiser: Denoiser, sampler: str, steps: int, window: int, seeds: int, tolerance: float
) -> Replay:
    """Run once for all samples together; each sample's own rounds count."""
    rule, timesteps = step_rule(problem, Setting("", sampler, steps, window))
    x_T, seed = problem.starts(seeds), list(range(seeds))
    truth = solve_sequential(denoiser, x_T, timesteps, rule, seed=seed).sample
    solution = solve(
        denoiser, x_T, timesteps, rule, window, tolerance=tolerance, seed=seed, check=False, max_rows=MAX_ROWS
    )
    records = [one for part in solution.stats.history for one in part.samples]
    rounds = [[len(one.nodes) for one in records if one.sample == sample] for sample in seed]
    errors = [relative(a, b) for a, b in zip(solution.sample, truth, strict=True)]
    return Replay(problem.name, sampler, steps, window, rounds, geometric_mean(errors))


def timing_table(timings: list[Timing]) -> list[dict[str, str]]:
    """One row for each sampler, window and tolerance."""
    return [
        {
            "network": one.problem,
            "sampler": f"{one.sampler}-{one.steps}",
            "window": str(one.window),
            "tolerance": f"{one.tolerance:.1%}",
            "rounds / evaluations": f"{one.rounds:.1f} / {one.evaluations:.0f}",
            "error, mean / worst": f"{one.error:.2%} / {one.worst:.2%}",
            "ms: sequential / bare / parallel": " / ".join(
                f"{1e3 * seconds:.1f}" for seconds in (one.sequential, one.bare, one.parallel)
            ),
            "ms a round: network / own": f"{1e3 * one.network / one.rounds:.2f} / {1e3 * one.own / one.rounds:.2f}",
            "speed-up: sequential / bare": f"{one.sequential / one.parallel:.1f} / {one.bare / one.parallel:.1f}",
            "limit: own = 0": f"{one.bare / one.predicted:.1f}",
        }
        for one in timings
    ]


def cost_table(costs: list[BatchCost]) -> list[dict[str, str]]:
    """Milliseconds of a call for each number of rows."""
    return [
        {
            "network": one.problem,
            **{str(rows): f"{1e3 * seconds:.2f}" for rows, seconds in zip(one.rows, one.seconds, strict=True)},
            "k": f"{one.free:.1f}",
        }
        for one in costs
    ]


def replay_table(replays: list[Replay], overhead: float) -> list[dict[str, str]]:
    """Where it breaks even, and the speed-up on some machines."""
    rows = []
    for one in replays:
        even = [break_even(one.steps, one.rounds, gpus, overhead) for gpus in GPUS]

        def at(free: float, gpus: int, one: Replay = one) -> str:
            return f"{mean_speedup(one.steps, one.rounds, Device(free, gpus, overhead)):.1f}"

        rows.append(
            {
                "network": one.problem,
                "setting": one.name,
                "rounds": f"{np.mean([len(rounds) for rounds in one.rounds]):.1f}",
                "evaluations": f"{np.mean([sum(rounds) for rounds in one.rounds]):.0f}",
                "error": f"{one.error:.2%}",
                f"break-even k, {' / '.join(map(str, GPUS))} GPUs": " / ".join(str(k or "-") for k in even),
                "k = 4": at(4, 1),
                "k = 16": at(16, 1),
                "k = 64": at(64, 1),
                "8 GPUs, k = 1": at(1, 8),
                "8 GPUs, k = 4": at(4, 8),
                "batch free": at(math.inf, 1),
            }
        )
    return rows


def draw(timings: list[Timing], replays: list[Replay], overhead: float, file: Path) -> None:
    """Measured speed-ups above, simulated ones below."""
    with mpl.rc_context(cast(Any, STYLE)):
        figure = Figure(figsize=(11.5, 8.4), layout="constrained")
        parts = cast("NDArray[Any]", figure.subfigures(2, 1, hspace=0.06))
        _draw_measured(parts[0], timings)
        _draw_simulated(parts[1], replays, overhead)
        FigureCanvasAgg(figure).print_png(file)


def _draw_measured(figure: SubFigure, timings: list[Timing]) -> None:
    figure.suptitle(f"Measured on a CPU, one sample, tolerance {DRAWN:.0%}", fontweight="bold", x=0.01, ha="left")
    problems = list(dict.fromkeys(one.problem for one in timings))
    axes = figure.subplots(1, len(problems), sharey=True, squeeze=False)[0]
    for ax, problem in zip(axes, problems, strict=True):
        own = [one for one in timings if (one.problem, one.tolerance) == (problem, DRAWN)]
        for color, name in zip(
            (FRONT, "#1c6fb5", "#2b8a3e", "#9c36b5", "#8a9099"),
            dict.fromkeys((one.sampler, one.steps) for one in own),
            strict=False,
        ):
            points = [one for one in own if (one.sampler, one.steps) == name]
            windows = [one.window for one in points]
            label = f"{name[0]}-{name[1]}"
            ax.plot(windows, [one.sequential / one.parallel for one in points], "o-", color=color, ms=4, label=label)
            ax.plot(windows, [one.bare / one.parallel for one in points], ":", color=color, lw=1.2)
        _style(ax, "window", problem)
        ax.set_xticks(sorted({one.window for one in own}))
        ax.set_ylim(bottom=0)
    axes[0].set_ylabel("speed-up")
    handles = [
        *axes[0].get_legend_handles_labels()[0],
        Line2D([], [], color=MUTED, label="against solve_sequential"),
        Line2D([], [], color=MUTED, ls=":", lw=1.2, label="against a bare loop"),
    ]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)


def _draw_simulated(figure: SubFigure, replays: list[Replay], overhead: float) -> None:
    figure.suptitle(
        f"Simulated: rounds of real runs, replayed; {overhead:.0%} of a call a round for all else",
        fontweight="bold",
        x=0.01,
        ha="left",
    )
    samplers = list(dict.fromkeys((one.problem, one.sampler, one.steps) for one in replays))[:4]
    axes = figure.subplots(1, len(samplers), sharey=True, squeeze=False)[0]
    for ax, sampler in zip(axes, samplers, strict=True):
        own = [one for one in replays if (one.problem, one.sampler, one.steps) == sampler]
        for color, gpus in zip(("#f0a868", "#ec8a45", FRONT, "#7a3208"), GPUS, strict=True):
            best = [
                max(mean_speedup(one.steps, one.rounds, Device(free, gpus, overhead)) for one in own) for free in FREE
            ]
            ax.plot(FREE, best, "o-", color=color, ms=3.5, label=f"{gpus} GPU{'s' * (gpus > 1)}")
        problem, name, steps = sampler
        _style(ax, "k: rows in the time of one", f"{problem}, {name}-{steps}")
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(ScalarFormatter())
        ax.yaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("speed-up, best window")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)


def _style(ax: Axes, xlabel: str, title: str) -> None:
    ax.axhline(1.0, color=MUTED, lw=0.8, ls="--")
    ax.set(xscale="log", xlabel=xlabel, title=title)
    ax.xaxis.set_major_locator(LogLocator(base=2))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(True, which="major", lw=0.4, color="#e3e6e8")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def main(
    repeats: Annotated[int, typer.Option(min=1, help="How often each run is timed.")] = 25,
    seeds: Annotated[int, typer.Option(min=1, help="Different samples.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch.")] = 1,
    overhead: Annotated[float, typer.Option(min=0.0, help="Simulation: a round's other cost, in calls.")] = OVERHEAD,
    out: Annotated[Path, typer.Option(help="Folder for the table, JSON and picture.")] = Path("latency-output"),
) -> None:
    """Measure small networks, simulate other machines; write table.md, results.json and latency.png."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    timings, replays = [], []
    with torch.no_grad():
        names = list(dict.fromkeys([*MEASURED, *REPLAYED]))
        networks = {name: PROBLEMS[name].make() for name in names}
        costs = [batch_cost(PROBLEMS[name], networks[name], repeats) for name in track(names, "Cost of a batch")]
        known = {one.problem: one for one in costs}
        for name in MEASURED:
            for sampler, steps in track(SAMPLERS, f"Measuring, {name}"):
                clock = Clock(PROBLEMS[name], networks[name], sampler, steps, known[name])
                timings += clock.timings(repeats, seeds)
        for name, settings in REPLAYED.items():
            for sampler, steps, windows in track(settings, f"Recording rounds, {name}"):
                replays += [
                    replay(PROBLEMS[name], networks[name], sampler, steps, window, seeds, REPLAY_TOLERANCE)
                    for window in windows
                ]
    console = Console()
    tables = {
        "Cost of a batch here: ms for so many rows, and k, the rows in the time of one": cost_table(costs),
        f"Measured: one sample, {threads} thread{'s' * (threads > 1)}, medians of {repeats}": timing_table(timings),
        f"Simulated: recorded rounds on other machines, tolerance {REPLAY_TOLERANCE:.0%}": replay_table(
            replays, overhead
        ),
    }
    for title, rows in tables.items():
        show(console, title, rows)
    (out / "table.md").write_text("".join(markdown(title, rows) for title, rows in tables.items()))
    found = {"costs": costs, "timings": timings, "replays": replays}
    (out / "results.json").write_text(
        json.dumps({name: [asdict(one) for one in many] for name, many in found.items()}, indent=1) + "\n"
    )
    draw(timings, replays, overhead, out / "latency.png")
    console.print(f"Written to {out}: table.md, results.json and latency.png.")


if __name__ == "__main__":
    typer.run(main)
