"""Copies of objects with some methods in parallel; everything else of them is the object's own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

_REGISTRIES = "_modules", "_parameters", "_buffers"  # of a module of PyTorch, in which it keeps what is set on it


def with_methods(given: Any, methods: Mapping[str, Callable[..., Any]]) -> Any:
    """A copy of an object with these methods, each ``f(self, ...)``, in the place of its own, and a ``solution``: None.

    They are methods of its class, so a copy of the copy, a deep one as well, calls them on itself.
    """
    made, kind = _shallow(given), type(given)
    own = {name: vars(made).pop(name) for name in methods if name in vars(made)}
    for name, method in methods.items():
        _look_like(method, getattr(given, name))
    if methods:
        named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        made.__class__ = type(kind.__name__, (kind,), {**methods, **named, "_without": (kind, own)})
    made.solution = None
    return made


def as_it_is_now(made: Any) -> Any:
    """A copy of what :func:`with_methods` gave, with what was set on it since then, and with its own methods."""
    plain = _shallow(made)
    plain.__class__, own = type(made)._without
    vars(plain).update(own)
    return plain


def _shallow(given: Any) -> Any:
    """A copy of which nothing that is set on it later is set on the object, too."""
    made = copy.copy(given)
    vars(made).update({name: copy.copy(vars(made)[name]) for name in _REGISTRIES if name in vars(made)})
    return made


def _look_like(method: Callable[..., Any], original: Callable[..., Any]) -> None:
    """The name, the text and the arguments of a bound method."""
    for name in ("__name__", "__qualname__", "__doc__", "__module__"):
        setattr(method, name, getattr(original, name, None))
    arguments = inspect.signature(original)
    of_object = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    method.__signature__ = arguments.replace(parameters=[of_object, *arguments.parameters.values()])  # type: ignore[attr-defined]
