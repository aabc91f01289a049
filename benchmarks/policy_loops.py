"""Loops around ``scheduler.step`` as policies of robots have them, around the project's policy network."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from benchmarks.policy import WAYPOINTS, Policy, load_policy

OBSTACLES = torch.tensor([[0.1, 0.05, 0.3], [-0.2, 0.1, 0.2], [0.0, -0.1, 0.35], [0.3, 0.0, 0.25]])
TRAINED: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}


class Actor:
    """A policy with loops of its own; each environment of the batch has its own obstacle.

    Args:
        scheduler: of diffusers.
        steps: of its loop.
        dtype: of the network and its paths.
    """

    def __init__(self, scheduler: Any, steps: int, dtype: torch.dtype = torch.float64) -> None:
        self.network: Policy = load_policy(dtype)
        self.noise_scheduler, self.steps, self._dtype = scheduler, steps, dtype

    @torch.no_grad()
    def conditional_sample(
        self, batch_size: int, condition: Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """As LeRobot's: paths ``(batch, 16, 2)``."""
        shape = (batch_size, WAYPOINTS, 2)
        sample = torch.randn(shape, generator=generator, dtype=self._dtype) if noise is None else noise
        self.noise_scheduler.set_timesteps(self.steps)
        for t in self.noise_scheduler.timesteps:
            output = self.network(sample, torch.full((len(sample),), t, dtype=torch.long), condition)
            sample = self.noise_scheduler.step(output, t, sample, generator=generator).prev_sample
        return sample

    @torch.no_grad()
    def inpaint(self, data: Tensor, mask: Tensor, obstacle: Tensor, generator: torch.Generator) -> Tensor:
        """As diffusion_policy's: what is known of the path is written into the state before each step."""
        path = torch.randn(data.shape, generator=generator, dtype=data.dtype)
        self.noise_scheduler.set_timesteps(self.steps)
        for t in self.noise_scheduler.timesteps:
            path[mask] = data[mask]
            output = self.network(path, t.expand(len(path)), obstacle)
            path = self.noise_scheduler.step(output, t, path, generator=generator).prev_sample
        path[mask] = data[mask]
        return path


def ddpm(steps: int = 50, **options: Any) -> Actor:
    """With the scheduler of LeRobot's default, which clips."""
    return Actor(DDPMScheduler(100, **TRAINED, clip_sample=True), steps, **options)


def ddim(steps: int = 40, **options: Any) -> Actor:
    scheduler = DDIMScheduler(1000, **TRAINED, clip_sample=False, timestep_spacing="trailing")
    return Actor(scheduler, steps, **options)


def known_beginning(batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Paths whose first two waypoints are known, and where: ``(data, mask)``."""
    data = torch.zeros(batch, WAYPOINTS, 2, dtype=dtype)
    data[:, 0, 0], data[:, 1, 0] = -1, -0.87
    mask = torch.zeros_like(data, dtype=torch.bool)
    mask[:, :2] = True
    return data, mask
