"""Methods: the choices that make one parallel solver out of the parts, under the names users know."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from parasolver_core.acceptance import Acceptance, RelativeMove
from parasolver_core.linearization import Identity, Linearization, Secant
from parasolver_core.recurrence import Recurrence

_FEWEST_NODES, _FEWEST_STEPS = 5, 20  # fewer nodes do not show a trajectory's shape; fewer steps need no plan


@dataclass(frozen=True)
class Method:
    """How a parallel solver linearizes and accepts.

    Args:
        linearization: how the surrogate's slope is chosen.
        acceptance: how many nodes are final after a round.
        spread: whether to begin with nodes spread over the whole trajectory where that takes fewer evaluations than a
            sliding window (:meth:`spreads`). Never with a tolerance of 0.
    """

    linearization: Linearization = field(default_factory=Secant)
    acceptance: Acceptance = field(default_factory=RelativeMove)
    spread: bool = True

    def spreads(self, recurrence: Recurrence, window: int, tolerance: float) -> bool:
        """Whether to spread nodes: few of the steps must be enough for the tolerance.

        Interpolating linearly between n nodes was measured to leave an error of about ``(2.5 / n)^2``, and of
        ``20 / n`` times a margin where noise makes the trajectory rough. A window that slides takes some rounds and
        about ``N / window``, spread nodes as many and twice ``n / window``, which gives the factor 2.
        """
        if not self.spread or tolerance <= 0 or window < _FEWEST_NODES or len(recurrence) < _FEWEST_STEPS:
            return False
        needed = 20 / tolerance if recurrence.stochastic else 2.5 / math.sqrt(tolerance)
        return 2 * needed <= len(recurrence)


METHODS: dict[str, Method] = {
    "secant": Method(),
    "identity": Method(linearization=Identity(), spread=False),
}


def get_method(method: str | Method) -> Method:
    """The preset of that name, or the method itself."""
    if isinstance(method, Method):
        return method
    if not isinstance(method, str) or method not in METHODS:
        names = ", ".join(repr(name) for name in [*METHODS, "sequential"])
        raise ValueError(f"method: expected one of {names}, or a Method, got {method!r}")
    return METHODS[method]
