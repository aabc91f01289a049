"""Fields that the tests integrate."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

TIMES = np.linspace(0.0, 6.0, 301)


def pendulum(t: Any, y: Any) -> Any:
    return np.stack([y[1], -np.sin(y[0]) - 0.1 * y[1] + 0.2 * np.cos(t)])


def torch_pendulum(t: Any, y: Any) -> Any:
    return torch.stack([y[1], -torch.sin(y[0]) - 0.1 * y[1] + 0.2 * torch.cos(t)])


def lotka_volterra(t: Any, y: Any) -> Any:
    return torch.stack([1.5 * y[0] - y[0] * y[1], y[0] * y[1] - 3 * y[1]])


def logistic(t: Any, y: Any) -> Any:
    return y * (1 - y) * (2 + np.sin(t))


def wave(t: Any, y: Any) -> Any:
    """A wide, weakly coupled state without a batch: 64 oscillators in a ring."""
    return np.roll(y, 1, axis=-1) * 0.3 - np.sin(y)


def batched_oscillators(t: Any, y: Any) -> Any:
    """States (batch, 2), time with axes that broadcast."""
    return torch.stack([y[..., 1], -torch.sin(y[..., 0])], dim=-1) * (1 + 0.1 * torch.sin(t))


START = np.array([1.0, 0.3])


def close(a: Any, b: Any, limit: float = 1e-11) -> None:
    a, b = np.asarray(a), np.asarray(b)
    assert np.all(np.isfinite(a))
    np.testing.assert_allclose(a, b, rtol=0, atol=limit * np.max(np.abs(b)))


def pendulum_free(t: Any, y: Any) -> Any:
    return np.stack([y[1], -np.sin(y[0])])
