"""Sums of squares of numbers whose squares are below the range of their dtype: in float32, of less than 1e-19.

Such a sum is 0 where nothing is. A move of which it is the measure would then be final, whatever it is worth.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parasolver_core.arrays import Array, to_host

Float64 = NDArray[np.float64]

_TINY = float(np.finfo(np.float64).tiny)


@functools.lru_cache(maxsize=64)
def lowest(size: int, dtype: Any) -> float:
    """A smaller sum of so many squares may have lost some of them."""
    limits = np.finfo(dtype)
    return size * float(limits.tiny) / float(limits.eps)


def sums_of_squares(rows: NDArray[Any]) -> Float64:
    """Along the last axis of NumPy rows: those that may have lost something are summed again, by their own scale."""
    sums = np.asarray(np.vecdot(rows, rows).astype(np.float64))
    again = sums < lowest(rows.shape[-1], rows.dtype)
    if again.any():
        few = rows[again].astype(np.float64)
        scale = np.max(np.abs(few), axis=-1, keepdims=True)
        share = few / np.where(scale > 0, scale, 1.0)
        sums[again] = np.where(scale > 0, np.maximum(np.vecdot(share, share)[..., None] * scale**2, _TINY), 0.0)[..., 0]
    return sums


def at_most(sums: Float64, xp: Any, rows: Array) -> Float64:
    """Sums of squares (..) of rows (.., size), made on a device; those that may have lost something: what they can be.

    That takes the rows' largest elements, which are only then brought to the host.
    """
    few = _lost(sums, xp, rows)
    if not few.any():
        return sums
    most = _largest(xp, rows)
    return np.where(few, np.where(most > 0, np.maximum(rows.shape[-1] * most**2, _TINY), 0.0), sums)


def at_least(lengths: Float64, xp: Any, rows: Array) -> Float64:
    """Lengths (..) of rows (.., size), made on a device; where their squares may have lost something: what they surely
    are."""
    few = _lost(lengths**2, xp, rows)
    return np.where(few, np.maximum(lengths, _largest(xp, rows)), lengths) if few.any() else lengths


def _lost(sums: Float64, xp: Any, rows: Array) -> NDArray[np.bool_]:
    return sums < _lowest_of(xp, rows.shape[-1], rows.dtype)


@functools.lru_cache(maxsize=64)
def _lowest_of(xp: Any, size: int, dtype: Any) -> float:
    """:func:`lowest`, for a dtype of the library."""
    return lowest(size, f"f{xp.finfo(dtype).bits // 8}")


def _largest(xp: Any, rows: Array) -> Float64:
    """The largest elements of rows, on the host."""
    return to_host(xp.linalg.vector_norm(rows, axis=-1, ord=float("inf"))).astype(np.float64)
