"""A small diffusion policy that needs no download: paths in the plane that pass an obstacle on one side or the other.

A path has 16 waypoints from (-1, 0) to (1, 0). The obstacle is a disc; demonstrations passed it left or right at
random, so that the policy has to decide. The network predicts the velocity ``v`` on a squared cosine schedule, as
diffusion policies do (Chi et al. 2023, https://arxiv.org/abs/2303.04137), and is told the disc's centre and radius.
"""

from importlib import resources

import torch
from safetensors.torch import load
from torch import Tensor, nn

from parasolver_core import NoiseSchedule

WAYPOINTS = 16
SCHEDULE = NoiseSchedule.squared_cosine()
PREDICTION_TYPE = "v_prediction"


class Policy(nn.Module):
    """Residual network of two-layer blocks: ``v = policy(x, t, obstacle)``."""

    frequencies: Tensor

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
    """The trained network in evaluation mode; its weights ship rounded to half precision."""
    policy = Policy()
    policy.load_state_dict(
        load(resources.files("parasolver_adapters.embedded").joinpath("policy.safetensors").read_bytes())
    )
    return policy.to(dtype).eval().requires_grad_(False)
