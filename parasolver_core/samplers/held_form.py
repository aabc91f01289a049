"""The sampler in terms of the quantity that is held when a node is filled in, vectorised over samples; on the host.

With ``h = p x + q m`` in the place of the network's output m (for diffusion the predicted clean sample),

    x_{i+1} = sum_k a[i, k] x_{i-k} + sum_k b[i, k] h_{i-k} + c[i] z_i ,

a new node's belief is a copy of the belief before it, and its state has no terms that cancel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from parasolver_core.samplers.recurrence import Recurrence, StepNoise
from parasolver_core.samplers.tables import in_held
from parasolver_core.samplers.terms import combine

Float64 = NDArray[np.float64]
Indices = NDArray[np.int64]

_CANCELS = 4.0  # a step whose states weigh so many times what they do in the sampler's own form has parts that cancel
_LONG = 64  # nodes of a window from which on a matrix product takes longer than rows one after another; measured


class HeldForm:
    """Host tables of one sampler, for windows of many samples at once.

    Args:
        recurrence: the sampler; N steps.
    """

    def __init__(self, recurrence: Recurrence) -> None:
        self.a, self.b = in_held(recurrence.a, recurrence.b, recurrence.held)
        self.c, self.held, self.noisy = recurrence.c, recurrence.held, recurrence.stochastic
        self.steps = len(recurrence)
        self.reads = self.a.shape[1], self.b.shape[1]  # states and held quantities that a step reads
        self.past, self.base = max(self.reads) - 1, sum(self.reads)
        self.held_parts = np.ascontiguousarray(self.held.T)  # (2, N), p and q
        self.latest = np.abs(np.stack([self.a[:, 0], self.b[:, 0]]))  # of the last state, and of what is held there
        # how far behind the last node each state and held quantity is that its step reads
        self.behind = np.array([*range(self.reads[0]), *range(self.reads[1])])
        self.cancels = bool((np.abs(self.a).sum(axis=1) > _CANCELS * np.abs(recurrence.a).sum(axis=1)).any())
        self.gain = max(1.0, float(np.abs(self.a).sum(axis=1).max() + np.abs(self.b).sum(axis=1).max()))  # of a step

    def growth(self) -> float:
        """How many times as large a change of a state becomes at most along the steps while held quantities stay."""
        largest, changes = 1.0, np.zeros((self.reads[0], self.steps))  # of the last states, for a unit change at each
        for i, row in enumerate(self.a):
            changes[0, i] = 1.0
            with np.errstate(over="ignore", invalid="ignore"):
                changes = np.vstack([row @ changes, changes[:-1]])
            largest = max(largest, float(np.max(np.abs(changes[0]))))
        return largest

    def propagation(self, nodes: Indices, slope: Float64, gram: Float64) -> tuple[Float64, Float64]:
        """``T`` with ``dX = T r`` and the sums of squares of its moves, (B, n, n) and (B, n).

        Each row follows from those before it, and in long windows so do its products with the Gram matrix: no n^3 work.
        Rows of nodes beyond a short window have no meaning, but no row reads a later one.

        Args:
            nodes: (B, n), of the windows; the state of the first does not change.
            slope: (B, n), dh/dx at the nodes.
            gram: (B, n, n), ``<r_i, r_j>``.
        """
        count, n = slope.shape
        step = nodes.T  # (n, B)
        beside = n > _LONG
        rows = np.zeros((n, count, 2 * n if beside else n))  # T, and T gram beside it
        carry = np.zeros((self.past + 1, n, count, 1))  # d x_{t+1} / d x_{t-k}
        carry[: self.reads[0], :, :, 0] = self.a.T[: self.reads[0], step]
        for k in range(min(self.reads[1], n - 1)):
            b = self.b[:, k].take(step)
            np.einsum("tbt->tb", rows[k + 1 :, :, : n - 1 - k])[...] = b[k : n - 1]
            if beside:
                rows[k + 1 :, :, n:] += b[k : n - 1, :, None] * gram[:, : n - 1 - k].swapaxes(0, 1)
            carry[k, k:, :, 0] += b[k:] * slope.T[: n - k]
        work = np.empty_like(rows[0])
        for t in range(1, n - 1):
            for k in range(min(self.past + 1, t)):
                np.multiply(carry[k, t], rows[t - k], out=work)
                rows[t + 1] += work
        T = np.ascontiguousarray(rows[:, :, :n].swapaxes(0, 1))
        with_gram = rows[:, :, n:].swapaxes(0, 1) if beside else T @ gram
        return T, np.maximum(np.vecdot(T, with_gram), 0.0)

    def onwards(self, lo: Indices, count: int) -> Float64:
        """The states ``x_{lo+1} .. x_{lo+count}`` in terms of ``x_lo``, those before it and the held quantities.

        Args:
            lo: (B,).
            count: how many.

        Returns:
            (B, count, columns), of ``x_lo, x_{lo-1}, ..``, ``h_{lo-1}, h_{lo-2}, ..``, ``h_lo .. h_{lo+count-1}`` and,
            where the sampler adds noise, ``z_lo .. z_{lo+count-1}``. Entries of states beyond N have no meaning.
        """
        first = self.base - 1  # the first column of the new held quantities
        unit = np.eye(first + count * (1 + self.noisy))
        xs, hs = list(unit[: self.reads[0]]), list(unit[self.reads[0] : first])
        states = np.zeros((len(lo), count, len(unit)))
        for ahead in range(count):
            i = np.minimum(lo + ahead, self.steps - 1)
            hs = [unit[first + ahead], *hs]
            states[:, ahead] = self.after(i, xs, hs)
            if self.noisy:
                states[:, ahead, first + count + ahead] += self.c[i]
            xs = [states[:, ahead], *xs]
        return states

    def carried(self, last: int, xs: list[Any], hs: list[Any], noise: StepNoise) -> Any:
        """The sample of one trajectory, if what is held at node ``last`` stays what it is.

        Args:
            xs, hs: ``x_last, x_{last-1}, ..`` and ``h_last, h_{last-1}, ..``, arrays of any library.
            noise: of each step.
        """
        for i in range(last, self.steps):
            terms = [(float(self.a[i, k]), x) for k, x in enumerate(xs)]
            terms += [(float(self.b[i, k]), h) for k, h in enumerate(hs)]
            terms += [(float(self.c[i]), noise(i))] if self.c[i] != 0 else []
            xs, hs = [combine(terms), *xs[:-1]], [hs[0], *hs[:-1]]
        return xs[0]

    def after(self, i: Indices, xs: list[Float64], hs: list[Float64]) -> Float64:
        """``x_{i+1}`` without its noise, one step for each of B samples.

        Args:
            i: (B,).
            xs, hs: ``x_i, x_{i-1}, ..`` and ``h_i, h_{i-1}, ..``, each (B, width) or (width,).
        """
        x = np.zeros((len(i), xs[0].shape[-1]))
        for k, row in enumerate(xs[: self.reads[0]]):
            x += self.a[i, k, None] * row
        for k, row in enumerate(hs[: self.reads[1]]):
            x += self.b[i, k, None] * row
        return x
