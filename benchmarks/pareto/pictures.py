"""Error against rounds and evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from benchmarks.pareto.runs import Results
from benchmarks.pareto.settings import IDENTITY, OURS, SETTINGS, Setting
from parasolver_cli.figures import MUTED, STYLE

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
