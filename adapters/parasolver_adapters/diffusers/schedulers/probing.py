"""Reading a scheduler's coefficients from its own steps; :mod:`parasolver_adapters.bands` says how."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from parasolver_adapters.bands import (
    PROBES,
    Band,
    Float64Array,
    NotLinearError,
    Path,
    Trace,
    as_rows,
    correlated_scale,
    drawn_rows,
    fit,
    fit_band,
    replay,
    tabulated,
)
from parasolver_adapters.diffusers.schedulers.stepping import Loop, Node, UnsupportedSchedulerError
from parasolver_adapters.draws import Draw, Float64, Recorder, no_noise
from parasolver_core.samplers.recurrence import Recurrence
from parasolver_core.samplers.sample_form import predicted_sample_coefficients

Network = Callable[[Node], torch.Tensor]


@dataclass(frozen=True)
class SchedulerTrace(Trace):
    """The run of a scheduler.

    Args:
        scale: (N,), what the network's inputs are in terms of the states.
        path: what the scheduler says about the predicted clean sample.
    """

    scale: Float64Array
    path: Path


def trace(loop: Loop, draw: Recorder | None) -> SchedulerTrace:
    """Run the scheduler's loop with the given noise, or without, and a network that predicts random clean samples.

    So the states stay of the size that they have in use, and the fit is well conditioned. Where the scheduler does not
    say what its network predicts, the outputs are random.
    """
    random = torch.Generator("cpu").manual_seed(0)
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
        draws.append(drawn_rows(node.index, draw.take() if draw else []))
        scales.append(_ratio(node.model_input, node.x))
        predictions[-1] = _refine(predictions[-1], node, m, output)
    return SchedulerTrace(as_rows(xs), as_rows(ms), draws, np.array(scales), Path(*np.array(predictions).T))


def tabulate(loop: Loop, timesteps: NDArray[Any], sigma_data: float) -> tuple[Recurrence, Path, bool]:
    """The recurrence, the path as far as it is known, and whether the noise of the steps is independent."""
    independent = True
    try:
        traced = trace(loop, Recorder(seed=1))
        band = fit_band(traced)
    except NotLinearError:
        traced, band = _fit_correlated(loop)
        independent = not np.any(band[2])
    a, b, _ = band
    path = traced.path
    if "clip_denoised" in loop.scheduler.config and a.shape[1] == b.shape[1] == 1:
        path = replace(path, p=a[:, 0], q=b[:, 0])  # consistency models: a step is the clean sample, and noise
    scale = None if np.all(traced.scale == 1) else traced.scale
    stages = getattr(loop.scheduler, "order", 1)  # network calls a step, as pipelines of diffusers count them
    return tabulated(timesteps, band, path, sigma_data, scale, stages), path, independent


def _fit_correlated(loop: Loop) -> tuple[SchedulerTrace, Band]:
    """The band, with the run, where steps share draws of noise: from a run without noise, and one of noise alone."""
    traced = trace(loop, None)
    try:
        a, b, _ = fit_band(traced)
    except NotLinearError as error:
        raise _refusal(loop, error) from None
    zero = torch.zeros(PROBES, dtype=torch.float64)
    xs = [zero, *(output.prev_sample for _, _, output in loop.run(lambda node: zero, zero, Float64(Recorder(seed=1))))]
    return traced, (a, b, correlated_scale(as_rows(xs), a))


def wavy(node: Node) -> torch.Tensor:
    """A nonlinear network."""
    return torch.cos(3 * node.model_input + node.index) * 2


def run_nonlinear(loop: Loop, network: Network = wavy) -> Iterator[tuple[Node, torch.Tensor, Any]]:
    """The loop's run with a nonlinear network and without noise."""
    draw = torch.Generator("cpu").manual_seed(2)
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
    run = ((node.x, m, output.prev_sample) for node, m, output in run_nonlinear(loop, network))
    try:
        replay(recurrence, run, correct, tolerance)
    except NotLinearError as error:
        raise _refusal(loop, error) from None


def _refusal(loop: Loop, error: NotLinearError) -> UnsupportedSchedulerError:
    timestep = loop.timesteps[error.step].item()
    return UnsupportedSchedulerError(
        f"scheduler: step {error.step} of {loop.name} (timestep {timestep}) {error.reason}{_suspects(loop)}"
    )


def _guarded(
    loop: Loop, network: Network, x: torch.Tensor, draw: Draw = no_noise
) -> Iterator[tuple[Node, torch.Tensor, Any]]:
    """The loop's run, with failures of the scheduler itself named as such."""
    i, given = 0, {}

    def watched(node: Node) -> torch.Tensor:
        m = network(node)
        given.update(sample=(node.x, node.x.clone()), model_output=(m, m.clone()))
        return m

    try:
        for node, m, output in loop.run(watched, x, Float64(draw)):
            i = node.index + 1
            for name, (value, before) in given.items():
                if not torch.equal(value, before):
                    raise UnsupportedSchedulerError(
                        f"scheduler: {loop.name}.step writes into the {name} that it is given; let it return another "
                        "tensor"
                    )
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
    ones, zeros = torch.ones(PROBES), torch.zeros(PROBES)  # float32, in which schedulers compute these themselves
    t = node.timestep.reshape(1)
    if hasattr(scheduler, "scale_noise"):
        add = lambda sample, noise: scheduler.scale_noise(sample, t, noise)  # noqa: E731
    elif hasattr(scheduler, "add_noise"):
        add = lambda sample, noise: scheduler.add_noise(sample, noise, t)  # noqa: E731
    else:
        return np.nan, np.nan
    try:
        with torch.no_grad():
            return float(add(ones, zeros).flatten()[0]), float(add(zeros, ones).flatten()[0])
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
        fitted = fit(as_rows([node.x, m]), clean.numpy().reshape(-1))
        if fitted is not None:
            p, q = fitted
    return alpha, sigma, p, q


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
