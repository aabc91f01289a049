"""Data that are small beside the noise: an error of the sample counts relative to the sample, not to noisy states."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from parasolver_core.samplers.held_form import HeldForm

Float64 = NDArray[np.float64]

_USUAL = 0.25  # data of this size or more, RMS beside noise of 1 at the start, are not small
_TOLD = 0.95  # with so much of the clean sample in a state, the predicted sample is about as large as the sample
_TINY = 1e-24  # squared: data of size 0


class SmallData:
    """How much less the sizes of a sampler's states tell of the sample's, where the data are small.

    An error in the sample counts relative to the sample, of which a state holds ``alpha``, and noise for the rest.
    For data of the usual size, about that of the noise, states are as large as the sample. Where the data's size s is
    much less, moves are measured by ``s sqrt(alpha^2 + sigma^2)`` in the place of the state's size,
    ``sqrt(alpha^2 s^2 + sigma^2)``.

    Args:
        signal: (N,), the share of the clean sample in a state of unit size; None: there is no such sample.
        form: the sampler.

    ``told`` is at which nodes the prediction tells how large the sample is, and ``usual`` what :meth:`smallness` says
    of data that are not small.
    """

    def __init__(self, signal: Float64 | None, form: HeldForm) -> None:
        self._signal, last = signal, form.steps - 1
        self._telling = np.zeros(form.steps, dtype=np.bool_)  # where the prediction tells the size; the last one does
        if signal is not None:
            self._telling = signal >= _TOLD
            self._telling[last] = True
        # what the last step takes of the state, of the held quantity and of noise, as if all it reads were alike
        self._last_step = float(form.a[-1].sum()), float(form.b[-1].sum()), float(form.c[-1])
        self.told: list[bool] = self._telling.tolist()
        self.usual = np.ones(form.steps)

    def is_told(self, nodes: Any) -> bool:
        """Whether the prediction at any of these nodes tells how large the sample is."""
        return bool(self._telling[nodes].any())

    def smallness(self, node: Any, square: Any, state: Any = 0.0) -> Float64:
        """(N,), at most 1: what of a state's size counts.

        Args:
            node: where the predicted sample is known. With much noise it is the mean of the data and tells nothing; but
                of the last node it is what the sample is made of, with a share of the state and of noise. Of one
                sample, or (B,), like the next two; then the result is (B, N), or (N,) where none of them is small.
            square, state: the means of the squares of the prediction, and of the state.
        """
        telling = self._telling[node]
        if self._signal is None or not telling.any():
            return self.usual
        at_end = np.asarray(node) == len(self._signal) - 1
        if at_end.any():
            a, b, c = self._last_step
            square = np.where(at_end, b**2 * square + a**2 * state + c**2, square)
        small = telling & (square < _USUAL**2)
        if not small.any():
            return self.usual
        square = np.maximum(np.where(small, square, 1.0), _TINY)[..., None]
        return np.sqrt(square / (1 - self._signal**2 * (1 - square)))
