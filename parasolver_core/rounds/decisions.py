"""What the host decides of a round: slopes, T, what is final; vectorised over the samples of a batch.

Where the windows stand, and all that is known of their nodes, are small float64 tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parasolver_core.rounds.acceptance import RoundView, shares
from parasolver_core.rounds.shared import Shared
from parasolver_core.samplers.held_form import Float64, Indices

ROUNDING = 8  # moves of so many units in the last place are the arithmetic's own noise: they tell nothing
WILD = 1e3  # a correction so many times the state has left the surrogate's reach: fill the node in again
_ROOM, _ROOM_TOLERATED = 4.0, 1e-4  # a state may once have been so many times its size; more, beside a tolerance


@dataclass(frozen=True)
class Decision:
    """What the host makes of a round, for B samples whose longest window has n nodes.

    Args:
        T: (B, n, n), moves of the states for unit defects.
        slope: (B, n), dh/dx.
        move, defect: (B, n), relative moves of the states, and RMS of the defects.
        accepted, sound: (B,), how many leading nodes are final, and are worth keeping.
        grown: whether a state that is kept once was much larger: what it has of its rounding is of that size.
    """

    T: Float64
    slope: Float64
    move: Float64
    defect: Float64
    accepted: Indices
    sound: Indices
    grown: bool = False

    @property
    def passed(self) -> Indices:
        """(B,), how many states behind the first are known: those of nodes that are kept, or behind final ones."""
        return np.maximum(self.accepted, self.sound - 1)


@dataclass(frozen=True)
class Sums:
    """A round's inner products, of B samples and n nodes.

    Args:
        gram: (B, n, n), ``<r_i, r_j>`` of the defects.
        cross: (B, n), ``<dX_i, r_i>`` with the last move of each node's input.
        squares: (B, n), ``<X_i, X_i>``.
        predicted: (B,), ``<h, h>`` of the last node's prediction as the network has it; infinite if not asked for.
        unit: rounding unit of what the network returns.
        finite: whether all of them were finite.
    """

    gram: Float64
    cross: Float64
    squares: Float64
    predicted: Float64
    unit: float
    finite: bool = True

    @property
    def fine(self) -> NDArray[np.bool_]:
        """(B, n), where nothing has run out of range."""
        return np.isfinite(self.own) & np.isfinite(self.cross) & np.isfinite(self.squares)

    @property
    def own(self) -> Float64:
        """(B, n), ``<r_i, r_i>``."""
        return np.einsum("bii->bi", self.gram)

    def within(self, inside: NDArray[np.bool_]) -> Sums:
        """With 0 for nodes that are not inside, (B, n), and where something has run out of range."""
        pairs = inside[:, :, None] & inside[:, None, :] & np.isfinite(self.gram)
        cross = np.where(inside & np.isfinite(self.cross), self.cross, 0.0)
        squares = np.where(inside & np.isfinite(self.squares), self.squares, 1.0)
        return Sums(np.where(pairs, self.gram, 0.0), cross, squares, self.predicted, self.unit, finite=False)


class Windows:
    """Where the windows of B samples stand.

    Args:
        shared: what all samples share.
        count: B.
        size: elements of a state.
        eps: rounding unit of the states.
        slope: (N,) or (B, N), slopes dm/dx to begin with; None: the linearization's.
    """

    def __init__(self, shared: Shared, count: int, size: int, eps: float, slope: Float64 | None) -> None:
        self._shared, self._form, self._size, self.eps = shared, shared.form, size, eps
        self.lo, self.n, self.longest = np.zeros(count, dtype=np.int64), np.ones(count, dtype=np.int64), 1
        slope = initial_slopes(shared) if slope is None else finite_slopes(shared, slope)
        self._slope = np.array(np.broadcast_to(slope, (count, shared.form.steps)))  # dm/dx
        self._moved = np.zeros((count, shared.form.steps))  # sum of squares of each node's last move; 0: unknown
        self._measured = np.zeros((count, shared.form.steps), dtype=np.bool_)  # whether a slope is more than a guess
        # of the root of each state's sum of squares: the least that it may be, and the most that it ever was
        self._least, self._largest = np.zeros((2, count, shared.form.steps + 1))
        self.error = np.zeros(count)
        self.begun = False  # whether the network has been asked

    @property
    def inside(self) -> NDArray[np.bool_]:
        """(B, longest), which columns are nodes of the windows."""
        return np.arange(self.longest) < self.n[:, None]

    @property
    def nodes(self) -> Indices:
        """(B, longest); beyond N the last node."""
        return np.minimum(self.lo[:, None] + np.arange(self.longest), self._form.steps - 1)

    @property
    def last(self) -> Indices:
        """(B,), the last node of each."""
        return self.lo + self.n - 1

    @property
    def slope_held(self) -> Float64:
        """(B, N), slopes dh/dx."""
        return self._form.held[:, 0] + self._form.held[:, 1] * self._slope

    def nothing(self) -> Decision:
        """Before anything was evaluated: nothing moves, nothing is final."""
        zero = np.zeros((len(self.n), 1, 1))
        return Decision(zero, zero[:, 0], zero[:, 0], zero[:, 0], np.zeros(len(self.n), dtype=np.int64), self.n)

    def decide(self, sums: Sums, usable: Indices) -> Decision:
        """Slopes, T and what is final, where the first ``usable`` nodes, (B,), have told something."""
        n, nodes, size = self.longest, self.nodes, self._size
        p, q = np.moveaxis(self._form.held[nodes], 2, 0)
        inside = np.arange(n) < usable[:, None]
        slope = self._new_slopes(sums, nodes, inside)
        T, norms = self._form.propagation(self.lo, slope, sums.gram)
        length, move = np.sqrt(sums.squares), np.sqrt(norms)
        relative = shares(move, length)
        still = (relative <= ROUNDING * sums.unit) & ~np.take_along_axis(self._measured, nodes, axis=1)
        slope = np.where(still, p, slope)  # the network's own output stands
        sound = np.maximum(leading(inside & (relative <= WILD)), 1)
        accepted = self._accept(relative, length / np.sqrt(size), sums, usable, sound)
        kept = np.arange(n) < sound[:, None]
        at = np.nonzero(inside)
        self._moved[at[0], nodes[at]] = np.where(kept, norms, 0.0)[at]
        grown = self._note_sizes(nodes, inside, kept, length, move, sums)
        self._note_rounding(nodes, accepted, length + move)
        defects = np.sqrt(sums.own / size) / np.abs(q)
        return Decision(T, slope, relative, defects, accepted, sound, grown)

    def _new_slopes(self, sums: Sums, nodes: Indices, inside: NDArray[np.bool_]) -> Float64:
        """dh/dx at the nodes, (B, n), by the linearization."""
        p, q = np.moveaxis(self._form.held[nodes], 2, 0)
        old, moved = (np.take_along_axis(table, nodes, axis=1) for table in (self._slope, self._moved))
        known = inside & (moved > (ROUNDING * sums.unit) ** 2 * sums.squares)
        new, at = old.copy(), np.nonzero(inside)
        # <dX, r> of the held quantity is q times that of the output
        told = old[inside], np.where(known, moved, 0.0)[inside], (sums.cross / q)[inside]
        new[inside] = new_slopes(self._shared, *told, sums.unit)
        self._slope[at[0], nodes[at]] = new[at]
        self._measured[at[0], nodes[at]] |= (new != old)[at]
        return p + q * new

    def _accept(self, move: Float64, length: Float64, sums: Sums, usable: Indices, sound: Indices) -> Indices:
        """How many leading nodes of each sample are final."""
        accepted = np.ones(len(move), dtype=np.int64)
        for row, (lo, n, last) in enumerate(zip(self.lo.tolist(), usable.tolist(), self.last.tolist(), strict=True)):
            told = float(sums.predicted[row]) / self._size, float(length[row, last - lo]) ** 2
            smallness = self._shared.recurrence.smallness(last, *told)
            count, error = accept(self._shared, lo, move[row, :n], length[row, :n], smallness, sums.unit)
            accepted[row] = min(count, sound[row])
            self.error[row] = max(self.error[row], error)
        return accepted

    def _note_sizes(
        self,
        nodes: Indices,
        inside: NDArray[np.bool_],
        kept: NDArray[np.bool_],
        length: Float64,
        move: Float64,
        sums: Sums,
    ) -> bool:
        """Keep account of how large states are and were; whether those kept are to be made again for that."""
        at, most = np.nonzero(inside), length + move
        self._least[at[0], nodes[at]] = np.maximum(length - move, 0.0)[at]
        before = self._largest[at[0], nodes[at]]
        self._largest[at[0], nodes[at]] = np.maximum(before, most[at])
        self.begun = True
        room = max(_ROOM, _ROOM_TOLERATED * self._shared.tolerance / self.eps)
        grown = np.take_along_axis(self._largest > room * self._least, nodes, axis=1) & kept
        if not np.any(grown[:, 1:]):
            return False
        every = np.arange(len(nodes))[:, None]
        self._largest[every, nodes] = np.where(kept, most, self._largest[every, nodes])
        return True

    def _note_rounding(self, nodes: Indices, accepted: Indices, size: Float64) -> None:
        """Final states that once were much larger, and are not made again, keep the rounding of that size."""
        once = shares(np.take_along_axis(self._largest, nodes, axis=1), size)
        final = np.arange(nodes.shape[1]) < accepted[:, None]
        left = np.where(final & (once > _ROOM), self.eps * once, 0.0)
        self.error = np.maximum(self.error, left.max(axis=1))

    def slide(self, lo: Indices, hi: Indices, node: Indices, last: Indices) -> None:
        """The next windows are nodes ``lo .. hi - 1``, (B,); those of ``node``, (B, rows), beyond ``last`` are new."""
        self.lo, self.n, self.longest = lo, hi - lo, int((hi - lo).max())
        rows, columns = np.nonzero(node > last[:, None])
        new = node[rows, columns]
        self._least[rows, new] = self._largest[rows, new] = 0.0  # not known yet

    def stay(self, rows: Indices) -> None:
        """Only these samples go on."""
        for name in ("lo", "n", "_slope", "_moved", "_measured", "_least", "_largest", "error"):
            setattr(self, name, getattr(self, name)[rows])


def initial_slopes(shared: Shared) -> Float64:
    """Slopes dm/dx, (N,), before anything is known of the network."""
    return finite_slopes(shared, shared.linearization.initial(shared.recurrence))


def finite_slopes(shared: Shared, slope: Float64) -> Float64:
    """The slopes (.., N), or the sampler's first guess where they are not finite."""
    return np.where(np.isfinite(slope), slope, shared.recurrence.slope)


def new_slopes(shared: Shared, old: Float64, moved: Float64, cross: Float64, unit: float) -> Float64:
    """Slopes of the nodes of a round by the linearization, as in its ``update``; the old ones where it finds none.

    What rounding leaves of a slope that cancels is none: a network that says 0 whatever its input is then believed to.
    """
    new = shared.linearization.update(old, moved, cross)
    new = np.where(np.abs(new) <= ROUNDING * unit * np.abs(old), 0.0, new)
    return np.where(np.isfinite(new), new, old)


def accept(shared: Shared, lo: int, move: Float64, size: Float64, smallness: Float64, unit: float) -> tuple[int, float]:
    """How many leading nodes of one sample are final, at least 1 as the first node's input was, and the error left.

    The error is never less than the rounding unit: a round makes states, and the network its outputs, in another order
    of additions than the plain loop does, so that no more is known of a node whose move was 0.

    Args:
        shared: what all samples share.
        lo, move, size: as in :class:`~parasolver_core.rounds.acceptance.RoundView`.
        smallness: (N,), of all nodes.
        unit: rounding unit of what the network returns.
    """
    nodes = slice(lo, lo + len(move))
    view = RoundView(lo, move, size, shared.bound[nodes], ROUNDING * unit, smallness[nodes])
    count, error = shared.acceptance.accept(view, shared.tolerance)
    return max(count, 1), max(error, unit)


def leading(flags: NDArray[np.bool_]) -> Indices:
    """How many leading flags of each row hold, (B,); of flags (n,), how many."""
    return np.where(flags.all(axis=-1), flags.shape[-1], np.argmin(flags, axis=-1))
