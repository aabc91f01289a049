"""One round's correction: a quasi-Newton step for the whole window.

The window's equations are ``L X - B D(X) = rhs``. With the network's Jacobian replaced by the slopes ``G``, the defect
``r = D(X) - M`` (what the network says, less what was believed) moves the states by ``T r`` with
``T = (L - B G)^{-1} B``: a small triangular matrix made here on the host in float64, and one matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import device
from numpy.typing import NDArray

from parasolver_core.arrays import Array, assign, increment, to_host
from parasolver_core.recurrence import Recurrence

Float64 = NDArray[np.float64]

_BLOCK = 2**18  # elements of the window worked on at a time on a CPU, so that the passes of a round meet in its cache


def propagation(recurrence: Recurrence, slope: Float64, lo: int) -> Float64:
    """``T``, how defects spread over a window: (n, n), row i is the change of state ``lo + 1 + i`` for unit defects.

    Args:
        recurrence: the sampler.
        slope: (n,), slopes of the nodes ``lo .. lo + n - 1``.
        lo: first node of the window, whose own state does not change.
    """
    n = len(slope)
    a, b = recurrence.a[lo : lo + n], recurrence.b[lo : lo + n]
    defect, change = np.eye(n), np.zeros((n + 1, n))
    for i in range(n):
        for k in range(min(a.shape[1], i + 1)):
            change[i + 1] += a[i, k] * change[i - k]
        for k in range(min(b.shape[1], i + 1)):
            change[i + 1] += b[i, k] * (defect[i - k] + slope[i - k] * change[i - k])
    return change[1:]


@dataclass(frozen=True)
class Moments:
    """Inner products of one sample's window, on the host; n nodes.

    Args:
        gram: (n, n), ``<r_i, r_j>`` of the defects.
        cross: (n,), ``<dX_i, r_i>`` with the last move of each node's input.
        moved: (n,), ``<dX_i, dX_i>``.
        size: (n,), ``<X_i, X_i>``.
    """

    gram: Float64
    cross: Float64
    moved: Float64
    size: Float64

    def norms(self, T: Float64) -> Float64:
        """``||T r||`` of each row of T, (rows, n): how far defects move a state, known before it is moved."""
        return np.sqrt(np.maximum(((T @ self.gram) * T).sum(axis=1), 0.0))

    @classmethod
    def unpack(cls, packed: Float64, n: int) -> Moments:
        """From the vector of :func:`inner_products`, brought to the host."""
        gram, cross, moved, size = np.split(packed, [n * n, n * n + n, n * n + 2 * n])
        return cls(gram.reshape(n, n), cross, moved, size)


def take_defect(xp: Any, X: Array, M: Array, dX: Array, D: Array, rows: slice, on_cpu: bool) -> tuple[Array, Array]:
    """Overwrite the believed outputs with the defect ``r = D - M`` and take the inner products.

    Everything that the host decides in a round follows from these, so a round waits for the device once.

    Args:
        X, M, dX: (capacity, size): buffers of states, believed outputs and last moves.
        D: (n, size): the network's outputs.
        rows: the window's n rows in the buffers.

    Returns:
        The buffer that now holds the defect in the place of M, and a vector for :meth:`Moments.unpack`.
    """
    total: Array = 0
    for columns in _blocks(D, on_cpu):
        at = (rows, columns)
        r = xp.astype(D[:, columns], X.dtype, copy=False) - M[at]
        M = assign(M, at, r)
        total = total + inner_products(xp, X[at], dX[at], r)
    return M, total


def inner_products(xp: Any, X: Array, dX: Array, r: Array) -> Array:
    """The vector that :meth:`Moments.unpack` takes apart, from states, last moves and defects, each (n, size)."""
    gram = xp.reshape(xp.matmul(r, r.T), (-1,))
    dot = xp.linalg.vecdot  # for PyTorch many times as fast as xp.vecdot, a batch of matrix products
    return xp.concat([gram, dot(dX, r), dot(dX, dX), dot(X, X)])


def apply_correction(
    xp: Any, X: Array, R: Array, dX: Array, D: Array, rows: slice, T: Float64, slope: Float64, on_cpu: bool
) -> tuple[Array, Array, Array]:
    """``dX = T r``; ``X += dX``; ``M = D + g dX`` in the place of the defect.

    Args:
        X, R, dX: (capacity, size): buffers of states, defects and last moves.
        D: (n, size): the network's outputs.
        rows: the window's n rows in the buffers.
        T: (n, n), the moves of the nodes' own inputs for the defects.
        slope: (n,).

    Returns:
        The buffers that now hold the states, the believed outputs and the moves.
    """
    T_device = xp.asarray(T, dtype=X.dtype, device=device(X))
    g = xp.asarray(slope[:, None], dtype=X.dtype, device=device(X))
    for columns in _blocks(D, on_cpu):
        at = (rows, columns)
        move = xp.matmul(T_device, R[at])
        X, dX = increment(X, at, move), assign(dX, at, move)
        move *= g  # our own array by now: no further one is made
        move += xp.astype(D[:, columns], X.dtype, copy=False)
        R = assign(R, at, move)
    return X, R, dX


def fetch(xp: Any, packed: list[Array]) -> list[Float64]:
    """Bring the inner products of all samples, a vector each, to the host in one transfer."""
    host = to_host(packed[0] if len(packed) == 1 else xp.concat(packed)).astype(np.float64)
    return np.split(host, np.cumsum([one.shape[0] for one in packed])[:-1])


def _blocks(D: Array, on_cpu: bool) -> list[slice]:
    n, size = D.shape
    block = max(_BLOCK // max(n, 1), 1024) if on_cpu else size
    return [slice(start, min(start + block, size)) for start in range(0, size, max(block, 1))]
