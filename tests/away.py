"""A device beside the CPU, emulated on it: it has no float64, as Apple's, and its tensors do not mix with the CPU's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from parasolver_core import validation

AWAY = torch.device("meta")  # any build has it; here its tensors have numbers


class Away(torch.Tensor):
    """A tensor that says it is there; its numbers are in one of the CPU."""

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> Any:
        if numbers.dtype in (torch.float64, torch.complex128):
            raise TypeError("this device has no float64")
        like = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset(), "dtype": numbers.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, numbers.shape, **like, device=AWAY)
        made.numbers = numbers
        return made

    def tolist(self) -> Any:
        return self.numbers.tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Away({self.numbers})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """While active, tensors can be made there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
_WITH_INDEX = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default}  # indices may be on the CPU


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    there = [one for one in tensors if isinstance(one, Away)]
    here = [one for one in tensors if not isinstance(one, Away) and one.ndim > 0]
    if there and here and func not in _MOVES | _WITH_INDEX:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found this device and cpu ({func})")
    wanted = kwargs.get("device")
    goes_there = bool(there) if wanted is None else torch.device(wanted).type == AWAY.type
    if wanted is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    own_args, own_kwargs = tree_map(lambda one: one.numbers if isinstance(one, Away) else one, (args, kwargs))
    result = func(*own_args, **own_kwargs)
    if func._schema.arguments and (alias := func._schema.arguments[0].alias_info) is not None and alias.is_write:
        return args[0]
    return tree_map(lambda one: Away(one) if isinstance(one, torch.Tensor) and goes_there else one, result)


@contextmanager
def away() -> Iterator[torch.device]:
    """The device, within the block; the solver, which refuses tensors like these, takes them for plain ones."""
    check = validation._check_plain_torch
    passing = lambda name, value: None if isinstance(value, Away) else check(name, value)  # noqa: E731
    with mock.patch.object(validation, "_check_plain_torch", passing), Device():
        yield AWAY
