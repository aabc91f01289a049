"""A small diffusion policy: paths in the plane that pass an obstacle on one side or the other, and its network.

A path has 16 waypoints from (-1, 0) to (1, 0). The obstacle is a disc; demonstrations pass it left or right at random,
so that a policy has to decide. The network predicts the velocity ``v`` on a squared cosine schedule, as diffusion
policies do (Chi et al. 2023, https://arxiv.org/abs/2303.04137), and is told the disc's centre and radius.
"""

from importlib import resources

import torch
from safetensors.torch import load
from torch import Tensor, nn

from parasolver_core import NoiseSchedule

WAYPOINTS = 16
SCHEDULE = NoiseSchedule.squared_cosine()


def demonstrations(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Paths (count, 16, 2) and obstacles (count, 3): centre x, centre y, radius."""
    centre = torch.rand(count, 2, generator=generator) * torch.tensor([0.8, 0.4]) - torch.tensor([0.4, 0.2])
    radius = 0.15 + 0.25 * torch.rand(count, generator=generator)
    side = torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1.0
    s = torch.linspace(-1, 1, WAYPOINTS)
    clearance = radius + 0.05 + 0.05 * torch.rand(count, generator=generator)
    width = 0.25 + 0.15 * torch.rand(count, 1, generator=generator)
    bump = torch.exp(-(((s - centre[:, :1]) / width) ** 2) / 2)
    y = (centre[:, 1] + side * clearance)[:, None] * bump * (1 - s**2)
    speed = 0.1 * torch.randn(count, 1, generator=generator)
    x = s + speed * (1 - s**2)
    return torch.stack([x, y], dim=2), torch.cat([centre, radius[:, None]], dim=1)


class Policy(nn.Module):
    """Residual network of two-layer blocks: ``v = policy(x, t, obstacle)``."""

    def __init__(self, width: int = 192, blocks: int = 4) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.exp(torch.linspace(0.0, 6.0, 32)), persistent=False)
        self.enter = nn.Linear(2 * WAYPOINTS + 3 + 64, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )
        self.leave = nn.Linear(width, 2 * WAYPOINTS)

    def forward(self, x: Tensor, t: Tensor, obstacle: Tensor) -> Tensor:
        """Predict the velocity.

        Args:
            x: Noisy paths (rows, 16, 2).
            t: Timesteps in 0 .. 999, (rows,).
            obstacle: (rows, 3).

        Returns:
            ``v``, (rows, 16, 2).
        """
        phase = (t / 1000).to(x.dtype)[:, None] * self.frequencies.to(x.dtype)
        hidden = self.enter(torch.cat([x.flatten(1), obstacle, phase.sin(), phase.cos()], dim=1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.leave(hidden).view(x.shape)


def load_policy(dtype: torch.dtype = torch.float32) -> Policy:
    """The trained network."""
    policy = Policy()
    policy.load_state_dict(load(resources.files("benchmarks").joinpath("weights/policy.safetensors").read_bytes()))
    return policy.to(dtype).eval().requires_grad_(False)
