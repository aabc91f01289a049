"""Policies of robots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.clients.table import Client, Run, seeded
from benchmarks.policy_loops import OBSTACLES, ddim, ddpm, known_beginning
from parasolver_adapters.diffusers import parallel_loop
from parasolver_adapters.policies import ActionSampler


def loops_of_policies() -> Iterator[Client]:
    """Four environments, each with its own obstacle."""
    own: dict[str, Any] = {"dtype": torch.float32}
    for name, actor in (("DDPM", ddpm(100, **own)), ("DDIM", ddim(50, **own))):

        def plain(actor: Any = actor) -> Tensor:
            return seeded(lambda: actor.conditional_sample(4, OBSTACLES))

        def looped(tolerance: float, actor: Any = actor) -> Run:
            sample = parallel_loop(actor.conditional_sample, 16, tolerance=tolerance)
            return seeded(lambda: sample(4, OBSTACLES)), sample.run

        def chunk(tolerance: float, actor: Any = actor) -> Run:
            sampler = ActionSampler(actor.network, actor.noise_scheduler, actor.steps, 16, tolerance=tolerance)
            sample = seeded(lambda: sampler((4, 16, 2), {"obstacle": OBSTACLES}))
            assert sampler.solution is not None
            return sample, sampler.solution

        yield Client(f"policy, LeRobot's loop, {name}-{actor.steps}", 2, actor.steps, 16, plain, looped)
        yield Client(f"policy, ActionSampler, {name}-{actor.steps}", 3, actor.steps, 16, plain, chunk)
    actor, (data, mask) = ddpm(100, **own), known_beginning(4, torch.float32)

    def inpainted(tolerance: float) -> Run:
        sample = parallel_loop(actor.inpaint, 16, tolerance=tolerance)
        return sample(data, mask, OBSTACLES, torch.Generator().manual_seed(0)), sample.run

    def plainly() -> Tensor:
        return actor.inpaint(data, mask, OBSTACLES, torch.Generator().manual_seed(0))

    yield Client("policy, diffusion_policy's loop, DDPM-100", 2, 100, 16, plainly, inpainted)
