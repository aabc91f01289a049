"""Copies of objects with some methods in parallel; everything else of them is the object's own."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

_REGISTRIES = "_modules", "_parameters", "_buffers"  # of a module of PyTorch, in which it keeps what is set on it


def with_methods(name: str, given: Any, methods: Mapping[str, Callable[..., Any]]) -> Any:
    """A copy of an object with these methods, each ``f(self, ...)``, in the place of its own, and a ``solution``: None.

    They are methods of its class, so a copy of the copy, a deep one as well, calls them on itself. A copy that was made
    here is taken for what it is a copy of.

    Args:
        name: of the object, for errors.
        given: the object.
        methods: by the names that its own have.

    Raises:
        TypeError: nothing can be set on it, or its methods are of another object that it wraps.
    """
    given = as_it_is_now(given) if hasattr(type(given), "_without") else given
    kind = type(given)
    for method in methods:
        owner = getattr(getattr(given, method), "__self__", given)
        if owner is not given and not isinstance(owner, type):
            raise TypeError(
                f"{name}: {method} of this {kind.__name__} is a method of the {type(owner).__name__} in it; give that "
                "object itself (and compile or wrap its network, not the object)"
            )
    try:
        return _made(given, kind, methods)
    except (AttributeError, TypeError) as error:
        raise TypeError(
            f"{name}: expected an object that can be copied and have attributes, such as solution, set on it, got "
            f"{kind.__name__} ({error})"
        ) from error


def _made(given: Any, kind: type, methods: Mapping[str, Callable[..., Any]]) -> Any:
    made = copied(given)
    own = {name: _unbound(vars(made).pop(name), made) for name in methods if name in vars(made)}
    for name, method in methods.items():
        _look_like(method, getattr(given, name))
    if methods:
        named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__reduce_ex__": _reduced}
        made.__class__ = type(kind.__name__, (kind,), {**methods, **named, "_without": (kind, own)})
    made.solution = None
    return made


def as_it_is_now(made: Any) -> Any:
    """A copy of what :func:`with_methods` gave, with what was set on it since then, and with its own methods."""
    plain = copied(made)
    plain.__class__, own = type(made)._without
    vars(plain).update({name: method.__get__(plain) for name, method in own.items()})
    return plain


class _Kind:
    """The class of what was made: it is found under no name, so copies share it and pickles cannot hold it."""

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def __deepcopy__(self, memo: Any) -> _Kind:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise pickle.PicklingError(
            f"{self.kind.__name__}: an object that was made parallel cannot be pickled; save its state_dict or the "
            "object that it was made of, and make that parallel where it is loaded"
        )


def _reduced(made: Any, protocol: Any) -> Any:
    """For copies and pickles: as of the class without the methods, but for the class itself."""
    reduced = type(made)._without[0].__reduce_ex__(made, protocol)
    if isinstance(reduced, str):
        return reduced
    function, arguments, *rest = reduced
    return _rebuilt, (function, *(_Kind(part) if part is type(made) else part for part in arguments)), *rest


def _rebuilt(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*(part.kind if isinstance(part, _Kind) else part for part in arguments))


def copied(given: Any) -> Any:
    """A copy of which nothing that is set on it later is set on the object, too; methods set on it are the copy's."""
    made = copy.copy(given)
    values = {name: copy.copy(value) if name in _REGISTRIES else value for name, value in vars(made).items()}
    vars(made).update({name: _unbound(value, given).__get__(made) for name, value in values.items()})
    return made


def _unbound(value: Any, owner: Any) -> Any:
    """What gives an object, by ``__get__``, its own method where ``value`` is one of ``owner``, and else ``value``."""
    return value.__func__ if isinstance(value, MethodType) and value.__self__ is owner else staticmethod(value)


def _look_like(method: Callable[..., Any], original: Callable[..., Any]) -> None:
    """The name, the text and the arguments of a bound method."""
    for name in ("__name__", "__qualname__", "__doc__", "__module__"):
        setattr(method, name, getattr(original, name, None))
    arguments = inspect.signature(original)
    of_object = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    method.__signature__ = arguments.replace(parameters=[of_object, *arguments.parameters.values()])  # type: ignore[attr-defined]
