"""How samples begin to slide: which kind of window takes them, and what its new nodes are filled in with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from parasolver_core.arrays import Array, given_back, host_view
from parasolver_core.guesses.fill import Copies, Fill, Held, Interpolated
from parasolver_core.guesses.forecast import AlongTrajectory, BetweenNodes, Forecast
from parasolver_core.guesses.recall import Recall, Recalled, RecalledAlone
from parasolver_core.methods.run import Run
from parasolver_core.methods.sample_window import SampleWindow
from parasolver_core.methods.warm_start import near_trajectory
from parasolver_core.methods.window_batch import WindowBatch
from parasolver_core.rounds.shared import Shared
from parasolver_core.samplers.held_form import Float64, Indices

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
        if self._trajectory is not None and (along := near_trajectory(self._shared, self._trajectory, samples)):
            return along
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
