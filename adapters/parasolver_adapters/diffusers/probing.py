"""Reading a scheduler's coefficients from its own steps.

The scheduler's loop is run on random numbers, and each step ``x_{i+1}`` is fitted by the fewest past states and outputs
that reproduce it. Probing along a trajectory, with ``prev_sample`` fed back, keeps the band short also for schedulers
that correct the last state in hiding (UniPC, SASolver). No formula of any scheduler is written down here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from parasolver_adapters.diffusers.stepping import (
    Draw,
    Float64,
    Loop,
    Node,
    Recorder,
    UnsupportedSchedulerError,
    no_noise,
)
from parasolver_core.recurrence import (
    Recurrence,
    added_noise_share,
    identity_slope,
    posterior_slope,
    predicted_sample_coefficients,
    signal_share,
    trim,
)

Float64Array = NDArray[np.float64]
Network = Callable[[Node], torch.Tensor]

PROBES = (1, 1, 8, 8)  # schedulers work entry by entry, so this is 64 independent runs in one
EXACT = 1e-11  # largest residual of a fit, relative to the terms that make it up
MAX_STATES, MAX_OUTPUTS = 4, 16  # the longest memory looked for; PNDM with its Runge-Kutta start needs (4, 13)


@dataclass(frozen=True)
class Path:
    """What is known of the network at each node; NaN where the scheduler does not say.

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
        scale: (N,), what the network's inputs are in terms of the states.
        path: what the scheduler says about the predicted clean sample.
    """

    x: Float64Array
    m: Float64Array
    draws: list[Float64Array]
    scale: Float64Array
    path: Path


def trace(loop: Loop, draw: Recorder | None) -> Trace:
    """Run the scheduler's loop with the given noise, or without, and a network that predicts random clean samples.

    So the states stay of the size that they have in use, and the fit is well conditioned. Where the scheduler does not
    say what its network predicts, the outputs are random.
    """
    random = torch.Generator().manual_seed(0)
    predictions = []

    def network(node: Node) -> torch.Tensor:
        clean = torch.randn(PROBES, generator=random, dtype=torch.float64)
        alpha, sigma = _levels(node)
        p, q = _prediction(node.scheduler, alpha, sigma)
        predictions.append((alpha, sigma, p, q))
        return (clean - p * node.x) / q if np.isfinite(p) and np.isfinite(q) and q != 0 else clean

    start = torch.randn(PROBES, generator=random, dtype=torch.float64) * _start_size(loop)
    xs, ms, draws, scales = [start], [], [], []
    for node, m, output in _guarded(loop, network, start, draw or no_noise):
        xs.append(output.prev_sample)
        ms.append(m)
        draws.append(_rows(draw.take()) if draw else _rows([]))
        scales.append(_ratio(node.model_input, node.x))
        predictions[-1] = _refine(predictions[-1], node, m, output)
    return Trace(_rows(xs), _rows(ms), draws, np.array(scales), Path(*np.array(predictions).T))


def fit_band(traced: Trace, loop: Loop) -> tuple[Float64Array, Float64Array, Float64Array]:
    """``(a, b, c)`` of equation (1): (N, P), (N, Q) and (N,), with the fewest past states and outputs."""
    x, m, n = traced.x, traced.m, len(traced.m)
    a, b, c = np.zeros((n, MAX_STATES)), np.zeros((n, MAX_OUTPUTS)), np.zeros(n)
    for i in range(n):
        for states, outputs in _widths(i):
            past = [x[i - k] for k in range(states)] + [m[i - k] for k in range(outputs)]
            weights = _fit(np.vstack([*past, traced.draws[i]]), x[i + 1])
            if weights is not None:
                a[i, :states], b[i, :outputs] = weights[:states], weights[states : states + outputs]
                c[i] = np.linalg.norm(weights[states + outputs :])
                break
        else:
            raise UnsupportedSchedulerError(
                f"scheduler: step {i} of {loop.name} (timestep {loop.timesteps[i].item()}) is not a linear combination "
                f"of the last {MAX_STATES} states and {MAX_OUTPUTS} network outputs{_suspects(loop)}"
            )
    return trim(a), trim(b), c


def fit_correlated(loop: Loop) -> tuple[Trace, Float64Array, Float64Array, Float64Array]:
    """The same, with the run, where steps share draws of noise: from a run without noise, and one of noise alone."""
    traced = trace(loop, None)
    a, b, _ = fit_band(traced, loop)
    zero = torch.zeros(PROBES, dtype=torch.float64)
    xs = [zero, *(output.prev_sample for _, _, output in loop.run(lambda node: zero, zero, Float64(Recorder(seed=1))))]
    c = np.array([np.sqrt(np.mean(term**2)) for term in noise_terms(_rows(xs), a)])
    return traced, a, b, np.where(c > EXACT * np.abs(_rows(xs)).max(), c, 0.0)


def noise_terms(x: Sequence[Any] | Float64Array, a: Float64Array) -> Iterator[Any]:
    """``x_{i+1} - sum_k a[i, k] x_{i-k}``, for the states of a run whose network gives zeros."""
    for i in range(len(a)):
        term = x[i + 1]
        for k in range(min(a.shape[1], i + 1)):
            term = term - float(a[i, k]) * x[i - k]
        yield term


def tabulate(loop: Loop, timesteps: NDArray[Any], sigma_data: float) -> tuple[Recurrence, Path, bool]:
    """The recurrence, the path as far as it is known, and whether the noise of the steps is independent."""
    traced, independent = trace(loop, Recorder(seed=1)), True
    try:
        a, b, c = fit_band(traced, loop)
    except UnsupportedSchedulerError:
        traced, a, b, c = fit_correlated(loop)
        independent = not np.any(c)
    path = traced.path
    if "clip_denoised" in loop.scheduler.config and a.shape[1] == b.shape[1] == 1:
        path = replace(path, p=a[:, 0], q=b[:, 0])  # consistency models: a step is the clean sample, and noise
    known = np.isfinite(path.p) & np.isfinite(path.q) & (path.q != 0)
    p, q = np.where(known, path.p, 0.0), np.where(known, path.q, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = (posterior_slope(path.alpha, path.sigma, sigma_data) - p) / q
        signal = signal_share(path.alpha, path.sigma)
    slope = np.where(known & np.isfinite(slope), slope, 0.0)
    identity = identity_slope(a, b, p, q)
    recurrence = Recurrence(
        timesteps=timesteps,
        a=a,
        b=b,
        c=c,
        held=np.stack([p, q], axis=1),
        slope=slope,
        identity_slope=np.where(np.isfinite(identity), identity, slope),
        signal=np.where(np.isfinite(signal), signal, 1.0),
        noise_share=added_noise_share(path.alpha, path.sigma, c),
        input_scale=None if np.all(traced.scale == 1) else traced.scale,
        stages=getattr(loop.scheduler, "order", 1),  # network calls a step, as pipelines of diffusers count them
    )
    return recurrence, path, independent


def wavy(node: Node) -> torch.Tensor:
    """A nonlinear network."""
    return torch.cos(3 * node.model_input + node.index) * 2


def run_nonlinear(loop: Loop, network: Network = wavy) -> Iterator[tuple[Node, torch.Tensor, Any]]:
    """The loop's run with a nonlinear network and without noise."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(PROBES, generator=draw, dtype=torch.float64) * _start_size(loop)
    return _guarded(loop, network, x)


def check_replay(
    loop: Loop,
    recurrence: Recurrence,
    correct: Callable[[int, Any, Any], Any] = lambda i, x, m: m,
    tolerance: float = 1e-8,
    network: Network = wavy,
) -> None:
    """Run the scheduler and the table side by side on a nonlinear network, without noise; they must agree.

    Args:
        loop: the scheduler's loop, with its clipping if it has any.
        recurrence: the table.
        correct: ``correct(i, x, m)`` gives the output that the table is to be given in place of ``m``.
        tolerance: largest difference accepted, relative to the states.
        network: the nonlinear network.
    """
    xs, ms = [], []
    for node, m, output in run_nonlinear(loop, network):
        i = node.index
        xs.insert(0, node.x)
        ms.insert(0, correct(i, node.x, m))
        error = float((recurrence.advance(i, xs, ms) - output.prev_sample).abs().max())
        scale = float(max(output.prev_sample.abs().max(), node.x.abs().max()))
        if not error <= tolerance * scale:
            raise UnsupportedSchedulerError(
                f"scheduler: step {i} of {loop.name} is off its own fit by {error / scale:.2g} on another network"
                f"{_suspects(loop)}"
            )


def _guarded(
    loop: Loop, network: Network, x: torch.Tensor, draw: Draw = no_noise
) -> Iterator[tuple[Node, torch.Tensor, Any]]:
    """The loop's run, with failures of the scheduler itself named as such."""
    i = 0
    try:
        for node, m, output in loop.run(network, x, Float64(draw)):
            i = node.index + 1
            if not bool(torch.all(torch.isfinite(output.prev_sample))):
                t = node.timestep.item()
                raise UnsupportedSchedulerError(
                    f"scheduler: {loop.name}'s own sequential run gives NaN or infinity at step {node.index} "
                    f"(timestep {t}){_suspects(loop)}"
                )
            yield node, m, output
    except UnsupportedSchedulerError:
        raise
    except Exception as error:
        raise UnsupportedSchedulerError(
            f"scheduler: {loop.name}'s own sequential run fails at step {i}, {type(error).__name__}: {error}"
            f"{_suspects(loop)}"
        ) from error


def _levels(node: Node) -> tuple[float, float]:
    """alpha and sigma at a node, asked of the scheduler's ``add_noise``; NaN if it has none."""
    scheduler = node.scheduler
    one, zero = torch.ones(PROBES), torch.zeros(PROBES)  # float32, in which schedulers compute these themselves
    t = node.timestep.reshape(1)
    if hasattr(scheduler, "scale_noise"):
        add = lambda sample, noise: scheduler.scale_noise(sample, t, noise)  # noqa: E731
    elif hasattr(scheduler, "add_noise"):
        add = lambda sample, noise: scheduler.add_noise(sample, noise, t)  # noqa: E731
    else:
        return np.nan, np.nan
    try:
        with torch.no_grad():
            return float(add(one, zero).flatten()[0]), float(add(zero, one).flatten()[0])
    except Exception:  # the levels are only a help; what the scheduler's own loop needs is checked by running it
        return np.nan, np.nan


def _prediction(scheduler: Any, alpha: float, sigma: float) -> tuple[float, float]:
    """``(p, q)`` from what the configuration says the network predicts (a velocity on a linear path, if nothing)."""
    on_flow_path = abs(alpha + sigma - 1) < 1e-6
    prediction_type = scheduler.config.get("prediction_type", "flow" if on_flow_path else None)
    prediction_type = {"flow_prediction": "flow"}.get(prediction_type, prediction_type)
    if prediction_type not in ("epsilon", "sample", "v_prediction", "flow"):
        return np.nan, np.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        p, q = predicted_sample_coefficients(prediction_type, np.array(alpha), np.array(sigma))
    return float(p), float(q)


def _refine(
    prediction: tuple[float, float, float, float], node: Node, m: torch.Tensor, output: Any
) -> tuple[float, float, float, float]:
    """With ``(p, q)`` as the step itself computes the clean sample, if it returns that or has a method for it."""
    alpha, sigma, p, q = prediction
    clean = getattr(output, "pred_original_sample", None)
    if clean is None and hasattr(node.scheduler, "precondition_outputs"):
        clean = node.scheduler.precondition_outputs(node.x, m, node.scheduler.sigmas[node.index])
    if clean is not None and clean.shape == m.shape:
        fitted = _fit(_rows([node.x, m]), clean.numpy().reshape(-1))
        if fitted is not None:
            p, q = fitted
    return alpha, sigma, p, q


def _fit(columns: Float64Array, target: Float64Array) -> Float64Array | None:
    """Coefficients (k,) with ``coefficients @ columns = target`` to rounding, or None; (k, probes) and (probes,)."""
    sizes = np.linalg.norm(columns, axis=1)
    sizes = np.where(sizes > 0, sizes, 1.0)
    unit = columns / sizes[:, None]
    terms = np.linalg.lstsq(unit.T, target, rcond=None)[0]
    largest = max(float(np.linalg.norm(target)), float(np.max(np.abs(terms))))
    if not np.linalg.norm(target - terms @ unit) <= EXACT * largest:
        return None
    return np.where(np.abs(terms) > 1e-14 * largest, terms / sizes, 0.0)


def _widths(i: int) -> Iterator[tuple[int, int]]:
    """``(states, outputs)`` to try at step i, the shortest memory first."""
    for memory in range(1, min(MAX_OUTPUTS, i + 1) + 1):
        for states in range(1, min(MAX_STATES, memory) + 1):
            yield states, memory
        if memory <= MAX_STATES:
            yield from ((memory, outputs) for outputs in range(1, memory))


def _suspects(loop: Loop) -> str:
    """Advice on options that are known to be nonlinear or undefined."""
    config, advice = loop.scheduler.config, []
    if config.get("rescale_betas_zero_snr") and config.get("prediction_type") == "epsilon":
        advice.append("with rescale_betas_zero_snr the first alpha is 0: use prediction_type='v_prediction'")
    if str(config.get("variance_type")).startswith("learned"):
        advice.append(
            f"with variance_type={config.get('variance_type')!r} the network's output sets the noise, which is not "
            "linear: set a fixed one and let the denoiser return the first half of the channels"
        )
    if config.get("solver_type") == "bh1" and config.get("final_sigmas_type") == "zero":
        advice.append("set solver_type='bh2' or final_sigmas_type='sigma_min'")
    return "; " + "; ".join(advice) if advice else ""


def _start_size(loop: Loop) -> float:
    return max(1.0, float(getattr(loop.scheduler, "init_noise_sigma", 1.0)))


def _ratio(scaled: torch.Tensor, x: torch.Tensor) -> float:
    return 1.0 if scaled is x else float((scaled * x).sum() / (x * x).sum())


def _rows(tensors: Sequence[torch.Tensor]) -> Float64Array:
    """The tensors as rows of a table, (len(tensors), probes)."""
    return np.array([tensor.numpy().reshape(-1) for tensor in tensors]).reshape(-1, np.prod(PROBES))
