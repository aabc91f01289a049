"""What a linearization says of slopes, and what of it is none."""

from __future__ import annotations

import numpy as np

from parasolver_core.rounds.shared import Shared
from parasolver_core.samplers.held_form import Float64

ROUNDING = 8  # moves of so many units in the last place are the arithmetic's own noise: they tell nothing


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
    noise = ROUNDING * unit * np.abs(old) * np.sqrt(size)
    new = np.where((moved > 0) & (np.abs(new) * np.sqrt(moved) <= noise), 0.0, new)
    return np.where(np.isfinite(new), new, old)
