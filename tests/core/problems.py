"""Small problems with known answers: closed-form denoisers, a smooth random network, and counters."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import array_api_compat
import numpy as np

from parasolver_core import NoiseSchedule
from tests.arrays import to_numpy

EPS = float(np.finfo(np.float64).eps)

VP_PREDICTIONS = ("epsilon", "sample", "v_prediction")


def prediction(x_0: Any, x: Any, alpha: Any, sigma: Any, prediction_type: str) -> Any:
    """What a network of that kind predicts where the clean sample is ``x_0``; written from the definitions."""
    eps = (x - alpha * x_0) / sigma
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "sample":
        return x_0
    if prediction_type == "flow":
        return eps - x_0
    assert prediction_type == "v_prediction"
    return (alpha * eps - sigma * x_0) / (alpha**2 + sigma**2) ** 0.5


def levels_of_rows(schedule: NoiseSchedule, x: Any, t: Any) -> tuple[Any, Any]:
    """alpha and sigma of each row, shaped to broadcast against ``x``."""
    xp = array_api_compat.array_namespace(x)
    host = to_numpy(t)
    return tuple(
        xp.reshape(xp.asarray(level[:-1], dtype=x.dtype), (-1,) + (1,) * (x.ndim - 1))
        for level in schedule.levels(host)
    )


class Gaussian:
    """The exact denoiser of data ``N(mean, std^2)``: affine in x, so every sampler has a closed form."""

    def __init__(self, schedule: NoiseSchedule, prediction_type: str, mean: float = 0.3, std: float = 0.5) -> None:
        self.schedule, self.prediction_type, self.mean, self.std = schedule, prediction_type, mean, std

    def clean(self, x: Any, alpha: Any, sigma: Any) -> Any:
        """``E[x_0 | x]``."""
        variance = alpha**2 * self.std**2 + sigma**2
        return self.mean + alpha * self.std**2 / variance * (x - alpha * self.mean)

    def __call__(self, x: Any, t: Any) -> Any:
        alpha, sigma = levels_of_rows(self.schedule, x, t)
        return prediction(self.clean(x, alpha, sigma), x, alpha, sigma, self.prediction_type)

    def flow(self, x: np.ndarray, start: tuple[float, float], end: tuple[float, float]) -> np.ndarray:
        """Exact solution of the probability flow ODE from levels ``start`` to levels ``end``."""
        std = [np.sqrt((alpha * self.std) ** 2 + sigma**2) for alpha, sigma in (start, end)]
        return end[0] * self.mean + std[1] / std[0] * (x - start[0] * self.mean)


class Mixture:
    """The exact denoiser of ``0.5 N(-m, s^2) + 0.5 N(m, s^2)`` in every coordinate: smooth, bounded, not linear."""

    def __init__(self, schedule: NoiseSchedule, prediction_type: str, mean: float = 0.8, std: float = 0.2) -> None:
        self.schedule, self.prediction_type, self.mean, self.std = schedule, prediction_type, mean, std

    def __call__(self, x: Any, t: Any) -> Any:
        xp = array_api_compat.array_namespace(x)
        alpha, sigma = levels_of_rows(self.schedule, x, t)
        variance = alpha**2 * self.std**2 + sigma**2
        towards = xp.tanh(alpha * self.mean * x / variance)
        x_0 = self.mean * towards + alpha * self.std**2 / variance * (x - alpha * self.mean * towards)
        return prediction(x_0, x, alpha, sigma, self.prediction_type)


class TanhNetwork:
    """``W2 tanh(W1 x + u t)`` with fixed random weights of spectral norm ``gain**0.5`` each.

    Works on arrays of any library and dtype, and on any event shape with ``size`` elements.
    """

    def __init__(self, size: int = 6, gain: float = 1.0, time_scale: float = 1e-3, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.time_scale = time_scale
        self.weights = [_with_norm(rng.normal(size=(size, size)), gain**0.5) for _ in range(2)]
        self.time = rng.normal(size=(size,))

    def __call__(self, x: Any, t: Any) -> Any:
        xp = array_api_compat.array_namespace(x)
        first, second, time = (xp.asarray(w, dtype=x.dtype) for w in (*self.weights, self.time))
        flat = xp.reshape(x, (x.shape[0], -1))
        phase = xp.reshape(xp.astype(t, x.dtype) * self.time_scale, (-1, 1)) * time
        return xp.reshape(xp.matmul(xp.tanh(xp.matmul(flat, first) + phase), second), x.shape)


class Counted:
    """A denoiser that counts, independently of the solver's own statistics."""

    def __init__(self, denoiser: Callable[[Any, Any], Any]) -> None:
        self.denoiser = denoiser
        self.rows: list[int] = []

    def __call__(self, x: Any, t: Any) -> Any:
        self.rows.append(x.shape[0])
        return self.denoiser(x, t)


def normal(shape: tuple[int, ...], xp: ModuleType | None = None, dtype: str = "float64", seed: int = 0) -> Any:
    """Standard normal numbers as an array of ``xp`` (NumPy by default), the same in every library."""
    values = np.random.default_rng(seed).normal(size=shape)
    if xp is None:
        return values.astype(dtype)
    return xp.asarray(values, dtype=getattr(xp, dtype))


def relative(got: Any, expected: Any) -> float:
    """RMS of the difference over RMS of what was expected."""
    got, expected = (to_numpy(array).astype(np.float64) for array in (got, expected))
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))


def _with_norm(matrix: np.ndarray, norm: float) -> np.ndarray:
    return matrix * norm / np.linalg.norm(matrix, 2)


class Rational:
    """``gain x / (1 + x^2) + t``, element by element in correctly rounded operations.

    The same row gives the same bits in any batch of any library: what differs must come from the solver.
    """

    def __init__(self, gain: float = 1.0, time_scale: float = 1e-3) -> None:
        self.gain, self.time_scale = gain, time_scale

    def __call__(self, x: Any, t: Any) -> Any:
        xp = array_api_compat.array_namespace(x)
        phase = xp.reshape(xp.astype(t, x.dtype) * self.time_scale, (-1,) + (1,) * (x.ndim - 1))
        return self.gain * (x / (1 + x * x)) + phase
