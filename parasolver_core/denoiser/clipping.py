"""Clipping the predicted clean sample, which belongs to the network and not to the step rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import array_api_compat
import numpy as np
from numpy.typing import NDArray

from parasolver_core.arrays import Array, DeviceTable, take_at, to_host, uploaded
from parasolver_core.denoiser.contract import DenoiserFn, Rows, predicted_by, takes_rows
from parasolver_core.samplers.sample_form import predicted_sample_coefficients
from parasolver_core.samplers.schedules import (
    ContinuousSchedule,
    DiscreteSchedule,
    NoiseSchedule,
    check_prediction_type,
)
from parasolver_core.validation import as_float


class Clipping:
    """Predictions that go with clean samples clipped to ``[-clip_range, clip_range]``.

    Args:
        schedule: the path that relates a prediction to the clean sample.
        prediction_type: what is predicted.
        clip_range: the largest absolute value kept.
    """

    def __init__(self, schedule: NoiseSchedule, prediction_type: str, clip_range: float = 1.0) -> None:
        check_prediction_type("prediction_type", prediction_type)
        self._schedule, self._kind, self._range = schedule, prediction_type, clip_range
        self._tables: tuple[DeviceTable, ...] = ()
        if isinstance(schedule, DiscreteSchedule):  # looked up on the device, which nobody waits for
            coefficients = self._coefficients_at(np.arange(schedule.train_steps))
            self._tables = tuple(map(DeviceTable, coefficients))

    def __call__(self, x: Array, t: Array, prediction: Array) -> Array:
        """For rows ``x`` (rows, *event), their times t (rows,) and what is predicted, like ``x``."""
        xp = array_api_compat.array_namespace(x)
        p, q = (xp.reshape(column, (-1,) + (1,) * (x.ndim - 1)) for column in self._coefficients(x, t))
        sample = xp.clip(p * x + q * prediction, -self._range, self._range)
        return (sample - p * x) / q

    def _coefficients(self, x: Array, t: Array) -> list[Array]:
        """``(p, q)`` of the clean sample ``p x + q m`` of each row, (rows,), like ``x``."""
        xp: Any = array_api_compat.array_namespace(x)
        if self._tables and xp.isdtype(t.dtype, "integral"):
            return [take_at(table.like(x), t) for table in self._tables]
        if isinstance(self._schedule, ContinuousSchedule):
            coefficients = predicted_sample_coefficients(self._kind, *self._schedule.path(t))
            return [xp.astype(column, x.dtype, copy=False) for column in coefficients]
        where = array_api_compat.device(x)
        return [uploaded(xp, column, where, x.dtype) for column in self._coefficients_at(to_host(t))]

    def _coefficients_at(self, t: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        alpha, sigma = (level[:-1] for level in self._schedule.levels(t))
        return predicted_sample_coefficients(self._kind, alpha, sigma)


@dataclass(frozen=True)
class ClippedDenoiser:
    """A denoiser whose predicted clean sample is clipped to ``[-clip_range, clip_range]``; see :func:`clip_sample`."""

    denoiser: DenoiserFn
    schedule: NoiseSchedule
    prediction_type: str
    clip_range: float = 1.0
    _clipping: Clipping = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_clipping", Clipping(self.schedule, self.prediction_type, self.clip_range))
        inner = predicted_by(self.denoiser)
        if inner is not None and inner != self.prediction_type:
            raise ValueError(
                f"prediction_type: the denoiser predicts {inner!r}, got {self.prediction_type!r}, of which the clean "
                "sample is another one"
            )

    @property
    def takes_rows(self) -> bool:
        return takes_rows(self.denoiser)

    def __call__(self, x: Array, t: Array, /, *rows: Rows) -> Array:
        return self._clipping(x, t, self.denoiser(x, t, *rows))


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
        prediction_type: what it predicts; None: what it says itself (its attribute ``prediction_type``), or else the
            schedule's default.
        clip_range: the largest absolute value kept, in the units of the data.
    """
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule: expected a NoiseSchedule, got {type(schedule).__name__}")
    clip_range = as_float("clip_range", clip_range)
    if not clip_range > 0:
        raise ValueError(f"clip_range: expected a number > 0, got {clip_range}")
    if prediction_type is None:
        prediction_type = predicted_by(denoiser) or schedule.default_prediction_type
    return ClippedDenoiser(denoiser, schedule, prediction_type, clip_range)
