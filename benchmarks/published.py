"""Public samplers to compare with, imported without what their packages need for training, or written anew."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def k_diffusion() -> Any:
    """``k_diffusion.sampling``, or None without the package."""
    return _module("k_diffusion", "sampling")


def denoising_diffusion(module: str = "denoising_diffusion_pytorch") -> Any:
    """A module of ``denoising_diffusion_pytorch``, or None without the package; ``Trainer`` is of no use in it."""
    training = {"accelerate": {"Accelerator": object}, "ema_pytorch": {"EMA": object}}
    return _module("denoising_diffusion_pytorch", module, training)


def torchcfm() -> Any:
    """``torchcfm.conditional_flow_matching``, or None without the package; with the one optimal transport it asks for.

    Between as many points as there are on the other side, all of one weight, the exact plan is an assignment.
    """

    def plan(a: Any, b: Any, cost: Any, **options: Any) -> Any:
        return np.eye(len(a))[linear_sum_assignment(cost)[1]] / len(a)

    transport = {"emd": plan, "unif": lambda count: np.full(count, 1 / count)}
    return _module("torchcfm", "conditional_flow_matching", {"ot": transport})


def _module(package: str, name: str, stand_ins: Mapping[str, Mapping[str, Any]] | None = None) -> Any:
    """A module of a package that is installed without what it depends on.

    Args:
        package: which is not initialized itself, as that imports all of it.
        name: of the module.
        stand_ins: modules that it imports, unless they are installed, and what is in them.
    """
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None:
            return None
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = list(spec.submodule_search_locations or ())
    missing = {one: names for one, names in (stand_ins or {}).items() if importlib.util.find_spec(one) is None}
    for one, names in missing.items():
        sys.modules[one] = ModuleType(one)
        vars(sys.modules[one]).update(names)
    try:
        return importlib.import_module(f"{package}.{name}")
    finally:
        for one in missing:  # others ask whether they are installed
            del sys.modules[one]


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
