"""What the host decides of a round: slopes, T, what is final; vectorised over the samples of a batch.

Where the windows stand, and all that is known of their nodes, are small float64 tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parasolver_core.rounds.acceptance import RoundView, leading, shares
from parasolver_core.rounds.shared import Shared
from parasolver_core.rounds.sizes import Sizes, write
from parasolver_core.rounds.slopes import ROUNDING, finite_slopes, followed, initial_slopes, new_slopes
from parasolver_core.samplers.held_form import Float64, Indices

_STEEP = 1e2  # a slope that makes more of a rounding of the state than so many of the output: left by a jump
WILD = 1e3  # a correction so many times the state has left the surrogate's reach: fill the node in again


@dataclass(frozen=True)
class Decision:
    """What the host makes of a round, for B samples whose longest window has n nodes.

    Args:
        T: (B, n, n), moves of the states for unit defects.
        slope: (B, n), dh/dx; that of the first node, which does not move, has no meaning.
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


@dataclass(frozen=True)
class Sums:
    """A round's inner products, of B samples and n nodes.

    Args:
        gram: (B, n, n), ``<r_i, r_j>`` of the defects.
        cross: (B, n), ``<dX_i, r_i>`` with the last move of each node's input.
        length: (B, n), the root of ``<X_i, X_i>``.
        held: (B, n), the root of ``<H_i, H_i>``, as the network has it.
        unit: rounding unit of what the network returns.
        finite: whether all of them were finite.
    """

    gram: Float64
    cross: Float64
    length: Float64
    held: Float64
    unit: float
    finite: bool = True

    @property
    def defects(self) -> Float64:
        """(B, n), ``<r_i, r_i>``."""
        return self.gram.diagonal(axis1=1, axis2=2)


class Windows:
    """Where the windows of B samples stand, and what is known of their nodes.

    What is known are tables (B, N + width), of a column for each node and some that are never read.

    Args:
        shared: what all samples share.
        count: B.
        size: elements of a state.
        eps: rounding unit of the states.
        slope: (N,) or (B, N), slopes dm/dx to begin with; None: the linearization's.
    """

    def __init__(self, shared: Shared, count: int, size: int, eps: float, slope: Float64 | None) -> None:
        self._shared, self._form, self._size, self.eps = shared, shared.form, size, eps
        steps, columns = shared.form.steps, shared.form.steps + shared.width
        slope = initial_slopes(shared) if slope is None else finite_slopes(shared, slope)
        self._slope = np.zeros((count, columns))  # dm/dx
        self._slope[:, :steps] = slope
        self._moved = np.zeros((count, columns))  # sum of squares of each node's last move; 0: unknown
        self._measured = np.zeros((count, columns), dtype=np.bool_)  # whether a slope is more than a guess
        self.sizes = Sizes(shared.form, count, columns, shared.tolerance, eps)
        self.error = np.zeros(count)
        self.begun = False  # whether the network has been asked
        self._place(np.zeros(count, dtype=np.int64), np.ones(count, dtype=np.int64), 1)

    def _place(self, lo: Indices, n: Indices, longest: int) -> None:
        """The windows are nodes ``lo .. lo + n - 1``, (B,)."""
        self.lo, self.n, self.longest = lo, n, longest
        columns = np.arange(longest)
        nodes = lo[:, None] + columns
        self.inside = columns < n[:, None]  # (B, longest), which columns are nodes of the windows
        self.nodes = np.minimum(nodes, self._form.steps - 1)  # (B, longest); beyond N the last node
        self.held = self._form.held_parts.take(self.nodes, axis=1)  # (2, B, longest), of what is held
        self._at = nodes + np.arange(0, self._slope.size, self._slope.shape[1])[:, None]  # their places in the tables

    @property
    def last(self) -> Indices:
        """(B,), the last node of each."""
        return self.lo + self.n - 1

    @property
    def slope_held(self) -> Float64:
        """(B, N), slopes dh/dx."""
        return self._form.held[:, 0] + self._form.held[:, 1] * self._slope[:, : self._form.steps]

    def nothing(self) -> Decision:
        """Before anything was evaluated: nothing moves, nothing is final."""
        zero = np.zeros((len(self.n), 1, 1))
        return Decision(zero, zero[:, 0], zero[:, 0], zero[:, 0], np.zeros(len(self.n), dtype=np.int64), self.n)

    def decide(self, sums: Sums, usable: Indices) -> Decision:
        """Slopes, T and what is final, where the first ``usable`` nodes, (B,), have told something."""
        columns, (p, q) = np.arange(self.longest), self.held
        inside = columns < usable[:, None]
        slope = p + q * self._new_slopes(sums, q, inside)
        T, norms = self._form.propagation(self.nodes, slope, sums.gram)
        length, move, defects = sums.length, np.sqrt(norms), np.sqrt(sums.defects)
        relative = shares(move, length)
        still = relative <= ROUNDING * sums.unit
        if still[:, 1:].any():
            worthless = ~self._measured.take(self._at) | (np.abs(slope - p) * length > _STEEP * sums.held)
            slope = np.where(still & worthless, p, slope)  # the network's own output stands
        sound = np.maximum(leading(inside & (relative <= WILD)), 1)
        accepted = np.minimum(self._accept(relative, length / np.sqrt(self._size), sums, inside), sound)
        told = self._shared, self._form.latest.take(self.nodes, axis=1), slope, relative
        if not (followed(*told, 0.0, sums.unit) | (columns >= accepted[:, None])).all():
            follows = followed(*told, shares(sums.held, length), sums.unit)
            accepted = np.minimum(accepted, np.maximum(leading(follows), 1))
        kept = columns < sound[:, None]
        write(self._moved, self._at[inside], norms[inside])
        added = (np.abs(T) @ defects[..., None])[..., 0]  # the move's parts, which may cancel
        grown, left = self.sizes.note((self.nodes, self._at), inside, kept, length, move, added)
        if left is not None:
            self.error = np.maximum(self.error, np.where(columns < accepted[:, None], left, 0.0).max(axis=1))
        self.begun = True
        defects /= np.abs(q) * np.sqrt(self._size)
        return Decision(T, slope, relative, defects, accepted, sound, grown)

    def _new_slopes(self, sums: Sums, q: Float64, inside: NDArray[np.bool_]) -> Float64:
        """dm/dx at the nodes, (B, n), by the linearization."""
        old, moved = self._slope.take(self._at), self._moved.take(self._at)
        size = sums.length**2
        moved = np.where(moved > (ROUNDING * sums.unit) ** 2 * size, moved, 0.0)
        # <dX, r> of the held quantity is q times that of the output
        before, at = old[inside], self._at[inside]
        told = moved[inside], (sums.cross / q)[inside], size[inside]
        new = new_slopes(self._shared, before, *told, sums.unit)
        old[inside] = new
        write(self._slope, at, new)
        write(self._measured, at[new != before], True)
        return old

    def _accept(self, move: Float64, length: Float64, sums: Sums, inside: NDArray[np.bool_]) -> Indices:
        """How many leading nodes of each sample are final, and what error they leave; (B, n) each.

        It is never less than the rounding unit: a round makes states, and the network its outputs, in another order of
        additions than the plain loop does, so that no more is known of a node whose move was 0.
        """
        shared, nodes = self._shared, self.nodes
        small = np.ones_like(move)
        if shared.small_data.is_told(self.last):
            at_last = np.arange(len(self.n)), self.n - 1
            told = shared.small_data.smallness(self.last, sums.held[at_last] ** 2 / self._size, length[at_last] ** 2)
            small = np.take_along_axis(np.broadcast_to(told, (len(nodes), told.shape[-1])), nodes, axis=1)
        move = np.where(inside, move, np.inf)  # never settled
        view = RoundView(self.lo, move, length, shared.bound.take(nodes), ROUNDING * sums.unit, small)
        if shared.acceptance.many:
            count, error = shared.accept(view)
        else:
            told = [shared.accept(view.of(row, n)) for row, n in enumerate(inside.sum(1).tolist())]
            count, error = (np.array(part) for part in zip(*told, strict=True))
        self.error = np.maximum(np.fmax(self.error, error), sums.unit)
        return np.maximum(count, 1)

    def end(self, rows: Indices, length: Float64) -> None:
        """These samples are final, and their lengths are those, (rows,): what their last step leaves is told of."""
        self.error[rows] = np.maximum(self.error[rows], self.sizes.end(rows, length))

    def slide(self, lo: Indices, hi: Indices, last: Indices) -> None:
        """The next windows are nodes ``lo .. hi - 1``, (B,); those beyond ``last`` are new."""
        self._place(lo, hi - lo, int((hi - lo).max()))
        new = self._at[np.arange(self.longest) > (last - lo)[:, None]]
        write(self._moved, new, 0.0)  # not known yet, or not any more
        self.sizes.forget(new)

    def stay(self, rows: Indices) -> None:
        """Only these samples go on."""
        self.sizes.stay(rows)
        for name in ("_slope", "_moved", "_measured", "error"):
            setattr(self, name, getattr(self, name)[rows])
        self._place(self.lo[rows], self.n[rows], self.longest)
