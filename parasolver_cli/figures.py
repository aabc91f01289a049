"""The figures of the demonstration."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from parasolver_cli.outcome import Outcome
from parasolver_cli.watching import moves
from parasolver_core import Calibration

INK, MUTED, OUTSIDE, FRONT = "#22272e", "#6b7480", "#eef0f2", "#e8590c"
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "savefig.dpi": 144,
    "savefig.facecolor": "white",
}
PICTURE = {"cmap": "gray", "vmin": -1.0, "vmax": 1.0, "interpolation": "nearest"}
SHOWN = 4  # pictures of each sampler in samples.png
ROUNDS_SHOWN = 7  # columns of rounds.png before the sequential picture


def draw_all(outcomes: list[Outcome], folder: Path) -> list[str]:
    """Write the four figures as PNG; their names."""
    files = []
    with mpl.rc_context(cast(Any, STYLE)):
        for name, figure in {
            "samples": samples(outcomes),
            "rounds": rounds(outcomes),
            "residuals": residuals(outcomes),
            "samples_grid": samples_grid(outcomes[0]),
        }.items():
            files.append(f"{name}.png")
            FigureCanvasAgg(figure).print_png(folder / files[-1])
    return files


def samples(outcomes: list[Outcome]) -> Figure:
    """Sequential and parallel pictures of each sampler side by side, and what they differ by."""
    rows = min(SHOWN, max(one.case.samples for one in outcomes))
    differences = [np.abs(one.parallel[:rows] - one.sequential[:rows]).ravel() for one in outcomes]
    # a few pixels may be cut off, or they would leave all others dark
    gain = _round_down(1 / max(np.quantile(np.concatenate(differences), 0.995), 1e-6))
    figure = Figure(figsize=(4.0 * len(outcomes), 1.28 * rows + 1.25), layout="constrained")
    _title(figure, "The same pictures, in fewer rounds")
    panels = figure.subfigures(1, len(outcomes), squeeze=False, wspace=0.04)[0]
    for panel, one in zip(panels, outcomes, strict=True):
        _sample_panel(panel, one, rows, gain)
    return figure


def _sample_panel(panel: SubFigure, one: Outcome, rows: int, gain: float) -> None:
    panel.suptitle(one.case.name, fontsize=13, fontweight="bold")
    axes = panel.subplots(rows, 3, squeeze=False)
    titles = (
        f"sequential\n{one.steps} rounds",
        f"parallel\n≤ {one.rounds} rounds",
        f"difference\n× {gain:g}",
    )
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=11, fontweight="normal")
    for row, line in enumerate(axes):
        for axis in line:
            axis.set_axis_off()
        if row >= one.case.samples:
            continue
        line[0].imshow(one.sequential[row], **PICTURE)
        line[1].imshow(one.parallel[row], **PICTURE)
        difference = gain * (one.parallel[row] - one.sequential[row])
        line[2].imshow(difference, **PICTURE | {"cmap": "berlin"})  # dark where the pictures are equal


def rounds(outcomes: list[Outcome]) -> Figure:
    """How the first picture of each sampler comes about."""
    columns = ROUNDS_SHOWN + 1
    figure = Figure(figsize=(1.42 * columns, 2.0 * len(outcomes) + 0.6), layout="constrained")
    _title(figure, "The first picture after each round, and how far it is from the sequential one")
    panels = figure.subfigures(len(outcomes), 1, squeeze=False, hspace=0.06)[:, 0]
    for panel, one in zip(panels, outcomes, strict=True):
        axes = panel.subplots(1, columns)
        told = f"{one.case.name}: the first picture took {_of_all(one)}"
        panel.suptitle(told, x=0.006, ha="left", fontsize=12, fontweight="bold")
        for axis in axes:
            axis.set_axis_off()
        shown = _chosen_rounds(sum(round_ <= one.own_rounds for round_ in one.look.rounds), columns - 1)
        for axis, index in zip(axes[columns - 1 - len(shown) :], shown, strict=False):
            axis.imshow(one.look.estimates[index, 0], **PICTURE)
            title = f"round {one.look.rounds[index]}\n{_percent(float(one.look.errors[index]))}"
            axis.set_title(title, fontsize=10.5, fontweight="normal")
        axes[-1].imshow(one.sequential[0], **PICTURE)
        axes[-1].set_title(f"sequential\n{one.steps} rounds", fontsize=10.5, fontweight="bold")
    return figure


def residuals(outcomes: list[Outcome]) -> Figure:
    """How the window moves over the trajectory and the corrections in it die down."""
    figure = Figure(figsize=(4.3 * len(outcomes), 4.6), layout="constrained")
    _title(figure, "How far each round still moves the state of each step (first picture)")
    sizes = np.concatenate([record.residuals for one in outcomes for record in one.look.records])
    floor = 10.0 ** np.floor(np.log10(max(sizes[sizes > 0].min(initial=1.0), 1e-5)))
    norm = LogNorm(floor, max(1.0, floor * 10))
    axes = figure.subplots(1, len(outcomes), squeeze=False)[0]
    images = [_residual_panel(axis, one, norm, floor) for axis, one in zip(axes, outcomes, strict=True)]
    axes[0].set_ylabel("round")
    bar = figure.colorbar(images[0], ax=list(axes), pad=0.015, aspect=28)
    bar.set_label("move of the state, relative to its size")
    bar.outline.set_linewidth(0.8)
    axes[0].legend(loc="lower left", frameon=False, fontsize=10, handlelength=1.4)
    return figure


def _residual_panel(axis: Axes, one: Outcome, norm: LogNorm, floor: float) -> Any:
    table = np.maximum(moves(one.look.records, one.steps), floor)  # NaN stays
    n = len(table)
    image = axis.imshow(
        table,
        norm=norm,
        cmap=mpl.colormaps["viridis"].with_extremes(bad=OUTSIDE),
        aspect="auto",
        interpolation="nearest",
        extent=(0, one.steps, n + 0.5, 0.5),
    )
    edges = np.arange(n + 1) + 0.5
    first = np.array([record.first for record in one.look.records])
    end = np.array([record.nodes[-1] + 1 for record in one.look.records])
    front = first + [record.accepted for record in one.look.records]
    upright = {"edges": edges, "orientation": "horizontal"}
    axis.stairs(end, baseline=first, color=INK, linewidth=1.0, label="window", **upright)
    axis.stairs(front, baseline=None, color=FRONT, linewidth=2.0, label="final up to here", **upright)
    axis.set_title(f"{one.case.name}:\n{_of_all(one)}")
    axis.set_xlabel("step of the sampler: noise → picture")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return image


def _of_all(one: Outcome) -> str:
    """The rounds of the first picture, told apart from those of the batch, which ends with its slowest picture."""
    return f"{one.own_rounds} rounds (the slowest of {one.case.samples}: {one.rounds})"


def samples_grid(one: Outcome) -> Figure:
    """All pictures of one sampler."""
    columns = int(np.ceil(np.sqrt(one.case.samples)))
    rows = int(np.ceil(one.case.samples / columns))
    figure = Figure(figsize=(1.3 * max(columns, 3), 1.3 * rows + 0.6), layout="constrained")
    plural = "picture" if one.case.samples == 1 else "pictures"
    _title(figure, f"{one.case.samples} {plural}: {one.case.name}, {one.rounds} rounds", size=13)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, picture in zip(axes.flat, one.parallel, strict=False):
        axis.imshow(picture, **PICTURE)
    return figure


def _title(figure: Figure, text: str, size: float = 15) -> None:
    figure.suptitle(text, fontsize=size, fontweight="bold")


def _chosen_rounds(count: int, most: int) -> NDArray[np.int64]:
    """Indices of the rounds to show: all, or 1, 3 and 5, then ever farther apart up to the last."""
    if count <= most:
        return np.arange(count)
    first = [1, 3, 5]
    spread = np.geomspace(first[-1], count, most - len(first) + 1)
    return np.union1d(first, np.round(spread).astype(np.int64)) - 1


def _percent(error: float) -> str:
    if error < 5e-4:
        return "< 0.1 % off"
    return f"{100 * error:.1f} % off" if error < 0.0995 else f"{100 * error:.0f} % off"


def _round_down(value: float) -> float:
    """To 1, 2 or 5 times a power of ten."""
    power = 10.0 ** np.floor(np.log10(value))
    return float(power * max(step for step in (1, 2, 5) if step * power <= value * (1 + 1e-9)))


def draw_calibration(found: Calibration, file: Path) -> None:
    """The error of every sample over the tolerance, a row for each margin that was tried, as PNG."""
    trials = sorted(found.trials, key=lambda one: one.gain)
    with mpl.rc_context(cast(Any, STYLE)):
        figure = Figure(figsize=(8.0, 0.5 * len(trials) + 1.8), layout="constrained")
        ax = figure.subplots()
        for row, trial in enumerate(trials):
            chosen = trial.gain == found.gain
            ratios = np.maximum(np.array(trial.errors) / found.tolerance, 1e-4)
            ax.plot(ratios, np.full(len(ratios), row), "o", ms=5, alpha=0.6, color=FRONT if chosen else MUTED)
        ax.axvspan(0.5, 1.0, color=OUTSIDE, zorder=0)
        ax.axvline(1.0, color=INK, lw=1.0)
        ax.set(xscale="log", ylim=(len(trials) - 0.5, -0.5), xlabel="error of each sample / tolerance")
        names = {1.0: "default"}
        labels = [f"{names.get(one.gain, f'{one.gain:.3g} times')}: {one.rounds:.1f} rounds" for one in trials]
        ax.set_yticks(range(len(trials)), labels)
        ax.set_title(f"Margins; found: {found.gain:.3g} times the default", loc="left")
        for side in ("top", "right", "left"):
            ax.spines[side].set_visible(False)
        FigureCanvasAgg(figure).print_png(file)
