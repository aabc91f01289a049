"""Whether callbacks and loops change what a pipeline goes on with: tensors, settings, switches in its networks."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.modules import module as modules
from torch.utils._pytree import TreeSpec, tree_flatten

from parasolver_adapters.diffusers.passes.listening import networks_of
from parasolver_adapters.diffusers.recording.standins import place_of
from parasolver_adapters.given import version_of, was_written, write_back

_PLAIN, _SOME = {bool, float, str}, 32
_SWITCHES = ("processor", "scale", "scaling", "enabled", "_active_adapter", "_disable_adapters")


def were_replaced(given: dict[str, tuple[Any, Any]], returned: dict[str, Any]) -> bool:
    """Whether a callback gave back other tensors than it got."""
    return any(name not in given or given[name][0] is not value for name, value in returned.items())


class Settings:
    """Tells whether what pipelines and their schedulers keep has changed, also inside lists, dictionaries and tensors.

    Args:
        pipes: looked at with their ``scheduler``, if they have one; what keeps nothing is left out.
    """

    def __init__(self, *pipes: Any) -> None:
        owners = [owner for pipe in pipes for owner in (pipe, getattr(pipe, "scheduler", None))]
        self._kept = [vars(owner) for owner in owners if hasattr(owner, "__dict__")]
        self._before = self._look()

    def differ(self) -> bool:
        """Whether anything has changed since this was made, but for an interrupt."""
        (leaves, form), (before, form_before) = self._look(), self._before
        if form != form_before:
            return True
        pairs = zip(before, leaves, strict=True)
        return any(not _equal(was, now) or was_written(now, version) for (was, version), (now, _) in pairs)

    def _look(self) -> tuple[list[tuple[Any, Any]], TreeSpec]:
        kept = [{name: value for name, value in values.items() if name != "_interrupt"} for values in self._kept]
        leaves, form = tree_flatten(kept)
        return [(leaf, version_of(leaf)) for leaf in leaves], form


class SchedulerState:
    """What a scheduler keeps, to be compared and to be put back."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._values = {name: (value, version_of(value), _copied(value)) for name, value in vars(scheduler).items()}

    def changed_tables(self) -> list[str]:
        """The names of tables of the schedule, and of the configuration, that are others now."""
        now = vars(self._scheduler)
        names = [name for name, kept in self._values.items() if not _is_same_table(*kept, now.get(name))]
        return ["config" if name == "_internal_dict" else name for name in names]

    def put_back(self, owner: Any) -> None:
        """The owner has this scheduler, in which everything is as it was, in the same tensors and lists."""
        if owner.scheduler is not self._scheduler:
            owner.scheduler = self._scheduler
        attributes = vars(self._scheduler)
        attributes.clear()
        attributes.update({name: value for name, (value, _, _) in self._values.items()})
        for value, version, copied in self._values.values():
            if isinstance(value, torch.Tensor) and was_written(value, version):
                write_back(value, copied)
            elif type(value) is list:
                value[:] = copied


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return list(value) if type(value) is list else value


def _is_same_table(value: Any, version: Any, copied: Any, now: Any) -> bool:
    """Schedulers move theirs to the device of the state, and lose some; other values are no tables."""
    if not isinstance(value, torch.Tensor):
        return not isinstance(value, Mapping) or value is now
    if value.ndim > 1 or (value is now and not was_written(value, version)):
        return True
    return isinstance(now, torch.Tensor) and torch.equal(copied.cpu(), now.cpu())


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
    return {name for was, now, (_, name) in pairs if not _equal(was, now) and not _alike(was, now)}


class Weights:
    """Tells whether the networks of a pipeline compute as they did, from two looks at them, in little time.

    A look is at their modules, hooks, and switches and numbers of these, at which tensors they have, where these lie
    and how often each was written to, and, as writing through ``.data`` is not counted, at a few values of each.
    """

    def __init__(self, pipe: Any) -> None:
        self._networks = list(networks_of(pipe).values())
        self._find()

    def look(self) -> tuple[list[Any], list[torch.Tensor]]:
        """What is to be compared by :meth:`differ`."""
        tensors = self._places()
        if tensors != self._found:  # others than before: of modules that are moved to the device when they are called
            self._find()
            tensors = self._found
        marks = [attributes.get(name) for attributes, name in self._settings]
        for module in self._modules:
            marks.append(len(vars(module)))
            marks += map(id, module._modules.values())
            marks += [*module._forward_hooks, *module._forward_pre_hooks]
        return [tensors, marks], [torch.cat(few) for few in self._few.values()]

    @staticmethod
    def differ(before: tuple[list[Any], list[torch.Tensor]], after: tuple[list[Any], list[torch.Tensor]]) -> bool:
        """Whether the networks have changed between two looks."""
        if before[0] != after[0] or len(before[1]) != len(after[1]):
            return True
        return not all(
            torch.equal(_bytes_of(was), _bytes_of(now)) for was, now in zip(before[1], after[1], strict=True)
        )

    def _find(self) -> None:
        self._modules = [module for network in self._networks for module in network.modules()]
        of_modules = [vars(module) for module in self._modules]
        self._settings = [
            (attributes, name)
            for attributes in of_modules
            for name, value in attributes.items()
            if type(value) in _PLAIN
        ]
        self._slots = [
            (slot, name) for module in self._modules for slot in (module._parameters, module._buffers) for name in slot
        ]
        self._found = self._places()
        self._few: dict[Any, list[torch.Tensor]] = {}
        for slot, name in self._slots:
            some = _some_of(slot[name])
            if some is not None:
                self._few.setdefault((some.device, some.dtype), []).append(some)

    def _places(self) -> list[Any]:
        values = [slot.get(name) for slot, name in self._slots]
        return [
            None if value is None else (id(value), value.is_inference() or value._version, place_of(value))
            for value in values
        ]


def _bytes_of(values: torch.Tensor) -> torch.Tensor:
    """So that NaN is equal to itself."""
    return values.view(torch.uint8)


def _some_of(value: torch.Tensor | None) -> torch.Tensor | None:
    """A few of the values, wherever they lie in memory; nothing of tensors that are kept in another way."""
    if value is None or value.is_meta or place_of(value) is None:
        return None
    span = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    count = min(span, _SOME)
    flat = value.detach()
    flat = flat.view(torch.uint8) if flat.dtype.itemsize == 1 else flat
    return flat.as_strided((count,), (span // count,), flat.storage_offset())


def hooks_of(network: torch.nn.Module) -> dict[Any, str]:
    """The names of modules inside that have hooks, by the hooks' own numbers."""
    everywhere = (modules._global_forward_hooks, modules._global_forward_pre_hooks)
    found: dict[Any, str] = {number: "every module" for hooks in everywhere for number in hooks}
    for name, module in network.named_modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            found |= dict.fromkeys(hooks, name or type(network).__name__)
    return found


_SERIALS: dict[int, tuple[Any, int]] = {}
_COUNT = itertools.count()


def serial_of(value: Any) -> Any:
    """A number for an object, unlike its id never given to another one."""
    key = id(value)
    known = _SERIALS.get(key)
    if known is not None and known[0]() is value:
        return known[1]
    try:
        reference = weakref.ref(value, lambda _: _SERIALS.pop(key, None))
    except TypeError:  # small values of built-in types
        return type(value).__qualname__
    _SERIALS[key] = reference, next(_COUNT)
    return _SERIALS[key][1]


def _alike(value: Any, other: Any) -> bool:
    return isinstance(value, (list, dict)) and value == other


def are_same(arguments: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    names = arguments.keys() | others.keys()
    return all(name in arguments and name in others and _equal(arguments[name], others[name]) for name in names)


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, (bool, int, float, str)):
        return value == other or value is other  # NaN is the same as itself
    return value is other
