"""The solver advanced as far as somebody else's loop needs it: each state as soon as it is final."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from numpy.typing import NDArray
from torch import Tensor

from parasolver_core import ParallelIntegralSolver, Recurrence, Solution, Status, StepRule
from parasolver_core.denoiser.contract import DenoiserFn
from parasolver_core.errors import ConvergenceError, NonFiniteError, attach
from parasolver_core.methods.presets import get_method
from parasolver_core.planning.measurement import measure_run
from parasolver_core.planning.prediction import choose


@dataclass(frozen=True, eq=False)
class FixedRule(StepRule):
    """A table that is known already, on its own timesteps."""

    table: Recurrence = field(repr=False)

    @property
    def timesteps(self) -> NDArray[Any]:
        """The times of the network calls, (N,); with several calls a step they may repeat."""
        return self.table.timesteps

    def check_grid(self, timesteps: NDArray[Any]) -> None:
        """Refuse other timesteps."""
        if not (len(timesteps) == len(self.timesteps) and (timesteps == self.timesteps).all()):
            raise ValueError(
                f"timesteps: this rule holds a table of {len(self.timesteps)} timesteps of its own, got "
                f"{len(timesteps)} others; pass rule.timesteps, or make another rule"
            )

    def recurrence(self, timesteps: NDArray[Any]) -> Recurrence:
        """The table; ``timesteps`` have to be its own."""
        self.check_grid(timesteps)
        return self.table


@dataclass(frozen=True)
class Choices:
    """How to sample in parallel, before it is known what.

    Args:
        solver: holds the choices, with no step rule yet.
        auto: whether the window chooses itself.
    """

    solver: ParallelIntegralSolver
    auto: bool

    @classmethod
    def checked(cls, window: int | Literal["auto"] = 16, **options: Any) -> Choices:
        """Raise a ValueError or TypeError for what cannot be; ``options`` are the solver's."""
        if isinstance(window, str) and window != "auto":
            raise ValueError(f'window: expected an integer of at least 1 or "auto", got {window!r}')
        if options.get("method") == "sequential":
            window, options = 1, {name: value for name, value in options.items() if name != "method"}
        auto = isinstance(window, str)
        return cls(ParallelIntegralSolver(_nothing, 2 if auto else window, **options), auto)

    @property
    def sequential(self) -> bool:
        """Whether nothing is to be done in parallel."""
        return not self.auto and self.solver.window == 1

    def begin(self, denoiser: DenoiserFn, x_T: Tensor, rule: StepRule, timesteps: Any, noise: Any) -> Stepwise:
        """A run that has not begun."""
        solver = replace(self.solver, step_rule=rule)
        if self.auto:
            costs = measure_run(denoiser, x_T, timesteps, rule)
            table, method = rule.recurrence(timesteps), get_method(solver.method)
            best, _ = choose(table, method, solver.tolerance, costs, batch=len(x_T), max_rows=solver.max_rows)
            solver = replace(solver, window=best.window, max_rows=best.max_rows)
        return Stepwise(solver, denoiser, x_T, timesteps, noise)


class Stepwise:
    """A run whose states are asked for one after another; arguments as in :func:`parasolver_core.solve`."""

    def __init__(
        self, solver: ParallelIntegralSolver, denoiser: DenoiserFn, x_T: Tensor, timesteps: Any, noise: Any
    ) -> None:
        self._solver = solver
        self.state = solver.init(denoiser, x_T, timesteps, noise=noise, save="trajectory")

    @property
    def recurrence(self) -> Recurrence:
        return self.state.recurrence

    def after(self, steps: int) -> Tensor:
        """The state after so many steps, ``(batch, *event)``, in the working dtype; as many rounds as that takes.

        Raises:
            ConvergenceError, NonFiniteError: it is not reached; what was is in ``error.solution``, as it is with
                exceptions of the network.
        """
        state = self.state
        try:
            while min(state.steps) < steps and not self._solver.done(state):
                self._solver.step(state)
        except BaseException as error:
            state.halt(Status.INTERRUPTED if isinstance(error, KeyboardInterrupt) else Status.FAILED)
            attach(error, lambda: self._solver.result(state))
            raise
        if min(state.steps) < steps:
            solution = self._solver.result(state)
            raise (ConvergenceError if solution.status is Status.MAX_ROUNDS else NonFiniteError)(
                solution.message, solution
            )
        return state.final(steps)

    @property
    def solution(self) -> Solution:
        """What the run came to, without its states."""
        self.state.save = "sample"  # a second copy of all states is not wanted
        return self._solver.result(self.state)


class _Nothing(StepRule):
    """In the place of a step rule that is not known yet."""

    def recurrence(self, timesteps: NDArray[Any]) -> Recurrence:
        raise AssertionError("a rule replaces this one before a run begins")


_nothing = _Nothing()
