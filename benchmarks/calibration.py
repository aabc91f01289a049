"""Does ``tolerance`` mean what it says? ``python -m benchmarks.calibration``.

Samples each problem sequentially and in parallel, with the default method, and compares the true relative error of
every sample with the tolerance asked for. An interrupted run goes on where it was.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import matplotlib as mpl
import numpy as np
import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from benchmarks.pareto.runs import Bench, spent
from benchmarks.pareto.settings import MAX_ROWS, SETTINGS
from benchmarks.problems import PROBLEMS
from benchmarks.tables import markdown, show
from parasolver_cli.figures import FRONT, INK, MUTED, STYLE
from parasolver_core import solve

CASES: dict[str, tuple[str, ...]] = {
    "clothes": (
        "DDIM-50, window 16",
        "DDIM-50, window 8",
        "DDIM-50, window 50",
        "DDIM-100, window 5",
        "2M-25, window 8",
        "flow Euler-28, window 8",
        "DDPM-100, window 16",
    ),
    "clothes, guided": ("DDIM-50, window 16", "2M-25, window 8"),
    "emoji": ("DDIM-50, window 16",),
    "policy": tuple(SETTINGS),
    "mixture": tuple(SETTINGS),
    "mixture, guided": tuple(SETTINGS),
}
TOLERANCES = (5e-2, 1e-2, 3e-3)
BATCH = 25


@dataclass(frozen=True)
class Line:
    """One problem, setting and tolerance; the lists hold a number a sample."""

    problem: str
    setting: str
    tolerance: float
    errors: list[float]
    rounds: list[int]
    evaluations: list[int]

    @property
    def ratios(self) -> np.ndarray:
        """True error in units of the tolerance."""
        return np.array(self.errors) / self.tolerance

    def row(self) -> dict[str, str]:
        ratios = self.ratios
        return {
            "problem": self.problem,
            "setting": self.setting,
            "tolerance": f"{self.tolerance:.1%}",
            "rounds": f"{np.mean(self.rounds):.1f}",
            "evaluations": f"{np.mean(self.evaluations):.0f}",
            "median error / tolerance": f"{np.median(ratios):.2f}",
            "95 %": f"{np.quantile(ratios, 0.95):.2f}",
            "within": f"{np.mean(ratios <= 1):.1%}",
        }


def measure(name: str, setting_name: str, tolerances: tuple[float, ...], count: int) -> list[Line]:
    """One line a tolerance."""
    problem, setting = PROBLEMS[name], SETTINGS[setting_name]
    denoiser = problem.make()
    found: dict[float, tuple[list[float], list[int], list[int]]] = {tolerance: ([], [], []) for tolerance in tolerances}
    for first in track(range(0, count, BATCH), f"{name}, {setting_name}"):
        bench = Bench(problem, setting, denoiser, min(BATCH, count - first), first=1000 + first)
        for tolerance, lists in found.items():
            solution = solve(
                bench.denoiser,
                bench.x_T,
                bench.timesteps,
                bench.rule,
                setting.window,
                tolerance=tolerance,
                seed=bench.seeds,
                max_rows=MAX_ROWS,
            )
            for numbers, new in zip(
                lists, (bench.errors(solution.sample), *spent(solution, len(bench.seeds))), strict=True
            ):
                numbers += new
    return [Line(name, setting_name, tolerance, *lists) for tolerance, lists in found.items()]


def draw(lines: list[Line], file: Path) -> None:
    """For each line the errors of all samples, as quantiles, against the tolerance."""
    cases = list(dict.fromkeys((one.problem, one.setting) for one in lines))
    with mpl.rc_context(cast(Any, STYLE)):
        picture = Figure(figsize=(9.0, 0.36 * len(cases) + 1.9), layout="constrained")
        ax = picture.subplots()
        for place, case in enumerate(cases):
            own = [one for one in lines if (one.problem, one.setting) == case]
            for shift, line in zip(np.linspace(-0.24, 0.24, len(own)), own, strict=True):
                low, quarter, median, three, high, worst = np.quantile(
                    np.maximum(line.ratios, 1e-4), [0.05, 0.25, 0.5, 0.75, 0.95, 1.0]
                )
                y, shade = place + shift, MUTED
                ax.plot([low, high], [y, y], color=shade, lw=1.0, zorder=1)
                ax.plot([quarter, three], [y, y], color=shade, lw=4.0, zorder=2, solid_capstyle="butt")
                ax.plot(median, y, "o", color=INK, ms=3.5, zorder=3)
                ax.plot(min(worst, 30), y, "|", color=FRONT, ms=6, zorder=3)
        ax.axvline(1.0, color=FRONT, lw=1.2)
        ax.set(xscale="log", xlim=(1e-3, 40), ylim=(len(cases) - 0.5, -0.5), xlabel="true error / tolerance")
        ax.set_yticks(range(len(cases)), [f"{problem}: {setting}" for problem, setting in cases], fontsize=9)
        ax.grid(True, axis="x", lw=0.4, color="#e3e6e8")
        for side in ("top", "right", "left"):
            ax.spines[side].set_visible(False)
        count, asked = (
            len(lines[0].errors),
            ", ".join(f"{t:.1%}" for t in dict.fromkeys(one.tolerance for one in lines)),
        )
        ax.set_title(f"{count} samples a line; from above, tolerance {asked}", loc="left", fontsize=10)
        ax.text(
            0.0,
            -0.16 * 12 / (len(cases) + 5),
            "5 to 95 %, quartiles, median; the red tick is the worst sample",
            transform=ax.transAxes,
            fontsize=8,
            color=MUTED,
            va="top",
        )
        FigureCanvasAgg(picture).print_png(file)


def main(
    count: Annotated[int, typer.Option(help="Samples a line.")] = 50,
    problem: Annotated[list[str] | None, typer.Option(help="Only these problems.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the table, JSON and picture.")] = Path("calibration-output"),
) -> None:
    """Print the share of samples within the tolerance."""
    if unknown := set(problem or ()) - set(CASES):
        raise typer.BadParameter(f"{unknown.pop()!r} is not one of {', '.join(CASES)}", param_hint="problem")
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.json"
    lines = [Line(**one) for one in json.loads(file.read_text())] if file.exists() else []
    for name in problem or CASES:
        for setting in CASES[name]:
            if any((one.problem, one.setting) == (name, setting) for one in lines):
                continue
            lines += measure(name, setting, TOLERANCES, count)
            file.write_text(json.dumps([asdict(one) for one in lines]))
    rows, title = [line.row() for line in lines], "Calibration"
    show(Console(), title, rows)
    (out / "table.md").write_text(markdown(title, rows))
    draw(lines, out / "calibration.png")


if __name__ == "__main__":
    typer.run(main)
