"""Tables of a benchmark, in the terminal and in a file."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def show(console: Console, title: str, rows: list[dict[str, str]]) -> None:
    """Print as a table."""
    if not rows:
        return
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*row.values())
    console.print(table)


def markdown(title: str, rows: list[dict[str, str]]) -> str:
    """The same for a file."""
    if not rows:
        return ""
    lines = [f"## {title}", "", "| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(row.values()) + " |" for row in rows), "", ""])
