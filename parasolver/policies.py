"""Policies of robots; see :mod:`parasolver_adapters.policies`."""

from parasolver_adapters.policies import (
    ActionSampler,
    parallel_policy,
)

__all__ = [
    "ActionSampler",
    "parallel_policy",
]
