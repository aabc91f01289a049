"""Steps of loops that are recorded outside of a pipeline, for tests of what is made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_unflatten

from parasolver_adapters.diffusers.recording.capture import Recorder
from parasolver_adapters.diffusers.recording.programs import Program

Step = Callable[[torch.Tensor, Callable[..., Any]], tuple[torch.Tensor, torch.Tensor]]


class Net(torch.nn.Module):
    """Each row by itself, and what it was called with."""

    def __init__(self, gain: float = 0.5) -> None:
        super().__init__()
        self.gain, self.seen = gain, list[tuple[Any, ...]]()

    def forward(self, x: torch.Tensor, t: Any = 0.0, cond: Any = None, flag: Any = None) -> Any:
        self.seen.append((x, t, cond))
        t = t.reshape(-1, *[1] * (x.ndim - 1)) if isinstance(t, torch.Tensor) and t.ndim else t
        out = torch.tanh(x) * self.gain + 0.1 * t
        return (out if cond is None else out + cond.mean()), flag


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def recorded(step: Step, network: torch.nn.Module, state: torch.Tensor, recorder: Recorder | None = None) -> Program:
    """What one step of a loop does: ``step(state, call)`` gives ``(x, m)``, ``call`` being the network's."""
    recorder = recorder or Recorder()
    recorder.begin(state, [])
    try:
        return recorder.finish(
            *step(state, lambda *args, **kwargs: recorder.call(network, network.forward, args, kwargs))
        )
    finally:
        recorder.close()


def repeated(program: Program, state: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """``(x, m)`` of a recorded step from another state, its network calls made one by one."""
    run, sent = program.run(state), None
    while True:
        try:
            call, leaves = run.send(sent)  # type: ignore[arg-type]
        except StopIteration as end:
            return end.value
        args, kwargs = tree_unflatten(leaves, call.spec)
        sent = tree_leaves(call.module.forward(*args, **kwargs), is_leaf=lambda one: one is None)
