"""Runs in progress: what a solver advances, and what a callback sees."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import array_api_compat
import numpy as np
from numpy.typing import ArrayLike, NDArray

from parasolver_core.arrays import Array, detach, narrow, to_host, working_dtype
from parasolver_core.denoiser.contract import DenoiserFn, check_agreement
from parasolver_core.denoiser.evaluator import Evaluator
from parasolver_core.samplers.noise import NoiseFn, NoiseSource, Seed
from parasolver_core.samplers.recurrence import Recurrence
from parasolver_core.samplers.step_rules import StepRule, table
from parasolver_core.solution import RoundRecord, Stats, Status
from parasolver_core.validation import check_scale, check_start

Save = Literal["sample", "trajectory"]


@dataclass(frozen=True)
class Reached:
    """How far a run is. Made anew after each round and put in place at once, so that all of it is of one round.

    Nothing of it refers to the state: a cycle would keep the buffers alive after the run.

    Args:
        steps, statuses: how many steps of each sample are final, and how it stands.
        states: gives the last final state of each sample, ``(batch, *event)``, in the working dtype.
        kept: for each sample, gives all its final states, at least ``steps + 1`` of them, each of the event's size.
        errors: (batch,), estimated relative errors.
        failures: of the samples that are not finite, ``(node, round)``.
        stats: what it cost.
    """

    steps: tuple[int, ...]
    statuses: tuple[Status, ...]
    states: Callable[[], Array]
    kept: Sequence[Callable[[], Sequence[Array]]]
    errors: NDArray[np.float64]
    failures: Mapping[int, tuple[int, int]]
    stats: Stats


class SolverState(ABC):
    """A run in progress, as :meth:`Solver.step` advances it and as callbacks see it.

    An interrupt may come anywhere. What a round is working on is then torn; what is told here is of the last whole one.
    """

    foresees = True  # whether there are estimates of the sample before it is final
    _reached: Reached

    def __init__(
        self,
        denoiser: DenoiserFn,
        x_T: Array,
        timesteps: ArrayLike,
        step_rule: StepRule,
        *,
        seed: Seed | None,
        noise: Array | NoiseFn | None,
        save: Save,
        max_rows: int | None,
        buckets: Sequence[int] = (),
        state_device: Any = None,
    ) -> None:
        if save not in ("sample", "trajectory"):
            raise ValueError(f'save: expected "sample" or "trajectory", got {save!r}')
        check_start(x_T)
        self.x_T, self.save, self._device = detach(x_T), save, array_api_compat.device(x_T)
        if state_device is not None:
            self.x_T = _moved(self.x_T, state_device)
        self.xp = array_api_compat.array_namespace(x_T)
        self.dtype = working_dtype(self.xp, x_T.dtype)
        self.recurrence: Recurrence = table(step_rule, timesteps)
        check_agreement(denoiser, step_rule)
        check_scale(self.x_T, step_rule.start_scale(self.recurrence.timesteps))
        self.timesteps = self.recurrence.timesteps
        self.length = len(self.timesteps)
        self.noise = NoiseSource(self.x_T, self.dtype, self.length, seed, noise)
        self.start = self.x_T  # what the runs begin with
        self.evaluator = self._set_up(denoiser, x_T, (max_rows, buckets, state_device))
        self.halted: Status | None = None
        self.torn = False  # whether a round has begun to move states, and not ended

    def _set_up(self, denoiser: DenoiserFn, x_T: Array, options: tuple[Any, ...]) -> Evaluator:
        """What the rows of a round are given to; a sampler, a start and noise that are the runs' own are set here."""
        return Evaluator(denoiser, x_T, self.recurrence, self.noise, *options)

    @property
    def batch(self) -> int:
        """Number of samples."""
        return int(self.x_T.shape[0])

    @property
    def stats(self) -> Stats:
        """What the run has cost."""
        return self._reached.stats

    @property
    def steps(self) -> tuple[int, ...]:
        """How many steps of each sample are final."""
        return self._reached.steps

    @property
    def statuses(self) -> tuple[Status, ...]:
        """How each sample stands."""
        return self._reached.statuses

    @property
    def states(self) -> Array:
        """The last final state of each sample, ``(batch, *event)``."""
        return self._given_back(self._state_of(self._reached.states()))

    @property
    def failures(self) -> Mapping[int, tuple[int, int]]:
        """``(node, round)`` of the samples whose status is not finite."""
        return self._reached.failures

    def errors(self) -> NDArray[np.float64]:
        """Estimated relative error of each sample, (batch,)."""
        return self._reached.errors

    @abstractmethod
    def estimate(self) -> Array:
        """The best estimate of the sample so far, ``(batch, *event)``: a preview while the run goes on."""

    @abstractmethod
    def _survey(self, stats: Stats) -> Reached:
        """How far the run is after a round, with its stats."""

    def commit(self, record: RoundRecord) -> None:
        """A round is over: what it has reached takes the place of what there was."""
        evaluator = self.evaluator
        self._reached = self._survey(self.stats.after(record, evaluator.calls, evaluator.max_rows))
        self.torn = False

    def trajectory(self) -> Array | None:
        """All final states if they were to be saved, ``(N + 1, batch, *event)``; NaN where one is not final."""
        if self.save != "trajectory":
            return None
        reached, xp, event = self._reached, self.xp, self.x_T.shape[1:]
        kept = [states()[: steps + 1] for steps, states in zip(reached.steps, reached.kept, strict=True)]
        missing = xp.full_like(xp.reshape(kept[0][0], event), float("nan"))
        rows = [
            xp.stack([xp.reshape(states[i], event) if i < len(states) else missing for states in kept])
            for i in range(self.length + 1)
        ]
        return narrow(xp, xp.stack(rows), self.x_T.dtype)

    def final(self, step: int) -> Array:
        """The state after so many steps, final and kept for a trajectory, of every sample, ``(batch, *event)``."""
        rows = [states()[step] for states in self._reached.kept]
        return self._given_back(stacked(self.xp, rows, self.x_T.shape))

    def expected(self, sample: int, i: int) -> Array | None:
        """The output expected at node i of a final sample, ``(*event)``, if it was interpolated; else None."""
        return None

    def _failures(self, nodes: Mapping[int, int], stats: Stats) -> dict[int, tuple[int, int]]:
        """Of the samples that failed at these nodes: the round in which each did."""
        known = self._reached.failures if stats.rounds else {}
        return {sample: known.get(sample, (node, stats.rounds)) for sample, node in nodes.items()}

    def halt(self, status: Status) -> None:
        """End the run for all samples that are not final."""
        self.halted = status

    def fingerprint(self) -> dict[str, str]:
        """What processes that share the rows must have been given alike: hashes of the arrays, by name."""
        recurrence = self.recurrence
        noisy = np.flatnonzero(recurrence.c)[[0, -1]].tolist() if recurrence.stochastic else []
        names = "timesteps", "a", "b", "c", "held", "slope", "identity_slope"
        tables = [getattr(recurrence, name) for name in names]
        return {
            "timesteps and step rule": hash_of(*tables),
            "shape and dtype of x_T": f"{tuple(self.x_T.shape)}, {self.x_T.dtype}",
            "x_T": hash_of(to_host(self.xp.astype(self.x_T, self.dtype))),
            "seed or noise": self.noise.fingerprint(noisy),
        }

    def _state_of(self, values: Array) -> Array:
        """The states in what the runs work on, ``(batch, *event)``."""
        return values

    def _given_back(self, values: Array) -> Array:
        """A result in the dtype and on the device of ``x_T`` as it was given."""
        return array_api_compat.to_device(narrow(self.xp, values, self.x_T.dtype), self._device)


def stacked(xp: Any, rows: Sequence[Array], shape: tuple[int, ...]) -> Array:
    """Rows of the samples, (size,), as ``(batch, *event)``."""
    return xp.reshape(xp.stack(rows), shape)


def unchanged(states: Sequence[Array]) -> Sequence[Array]:
    return states


def _moved(x_T: Array, device: Any) -> Array:
    try:
        return array_api_compat.to_device(x_T, device)
    except Exception as error:
        raise ValueError(
            f"state_device: expected a device of x_T's array library that is there, such as 'cpu' for PyTorch, got "
            f"{device!r} ({type(error).__name__}: {error})"
        ) from error


def hash_of(*arrays: NDArray[Any]) -> str:
    """Of the arrays' bytes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
