"""Whether callbacks and loops change what a pipeline goes on with: tensors, settings, switches in its networks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from parasolver_adapters.diffusers.listening import networks_of

_SWITCHES = ("processor", "scale", "scaling", "enabled", "_active_adapter", "_disable_adapters")


def version_of(value: Any) -> Any:
    """For :func:`was_written`; tensors of inference mode keep no count."""
    if not isinstance(value, torch.Tensor):
        return None
    return value.clone() if value.is_inference() else value._version


def was_written(value: Any, version: Any) -> bool:
    """Whether something was written into a tensor since it had this version."""
    return not torch.equal(value, version) if isinstance(version, torch.Tensor) else version_of(value) != version


def were_replaced(given: dict[str, tuple[Any, Any]], returned: dict[str, Any]) -> bool:
    """Whether a callback gave back other tensors than it got."""
    return any(name not in given or given[name][0] is not value for name, value in returned.items())


def switches_of(pipe: Any) -> list[tuple[dict[str, Any], str]]:
    """Where the networks keep what pipelines and callbacks change between steps: IP-Adapter's scale, LoRA, GLIGEN."""
    modules = [module for network in networks_of(pipe).values() for module in network.modules()]
    places = [place for module in modules for place in (vars(module), vars(module)["_modules"])]
    return [(place, name) for place in places for name in _SWITCHES if name in place]


def positions_of(switches: list[tuple[dict[str, Any], str]]) -> list[Any]:
    """Their values now."""
    values = [place.get(name) for place, name in switches]
    return [copy.copy(value) if isinstance(value, (list, dict)) else value for value in values]


def what_moved(switches: list[tuple[dict[str, Any], str]], before: list[Any]) -> set[str]:
    """The names of those whose values have changed."""
    pairs = zip(before, positions_of(switches), switches, strict=True)
    return {name for one, other, (_, name) in pairs if not _equal(one, other) and not _alike(one, other)}


def _alike(one: Any, other: Any) -> bool:
    return isinstance(one, (list, dict)) and one == other


def are_same(one: Mapping[str, Any], other: Mapping[str, Any], ignore: str = "") -> bool:
    names = (one.keys() | other.keys()) - {ignore}
    return all(name in one and name in other and _equal(one[name], other[name]) for name in names)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, (bool, int, float, str)):
        return one == other
    return one is other
