"""The command; see the package's docstring."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.gpu.device import run_part

# Seconds of 440 that each part may take; what one leaves, the next ones share.
PARTS = {
    "right": 35.0,
    "libraries": 20.0,
    "pipelines": 30.0,
    "rounds": 30.0,
    "costs": 115.0,
    "runs": 90.0,
    "trained": 120.0,
}
PROMISES = ("right", "libraries", "pipelines")
HANGS = 25.0  # seconds beyond its time after which a part is ended


def main(
    out: Annotated[Path | None, typer.Option(help="Folder of the results.", show_default="$OUT, or gpu")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Everything in small, on a CPU.")] = False,
    seconds: Annotated[float, typer.Option(help="For all parts together.")] = 440.0,
    part: Annotated[list[str] | None, typer.Option(help=f"Only these: {', '.join(PARTS)}.")] = None,
) -> None:
    """Run the parts, print what they found; the exit status is 1 if a promise was not kept or a part did not end."""
    chosen = part or list(PARTS)
    for one in chosen:
        if one not in PARTS:
            raise typer.BadParameter(f"part: expected one of {', '.join(PARTS)}, got {one}")
    if not tiny and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device is visible; --tiny tries everything on a CPU")
    folder = out or Path(os.environ.get("OUT", "gpu"))
    folder.mkdir(parents=True, exist_ok=True)
    file, end = folder / "results.jsonl", time.monotonic() + seconds
    name = "cpu" if tiny else torch.cuda.get_device_name()
    machine = {"part": "machine", "name": name, "ok": True, "torch": torch.__version__, "tiny": tiny}
    file.write_text(json.dumps(machine) + "\n")
    for place, one in enumerate(chosen):
        left = end - time.monotonic()
        until = time.monotonic() + left * PARTS[one] / sum(PARTS[other] for other in chosen[place:])
        run_apart(one, "cpu" if tiny else "cuda", file, tiny, until)
    found = [json.loads(line) for line in file.read_text().splitlines()]
    show(found, name)
    broken = [one for one in found if not one["ok"] and (one["part"] in PROMISES or one["name"] == "the whole part")]
    if broken:
        raise typer.Exit(1)


def run_apart(part: str, device: str, file: Path, tiny: bool, until: float) -> None:
    """A part in a process of its own: neither a hang nor a broken CUDA context stops the next."""
    process = multiprocessing.get_context("spawn").Process(target=run_part, args=(part, device, file, tiny, until))
    process.start()
    process.join(max(until + HANGS - time.monotonic(), HANGS))
    if process.exitcode == 0:
        return
    error = "hung" if process.exitcode is None else f"exit status {process.exitcode}"
    process.kill()
    with file.open("a") as lines:
        lines.write(json.dumps({"part": part, "name": "the whole part", "ok": False, "error": error}) + "\n")


def show(found: list[dict[str, Any]], device: str) -> None:
    """One line a result; promises that were kept are counted."""
    table = Table("part", "name", "ok", "found", title=f"{device}, torch {torch.__version__}")
    for part in PROMISES:
        own = [one for one in found if one["part"] == part]
        if own:
            table.add_row(part, "kept", "", f"{sum(one['ok'] for one in own)} of {len(own)}")
    for one in found:
        if one["ok"] and one["part"] in PROMISES:
            continue
        values = {key: value for key, value in one.items() if key not in ("part", "name", "ok")}
        text = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        table.add_row(one["part"], one["name"], "yes" if one["ok"] else "NO", text)
    Console(width=160).print(table)


if __name__ == "__main__":
    typer.run(main)
