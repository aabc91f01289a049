"""Speed-ups, measured and simulated."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from numpy.typing import NDArray

from benchmarks.latency.devices import Device, mean_speedup
from benchmarks.latency.replays import Replay
from benchmarks.latency.report import GPUS
from benchmarks.latency.timings import Timing
from parasolver_cli.figures import FRONT, MUTED, STYLE

DRAWN = 1e-2
FREE = (1, 2, 4, 8, 16, 32, 64, 128, 256)


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
