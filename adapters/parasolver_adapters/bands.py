"""A sampler's coefficients, read from runs of its own loop on random numbers.

Each step ``x_{i+1}`` is fitted by the fewest past states and outputs that reproduce it. Probing along a trajectory,
where each step begins with what the last one gave, keeps the band short also for samplers that correct the last state
in hiding (UniPC, SASolver). No formula of any sampler is written down here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from parasolver_core.samplers.recurrence import Recurrence
from parasolver_core.samplers.sample_form import added_noise_share, posterior_slope, signal_share
from parasolver_core.samplers.tables import trim

Float64Array = NDArray[np.float64]
Band = tuple[Float64Array, Float64Array, Float64Array]

PROBES = (1, 1, 8, 8)  # samplers work entry by entry, so this is 64 independent runs in one
EXACT = 1e-11  # largest residual of a fit, relative to the terms that make it up
MAX_STATES, MAX_OUTPUTS = 4, 16  # the longest memory looked for; PNDM with its Runge-Kutta start needs (4, 13)


class NotLinearError(ValueError):
    """A step that is no linear combination of what came before it.

    Args:
        step: which.
        reason: what it was found to be, to follow "step i ...".
    """

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"step {step} {reason}")
        self.step, self.reason = step, reason


@dataclass(frozen=True)
class Path:
    """What is known of the network at each node; NaN where nothing is.

    Args:
        alpha, sigma: (N,), a sample at node i is ``alpha x_0 + sigma eps``.
        p, q: (N,), the predicted clean sample is ``p x + q m``.
    """

    alpha: Float64Array
    sigma: Float64Array
    p: Float64Array
    q: Float64Array


@dataclass(frozen=True)
class Trace:
    """A run on random numbers.

    Args:
        x: (N + 1, probes), states.
        m: (N, probes), network outputs.
        draws: N tables, (number of draws, probes), the normal draws of each step.
    """

    x: Float64Array
    m: Float64Array
    draws: list[Float64Array]


def fit_band(traced: Trace) -> Band:
    """``(a, b, c)`` of equation (1): (N, P), (N, Q) and (N,), with the fewest past states and outputs.

    Raises:
        NotLinearError: a step is no linear combination of them.
    """
    x, m, n = traced.x, traced.m, len(traced.m)
    a, b, c = np.zeros((n, MAX_STATES)), np.zeros((n, MAX_OUTPUTS)), np.zeros(n)
    for i in range(n):
        for states, outputs in _widths(i):
            past = [x[i - k] for k in range(states)] + [m[i - k] for k in range(outputs)]
            weights = fit(np.vstack([*past, traced.draws[i]]), x[i + 1])
            if weights is not None:
                a[i, :states], b[i, :outputs] = weights[:states], weights[states : states + outputs]
                c[i] = np.linalg.norm(weights[states + outputs :])
                break
        else:
            raise NotLinearError(
                i,
                f"is not a linear combination of the last {MAX_STATES} states and {MAX_OUTPUTS} network outputs",
            )
    return trim(a), trim(b), c


def correlated_scale(x: Float64Array, a: Float64Array) -> Float64Array:
    """``c``, (N,), where steps share draws: from the states (N + 1, probes) of a run whose network gives zeros."""
    c = np.array([np.sqrt(np.mean(term**2)) for term in noise_terms(x, a)])
    return np.where(c > EXACT * np.abs(x).max(), c, 0.0)


def noise_terms(x: Sequence[Any] | Float64Array, a: Float64Array) -> Iterator[Any]:
    """``x_{i+1} - sum_k a[i, k] x_{i-k}``, for the states of a run whose network gives zeros."""
    for i in range(len(a)):
        term = x[i + 1]
        for k in range(min(a.shape[1], i + 1)):
            term = term - float(a[i, k]) * x[i - k]
        yield term


def tabulated(
    timesteps: NDArray[Any],
    band: Band,
    path: Path,
    sigma_data: float,
    input_scale: Float64Array | None = None,
    stages: int = 1,
) -> Recurrence:
    """The recurrence of a fitted band, with what is known of the path.

    Args:
        timesteps: (N,).
        band: ``(a, b, c)``.
        path: of the network's predictions.
        sigma_data: standard deviation of the data, for a first guess of the network's slope.
        input_scale, stages: as in :class:`~parasolver_core.samplers.recurrence.Recurrence`.
    """
    a, b, c = band
    known = np.isfinite(path.p) & np.isfinite(path.q) & (path.q != 0)
    p, q = np.where(known, path.p, 0.0), np.where(known, path.q, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = (posterior_slope(path.alpha, path.sigma, sigma_data) - p) / q
        signal = signal_share(path.alpha, path.sigma)
    slope = np.where(known & np.isfinite(slope), slope, 0.0)
    return Recurrence(
        timesteps=timesteps,
        a=a,
        b=b,
        c=c,
        held=np.stack([p, q], axis=1),
        slope=slope,
        signal=np.where(np.isfinite(signal), signal, 1.0),
        noise_share=added_noise_share(path.alpha, path.sigma, c),
        input_scale=input_scale,
        stages=stages,
    )


def replay(
    recurrence: Recurrence,
    steps: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    correct: Callable[[int, Any, Any], Any] = lambda i, x, m: m,
    tolerance: float = 1e-8,
) -> None:
    """Follow a run on a nonlinear network, without noise, with the table; they must agree.

    Args:
        recurrence: the table.
        steps: ``(x_i, m_i, x_{i+1})`` of the run.
        correct: ``correct(i, x, m)`` gives the output that the table is to be given in place of ``m``.
        tolerance: largest difference accepted, relative to the states.

    Raises:
        NotLinearError: they do not.
    """
    xs, ms = [], []
    for i, (x, m, after) in enumerate(steps):
        xs.insert(0, x)
        ms.insert(0, correct(i, x, m))
        error = float((recurrence.advance(i, xs, ms) - after).abs().max())
        scale = float(max(after.abs().max(), x.abs().max()))
        if not error <= tolerance * scale:
            raise NotLinearError(i, f"is off its own fit by {error / scale:.2g} on another network")


def fit(columns: Float64Array, target: Float64Array) -> Float64Array | None:
    """Coefficients (k,) with ``coefficients @ columns = target`` to rounding, or None; (k, probes) and (probes,)."""
    sizes = np.linalg.norm(columns, axis=1)
    sizes = np.where(sizes > 0, sizes, 1.0)
    unit = columns / sizes[:, None]
    terms = np.linalg.lstsq(unit.T, target, rcond=None)[0]
    largest = max(float(np.linalg.norm(target)), float(np.max(np.abs(terms))))
    if not np.linalg.norm(target - terms @ unit) <= EXACT * largest:
        return None
    return np.where(np.abs(terms) > 1e-14 * largest, terms / sizes, 0.0)


def as_rows(tensors: Sequence[torch.Tensor]) -> Float64Array:
    """The tensors as rows of a table, (len(tensors), probes)."""
    return np.array([tensor.numpy().reshape(-1) for tensor in tensors]).reshape(-1, np.prod(PROBES))


def drawn_rows(step: int, drawn: Sequence[torch.Tensor]) -> Float64Array:
    """The normal draws of a step as rows of a table.

    Raises:
        NotLinearError: they are not one for each value, so values share noise: a run of noise alone tells how.
    """
    if any(one.numel() != np.prod(PROBES) for one in drawn):
        raise NotLinearError(step, "draws noise that is not one number for each value of the state")
    return as_rows(drawn)


def _widths(i: int) -> Iterator[tuple[int, int]]:
    """``(states, outputs)`` to try at step i, the shortest memory first."""
    for memory in range(1, min(MAX_OUTPUTS, i + 1) + 1):
        for states in range(1, min(MAX_STATES, memory) + 1):
            yield states, memory
        if memory <= MAX_STATES:
            yield from ((memory, outputs) for outputs in range(1, memory))
