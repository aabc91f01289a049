"""The terms of a step, and their sum: where arrays are small, the calls that it takes are what counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Term = tuple[Any, Any]  # a coefficient and an array


class Terms:
    """What the steps of a sampler, and the outputs that are believed at its nodes, are sums of.

    Args:
        a, b, c, held: as in :class:`~parasolver_core.samplers.recurrence.Recurrence`.
        dtype: of NumPy arrays: coefficients are arrays of it, with which small products take half the time. None: they
            are numbers.
    """

    def __init__(self, a: Float64, b: Float64, c: Float64, held: Float64, dtype: Any = None) -> None:
        def cast(value: float) -> Any:
            return value if dtype is None else np.asarray(value, dtype=dtype)

        # of a and b those that are not 0, with their k, the first of a always; and c, or None if it is 0
        self._steps = [
            (
                [(cast(value), k) for k, value in enumerate(states) if value != 0 or k == 0],
                [(cast(value), k) for k, value in enumerate(outputs) if value != 0],
                cast(noise) if noise != 0 else None,
            )
            for states, outputs, noise in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
        ]
        self._beliefs = [(cast(1 / q), cast(-p / q)) for p, q in held.tolist()]

    def of_step(self, i: int, x: Sequence[Any], m: Sequence[Any], z: Any = None) -> list[Term]:
        """Of ``x_{i+1}`` from ``x_i, x_{i-1}, ..``, ``m_i, m_{i-1}, ..`` and the noise."""
        states, outputs, c = self._steps[i]
        terms = [(a, x[k]) for a, k in states] + [(b, m[k]) for b, k in outputs]
        if z is not None and c is not None:
            terms.append((c, z))
        return terms

    def of_belief(self, i: int, held: Any, x: Any) -> list[Term]:
        """Of the output at node i for the state x that makes the held quantity what it is there."""
        of_held, of_state = self._beliefs[i]
        return [(of_held, held), (of_state, x)]


def combine(terms: Sequence[Term], out: Any = None, work: Any = None) -> Any:
    """The sum of ``coefficient * array``, added in this order; in new memory, or in NumPy arrays at hand.

    Args:
        terms: coefficients and arrays.
        out: where to put the sum; may be none of the arrays but the first.
        work: an array like it, overwritten.
    """
    (coefficient, array), *others = terms
    if out is None:
        total = array * coefficient
        for coefficient, array in others:
            total = total + array * coefficient
        return total
    np.multiply(array, coefficient, out=out)
    for coefficient, array in others:
        np.multiply(array, coefficient, out=work)
        np.add(out, work, out=out)
    return out
