"""Arguments refused at the front door: each error names the argument, what was got and what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import array_api_compat
import numpy as np
from numpy.typing import ArrayLike, NDArray

from parasolver_core.arrays import Array, is_array, to_host


def check_start(x_T: Array) -> None:
    """``x_T`` is a floating-point array ``(batch, *event)`` with at least one sample, all finite."""
    if not is_array(x_T):
        raise TypeError(f"x_T: expected an array (NumPy, torch, ...), got {type(x_T).__name__}")
    xp: Any = array_api_compat.array_namespace(x_T)
    if not xp.isdtype(x_T.dtype, "real floating"):
        raise TypeError(f"x_T: expected a floating-point array, got dtype {x_T.dtype}; convert it first")
    if x_T.ndim < 1 or 0 in x_T.shape:
        raise ValueError(
            f"x_T: expected shape (batch, *event) with no empty axis, got {tuple(x_T.shape)}; "
            "for a single sample add a first axis of length 1"
        )
    if not bool(xp.all(xp.isfinite(x_T))):
        raise ValueError("x_T: holds NaN or infinity; start from finite noise")


def check_timesteps(timesteps: ArrayLike) -> NDArray[Any]:
    """Timesteps as a host array: 1-D, not empty, real, finite. Which orders make sense, the step rule knows."""
    try:
        grid = to_host(timesteps) if is_array(timesteps) else np.asarray(timesteps)
    except TypeError as error:  # bfloat16, which NumPy does not have and which cannot tell timesteps apart
        raise TypeError(f"timesteps: expected integers, float32 or float64, got {error}") from error
    if grid.ndim != 1 or grid.size == 0:
        raise ValueError(
            f"timesteps: expected a non-empty 1-D sequence, got shape {grid.shape}; try schedule.timesteps(50)"
        )
    if not (np.issubdtype(grid.dtype, np.integer) or np.issubdtype(grid.dtype, np.floating)):
        raise TypeError(f"timesteps: expected integers or floats, got dtype {grid.dtype}")
    if not np.all(np.isfinite(grid)):
        at = int(np.argmin(np.isfinite(grid)))
        raise ValueError(f"timesteps: expected finite values, got {grid[at]} at index {at}")
    return grid


def check_monotone(grid: NDArray[Any]) -> None:
    """Timesteps are strictly monotone."""
    steps = np.diff(grid.astype(np.float64))
    if np.any(steps == 0):
        at = int(np.argmax(steps == 0))
        raise ValueError(
            f"timesteps: expected no duplicates, got {grid[at]} at index {at} and {at + 1}; use fewer steps"
        )
    if steps.size and not (np.all(steps < 0) or np.all(steps > 0)):
        at = int(np.argmax(np.sign(steps) != np.sign(steps[0])))
        raise ValueError(
            f"timesteps: expected a sorted sequence, got {grid[at]} then {grid[at + 1]} at index {at}; sort it "
            "from noise to data"
        )


def check_count(name: str, value: Any, *, minimum: int = 1, optional: bool = False) -> None:
    """An integer of at least ``minimum`` (or None)."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer of at least {minimum}, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name}: expected an integer of at least {minimum}, got {value}")


def check_counts(name: str, values: Any) -> None:
    """A sequence, maybe empty, of integers of at least 1."""
    if not isinstance(values, (Sequence, np.ndarray)) or isinstance(values, str):
        raise TypeError(f"{name}: expected a sequence of integers of at least 1, such as (1, 4, 16), got {values!r}")
    for value in values:
        check_count(name, value)


def check_tolerance(tolerance: Any) -> None:
    """A finite number of at least 0."""
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float, np.floating, np.integer)):
        raise TypeError(f"tolerance: expected a number of at least 0, got {tolerance!r}")
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance: expected a finite number of at least 0 (0 means exact), got {tolerance}")
