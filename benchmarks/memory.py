"""What does a memory of finished samples save? ``python -m benchmarks.memory``.

Each problem is sampled without a memory, with one learnt from other samples, and with one that is wrong: the same
trajectories, negated and their elements in reverse, as another network might have made them. Rounds are compared at
equal true error, as in ``benchmarks.pareto``, and at equal tolerance.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from benchmarks.pareto.runs import Bench, Point, at_error, spent
from benchmarks.pareto.settings import MAX_ROWS, Setting
from benchmarks.problems import PROBLEMS, Denoiser
from benchmarks.tables import markdown, show
from parasolver_core import Memory, Solution, solve

SETTINGS = tuple(
    Setting(f"{sampler}-{steps}, window {window}", sampler, steps, window)
    for sampler, steps, windows in (("DDIM", 50, (50, 16)), ("2M", 25, (25, 8)), ("flow", 28, (28, 8)))
    for window in windows
)
TOLERANCES = (0.99, 0.3, 0.1, 0.05, 0.03, 0.01)
ERROR, ASKED = 1e-2, (5e-2, 1e-2)
FIRST_LEARNT = 5000  # seeds of the samples that are learnt from
KINDS = ("none", "memory", "wrong")


def sampled(bench: Bench, tolerance: float, memory: Memory | None = None, save: str = "sample") -> Solution:
    return solve(
        bench.denoiser,
        bench.x_T,
        bench.timesteps,
        bench.rule,
        bench.setting.window,
        tolerance=tolerance,
        memory=memory,
        seed=bench.seeds,
        save=save,  # type: ignore[arg-type]
        max_rows=MAX_ROWS,
        check=False,
    )


def memories(bench: Bench, network: Denoiser, count: int) -> dict[str, Memory | None]:
    """None, one learnt from samples of a tolerance of 1 %, and a wrong one."""
    learnt = Bench(bench.problem, bench.setting, network, count, FIRST_LEARNT)
    found = sampled(learnt, ERROR, save="trajectory")
    states = found.trajectory
    assert states is not None
    wrong = replace(found, trajectory=-states.flatten(2).flip(2).reshape(states.shape))
    own, other = (Memory.learn(one, bench.timesteps, bench.rule) for one in (found, wrong))
    return dict(zip(KINDS, (None, own, other), strict=True))


def points(bench: Bench, network: Denoiser, count: int) -> list[Point]:
    """One for each memory and tolerance."""
    found = []
    for kind, memory in memories(bench, network, count).items():
        for tolerance in TOLERANCES if kind != "wrong" else ASKED:
            solution = sampled(bench, tolerance, memory)
            cost = spent(solution, len(bench.seeds))
            found.append(
                Point(
                    bench.problem.name,
                    bench.setting.name,
                    kind,
                    tolerance,
                    bench.errors(solution.sample),
                    *cost,
                    solution.stats.seconds,
                )
            )
    return found


def row(found: list[Point]) -> dict[str, str]:
    """Rounds without and with a memory."""
    by_kind = {kind: [one for one in found if one.method == kind] for kind in KINDS}
    exact = [at_error(by_kind[kind], ERROR) for kind in ("none", "memory")]
    cells = {"problem": found[0].problem, "setting": found[0].setting}
    cells[f"true error {ERROR:.0%}"] = " → ".join("-" if one is None else f"{one[0]:.1f}" for one in exact)
    for tolerance in ASKED:
        at = {kind: next(one for one in ones if one.tolerance == tolerance) for kind, ones in by_kind.items()}
        rounds = {kind: float(np.mean(one.rounds)) for kind, one in at.items()}
        evaluations = {kind: float(np.mean(one.evaluations)) for kind, one in at.items()}
        quantile = {kind: float(np.quantile(one.errors, 0.95)) / tolerance for kind, one in at.items()}
        cells |= {
            f"tolerance {tolerance:.0%}": f"{rounds['none']:.1f} → {rounds['memory']:.1f}",
            f"evaluations, {tolerance:.0%}": f"{evaluations['none']:.0f} → {evaluations['memory']:.0f}",
            f"95 % of error / tolerance, {tolerance:.0%}": f"{quantile['none']:.2f} → {quantile['memory']:.2f}",
            f"a wrong memory, {tolerance:.0%}": f"{rounds['wrong'] - rounds['none']:+.1f}",
        }
    return cells


def main(
    problem: Annotated[list[str] | None, typer.Option(help="Only these problems.")] = None,
    setting: Annotated[list[str] | None, typer.Option(help="Only these settings.")] = None,
    seeds: Annotated[int, typer.Option(help="Samples of each problem.")] = 16,
    learnt: Annotated[int, typer.Option(help="Samples that are learnt from.")] = 24,
    out: Annotated[Path, typer.Option(help="Folder for the table and JSON.")] = Path("memory-output"),
) -> None:
    """Print rounds without and with a memory. An interrupted run goes on where it was."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.json"
    found = [Point(**one) for one in json.loads(file.read_text())] if file.exists() else []
    for name in problem or PROBLEMS:
        network = PROBLEMS[name].make()
        for one in SETTINGS:
            done = {(point.problem, point.setting) for point in found}
            if (setting and one.name not in setting) or (name, one.name) in done:
                continue
            found += points(Bench(PROBLEMS[name], one, network, seeds), network, learnt)
            file.write_text(json.dumps([asdict(point) for point in found]))
    cases = dict.fromkeys((one.problem, one.setting) for one in found)
    rows = [row([one for one in found if (one.problem, one.setting) == case]) for case in cases]
    title = f"{seeds} samples, a memory of {learnt} others"
    show(Console(), title, rows)
    (out / "table.md").write_text(markdown(title, rows))


if __name__ == "__main__":
    typer.run(main)
