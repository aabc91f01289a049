"""A parallel run over subintervals in progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from parasolver_core.arrays import Array
from parasolver_core.denoiser.contract import DenoiserFn
from parasolver_core.denoiser.evaluator import Evaluator
from parasolver_core.denoiser.subintervals import SubintervalEvaluator
from parasolver_core.guesses.memory import Memory
from parasolver_core.methods.method import Method
from parasolver_core.samplers.subintervals import SubintervalNoise, Subintervals
from parasolver_core.solution import Stats
from parasolver_core.solver.parallel_state import ParallelState
from parasolver_core.solver.state import Reached


class SubintervalState(ParallelState):
    """A parallel run over subintervals of ``count`` groups of steps; outside it still has the sampler's own steps."""

    evaluator: SubintervalEvaluator

    def __init__(
        self, *args: Any, count: int, method: Method, start: Array | None, memory: Memory | None, **options: Any
    ) -> None:
        if memory is not None:
            raise ValueError("memory: it is of single steps; leave it out, or leave out subintervals")
        if start is not None:
            raise ValueError("start: a warm start is of single steps; leave it out, or leave out subintervals")
        self._count = count
        super().__init__(*args, method=method.sliding(), start=start, memory=memory, **options)

    def _set_up(self, denoiser: DenoiserFn, x_T: Array, options: tuple[Any, ...]) -> Evaluator:
        self._tables = tables = Subintervals(self.recurrence, self._count)
        keep = self.save == "trajectory"
        evaluator = SubintervalEvaluator(denoiser, x_T, tables, self.noise, *options, keep=keep)
        self.recurrence, self.start = tables.recurrence, tables.begin(self.x_T)
        self.noise = SubintervalNoise(self.start, self.dtype, self.noise, tables)
        return evaluator

    def _state_of(self, values: Array) -> Array:
        return self._tables.state(values)

    def _survey(self, stats: Stats) -> Reached:
        reached, ends = super()._survey(stats), self._tables.ends.tolist()
        between, state = self.evaluator.between, self._tables.flat_state
        return replace(
            reached,
            steps=tuple(ends[node] for node in reached.steps),
            kept=[partial(_every_state, kept, partial(between, s), state) for s, kept in enumerate(reached.kept)],
            failures={sample: (ends[node], round_) for sample, (node, round_) in reached.failures.items()},
        )


def _every_state(
    kept: Callable[[], Sequence[Array]], between: Callable[[int], Sequence[Array]], state: Callable[[Array], Array]
) -> Sequence[Array]:
    """The states at the borders of one sample's subintervals, and between them."""
    borders, states = kept(), []
    for node, border in enumerate(borders):
        states += [*between(node - 1), state(border)] if node else [state(border)]
    return states
