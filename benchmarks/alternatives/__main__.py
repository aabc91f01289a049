"""The command; see the package's docstring."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.alternatives.methods import STEPS, Bench
from benchmarks.alternatives.report import best_table, draw, point_table
from benchmarks.alternatives.results import Results
from benchmarks.tables import markdown, show


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("alternatives"),
    samples: Annotated[int, typer.Option(help="How many; 0 only draws.")] = 32,
    first: Annotated[int, typer.Option(help="Number of the first, for several processes at once.")] = 0,
    steps: Annotated[int, typer.Option(help="Of the sequential sampler.")] = STEPS,
) -> None:
    """Run what is missing, then print the tables and draw the pictures of all samples in the folder."""
    out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        Bench(out, steps).complete(first, samples)
    results, console = Results(out), Console()
    tables = {
        f"Every setting, {results.samples} samples": point_table(results),
        "The least time to an error": best_table(results),
    }
    for title, rows in tables.items():
        show(console, title, rows)
    (out / "tables.md").write_text("".join(markdown(title, rows) for title, rows in tables.items()))
    draw(results, out)


if __name__ == "__main__":
    typer.run(main)
