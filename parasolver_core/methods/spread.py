"""Nodes spread over the whole trajectory: the trajectory is coarse before it is exact, so few nodes do at first.

The network is evaluated at a few nodes only. Between them the predicted sample (the held quantity ``h = p x + q m`` of
the recurrence) is interpolated linearly, which closes the system: every state is a linear function of ``x_T``, of the
noise and of the predictions at the nodes. The nodes are solved for together, with the same slopes and the same
correction as in a sliding window. As the rounds go on, the change of a round comes down to the error of the
interpolation; then the midpoints join, whose defects are that error, measured. When what is left of both is within the
tolerance, it is done. Where too many nodes would be needed for that, a sliding window goes on from what is known.

Samples that have the same nodes are one run, and move together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from parasolver_core.arrays import Array, host_view, take_rows
from parasolver_core.methods.level_states import LevelStates
from parasolver_core.methods.levels import Levels, interpolation
from parasolver_core.methods.refinement import Aims, Refinement, Verdict
from parasolver_core.methods.run import Outcome, Run
from parasolver_core.methods.sliding import Outlook, Sliding
from parasolver_core.rounds.acceptance import shares
from parasolver_core.rounds.shared import Shared
from parasolver_core.rounds.slopes import new_slopes
from parasolver_core.samplers.held_form import Float64, Indices
from parasolver_core.solution import SampleRecord, Status


class SpreadNodes(Run):
    """The samples whose nodes are those of one level; B of them, n nodes.

    Args:
        shared: what all samples share.
        levels: of the sampler.
        states: of the samples, at the nodes of one level.
        sliding: makes the windows that go on for samples.
        refinements: how each sample's nodes stand.
        slope: (B, N), dh/dx; None: the linearization's.
    """

    def __init__(
        self,
        shared: Shared,
        levels: Levels,
        states: LevelStates,
        sliding: Sliding,
        refinements: list[Refinement],
        slope: Float64 | None = None,
    ) -> None:
        self._shared, self._form, self._levels, self._states = shared, shared.form, levels, states
        self.samples, self._sliding, self.refinements = states.samples, sliding, refinements
        p, q = np.moveaxis(shared.form.held, 1, 0)
        initial = p + q * shared.linearization.initial(shared.recurrence)
        self._slope = np.tile(initial, (len(refinements), 1)) if slope is None else slope
        self.ended, self._born = {}, []

    @property
    def _picks(self) -> Indices:
        """Rows of the level's nodes evaluated next, (B, k); shorter lists repeat their last."""
        picked = [refinement.picked for refinement in self.refinements]
        longest = max(map(len, picked))
        return np.stack([np.append(nodes, np.repeat(nodes[-1], longest - len(nodes))) for nodes in picked])

    @property
    def _counts(self) -> Indices:
        return np.array([len(refinement.picked) for refinement in self.refinements])

    @property
    def nodes(self) -> Indices:
        return np.concatenate([self._states.level.nodes[refinement.picked] for refinement in self.refinements])

    @property
    def owners(self) -> Indices:
        return np.repeat(self.samples, self._counts)

    @property
    def inputs(self) -> Array:
        return self._shared.given(self._states.inputs([refinement.picked for refinement in self.refinements]))

    @property
    def lends(self) -> bool:
        return False

    def compare(self, D: Array) -> Array:
        return self._states.compare(self._shared.taken(D), self._picks, self._counts)

    def correct(self, D: Array, sums: Float64) -> list[SampleRecord]:
        picks, counts, size, k = self._picks, self._counts, self._states.size, self._picks.shape[1]
        sums = sums.reshape(len(counts), -1)
        asked = [self._states.level.nodes[refinement.picked] for refinement in self.refinements]
        gram = sums[:, : k * k].reshape(-1, k, k)
        np.einsum("bii->bi", gram)[...] = self._states.squares(gram)
        lost, real = self._drop(sums, picks, counts)
        gram = np.where(real[:, :, None] & real[:, None, :], gram, 0.0)
        cross, moved, said, squares = (np.where(real, part, 0.0) for part in np.split(sums[:, k * k :], 4, axis=1))
        new = self._update(picks, real, cross, moved, squares)
        self._note_sizes(picks, real, said / size, squares / size)
        g = self._slope[:, self._states.level.nodes]
        T = _propagation(self._states.level.response, g, picks, real)
        at_end = self._states.level.end[picks] * real + ((self._states.level.end * g)[:, None, :] @ T)[:, 0]
        # the slope may see little of what the network will make of a move, so the move of its last input counts too
        effects = _norms(np.stack([at_end, at_end * new, T[:, -1] * new], axis=1), gram)
        moves = _norms(T, gram)
        lost |= ~(np.isfinite(moves).all(axis=1) & np.isfinite(effects).all(axis=1))
        nodes = self._states.level.nodes
        scale = np.sqrt(size) * np.stack([each.scale * each.smallness[nodes] for each in self.refinements])
        move, effects = shares(moves, scale), shares(effects, np.broadcast_to(scale[:, -1:], effects.shape))
        self._states.move(np.where(lost[:, None, None], 0.0, T), g, picks, real & ~lost[:, None])
        verdicts = [
            refinement.abandon() if lost[row] else refinement.after(move[row], effects[row, 0], max(effects[row, 1:]))
            for row, refinement in enumerate(self.refinements)
        ]
        move = np.where(real & ~lost[:, None], np.take_along_axis(move, picks, axis=1), np.nan)
        defects = np.where(real & ~lost[:, None], np.sqrt(np.einsum("bii->bi", gram) / size), np.nan)
        records = [
            SampleRecord(
                int(sample),
                asked[row],
                self._form.steps if verdicts[row] is Verdict.CONVERGED else 0,
                move[row, : counts[row]],
                defects[row, : counts[row]],
                self.refinements[row].error,
            )
            for row, sample in enumerate(self.samples)
        ]
        self._go_on(verdicts)
        return records

    def _drop(self, sums: Float64, picks: Indices, counts: Indices) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which samples are lost, (B,), and which of the rows are real and finite, (B, k)."""
        k = picks.shape[1]
        real = np.arange(k) < counts[:, None]
        diagonal, squares = np.einsum("bii->bi", sums[:, : k * k].reshape(-1, k, k)), sums[:, -k:]
        fine = np.isfinite(diagonal) & np.isfinite(squares)
        lost = np.zeros(len(picks), dtype=np.bool_)
        for row in np.flatnonzero((real & ~fine).any(axis=1)).tolist():
            lost[row] = not self.refinements[row].drop(fine[row, : counts[row]])
        real &= fine & ~lost[:, None]
        if not real.all():
            self._states.drop(real)
        return lost, real

    def _update(
        self, picks: Indices, real: NDArray[np.bool_], cross: Float64, moved: Float64, squares: Float64
    ) -> NDArray[np.bool_]:
        """New slopes and sizes; which of the picked rows were evaluated for the first time."""
        every, nodes = np.arange(len(picks))[:, None], self._states.level.nodes[picks]
        never = np.stack([~np.isfinite(refinement.moved) for refinement in self.refinements])
        new = never[every, picks] & real
        old = self._slope[every, nodes]
        at = np.nonzero(real)
        told = old[real], np.where(new, 0.0, moved)[real], cross[real], squares[real]
        self._slope[at[0], nodes[at]] = new_slopes(self._shared, *told, self.refinements[0].aims.rounding)
        scale = np.sqrt(squares / self._states.size)
        for row, refinement in enumerate(self.refinements):
            refinement.scale[picks[row, real[row]]] = scale[row, real[row]]
        return new

    def _note_sizes(self, picks: Indices, real: NDArray[np.bool_], said: Float64, states: Float64) -> None:
        """How small each sample's data are, by mean squares of the prediction and the state at its last node."""
        small_data, last = self._shared.small_data, real.shape[1] - 1 - np.argmax(real[:, ::-1], axis=1)
        for row, (refinement, k) in enumerate(zip(self.refinements, last.tolist(), strict=True)):
            node = int(self._states.level.nodes[picks[row, k]])
            if small_data.told[node] and real[row, k]:
                refinement.smallness = small_data.smallness(node, float(said[row, k]), float(states[row, k]))

    def successors(self) -> list[Run]:
        born, self._born = self._born, []
        return [*super().successors(), *born]

    @property
    def steps(self) -> Indices:
        return np.zeros(len(self.samples), dtype=np.int64)

    @property
    def errors(self) -> Float64:
        return np.array([refinement.error for refinement in self.refinements])

    def states(self) -> Array:
        return self._shared.given(self._states.start)

    def estimate(self, sample: int) -> Array:
        row, states = self._row(sample), self._states
        known = self.refinements[row].rounds > 0
        return self._shared.given(states.final(np.array([row]))[0, :] if known else states.start[row, :])

    def kept(self, sample: int) -> Sequence[Array]:
        rows = np.flatnonzero(self.samples == sample).tolist() if self._shared.keep else []  # it may have left by now
        return [self._shared.given(self._states.start[row, :]) for row in rows]

    def _row(self, sample: int) -> int:
        return int(np.flatnonzero(self.samples == sample)[0])

    def _go_on(self, verdicts: list[Verdict]) -> None:
        """Samples that are final end; those that refine or give way leave for other runs."""
        rows: dict[Verdict, list[int]] = {verdict: [] for verdict in Verdict}
        for row, (verdict, refinement) in enumerate(zip(verdicts, self.refinements, strict=True)):
            exhausted = verdict is Verdict.GO_ON and refinement.exhausted
            rows[Verdict.GIVE_WAY if exhausted else verdict].append(row)
        if rows[Verdict.CONVERGED]:
            self._end(np.array(rows[Verdict.CONVERGED]))
        if rows[Verdict.REFINE]:
            self._refine(np.array(rows[Verdict.REFINE]))
        for worthless in (False, True):
            given_up = [row for row in rows[Verdict.GIVE_WAY] if self.refinements[row].worthless == worthless]
            if given_up:
                self._born += self._slide(np.array(given_up), worthless)
        if len(rows[Verdict.GO_ON]) < len(verdicts):
            stay = np.array(rows[Verdict.GO_ON], dtype=np.int64)
            self._states.stay(stay)
            self.samples, self._slope = self._states.samples, self._slope[stay]
            self.refinements = [self.refinements[row] for row in stay.tolist()]

    def _end(self, rows: Indices) -> None:
        states, give, steps = self._states, self._shared.given, self._form.steps
        final = states.final(rows)
        for place, row in enumerate(rows.tolist()):
            sample, error, kept, expected = int(self.samples[row]), self.refinements[row].error, [], None
            if self._shared.keep:
                trajectory = states.trajectory(row, final[place, :])
                kept, expected = [give(x) for x in trajectory], states.expected(row, trajectory)
            self.ended[sample] = Outcome(Status.CONVERGED, steps, error, give(final[place, :]), kept, expected=expected)

    def _refine(self, rows: Indices) -> None:
        """Add the midpoints (at first: spread the nodes), with interpolated predictions and slopes."""
        old, refinements = self._states.level.nodes, [self.refinements[row] for row in rows.tolist()]
        opening = refinements[0].opening
        level = self._levels.first(refinements[0].aims.first) if opening else self._levels.finer(self._states.level)
        weights = interpolation(level.nodes, old, self._shared.recurrence.stages)
        known, slope = np.isin(level.nodes, old), self._slope[rows]
        if not opening:
            slope[:, level.nodes] = slope[:, old] @ weights.T
        states = self._states.refined(rows, level, weights, known)
        run = SpreadNodes(self._shared, self._levels, states, self._sliding, refinements, slope)
        run._go_on([refinement.refine(level, weights, known) for refinement in refinements])
        self.ended |= run.ended
        run.ended = {}
        self._born += run.successors()

    def _slide(self, rows: Indices, worthless: bool) -> Sequence[Run]:
        """Windows go on, from what is known if that is worth something."""
        samples, start = self.samples[rows], take_rows(self._states.start, rows)
        if worthless:
            return self._sliding(samples, start)
        nodes, held = self._states.level.nodes, self._form.held
        weights = interpolation(np.arange(self._form.steps), nodes, self._shared.recurrence.stages)
        slope = (self._slope[rows][:, nodes] @ weights.T - held[:, 0]) / held[:, 1]
        return self._sliding(samples, start, Outlook(weights, self._states.predictions(rows), slope))


def _propagation(response: Float64, g: Float64, picks: Indices, real: NDArray[np.bool_]) -> Float64:
    """``T`` with ``dX = T r``, (B, n, k), from the response of a level, the slopes, and the rows that were asked."""
    right = np.moveaxis(response[:, picks], 1, 0) * real[:, None, :]
    left = np.eye(len(response)) - response * g[:, None, :]
    try:
        return np.linalg.solve(left, right).astype(np.float64, copy=False)
    except np.linalg.LinAlgError:  # of one sample perhaps: the others go on
        return np.stack([_solve(*pair) for pair in zip(left, right, strict=True)])


def _norms(T: Float64, gram: Float64) -> Float64:
    """``||T r||`` of each row of T, (B, rows)."""
    return np.sqrt(np.maximum(((T @ gram) * T).sum(axis=2), 0.0))


def _solve(left: Float64, right: Float64) -> Float64:
    """NaN where there is no solution."""
    try:
        return np.linalg.solve(left, right).astype(np.float64, copy=False)
    except np.linalg.LinAlgError:
        return np.full_like(right, np.nan)


def spread(shared: Shared, samples: Indices, start: Array, sliding: Sliding) -> SpreadNodes:
    """The run that takes these samples from ``start``, (B, size), their ``x_T``, over nodes that are spread."""
    recurrence = shared.recurrence
    within = shared.acceptance.spread_tolerance(recurrence, shared.tolerance)
    aims = Aims(recurrence, shared.width, shared.tolerance, within, float(shared.xp.finfo(shared.dtype).eps))
    levels = Levels.of(recurrence)
    level = levels.opening(aims.first)
    refinements = [Refinement(aims, level) for _ in samples]
    states = LevelStates(shared, level, samples, host_view(start))
    return SpreadNodes(shared, levels, states, sliding, refinements)
