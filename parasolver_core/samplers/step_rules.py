"""Step rules: samplers as tables of coefficients.

A step rule knows a schedule and turns a grid of timesteps into a :class:`~parasolver_core.Recurrence`. It never sees an
array of the network, so the same rule serves every array library, sequentially and in parallel.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from parasolver_core.samplers.recurrence import Recurrence
from parasolver_core.samplers.sample_form import checked_form, from_sample_form
from parasolver_core.samplers.schedules import NoiseSchedule, PredictionType, check_prediction_type
from parasolver_core.validation import check_monotone, check_timesteps, own_floats

Float64 = NDArray[np.float64]


class StepRule(ABC):
    """A sampler. Subclass it and return a table to add your own."""

    def check_grid(self, timesteps: NDArray[Any]) -> None:
        """Refuse timesteps, (N,) and finite, on which the sampler is not defined: unless overridden, unsorted ones.

        A rule whose steps need several network calls may visit a timestep twice; it knows its own grids.
        """
        check_monotone(timesteps)

    @property
    def predicts(self) -> str | None:
        """What the network has to predict, one of the names of ``prediction_type``; None if the rule does not say."""
        told = getattr(self, "prediction_type", None)
        return told if isinstance(told, str) else None

    def start_scale(self, timesteps: NDArray[Any]) -> float:
        """What standard normal noise is multiplied with to begin at the first timestep; NaN unless overridden."""
        return math.nan

    @abstractmethod
    def recurrence(self, timesteps: NDArray[Any]) -> Recurrence:
        """The sampler's coefficients on ``timesteps``, (N,), finite and accepted by :meth:`check_grid`."""


def table(step_rule: StepRule, timesteps: ArrayLike) -> Recurrence:
    """The sampler's coefficients on the timesteps, once both are known to be what they should be."""
    if isinstance(step_rule, type) and issubclass(step_rule, StepRule):
        name = step_rule.__name__
        raise TypeError(f"step_rule: got the class {name}; make an object of it, such as {name}(schedule)")
    if not isinstance(step_rule, StepRule):
        raise TypeError(f"step_rule: expected a StepRule such as DDIM(schedule), got {type(step_rule).__name__}")
    grid = check_timesteps(timesteps)
    step_rule.check_grid(grid)
    recurrence = step_rule.recurrence(grid)
    if not isinstance(recurrence, Recurrence):
        raise TypeError(
            f"step_rule: its recurrence(timesteps) must return a Recurrence, got {type(recurrence).__name__}"
        )
    if len(recurrence) != len(grid):
        raise ValueError(
            f"step_rule: its table has {len(recurrence)} steps for {len(grid)} timesteps; one row a timestep"
        )
    return recurrence


@dataclass(frozen=True)
class DiffusionRule(StepRule):
    """What the diffusion samplers share: a schedule, what the network predicts, and a table for the clean sample.

    Args:
        schedule: the Gaussian path.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow"; by default what the schedule's networks
            usually predict.
    """

    schedule: NoiseSchedule
    prediction_type: PredictionType | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, NoiseSchedule):
            raise TypeError(
                f"schedule: expected a NoiseSchedule such as NoiseSchedule.linear(), got {type(self.schedule).__name__}"
            )
        if self.prediction_type is not None:
            check_prediction_type("prediction_type", self.prediction_type)

    @property
    def predicts(self) -> str:
        return self.prediction_type or self.schedule.default_prediction_type

    def start_scale(self, timesteps: NDArray[Any]) -> float:
        if self.schedule.init_noise_sigma == 1:
            return 1.0
        alpha, sigma = self.schedule.levels(timesteps)
        return float(np.hypot(alpha[0] * self.schedule.sigma_data, sigma[0]))

    def recurrence(self, timesteps: NDArray[Any]) -> Recurrence:
        alpha, sigma = self.schedule.levels(timesteps)
        rise = sigma[1:] * alpha[:-1] - sigma[:-1] * alpha[1:]
        still = np.arange(len(rise)) == len(rise) - 1  # the last node may be the clean end itself: a step of length 0
        rising = np.flatnonzero((rise > 0) | ((rise == 0) & ~still))
        if rising.size:
            i = int(rising[0])
            after = timesteps[i + 1] if i + 1 < len(timesteps) else "the clean end"
            raise ValueError(
                "timesteps: a sampler goes from noise to data, so the noise level must fall at every step; got "
                f"{timesteps[i]} at index {i}, then {after}. {self.schedule.advice}"
            )
        a, b, c = checked_form(self.sample_form(alpha, sigma), len(timesteps))
        return from_sample_form(
            timesteps,
            a,
            b,
            c,
            (alpha, sigma),
            self.predicts,
            self.schedule.sigma_data,
        )

    @abstractmethod
    def sample_form(self, alpha: Float64, sigma: Float64) -> tuple[Float64, Float64, Float64]:
        """``(a, b, c)`` with the predicted clean sample as the network's output; a and b of equal width."""


@dataclass(frozen=True)
class DDIM(DiffusionRule):
    r"""Denoising diffusion implicit models; ``eta=1`` is ancestral sampling.

    .. math::
        x_{i+1} = \alpha_{i+1} \hat x_0 + \sqrt{\sigma_{i+1}^2 - s_i^2}\, \hat\epsilon + s_i z_i , \qquad
        s_i = \eta \frac{\sigma_{i+1}}{\sigma_i} \sqrt{\sigma_i^2 - \tfrac{\alpha_i^2}{\alpha_{i+1}^2} \sigma_{i+1}^2}

    Written for any Gaussian path; on a variance preserving one it is equation 12 with equation 16 of the paper.

    Args:
        schedule: the Gaussian path.
        prediction_type: what the network predicts.
        eta: 0 (deterministic) to 1 (as noisy as DDPM).

    Reference: Song, Meng, Ermon, "Denoising Diffusion Implicit Models", ICLR 2021, arXiv 2010.02502.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.eta, str):
            raise TypeError(f"eta: expected a number in [0, 1], got {self.eta!r}; name the other arguments")
        own_floats(self, "eta")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta: expected a value in [0, 1], got {self.eta}")

    def sample_form(self, alpha: Float64, sigma: Float64) -> tuple[Float64, Float64, Float64]:
        noise = self.eta * _ancestral_noise(alpha, sigma)
        a = np.sqrt(sigma[1:] ** 2 - noise**2) / sigma[:-1]
        return a[:, None], (alpha[1:] - alpha[:-1] * a)[:, None], noise


@dataclass(frozen=True)
class DDPM(DiffusionRule):
    """Ancestral sampling of denoising diffusion models, also on a sub-grid of the training steps.

    The mean is the posterior mean, equation 7 of the paper, which is :class:`DDIM` with ``eta=1``. The last step,
    to the clean sample, adds no noise.

    Args:
        schedule: the Gaussian path.
        prediction_type: what the network predicts.
        variance_type: "fixed_small" (the posterior variance) or "fixed_large" (beta), section 3.2.

    Reference: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, arXiv 2006.11239.
    """

    variance_type: Literal["fixed_small", "fixed_large"] = "fixed_small"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variance_type not in ("fixed_small", "fixed_large"):
            raise ValueError(f'variance_type: expected "fixed_small" or "fixed_large", got {self.variance_type!r}')

    def sample_form(self, alpha: Float64, sigma: Float64) -> tuple[Float64, Float64, Float64]:
        a, b, c = DDIM(self.schedule, eta=1.0).sample_form(alpha, sigma)
        if self.variance_type == "fixed_large":
            c = np.sqrt(sigma[:-1] ** 2 - (alpha[:-1] / alpha[1:] * sigma[1:]) ** 2)
            c[-1] = 0.0
        return a, b, c


@dataclass(frozen=True)
class DPMSolver(DiffusionRule):
    r"""DPM-Solver++ multistep: an exponential integrator for the predicted sample over the half log-SNR.

    With :math:`\lambda = \log(\alpha/\sigma)`, :math:`h = \lambda_{i+1} - \lambda_i` and finite differences
    :math:`D_1, D_2` of the predicted sample,

    .. math::
        x_{i+1} = \tfrac{\sigma_{i+1}}{\sigma_i} x_i - \alpha_{i+1} (e^{-h} - 1) \hat x_0
                  + \alpha_{i+1} \bigl(\tfrac{e^{-h} - 1}{h} + 1\bigr) D_1
                  - \alpha_{i+1} \bigl(\tfrac{e^{-h} - 1 + h}{h^2} - \tfrac12\bigr) D_2 .

    Args:
        schedule: the Gaussian path.
        prediction_type: what the network predicts.
        order: how many predictions a step reads: 1 (which is DDIM), 2 ("2M") or 3 ("3M"). The first steps read fewer
            for want of history. As published, and as in diffusers, "3M" weighs the second difference by half of what
            third order would need, and converges with order 2.
        solver_type: how order 2 weighs :math:`D_1`: "midpoint" (equation 9 of the paper) or "heun" (the term above).
        stochastic: the SDE variant, "SDE-DPM-Solver++(2M)".
        lower_order_final: lower the order of the last steps when there are fewer than 15; steadier with few steps.
            The step to zero noise is always of first order.

    Reference: Lu et al., "DPM-Solver++", 2022, arXiv 2211.01095, algorithm 2 and appendix.
    """

    order: int = 2
    solver_type: Literal["midpoint", "heun"] = "midpoint"
    stochastic: bool = False
    lower_order_final: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (1, 2, 3) or not isinstance(self.order, int):
            raise ValueError(f"order: expected 1, 2 or 3, got {self.order!r}")
        if self.solver_type not in ("midpoint", "heun"):
            raise ValueError(f'solver_type: expected "midpoint" or "heun", got {self.solver_type!r}')

    def sample_form(self, alpha: Float64, sigma: Float64) -> tuple[Float64, Float64, Float64]:
        n = len(alpha) - 1
        with np.errstate(divide="ignore"):
            lam = np.log(alpha) - np.log(sigma)
        a, b, c = np.zeros((n, self.order)), np.zeros((n, self.order)), np.zeros(n)
        for i in range(n):
            decay, c[i] = self._decay_and_noise(lam[i + 1] - lam[i], sigma[i + 1])
            a[i, 0] = sigma[i + 1] / sigma[i] * (np.exp(lam[i] - lam[i + 1]) if self.stochastic else 1.0)
            weights = _difference_weights(lam, i, self._order_of_step(i, n, sigma), decay, self.solver_type)
            b[i, : len(weights)] = alpha[i + 1] * weights
        return a, b, c

    def _decay_and_noise(self, h: float, sigma_next: float) -> tuple[float, float]:
        """The exponent of the step (2 h for the SDE, whose drift acts twice) and the scale of its noise."""
        if not self.stochastic:
            return h, 0.0
        return 2 * h, sigma_next * np.sqrt(-np.expm1(-2 * h))

    def _order_of_step(self, i: int, n: int, sigma: Float64) -> int:
        remaining = n - i
        order = min(self.order, i + 1)
        if self.lower_order_final and n < 15:
            order = min(order, remaining)
        return 1 if sigma[i + 1] in (0.0, sigma[i]) else order


@dataclass(frozen=True)
class Euler(DiffusionRule):
    """Euler's method on the probability flow ODE, for flow matching and for noise levels (EDM, k-diffusion).

    In the coordinates ``x / alpha`` over ``sigma / alpha`` Euler's method is DDIM (Song et al., 2021, equation 14), on
    the linear path it is ``x + (t' - t) v``, and with ``alpha = 1`` it is ``x + (sigma' - sigma)(x - x_0) / sigma``
    (Karras et al., 2022, algorithm 1 without its second stage). One table serves them all.
    """

    def sample_form(self, alpha: Float64, sigma: Float64) -> tuple[Float64, Float64, Float64]:
        return DDIM(self.schedule).sample_form(alpha, sigma)


def _ancestral_noise(alpha: Float64, sigma: Float64) -> Float64:
    """Standard deviation of the posterior of ``x_{i+1}`` given ``x_i`` and ``x_0``."""
    return sigma[1:] / sigma[:-1] * np.sqrt(sigma[:-1] ** 2 - (alpha[:-1] / alpha[1:] * sigma[1:]) ** 2)


def _difference_weights(lam: Float64, i: int, order: int, decay: float, solver_type: str) -> Float64:
    """Weights of ``x0_i, x0_{i-1}, x0_{i-2}`` over alpha: the finite differences of the class docstring, collected."""
    phi = -np.expm1(-decay)  # 1 - e^{-h}
    if order == 1:
        return np.array([phi])
    h = lam[i + 1] - lam[i]
    r0 = (lam[i] - lam[i - 1]) / h
    first = 1 - phi / decay
    if order == 2:
        weight = (phi / 2 if solver_type == "midpoint" else first) / r0
        return np.array([phi + weight, -weight])
    r1 = (lam[i - 1] - lam[i - 2]) / h
    second = (phi - decay) / decay**2 + 0.5
    d0, d1 = np.array([1.0, -1.0, 0.0]) / r0, np.array([0.0, 1.0, -1.0]) / r1
    bend = (d0 - d1) / (r0 + r1)  # D2 of the docstring; D1 is d0 + r0 D2
    return np.array([phi, 0.0, 0.0]) + first * (d0 + r0 * bend) + second * bend
