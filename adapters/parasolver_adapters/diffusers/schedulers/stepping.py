"""Running a scheduler's own loop, as pipelines do."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

Network = Callable[["Node"], torch.Tensor]


class UnsupportedSchedulerError(ValueError):
    """The scheduler, as configured, is not a linear recurrence around the network; the message says what to change."""


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
        self,
        network: Network,
        x: torch.Tensor,
        mode: TorchFunctionMode,
        generator: Any = None,
        changed: Callable[[int, torch.Tensor], torch.Tensor] = lambda i, x: x,
    ) -> Iterator[tuple[Node, torch.Tensor, Any]]:
        """``(node, m, output of the scheduler's step)`` of each network call in turn.

        Args:
            network: ``network(node)`` gives the network's output.
            x: the first state, (batch, channels, ...).
            mode: what the scheduler runs in, for example ``Float64(no_noise)``.
            generator: passed to ``step`` where it takes one.
            changed: ``changed(i, x)`` is given to step i in the place of the state that the step before it returns.
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
            yield node, m, output
            x = changed(i + 1, output.prev_sample)


@dataclass(frozen=True)
class _Output:
    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


def _stepper(
    scheduler: Any, timesteps: tuple[torch.Tensor, ...], options: dict[str, Any], generator: Any
) -> Callable[[int, torch.Tensor, torch.Tensor], Any]:
    """``step(i, m, x)`` with the arguments that the pipelines of this scheduler pass."""
    name = type(scheduler).__name__
    parameters = inspect.signature(scheduler.step).parameters
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    if "generator" in parameters or (takes_any and generator is not None):
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
