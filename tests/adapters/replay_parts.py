"""The pass that counts with made-up members, for tests of its parts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from parasolver_adapters.diffusers.options import Choices, ParallelRun
from parasolver_adapters.diffusers.passes.second_pass import Replay
from parasolver_core import Status
from parasolver_core.solution import Stats


def rule_of(memory: int = 1, b: float = 4.0, clip: Any = None) -> Any:
    table = SimpleNamespace(
        memory=memory,
        a=np.array([[1.0], [2.0]]),
        b=np.array([[1.0], [b]]),
        held=np.array([[1.0, 1.0], [3.0, -0.5]]),
        advance=lambda i, xs, ms, z: 2 * xs[0] + 3 * ms[0] + (0 if z is None else z),
    )
    return SimpleNamespace(table=table, clip=clip)


class Part(Replay):
    """A pass with these members, in the middle of a loop of four steps of two samples."""

    def __init__(self, **members: Any) -> None:
        capture = SimpleNamespace(
            timesteps=[0, 1, 2, 3], unchanged=True, start=torch.zeros(2, 3), recorder=SimpleNamespace(references={})
        )
        state = SimpleNamespace(stats=Stats(), steps=[0], statuses=[Status.RUNNING], halted=None)
        vars(self).update(
            _pipe=SimpleNamespace(), _run=ParallelRun(), _choices=Choices.checked(), _capture=capture, _rule=rule_of(),
            _state=state, _step=0, _plain=False, _calling_back=False, called_back=False, _shared=None,
            _target=(-1, None),
            _estimate=None, _noise=None, _batch=2, _history=[], _denoiser=SimpleNamespace(outputs={}, answers={}),
        )  # fmt: skip
        vars(self).update(members)


def part_of(**members: Any) -> Any:
    return Part(**members)
