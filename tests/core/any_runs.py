"""Problems of any kind, for hypothesis: samplers, schedules, windows, batches and dtypes."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from hypothesis import strategies as st

from parasolver_core import (
    DDIM,
    DDPM,
    DPMSolver,
    Euler,
    NoiseSchedule,
    StepRule,
)
from tests.arrays import to_numpy
from tests.core.problems import TanhNetwork, normal

TABLE = NoiseSchedule.scaled_linear()
COSINE = NoiseSchedule.squared_cosine()
KARRAS = NoiseSchedule.karras(0.05, 10.0)
FLOW = NoiseSchedule.flow_matching(2.0)

SAMPLERS: dict[str, tuple[StepRule, NoiseSchedule]] = {
    "ddim, epsilon": (DDIM(TABLE), TABLE),
    "ddim, v": (DDIM(COSINE, prediction_type="v_prediction"), COSINE),
    "ddim, sample, eta": (DDIM(TABLE, prediction_type="sample", eta=0.7), TABLE),
    "ddpm": (DDPM(TABLE), TABLE),
    "ddpm, large": (DDPM(TABLE, prediction_type="v_prediction", variance_type="fixed_large"), TABLE),
    "dpm 2": (DPMSolver(TABLE), TABLE),
    "dpm 3": (DPMSolver(COSINE, prediction_type="v_prediction", order=3), COSINE),
    "dpm 3, karras": (DPMSolver(KARRAS, order=3, lower_order_final=False), KARRAS),
    "dpm 2, sde": (DPMSolver(TABLE, prediction_type="sample", stochastic=True), TABLE),
    "euler, karras": (Euler(KARRAS, prediction_type="epsilon"), KARRAS),
    "euler, flow": (Euler(FLOW), FLOW),
}
STOCHASTIC = [name for name in SAMPLERS if name in ("ddim, sample, eta", "ddpm", "ddpm, large", "dpm 2, sde")]

MAX_STEPS = 16
FEW = 7  # for tests on every array library, one of which is slow: still three times the longest memory


def exactness(dtype: str) -> float:
    """How far apart two exact runs may be: batching error of the network and moves called rounding, 8 ulp at each of
    the steps, amplified by at most 1 / alpha_T = 15 (epsilon prediction) and as much again by the network."""
    return MAX_STEPS * 8 * 15 * 2 * float(np.finfo(dtype).eps)


@dataclass(frozen=True)
class Run:
    """One drawn sampling problem."""

    sampler: str
    steps: int
    window: int
    batch: int
    dtype: str
    seed: int

    @property
    def rule(self) -> StepRule:
        return SAMPLERS[self.sampler][0]

    @property
    def grid(self) -> np.ndarray:
        return SAMPLERS[self.sampler][1].timesteps(self.steps)

    @property
    def network(self) -> TanhNetwork:
        discrete = SAMPLERS[self.sampler][1] in (TABLE, COSINE)
        return TanhNetwork(size=6, gain=1.2, time_scale=1e-3 if discrete else 0.1, seed=self.seed)

    def start(self, xp: ModuleType) -> Any:
        return normal((self.batch, 2, 3), xp, self.dtype, self.seed)


def runs(
    samplers: list[str] | None = None, dtypes: tuple[str, ...] = ("float64", "float32"), steps: int = MAX_STEPS
) -> Any:
    return st.builds(
        Run,
        sampler=st.sampled_from(samplers or list(SAMPLERS)),
        steps=st.integers(1, steps),
        window=st.integers(1, steps + 4),
        batch=st.integers(1, 3 if steps > FEW else 2),
        dtype=st.sampled_from(dtypes),
        seed=st.integers(0, 2**32),
    )


tolerances = st.one_of(st.just(0.0), st.floats(1e-6, 0.9))


def same_bits(a: Any, b: Any) -> bool:
    a, b = to_numpy(a), to_numpy(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


seeds = st.integers(0, 2**63 - 1)
