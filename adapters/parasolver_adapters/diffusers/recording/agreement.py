"""Whether two ways to the same values gave the same, but for rounding."""

from __future__ import annotations

import math
from typing import Any

import torch


def apart(got: Any, want: torch.Tensor) -> float:
    """The largest difference, over the largest value; what is not finite is equal to itself."""
    if not isinstance(got, torch.Tensor) or got.shape != want.shape:
        return math.inf
    if torch.equal(got, want):
        return 0.0
    dtype = torch.promote_types(torch.promote_types(got.dtype, want.dtype), torch.float32)
    got, want = got.to(dtype), want.to(dtype)
    same = (got == want) | (got.isnan() & want.isnan())
    difference = float(torch.where(same, 0, (got - want).abs()).max())
    size = float(torch.where(want.isfinite(), want, 0).abs().max())
    return difference / size if size else difference and math.inf


def rounding(dtype: torch.dtype) -> float:
    """The same operations on the same numbers differ by rounding at most."""
    return torch.finfo(dtype).eps ** 0.75 if dtype.is_floating_point else 0.0
