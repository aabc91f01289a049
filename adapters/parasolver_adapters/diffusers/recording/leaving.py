"""Ways by which values of the state leave torch, and would be kept as they were in the pass that is only watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _len_torch_function_stack, _pop_mode, _push_mode
from torch.utils._pytree import tree_leaves

from parasolver_adapters.diffusers.refusal import PipelineNotParallelError

_NAMES = (
    "numpy tolist __array__ __dlpack__ data_ptr untyped_storage storage _typed_storage __deepcopy__ share_memory_ "
    "__reduce_ex__ to_mkldnn apply_ map_"
)
EXITS = {getattr(torch.Tensor, name): name for name in _NAMES.split()}
EXITS[torch.Tensor.__cuda_array_interface__.__get__] = "__cuda_array_interface__"


class Exits(TorchFunctionMode):
    """While active, on this thread only: refuses what reads the values of ``owned`` tensors other than by operations.

    Numbers, such as ``.item()`` and ``float()``, are operations too, and are not looked for here.

    Args:
        owned: whether the value of a tensor depends on the state.
    """

    def __init__(self, owned: Callable[[Any], bool]) -> None:
        super().__init__()
        self._owned = owned

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in EXITS and any(map(self._owned, tree_leaves((args, kwargs)))):
            raise PipelineNotParallelError(
                f"the loop takes values of the state out of torch ({EXITS[func]}), as NumPy, lists and files do, so "
                "they could not follow the state; use operations of torch for what is done with them"
            )
        return func(*args, **kwargs)

    def start(self) -> None:
        """Become active, below what others have entered, who will leave in their own order."""
        others = _popped()
        _push_mode(self)
        for mode in others:
            _push_mode(mode)

    def stop(self) -> None:
        """No longer be active, wherever the others are."""
        for mode in _popped():
            if mode is not self:
                _push_mode(mode)


def _popped() -> list[Any]:
    """All active modes, taken off, the lowest first."""
    return [_pop_mode() for _ in range(_len_torch_function_stack())][::-1]
