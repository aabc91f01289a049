"""A diffusion policy in closed loop: plan a path, walk a part of it, look again, plan
anew.

Three things make it fit for control:

* The noise is the same at every tick. The plan then changes only as much as what
  the robot sees.
* Each tick starts from the last tick's trajectory, so it takes fewer rounds.
* ``max_rounds`` is the deadline. A plan that is not done by then is still the best
  estimate so far.

The network is a stand-in: the exact denoiser of paths that pass an obstacle on its
left or on its right. Put your policy into ``Planner.network``; what it is told
about the world, here the obstacle, stays an attribute.
"""

import torch
from torch import Tensor

from parasolver_core import DDIM, NoiseSchedule, Solution, solve

WAYPOINTS, STEPS, DEADLINE = 16, 100, 12
SCHEDULE = NoiseSchedule.squared_cosine()


class Planner:
    """Paths (1, 16, 2) around an obstacle, one for each tick of the controller."""

    def __init__(self, seed: int = 0) -> None:
        self.noise = torch.randn(
            1, WAYPOINTS, 2, generator=torch.Generator().manual_seed(seed)
        )
        self.alphas_cumprod = torch.tensor(SCHEDULE.alphas_cumprod, dtype=torch.float32)
        self.obstacle = torch.zeros(2)
        self.last: Solution | None = None

    def network(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict the noise of the rows; x is (rows, 16, 2), t is (rows,)."""
        s = torch.linspace(-1, 1, WAYPOINTS)
        bump = 0.5 * torch.exp(-(((s - self.obstacle[0]) / 0.4) ** 2))
        sides = torch.stack(
            [
                torch.stack([s, self.obstacle[1] + side * bump], dim=1)
                for side in (-1.0, 1.0)
            ]
        )
        alpha, variance = self.alphas_cumprod[t].sqrt(), 1 - self.alphas_cumprod[t]
        spread = (0.2 * alpha) ** 2 + variance
        away = x[:, None] - alpha[:, None, None, None] * sides
        weights = torch.softmax(
            -away.square().sum((2, 3)) / (2 * spread[:, None]), dim=1
        )
        mean = (weights[:, :, None, None] * away).sum(1)
        return (variance.sqrt() / spread)[:, None, None] * mean

    def plan(self, obstacle: Tensor) -> Solution:
        """The path for what is seen now; from the last path, if there is one."""
        self.obstacle = obstacle
        start = (
            None
            if self.last is None or self.last.trajectory is None
            else self.last.trajectory
        )
        self.last = solve(
            self.network,
            self.noise,
            SCHEDULE.timesteps(STEPS),
            DDIM(SCHEDULE),
            window=STEPS,
            tolerance=0.02,
            start=start,
            save="trajectory",
            max_rounds=DEADLINE,
            throw=False,
        )
        return self.last


def main() -> list[Solution]:
    planner, plans = Planner(), []
    for tick in range(6):
        obstacle = torch.tensor([0.0, 0.02 * tick])
        solution = planner.plan(obstacle)
        print(
            f"tick {tick}: {solution.stats.rounds:2} rounds instead of {STEPS} calls,",
            solution.status.name,
        )
        plans.append(solution)
        # Here the robot walks the first waypoints of solution.sample[0].
    return plans


if __name__ == "__main__":
    main()
