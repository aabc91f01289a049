"""The table, its file and the sheets of pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from benchmarks.paper_tables.folder import Folder
from benchmarks.paper_tables.models import Model
from benchmarks.paper_tables.printed import PRINTED
from benchmarks.paper_tables.quality import Quality
from benchmarks.paper_tables.samplers import METHODS, Sampler
from benchmarks.tables import markdown


def summary(model: Model, folder: Folder, sampler: str, method: str, columns: list[Quality]) -> dict[str, Any]:
    """The figures of one row, means over the pictures; seconds are medians, which a busy machine disturbs less."""
    records, truth = folder.records(sampler, method), folder.records(sampler, "sequential")
    count = min(len(records), len(truth))
    pictures = folder.pictures(sampler, method)
    prompts = [model.prompt(number) or "" for number in range(len(pictures))]
    own, sequential = (float(np.median([one.seconds for one in some[:count]])) for some in (records, truth))
    printed = PRINTED[model.table].get((sampler, method))
    return {
        "sampler": sampler,
        "method": method,
        "pictures": len(records),
        "rounds": float(np.mean([one.rounds for one in records])),
        "evaluations": float(np.mean([one.evaluations for one in records])),
        "seconds": own,
        "speedup": sequential / own,
        "error_mean": float(np.mean([one.error for one in records])),
        "error_worst": float(np.max([one.error for one in records])),
        **{one.title: one.measure(pictures, prompts) for one in columns},
        "printed": None if printed is None else asdict(printed),
    }


def row(line: dict[str, Any], table: str, columns: list[Quality]) -> dict[str, str]:
    """A row as the reader sees it."""
    printed = PRINTED[table].get((line["sampler"], line["method"]))
    error = "-" if line["method"] == "sequential" else f"{line['error_mean']:.2%} / {line['error_worst']:.2%}"
    return {
        "sampler": line["sampler"],
        "method": METHODS[line["method"]],
        "pictures": str(line["pictures"]),
        "rounds": f"{line['rounds']:.1f}",
        "NFE": f"{line['evaluations']:.0f}",
        "seconds": f"{line['seconds']:.2f}",
        "speed-up": f"{line['speedup']:.2f}x",
        "error, mean / worst": error,
        **{one.title: f"{line[one.title]:.{one.decimals}f}" for one in columns},
        f"printed, {table}": "" if printed is None else str(printed),
    }


def contact_sheet(folder: Folder, sampler: str, methods: Iterable[str], file: Path, columns: int = 8) -> None:
    """The first pictures of each method, one row a method."""
    rows = [[Image.open(one) for one in folder.pictures(sampler, method)[:columns]] for method in methods]
    width, height = rows[0][0].size
    sheet = Image.new(rows[0][0].mode, (width * max(map(len, rows)), height * len(rows)))
    for down, pictures in enumerate(rows):
        for across, picture in enumerate(pictures):
            sheet.paste(picture, (across * width, down * height))
    sheet.save(file)


def report(
    model: Model,
    folder: Folder,
    samplers: Iterable[Sampler],
    methods: tuple[str, ...],
    columns: list[Quality],
    console: Console,
) -> None:
    """Print the table, and write it, the JSON file and a sheet of pictures for each sampler."""
    lines = [summary(model, folder, one.name, method, columns) for one in samplers for method in methods]
    rows = [row(line, model.table, columns) for line in lines]
    table = markdown("Sequential and parallel sampling", rows)
    console.print(table, soft_wrap=True, highlight=False)
    (folder.root / "table.md").write_text(table)
    (folder.root / "results.json").write_text(json.dumps(lines, indent=2) + "\n")
    for sampler in samplers:
        contact_sheet(folder, sampler.name, methods, folder.root / f"{sampler.name}.png")
