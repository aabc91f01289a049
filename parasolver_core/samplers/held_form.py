"""The sampler in terms of the quantity that is held when a node is filled in, vectorised over samples; on the host.

With ``h = p x + q m`` in the place of the network's output m (for diffusion the predicted clean sample),

    x_{i+1} = sum_k a[i, k] x_{i-k} + sum_k b[i, k] h_{i-k} + c[i] z_i ,

a new node's belief is a copy of the belief before it, and its state has no terms that cancel.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from parasolver_core.samplers.recurrence import Recurrence, trim

Float64 = NDArray[np.float64]
Indices = NDArray[np.int64]


class HeldForm:
    """Host tables of one sampler, for windows of many samples at once.

    Args:
        recurrence: the sampler; N steps.
    """

    def __init__(self, recurrence: Recurrence) -> None:
        self.a, self.b = (trim(table) for table in recurrence.held_form())
        self.c, self.held, self.noisy = recurrence.c, recurrence.held, recurrence.stochastic
        self.steps = len(recurrence)
        self.reads = self.a.shape[1], self.b.shape[1]  # states and held quantities that a step reads
        self.past, self.base = max(self.reads) - 1, sum(self.reads)

    def propagation(self, lo: Indices, slope: Float64, gram: Float64) -> tuple[Float64, Float64]:
        """``T`` with ``dX = T r`` and the sums of squares of its moves, (B, n, n) and (B, n).

        Each row follows from those before it, and so do its products with the Gram matrix: no n^3 work. Rows of nodes
        beyond a short window have no meaning, but no row reads a later one.

        Args:
            lo: (B,), each window's first node, whose own state does not change.
            slope: (B, n), dh/dx at the nodes.
            gram: (B, n, n), ``<r_i, r_j>``.
        """
        count, n = slope.shape
        step = np.minimum(lo + np.arange(n)[:, None], self.steps - 1)  # (n, B)
        both = np.zeros((n, count, 2 * n))  # T beside T gram
        carry = np.zeros((self.past + 1, n, count, 1))  # d x_{t+1} / d x_{t-k}
        carry[: self.reads[0], :, :, 0] = np.moveaxis(self.a[step], 2, 0)
        for k in range(min(self.reads[1], n - 1)):
            t, b = np.arange(k, n - 1), self.b[step, k]
            both[t + 1, :, t - k] += b[t]
            both[k + 1 :, :, n:] += b[t, :, None] * gram[:, : n - 1 - k].swapaxes(0, 1)
            carry[k, k:, :, 0] += b[k:] * slope.T[: n - k]
        for t in range(1, n - 1):
            for k in range(min(self.past + 1, t)):
                both[t + 1] += carry[k, t] * both[t - k]
        T, with_gram = both[:, :, :n], both[:, :, n:]
        return T.swapaxes(0, 1), np.maximum(np.vecdot(T, with_gram), 0.0).T

    def onwards(self, lo: Indices, count: int) -> Float64:
        """The states ``x_{lo+1} .. x_{lo+count}`` in terms of ``x_lo``, those before it and the held quantities.

        Args:
            lo: (B,).
            count: how many.

        Returns:
            (B, count, columns), of ``x_lo, x_{lo-1}, ..``, ``h_{lo-1}, h_{lo-2}, ..``, ``h_lo .. h_{lo+count-1}`` and,
            where the sampler adds noise, ``z_lo .. z_{lo+count-1}``. Entries of states beyond N have no meaning.
        """
        own = self.base - 1  # the first column of the new held quantities
        unit = np.eye(own + count * (1 + self.noisy))
        xs, hs = list(unit[: self.reads[0]]), list(unit[self.reads[0] : own])
        states = np.zeros((len(lo), count, len(unit)))
        for ahead in range(count):
            i, hs = np.minimum(lo + ahead, self.steps - 1), [unit[own + ahead], *hs]
            states[:, ahead] = self.after(i, xs, hs)
            if self.noisy:
                states[:, ahead, own + count + ahead] += self.c[i]
            xs = [states[:, ahead], *xs]
        return states

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
