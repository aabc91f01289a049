"""What the loop is given in the place of a network's outputs, and how its values are known again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from parasolver_adapters.diffusers.refusal import PipelineNotParallelError


def dense(value: Any) -> Any:
    """The value as its stand-in lies in memory: which operations a loop runs may depend on that."""
    return value.contiguous() if isinstance(value, torch.Tensor) and value.layout is torch.strided else value


def copies(values: Iterable[Any]) -> list[Any]:
    """The same values, whatever is written into these later."""
    return [dense(value.detach().clone()) if isinstance(value, torch.Tensor) else value for value in values]


def zeros(like: Any) -> Any:
    return torch.zeros_like(like, memory_format=torch.contiguous_format) if isinstance(like, torch.Tensor) else like


def stand_in(like: Any, arguments: list[Any]) -> Any:
    """Zeros, through which no gradient can be taken."""
    wanted = [argument for argument in arguments if isinstance(argument, torch.Tensor) and argument.requires_grad]
    if not wanted or not torch.is_grad_enabled() or not isinstance(like, torch.Tensor) or not like.is_floating_point():
        return zeros(like)
    return _Opaque.apply(like.detach(), *wanted)


class _Opaque(torch.autograd.Function):
    """Zeros that depend on the arguments, for the sake of the error."""

    @staticmethod
    def forward(ctx: Any, like: torch.Tensor, *arguments: torch.Tensor) -> torch.Tensor:
        return zeros(like)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise PipelineNotParallelError(
            "the loop takes a gradient through a network, which is called later and for many steps at once; a gradient "
            "of what is computed from a detached output of it can be followed"
        )


def place_of(value: Any) -> tuple[Any, ...] | None:
    """Where a tensor's values lie; equal for two tensors that are the same values, as ``.data`` of one is."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout is not torch.strided or not value.numel():
        return None
    with torch._C.DisableTorchFunction():
        try:
            return value.data_ptr(), value.shape, value.stride(), value.dtype, value.device
        except RuntimeError:  # it has no memory
            return None
