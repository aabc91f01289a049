"""A diffusion policy in closed loop: milliseconds an action, one denoising step after
another and in parallel.

A robot goes from (-1, 0) to (1, 0) in 16 moves around a disc that drifts. Before each
move the policy plans the whole path anew around the disc as it now is, and the robot
makes the next move of it. An episode succeeds if no move touches the disc and the robot
arrives. The network is the project's own; put yours and its scheduler in its place.
``python examples/policy_loop.py --help`` says what can be chosen.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.policy import WAYPOINTS, demonstrations, load_policy
from parasolver_adapters.policies import ActionSampler

TRAINED = {
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}
DRIFT = 0.15  # the length of the disc's way during an episode
Plan = Callable[[Tensor, torch.Generator], Tensor]


class OwnLoop:
    """The scheduler's loop, as policies have it."""

    solution = None

    def __init__(self, network: Any, scheduler: Any, steps: int) -> None:
        self._network, self._scheduler, self._steps = network, scheduler, steps

    def reset(self) -> None: ...

    @torch.no_grad()
    def __call__(
        self,
        shape: tuple[int, ...],
        conditions: dict[str, Tensor],
        generator: torch.Generator,
    ) -> Tensor:
        x = torch.randn(shape, generator=generator)
        self._scheduler.set_timesteps(self._steps)
        for t in self._scheduler.timesteps:
            output = self._network(x, t.expand(len(x)), **conditions)
            x = self._scheduler.step(output, t, x, generator=generator).prev_sample
        return x


def episode(plan: Any, seed: int) -> tuple[bool, list[float], list[int]]:
    """Whether the robot arrives unharmed, the seconds of each plan, and its rounds."""
    generator = torch.Generator().manual_seed(seed)
    disc = demonstrations(1, generator)[1]
    angle = 2 * torch.pi * torch.rand(1, generator=generator)
    drift = (
        DRIFT
        / WAYPOINTS
        * torch.stack([angle.cos(), angle.sin(), torch.zeros(1)], dim=1)
    )
    plan.reset()
    position, safe, seconds, rounds = torch.tensor([-1.0, 0.0]), True, [], []
    for move in range(WAYPOINTS):
        started = time.perf_counter()
        path = plan((1, WAYPOINTS, 2), {"obstacle": disc}, generator)
        seconds.append(time.perf_counter() - started)
        rounds.append(plan.solution.stats.rounds if plan.solution else 0)
        after = path[0, move].float()
        between = position + torch.linspace(0, 1, 9)[:, None] * (after - position)
        safe &= bool(torch.all((between - disc[0, :2]).norm(dim=1) > disc[0, 2]))
        position, disc = after, disc + drift
    return (
        safe and float((position - torch.tensor([1.0, 0.0])).norm()) < 0.2,
        seconds,
        rounds,
    )


def report(name: str, plan: Any, episodes: int) -> str:
    episode(plan, 0)  # what is done once
    runs = [episode(plan, seed) for seed in range(episodes)]
    seconds = torch.tensor([one for _, plans, _ in runs for one in plans])
    rounds = torch.tensor(
        [one for _, _, plans in runs for one in plans], dtype=torch.float64
    )
    success = sum(safe for safe, _, _ in runs) / episodes
    told = f"{rounds.mean():5.1f}" if plan.solution else "    -"
    return f"{name:<44} {1e3 * seconds.median():9.1f} {told} {success:8.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--tolerance", type=float, default=1e-2)
    parser.add_argument(
        "--max-seconds", type=float, default=0.02, help="a deadline for the last row"
    )
    given = parser.parse_args()
    network = load_policy()
    schedulers: dict[str, tuple[Any, int]] = {
        "DDPM-100": (DDPMScheduler(**TRAINED, clip_sample=True), 100),
        "DDIM-50": (DDIMScheduler(**TRAINED, clip_sample=False), 50),
    }
    print(f"{'':<44} {'ms/action':>9} {'rounds':>5} {'success':>8}")
    for name, (scheduler, steps) in schedulers.items():
        own = {"window": given.window, "tolerance": given.tolerance}
        rows = {
            "the scheduler's own loop": OwnLoop(network, scheduler, steps),
            "sequential, noise kept": ActionSampler(
                network, scheduler, steps, shift=0, method="sequential"
            ),
            "parallel": ActionSampler(network, scheduler, steps, **own),
            "parallel, from the last plan": ActionSampler(
                network, scheduler, steps, shift=0, **own
            ),
            f"the same within {1e3 * given.max_seconds:g} ms": ActionSampler(
                network, scheduler, steps, shift=0, max_seconds=given.max_seconds, **own
            ),
        }
        for way, plan in rows.items():
            print(report(f"{name}: {way}", plan, given.episodes), flush=True)


if __name__ == "__main__":
    main()
