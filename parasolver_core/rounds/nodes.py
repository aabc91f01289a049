"""The states and beliefs at the nodes of many windows, on the device: where their rows are."""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from parasolver_core.arrays import Array, copied, take_rows, uploaded
from parasolver_core.rounds.decisions import Windows
from parasolver_core.samplers.held_form import HeldForm, Indices


class Nodes:
    """States ``X``, held quantities ``H``, defects ``r`` and last moves ``dX`` of the windows of B samples.

    ``S`` is (B, 2 R + 1, size): R rows of states, R of held quantities, and one of zeros. Row ``past + j`` belongs to
    node ``lo + j`` of its own sample; the ``past`` rows before are what the sampler's memory reads. R fits the longest
    window; shorter ones repeat their last row.

    Args:
        form: the sampler.
        start, belief: (B, size), the states of node 0, and what is held of them.
    """

    def __init__(self, form: HeldForm, start: Array, belief: Array) -> None:
        self.xp: Any = array_namespace(start)
        self.form, self.size, self.device = form, start.shape[1], device(start)
        self.dtype = np.dtype(f"f{self.xp.finfo(start.dtype).bits // 8}")
        past = [self.xp.zeros((start.shape[0], form.past, self.size), dtype=start.dtype, device=self.device)]
        past = past if form.past else []
        x, h = start[:, None, :], belief[:, None, :]
        self.S = self.xp.concat([*past, x, *past, h, self.xp.zeros_like(x)], axis=1)
        self.dX: Array = self.xp.zeros_like(self.S[:, : form.past + 1, :])
        self.r: Array = self.xp.zeros_like(start[:, None, :])
        self.held: Array | None = None  # the weights of what is held at the nodes, once they are on the device

    @property
    def half(self) -> int:
        """R."""
        return self.S.shape[1] // 2

    @property
    def first(self) -> Array:
        """(B, size), the states of the windows' first nodes; a view."""
        return self.S[:, self.form.past, :]

    def first_copy(self) -> Array:
        """:attr:`first` in memory of its own."""
        return copied(self.xp, self.first)

    def inputs(self, windows: Windows) -> Array:
        """(rows, size), the states of all nodes, sample by sample; see :meth:`inputs_are_a_view`."""
        if windows.inside.all():
            return self.xp.reshape(self.S[:, self.form.past : self.half, :], (-1, self.size))
        rows = np.arange(len(windows.n))[:, None] * self.S.shape[1] + self.form.past + np.arange(windows.longest)
        return take_rows(self.flat, rows[windows.inside])

    def inputs_are_a_view(self, windows: Windows) -> bool:
        """Whether :meth:`inputs` may be rows of the buffer itself: where they are equally far apart."""
        return 1 in (len(windows.n), windows.longest)

    def history(self, row: int | slice, at: int) -> tuple[list[Array], list[Array]]:
        """Of one sample, or several, states and held quantities at a node of the window and before, as a step reads."""
        place, (states, beliefs) = self.form.past + at, self.form.reads
        held = [self.S[row, self.half + place - k, :] for k in range(beliefs)]
        return [self.S[row, place - k, :] for k in range(states)], held

    @property
    def flat(self) -> Array:
        """All rows, one sample's after the other's."""
        return self.xp.reshape(self.S, (-1, self.size))

    def rows(self, at: Indices) -> Array:
        """Rows (B, k) of each sample's own, (B, k, size)."""
        of_all = np.arange(len(at))[:, None] * self.S.shape[1] + at
        return self.xp.reshape(take_rows(self.flat, of_all.reshape(-1)), (*at.shape, self.size))

    def put(self, table: NDArray[Any]) -> Array:
        """A host table as an array of the states' kind; the cast is the host's."""
        return uploaded(self.xp, table.astype(self.dtype, copy=False), self.device)

    def stay(self, rows: Indices) -> None:
        """Only these samples go on."""
        self.held = None
        self.S, self.dX = take_rows(self.S, rows), take_rows(self.dX, rows)


def rectangular(rows: Array, counts: Indices, longest: int) -> Array:
    """``counts`` (B,) rows of each sample, as ``longest`` of each: shorter lists repeat their last."""
    if rows.shape[0] == len(counts) * longest:
        return rows
    first = np.cumsum(counts) - counts
    return take_rows(rows, (first[:, None] + np.minimum(np.arange(longest), counts[:, None] - 1)).reshape(-1))
