"""A progress bar over final steps; tqdm is imported only when one is wanted."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any


class Meter:
    """A bar to be used in a ``with`` statement, and closed on leaving it, also by an exception.

    Nothing is shown where there is nowhere to show it: a program without a console has no ``sys.stderr``, or a closed
    one, and a pipe may break while the run goes on.

    Args:
        show: whether there is a bar at all.
        total: of the steps.
        unit: what a step is called.
    """

    def __init__(self, show: bool, total: int, unit: str = "step") -> None:
        self._bar: Any = None
        if not show:
            return
        try:
            from tqdm.auto import tqdm
        except ImportError as error:
            raise ImportError("progress: a progress bar needs tqdm; pip install tqdm") from error
        if sys.stderr is not None and not getattr(sys.stderr, "closed", False):
            with suppress(OSError, ValueError):
                self._bar = tqdm(total=total, unit=unit)

    def __enter__(self) -> Meter:
        return self

    def __call__(self, final: int, rounds: int) -> None:
        """Show so many final steps after so many rounds."""
        if self._bar is None:
            return
        try:
            self._bar.update(final - self._bar.n)
            self._bar.set_postfix(rounds=rounds)
        except (OSError, ValueError, AttributeError):
            self._close()

    def __exit__(self, *raised: object) -> None:
        self._close()

    def _close(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            with suppress(OSError, ValueError, AttributeError):
                bar.close()
