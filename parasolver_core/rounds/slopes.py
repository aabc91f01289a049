"""What a linearization says of slopes, and what of it is none."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from parasolver_core.rounds.shared import Shared
from parasolver_core.samplers.held_form import Float64

ROUNDING = 8  # moves of so many units in the last place are the arithmetic's own noise: they tell nothing
_RESTING = 100 * ROUNDING  # units in the last place, by which the next state may follow a node whatever the tolerance


def initial_slopes(shared: Shared) -> Float64:
    """Slopes dm/dx, (N,), before anything is known of the network."""
    return finite_slopes(shared, shared.linearization.initial(shared.recurrence))


def finite_slopes(shared: Shared, slope: Float64) -> Float64:
    """The slopes (.., N), or the sampler's first guess where they are not finite."""
    return np.where(np.isfinite(slope), slope, shared.recurrence.slope)


def new_slopes(shared: Shared, old: Float64, moved: Float64, cross: Float64, size: Float64, unit: float) -> Float64:
    """Slopes of the nodes of a round by the linearization, as in its ``update``; the old ones where it finds none.

    What rounding leaves of a slope that cancels is none: a network that says 0 whatever its input is then believed to.
    The less one has moved beside its size, sums of squares both, the more of the old slope it is.
    """
    new = shared.linearization.update(old, moved, cross)
    noise = (ROUNDING * unit) ** 2 * size * old * old
    new = np.where((moved > 0) & (new * new * moved <= noise), 0.0, new)
    return np.where(np.isfinite(new), new, old)


def followed(
    shared: Shared, latest: Float64, slope: Float64, move: Float64, held: Float64 | float, unit: float
) -> NDArray[np.bool_]:
    """Whether nodes may be final, as far as what is believed of their outputs follows the moves of their inputs.

    A slope that was measured across a jump of the network may make more of a small move than the whole state that comes
    of it. That state would be final with the node, and nothing would tell.

    Args:
        shared: what all samples share.
        latest: (2, ..), of the sampler at each node, see :class:`~parasolver_core.samplers.held_form.HeldForm`.
        slope: (..), like all that follows, dh/dx.
        move, held: of the states, and what is held, both relative to the states. Of 0 it is the stricter.
        unit: rounding unit.
    """
    if math.isinf(shared.acceptance.reach):
        return np.ones(move.shape, dtype=np.bool_)
    of_state, of_held = latest
    limit = max(shared.acceptance.reach * shared.tolerance, _RESTING * unit)
    return of_held * np.abs(slope) * move <= limit * (of_state + of_held * held)
