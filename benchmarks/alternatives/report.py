"""Tables and pictures of the comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, PercentFormatter

from benchmarks.alternatives.results import OURS, SEQUENTIAL, Results, Run, frechet, mean_error
from benchmarks.latency.devices import Device
from parasolver_cli.figures import INK, MUTED, STYLE

DEVICES = (1, 2, 4, 8)
FREE = (1, 4, 16)  # rows in the time of one
DRAWN_FREE = (1, 16)
ERRORS = (0.1, 0.05, 0.02, 0.01, 0.001)
COLORS = {
    SEQUENTIAL: INK,
    OURS: "#e8590c",
    "FirstBlockCache": "#1c6fb5",
    "MagCache": "#2b8a3e",
    "TaylorSeer": "#9c36b5",
    "SeaCache": "#0b9aa8",
    "DDIM": "#c2c7cd",
    "2M": "#8a9099",
    "UniPC": "#5c636b",
    "part guidance": "#c9a227",
}


def point_table(results: Results) -> list[dict[str, str]]:
    """One row a method and setting: what it takes, and what comes out."""
    rows, busy = [], Device(1, overhead=0.0)
    for (method, setting), runs in results.points.items():
        rows.append(
            {
                "method": method,
                "setting": setting,
                "calls": f"{np.mean([len(one.calls) for one in runs]):.1f}",
                "network time": f"{results.time(runs, busy):.2f}",
                "seconds": f"{np.median([one.seconds for one in runs]):.2f}",
                "error": f"{mean_error(runs):.2%}",
                "worst": f"{max(one.error for one in runs):.2%}",
                "Frechet": f"{frechet(runs):.1f}",
                "class as asked": f"{np.mean([one.right for one in runs]):.0%}",
            }
        )
    return rows


def best_table(results: Results) -> list[dict[str, str]]:
    """The least time to an error: one row a machine and error, one column a method."""
    rows = []
    for free in FREE:
        for devices in DEVICES:
            for error in ERRORS:
                row = {"k": str(free), "devices": str(devices), "error": f"{error:.1%}"}
                for method in results.methods:
                    found = results.best(method, Device(free, devices), error)
                    row[method] = "-" if found is None else f"{found:.2f}"
                rows.append(row)
    return rows


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those (time, error) that no other beats in both, by time."""
    kept: list[tuple[float, float]] = []
    for time, error in sorted(points):
        if not kept or error < kept[-1][1]:
            kept.append((time, error))
    return kept


def draw(results: Results, folder: Path) -> None:
    """``alternatives.png``: error over time on machines of different kind; ``alternatives_quality.png``."""
    with mpl.rc_context(cast(Any, STYLE)):
        for name, figure in {"alternatives": _times(results), "alternatives_quality": _quality(results)}.items():
            FigureCanvasAgg(figure).print_png(folder / f"{name}.png")


def _times(results: Results) -> Figure:
    figure = Figure(figsize=(13.0, 7.4), layout="constrained")
    axes = figure.subplots(len(DRAWN_FREE), len(DEVICES), sharex=True, sharey=True, squeeze=False)
    for line, free in zip(axes, DRAWN_FREE, strict=True):
        for ax, devices in zip(line, DEVICES, strict=True):
            _time_panel(ax, results, Device(free, devices))
            many = "one device" if devices == 1 else f"{devices} devices"
            ax.set_title(f"{many}, {'busy' if free == 1 else f'k = {free}'}", fontsize=11)
        line[0].set_ylabel("error against the sequential sample")
    for ax in axes[-1]:
        ax.set_xlabel("time / sequential on one")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle("Nearer the sequential sample in less time: down and to the left", fontweight="bold")
    return figure


def _time_panel(ax: Axes, results: Results, device: Device) -> None:
    for method in results.methods:
        times = [(results.time(runs, device), mean_error(runs)) for runs in results.of(method)]
        if method == SEQUENTIAL:
            ax.axvline(times[0][0], color=INK, lw=1.0, ls=":", label="the sequential sample")
            continue
        x, y = zip(*front(times), strict=True)
        ax.plot(x, y, "o-", color=COLORS[method], ms=4, lw=2.4 if method == OURS else 1.3, label=method)
    ax.set(xscale="log", yscale="log", xlim=(0.04, 3.5), ylim=(5e-5, 0.5))
    ax.xaxis.set_major_locator(FixedLocator([0.05, 0.1, 0.2, 0.5, 1, 2]))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(_percent)
    _plain(ax)


def _quality(results: Results) -> Figure:
    figure = Figure(figsize=(11.0, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    judged: list[tuple[Axes, Any, str]] = [
        (left, frechet, "Frechet distance to real pictures"),
        (right, _class_share, "pictures that show the class asked for"),
    ]
    for ax, judge, label in judged:
        for method in results.methods:
            points = sorted((mean_error(runs), judge(runs)) for runs in results.of(method))
            if method == SEQUENTIAL:
                ax.axhline(points[0][1], color=INK, lw=1.0, ls=":", label="the sequential sample")
                continue
            x, y = zip(*points, strict=True)
            ax.plot(x, y, "o", color=COLORS[method], ms=5, alpha=0.8, label=method)
        ax.set(xscale="log", xlabel="error against the sequential sample", title=label)
        ax.xaxis.set_major_formatter(_percent)
        _plain(ax)
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(f"Different, but as good? {results.samples} pictures of each", fontweight="bold")
    return figure


def _class_share(runs: list[Run]) -> float:
    return float(np.mean([one.right for one in runs]))


def _percent(value: float, _: int) -> str:
    return f"{100 * value:g} %"


def _plain(ax: Axes) -> None:
    ax.grid(color=MUTED, alpha=0.2, lw=0.6)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
