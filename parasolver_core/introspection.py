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
        for held in level:
            if id(held) in seen or len(seen) >= _MOST or isinstance(held, (type, ModuleType)):
                continue
            seen.add(id(held))
            yield held
            if not leaf(held):
                following += _parts(held)
        level = following


def _parts(held: Any) -> list[Any]:
    if isinstance(held, FunctionType):
        names = inspect.getclosurevars(held)
        return [*names.nonlocals.values(), *names.globals.values()]
    if isinstance(held, MethodType):
        return [held.__self__, held.__func__]
    if isinstance(held, functools.partial):
        return [held.func, *held.args, *held.keywords.values()]
    if isinstance(held, Mapping):
        return list(held.values())
    if isinstance(held, (list, tuple)):
        return list(held)
    return list(vars(held).values()) if hasattr(held, "__dict__") else []
