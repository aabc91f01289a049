"""Progress bars over the final steps of all samples, with the rounds counted beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Callback = Callable[[Any], None]


def bars(console: Console) -> Progress:
    """Where bars are shown, while the block of a ``with`` runs."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps, {task.fields[rounds]} rounds"),
        TimeElapsedColumn(),
        console=console,
    )


def bar(progress: Progress, name: str, steps: int) -> Callback:
    """A bar over so many steps, of all samples together, moved after each round."""
    task = progress.add_task(name, total=steps, rounds=0)

    def moved(state: Any) -> None:
        progress.update(task, completed=sum(state.steps), rounds=state.stats.rounds)

    return moved
