"""Weights for tests: the same on every machine, and files of full-size networks that take no room."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def fill(network: torch.nn.Module) -> None:
    """Waves in place of weights, none of them 0, scaled so that signals keep their size."""
    with torch.no_grad():
        for number, (_, weight) in enumerate(sorted(network.state_dict().items())):
            wave = torch.sin(torch.arange(weight.numel(), dtype=torch.float64) ** 1.3 + number)
            fan_in = max(weight[0].numel(), 1) if weight.ndim > 1 else 4
            weight.copy_((wave / fan_in**0.5).view(weight.shape))


def expanded(network: torch.nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A state dict of the right shapes of which each tensor is one number, repeated without a copy."""
    one = torch.tensor(0.01, dtype=dtype, device="cpu")
    return {key: one.expand(value.shape) for key, value in network.state_dict().items()}


def shapes(network: torch.nn.Module) -> tuple[int, int, str]:
    """How many tensors and numbers a network has, and a hash of the tensors' names and shapes."""
    state: Mapping[str, Any] = network.state_dict()
    lines = [f"{key} {tuple(value.shape)}" for key, value in sorted(state.items())]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    return len(lines), sum(value.numel() for value in state.values()), digest


def saved(state: Mapping[str, torch.Tensor], path: Path) -> Path:
    torch.save(dict(state), path)
    return path


def relative(got: Any, expected: Any) -> float:
    return float((got - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())
