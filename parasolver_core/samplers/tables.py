"""What the tables of a sampler have to be, and what follows of one from the others."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from parasolver_core.arrays import is_array, to_host

Float64 = NDArray[np.float64]

_COLUMNS = {"a": (None,), "b": (None,), "held": (2,)}  # of the others there are none; None: any number
_CANCELS = 0.01  # what is left of what a step reads of the network, as a share; published samplers leave over a tenth


def own_table(name: str, given: Any) -> NDArray[Any]:
    """A list, or an array of another library, as NumPy's: float64, but for the timesteps."""
    table = to_host(given) if is_array(given) else np.asarray(given)
    if not np.issubdtype(table.dtype, np.integer) and not np.issubdtype(table.dtype, np.floating):
        raise TypeError(f"{name}: expected real numbers, got dtype {table.dtype}")
    return table if name == "timesteps" else table.astype(np.float64, copy=False)


def check_table(name: str, table: NDArray[Any], timesteps: NDArray[Any]) -> None:
    """Refuse a table of another shape, what is not finite, and what is no sampler's."""
    n, columns = len(timesteps), _COLUMNS.get(name, ())
    if columns == (None,) and table.ndim != 2:
        asked = f"a column for each node that a step reads, shape ({n}, P)"
        raise ValueError(f"{name}: expected {asked}, got {table.shape}")
    shape = (n, table.shape[1]) if columns == (None,) else (n, *columns)
    if table.shape != shape:
        raise ValueError(f"{name}: expected shape {shape} for {n} timesteps, got {table.shape}")
    if not np.all(np.isfinite(table)):
        row = int(np.argmin(np.isfinite(table).reshape(n, -1).all(axis=1)))
        raise ValueError(
            f"{name}: coefficient of step {row} (timestep {timesteps[row]}) is not finite; the step rule is not "
            "defined there (for example epsilon prediction where alphas_cumprod is 0)"
        )
    if name == "held" and np.any(table[:, 1] == 0):
        raise ValueError(f"held: q is 0 at step {int(np.argmin(np.abs(table[:, 1])))}; expected other values")
    if columns == (None,) and np.any(np.triu(table, 1)):
        raise ValueError(f"{name}: step i may use the states and outputs 0..i only (zero where k > i)")


def identity_slope(a: Float64, b: Float64, p: Float64, q: Float64) -> Float64:
    """The slope of each step's network, equal in terms of the held quantity, that makes the step's Jacobian 1.

    With ``p x + q m`` of slope g at all nodes that a step reads, ``sum_k a + sum_k b (g - p) / q = 1`` gives
    g. NaN where a step does not depend on the network, or what it reads cancels: g would be no one's slope.
    """
    node = np.maximum(np.arange(len(b))[:, None] - np.arange(b.shape[1]), 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        reads = b / q[node]
        g = (1 - a.sum(axis=1) + (b * (p / q)[node]).sum(axis=1)) / reads.sum(axis=1)
    cancels = np.abs(reads.sum(axis=1)) < _CANCELS * np.abs(reads).sum(axis=1)
    return (np.where(cancels, np.nan, g) - p) / q


def identity_slope_or(slope: Float64, a: Float64, b: Float64, held: Float64) -> Float64:
    """:func:`identity_slope` of the steps that have one, and of the others ``slope``."""
    found = identity_slope(a, b, held[:, 0], held[:, 1])
    return np.where(np.isfinite(found), found, slope)


def in_held(a: Float64, b: Float64, held: Float64) -> tuple[Float64, Float64]:
    """``(a, b)`` with the held quantity ``h = p x + q m`` in the place of m, without columns that are 0 everywhere."""
    n, width = len(a), max(a.shape[1], b.shape[1])
    a, b = (np.pad(table, ((0, 0), (0, width - table.shape[1]))) for table in (a, b))
    node = np.maximum(np.arange(n)[:, None] - np.arange(width), 0)  # b is 0 where this would be below 0
    p, q = held[node, 0], held[node, 1]
    of_outputs = b * p / q
    left = a - of_outputs
    rounding = 4 * np.finfo(np.float64).eps * (np.abs(a) + np.abs(of_outputs))
    return trim(np.where(np.abs(left) <= rounding, 0.0, left)), trim(b / q)  # else earlier states are read for nothing


def trim(table: Float64) -> Float64:
    """Without the trailing columns that are zero everywhere; the first is kept."""
    used = np.flatnonzero(np.any(table, axis=0))
    return table[:, : (used[-1] + 1 if used.size else 1)]
