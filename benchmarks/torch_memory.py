"""Peak memory of PyTorch and NumPy together on a CPU; PyTorch has no counter of its own."""

from __future__ import annotations

import tracemalloc
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TorchMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operators return, each storage once, until it is freed.

    Where ``tracemalloc`` runs, what it counts (Python and NumPy) is part of the peak. Exact and repeatable, unlike the
    size of the process. Work space inside an operator is not seen.

    Example:
        >>> with TorchMemory() as memory:
        ...     x = torch.zeros(1000) + 1
        >>> memory.peak
        8000
    """

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, int] = {}
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in given and storage._cdata not in self._live:
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._look()
        self._live[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self._look()
        weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, key: int) -> None:
        self._look()
        self.now -= self._live.pop(key)

    def _look(self) -> None:
        """The peak so far: of tensors as they are, and of all else since the last look."""
        others = tracemalloc.get_traced_memory()[1] if tracemalloc.is_tracing() else 0
        self.peak = max(self.peak, self.now + others)
        if tracemalloc.is_tracing():
            tracemalloc.reset_peak()

    def __exit__(self, *error: Any) -> None:
        self._look()
        super().__exit__(*error)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
