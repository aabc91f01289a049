"""Sums of squares of numbers whose squares are below the range of their dtype: in float32, of less than 1e-19.

Such a sum is 0 where nothing is. A move of which it is the measure would then be final, whatever it is worth.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from parasolver_core.arrays import Array

Float64 = NDArray[np.float64]

_TINY = float(np.finfo(np.float64).tiny)


def lowest(size: int, dtype: Any) -> float:
    """A smaller sum of so many squares may have lost some of them."""
    limits = np.finfo(dtype)
    return size * float(limits.tiny) / float(limits.eps)


def sums_of_squares(rows: NDArray[Any]) -> Float64:
    """Along the last axis of NumPy rows: those that may have lost something are summed again, by their own scale."""
    sums = np.array(np.vecdot(rows, rows), dtype=np.float64)
    again = sums < lowest(rows.shape[-1], rows.dtype)
    if np.any(again):
        few = rows[again].astype(np.float64)
        scale = np.max(np.abs(few), axis=-1, keepdims=True)
        share = few / np.where(scale > 0, scale, 1.0)
        sums[again] = np.where(scale > 0, np.maximum(np.vecdot(share, share)[..., None] * scale**2, _TINY), 0.0)[..., 0]
    return sums


def largest(xp: Any, rows: Array) -> Array:
    """The size of the largest element along the last axis, for :func:`at_most`."""
    return xp.linalg.vector_norm(rows, axis=-1, ord=float("inf"))


def at_most(sums: Float64, largest: Float64, size: int, dtype: Any) -> Float64:
    """Sums of ``size`` squares, made on a device; those that may have lost something are the most that they can be."""
    most = np.where(largest > 0, np.maximum(size * largest**2, _TINY), 0.0)
    return np.where(sums < lowest(size, dtype), most, sums)
