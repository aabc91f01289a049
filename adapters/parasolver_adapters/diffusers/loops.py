"""Parallel sampling of any loop around ``scheduler.step``, in whoever's code it is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from parasolver_adapters.diffusers.options import Choices, ParallelRun
from parasolver_adapters.diffusers.passes.listening import by_name
from parasolver_adapters.diffusers.pipelines import Session


class ParallelLoop:
    """A function that drives a scheduler, in parallel; made by :func:`parallel_loop`.

    Attributes:
        run: what the last call cost, a :class:`~parasolver_adapters.diffusers.ParallelRun`.
    """

    def __init__(self, call: Callable[..., Any], driven: _Driven, choices: Choices) -> None:
        self._call, self._driven, self._choices = call, driven, choices
        self._active = False
        self.run = ParallelRun()
        functools.update_wrapper(self, call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What ``call(*args, **kwargs)`` returns."""
        if self._active:  # a loop that calls itself
            return self._call(*args, **kwargs)
        session = Session(self._driven, self._call, self._choices, self.run, [])
        self._active = True
        try:
            return session.sample(by_name(inspect.signature(self._call), args, kwargs))
        finally:
            self._active = False


class _Driven:
    """In the place of a pipeline: what the loop drives."""

    def __init__(self, scheduler: Any, networks: Mapping[str, torch.nn.Module]) -> None:
        self.scheduler, self.components = scheduler, dict(networks)


def parallel_loop(
    call: Callable[..., Any],
    window: int = 16,
    *,
    scheduler: Any = None,
    networks: Sequence[torch.nn.Module] | None = None,
    **options: Any,
) -> ParallelLoop:
    """``call`` with its loop around ``scheduler.step`` in parallel; called as ``call`` is, and returns what it does.

    The function is run as it is: twice, and once more the first time, and only the last of these counts. Its loop has
    to be one that :func:`~parasolver_adapters.diffusers.parallel_sampling` takes: ``scheduler.step`` once for each of
    the scheduler's timesteps, with what networks and operations of torch make of the state. What else it does on the
    way (prints, lists that it fills, files) it does in each of the passes. A batch converges together.

    Args:
        call: draws its noise, or is given it, and returns what comes of the last state.
        window: steps evaluated in one round; 1 calls ``call`` as it is.

    Other arguments:
        scheduler: the scheduler of diffusers that the loop drives. None: the one among the attributes of the object
            whose method ``call`` is.
        networks: the networks that the loop calls. None: those among the modules of that object.
        options: ``tolerance``, ``max_seconds``, ``fallback``, ``preview`` and the others of
            :func:`~parasolver_adapters.diffusers.parallel_sampling`.

    Raises:
        TypeError, ValueError: an argument is not as described, or cannot be found.
        PipelineNotParallelError: when it is called, with the reason.

    Example::

        sample = parallel_loop(model.conditional_sample, window=16)
        actions = sample(batch_size, global_cond=cond)
        print(sample.run.stats.rounds)
    """
    if not callable(call):
        raise TypeError(f"call: expected a function that drives a scheduler, got {type(call).__name__}")
    owner = getattr(call, "__self__", None)
    scheduler = _scheduler_of(owner) if scheduler is None else scheduler
    if not _is_scheduler(scheduler):
        raise TypeError(f"scheduler: expected a scheduler of diffusers, got {type(scheduler).__name__}")
    found = _networks_of(owner) if networks is None else networks
    named = {f"network {at}": network for at, network in enumerate(found)}
    for network in named.values():
        if not isinstance(network, torch.nn.Module):
            raise TypeError(f"networks: expected torch modules, got {type(network).__name__}")
    if not named:
        raise ValueError("networks: expected the modules that the loop calls, got none")
    return ParallelLoop(call, _Driven(scheduler, named), Choices.checked(window, **options))


def _is_scheduler(value: Any) -> bool:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin  # seconds that a refused call need not wait

    return isinstance(value, SchedulerMixin)


def _scheduler_of(owner: Any) -> Any:
    found = {id(value): value for value in getattr(owner, "__dict__", {}).values() if _is_scheduler(value)}
    if len(found) == 1:
        return next(iter(found.values()))
    raise ValueError(
        f"scheduler: expected the scheduler that the loop drives, as {len(found)} were found among the attributes of "
        f"{_named_owner(owner)}; pass scheduler=..."
    )


def _networks_of(owner: Any) -> list[torch.nn.Module]:
    values = list(owner.children()) if isinstance(owner, torch.nn.Module) else getattr(owner, "__dict__", {}).values()
    found = [value for value in values if isinstance(value, torch.nn.Module)]
    if found:
        return found
    raise ValueError(
        f"networks: expected the modules that the loop calls, as none were found among the attributes of "
        f"{_named_owner(owner)}; pass networks=[...]"
    )


def _named_owner(owner: Any) -> str:
    return "a function, which has no object" if owner is None else type(owner).__name__
