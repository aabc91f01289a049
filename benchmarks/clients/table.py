"""A row of the table, and how it is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parasolver_adapters.diffusers import ParallelRun
from parasolver_core import Solution

TOLERANCES = (1e-2, 0.0)
BATCH = 2
HEAD = """| client | lines | window | calls | rounds, 1e-2 | rounds, 0 | distance, 1e-2 | distance, 0 |
|---|---|---|---|---|---|---|---|"""

Run = tuple[Tensor, Solution | ParallelRun]


@dataclass(frozen=True)
class Client:
    """A row of the table.

    Args:
        name: of the client and its sampler.
        lines: that its user writes, from import to call, beside the client's own.
        calls: of the network, one after another, in its own loop.
        window: nodes in a round.
        own: its own sample.
        ours: ``ours(tolerance)``, its sample in parallel, with the solution.
    """

    name: str
    lines: int
    calls: int
    window: int
    own: Callable[[], Tensor]
    ours: Callable[[float], Run]


def seeded(run: Callable[[], Any]) -> Any:
    """With the global stream from its beginning."""
    torch.manual_seed(0)
    return run()


def row(one: Client) -> str:
    """The client's line of the table."""
    want, distances, rounds = one.own(), [], []
    for tolerance in TOLERANCES:
        sample, solution = one.ours(tolerance)
        distances.append(float((sample - want).norm() / want.norm()))
        rounds.append(solution.stats.rounds)
    cells = [one.name, one.lines, one.window, one.calls, *rounds, *(f"{distance:.1e}" for distance in distances)]
    return "| " + " | ".join(map(str, cells)) + " |"
