"""The command; see the package's docstring."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

from benchmarks.latency.devices import OVERHEAD
from benchmarks.latency.pictures import draw
from benchmarks.latency.replays import replay
from benchmarks.latency.report import cost_table, replay_table, timing_table
from benchmarks.latency.timings import Clock, batch_cost
from benchmarks.problems import PROBLEMS
from benchmarks.tables import markdown, show

SAMPLERS = (("DDIM", 50), ("DDIM", 100), ("DDPM", 100), ("2M", 50))
MEASURED = ("policy", "mixture")
REPLAYED = {
    "clothes": (("DDIM", 50, (8, 16, 50)), ("2M", 25, (8, 25)), ("DDIM", 100, (16, 100)), ("DDPM", 1000, (100,))),
    "policy": (("DDIM", 100, (16, 100)), ("DDPM", 100, (16, 100)), ("DDIM", 1000, (32,))),
    "mixture": (("DDIM", 100, (16, 100)), ("DDPM", 1000, (100,))),
}
REPLAY_TOLERANCE = 1e-2


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
