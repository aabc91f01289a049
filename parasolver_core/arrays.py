"""The few array operations that the array API standard leaves open."""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, ParamSpec, TypeVar

import array_api_compat
import numpy as np
from numpy.typing import NDArray

Array = Any  # an array of any library that array-api-compat knows
P = ParamSpec("P")
R = TypeVar("R")

_SINGLE, _TF32, _BFLOAT16 = 24, 11, 8  # significant bits


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, which ``torch.compile`` leaves out of its graphs where it meets it, with all that it calls.

    A network that was compiled by itself stays compiled inside.
    """

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        dynamo = sys.modules.get("torch._dynamo")  # not there: nothing is being compiled
        return function(*args, **kwargs) if dynamo is None else dynamo.disable(function)(*args, **kwargs)

    called._torchdynamo_disable = True  # type: ignore[attr-defined]
    return called


def is_array(value: Any) -> bool:
    """Whether ``value`` is an array of a library that array-api-compat knows."""
    return bool(array_api_compat.is_array_api_obj(value))


def to_host(array: Array) -> NDArray[Any]:
    """``array`` as NumPy's, on a CPU perhaps in the same memory; waits for the device."""
    if array_api_compat.is_torch_array(array):
        return array.detach().cpu().resolve_neg().numpy()
    if array_api_compat.is_cupy_array(array):
        return array.get()
    if array_api_compat.is_array_api_strict_namespace(array_api_compat.array_namespace(array)):
        xp: Any = array_api_compat.array_namespace(array)  # has several devices, to try them without one
        array = array_api_compat.to_device(array, xp.__array_namespace_info__().default_device())
    return np.asarray(array)


def host_view(array: Array) -> Array:
    """The same memory as a NumPy array, whose calls cost least on a CPU; where NumPy cannot work in it, ``array``.

    Of the negative of other memory, as PyTorch has it for imaginary parts of conjugates, a copy.
    """
    if array_api_compat.is_torch_array(array) and array.device.type == "cpu" and array.element_size() >= 4:
        return array.detach().resolve_neg().numpy()
    return array


def own_copy(xp: Any, array: Array) -> Array:
    """A copy in new memory; on a CPU that is NumPy's, which asks for large pages: many times as fast for large ones."""
    view = host_view(array)
    return copied(xp, array) if view is array else given_back(xp, np.array(view))


def copied(xp: Any, array: Array) -> Array:
    """A copy on the same device, whichever is the library's default."""
    if isinstance(array, np.ndarray):
        return array.copy()
    return xp.asarray(array, copy=True, device=array_api_compat.device(array))


def given_back(xp: Any, view: Array) -> Array:
    """What :func:`host_view` made, as an array of the library, in the same memory; not on its default device."""
    if isinstance(view, np.ndarray):
        if array_api_compat.is_numpy_namespace(xp):
            return view
        if array_api_compat.is_torch_namespace(xp):
            return xp.from_numpy(view)
    return xp.asarray(view, device=array_api_compat.device(view))


def finite_rows(xp: Any, rows: Array) -> NDArray[np.bool_]:
    """Which rows of ``(rows, *event)`` hold neither NaN nor infinity, on the host."""
    return to_host(xp.all(xp.reshape(xp.isfinite(rows), (rows.shape[0], math.prod(rows.shape[1:]))), axis=1))


def coarse(xp: Any, row: Array) -> Array:
    """``[unit]``: float32's rounding unit where float64 numbers (size,) are all float32's, else 0.

    Numbers of a few bits only, such as the 1 and -1 of a saturated network, tell nothing.
    """
    if row.dtype != xp.float64:
        return xp.zeros_like(row[:1])
    short = xp.astype(row, xp.float32)
    wide = short * 4097.0  # Dekker: the leading 12 bits
    single = xp.all(xp.astype(short, row.dtype) == row) & xp.any(wide - (wide - short) != short)
    return xp.astype(xp.reshape(single, (1,)), row.dtype) * float(xp.finfo(xp.float32).eps)


def matmul(xp: Any, a: Array, b: Array) -> Array:
    """``a @ b`` in the full precision of their dtype, whatever a user has allowed for a network's products.

    Where float32 factors would be rounded to fewer bits (TF32), they are split into parts that have no more, whose
    products are exact: no setting is touched, which other threads and compiled code would see.
    """
    if isinstance(a, np.ndarray):
        return a @ b
    if array_api_compat.is_jax_array(a):
        return xp.matmul(a, b, precision="highest")
    bits = _product_bits(xp, a)
    if bits == _SINGLE:
        return xp.matmul(a, b)
    count = -(-(_SINGLE - 2) // bits)  # the last two bits of TF32's 11 + 11 are no more than sums lose
    left, right = _parts(xp, a, bits, count), _parts(xp, b, bits, count)
    total = None
    for i in reversed(range(count)):
        for j in reversed(range(count - i)):  # the smallest first
            product = xp.matmul(left[i], right[j])
            total = product if total is None else total + product
    return total


def vecdot(xp: Any, a: Array, b: Array) -> Array:
    """Inner products along the last axis, in the full precision of their dtype."""
    if isinstance(a, np.ndarray):
        return np.vecdot(a, b)
    if array_api_compat.is_jax_array(a):
        return xp.vecdot(a, b, precision="highest")
    return xp.linalg.vecdot(a, b)  # for PyTorch many times as fast as xp.vecdot, a batch of matrix products


def lengths(xp: Any, rows: Array) -> Array:
    """Roots of the sums of squares along the last axis; one operation on a device."""
    return np.sqrt(np.vecdot(rows, rows)) if isinstance(rows, np.ndarray) else xp.linalg.vector_norm(rows, axis=-1)


def gram(xp: Any, rows: Array) -> Array:
    """Inner products of the rows (.., n, size) with each other, (.., n, n)."""
    # of a matrix with itself NumPy makes another product, which takes twice the time where matrices are small
    other = rows.copy() if isinstance(rows, np.ndarray) else rows
    return matmul(xp, rows, xp.matrix_transpose(other))


def plus_product(total: Array, a: Array, b: Array) -> Array:
    """``total + a * b``, where arrays are mutable in the memory of the first; for PyTorch one operation."""
    if array_api_compat.is_torch_array(total):
        return total.addcmul_(a, b)
    total += a * b
    return total


def _product_bits(xp: Any, array: Array) -> int:
    """Significant bits to which a library may round the float32 factors of a matrix product."""
    if array_api_compat.is_torch_array(array) and array.dtype == xp.float32:
        return _torch_bits(sys.modules["torch"])
    if array_api_compat.is_cupy_array(array) and array.dtype == xp.float32:
        return _TF32 if os.environ.get("CUPY_TF32") == "1" else _SINGLE
    return _SINGLE


def _torch_bits(torch: Any) -> int:
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # set in the newer way: by backend and operation
        return _TF32
    newer = {getattr(place, "fp32_precision", "none") for place in (torch.backends, torch.backends.cuda.matmul)}
    if precision == "medium" or "bf16" in newer:
        return _BFLOAT16
    return _TF32 if precision != "highest" or "tf32" in newer else _SINGLE


def _parts(xp: Any, array: Array, bits: int, count: int) -> list[Array]:
    """Arrays of so many significant bits each, whose sum is the array."""
    parts, mask, half = [], -1 << (_SINGLE - bits), 1 << (_SINGLE - bits - 1)
    for _ in range(count):
        part = ((array.view(xp.int32) + half) & mask).view(xp.float32)
        parts.append(part)
        array = array - part
    return parts


def assign(target: Array, index: Any, value: Array) -> Array:
    """``target[index] = value``; returns the array to go on with (a new one where arrays are immutable, as in JAX)."""
    if array_api_compat.is_jax_array(target):
        return target.at[index].set(value)
    target[index] = value
    return target


def integers(xp: Any) -> Any:
    """The integers of a library's own indices: int64, or what it has in its place, as JAX in its 32-bit mode."""
    return xp.__array_namespace_info__().default_dtypes()["indexing"]


def take_rows(rows: Array, index: NDArray[np.int64]) -> Array:
    """``rows[index]`` of the first axis."""
    return take_at(rows, put_index(rows, index))


def put_index(rows: Array, index: NDArray[np.int64]) -> Array:
    """An index on the device of the rows."""
    if isinstance(rows, np.ndarray):
        return index
    return uploaded(array_api_compat.array_namespace(rows), index, array_api_compat.device(rows))


def uploaded(xp: Any, values: NDArray[Any], where: Any, dtype: Any = None) -> Array:
    """Host numbers as an array on a device, which the host does not wait for.

    PyTorch copies pageable memory only once a card has done all that it was given before; pinned memory it does not
    wait for, and does not use again before the copy is done.
    """
    if array_api_compat.is_numpy_namespace(xp):
        return values if dtype is None else values.astype(dtype, copy=False)
    if not (array_api_compat.is_torch_namespace(xp) and _is_card(where)):
        return xp.asarray(values, dtype=dtype, device=where)
    here = xp.asarray(values, dtype=dtype, device="cpu")
    return here.pin_memory().to(where, non_blocking=True)


def uploaded_together(xp: Any, tables: Sequence[NDArray[Any]], where: Any) -> list[Array]:
    """Tables of one dtype by one :func:`uploaded`, as views of one array; NumPy's stay as they are."""
    if array_api_compat.is_numpy_namespace(xp):
        return list(tables)
    flat = uploaded(xp, np.concatenate([table.reshape(-1) for table in tables]), where)
    ends = np.cumsum([table.size for table in tables]).tolist()
    return [xp.reshape(flat[end - t.size : end], t.shape) for t, end in zip(tables, ends, strict=True)]


def _is_card(device: Any) -> bool:
    return device.type == "cuda"


class DeviceTable:
    """Numbers of the host, brought to each device and dtype that asks for them once.

    So a call that reads them does not wait, and can be captured as a CUDA graph.

    Args:
        values: the numbers, as an array in any shape.
    """

    __slots__ = ("_there", "_values")  # what it has made is no part of what it is, for a key of a network's costs

    def __init__(self, values: NDArray[Any]) -> None:
        self._values = np.array(values)  # PyTorch warns of arrays that cannot be written to
        self._there: dict[Any, Array] = {}

    def __len__(self) -> int:
        return len(self._values)

    def like(self, x: Array, dtype: Any = None) -> Array:
        """On the device of ``x``, in its dtype or another; not to be changed."""
        dtype = x.dtype if dtype is None else dtype
        key = type(x), dtype, array_api_compat.device(x)
        if key not in self._there:
            self._there[key] = self._made(x, dtype)
        return self._there[key]

    @outside_graphs
    def _made(self, x: Array, dtype: Any) -> Array:
        return uploaded(array_api_compat.array_namespace(x), self._values, array_api_compat.device(x), dtype)


def take_at(rows: Array, index: Array) -> Array:
    """``rows[index]`` in one operation, of which array-api-compat's ``take`` makes four for PyTorch."""
    if isinstance(rows, np.ndarray):
        return rows.take(index, axis=0)
    if array_api_compat.is_torch_array(rows):
        return rows.index_select(0, index)
    return array_api_compat.array_namespace(rows).take(rows, index, axis=0)


def detach(array: Array) -> Array:
    """The same values without a history of gradients."""
    return array.detach() if array_api_compat.is_torch_array(array) else array


def own_arithmetic() -> np.errstate:
    """NumPy says nothing of the solver's own numbers, whatever a user asked for: what is not finite is a status."""
    return np.errstate(over="ignore", under="ignore", invalid="ignore")


def narrow(xp: Any, values: Array, dtype: Any) -> Array:
    """``values`` as ``dtype``; what is beyond its range becomes its largest finite value."""
    if values.dtype == dtype:
        return values
    largest = float(xp.finfo(dtype).max)
    with own_arithmetic():
        return xp.astype(xp.clip(values, -largest, largest), dtype)


def working_dtype(xp: Any, dtype: Any) -> Any:
    """The dtype of states and sums: at least float32, whatever the network's is."""
    return dtype if xp.finfo(dtype).bits >= 32 else xp.float32


def no_grad(xp: Any) -> Any:
    """A context in which the library records no gradients; does nothing where there are none."""
    return xp.no_grad() if array_api_compat.is_torch_namespace(xp) else nullcontext()


def fetch(xp: Any, packed: list[Array]) -> list[NDArray[np.float64]]:
    """Bring the inner products of all samples, a vector each, to the host: those on a device in one transfer."""
    away = [part for part in packed if not isinstance(part, np.ndarray)]
    if away:
        host = to_host(away[0] if len(away) == 1 else xp.concat(away))
        parts = iter(np.split(host, np.cumsum([part.shape[0] for part in away])[:-1]))
        packed = [part if isinstance(part, np.ndarray) else next(parts) for part in packed]
    return [part.astype(np.float64) for part in packed]
