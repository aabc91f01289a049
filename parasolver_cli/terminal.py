"""What the commands print: results on stdout, everything else on stderr, and no number ever cut."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import typer
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from parasolver_adapters.extras import install
from parasolver_cli.entry import INTERRUPTED
from parasolver_core import SolverError

_OPTIONS = {"spacing": "steps", "timesteps": "steps", "denoiser": "network"}  # other words of the library
_PYTHON_ONLY = {"x_T", "step_rule"}


def rank() -> int:
    """Of this process, where torchrun started several."""
    return int(os.environ.get("RANK", "0"))


def results(quiet: bool = False) -> Console:
    """For what was asked for. Not cut to a width where nobody looks at it in a terminal."""
    console = Console(quiet=quiet or rank() > 0)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 10_000
    return console


def progress() -> Console:
    """For progress bars and remarks."""
    return Console(stderr=True, quiet=rank() > 0)


def as_json(record: Any) -> str:
    """The record as JSON, which knows no infinity and no NaN: null stands for a number that nobody knows."""
    return json.dumps(_known(record), indent=2)


def _known(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _known(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_known(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_json(record: Any) -> None:
    """The record alone on stdout."""
    if rank() == 0:
        try:
            print(as_json(record), flush=True)  # what cannot be written is told of here, not at the exit
        except BrokenPipeError:
            results().on_broken_pipe()  # the reader has seen enough


def fail(message: str, code: int = 1) -> typer.Exit:
    """One message on stderr, and the exception that ends the command."""
    which = f"process {rank()}: " if rank() > 0 else ""  # it may be the only one that failed
    Console(stderr=True, soft_wrap=True).print(f"parasolver: {which}{message}", markup=False, highlight=False)
    return typer.Exit(code)


def in_options(message: str) -> str:
    """A message of the library in the words of the command line: ``--steps`` instead of ``spacing:``."""
    found = re.match(r"([a-z_]+): ", message)
    if found is None or found[1] in _PYTHON_ONLY:
        return message
    option = _OPTIONS.get(found[1], found[1]).replace("_", "-")
    return f"--{option}: {message[found.end() :]}"


@contextmanager
def reported(kept: str = "nothing was written") -> Iterator[None]:
    """Turns what the user can mend, and his Ctrl-C, into one line and an exit code."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise fail(f"interrupted; {kept}", INTERRUPTED) from interrupt
    except ModuleNotFoundError as error:
        hint = str(error) if "pip install" in str(error) else f"{error.name} is not installed: {install('demo')}"
        raise fail(hint) from error
    except (ImportError, OSError, TypeError, ValueError, SolverError) as error:
        raise fail(in_options(str(error))) from error


@dataclass(frozen=True)
class Column:
    """Of a table.

    Args:
        name: its heading, perhaps of two lines.
        words: text, which may go on in the next line; else numbers, to the right and never broken.
    """

    name: str
    words: bool = False


def print_table(console: Console, title: str, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """A table if it fits the width; else a paragraph for each row, so that nothing is cut."""
    widest = [
        max(cell_len(line) for text in (column.name, *cells) for line in _least(text, column))
        for column, cells in zip(columns, zip(*rows, strict=True), strict=True)
    ]
    if sum(widest) + 3 * len(columns) > console.width:
        _print_paragraphs(console, title, columns, rows)
        return
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column, width in zip(columns, widest, strict=True):
        table.add_column(
            column.name,
            justify="left" if column.words else "right",
            no_wrap=not column.words,
            overflow="fold",
            min_width=width,
        )
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _least(text: str, column: Column) -> list[str]:
    """The parts of a text that cannot be broken."""
    return (text.split() if column.words else text.splitlines()) or [""]


def _print_paragraphs(console: Console, title: str, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    console.print(title, style="bold", highlight=False)
    for row in rows:
        first, *others = (
            f"{column.name.replace(chr(10), ' ')}: {text}" for column, text in zip(columns, row, strict=True)
        )
        console.print(
            "\n".join([first, *(f"  {line}" for line in others)]), highlight=False, markup=False, soft_wrap=True
        )
    console.print()
