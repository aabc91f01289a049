"""What goes wrong at run time. Bad arguments are ordinary ``ValueError`` and ``TypeError``."""

from __future__ import annotations

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
