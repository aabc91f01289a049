"""Samplers of diffusion and flow models, written for the predicted clean sample, as tables of a recurrence."""

from __future__ import annotations

from typing import Any

import array_api_compat
import numpy as np
from numpy.typing import NDArray

from parasolver_core.arrays import Array
from parasolver_core.samplers.recurrence import Float64, Recurrence
from parasolver_core.samplers.tables import identity_slope, trim


def from_sample_form(
    timesteps: NDArray[Any],
    a: Float64,
    b: Float64,
    c: Float64,
    levels: tuple[Float64, Float64],
    prediction_type: str,
    sigma_data: float,
) -> Recurrence:
    """Turn a table for the predicted clean sample into one for what the network predicts.

    With ``x_0 = p x + q m`` (:func:`predicted_sample_coefficients`) the recurrence stays linear: ``b p`` joins ``a``
    and ``b`` is scaled by ``q``.

    Args:
        timesteps, c: as in :class:`Recurrence`.
        a, b: (N, K), the table for the predicted sample; both of the same width.
        levels: alpha and sigma at the nodes and at the end, each (N + 1,).
        prediction_type: what the network predicts.
        sigma_data: standard deviation of the data; the slope's first guess is :func:`posterior_slope`.
    """
    n = len(timesteps)
    alpha, sigma = levels[0][:n], levels[1][:n]
    p, q = predicted_sample_coefficients(prediction_type, alpha, sigma)
    gaussian = posterior_slope(alpha, sigma, sigma_data)
    identity = identity_slope(a, b, np.zeros(n), np.ones(n))
    identity = np.where(np.isfinite(identity), identity, 0.0)
    node = np.maximum(np.arange(n)[:, None] - np.arange(b.shape[1]), 0)  # b is 0 where this would be below 0
    with np.errstate(invalid="ignore"):  # what is not finite is refused by Recurrence, which names the step
        return Recurrence(
            timesteps=timesteps,
            a=trim(a + b * p[node]),
            b=trim(b * q[node]),
            c=c,
            held=np.stack([p, q], axis=1),
            slope=(gaussian - p) / q,
            identity_slope=(identity - p) / q,
            signal=signal_share(alpha, sigma),
            noise_share=added_noise_share(alpha, sigma, c),
        )


def checked_form(told: Any, n: int) -> tuple[Float64, Float64, Float64]:
    """``(a, b, c)`` as a step rule's ``sample_form`` gives them for N timesteps; refused if they are something else."""
    if not isinstance(told, (tuple, list)) or len(told) != 3:
        raise TypeError(f"step_rule: its sample_form must return three tables (a, b, c), got {type(told).__name__}")
    a, b, c = (np.asarray(table, dtype=np.float64) for table in told)
    if a.ndim != 2 or a.shape != b.shape or (len(a), *c.shape) != (n, n):
        raise ValueError(
            f"step_rule: its sample_form must return a and b of one shape ({n}, K), a column for each node that a step "
            f"reads, and c of shape ({n},), got {a.shape}, {b.shape} and {c.shape}"
        )
    return a, b, c


def signal_share(alpha: Float64, sigma: Float64) -> Float64:
    """``alpha / sqrt(alpha^2 + sigma^2)``, above 0."""
    return np.maximum(alpha / np.sqrt(alpha**2 + sigma**2), 1e-12)


def added_noise_share(alpha: Float64, sigma: Float64, c: Float64) -> float:
    """The variance that the steps add, in units of what a full reverse diffusion adds; ``eta^2`` for DDIM.

    Args:
        alpha, sigma: (n,), levels at the first n nodes.
        c: (n,) or longer, scales of the steps' noise; that of the last node is not used.
    """
    before, after = (alpha[:-1], sigma[:-1]), (alpha[1:], sigma[1:])
    with np.errstate(divide="ignore", invalid="ignore"):
        full = after[1] ** 2 - (before[0] * after[1] ** 2 / (after[0] * before[1])) ** 2
        size = after[0] ** 2 + after[1] ** 2
        added, whole = c[: len(full)] ** 2 / size, np.maximum(full, 0.0) / size
    known = np.isfinite(added) & np.isfinite(whole)
    total = float(np.sum(whole[known]))
    return min(float(np.sum(added[known])) / total, 1.0) if total > 0 else 0.0


def posterior_slope(alpha: Float64, sigma: Float64, sigma_data: float) -> Float64:
    """Slope of the predicted clean sample, ``alpha s^2 / (alpha^2 s^2 + sigma^2)``, if the data were Gaussian."""
    return alpha * sigma_data**2 / (alpha**2 * sigma_data**2 + sigma**2)


def predicted_sample_coefficients(prediction_type: str, alpha: Array, sigma: Array) -> tuple[Array, Array]:
    """``(p, q)`` of ``x_0 = p x + q m`` on the path ``x = alpha x_0 + sigma eps``, in the arrays' own library.

    ``epsilon`` predicts eps; ``sample`` predicts x_0; ``v_prediction`` predicts ``(alpha eps - sigma x_0) / n`` with
    ``n = sqrt(alpha^2 + sigma^2)`` (Salimans and Ho, 2022, on a path of unit variance); ``flow`` predicts
    ``eps - x_0`` (Lipman et al., 2023).
    """
    xp = array_api_compat.array_namespace(alpha)
    n = xp.sqrt(alpha**2 + sigma**2)
    with np.errstate(divide="ignore"):
        table = {
            "sample": (xp.zeros_like(alpha), xp.ones_like(alpha)),
            "epsilon": (1 / alpha, -sigma / alpha),
            "v_prediction": (alpha / n**2, -sigma / n),
            "flow": (1 / (alpha + sigma), -sigma / (alpha + sigma)),
        }
    if prediction_type not in table:
        raise ValueError(f"prediction_type: expected one of {', '.join(table)}, got {prediction_type!r}")
    return table[prediction_type]
