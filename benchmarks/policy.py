"""What the embedded policy was trained with: paths in the plane, and its weights before they were rounded."""

from importlib import resources

import torch
from safetensors.torch import load
from torch import Tensor

from parasolver_adapters.embedded.policy import SCHEDULE, WAYPOINTS, Policy

__all__ = ["SCHEDULE", "WAYPOINTS", "Policy", "demonstrations", "load_policy"]


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


def load_policy(dtype: torch.dtype = torch.float32) -> Policy:
    """The trained network, its weights as they were trained."""
    policy = Policy()
    policy.load_state_dict(load(resources.files("benchmarks").joinpath("weights/policy.safetensors").read_bytes()))
    return policy.to(dtype).eval().requires_grad_(False)
