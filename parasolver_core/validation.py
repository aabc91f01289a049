"""Arguments refused at the front door: each error names the argument, what was got and what to do."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import array_api_compat
import numpy as np
from numpy.typing import ArrayLike, NDArray

from parasolver_core.arrays import Array, is_array, to_host

T = TypeVar("T")
_NORMAL, _SCALE, _ENOUGH = (0.5, 2.0), 2.0, 16  # the RMS of standard normal noise; times as much wanted; numbers
_LOUD = 20.0  # times the noise wanted


def check_start(x_T: Array) -> None:
    """``x_T`` is a floating-point array ``(batch, *event)`` with at least one sample, all finite."""
    check_plain("x_T", x_T)
    if not is_array(x_T):
        raise TypeError(f"x_T: expected an array (NumPy, torch, ...), got {type(x_T).__name__}")
    xp: Any = array_api_compat.array_namespace(x_T)
    if not xp.isdtype(x_T.dtype, "real floating"):
        raise TypeError(f"x_T: expected a floating-point array, got dtype {x_T.dtype}; convert it first")
    check_width("x_T:", x_T)
    if xp.finfo(x_T.dtype).bits > 64:
        raise TypeError(f"x_T: expected at most 64 bits, got dtype {x_T.dtype}; convert it to float64 first")
    if x_T.ndim < 1 or 0 in x_T.shape:
        raise ValueError(
            f"x_T: expected shape (batch, *event) with no empty axis, got {tuple(x_T.shape)}; "
            "for a single sample add a first axis of length 1"
        )
    if not _read("x_T", x_T, lambda: bool(xp.all(xp.isfinite(x_T)))):
        raise ValueError("x_T: holds NaN or infinity; start from finite noise")


def _read(name: str, array: Array, read: Callable[[], T]) -> T:
    """What is read of an array's numbers; refused where its device holds none."""
    try:
        return read()
    except RuntimeError as error:
        if str(array_api_compat.device(array)) != "meta":
            raise
        raise TypeError(f"{name}: expected numbers, got a tensor on the device meta, which holds none") from error


def check_plain(name: str, value: Any, *, native: bool = True) -> None:
    """An array whose numbers lie in memory as they are: nothing masked, sparse, nested or without data.

    Anything else than an array of NumPy or PyTorch passes.

    Args:
        name: of the argument.
        value: to be looked at.
        native: refuse other byte orders than the machine's.
    """
    if isinstance(value, np.ndarray):
        _check_plain_numpy(name, value, native)
    elif array_api_compat.is_torch_array(value):
        _check_plain_torch(name, value)


def _check_plain_numpy(name: str, value: NDArray[Any], native: bool) -> None:
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name}: expected a plain array, got a masked one, and the solver would not see its mask; give "
            "masked.filled(value)"
        )
    if type(value) not in (np.ndarray, np.memmap):  # others have an arithmetic of their own, such as np.matrix
        raise TypeError(
            f"{name}: expected a plain array, got the subclass {type(value).__name__}, whose own arithmetic the solver "
            "does not follow; give np.asarray(array)"
        )
    if native and not value.dtype.isnative:
        raise TypeError(
            f"{name}: expected numbers in this machine's byte order, got dtype {value.dtype}; give "
            "array.astype(array.dtype.newbyteorder('='))"
        )


def _check_plain_torch(name: str, value: Any) -> None:
    kind, module = type(value).__name__, type(value).__module__.partition(".")[0]
    if value.is_nested:
        raise TypeError(f"{name}: expected a plain tensor, got a nested one; give tensor.to_padded_tensor(value)")
    if str(value.layout) != "torch.strided":
        raise TypeError(f"{name}: expected a plain tensor, got the layout {value.layout}; give tensor.to_dense()")
    plain = module == "torch" and kind in ("Tensor", "Parameter", "Buffer")
    device_of_its_own = kind != "MaskedTensor" and "__torch_dispatch__" in vars(type(value))  # below the arithmetic
    if not plain and not device_of_its_own:
        raise TypeError(
            f"{name}: expected a plain tensor, got the subclass {kind}, whose own arithmetic the solver does not "
            "follow; give tensor.as_subclass(torch.Tensor), or what it holds as a tensor"
        )


def check_scale(x_T: Array, scale: float) -> None:
    """Warn of a start that is standard normal noise where it has to be larger, or that is far larger than noise.

    Only where that is sure: far more noise is wanted, and enough numbers are near 1 in size.

    Args:
        x_T: the start.
        scale: of the noise that is wanted; NaN: unknown.
    """
    if math.isnan(scale):
        return
    xp: Any = array_api_compat.array_namespace(x_T)
    x_T = xp.astype(x_T, xp.float64 if x_T.dtype == xp.float64 else xp.float32)
    largest = float(xp.max(xp.abs(x_T)))  # whose square may be out of range
    size = largest * float(xp.sqrt(xp.mean((x_T / largest) ** 2))) if largest > 0 else 0.0
    if size > _LOUD * scale:
        warnings.warn(
            f"x_T: has an RMS of {size:.3g}, far larger than the noise of {scale:.4g} that this schedule begins with; "
            "the tolerance is a share of data that are not much smaller than the noise",
            stacklevel=2,
        )
    wanted = scale >= _SCALE * _NORMAL[1] and math.prod(x_T.shape) >= _ENOUGH
    if wanted and _NORMAL[0] <= size <= _NORMAL[1]:
        warnings.warn(
            f"x_T: has an RMS of {size:.3g}, as standard normal noise, and this schedule begins with noise of "
            f"{scale:.4g}; give noise * schedule.init_noise_sigma",
            stacklevel=2,
        )


def check_width(name: str, array: Array) -> None:
    """Floating-point numbers that can be calculated with: 16 bits and more."""
    xp: Any = array_api_compat.array_namespace(array)
    if xp.finfo(array.dtype).bits < 16:
        raise TypeError(f"{name} expected at least 16 bits, got dtype {array.dtype}; convert it to float32 first")


def check_timesteps(timesteps: ArrayLike) -> NDArray[Any]:
    """Timesteps as a host array: 1-D, not empty, real, finite. Which orders make sense, the step rule knows."""
    check_plain("timesteps", timesteps, native=False)
    try:
        grid = (
            _read("timesteps", timesteps, lambda: to_host(timesteps)) if is_array(timesteps) else np.asarray(timesteps)
        )
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


def own_numbers(holder: Any, *names: str) -> None:
    """Fields with NumPy's numbers get Python's: 8 or 64 bits without a sign, or half precision, are no arithmetic."""
    for name in names:
        value = getattr(holder, name)
        if isinstance(value, np.generic):
            object.__setattr__(holder, name, int(value) if isinstance(value, np.integer) else float(value))


def own_floats(holder: Any, *names: str) -> None:
    """Fields with real numbers, maybe NumPy's or a tensor without axes, get Python's."""
    for name in names:
        object.__setattr__(holder, name, as_float(name, getattr(holder, name)))


def as_float(name: str, value: Any) -> float:
    """A real number, maybe NumPy's or a tensor without axes, as Python's; else refused."""
    try:
        if isinstance(value, (bool, np.bool_, str)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None


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
    if tolerance >= 1:
        raise ValueError(
            f"tolerance: expected less than 1, which is a sample as far off as it is large, got {tolerance}; for "
            f"{tolerance:g} % give {tolerance / 100:g}"
        )
