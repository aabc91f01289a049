"""Methods: the choices that make one parallel solver out of the parts, under the names users know."""

from __future__ import annotations

from dataclasses import dataclass, field

from parasolver_core.acceptance import Acceptance, RelativeMove
from parasolver_core.linearization import Identity, Linearization, Secant


@dataclass(frozen=True)
class Method:
    """How a parallel solver linearizes and accepts.

    Args:
        linearization: how the surrogate's slope is chosen.
        acceptance: how many nodes are final after a round.
    """

    linearization: Linearization = field(default_factory=Secant)
    acceptance: Acceptance = field(default_factory=RelativeMove)


METHODS: dict[str, Method] = {
    "secant": Method(),
    "identity": Method(linearization=Identity()),
}


def get_method(method: str | Method) -> Method:
    """The preset of that name, or the method itself."""
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        names = ", ".join(repr(name) for name in [*METHODS, "sequential"])
        raise ValueError(f"method: expected one of {names}, or a Method, got {method!r}")
    return METHODS[method]
