"""A progress bar over final steps; tqdm is imported only when one is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def meter(show: bool, total: int) -> Iterator[Callable[[int, int], None]]:
    """``update(final_steps, rounds)``; the bar is closed on leaving, also by an exception."""
    if not show:
        yield lambda final, rounds: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress: a progress bar needs tqdm; pip install 'parasolver[progress]'") from error
    with tqdm(total=total, unit="step") as bar:

        def update(final: int, rounds: int) -> None:
            bar.update(final - bar.n)
            bar.set_postfix(rounds=rounds)

        yield update
