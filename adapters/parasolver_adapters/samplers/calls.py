"""Calling a sampler that is a function, with something else in the place of its network."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Reply = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]

DRAWS = ("noise_sampler", "randn_like")  # arguments by which samplers are told where their noise comes from
_SILENT: dict[str, Any] = {"callback": None, "disable": True}
_MOST_CALLS = 10_000


class UnsupportedSamplerError(ValueError):
    """The sampler is not a linear recurrence around the network; the message says at which step and why."""


class Stub:
    """In the place of a network: called like it, and with its attributes.

    Args:
        reply: ``reply(i, x, args, kwargs)`` gives the output of call i.
        network: whose attributes the sampler may read; None for none.
    """

    def __init__(self, reply: Reply, network: Any) -> None:
        self._reply, self._network, self._calls = reply, network, 0

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._calls += 1
        if self._calls > _MOST_CALLS:
            raise UnsupportedSamplerError(
                f"sampler: it has called the network more than {_MOST_CALLS} times; is its step size adaptive? Its "
                "steps then depend on the network's outputs: choose a sampler of fixed steps"
            )
        return self._reply(self._calls - 1, x, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._network, name)


@dataclass(frozen=True)
class SamplerCall:
    """A sampler and what it is called with besides the network and the first state.

    Args:
        function: ``function(model, x, *args, **kwargs)``.
        args, kwargs: the rest.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        function: Any = self.function
        while hasattr(function, "func"):  # a partial
            function = function.func
        return getattr(function, "__name__", type(function).__name__)

    @property
    def device(self) -> torch.device:
        """Where the first tensor among the arguments is; the CPU if there is none."""
        tensors = (leaf for leaf in tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor))
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    def run(self, model: Any, x: Tensor, **replaced: Any) -> Any:
        """Call it; arguments that it has by these names are replaced."""
        try:
            signature = inspect.signature(self.function)
        except ValueError:  # some builtins have none
            return self.function(model, x, *self.args, **self.kwargs)
        kwargs = {name: replaced.get(name, value) for name, value in self.kwargs.items()}
        bound = signature.bind(model, x, *self.args, **kwargs)
        bound.arguments |= {name: value for name, value in replaced.items() if name in signature.parameters}
        return self.function(*bound.args, **bound.kwargs)

    def given(self, name: str) -> Any:
        """An argument of that name, or None."""
        if name in self.kwargs:
            return self.kwargs[name]
        try:
            return inspect.signature(self.function).bind(None, None, *self.args, **self.kwargs).arguments.get(name)
        except ValueError:  # some builtins have none
            return None

    def silent(self, model: Any, x: Tensor, **replaced: Any) -> Any:
        """Call it without callbacks and progress bars."""
        with torch.no_grad():
            return self.run(model, x, **(_SILENT | replaced))


def sources(x: Tensor) -> dict[str, Callable[..., Tensor]]:
    """Arguments that let a sampler draw its noise, like ``x``, by an ordinary function, which can be listened to."""

    def like_x(*args: Any, **kwargs: Any) -> Tensor:
        return torch.randn_like(x)

    return dict.fromkeys(DRAWS, like_x)


def time_of(args: tuple[Any, ...], kwargs: dict[str, Any], i: int) -> float:
    """The time that a network is given: the first argument after x; the number of the call if there is none."""
    leaves = [*args, *kwargs.values()]
    first = leaves[0] if leaves else i
    if isinstance(first, Tensor) and first.numel():
        return first.flatten()[0].item()
    return first if isinstance(first, (int, float)) else i


@contextmanager
def same_draws(x: Tensor, arguments: Any) -> Iterator[None]:
    """What is drawn within is drawn again after it: from the global streams and from generators among the arguments."""
    generators = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    devices = [x.device] if x.device.type not in ("cpu", "meta") else []
    kind = devices[0].type if devices else "cuda"
    with torch.random.fork_rng(devices=devices, device_type=kind):
        try:
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
