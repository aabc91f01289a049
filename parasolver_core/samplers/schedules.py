"""Noise schedules: how much signal and how much noise a sample holds at each time.

Every schedule describes a Gaussian path ``x_t = alpha(t) x_0 + sigma(t) eps``. A step rule needs nothing else of it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, get_args

import array_api_compat
import numpy as np
from numpy.typing import ArrayLike, NDArray

from parasolver_core.arrays import Array, is_array, to_host
from parasolver_core.validation import as_float, check_count, check_plain, own_floats

Float64 = NDArray[np.float64]
Spacing = Literal["trailing", "leading", "linspace"]
PredictionType = Literal["epsilon", "sample", "v_prediction", "flow"]

_MEANT = {
    "eps": "epsilon",
    "noise": "epsilon",
    "v": "v_prediction",
    "velocity": "flow",
    "x0": "sample",
    "x_0": "sample",
}


DATA_AT_0 = (
    "In flow matching data is at t = 0 here, noise at t = 1, and timesteps fall; for a network v with data at t = 1 "
    "take 1 - t for the timesteps and -v(x, 1 - t) for the denoiser"
)


class NoiseSchedule(ABC):
    """A Gaussian path ``x_t = alpha(t) x_0 + sigma(t) eps``; build one with the class methods.

    ============================  ==========================================  =======================
    constructor                   path                                        time given to the network
    ============================  ==========================================  =======================
    :meth:`linear`                variance preserving, discrete                integers ``train_steps-1 .. 0``
    :meth:`scaled_linear`         the same, Stable Diffusion's betas           integers
    :meth:`squared_cosine`        the same, improved DDPM's betas              integers
    :meth:`from_alphas_cumprod`   the same, any table                          integers
    :meth:`karras`                variance exploding, ``alpha = 1``            the noise level ``sigma``
    :meth:`flow_matching`         linear, ``alpha = 1 - t``, ``sigma = t``     ``t`` in (0, 1]
    ============================  ==========================================  =======================
    """

    default_prediction_type: PredictionType
    sigma_data: float
    advice: ClassVar[str] = "Sort the timesteps in decreasing order, without repeats"  # where they do not fall

    def __new__(cls, *args: Any, **options: Any) -> Self:
        if cls is NoiseSchedule:
            raise TypeError(
                "NoiseSchedule: build one with a class method, such as NoiseSchedule.linear(), .scaled_linear(), "
                ".from_alphas_cumprod(table), .karras() or .flow_matching()"
            )
        return super().__new__(cls)

    @property
    def init_noise_sigma(self) -> float:
        """What standard normal noise is multiplied with to become ``x_T``; 1 unless the path says otherwise."""
        return 1.0

    @abstractmethod
    def timesteps(self, num_inference_steps: int) -> NDArray[Any]:
        """The times of ``num_inference_steps`` network calls, from noise to data, shape (num_inference_steps,)."""

    @abstractmethod
    def levels(self, timesteps: NDArray[Any]) -> tuple[Float64, Float64]:
        """``(alpha, sigma)`` at each timestep and at the clean end, each of shape (len(timesteps) + 1,)."""

    @staticmethod
    def linear(
        beta_start: float = 1e-4, beta_end: float = 0.02, train_steps: int = 1000, **options: Any
    ) -> DiscreteSchedule:
        """Betas linear in t (Ho et al., 2020, section 4)."""
        first, last = _betas(beta_start, beta_end, train_steps)
        return DiscreteSchedule.from_betas(np.linspace(first, last, train_steps), **options)

    @staticmethod
    def scaled_linear(
        beta_start: float = 0.00085, beta_end: float = 0.012, train_steps: int = 1000, **options: Any
    ) -> DiscreteSchedule:
        """Square roots of the betas linear in t (Rombach et al., 2022: latent and Stable Diffusion)."""
        first, last = _betas(beta_start, beta_end, train_steps)
        return DiscreteSchedule.from_betas(np.linspace(first**0.5, last**0.5, train_steps) ** 2, **options)

    @staticmethod
    def squared_cosine(train_steps: int = 1000, max_beta: float = 0.999, **options: Any) -> DiscreteSchedule:
        """``alphas_cumprod`` follows a squared cosine (Nichol and Dhariwal, 2021, equation 17)."""
        check_count("train_steps", train_steps)
        max_beta = as_float("max_beta", max_beta)
        t = np.arange(train_steps + 1) / train_steps
        bar = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        return DiscreteSchedule.from_betas(np.minimum(1 - bar[1:] / bar[:-1], max_beta), **options)

    @staticmethod
    def from_alphas_cumprod(alphas_cumprod: ArrayLike, **options: Any) -> DiscreteSchedule:
        """Any variance preserving table, index 0 the cleanest, copied; ``options`` as in :class:`DiscreteSchedule`."""
        return DiscreteSchedule(alphas_cumprod, **_of_a_schedule(options))  # type: ignore[arg-type]

    @staticmethod
    def karras(sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, **options: Any) -> KarrasSchedule:
        """Continuous noise levels of EDM (Karras et al., 2022, equation 5)."""
        return KarrasSchedule(sigma_min, sigma_max, rho, **_of_a_schedule(options))

    @staticmethod
    def flow_matching(shift: float = 1.0, **options: Any) -> FlowSchedule:
        """The linear path of flow matching and rectified flow (Lipman et al., 2023; Liu et al., 2023)."""
        return FlowSchedule(shift, **_of_a_schedule(options))


@dataclass(frozen=True, eq=False)
class DiscreteSchedule(NoiseSchedule):
    """A variance preserving table: ``alpha = sqrt(alphas_cumprod)``, ``sigma = sqrt(1 - alphas_cumprod)``.

    Args:
        alphas_cumprod: shape (train_steps,), strictly decreasing, within (0, 1); the last entry may be 0. Copied.
        final_alpha_cumprod: the value after the last step. 1 (a clean sample) by default; ``alphas_cumprod[0]`` is
            what diffusers takes with ``set_alpha_to_one=False``.
        sigma_data: standard deviation of the data, used only as a first guess of the network's slope.
    """

    alphas_cumprod: Float64
    final_alpha_cumprod: float = 1.0
    sigma_data: float = 0.5
    default_prediction_type: PredictionType = field(default="epsilon", repr=False)

    def __post_init__(self) -> None:
        check_plain("alphas_cumprod", self.alphas_cumprod, native=False)
        given = to_host(self.alphas_cumprod) if is_array(self.alphas_cumprod) else self.alphas_cumprod
        table = np.array(given, dtype=np.float64)  # the user's own may change later
        table.flags.writeable = False
        object.__setattr__(self, "alphas_cumprod", table)
        if table.ndim != 1 or table.size == 0:
            raise ValueError(f"alphas_cumprod: expected a non-empty 1-D table, got shape {table.shape}")
        valid = np.all(np.isfinite(table)) and np.all(np.diff(table) < 0) and table[-1] >= 0 and table[0] < 1
        if not valid:
            raise ValueError(
                "alphas_cumprod: expected finite values in [0, 1), strictly decreasing from index 0 (clean) to the "
                f"last (noise), got a table from {table[0]:.6g} to {table[-1]:.6g}"
            )
        own_floats(self, "final_alpha_cumprod", "sigma_data")
        if not table[0] <= self.final_alpha_cumprod <= 1:
            raise ValueError(
                f"final_alpha_cumprod: expected a value in [alphas_cumprod[0], 1], got {self.final_alpha_cumprod}"
            )
        _check_positive("sigma_data", self.sigma_data)
        check_prediction_type("default_prediction_type", self.default_prediction_type)

    def __repr__(self) -> str:
        table = f"{self.train_steps} alphas_cumprod from {self.alphas_cumprod[0]:.6g} to {self.alphas_cumprod[-1]:.6g}"
        return f"DiscreteSchedule({table}, final {self.final_alpha_cumprod:.6g}, sigma_data={self.sigma_data:g})"

    @classmethod
    def from_betas(cls, betas: NDArray[Any], **options: Any) -> DiscreteSchedule:
        """``alphas_cumprod = cumprod(1 - betas)``."""
        return cls(np.cumprod(1.0 - np.asarray(betas), dtype=np.float64), **_of_a_schedule(options))

    @property
    def train_steps(self) -> int:
        """Number of entries of the table."""
        return len(self.alphas_cumprod)

    def timesteps(
        self, num_inference_steps: int, spacing: Spacing = "trailing", steps_offset: int = 0
    ) -> NDArray[np.int64]:
        """Decreasing integer timesteps (Lin et al., 2024, table 2, as diffusers' DDIM spaces them).

        Args:
            num_inference_steps: between 1 and ``train_steps``.
            spacing: "trailing" ends on the noisiest step, "leading" starts at the cleanest, "linspace" has both ends.
            steps_offset: added to the timesteps of "leading" (Stable Diffusion uses 1).
        """
        n, total = _check_steps(num_inference_steps), self.train_steps
        if n > total:
            raise ValueError(
                f"num_inference_steps: got {n}, but the schedule has only {total} timesteps; take at most {total}"
            )
        if spacing == "trailing":
            grid = np.round(np.arange(total, 0, -total / n))[:n] - 1
        elif spacing == "leading":
            grid = (np.arange(n) * (total // n))[::-1] + steps_offset
        elif spacing == "linspace":
            grid = np.round(np.linspace(0, total - 1, n))[::-1]
        else:
            raise ValueError(f'spacing: expected "trailing", "leading" or "linspace", got {spacing!r}')
        return grid.astype(np.int64)

    def levels(self, timesteps: NDArray[Any]) -> tuple[Float64, Float64]:
        index = np.asarray(timesteps)
        if not np.array_equal(index, np.round(index)):
            raise ValueError(
                f"timesteps: this schedule is a table, so timesteps are integers; got {_first(index % 1 != 0, index)}. "
                "Use schedule.timesteps(n), or a continuous schedule (karras, flow_matching)"
            )
        outside = (index < 0) | (index >= self.train_steps)
        if np.any(outside):
            raise ValueError(f"timesteps: expected values in 0..{self.train_steps - 1}, got {_first(outside, index)}")
        bar = np.append(self.alphas_cumprod[index.astype(np.int64)], self.final_alpha_cumprod)
        return np.sqrt(bar), np.sqrt(1 - bar)


class ContinuousSchedule(NoiseSchedule):
    """A path given by formulas, at any time."""

    @abstractmethod
    def path(self, t: Array) -> tuple[Array, Array]:
        """``(alpha, sigma)`` at times (rows,) of any array library, wherever they lie; not checked."""


@dataclass(frozen=True)
class KarrasSchedule(ContinuousSchedule):
    """Variance exploding path, ``alpha = 1``; the network is given ``sigma`` (Karras et al., 2022, section 3).

    ``x_T`` is noise of standard deviation ``sigma_max``, not 1: ``noise * schedule.init_noise_sigma``.

    Args:
        sigma_min, sigma_max: ends of the default grid, ``0 < sigma_min < sigma_max``.
        rho: curvature of the grid, equation 5; 7 in the paper.
        sigma_data: standard deviation of the data.
        final_sigma: the noise level after the last step, in [0, sigma_min]; 0 is a clean sample.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5
    default_prediction_type: PredictionType = field(default="sample", repr=False)
    final_sigma: float = 0.0

    def __post_init__(self) -> None:
        own_floats(self, "sigma_min", "sigma_max", "rho", "sigma_data", "final_sigma")
        for name in ("sigma_min", "sigma_max", "rho", "sigma_data"):
            _check_positive(name, getattr(self, name))
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min: expected less than sigma_max={self.sigma_max}, got {self.sigma_min}")
        if not 0 <= self.final_sigma <= self.sigma_min:
            raise ValueError(
                f"final_sigma: expected a value in [0, sigma_min={self.sigma_min}], got {self.final_sigma}"
            )
        check_prediction_type("default_prediction_type", self.default_prediction_type)

    @property
    def init_noise_sigma(self) -> float:
        return self.sigma_max

    def timesteps(self, num_inference_steps: int) -> Float64:
        """``sigma_i = (sigma_max^(1/rho) + i/(n-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho``."""
        ends = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return np.linspace(*ends, _check_steps(num_inference_steps)) ** self.rho

    def levels(self, timesteps: NDArray[Any]) -> tuple[Float64, Float64]:
        sigma = np.append(np.asarray(timesteps, dtype=np.float64), self.final_sigma)
        if np.any(sigma[:-1] <= 0):
            raise ValueError(
                f"timesteps: noise levels must be > 0 (the step to {self.final_sigma:g} is implied by the last), "
                f"got {_first(sigma[:-1] <= 0, sigma)}"
            )
        return self.path(sigma)

    def path(self, t: Array) -> tuple[Array, Array]:
        return array_api_compat.array_namespace(t).ones_like(t), t


@dataclass(frozen=True)
class FlowSchedule(ContinuousSchedule):
    """Linear path ``x_t = (1 - t) x_0 + t eps``, t from 1 (noise) to 0 (data); the network is given ``t``.

    Args:
        shift: moves the grid towards noise, ``t <- shift t / (1 + (shift - 1) t)`` (Esser et al., 2024, section 5.3.2).
        sigma_data: standard deviation of the data.
        final_sigma: the t, shifted, at which the last step ends, in [0, 1); 0 is a clean sample.
    """

    shift: float = 1.0
    sigma_data: float = 1.0
    default_prediction_type: PredictionType = field(default="flow", repr=False)
    final_sigma: float = 0.0
    advice: ClassVar[str] = DATA_AT_0

    def __post_init__(self) -> None:
        own_floats(self, "shift", "sigma_data", "final_sigma")
        _check_positive("shift", self.shift)
        _check_positive("sigma_data", self.sigma_data)
        if not 0 <= self.final_sigma < 1:
            raise ValueError(f"final_sigma: expected a value in [0, 1), got {self.final_sigma}")
        check_prediction_type("default_prediction_type", self.default_prediction_type)

    def timesteps(self, num_inference_steps: int) -> Float64:
        """A uniform grid on (end, 1], shifted; the step from the last of them to ``final_sigma`` is implied."""
        n = _check_steps(num_inference_steps)
        end = self.final_sigma / (self.shift - (self.shift - 1) * self.final_sigma)  # before it is shifted
        t = end + (1 - end) * (np.arange(n, 0, -1) / n)
        return self.shift * t / (1 + (self.shift - 1) * t)

    def levels(self, timesteps: NDArray[Any]) -> tuple[Float64, Float64]:
        t = np.append(np.asarray(timesteps, dtype=np.float64), self.final_sigma)
        outside = (t[:-1] <= 0) | (t[:-1] > 1)
        if np.any(outside):
            raise ValueError(
                f"timesteps: expected values in (0, 1] (the step to {self.final_sigma:g} is implied), got "
                f"{_first(outside, t[:-1])}; "
                f"for a network trained on 0..1000, divide the timesteps and multiply t in the denoiser. {DATA_AT_0}"
            )
        return self.path(t)

    def path(self, t: Array) -> tuple[Array, Array]:
        return 1 - t, t


def check_prediction_type(name: str, value: Any) -> None:
    """One of the kinds of prediction."""
    known = get_args(PredictionType)
    if not isinstance(value, str) or value not in known:
        meant = f"; did you mean {_MEANT[value]!r}?" if isinstance(value, str) and value in _MEANT else ""
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}{meant}")


def _of_a_schedule(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a schedule; what a network predicts is told to the step rule."""
    if "prediction_type" in options:
        raise TypeError(
            "prediction_type: an argument of the step rule, as in DDIM(schedule, "
            f"prediction_type={options['prediction_type']!r}), not of the schedule"
        )
    return options


def _betas(beta_start: Any, beta_end: Any, train_steps: Any) -> tuple[float, float]:
    """Both ends as Python's numbers: a table in half precision is none."""
    for name, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
        if not (isinstance(beta, (int, float, np.number)) and 0 < beta < 1):
            count = isinstance(beta, (int, np.integer)) and beta > 1
            meant = f"; did you mean train_steps={beta}?" if count else ""
            raise ValueError(f"{name}: expected a number in (0, 1), got {beta!r}{meant}")
    check_count("train_steps", train_steps)
    return float(beta_start), float(beta_end)


def _first(wrong: NDArray[np.bool_], values: NDArray[Any]) -> str:
    at = int(np.argmax(wrong))
    return f"{values[at]} at index {at}"


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")


def _check_steps(n: int) -> int:
    check_count("num_inference_steps", n)
    return int(n)
