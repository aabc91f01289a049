"""Methods: the choices that make one parallel solver out of the parts, under the names users know."""

from __future__ import annotations

from dataclasses import dataclass, field

from parasolver_core.acceptance import Acceptance, RelativeMove
from parasolver_core.linearization import Identity, Linearization, Secant
from parasolver_core.recurrence import Recurrence

_FEWEST_SPREAD = 12  # fewer nodes do not resolve a trajectory
_LEAST_ERROR = 0.25  # tolerance times steps over window; below it sliding takes fewer rounds, as measured


@dataclass(frozen=True)
class Method:
    """How a parallel solver linearizes and accepts.

    Args:
        linearization: how the surrogate's slope is chosen.
        acceptance: how many nodes are final after a round.
        spread_from: with so many times more steps than the window holds, nodes are spread over the whole trajectory
            instead of sliding along it, unless the tolerance is so small that most are needed anyway. None: never.
    """

    linearization: Linearization = field(default_factory=Secant)
    acceptance: Acceptance = field(default_factory=RelativeMove)
    spread_from: float | None = 24

    def spreads(self, recurrence: Recurrence, window: int, tolerance: float) -> bool:
        """Whether to spread nodes: many steps, a smooth trajectory, and an error to spend."""
        if self.spread_from is None or recurrence.stochastic or window < _FEWEST_SPREAD:
            return False
        ratio = len(recurrence) / window
        return ratio >= self.spread_from and tolerance * ratio >= _LEAST_ERROR


METHODS: dict[str, Method] = {
    "secant": Method(),
    "identity": Method(linearization=Identity(), spread_from=None),
}


def get_method(method: str | Method) -> Method:
    """The preset of that name, or the method itself."""
    if isinstance(method, Method):
        return method
    if not isinstance(method, str) or method not in METHODS:
        names = ", ".join(repr(name) for name in [*METHODS, "sequential"])
        raise ValueError(f"method: expected one of {names}, or a Method, got {method!r}")
    return METHODS[method]
