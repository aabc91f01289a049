"""Callbacks of a pipeline that tell when they change what the pipeline goes on with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from parasolver_adapters.diffusers.passes.changes import (
    Settings,
    Weights,
    positions_of,
    switches_of,
    were_replaced,
    what_moved,
)
from parasolver_adapters.given import version_of, was_written


def watched(
    pipe: Any,
    kwargs: dict[str, Any],
    around: Callable[[], AbstractContextManager[None]],
    changed: Callable[[str], None],
) -> dict[str, Any]:
    """The arguments of a call, with its callbacks watched.

    Args:
        pipe: the pipeline.
        kwargs: arguments of its call.
        around: makes what a callback runs in.
        changed: told the name of a callback that has changed something.
    """
    inputs = getattr(kwargs.get("callback_on_step_end"), "tensor_inputs", None)
    if inputs is not None:
        kwargs = kwargs | {"callback_on_step_end_tensor_inputs": inputs}
    callbacks = {name: kwargs[name] for name in ("callback_on_step_end", "callback") if kwargs.get(name)}
    if not callbacks:
        return kwargs
    switches, weights = switches_of(pipe), Weights(pipe)

    def watch(name: str, callback: Callable[..., Any]) -> Callable[..., Any]:
        def watching(*args: Any) -> Any:
            given = args[-1] if isinstance(args[-1], dict) else {"latents": args[-1]}
            versions = {key: (value, version_of(value)) for key, value in given.items()}
            settings, positions, look = Settings(pipe, args[0]), positions_of(switches), weights.look()
            with around():
                returned = callback(*args)
            if (
                (isinstance(returned, dict) and were_replaced(versions, returned))
                or any(was_written(value, version) for value, version in versions.values())
                or settings.differ()
                or what_moved(switches, positions)
                or weights.differ(look, weights.look())
            ):
                changed(name)
            return returned

        return watching

    return kwargs | {name: watch(name, callback) for name, callback in callbacks.items()}
