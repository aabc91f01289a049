"""Capturing without a card: a call's operations are recorded and replayed, and what a capture forbids is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.away import Away

_WAITS = {"_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select"}
_MOVES = {"_to_copy", "copy_"}
_NOT_PERMITTED = "operation not permitted when stream is capturing"


class Recorder(TorchDispatchMode):
    """Keeps what is done within its block, on tensors of :class:`~tests.away.Away`."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        there = [one for one in tensors if isinstance(one, Away)]
        name = func._schema.name.partition("::")[2]
        if there and name in _WAITS:
            raise RuntimeError(f"{_NOT_PERMITTED}: {name}")
        result = func(*args, **kwargs)
        out = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
        if name in _MOVES and len({type(one) for one in [*tensors, *out]}) > 1:
            raise RuntimeError(f"{_NOT_PERMITTED}: a copy between the host and the device")
        self.steps.append((func, args, kwargs, result))
        return result


def record(call: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    """As :func:`parasolver_adapters.graphs.captured`."""
    with Recorder() as recorder:
        output = call()

    def replay() -> None:
        known: dict[int, torch.Tensor] = {}
        for func, args, kwargs, result in recorder.steps:
            again = func(*_known(known, args), **_known(known, kwargs))
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor):
                    known[id(old)] = new
        for one in tree_leaves(output):
            if isinstance(one, torch.Tensor) and id(one) in known and known[id(one)] is not one:
                one.copy_(known[id(one)])

    return replay, output


def _known(known: dict[int, torch.Tensor], values: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda one: known.get(id(one), one), values)
