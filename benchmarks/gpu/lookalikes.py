"""Networks that their own packages would have to be installed for: the same blocks, widths and depths."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, mish, scaled_dot_product_attention, silu

FREQUENCIES = 128
OBSERVATION = 66  # numbers that a policy of LeRobot is told, from its image encoder and the state


def waves(t: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Sines and cosines of a timestep, (rows, 2 count)."""
    phase = t[:, None] * torch.exp(torch.arange(count, device=t.device) * (-math.log(1e4) / count))
    return torch.cat([phase.sin(), phase.cos()], dim=1).to(dtype)


class ConditionedBlock(nn.Module):
    """Two convolutions, modulated by the condition (FiLM) in between, around a skip."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.one, self.two = (
            nn.Sequential(nn.Conv1d(channels, outputs, 5, padding=2), nn.GroupNorm(8, outputs), nn.Mish())
            for channels in (inputs, outputs)
        )
        self.film, self.skip = nn.Linear(FREQUENCIES + OBSERVATION, 2 * outputs), nn.Conv1d(inputs, outputs, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.film(mish(condition))[:, :, None].chunk(2, dim=1)
        return self.two(scale * self.one(x) + shift) + self.skip(x)


class RobotUNet(nn.Module):
    """The 1-D U-Net of diffusion policies, as LeRobot sizes it: 16 actions of two numbers.

    Args:
        widths: of the three levels.
    """

    def __init__(self, widths: tuple[int, int, int] = (512, 1024, 2048)) -> None:
        super().__init__()
        a, b, c = widths
        n = FREQUENCIES
        self.time = nn.Sequential(nn.Linear(n, 4 * n), nn.Mish(), nn.Linear(4 * n, n))
        self.down = nn.ModuleList(
            nn.ModuleList([ConditionedBlock(i, o), ConditionedBlock(o, o), nn.Conv1d(o, o, 3, stride, 1)])
            for i, o, stride in ((2, a, 2), (a, b, 2), (b, c, 1))
        )
        self.middle = nn.ModuleList([ConditionedBlock(c, c), ConditionedBlock(c, c)])
        self.up = nn.ModuleList(
            nn.ModuleList([ConditionedBlock(2 * i, o), ConditionedBlock(o, o), nn.ConvTranspose1d(o, o, 4, 2, 1)])
            for i, o in ((c, b), (b, a))
        )
        self.out = nn.Sequential(nn.Conv1d(a, a, 5, padding=2), nn.GroupNorm(8, a), nn.Mish(), nn.Conv1d(a, 2, 1))

    def forward(self, x: Tensor, t: Tensor, observation: Tensor) -> Tensor:
        """(rows, 16, 2), for times (rows,) and an observation (1, 66)."""
        told = self.time(waves(t, FREQUENCIES // 2, x.dtype))
        condition = torch.cat([told, observation.expand(len(x), -1)], dim=1)
        h, kept = x.transpose(1, 2), []
        for one, two, smaller in self.down:  # type: ignore[misc]
            h = two(one(h, condition), condition)
            kept.append(h)
            h = smaller(h)
        for block in self.middle:
            h = block(h, condition)
        for one, two, larger in self.up:  # type: ignore[misc]
            h = larger(two(one(torch.cat([h, kept.pop()], dim=1), condition), condition))
        return self.out(h).transpose(1, 2)


class Layer(nn.Module):
    """Attention and an MLP, each modulated by the time (adaLN)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation, self.qkv = nn.Linear(width, 6 * width), nn.Linear(width, 3 * width)
        self.after = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU("tanh"), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        a, b, gate, d, e, last = self.modulation(silu(condition))[:, None].chunk(6, dim=2)
        h = layer_norm(x, x.shape[-1:]) * (1 + a) + b
        q, k, v = self.qkv(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + gate * self.after(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + last * self.mlp(layer_norm(x, x.shape[-1:]) * (1 + d) + e)


class AudioDiT(nn.Module):
    """A speech transformer of 0.3 B weights: frames of 100 mel channels.

    Args:
        width, depth, heads: of the layers.
    """

    def __init__(self, width: int = 1024, depth: int = 22, heads: int = 16) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(100, width), nn.Linear(width, 100)
        self.time = nn.Linear(2 * FREQUENCIES, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(rows, frames, 100), for times (rows,)."""
        condition, h = self.time(waves(t, FREQUENCIES, x.dtype)), self.enter(x)
        for layer in self.layers:
            h = layer(h, condition)
        return self.leave(h)
