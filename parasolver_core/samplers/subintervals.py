"""A sampler over time subintervals: several steps are taken one after another, and make one step of a shorter sampler.

A node is then a subinterval. What its network says is the mean of what the sampler's network says in it, weighted as
the steps weigh it, so that the shorter sampler is a causal linear recurrence as well,

    x_{j+1} = A_j x_j + B_j h_j + c_j z_j ,

with the held quantity ``h`` (for diffusion the predicted clean sample) in the place of the output. It is exact, however
many steps a subinterval has: nothing is left out.

Reference: Lu, Zhu, Hou, "ParaSolver: A Hierarchical Parallel Integral Solver for Diffusion Models", ICLR 2025, whose
``num_time_subintervals`` this is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import array_namespace

from parasolver_core.arrays import Array
from parasolver_core.samplers.held_form import Float64, HeldForm, Indices
from parasolver_core.samplers.noise import NoiseSource
from parasolver_core.samplers.recurrence import Recurrence
from parasolver_core.validation import check_count


class Subintervals:
    """The tables of the shorter sampler; M subintervals.

    A step that reads earlier states or outputs reads them across the border of two subintervals. They travel with the
    state, one row each behind it: earlier states as they are, earlier predictions times :attr:`scale`, with which a
    prediction that does not change obeys the same recurrence as the state.

    Args:
        recurrence: the sampler; N steps.
        count: M, from 1 to N; where a step has several nodes, to the number of steps.

    Attributes:
        ends: (M + 1,), where each subinterval begins, and N.
        recurrence: the shorter sampler.
        weights: (M, N), of the held quantities in the mean, over ``B``.
        noise: (M, N), of each step's noise in the shorter sampler's, whose sum of squares is 1.
        states, predictions: (M, P - 1) and (M, Q - 1), of earlier states, less the first, and predictions in the mean.
        scale: (M + 1,), what earlier predictions are multiplied with.
    """

    def __init__(self, recurrence: Recurrence, count: int) -> None:
        n, stages = len(recurrence), recurrence.stages
        most = -(-n // stages)
        check_count("subintervals", count)
        if count > most:
            raise ValueError(f"subintervals: expected at most as many as the sampler has steps, {most}, got {count}")
        self.fine, self.form = recurrence, HeldForm(recurrence)
        self.ends = np.minimum(stages * np.round(np.linspace(0, most, count + 1)).astype(np.int64), n)
        self.lengths = np.diff(self.ends)
        reads = self.form.reads
        self.weights, self.noise = np.zeros((2, count, n))
        self.states, self.predictions = np.zeros((count, reads[0] - 1)), np.zeros((count, reads[1] - 1))
        a, b, c = np.zeros((3, count))
        for j, (first, end) in enumerate(zip(self.ends[:-1], self.ends[1:], strict=True)):
            a[j], b[j], c[j] = self._collect(j, int(first), int(end))
        self.recurrence, self.a, self.b = self._shorter(a, b, c), a, b
        self.scale = np.zeros(count + 1)
        for j in range(count):
            self.scale[j + 1] = a[j] * self.scale[j] + b[j]
        self.scale[self.scale == 0] = 1.0

    @property
    def rows(self) -> int:
        """How many arrays travel as one state."""
        return sum(self.form.reads) - 1

    def _collect(self, j: int, first: int, end: int) -> tuple[float, float, float]:
        """The steps ``first .. end - 1`` as one: its coefficients; the weights are written down."""
        x, h = self.form.reads
        row = self.form.onwards(np.array([first]), end - first)[0, -1]
        before, row = np.split(row, [x + h - 1])
        weights, noise = row[: end - first], row[end - first :]
        states, predictions = before[1:x], before[x:]
        b = float(weights.sum() + predictions.sum())
        b = b if b != 0 else 1.0  # steps that do not ask the network: any will do
        c = float(np.linalg.norm(noise))
        self.weights[j, first:end] = weights / b
        self.states[j], self.predictions[j] = states / b, predictions / b
        if c > 0:
            self.noise[j, first:end] = noise / c
        return float(before[:x].sum()), b, c

    def _shorter(self, a: Float64, b: Float64, c: Float64) -> Recurrence:
        fine, first = self.fine, self.ends[:-1]
        p, q = fine.held[first].T
        return Recurrence(
            timesteps=fine.timesteps[first],
            a=a[:, None],
            b=b[:, None],
            c=c,
            held=np.tile([0.0, 1.0], (len(first), 1)),
            slope=p + q * fine.slope[first],
            identity_slope=(1 - a) / b,
            signal=None if fine.signal is None else fine.signal[first],
            noise_share=fine.noise_share,
        )

    def begin(self, x_T: Array) -> Array:
        """What travels from the start, ``(batch, *event)`` or ``(batch, rows, *event)``: nothing is before it yet."""
        if self.rows == 1:
            return x_T
        xp: Any = array_namespace(x_T)
        return xp.stack([x_T, *[xp.zeros_like(x_T)] * (self.rows - 1)], axis=1)

    def state(self, travelling: Array) -> Array:
        """The states, ``(batch, *event)``, of what travels."""
        return travelling if self.rows == 1 else travelling[:, 0, ...]

    def flat_state(self, travelling: Array) -> Array:
        """The state of one sample, (size,), of what travels."""
        return travelling[: travelling.shape[0] // self.rows]

    def taking_part(self, nodes: Indices, ahead: int) -> Indices:
        """Which of these subintervals have more steps than ``ahead``."""
        return np.flatnonzero(self.lengths[nodes] > ahead)


class SubintervalNoise(NoiseSource):
    """The noise of whole subintervals, made of the noise of their steps.

    Args:
        like: ``x_T`` as it travels.
        dtype: of the noise.
        steps: the noise of the steps, shape ``(*event)``.
        tables: of the shorter sampler.
    """

    def __init__(self, like: Array, dtype: object, steps: NoiseSource, tables: Subintervals) -> None:
        super().__init__(like, dtype, len(tables.recurrence), None, self._sum)
        self._steps, self._tables = steps, tables

    def _sum(self, node: int, sample: int) -> Array:
        xp, tables = self._xp, self._tables
        total = None
        for step in range(int(tables.ends[node]), int(tables.ends[node + 1])):
            z = self._steps(step, sample) * float(tables.noise[node, step])
            total = z if total is None else total + z
        return total if tables.rows == 1 else xp.stack([total, *[xp.zeros_like(total)] * (tables.rows - 1)])

    def fingerprint(self, steps: object) -> str:
        return self._steps.fingerprint(np.flatnonzero(self._tables.fine.c)[[0, -1]].tolist() if steps else [])

    def forget(self, step: int, sample: int) -> None:
        super().forget(step, sample)
        for fine in range(int(self._tables.ends[step]), int(self._tables.ends[step + 1])):
            self._steps.forget(fine, sample)

    def forget_before(self, steps: Indices) -> None:
        super().forget_before(steps)
        self._steps.forget_before(self._tables.ends[steps])
