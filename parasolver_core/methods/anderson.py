"""ParaTAA: a fixed-point iteration of high order with triangular Anderson acceleration, a published method.

Reference: Tang, Tang, Luo, Wang, Chang, "Accelerating Parallel Sampling of Diffusion Models", ICML 2024
(https://arxiv.org/abs/2402.09970).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from array_api_compat import device
from numpy.typing import NDArray

from parasolver_core.arrays import Array, finite_rows, matmul, uploaded, vecdot
from parasolver_core.methods.method import Method
from parasolver_core.methods.run import Run
from parasolver_core.methods.sample_run import SampleRun
from parasolver_core.rounds.acceptance import Acceptance
from parasolver_core.rounds.linearization import Linearization, Secant
from parasolver_core.rounds.shared import FillName, Shared
from parasolver_core.rounds.step_variance import StepVariance
from parasolver_core.solution import SampleRecord, Status
from parasolver_core.validation import check_count

Float64 = NDArray[np.float64]

_MOST_WEIGHT = 1e4  # a larger weight on an earlier round is the least squares problem's own noise: a plain step instead


@dataclass(frozen=True)
class Anderson(Method):
    """ParaTAA: no slopes, but a memory of earlier rounds.

    A state is final when its residual, RMS over its elements, is within ``tolerance * max(sd, floor)``, with the
    standard deviation ``sd`` of the noise that a DDPM step adds there. For rules that read one node: DDIM, DDPM, Euler.

    Args:
        order: how many steps back the fixed-point equation of a state begins; None: at the window's first node. The
            paper's best were about 8.
        memory: how many changes between rounds are combined; 0: none, plain fixed-point iteration.
        ridge: added to the diagonal of the least squares problem.
        floor: see above; published are a tolerance of 0.05 and a floor of 0.2.

    Reference: Tang et al., "Accelerating Parallel Sampling of Diffusion Models", ICML 2024, algorithm 1.
    """

    linearization: Linearization = field(default_factory=Secant, init=False, repr=False)  # of no use to it,
    spread: bool = field(default=False, init=False, repr=False)  # like these two
    fill: FillName = field(default="copy", init=False, repr=False)
    acceptance: Acceptance = field(default_factory=StepVariance)
    order: int | None = 8
    memory: int = 2
    ridge: float = 1e-3
    floor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("order", self.order, optional=True)
        check_count("memory", self.memory, minimum=0)
        for name in ("ridge", "floor"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
        if type(self.acceptance) is not StepVariance:
            raise TypeError(
                f"acceptance: this method has a stop rule of its own, with the bounds of a StepVariance, got "
                f"{self.acceptance!r}"
            )

    def check_choices(self, *, start: bool, warmup_steps: int, memory: bool) -> None:
        if memory:
            raise ValueError("memory: method='parataa' begins with copies of x_T; use method='secant' for a memory")
        if start:
            raise ValueError("start: method='parataa' begins with copies of x_T; use method='secant' for a warm start")
        if warmup_steps:
            raise ValueError(
                f"warmup_steps: method='parataa' opens its window at once, got {warmup_steps}; leave it out, or use "
                "another method"
            )

    def begin(self, shared: Shared, start: Array, trajectory: Array | None) -> list[Run]:
        if shared.recurrence.memory > 1:
            raise ValueError(
                "method: 'parataa' is defined for step rules that read the current node only (DDIM, DDPM, order 1), "
                f"got one that reads {shared.recurrence.memory}; use method='secant'"
            )
        return [self._window(shared, sample, start[sample, :]) for sample in range(start.shape[0])]

    def _window(self, shared: Shared, sample: int, start: Array) -> AndersonWindow:
        def noise(step: int) -> Array:
            return shared.xp.reshape(shared.noise(step, sample), (-1,))

        return AndersonWindow(shared, self, sample, start, noise)


@dataclass(frozen=True)
class Iterate:
    """The states behind the window's nodes in one round, and their residuals, both (n, size).

    Args:
        states, residuals: rows that were not yet in the window are zero.
        known: how many leading rows were in the window.
    """

    states: Array
    residuals: Array
    known: int


class AndersonWindow(SampleRun):
    """One sample's nodes ``lo .. hi - 1`` under ParaTAA.

    Args:
        shared: what all samples share.
        method: order, memory and ridge.
        sample: its place in the batch.
        start: ``x_T`` of the sample, (size,), in the working dtype.
        noise: ``noise(step)``, (size,).
    """

    def __init__(
        self, shared: Shared, method: Anderson, sample: int, start: Array, noise: Callable[[int], Array]
    ) -> None:
        super().__init__(sample, start if shared.keep else None)
        self._shared, self._method, self._noise, self._xp = shared, method, noise, shared.xp
        self._eps = float(shared.xp.finfo(start.dtype).eps)  # what is told of an error is at least rounding
        self.hi = shared.width
        self._X = shared.xp.stack([start] * (shared.width + 1))  # the states lo .. hi, at first copies
        self._past: list[Iterate] = []

    @property
    def nodes(self) -> NDArray[np.int64]:
        """The window's nodes."""
        return np.arange(self.lo, self.hi)

    @property
    def inputs(self) -> Array:
        """The window's states, (n, size); a view."""
        return self._X[:-1, :]

    @property
    def state(self) -> Array:
        """The last final state, (size,)."""
        return self._X[0, :]

    def estimate(self, sample: int) -> Array:
        return self._X[-1, :]

    def compare(self, D: Array) -> Array:
        """First half of a round: residuals of first and of high order; inner products for the host."""
        xp, nodes, recurrence = self._xp, self.nodes, self._shared.recurrence
        forcing = self._column(recurrence.b[nodes, 0]) * xp.astype(D, self._X.dtype, copy=False)
        if recurrence.stochastic:
            forcing = forcing + xp.stack([self._noise(i) * float(recurrence.c[i]) for i in nodes.tolist()])
        before, after = self._X[:-1, :], self._X[1:, :]
        first = self._column(recurrence.a[nodes, 0]) * before + forcing - after
        from_states, from_forcing = high_order(recurrence.a[nodes, 0], self._method.order or len(nodes))
        self._target = matmul(xp, self._asarray(from_states), before)
        self._target = self._target + matmul(xp, self._asarray(from_forcing), forcing)
        R = self._target - after
        self._past = [*self._past, Iterate(after, R, len(nodes))][-self._method.memory - 1 :]
        self._changes = [self._change(*pair) for pair in zip(self._past, self._past[1:], strict=False)]
        dot, residuals = partial(vecdot, xp), [change.residuals for change in self._changes]
        products = [dot(p, q) for p in residuals for q in residuals] + [dot(p, R) for p in residuals]
        return xp.concat([dot(first, first), dot(R, R), dot(after, after), *products])

    def correct(self, D: Array, sums: Float64) -> list[SampleRecord]:
        """Second half: accelerate, accept what is final, slide, and copy the last state into new nodes."""
        nodes, size, m, n = self.nodes, self._X.shape[1], len(self._changes), len(self.nodes)
        first, high, squared, *products = sums.reshape(-1, n)
        if not np.all(np.isfinite(sums)):
            return self._first_alone(D)
        residual = np.sqrt(first / size)
        settled = residual <= self._shared.tolerance * np.maximum(self._shared.bound[nodes], self._method.floor)
        # the first state that has not settled is final too: all before it are
        count = len(nodes) if settled.all() else int(np.argmin(settled)) + 1
        gram, cross = np.reshape(products[: m * m], (m, m, n)), np.reshape(products[m * m :], (m, n))
        weights = triangular_weights(gram, cross, self._method.ridge)
        now = self._past[-1]
        new = now.states + now.residuals
        for weight, change in zip(weights, self._changes, strict=True):
            new = new - self._column(weight) * (change.states + change.residuals)
        # the safeguard: what is final needs no weights; nor is it x + (target - x), which loses the target
        new = self._xp.concat([self._first(D)[None, :], self._target[1:count, :], new[count:, :]])
        self.error = max(self.error, float(np.max(residual[: count - 1], initial=self._eps)))
        move = np.sqrt(high / np.maximum(squared, np.finfo(float).tiny))
        self._slide(new, count)
        return self.record(nodes, count, np.append(0.0, move[:-1]), residual)

    def _slide(self, new: Array, count: int) -> None:
        """Drop ``count`` final nodes and let as many in; the remembered rounds follow."""
        total, xp = len(self._shared.recurrence), self._xp
        if self.final is not None:
            self.final += [new[i, :] for i in range(count)]
        self.lo += count
        if self.lo == total:
            self.end(Status.CONVERGED, total, new[-1, :])
            return
        hi = min(self.lo + self._shared.width, total)
        entering = hi - self.hi
        self.hi, self._X = hi, xp.concat([new[count - 1 :, :], *[new[-1:, :]] * entering])
        nothing = [xp.zeros_like(new[:1, :])] * entering

        def moved(rows: Array) -> Array:
            return xp.concat([rows[count:, :], *nothing])

        self._past = [
            Iterate(moved(old.states), moved(old.residuals), old.known - count)
            for old in self._past
            if old.known > count
        ]

    def _change(self, before: Iterate, after: Iterate) -> Iterate:
        """What a round changed; zero in the rows of nodes that were not there."""
        known = min(before.known, after.known)
        there = self._column((np.arange(after.states.shape[0]) < known).astype(np.float64))
        states, residuals = after.states - before.states, after.residuals - before.residuals
        return Iterate(states * there, residuals * there, known)

    def _first_alone(self, D: Array) -> list[SampleRecord]:
        """Numbers ran out of range. Only the first node has its true input: its step is final, all else begins anew."""
        xp, nodes, nothing = self._xp, self.nodes, np.full(len(self.nodes), np.nan)
        x = self._first(D)
        output_ok, state_ok = finite_rows(xp, xp.stack([xp.astype(D[0, :], x.dtype), x]))
        if output_ok and state_ok:
            self._past, self.error = [], max(self.error, self._eps)
            self._slide(xp.stack([x] * len(nodes)), 1)
            return self.record(nodes, 1, nothing, nothing)
        status = Status.NONFINITE_SOLVER if output_ok else Status.NONFINITE_MODEL
        self.end(status, self.lo, self.state, failed_node=self.lo)
        return self.record(nodes, 0, nothing, nothing)

    def _first(self, D: Array) -> Array:
        """The state behind the first node, which has its true input: as the sequential sampler makes it."""
        recurrence = self._shared.recurrence
        z = self._noise(self.lo) if recurrence.c[self.lo] != 0 else None
        return recurrence.advance(self.lo, [self._X[0, :]], [self._xp.astype(D[0, :], self._X.dtype)], z)

    def _asarray(self, table: Float64) -> Array:
        return uploaded(self._xp, table, device(self._X), self._X.dtype)

    def _column(self, values: Float64) -> Array:
        return self._asarray(values[:, None])


def high_order(a: Float64, order: int) -> tuple[Float64, Float64]:
    """Every state of a window from the state ``order`` steps before it, or from the window's first.

    Args:
        a: (n,), what each step multiplies its state with.
        order: at least 1.

    Returns:
        Tables (n, n), which map the window's states, and what each step adds, to the states behind the nodes.
    """
    n = len(a)
    states, forcing = np.zeros((n, n)), np.zeros((n, n))
    for i in range(n):
        begin = max(i + 1 - order, 0)
        gain = np.append(
            np.cumprod(a[begin : i + 1][::-1])[::-1], 1.0
        )  # from each of these nodes to the state behind i
        states[i, begin], forcing[i, begin : i + 1] = gain[0], gain[1:]
    return states, forcing


def triangular_weights(gram: Float64, cross: Float64, ridge: float) -> Float64:
    """Anderson weights of each node from sums over the nodes up to it, so that nothing flows backwards in time.

    Args:
        gram: (m, m, n), inner products of the changes of the residuals.
        cross: (m, n), of these with the residuals.
        ridge: added to the diagonal.

    Returns:
        (m, n). The least of them where the rounds do not tell them apart; 0 for a node whose sums or weights are out of
        range, which then makes a plain step.
    """
    m = len(cross)
    if m == 0:
        return np.zeros(cross.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        left = np.cumsum(gram, axis=2).transpose(2, 0, 1) + ridge * np.eye(m)
        right = np.cumsum(cross, axis=1).T[:, :, None]
    known = (np.isfinite(left).all(axis=(1, 2)) & np.isfinite(right).all(axis=(1, 2))).reshape(-1, 1, 1)
    left, right = np.where(known, left, np.eye(m)), np.where(known, right, 0.0)
    try:
        weights = np.linalg.solve(left, right)
    except np.linalg.LinAlgError:  # rounds that changed nothing, or the same
        weights = np.linalg.pinv(left, hermitian=True) @ right
    sound = np.all(np.abs(weights) <= _MOST_WEIGHT, axis=1, keepdims=True)  # NaN is not
    return np.where(sound, weights, 0.0)[:, :, 0].T.astype(np.float64, copy=False)
