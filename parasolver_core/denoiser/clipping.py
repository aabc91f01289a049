"""Clipping the predicted clean sample, which belongs to the network and not to the step rule."""

from __future__ import annotations

from dataclasses import dataclass

import array_api_compat
import numpy as np

from parasolver_core.arrays import Array
from parasolver_core.denoiser.contract import DenoiserFn, Rows, predicted_by, takes_rows
from parasolver_core.samplers.recurrence import predicted_sample_coefficients
from parasolver_core.samplers.schedules import NoiseSchedule, check_prediction_type


@dataclass(frozen=True)
class ClippedDenoiser:
    """A denoiser whose predicted clean sample is clipped to ``[-clip_range, clip_range]``; see :func:`clip_sample`."""

    denoiser: DenoiserFn
    schedule: NoiseSchedule
    prediction_type: str
    clip_range: float = 1.0

    def __post_init__(self) -> None:
        check_prediction_type("prediction_type", self.prediction_type)
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
        prediction_type: what it predicts; None: what it says itself (its attribute ``prediction_type``), or else the
            schedule's default.
        clip_range: the largest absolute value kept, in the units of the data.
    """
    if not clip_range > 0:
        raise ValueError(f"clip_range: expected a number > 0, got {clip_range}")
    kind = prediction_type or predicted_by(denoiser) or schedule.default_prediction_type
    return ClippedDenoiser(denoiser, schedule, kind, clip_range)
