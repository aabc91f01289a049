"""What an emulated device is asked for: operations, copies, and waits of the host."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.away import Away

VIEWS = "view reshape select slice unsqueeze squeeze transpose permute expand detach alias _unsafe_view unbind split t"
WAITS = {"_local_scalar_dense", "equal", "nonzero", "is_nonzero"}


class Traffic(TorchDispatchMode):
    """Counts operations on the emulated device, copies to it and from it, and other waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        there = [isinstance(one, Away) for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        name = func._schema.name.partition("::")[2]
        arrives = isinstance(result, Away)
        if name in ("_to_copy", "copy_") and len({*there, arrives}) > 1:
            self.seen["to the device" if arrives else "to the host"] += 1
            self.seen["blocking"] += arrives and not (kwargs or {}).get("non_blocking", False)
        elif any(there) and name in WAITS:
            self.seen["to the host"] += 1
        elif (any(there) or arrives) and name not in VIEWS.split():
            self.seen["operations"] += 1
        return result
