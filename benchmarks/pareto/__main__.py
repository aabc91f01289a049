"""The command; see the package's docstring."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.pareto.pictures import draw
from benchmarks.pareto.report import method_table, overview, target_table, worst_excess
from benchmarks.pareto.runs import Results, run
from benchmarks.pareto.settings import FULL, IDENTITY, OURS, PUBLISHED, QUICK, SETTINGS
from benchmarks.problems import PROBLEMS
from benchmarks.tables import markdown, show


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
