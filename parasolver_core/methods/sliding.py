"""How samples begin to slide: which kind of window takes them, and what its new nodes are filled in with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from parasolver_core.arrays import Array, given_back, host_view, lengths, take_rows, to_host
from parasolver_core.methods.run import Run
from parasolver_core.methods.sample_window import SampleWindow
from parasolver_core.methods.window_batch import WindowBatch
from parasolver_core.rounds.fill import Along, Copies, Fill, Held, Interpolated
from parasolver_core.rounds.forecast import AlongTrajectory, BetweenNodes, Forecast
from parasolver_core.rounds.recall import Recall, Recalled, RecalledAlone
from parasolver_core.rounds.shared import Shared
from parasolver_core.rounds.sizes import room
from parasolver_core.samplers.held_form import Float64, HeldForm, Indices

_WILD_START = 1e6  # values of a warm start beyond this: nodes are filled in as without one
_LARGE = 2**15  # elements of a window from which on, on a CPU, a sweep that keeps to the cache is faster


@dataclass(frozen=True)
class Outlook:
    """What is known of samples that slide: predictions between nodes; B samples.

    Args:
        weights: (N, n), of the nodes in the prediction at each step.
        predictions: (B, n, size), of the held quantity at the nodes.
        slope: (B, N), dm/dx.
    """

    weights: Float64
    predictions: Array
    slope: Float64


class Sliding:
    """Makes the windows of samples that slide.

    Args:
        shared: what all samples share.
        trajectory: a warm start, (N + 1, batch, size); None: there is none.
    """

    _trajectory: Array

    def __init__(self, shared: Shared, trajectory: Array | None) -> None:
        self._shared, self._trajectory = shared, trajectory

    def __call__(self, samples: Indices, start: Array, outlook: Outlook | None = None) -> Sequence[Run]:
        """The runs that take these samples from ``start``, (B, size), all their ``x_T``."""
        shared, view = self._shared, host_view(start)
        # a sweep is faster there; and it makes states as the plain loop does, to the last bit, as a tolerance of 0 asks
        swept = len(samples) == 1 or view.shape[1] * shared.width > _LARGE or shared.tolerance == 0
        recall = None if shared.memory is None else Recall(shared.memory, view)
        if isinstance(view, np.ndarray) and swept:
            return [
                self._sweep(s, row, given_back(shared.xp, start[row, :]), outlook, recall)
                for row, s in enumerate(samples.tolist())
            ]
        slope = None if outlook is None else outlook.slope
        fill = self._fill(samples, outlook, recall)
        given = given_back(shared.xp, start)
        return [WindowBatch(shared, fill, samples, given, slope)]

    def _fill(self, samples: Indices, outlook: Outlook | None, recall: Recall | None) -> Fill:
        if outlook is not None:
            return Interpolated(self._shared.form, outlook.weights, outlook.predictions)
        if self._trajectory is not None:
            states, predictions = self._near(samples)
            eps = float(array_namespace(states).finfo(states.dtype).eps)
            if _is_sane(self._shared.form, states, predictions, room(self._shared.tolerance, eps)):
                return Along(self._shared.form, states, predictions)
        if recall is not None:
            return Recalled(self._shared.form, recall, self._shared.recurrence.blind)
        return self._cold

    @cached_property
    def _cold(self) -> Fill:
        """Of samples of which nothing is known."""
        fill, form = self._shared.fill, self._shared.form
        return (
            Copies(form, self._shared.noise.flat)
            if fill == "copy"
            else Held(form, self._shared.width, fill == "evaluated")
        )

    def _near(self, samples: Indices) -> tuple[Array, Array]:
        """The warm start and its predictions of the held quantity, (B, N + 1, size) and (B, N, size)."""
        recurrence, trajectory = self._shared.recurrence, self._trajectory
        states = [host_view(take_rows(trajectory[i, :, :], samples)) for i in range(len(recurrence) + 1)]
        xp: Any = array_namespace(states[0])

        def noise(step: int) -> Array | None:
            draws = [self._shared.noise_of(sample)(step) for sample in samples.tolist()]
            return None if recurrence.c[step] == 0 else xp.stack(draws)

        outputs = recurrence.implied_outputs(xp, states, noise)
        predictions = [
            x * float(p) + m * float(q) for x, m, (p, q) in zip(states, outputs, recurrence.held, strict=False)
        ]
        return xp.stack(states, axis=1), xp.stack(predictions, axis=1)

    def _sweep(
        self, sample: int, row: int, start: Array, outlook: Outlook | None, recall: Recall | None
    ) -> SampleWindow:
        shared, forecast, slope = self._shared, None, None
        if outlook is not None:
            forecast: Forecast | None = BetweenNodes(outlook.weights, outlook.predictions[row, ...], shared.form.held)
            slope = outlook.slope[row]
        elif self._trajectory is not None:
            trajectory = host_view(self._trajectory[:, sample, :])
            forecast = AlongTrajectory(shared.recurrence, trajectory, shared.noise_of(sample))
        elif recall is not None:
            forecast = RecalledAlone(shared.form.held, recall, row, shared.recurrence.blind)
        return SampleWindow(shared, sample, start, forecast, slope)


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
