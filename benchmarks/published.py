"""Public samplers to compare with, imported without what their packages need for training, or written anew."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor


def k_diffusion() -> Any:
    """``k_diffusion.sampling``: its package, installed without dependencies, is not initialized; None without it."""
    spec = importlib.util.find_spec("k_diffusion") if "k_diffusion" not in sys.modules else None
    if spec is not None:
        package = ModuleType("k_diffusion")
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["k_diffusion"] = package
    return importlib.import_module("k_diffusion.sampling") if "k_diffusion" in sys.modules else None


def edm_sampler(
    net: Any,
    latents: Tensor,
    class_labels: Tensor | None = None,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    num_steps: int = 18,
    S_churn: float = 0.0,
    S_noise: float = 1.0,
) -> Tensor:
    """Algorithm 2 of Karras et al. (2022) in the manner of its authors: they draw at every step, churn or not.

    States are float64, the noise levels tensors without axes, and the last step has no second stage. Beside the
    authors' function, with churn and without, it gave the same numbers to the last bit.
    """
    ends = 80 ** (1 / 7), 0.002 ** (1 / 7)
    part = torch.arange(num_steps, dtype=torch.float64) / (num_steps - 1)
    levels = torch.cat([net.round_sigma((ends[0] + part * (ends[1] - ends[0])) ** 7), torch.zeros(1)])
    x = latents.to(torch.float64) * levels[0]
    for i in range(num_steps):
        here, after = levels[i], levels[i + 1]
        raised = net.round_sigma(here + min(S_churn / num_steps, np.sqrt(2) - 1) * here)
        start = x + (raised**2 - here**2).sqrt() * S_noise * randn_like(x)
        slope = (start - net(start, raised, class_labels).to(torch.float64)) / raised
        x = start + (after - raised) * slope
        if i < num_steps - 1:
            second = (x - net(x, after, class_labels).to(torch.float64)) / after
            x = start + (after - raised) * (0.5 * slope + 0.5 * second)
    return x
