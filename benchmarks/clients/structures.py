"""Structure heads."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.clients.table import Client, Run
from benchmarks.structure_head import small_esmfold2, structures
from parasolver_adapters.structures import align, parallel_esmfold2


def structure_heads() -> Iterator[Client]:
    """Compared after rigid alignment; ESMFold2's own sampler is without noise, AlphaFold3's with churn."""
    if not importlib.util.find_spec("transformers") or not importlib.util.find_spec("transformers.models.esmfold2"):
        return
    own = {"noise_scale": 0.0, "step_scale": 1.0, "gamma_0": 0.605, "gamma_min": 1.107}
    for name, steps, options in (
        ("ESMFold2", 68, own),
        ("AlphaFold3's sampler", 68, {}),
        ("AlphaFold3's sampler", 200, {}),
    ):
        model = small_esmfold2(**options)
        calls = len(model._build_noise_schedule(steps, torch.device("cpu"))[0]) - 1

        def plain(model: Any = model, steps: int = steps) -> Tensor:
            sample = structures(parallel_esmfold2(model, 1), steps)
            return sample - sample.mean(1, keepdim=True)

        def ours(tolerance: float, model: Any = model, steps: int = steps, plain: Any = plain) -> Run:
            fold = parallel_esmfold2(model, 64, tolerance=tolerance)
            return align(structures(fold, steps), plain()), fold.solution

        yield Client(f"structure head, {name}, {steps} steps", 2, calls, 64, plain, ours)
