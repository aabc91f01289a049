"""Samplers that are functions: of k-diffusion, of EDM, and loops over a velocity."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.clients.table import BATCH, Client, Run, seeded
from benchmarks.problems import PROBLEMS, Problem, epsilon_denoiser, flow_denoiser
from benchmarks.published import edm_sampler, k_diffusion
from parasolver_adapters.samplers import parallel, sample_flow, step_rule_from_sampler
from parasolver_core import NoiseSchedule


def clean_samples(problem: Problem) -> Callable[..., Tensor]:
    """The problem's network in the manner of k-diffusion: ``denoised = model(x, sigma)``."""
    network = epsilon_denoiser(problem)
    alphas = torch.tensor(problem.schedule.alphas_cumprod)
    levels = (1 / alphas - 1).sqrt()

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        t = (levels.log()[None] - sigma.double().log()[:, None]).abs().argmin(dim=1)
        wide = sigma.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        return x - wide * network(x / (1 + wide**2).sqrt(), t)

    return model


def samplers_of_k_diffusion() -> Iterator[Client]:
    sampling, problem = k_diffusion(), PROBLEMS["policy"]
    if sampling is None:
        return
    model, sigmas = clean_samples(problem), sampling.get_sigmas_karras(40, 0.05, 80.0)
    x = problem.starts(BATCH) * sigmas[0]
    for name, options in [
        ("euler", {}),
        ("euler_ancestral", {}),
        ("heun", {}),
        ("heun", {"s_churn": 20.0}),
        ("dpm_2", {}),
        ("dpm_2_ancestral", {}),
        ("lms", {}),
        ("dpmpp_2s_ancestral", {}),
        ("dpmpp_sde", {}),
        ("dpmpp_2m", {}),
        ("dpmpp_2m_sde", {}),
        ("dpmpp_3m_sde", {}),
    ]:
        yield sampler(f"k-diffusion sample_{name}", getattr(sampling, f"sample_{name}"), (model, x, sigmas), options)


def sampler(name: str, fn: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Client:
    """A sampler that is a function."""
    told = "".join(f", {key}={value:g}" if isinstance(value, float) else "" for key, value in options.items())
    if "disable" in inspect.signature(fn).parameters:
        options = options | {"disable": True}

    def ours(tolerance: float) -> Run:
        run = parallel(fn, 16, tolerance=tolerance)
        sample = seeded(lambda: run(*arguments, **options))
        assert run.solution is not None
        return sample, run.solution

    rule = step_rule_from_sampler(fn, *arguments[2:], model=arguments[0], **options)
    return Client(name + told, 2, len(rule.timesteps), 16, lambda: seeded(lambda: fn(*arguments, **options)), ours)


class Preconditioned:
    """A network in the manner of EDM's: with attributes, and levels that may have no axes."""

    sigma_min, sigma_max = 0.0, float("inf")

    def __init__(self, model: Callable[..., Tensor]) -> None:
        self._model = model

    def round_sigma(self, sigma: Any) -> Tensor:
        return torch.as_tensor(sigma)

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self._model(x.float(), sigma.float().flatten().expand(len(x)))


def sampler_of_edm() -> Iterator[Client]:
    problem = PROBLEMS["policy"]
    network = Preconditioned(clean_samples(problem))
    for churn in (0.0, 40.0):
        options = {"num_steps": 40, "S_churn": churn}
        yield sampler("EDM edm_sampler", edm_sampler, (network, problem.starts(BATCH).float()), options)


def flows() -> Iterator[Client]:
    problem = PROBLEMS["policy"]
    velocity, x = flow_denoiser(problem.make(), problem), problem.starts(BATCH)
    own = {"schedule": NoiseSchedule.flow_matching(), "prediction_type": "flow"}
    for method, steps in (("euler", 32), ("midpoint", 32), ("heun", 32), ("rk4", 16)):
        times = torch.linspace(0.999, 0.0, steps + 1, dtype=x.dtype)

        def plain(times: Tensor = times, method: str = method) -> Tensor:
            return sample_flow(velocity, x, times, method=method)

        def ours(tolerance: float, times: Tensor = times, method: str = method) -> Run:
            run = parallel(sample_flow, 16, tolerance=tolerance, **own)  # type: ignore[arg-type]
            sample = run(velocity, x, times, method=method)
            assert run.solution is not None
            return sample, run.solution

        calls = steps * {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}[method]
        yield Client(f"flow, {method}, {steps} steps", 2, calls, 16, plain, ours)
