"""The parallel solver: a round asks the network at the nodes of all runs, and moves them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from parasolver_core.arrays import Array, fetch, own_arithmetic
from parasolver_core.denoiser.contract import DenoiserFn
from parasolver_core.guesses.memory import Memory
from parasolver_core.methods.method import Method
from parasolver_core.methods.presets import get_method
from parasolver_core.methods.run import Run
from parasolver_core.solution import SampleRecord
from parasolver_core.solver.loop import Solver
from parasolver_core.solver.parallel_state import ParallelState
from parasolver_core.solver.sequential import SequentialState, sequential_round
from parasolver_core.solver.subintervals import SubintervalState
from parasolver_core.validation import check_count, check_tolerance, own_numbers


@dataclass(frozen=True)
class ParallelIntegralSolver(Solver):
    """Finds the sequential trajectory in parallel rounds.

    Args:
        step_rule: the sampler.
        window: nodes evaluated in one round, of each sample; 1 is the sequential sampler.
        tolerance: wanted relative RMS distance to the sequential sample; 0 means exact.
        method: a preset's name, a calibration's file or a :class:`~parasolver_core.methods.method.Method`.
        warmup_steps: sequential network calls after the first before the window opens ("preconditioning steps").
        check: in a denoiser's first run, look at a few rows again, each alone in a call of one row: rows that depend on
            other rows, or do not repeat themselves, are an error. A denoiser that passed is remembered, weakly.
        subintervals: as in :func:`solve`.
        memory: of finished samples of the same network, sampler and steps, which fills in nodes that enter.
        max_rounds: give up after so many; by default never: N suffice, or N and a sliding window's with spread nodes.
        max_rows, buckets, state_device: how the network is called, as in :func:`solve`.

    Example, by hand::

        solver = ParallelIntegralSolver(DDIM(schedule), window=16)
        state = solver.init(denoiser, x_T, schedule.timesteps(50))
        while not solver.done(state):
            solver.step(state)
        solution = solver.result(state)
    """

    window: int = 5
    tolerance: float = field(default=1e-2, kw_only=True)
    method: str | os.PathLike[str] | Method = field(default="secant", kw_only=True)
    warmup_steps: int = field(default=0, kw_only=True)
    check: bool = field(default=True, kw_only=True)
    subintervals: int | None = field(default=None, kw_only=True)
    memory: Memory | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("window", self.window)
        check_count("warmup_steps", self.warmup_steps, minimum=0)
        check_count("subintervals", self.subintervals, optional=True)
        check_tolerance(self.tolerance)
        own_numbers(self, "window", "warmup_steps", "subintervals", "tolerance")
        get_method(self.method)
        if self.memory is not None and not isinstance(self.memory, Memory):
            raise TypeError(f"memory: expected a Memory, got {type(self.memory).__name__}; Memory.learn makes one")

    def method_of(self, start: Array | None) -> Method:
        """The method of a run: a warm start, and steps to warm up with, belong to a window that slides."""
        method = get_method(self.method)
        if start is not None and self.memory is not None:
            raise ValueError("memory: a warm start says more of its run than a memory can; leave one of them out")
        method.check_choices(start=start is not None, warmup_steps=self.warmup_steps, memory=self.memory is not None)
        return method.sliding() if start is not None or self.warmup_steps else method

    def init(
        self, denoiser: DenoiserFn, x_T: Array, timesteps: ArrayLike, **options: Any
    ) -> ParallelState | SequentialState:
        options = {"seed": None, "noise": None, "save": "sample", "start": None} | options
        method = self.method_of(options["start"])
        if self.window == 1 or np.size(timesteps) == 1:  # the plain loop, to the last bit
            del options["start"]
            return SequentialState(denoiser, x_T, timesteps, self.step_rule, **self.evaluation, **options)
        options |= {"width": self.window, "warmup_steps": self.warmup_steps, "tolerance": self.tolerance}
        options |= {"memory": self.memory, "method": method} | self.evaluation
        kind = ParallelState
        if self.subintervals not in (None, np.size(timesteps)):
            kind, options["count"] = SubintervalState, self.subintervals
        state = kind(denoiser, x_T, timesteps, self.step_rule, **options)
        if self.check:
            state.check_rows(denoiser)
        return state

    def _round(self, state: ParallelState | SequentialState) -> tuple[int, int, Sequence[SampleRecord]]:
        if isinstance(state, SequentialState):
            return sequential_round(state)
        runs, check = state.runs, state.check
        upcoming = [at for run in runs for at in run.upcoming] if state.noise.slow else []
        with state.noise.ahead(upcoming):
            outputs, turns, evaluations = self._evaluate(state, runs)
            state.torn = True
            with own_arithmetic():
                summed = fetch(state.xp, [run.compare(D) for run, D in zip(runs, outputs, strict=True)])
        with own_arithmetic():
            parts = [run.correct(D, sums) for run, D, sums in zip(runs, outputs, summed, strict=True)]
            state.go_on()
        records = parts[0] if len(parts) == 1 else [record for part in parts for record in part]
        if check is not None:
            evaluations += check.look(records)
            if state.converged:
                evaluations += check.finish()
        return turns, evaluations, records

    def _evaluate(self, state: ParallelState, runs: list[Run]) -> tuple[list[Array], int, int]:
        """The round's network call: the outputs for each run, (rows, size); calls in turn, and the number of rows."""
        xp, shape, check = state.xp, (-1, *state.start.shape[1:]), state.check
        nodes, owners = [run.nodes for run in runs], [run.owners for run in runs]
        ends = list(accumulate(map(len, nodes)))

        def inputs() -> list[Array]:
            return [xp.reshape(run.inputs, shape) for run in runs]

        if check is None:
            at = np.concatenate(nodes)
            again = None if any(run.lends for run in runs) else inputs
            D = state.evaluator(inputs(), at, np.concatenate(owners), again)
        else:
            flat, nodes, owners = check.with_extra([run.inputs for run in runs], nodes, owners)
            at = np.concatenate(nodes)
            D = state.evaluator([xp.reshape(x, shape) for x in flat], at, np.concatenate(owners))
            check.note(flat, nodes, owners, xp.reshape(D, (D.shape[0], -1)))
        D = xp.reshape(D, (D.shape[0], -1))
        outputs = [D[start:end, :] for start, end in pairwise([0, *ends])]
        return outputs, state.evaluator.turns(at), state.evaluator.rows(at)
