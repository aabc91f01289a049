"""Clipped clean samples, for every kind of prediction and of schedule."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from parasolver_core import NoiseSchedule, clip_sample
from parasolver_core.denoiser.clipping import ClippedDenoiser, Clipping
from tests.arrays import to_numpy
from tests.core.problems import normal, prediction

SCHEDULES = {
    "table": (NoiseSchedule.linear(), np.array([900, 500, 20])),
    "table, floats": (NoiseSchedule.linear(), np.array([900.0, 500.0, 20.0])),
    "karras": (NoiseSchedule.karras(), np.array([30.0, 1.0, 0.1])),
    "flow": (NoiseSchedule.flow_matching(), np.array([0.9, 0.5, 0.1])),
}
CLEAN = np.array([[-3.0, 0.2], [0.5, 1.0], [0.7, -0.4]])[:, :, None]


class Halved(NoiseSchedule):
    """Neither a table nor of any library: its levels are known on the host only."""

    default_prediction_type = "sample"
    sigma_data = 1.0

    def timesteps(self, num_inference_steps: int) -> Any:
        raise NotImplementedError

    def levels(self, timesteps: Any) -> Any:
        sigma = np.append(np.asarray(timesteps, dtype=np.float64) / 2, 0.0)
        return 1 - sigma / 4, sigma


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", [*SCHEDULES, "another"])
@pytest.mark.parametrize("limit", [None, 0.5])
def test_a_prediction_is_that_of_the_clipped_sample(xp: ModuleType, name: str, kind: str, limit: float | None) -> None:
    schedule, t = SCHEDULES.get(name, (Halved(), np.array([1.8, 1.0, 0.2])))
    alpha, sigma = (level[:-1, None, None] for level in schedule.levels(t))
    x = alpha * CLEAN + sigma * normal((3, 2, 1))
    given = xp.asarray(prediction(CLEAN, x, alpha, sigma, kind))
    clipping = Clipping(schedule, kind) if limit is None else Clipping(schedule, kind, limit)
    got = to_numpy(clipping(xp.asarray(x), xp.asarray(t), given))
    clipped = np.clip(CLEAN, -(limit or 1.0), limit or 1.0)
    np.testing.assert_allclose(got, prediction(clipped, x, alpha, sigma, kind), rtol=1e-9, atol=1e-11)


def test_half_precision_stays_what_it_is(xp: ModuleType) -> None:
    for schedule, t in SCHEDULES.values():
        x = normal((3, 2), xp, "float32")
        assert Clipping(schedule, "sample")(x, xp.asarray(t), x).dtype == x.dtype


def test_what_is_predicted_is_told_or_the_denoisers_or_the_schedules() -> None:
    class Told:
        prediction_type = "v_prediction"

        def __call__(self, x: Any, t: Any) -> Any:
            return x

    karras = NoiseSchedule.karras()
    plain, told = (lambda x, t: x), Told()
    kinds = [
        clip_sample(plain, karras).prediction_type,  # type: ignore[attr-defined]
        clip_sample(told, karras).prediction_type,  # type: ignore[attr-defined]
        clip_sample(plain, karras, "epsilon").prediction_type,  # type: ignore[attr-defined]
    ]
    assert kinds == ["sample", "v_prediction", "epsilon"]
    assert ClippedDenoiser(plain, karras, "sample").clip_range == clip_sample(plain, karras).clip_range == 1.0  # type: ignore[attr-defined]
    clip_sample(plain, karras, clip_range=1e-6)
    with pytest.raises(ValueError, match="the denoiser predicts 'v_prediction', got 'epsilon'"):
        clip_sample(told, karras, "epsilon")
