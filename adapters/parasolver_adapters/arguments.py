"""What a network is called with besides x, dealt out to the rows of a batch that mixes steps and samples."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parasolver_core import Rows

_Pick = Callable[[Tensor, Tensor], Any]  # of steps and samples, both (rows,)


class StepArguments:
    """The arguments that a sequential loop gave its network at each step, for any rows of any steps.

    A tensor that has one entry for each sample of the batch along its first axis gives each row its sample's, and one
    of length 1 the same to all; another is for all rows as it is. What changes from step to step is each row's step's.
    Dictionaries, lists and tuples may hold tensors.

    Args:
        calls: one structure a step, all alike.
        batch: number of samples.
        name: of the argument, for errors.

    Raises:
        ValueError: something that cannot be dealt out changes from step to step.
    """

    def __init__(self, calls: Sequence[Any], batch: int, name: str) -> None:
        self._pick = _picker(list(calls), batch, name)

    def __call__(self, rows: Rows, device: Any) -> Any:
        """The structure for these rows, its dealt-out tensors on the device."""
        steps = torch.as_tensor(rows.steps, device=device)
        return self._pick(steps, torch.as_tensor(rows.samples, device=device))


def _picker(values: list[Any], batch: int, name: str) -> _Pick:
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise ValueError(f"{name}: expected the same kind of value in every call, got {_kinds(values)}")
    if isinstance(first, Mapping):
        if any(value.keys() != first.keys() for value in values):
            raise ValueError(f"{name}: expected the same keys in every call of the network")
        parts = {key: _picker([value[key] for value in values], batch, f"{name}[{key!r}]") for key in first}
        return lambda steps, samples: {key: part(steps, samples) for key, part in parts.items()}
    if isinstance(first, (list, tuple)):
        if any(len(value) != len(first) for value in values):
            raise ValueError(f"{name}: expected the same length in every call of the network")
        items = [_picker([value[i] for value in values], batch, f"{name}[{i}]") for i in range(len(first))]
        return lambda steps, samples: remade(first, [item(steps, samples) for item in items])
    if isinstance(first, Tensor):
        return _tensor_picker(values, batch, name)
    if all(same(first, value) for value in values):
        return lambda steps, samples: first
    if isinstance(first, Number):
        table = torch.tensor(values)
        return lambda steps, samples: table.to(steps.device)[steps]
    raise ValueError(f"{name}: it changes from call to call, so steps cannot share a call: got {_kinds(values)}")


def _tensor_picker(values: list[Tensor], batch: int, name: str) -> _Pick:
    first = values[0]
    if all(value is first or (value.shape == first.shape and torch.equal(value, first)) for value in values):
        if first.ndim == 0 or len(first) not in (1, batch):
            return lambda steps, samples: first.to(steps.device) if first.ndim else first
        if len(first) == 1:
            return lambda steps, samples: first.to(steps.device).expand(len(steps), *first.shape[1:])
        return lambda steps, samples: first.to(steps.device)[samples]
    if any(value.shape != first.shape for value in values):
        raise ValueError(f"{name}: expected one shape in every call, got {tuple(first.shape)} and others")
    table = torch.stack(values)
    if first.ndim == 0:
        return lambda steps, samples: table.to(steps.device)[steps]
    if len(first) == batch:
        return lambda steps, samples: table.to(steps.device)[steps, samples]
    if len(first) == 1:
        return lambda steps, samples: table.to(steps.device)[steps, 0]
    raise ValueError(
        f"{name}: it changes from call to call, so its first axis must be the batch of {batch}, got shape "
        f"{tuple(first.shape)}"
    )


class Kept:
    """Copies of what a loop gives its network, which it may change in place before the next call.

    Dictionaries, lists and tuples are rebuilt; tensors and arrays are copied once for as long as they stay as they are.
    """

    def __init__(self) -> None:
        self._copies: dict[int, tuple[Any, Any]] = {}  # the thing itself, so that its id stays its own, and its copy

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return remade(value, [self(entry) for entry in value])
        if not isinstance(value, (Tensor, np.ndarray)):
            return value
        held = self._copies.get(id(value))
        if held is None or not equal(held[1], value):
            held = value, value.detach().clone() if isinstance(value, Tensor) else value.copy()
            self._copies[id(value)] = held
        return held[1]


def equal(kept: Any, value: Any) -> bool:
    """Whether the tensors, arrays, numbers and strings of two structures are equal; of anything else it says yes."""
    if isinstance(kept, Mapping):
        return (
            isinstance(value, Mapping)
            and kept.keys() == value.keys()
            and all(equal(entry, value[key]) for key, entry in kept.items())
        )
    if isinstance(kept, (list, tuple)):
        return isinstance(value, (list, tuple)) and len(kept) == len(value) and all(map(equal, kept, value))
    if isinstance(kept, (Tensor, np.ndarray)):
        like = type(kept) is type(value) and kept.shape == value.shape and kept.dtype == value.dtype
        return like and bool(((kept == value) | ((kept != kept) & (value != value))).all())  # NaN is equal to NaN
    if isinstance(kept, (Number, str)):
        return type(kept) is type(value) and same(kept, value)
    return True


def by_name(owner: Any, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call of a method by name, with its defaults.

    Where it takes ``*args`` to hand them on, they have the names of the method that it overrides.

    Raises:
        TypeError: the call does not fit, or has an argument without a name.
    """
    signature, *overridden = _signatures(owner, method)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    named = dict(bound.arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(name)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            rest, before = named.pop(name), list(signature.parameters).index(name)
            names = next(
                (found for parent in overridden if len(found := _positional(parent)) >= before + len(rest)), []
            )
            if rest and not names:
                raise TypeError(f"{method}: argument {before} has no name in {signature}; give it by name")
            named |= dict(zip(names[before:], rest, strict=False))
    return named


def parameters_of(owner: Any, method: str) -> set[str]:
    """The names that a method's arguments have, in it and where it hands them on to one that it overrides."""
    names: set[str] = set()
    for signature in _signatures(owner, method):
        names |= signature.parameters.keys()
        if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in signature.parameters.values()):
            break
    return names


def _signatures(owner: Any, method: str) -> list[inspect.Signature]:
    """Of a method, and of those that it overrides."""
    kinds = [kind for kind in type(owner).__mro__ if method in vars(kind)]
    methods = [getattr(owner, method), *(vars(kind)[method].__get__(owner) for kind in kinds)]
    return [inspect.signature(one) for one in methods]


def _positional(signature: inspect.Signature) -> list[str]:
    allowed = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return [name for name, parameter in signature.parameters.items() if parameter.kind in allowed]


def remade(like: Any, entries: list[Any]) -> Any:
    """A list, tuple or named tuple like the given one, of other entries."""
    return type(like)._make(entries) if hasattr(like, "_make") else type(like)(entries)


def same(value: Any, other: Any) -> bool:
    """Whether two things that are no tensors are equal; not where that is no yes or no."""
    try:
        return value is other or bool(value == other)
    except Exception:  # of arrays and the like
        return False


def _kinds(values: list[Any]) -> str:
    return ", ".join(sorted({type(value).__name__ for value in values}))
