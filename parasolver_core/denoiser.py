"""Calling the user's network: in chunks, checked, and with the seconds counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import array_api_compat
import numpy as np
from numpy.typing import NDArray

from parasolver_core.arrays import Array, assign
from parasolver_core.recurrence import Recurrence, predicted_sample_coefficients
from parasolver_core.schedules import NoiseSchedule


class DenoiserFn(Protocol):
    """``denoiser(x, t) -> prediction``, the network in the form in which the solver calls it.

    ``x`` is ``(rows, *event)``, where the rows are the time steps and samples of one round in any number and order;
    ``t`` is (rows,), each row's own timestep, integers or floats as the timesteps were given. The prediction has the
    shape, dtype and device of ``x``. Each row must depend on that row alone, and the same row must always give the
    same prediction (evaluation mode, no dropout).

    A denoiser whose attribute ``takes_rows`` is true is called ``denoiser(x, t, rows)`` with :class:`Rows`, which tell
    the samples of the batch apart: each may have its own class label or prompt.
    """

    def __call__(self, x: Array, t: Array, /) -> Array: ...


@dataclass(frozen=True)
class Rows:
    """Which step of which sample each row of a call is.

    Args:
        steps: (rows,), on the host: indices into the recurrence's timesteps.
        samples: (rows,), on the host: places in the batch.
        recurrence: the sampler.
        noise: ``noise(step, sample)``, (*event), the standard normal ``z`` that the step adds to the sample.
    """

    steps: NDArray[np.int64]
    samples: NDArray[np.int64]
    recurrence: Recurrence
    noise: Callable[[int, int], Array]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, part: slice) -> Rows:
        return replace(self, steps=self.steps[part], samples=self.samples[part])


def takes_rows(denoiser: Any) -> bool:
    """Whether a denoiser is called ``denoiser(x, t, rows)``; those that wrap another pass it on."""
    return bool(getattr(denoiser, "takes_rows", False))


class Evaluator:
    """A denoiser with its contract checked at every call.

    Args:
        denoiser: the user's network.
        x_T: gives dtype, device and array library of what the network sees.
        recurrence: the sampler.
        noise: the noise of each step and sample, for a denoiser that takes rows.
        max_rows: the most rows in one call; a larger round is split. None: no limit.
    """

    def __init__(
        self,
        denoiser: DenoiserFn,
        x_T: Array,
        recurrence: Recurrence,
        noise: Callable[[int, int], Array],
        max_rows: int | None,
    ) -> None:
        if not callable(denoiser):
            raise TypeError(f"denoiser: expected a callable denoiser(x, t), got {type(denoiser).__name__}")
        self._xp = xp = array_api_compat.array_namespace(x_T)
        self._denoiser, self._max_rows = denoiser, max_rows
        self._recurrence, self._noise, self._takes_rows = recurrence, noise, takes_rows(denoiser)
        timesteps = recurrence.timesteps
        self._dtype, self._device = x_T.dtype, array_api_compat.device(x_T)
        self._event = tuple(x_T.shape[1:])
        integral = np.issubdtype(timesteps.dtype, np.integer)
        self._t = xp.asarray(timesteps, dtype=xp.int64 if integral else _time_dtype(xp, x_T.dtype), device=self._device)
        self._host_t, self._scale = timesteps, recurrence.input_scale
        self.calls = 0
        self.seconds = 0.0

    def __call__(self, x: Array, nodes: NDArray[np.int64], samples: NDArray[np.int64]) -> Array:
        """Predictions for rows ``x`` ``(rows, *event)`` at ``nodes`` (rows,), of ``samples`` (rows,).

        The network may work in place: ``x`` is its own. The result is good until the next call only.
        """
        xp, count = self._xp, x.shape[0]
        rows = Rows(nodes, samples, self._recurrence, self._noise)
        chunk = min(self._max_rows or count, count)
        if self._scale is not None:
            scale = xp.asarray(self._scale[nodes], dtype=x.dtype, device=self._device)
            x = x * xp.reshape(scale, (-1,) + (1,) * len(self._event))
        x = xp.astype(x, self._dtype, copy=False)
        t = xp.take(self._t, xp.asarray(nodes, dtype=xp.int64, device=self._device), axis=0)
        started = time.perf_counter()
        try:
            if chunk == count:
                return self._call(x, t, rows)
            whole = xp.zeros_like(x)
            # each part is copied at once: the network may use its output's memory again
            for i in range(0, count, chunk):
                part = slice(i, min(i + chunk, count))
                whole = assign(whole, (part, ...), self._call(x[part, ...], t[part], rows[part]))
            return whole
        finally:
            self.seconds += time.perf_counter() - started

    def _call(self, x: Array, t: Array, rows: Rows) -> Array:
        self.calls += 1
        try:
            prediction = self._denoiser(x, t, *((rows,) if self._takes_rows else ()))
        except Exception as error:
            first, last = rows.steps.min(), rows.steps.max()
            error.add_note(
                f"raised by the denoiser in call {self.calls}, given {len(rows)} rows of event shape {self._event} at "
                f"steps {first}..{last}, timesteps {self._host_t[first]}..{self._host_t[last]}"
            )
            raise
        self._check(prediction, x)
        return prediction

    def _check(self, prediction: Array, x: Array) -> None:
        expected = f"{type(x).__name__} of shape {tuple(x.shape)}, dtype {x.dtype}, on {self._device}"
        if type(prediction) is not type(x):
            hint = "return the prediction itself, for example unet(x, t).sample or out[0]"
            raise TypeError(f"denoiser: expected {expected}, got {type(prediction).__name__}; {hint}")
        got = tuple(prediction.shape), prediction.dtype, array_api_compat.device(prediction)
        if got != (tuple(x.shape), x.dtype, self._device):
            raise ValueError(
                f"denoiser: expected the prediction as {expected}, got shape {got[0]}, dtype {got[1]}, on {got[2]}; "
                "one prediction a row, in the dtype and on the device of x"
            )


@dataclass(frozen=True)
class ClippedDenoiser:
    """A denoiser whose predicted clean sample is clipped to ``[-clip_range, clip_range]``; see :func:`clip_sample`."""

    denoiser: DenoiserFn
    schedule: NoiseSchedule
    prediction_type: str
    clip_range: float = 1.0

    @property
    def takes_rows(self) -> bool:
        return takes_rows(self.denoiser)

    def __call__(self, x: Array, t: Array, /, *rows: Rows) -> Array:
        xp = array_api_compat.array_namespace(x)
        host_t = np.asarray(array_api_compat.to_device(t, "cpu"))
        alpha, sigma = (level[:-1] for level in self.schedule.levels(host_t))
        p, q = (
            xp.reshape(xp.asarray(c, dtype=x.dtype, device=array_api_compat.device(x)), (-1,) + (1,) * (x.ndim - 1))
            for c in predicted_sample_coefficients(self.prediction_type, alpha, sigma)
        )
        sample = xp.clip(p * x + q * self.denoiser(x, t, *rows), -self.clip_range, self.clip_range)
        return (sample - p * x) / q


def clip_sample(
    denoiser: DenoiserFn,
    schedule: NoiseSchedule,
    prediction_type: str | None = None,
    clip_range: float = 1.0,
) -> DenoiserFn:
    """Clip the predicted clean sample, as pixel-space models do; the result predicts what ``denoiser`` predicts.

    Clipping is not linear, so it belongs to the network and not to the step rule. The noise direction is derived
    from the clipped sample, as DDPM and DPM-Solver++ do and as diffusers' DDIM does with
    ``use_clipped_model_output=True``.

    Args:
        denoiser: the network.
        schedule: the path that relates its prediction to the clean sample.
        prediction_type: what it predicts; the schedule's default if None.
        clip_range: the largest absolute value kept, in the units of the data.
    """
    if not clip_range > 0:
        raise ValueError(f"clip_range: expected a number > 0, got {clip_range}")
    return ClippedDenoiser(denoiser, schedule, prediction_type or schedule.default_prediction_type, clip_range)


def _time_dtype(xp: Any, dtype: Any) -> Any:
    """Continuous times keep at least float32: bfloat16 cannot tell neighbouring timesteps apart."""
    return dtype if xp.finfo(dtype).bits >= 32 else xp.float32
