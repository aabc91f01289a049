"""The few array operations that the array API standard leaves open."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import array_api_compat
import numpy as np
from numpy.typing import NDArray

Array = Any  # an array of any library that array-api-compat knows


def is_array(value: Any) -> bool:
    """Whether ``value`` is an array of a library that array-api-compat knows."""
    return bool(array_api_compat.is_array_api_obj(value))


def to_host(array: Array) -> NDArray[Any]:
    """``array`` as NumPy's, on a CPU perhaps in the same memory; waits for the device."""
    if array_api_compat.is_torch_array(array):
        return array.detach().cpu().numpy()
    if array_api_compat.is_cupy_array(array):
        return array.get()
    if array_api_compat.is_array_api_strict_namespace(array_api_compat.array_namespace(array)):
        xp: Any = array_api_compat.array_namespace(array)  # has several devices, to try them without one
        array = array_api_compat.to_device(array, xp.__array_namespace_info__().default_device())
    return np.asarray(array)


def host_view(array: Array) -> Array:
    """The same memory as a NumPy array, whose calls cost least on a CPU; where NumPy cannot work in it, ``array``."""
    if array_api_compat.is_torch_array(array) and array.device.type == "cpu" and array.element_size() >= 4:
        return array.detach().numpy()
    return array


def own_copy(xp: Any, array: Array) -> Array:
    """A copy in new memory; on a CPU that is NumPy's, which asks for large pages: many times as fast for large ones."""
    view = host_view(array)
    return copied(xp, array) if view is array else given_back(xp, np.array(view))


def copied(xp: Any, array: Array) -> Array:
    """A copy on the same device, whichever is the library's default."""
    return xp.asarray(array, copy=True, device=array_api_compat.device(array))


def given_back(xp: Any, view: Array) -> Array:
    """What :func:`host_view` made, as an array of the library, in the same memory; not on its default device."""
    if array_api_compat.is_torch_namespace(xp) and isinstance(view, np.ndarray):
        return xp.from_numpy(view)
    return xp.asarray(view, device=array_api_compat.device(view))


def finite_rows(xp: Any, rows: Array) -> NDArray[np.bool_]:
    """Which rows of ``(rows, *event)`` hold neither NaN nor infinity, on the host."""
    return to_host(xp.all(xp.reshape(xp.isfinite(rows), (rows.shape[0], -1)), axis=1))


def assign(target: Array, index: Any, value: Array) -> Array:
    """``target[index] = value``; returns the array to go on with (a new one where arrays are immutable, as in JAX)."""
    if array_api_compat.is_jax_array(target):
        return target.at[index].set(value)
    target[index] = value
    return target


def increment(target: Array, index: Any, value: Array) -> Array:
    """``target[index] += value`` for a slice or integer index; returns the array to go on with."""
    if array_api_compat.is_jax_array(target):
        return target.at[index].add(value)
    view = target[index]
    view += value
    return target


def detach(array: Array) -> Array:
    """The same values without a history of gradients."""
    return array.detach() if array_api_compat.is_torch_array(array) else array


def narrow(xp: Any, values: Array, dtype: Any) -> Array:
    """``values`` as ``dtype``; what is beyond its range becomes its largest finite value."""
    if values.dtype == dtype:
        return values
    largest = float(xp.finfo(dtype).max)
    return xp.astype(xp.clip(values, -largest, largest), dtype)


def working_dtype(xp: Any, dtype: Any) -> Any:
    """The dtype of states and sums: at least float32, whatever the network's is."""
    return dtype if xp.finfo(dtype).bits >= 32 else xp.float32


def no_grad(xp: Any) -> Any:
    """A context in which the library records no gradients; does nothing where there are none."""
    return xp.no_grad() if array_api_compat.is_torch_namespace(xp) else nullcontext()
