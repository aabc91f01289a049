"""How the calls of a pipeline's networks and of its scheduler are seen, and everything is put back after it."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_FORWARDS = threading.Lock()
_LISTENED_TO = {"model_output", "timestep", "sample"}
POSITIONAL = "positional arguments"  # no name that a function can have


class Listener:
    """Sees the calls of networks and of ``scheduler.step`` in one pass."""

    def network(self, module: torch.nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    def step(self, scheduler: Any, step: Callable[..., Any], given: dict[str, Any]) -> Any:
        return step(**given)


@contextmanager
def listening(pipe: Any, listener: Listener) -> Iterator[None]:
    """While active: the pipeline's networks and its scheduler's steps go through the listener.

    The scheduler gets a subclass and not an attribute, so that a pipeline that copies it drives the same; signatures
    are kept, as pipelines look at them.
    """
    scheduler, networks = pipe.scheduler, networks_of(pipe)
    kind, signature = type(scheduler), inspect.signature(type(scheduler).step)
    active = [listener]  # emptied at the end, as the class lives on until garbage is collected

    @functools.wraps(kind.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not active:  # a copy that outlives the block
            return kind.step(self, *args, **kwargs)
        given = by_name(signature, (self, *args), kwargs)
        if not given.keys() >= _LISTENED_TO:  # a step of another kind, or one that raises what it misses
            return called(kind.step, given)
        return active[0].step(self, kind.step, given)

    try:
        with _FORWARDS:
            for module in networks.values():
                module.forward = _listened(module, module.forward, active)
        scheduler.__class__ = subclass(kind, {"step": step})
        yield
    finally:
        active.clear()
        scheduler.__class__ = kind
        with _FORWARDS:
            for module in networks.values():
                _take_back(module)


def _listened(module: torch.nn.Module, forward: Callable[..., Any], active: list[Listener]) -> Callable[..., Any]:
    """The forward of a network, which other threads may call, too: pipelines may share one."""
    thread = threading.get_ident()

    @functools.wraps(forward)
    def listened(*args: Any, **kwargs: Any) -> Any:
        if active and threading.get_ident() == thread:
            return active[0].network(module, forward, args, kwargs)
        return forward(*args, **kwargs)

    listened.before = active, vars(module).get("forward")  # type: ignore[attr-defined]
    return listened


def _take_back(module: torch.nn.Module) -> None:
    """The forwards that nobody listens to any more, down to one of another thread that does."""
    while (forward := vars(module).get("forward")) is not None:
        active, before = getattr(forward, "before", (True, None))
        if active:
            return
        del module.forward
        if before is not None:
            module.forward = before


def by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by their names, for :func:`called`; where some have none, all positional ones under one."""
    parameters = list(signature.parameters.values())[: len(args)]
    if any(one.kind in (one.POSITIONAL_ONLY, one.VAR_POSITIONAL) for one in parameters):
        return {POSITIONAL: args, **kwargs}
    names = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
    if len(names) < len(args) or not kwargs.keys().isdisjoint(names):
        signature.bind(*args, **kwargs)  # raises what the call itself would
    return dict(zip(names, args, strict=True)) | kwargs


def called(call: Callable[..., Any], given: dict[str, Any]) -> Any:
    """What a function returns for arguments as :func:`by_name` has them."""
    named = {name: value for name, value in given.items() if name != POSITIONAL}
    return call(*given.get(POSITIONAL, ()), **named)


def subclass(parent: type, members: dict[str, Any]) -> type:
    """A subclass that passes for the class itself."""
    names = {"__module__": parent.__module__, "__qualname__": parent.__qualname__, "__doc__": parent.__doc__}
    metaclass = type(parent)

    def equal(cls: type, other: object) -> bool:  # BriaPipeline asks whether type(scheduler) != a class
        return other is parent or metaclass.__eq__(cls, other)

    passing = type(metaclass.__name__, (metaclass,), {"__eq__": equal, "__hash__": lambda cls: hash(parent)})
    return passing(parent.__name__, (parent,), names | members)


def with_state(output: Any, state: torch.Tensor) -> Any:
    """The output of ``step`` with another ``prev_sample``, of the same dtype."""
    if isinstance(output, tuple):
        return type(output)((state.to(output[0].dtype), *output[1:]))
    output["prev_sample"] = state.to(output.prev_sample.dtype)
    return output


def is_a(value: Any, name: str) -> bool:
    """Whether a class of diffusers is among the value's; importing those would take seconds that few need."""
    return any(base.__name__ == name and base.__module__.startswith("diffusers.") for base in type(value).__mro__)


def networks_of(pipe: Any) -> dict[str, torch.nn.Module]:
    components = pipe.components
    networks = {name: module for name, module in components.items() if isinstance(module, torch.nn.Module)}
    return {name: module for name, module in networks.items() if "vae" not in name}


def decoders_of(pipe: Any) -> list[torch.nn.Module]:
    decoders = [getattr(module, "decoder", None) for name, module in pipe.components.items() if "vae" in name]
    return [decoder for decoder in decoders if isinstance(decoder, torch.nn.Module)]


def processors_of(pipe: Any) -> list[tuple[Any, dict[str, Any]]]:
    """The networks with their attention processors."""
    networks: list[Any] = list(networks_of(pipe).values())
    return [(network, dict(network.attn_processors)) for network in networks if hasattr(network, "attn_processors")]


def put_back(processors: list[tuple[Any, dict[str, Any]]]) -> None:
    """Set these again where the networks have others."""
    for network, known in processors:
        if network.attn_processors != known:
            network.set_attn_processor(dict(known))
