"""How large states are and were: what they have of its rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from parasolver_core.rounds.acceptance import shares
from parasolver_core.samplers.held_form import Float64, HeldForm, Indices

_ROOM, _ROOM_TOLERATED = 4.0, 1e-4  # a state may once have been so many times its size; more, beside a tolerance


def room(tolerance: float, eps: float) -> float:
    """How many times a state's size may be what is added to it, or what it once was, for the rounding of that."""
    return max(_ROOM, _ROOM_TOLERATED * tolerance / eps)


class Sizes:
    """The sizes of the states of B samples, node by node: roots of their sums of squares.

    A state keeps the rounding of the largest that it ever was, and of the largest that was ever added to it.

    Args:
        form: the sampler.
        count, columns: of the tables, of a column for each node and some that are never read.
        tolerance: of the run.
        eps: rounding unit of the states.
    """

    def __init__(self, form: HeldForm, count: int, columns: int, tolerance: float, eps: float) -> None:
        self._form, self._eps, self._room = form, eps, room(tolerance, eps)
        self.least, self.largest = np.zeros((2, count, columns))  # that it may be now, and that it ever was
        self._asked = np.zeros((count, columns)) if form.cancels else None  # as the network was asked

    def note(
        self,
        nodes: tuple[Indices, Indices],
        inside: NDArray[np.bool_],
        kept: NDArray[np.bool_],
        length: Float64,
        move: Float64,
        added: Float64,
    ) -> tuple[bool, Float64 | None]:
        """Keep account of a round, (B, n) each.

        Args:
            nodes: of the windows, and their places in the whole tables.
            inside, kept: of which nodes something is known, and which go on or become final.
            length: of the states as the network was asked.
            move, added: how far they move, and the parts of that, which may cancel.

        Returns:
            Whether states that are kept are to be made again for their rounding. And, relative to the states, the
            rounding that is left in those that are not; None if there is none, as a rule.
        """
        (node, at), most = nodes, length + move
        least = np.where(inside, np.maximum(length - move, 0.0), self.least.take(at))
        largest = self.largest.take(at)
        largest = np.where(inside, np.maximum(largest, length + added), largest)
        grown = bool((kept & (largest > self._room * least))[:, 1:].any())
        if grown:
            largest = np.where(kept, most, largest)
        write(self.least, at, least)
        write(self.largest, at, largest)
        if self._asked is not None:
            write(self._asked, at[inside], length[inside])
            largest = np.maximum(largest, self._parts(self._asked, node, at))
        return grown, self._left(largest, most)

    def end(self, rows: Indices, length: Float64) -> Float64 | float:
        """What the last step leaves in the samples of these rows, of those lengths, (rows,): as :meth:`note` says."""
        assert self._asked is not None
        node = np.full(len(rows), self._form.steps)
        left = self._left(self._parts(self._asked, node, node + rows * self._asked.shape[1]), length)
        return 0.0 if left is None else left

    def _left(self, largest: Float64, size: Float64) -> Float64 | None:
        """The rounding of states, relative to their size, if the largest that was added to them is much more."""
        if not (largest > _ROOM * size).any():
            return None
        once = shares(largest, size)
        return np.where((once > _ROOM) & (size > 0), self._eps * once, 0.0)

    def _parts(self, asked: Float64, nodes: Indices, at: Indices) -> Float64:
        """How large the states are that those of these nodes are made of: if they are smaller, what is held cancels."""
        a, parts = np.abs(self._form.a), np.zeros(nodes.shape)
        for k in range(a.shape[1]):
            known = nodes > k
            parts[known] += a[nodes[known] - 1, k] * asked.take(at[known] - 1 - k)
        return parts

    def forget(self, at: Indices) -> None:
        """New nodes were never large."""
        write(self.least, at, 0.0)
        write(self.largest, at, 0.0)

    def stay(self, rows: Indices) -> None:
        """Only these samples go on."""
        self.least, self.largest = self.least[rows], self.largest[rows]
        self._asked = None if self._asked is None else self._asked[rows]


def write(table: NDArray[Any], at: Indices, values: Any) -> None:
    """``table[..] = values`` at these places of the whole table."""
    table.reshape(-1)[at] = values
