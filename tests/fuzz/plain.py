"""The plain loops of a problem, which its programs share: by hand and by the library, run once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from parasolver_core import Solution, Status, solve_sequential
from tests.fuzz import oracle
from tests.fuzz.programs import CHOICES, Program, program


@dataclass(frozen=True)
class Plain:
    """The plain loops of a problem, by hand and by the library, and what is wrong with them.

    Args:
        outside: of the network.
        complaints: what is wrong with them.
    """

    ways: list[oracle.Way]
    sequential: Solution
    outside: float | None
    complaints: list[str]


@lru_cache(maxsize=1)
def plain_loops(problem: int) -> Plain:
    drawn, complaints = program(problem * CHOICES), list[str]()
    drawn.network.fails_in = 0
    ways = _ways(drawn)
    return Plain(ways, _sequential(drawn, ways, complaints), drawn.network.outside, complaints)


@lru_cache(maxsize=64)
def shaken(problem: int, sample: int, share: float) -> float | None:
    drawn, plain = program(problem * CHOICES), plain_loops(problem)
    drawn.network.outside = plain.outside
    return oracle.shaken(drawn, sample, plain.ways[sample], share)


def fits(drawn: Program, state: Any) -> bool:
    """Whether a state is within the range of the dtype of x_T; its largest number stands for all beyond, too."""
    with np.errstate(over="ignore"):
        values = drawn.xp.abs(drawn.xp.astype(state, drawn.x_T.dtype))
    return bool(drawn.xp.all(values < float(drawn.xp.finfo(drawn.x_T.dtype).max)))


def _ways(drawn: Program) -> list[oracle.Way]:
    """Each sample's plain loop; sets how far the network is good, which is said in units of the trajectories."""
    batch = range(drawn.x_T.shape[0])
    ways = [oracle.plain(drawn, sample) for sample in batch]
    if drawn.reach is not None and not any(way.whose for way in ways):
        size = max(float(np.max(np.abs(oracle.host(x)))) for way in ways for x in way.states)
        scale = drawn.recurrence.input_scale
        # beyond anything that the trajectories hold, which stay as they are
        drawn.network.outside = drawn.reach * size * (1.0 if scale is None else float(np.max(scale)))
    return ways


def _sequential(drawn: Program, ways: list[oracle.Way], complaints: list[str]) -> Solution:
    """The library's plain loop, and whether it is the one written by hand."""
    got = solve_sequential(
        drawn.network, drawn.x_T, drawn.grid, drawn.rule, save="trajectory", throw=False, **drawn.noise
    )
    for sample, way in enumerate(ways):
        whose = {Status.CONVERGED: "", Status.NONFINITE_MODEL: "model", Status.NONFINITE_SOLVER: "solver"}
        if not drawn.network.kind.exact and (way.whose or not oracle.eps(drawn)):
            continue
        if not fits(drawn, way.states[-1]):
            continue  # the sample overflows in the dtype of x_T only
        status = got.statuses[sample]
        if whose.get(status) != way.whose:
            complaints.append(f"plain loop: {status}, by hand {way.whose}")
        if drawn.network.kind.exact and status is Status.CONVERGED:
            narrow = oracle.host(drawn.xp.astype(way.states[-1], drawn.x_T.dtype))
            same = np.array_equal(oracle.host(got.sample[sample, ...]), narrow)
            if not same:
                complaints.append(f"plain loop: sample {sample} is not the one made by hand")
    return got
