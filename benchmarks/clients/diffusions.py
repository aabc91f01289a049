"""Objects with a diffusion's loops, and replicas of a network."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.clients.table import BATCH, Client, Run, seeded
from benchmarks.guided_loops import ModelMeanType, ModelVarType, SpacedDiffusion
from benchmarks.problems import PROBLEMS, Problem, epsilon_denoiser
from benchmarks.published import denoising_diffusion
from parasolver_adapters.denoising_diffusion import parallel_denoising_diffusion
from parasolver_adapters.gaussian_diffusion import parallel_gaussian_diffusion
from parasolver_adapters.multi_device import MultiDeviceDenoiser
from parasolver_core import DDIM, solve, solve_sequential


def loops_of_guided_diffusion() -> Iterator[Client]:
    problem = PROBLEMS["policy"]
    network, bar = epsilon_denoiser(problem), problem.schedule.alphas_cumprod
    for loop, steps, window in (("ddim_sample_loop", 50, 16), ("p_sample_loop", 250, 32), ("p_sample_loop", 1000, 100)):
        diffusion = SpacedDiffusion(
            np.linspace(0, len(bar) - 1, steps).round().astype(int).tolist(),
            betas=1 - bar / np.append(1.0, bar[:-1]),
            model_mean_type=ModelMeanType.EPSILON,
            model_var_type=ModelVarType.FIXED_SMALL,
        )
        arguments: dict[str, Any] = {"noise": problem.starts(BATCH), "clip_denoised": False}

        def plain(diffusion: Any = diffusion, loop: str = loop, arguments: dict[str, Any] = arguments) -> Tensor:
            return seeded(lambda: getattr(diffusion, loop)(network, (BATCH, *problem.shape), **arguments))

        def ours(tolerance: float, diffusion: Any = diffusion, plain: Any = plain, window: int = window) -> Run:
            own = parallel_gaussian_diffusion(diffusion, window, tolerance=tolerance)
            sample = plain(own)
            return sample, own.solution

        yield Client(f"guided-diffusion {loop}, {steps} steps", 2, steps, window, plain, ours)


class Network(torch.nn.Module):
    """The problem's network in the manner of denoising-diffusion-pytorch: of pictures with one channel."""

    channels = out_dim = 1
    self_condition = False

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self._network = problem.make()

    def forward(self, x: Tensor, t: Tensor, x_self_cond: None = None) -> Tensor:
        return self._network(x[:, 0], t)[:, None]


def loops_of_denoising_diffusion() -> Iterator[Client]:
    """Its GaussianDiffusion, with the network's own schedule; it clips."""
    package, problem = denoising_diffusion(), PROBLEMS["policy"]
    if package is None:
        return
    for name, steps, eta, window in (
        ("ddim_sample", 50, 0.0, 16),
        ("ddim_sample", 50, 1.0, 16),
        ("p_sample_loop", 1000, 0.0, 100),
    ):
        diffusion = package.GaussianDiffusion(
            Network(problem),
            image_size=problem.shape,
            timesteps=1000,
            sampling_timesteps=steps,
            objective="pred_v",
            beta_schedule="cosine",
            ddim_sampling_eta=eta,
            auto_normalize=False,  # distances are those of states, as of all clients
        ).eval()

        def plain(diffusion: Any = diffusion) -> Tensor:
            return seeded(lambda: diffusion.sample(BATCH))

        def ours(tolerance: float, diffusion: Any = diffusion, plain: Any = plain, window: int = window) -> Run:
            own = parallel_denoising_diffusion(diffusion, window, tolerance=tolerance)
            sample = plain(own)
            return sample, own.solution

        told = f", eta={eta:g}" if eta else ""
        yield Client(f"denoising-diffusion-pytorch {name}, {steps} steps{told}", 2, steps, window, plain, ours)


def replicas_in_one_process() -> Iterator[Client]:
    problem = PROBLEMS["policy"]
    network, x = problem.make(), problem.starts(BATCH)
    run = x, problem.schedule.timesteps(50), DDIM(problem.schedule, prediction_type="v_prediction")

    def ours(tolerance: float) -> Run:
        denoiser = MultiDeviceDenoiser([network, copy.copy(network)])
        solution = solve(denoiser, *run, window=16, tolerance=tolerance)
        return solution.sample, solution

    yield Client("DDIM on two replicas, one process", 2, 50, 16, lambda: solve_sequential(network, *run).sample, ours)
