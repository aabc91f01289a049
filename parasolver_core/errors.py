"""What goes wrong at run time. Bad arguments are ordinary ``ValueError`` and ``TypeError``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parasolver_core.solution import Solution


class SolverError(RuntimeError):
    """A run that ended without the sample asked for; ``solution`` holds what was reached."""

    def __init__(self, message: str, solution: Solution | None = None) -> None:
        super().__init__(message)
        self.solution = solution


class ConvergenceError(SolverError):
    """``max_rounds`` were used up."""


class NonFiniteError(SolverError):
    """The network, or the solver's own arithmetic, gave NaN or infinity."""


class NondeterministicDenoiserError(SolverError):
    """The denoiser gives different predictions for the same input."""


class CoupledRowsError(NondeterministicDenoiserError):
    """A row's prediction depends on the other rows of the call, on its place among them or on how many they are."""


def attach(error: BaseException, reached: Callable[[], Solution]) -> None:
    """Give an exception ``solution``: what was reached. One that refuses attributes stays as it is.

    ``reached`` may fail too, for example where a device is lost; the exception that was first is the one to see.
    """
    with suppress(Exception):
        error.solution = reached()  # type: ignore[attr-defined]


def has_solution(error: BaseException) -> bool:
    """Whether an exception carries a solution."""
    try:
        return getattr(error, "solution", None) is not None
    except Exception:
        return False


def note(error: BaseException, text: str) -> None:
    """Add a note to an exception, unless it refuses notes."""
    with suppress(Exception):
        error.add_note(text)
