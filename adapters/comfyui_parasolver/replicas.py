"""A copy of ComfyUI's model, with its conditions, on another device."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_GUIDER = ("original_conds", "loaded_models")
_PATCHER = ("patches", "backup", "parent", "hook_backup", "cached_hook_patches", "object_patches_backup")


def replica(inner: Any, extra_args: dict[str, Any], device: torch.device) -> tuple[Any, dict[str, Any]]:
    """What a sampler calls, and what it calls it with, on another device.

    Weights are copied as they are loaded, with their LoRAs. What ComfyUI needs to load and unload them stays the
    original's: nothing here is managed by it, and it goes when the run ends.
    """
    guider = inner.inner_model
    patcher = getattr(guider, "model_patcher", None)
    kept = [getattr(guider, name, None) for name in _GUIDER]
    kept += [getattr(patcher, name, None) for name in _PATCHER]
    memo = {id(value): value for value in kept}
    with _To(device):
        copied, arguments = copy.deepcopy((inner, extra_args), memo)
    for owner in (getattr(copied.inner_model, "model_patcher", None), copied.inner_model.inner_model):
        for name in ("load_device", "device"):
            if isinstance(getattr(owner, name, None), torch.device):
                setattr(owner, name, device)
    return copied, arguments


class _To(TorchFunctionMode):
    """While active, on this thread only: what ``copy.deepcopy`` makes of a tensor is on a device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.clone:  # that is how a parameter is copied
            return args[0].to(self._device, copy=True)
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().to(self._device, copy=True)
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))
