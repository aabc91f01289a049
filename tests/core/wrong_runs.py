"""What runs with bad arguments and bad networks have in common."""

from typing import Any

import numpy as np
import pytest

from parasolver_core import (
    DDIM,
    NoiseSchedule,
)
from tests.core.problems import Rational, normal

TABLE = NoiseSchedule.linear()
RULE = DDIM(TABLE, prediction_type="v_prediction")
GRID = TABLE.timesteps(20)
NETWORK = Rational()

BOTH = pytest.mark.parametrize("options", [{"method": "sequential"}, {"window": 6}, {"window": 1}], ids=str)


def never(x: Any, t: Any) -> Any:
    raise AssertionError("the network must not be called")


NAN = float("nan")
INF = float("inf")


def failing(value: float, timestep: int, sample_sign: float) -> Any:
    """NaN or infinity at one timestep, and there for the rows whose first entry has that sign only."""

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        out = NETWORK(x, t)
        out[(t == timestep) & (np.sign(x[:, 0]) == sample_sign), 1] = value
        return out

    return network


def start_of_two_signs() -> np.ndarray:
    """The first entries keep their sign all the way."""
    x_T = normal((3, 4))
    x_T[:, 0] = 5.0, -5.0, 6.0
    return x_T
