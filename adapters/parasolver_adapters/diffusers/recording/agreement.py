"""Whether two ways to the same values gave the same, but for rounding."""

from __future__ import annotations

import math
from typing import Any

import torch


def apart(one: Any, other: torch.Tensor) -> float:
    """The largest difference, over the largest value; what is not finite is equal to itself."""
    if not isinstance(one, torch.Tensor) or one.shape != other.shape:
        return math.inf
    if torch.equal(one, other):
        return 0.0
    dtype = torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32)
    one, other = one.to(dtype), other.to(dtype)
    same = (one == other) | (one.isnan() & other.isnan())
    difference = float(torch.where(same, 0, (one - other).abs()).max())
    size = float(torch.where(other.isfinite(), other, 0).abs().max())
    return difference / size if size else difference and math.inf


def rounding(dtype: torch.dtype) -> float:
    """The same operations on the same numbers differ by rounding at most."""
    return torch.finfo(dtype).eps ** 0.75 if dtype.is_floating_point else 0.0
