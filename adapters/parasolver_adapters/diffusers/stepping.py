"""Running a scheduler's own loop, as pipelines do, in float64 and with its draws of noise in our hands."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

Draw = Callable[[Callable[..., torch.Tensor], tuple[Any, ...], dict[str, Any]], torch.Tensor]
Network = Callable[["Node"], torch.Tensor]


class UnsupportedSchedulerError(ValueError):
    """The scheduler, as configured, is not a linear recurrence around the network; the message says what to change."""


class Float64(TorchFunctionMode):
    """While active, on this thread only: casts to float32 keep float64, and normal draws come from ``draw``.

    Several schedulers cast the sample to float32 inside ``step``; their coefficients could then be read to seven digits
    only. Tables of the scheduler (sigmas, alphas_cumprod) stay as they are, so the coefficients are its own.

    Args:
        draw: ``draw(function, args, kwargs)`` replaces ``torch.randn(...)`` and ``torch.randn_like(...)``.
    """

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self._draw = draw

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.randn or func is torch.randn_like:
            return self._draw(func, args, kwargs).double()
        if func is torch.Tensor.float:
            return args[0].double()
        if func is torch.Tensor.to:
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def no_noise(function: Callable[..., torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Zeros in place of a draw."""
    if function is torch.randn_like:
        return torch.zeros_like(args[0])
    size = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
    return torch.zeros(tuple(size), device=kwargs.get("device"))


class Recorder:
    """Independent normal draws in place of the scheduler's, kept until they are taken."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._draws: list[torch.Tensor] = []

    def __call__(
        self, function: Callable[..., torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        shape = no_noise(function, args, kwargs).shape
        drawn = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        self._draws.append(drawn)
        return drawn

    def take(self) -> list[torch.Tensor]:
        """The draws since the last time, in their order."""
        taken, self._draws = self._draws, []
        return taken


class Listener(TorchFunctionMode):
    """While active, on this thread only: keeps the normal draws that are made, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[torch.Tensor] = []
        self.global_stream = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = func(*args, **(kwargs or {}))
        if func is torch.randn or func is torch.randn_like:
            self.draws.append(drawn)
            self.global_stream |= (kwargs or {}).get("generator") is None
        return drawn

    def playback(self) -> Float64:
        """The same draws once more, in float64."""
        draws = iter(self.draws)
        return Float64(lambda function, args, kwargs: next(draws))


@dataclass(frozen=True)
class Node:
    """One network call of a scheduler's loop: what the network is asked, and the scheduler that asks."""

    index: int
    timestep: torch.Tensor
    x: torch.Tensor
    model_input: torch.Tensor
    scheduler: Any


@dataclass(frozen=True)
class Loop:
    """A scheduler as configured, ready for any number of runs of its sequential loop; never changed itself.

    Args:
        scheduler: a private copy with its timesteps set.
        timesteps: the 0-dimensional tensors that the loop goes through, one for each network call.
        options: further arguments of ``step``, such as ``eta``.
    """

    scheduler: Any
    timesteps: tuple[torch.Tensor, ...]
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        return type(self.scheduler).__name__

    def run(
        self, network: Network, x: torch.Tensor, mode: TorchFunctionMode, generator: Any = None
    ) -> Iterator[tuple[Node, torch.Tensor, Any]]:
        """``(node, m, output of the scheduler's step)`` of each network call in turn.

        Args:
            network: ``network(node)`` gives the network's output.
            x: the first state, (batch, channels, ...).
            mode: what the scheduler runs in, for example ``Float64(no_noise)``.
            generator: passed to ``step`` where it takes one.
        """
        scheduler = copy.deepcopy(self.scheduler)
        step = _stepper(scheduler, self.timesteps, dict(self.options), generator)
        scale = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
        for i, t in enumerate(self.timesteps):
            with torch.no_grad(), mode:
                node = Node(i, t, x, scale(x, t), scheduler)
            m = network(node)
            with torch.no_grad(), mode:
                output = step(i, m, x)
            x = output.prev_sample
            yield node, m, output


@dataclass(frozen=True)
class _Output:
    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


def _stepper(
    scheduler: Any, timesteps: tuple[torch.Tensor, ...], options: dict[str, Any], generator: Any
) -> Callable[[int, torch.Tensor, torch.Tensor], Any]:
    """``step(i, m, x)`` with the arguments that the pipelines of this scheduler pass."""
    name = type(scheduler).__name__
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator

    def plain(i: int, m: torch.Tensor, x: torch.Tensor) -> Any:
        return scheduler.step(m, timesteps[i], x, **options)

    def unclip(i: int, m: torch.Tensor, x: torch.Tensor) -> Any:
        following = timesteps[i + 1] if i + 1 < len(timesteps) else None
        return scheduler.step(m, timesteps[i], x, prev_timestep=following, **options)

    def wuerstchen(i: int, m: torch.Tensor, x: torch.Tensor) -> Any:
        return scheduler.step(m, timesteps[i].expand(len(x)), x, **options)

    previous: list[torch.Tensor | None] = [None]

    def cogvideox_dpm(i: int, m: torch.Tensor, x: torch.Tensor) -> Any:
        back = timesteps[i - 1] if i else None
        x, previous[0] = scheduler.step(m, previous[0], timesteps[i], back, x, return_dict=False, **options)
        return _Output(x, previous[0])

    special = {
        "UnCLIPScheduler": unclip,
        "DDPMWuerstchenScheduler": wuerstchen,
        "CogVideoXDPMScheduler": cogvideox_dpm,
    }
    return special.get(name, plain)


ENDS_WITH_ZERO = {"DDPMWuerstchenScheduler", "SCMScheduler"}  # their pipelines loop over timesteps[:-1]
SPECIAL_ARGUMENTS = {"CogVideoXDPMScheduler": {"old_pred_original_sample", "timestep_back"}}
