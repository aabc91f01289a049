"""A sampler's normal draws, in our hands while its own loop runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

Draw = Callable[[Callable[..., torch.Tensor], tuple[Any, ...], dict[str, Any]], torch.Tensor]

# Products that want tensors of one dtype; a sampler's own tables may be float32.
_ONE_DTYPE = {torch.einsum, torch.tensordot, torch.matmul, torch.dot, torch.Tensor.matmul, torch.linalg.solve}


def _are_mixed(args: Any) -> bool:
    """Whether float32 and float64 tensors meet; where all are float32 the sampler calculates so, and has to."""
    dtypes = {leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
    return {torch.float32, torch.float64} <= dtypes


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.dtype == torch.float32 else tensor


class Float64(TorchFunctionMode):
    """While active, on this thread only: casts to float32 keep float64, and normal draws come from ``draw``.

    Several samplers cast the state to float32 inside a step; their coefficients could then be read to seven digits
    only. Their tables (sigmas, alphas_cumprod) stay as they are, so the coefficients are their own.

    Args:
        draw: ``draw(function, args, kwargs)`` replaces ``torch.randn(...)`` and ``torch.randn_like(...)``.
    """

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self._draw = draw

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.randn or func is torch.randn_like:
            return self._draw(func, args, kwargs).double()
        if func is torch.Tensor.float:
            return args[0].double()
        if func in _ONE_DTYPE and _are_mixed(args):
            args = tree_map_only(torch.Tensor, _widened, args)
        if func is torch.Tensor.to:
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def no_noise(function: Callable[..., torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Zeros in place of a draw."""
    if function is torch.randn_like:
        return torch.zeros_like(args[0])
    size = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
    return torch.zeros(tuple(size), device=kwargs.get("device"))


class Recorder:
    """Independent normal draws in place of a sampler's, kept until they are taken."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._draws: list[torch.Tensor] = []

    def __call__(
        self, function: Callable[..., torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        shape = no_noise(function, args, kwargs).shape
        drawn = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        self._draws.append(drawn)
        return drawn

    def take(self) -> list[torch.Tensor]:
        """The draws since the last time, in their order."""
        taken, self._draws = self._draws, []
        return taken


class Listener(TorchFunctionMode):
    """While active, on this thread only: keeps the normal draws that are made, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[torch.Tensor] = []
        self.generators: list[torch.Generator | None] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = func(*args, **(kwargs or {}))
        if func is torch.randn or func is torch.randn_like:
            self.draws.append(drawn)
            self.generators.append((kwargs or {}).get("generator"))
        return drawn

    @property
    def global_stream(self) -> bool:
        """Whether some draw was made without a generator."""
        return None in self.generators

    def playback(self) -> Float64:
        """The same draws once more, in float64 and on the CPU."""
        draws = (drawn.cpu() for drawn in self.draws)
        return Float64(lambda function, args, kwargs: next(draws))


class Played(TorchFunctionMode):
    """While active, on this thread only: normal draws are those at hand, in their order."""

    def __init__(self, draws: list[torch.Tensor]) -> None:
        super().__init__()
        self._draws = iter(draws)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.randn or func is torch.randn_like:
            drawn = next(self._draws, None)
            if drawn is None:  # a StopIteration would end a loop that is a generator
                raise ValueError(
                    "noise: a step draws more often than when it was tried with outputs of zero, so what it draws "
                    "depends on what the network says; sample sequentially"
                )
            return drawn
        return func(*args, **(kwargs or {}))


class Unheard:
    """A network that is called as if nobody listened to the functions that it calls."""

    def __init__(self, network: Callable[..., Any]) -> None:
        self._network = network

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return self._network(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)
