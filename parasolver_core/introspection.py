"""What a callable refers to: the network inside a user's function, object or partial."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

_DEPTH, _MOST = 4, 1000


def reachable(thing: Any, leaf: Callable[[Any], bool]) -> Iterator[Any]:
    """``thing`` and the objects it holds, each once, outermost first: by attributes, closures, globals it names.

    Args:
        thing: a callable, or any object.
        leaf: whether an object's own parts are of no interest.
    """
    seen: set[int] = set()
    level = [thing]
    for _ in range(_DEPTH):
        following = []
        for one in level:
            if id(one) in seen or len(seen) >= _MOST or isinstance(one, (type, ModuleType)):
                continue
            seen.add(id(one))
            yield one
            if not leaf(one):
                following += _parts(one)
        level = following


def _parts(one: Any) -> list[Any]:
    if isinstance(one, FunctionType):
        names = inspect.getclosurevars(one)
        return [*names.nonlocals.values(), *names.globals.values()]
    if isinstance(one, MethodType):
        return [one.__self__, one.__func__]
    if isinstance(one, functools.partial):
        return [one.func, *one.args, *one.keywords.values()]
    if isinstance(one, Mapping):
        return list(one.values())
    if isinstance(one, (list, tuple)):
        return list(one)
    return list(vars(one).values()) if hasattr(one, "__dict__") else []
