"""Samples that are expected to run near a trajectory that is given: what it says of new nodes, if it is sane."""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import array_namespace

from parasolver_core.arrays import Array, host_view, lengths, take_rows, to_host
from parasolver_core.guesses.fill import Along
from parasolver_core.rounds.shared import Shared
from parasolver_core.rounds.sizes import room
from parasolver_core.samplers.held_form import HeldForm, Indices
from parasolver_core.samplers.implied import implied_outputs

_WILD_START = 1e6  # values of a warm start beyond this: nodes are filled in as without one


def near_trajectory(shared: Shared, trajectory: Array, samples: Indices) -> Along | None:
    """What fills in new nodes of these samples; None where rounding makes it worse than nothing.

    Args:
        shared: what all samples share.
        trajectory: the warm start, (N + 1, batch, size).
        samples: their places in the batch.
    """
    recurrence = shared.recurrence
    states = [host_view(take_rows(trajectory[i, :, :], samples)) for i in range(len(recurrence) + 1)]
    xp: Any = array_namespace(states[0])

    def noise(step: int) -> Array | None:
        draws = [shared.noise_of(sample)(step) for sample in samples.tolist()]
        return None if recurrence.c[step] == 0 else xp.stack(draws)

    outputs = implied_outputs(recurrence, xp, states, noise)
    predictions = [x * float(p) + m * float(q) for x, m, (p, q) in zip(states, outputs, recurrence.held, strict=False)]
    X, H = xp.stack(states, axis=1), xp.stack(predictions, axis=1)
    sane = _is_sane(shared.form, X, H, room(shared.tolerance, float(xp.finfo(X.dtype).eps)))
    return Along(shared.form, X, H) if sane else None


def _is_sane(form: HeldForm, states: Array, predictions: Array, room: float) -> bool:
    """Whether rounding allows for a warm start, and for the predictions that it implies: else it is worse than nothing.

    Predictions may grow from step to step where a sampler gives the latest one less weight than those before. They
    cancel in the states then, which do not follow from them but for the rounding of what is so much larger.
    """
    xp: Any = array_namespace(states)
    if not (bool(xp.max(xp.abs(states)) <= _WILD_START) and bool(xp.all(xp.isfinite(predictions)))):
        return False
    sizes, held = (to_host(lengths(xp, rows)).astype(np.float64) for rows in (states, predictions))
    parts = np.zeros_like(held)
    for k, weights in enumerate(np.abs(form.b).T):
        parts[:, k:] += weights[k:] * held[:, : held.shape[1] - k]
    return bool((parts <= room * sizes[:, 1:]).all())
