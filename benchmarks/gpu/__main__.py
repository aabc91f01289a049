"""The command; see the package's docstring."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.gpu.device import run_part

SHARES = {"right": 0.25, "rounds": 0.15, "costs": 0.7, "runs": 1.0}  # of the time that is left when a part begins


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("gpu"),
    tiny: Annotated[bool, typer.Option("--tiny", help="Everything in small, on a CPU.")] = False,
    seconds: Annotated[float, typer.Option(help="For all parts together.")] = 440.0,
    part: Annotated[list[str] | None, typer.Option(help="Only these: right, rounds, costs, runs.")] = None,
) -> None:
    """Run the parts, print what they found; the exit status is 1 if anything was not as promised."""
    out.mkdir(parents=True, exist_ok=True)
    file, end = out / "results.jsonl", time.monotonic() + seconds
    file.unlink(missing_ok=True)
    if not tiny and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device is visible; --tiny tries everything on a CPU")
    name = "cpu" if tiny else torch.cuda.get_device_name()
    for one in part or SHARES:
        if one not in SHARES:
            raise typer.BadParameter(f"part: expected one of {', '.join(SHARES)}, got {one}")
        share = (end - time.monotonic()) * SHARES[one]
        process = multiprocessing.get_context("spawn").Process(
            target=run_part, args=(one, "cpu" if tiny else "cuda", file, tiny, share)
        )
        process.start()
        process.join(share + 30)  # beyond the time that the part itself keeps to: it hangs
        if process.exitcode != 0:
            process.kill()
            with file.open("a") as lines:
                error = "hung" if process.exitcode is None else f"exit status {process.exitcode}"
                lines.write(json.dumps({"part": one, "name": "the whole part", "ok": False, "error": error}) + "\n")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    show(found, name)
    if not all(one["ok"] for one in found if one["part"] == "right"):
        raise typer.Exit(1)


def show(found: list[dict[str, Any]], device: str) -> None:
    """One line a result."""
    table = Table("part", "name", "ok", "found", title=f"{device}, torch {torch.__version__}")
    for one in found:
        values = {key: value for key, value in one.items() if key not in ("part", "name", "ok")}
        text = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        table.add_row(one["part"], one["name"], "yes" if one["ok"] else "NO", text)
    Console(width=160).print(table)


if __name__ == "__main__":
    typer.run(main)
