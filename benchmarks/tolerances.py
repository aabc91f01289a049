"""What a tolerance of 10, 5 or 1 % looks like, with the embedded model: ``python -m benchmarks.tolerances``.

DDIM-50 with a window of 16. Writes ``docs/images/tolerances.png`` and prints, for each tolerance, rounds, evaluations
per sample and the true error: the relative RMS distance to the sequential sample.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import numpy as np
import torch
import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from parasolver_adapters.embedded import SCHEDULE, EmbeddedDenoiser
from parasolver_cli.figures import PICTURE, STYLE
from parasolver_core import DDIM, solve, solve_sequential

TOLERANCES = (0.1, 0.05, 0.01)
GAIN = 10  # of the differences shown


def main(
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("docs/images/tolerances.png"),
    count: Annotated[int, typer.Option(help="Samples that are measured; six are shown.")] = 32,
    steps: Annotated[int, typer.Option(help="Steps of DDIM.")] = 50,
) -> None:
    """Sample once sequentially and once with each tolerance."""
    torch.set_num_threads(1)
    x_T = torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    arguments: tuple[Any, ...] = (EmbeddedDenoiser(), x_T, SCHEDULE.timesteps(steps), DDIM(SCHEDULE))
    sequential = solve_sequential(*arguments).sample.numpy()[:, 0]
    rows = [(f"sequential\n{steps} calls", sequential)]
    print("| tolerance | rounds | evaluations per sample | error, median / worst | within |\n|---|---|---|---|---|")
    for tolerance in TOLERANCES:
        solution = solve(*arguments, window=16, tolerance=tolerance)
        found = solution.sample.numpy()[:, 0]
        error = np.linalg.norm(found - sequential, axis=(1, 2)) / np.linalg.norm(sequential, axis=(1, 2))
        evaluations = solution.stats.evaluations / count
        print(
            f"| {tolerance:.0%} | {solution.stats.rounds} | {evaluations:.0f} |"
            f" {np.median(error):.2%} / {error.max():.2%} | {(error <= tolerance).sum()} of {count} |"
        )
        rows.append((f"{tolerance:.0%}\n{solution.stats.rounds} rounds", found))
    with mpl.rc_context(STYLE):
        FigureCanvasAgg(draw(rows)).print_png(out)


def draw(rows: list[tuple[str, NDArray[np.floating]]]) -> Figure:
    """Six pictures a row, and beside each but the sequential ones what it differs by."""
    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    axes = figure.subplots(len(rows), 12)
    for line, (title, pictures) in zip(axes, rows, strict=True):
        differences = GAIN * np.abs(pictures - rows[0][1])
        for axis, picture, style in zip(
            line,
            [*pictures[:6], *differences[:6]],
            [PICTURE] * 6 + [{"cmap": "magma", "vmin": 0.0, "vmax": 1.0, "interpolation": "nearest"}] * 6,
            strict=True,
        ):
            axis.imshow(picture, **style)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
    axes[0, 2].set_title("pictures", fontsize=10, loc="left")
    axes[0, 8].set_title(f"difference to the sequential one, x {GAIN}", fontsize=10, loc="center")
    return figure


if __name__ == "__main__":
    typer.run(main)
