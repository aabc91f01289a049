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
from functools import partial

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from parasolver_core.arrays import Array, given_back, host_view, matmul, take_rows, uploaded, vecdot
from parasolver_core.methods.levels import Level, Levels, interpolation
from parasolver_core.methods.refinement import Aims, Refinement, Verdict
from parasolver_core.methods.run import Outcome, Run
from parasolver_core.methods.sliding import Outlook, Sliding
from parasolver_core.rounds.acceptance import shares
from parasolver_core.rounds.decisions import new_slopes
from parasolver_core.rounds.shared import Shared
from parasolver_core.samplers.free_states import states_of_noise
from parasolver_core.samplers.held_form import Float64, Indices
from parasolver_core.samplers.recurrence import combine
from parasolver_core.solution import SampleRecord, Status


class SpreadNodes(Run):
    """The samples whose nodes are those of one level; B of them, n nodes.

    The buffer ``S`` is (B, 2 n, size): the states at the nodes, then the held quantities. ``since`` (B, n, size) is by
    how much each state has moved since its node was evaluated.

    Args:
        shared: what all samples share.
        levels: of the sampler.
        level: the nodes.
        samples: their places in the batch.
        start: their ``x_T``, (B, size), in the working dtype.
        sliding: makes the windows that go on for samples.
        refinements: how each sample's nodes stand.
        held, since: (B, n, size); None: 0.
        slope: (B, N), dh/dx.
    """

    def __init__(
        self,
        shared: Shared,
        levels: Levels,
        level: Level,
        samples: Indices,
        start: Array,
        sliding: Sliding,
        refinements: list[Refinement],
        held: Array | None = None,
        since: Array | None = None,
        slope: Float64 | None = None,
    ) -> None:
        self._given_dtype, start = start.dtype, host_view(start)
        xp = self._xp = array_namespace(start)
        self._sliding = sliding
        self._shared, self._form, self._levels, self._level = shared, shared.form, levels, level
        self.samples, self._start, self.refinements = samples, start, refinements
        self._like = {"dtype": start.dtype, "device": device(start)}
        self._dtype = np.dtype(f"f{xp.finfo(start.dtype).bits // 8}")
        self._free, self._end_free = self._made_of_start()
        nothing = xp.zeros_like(self._free)
        X = self._free if held is None else self._free + matmul(xp, self._put(level.response), held)
        self._S = xp.concat([X, nothing if held is None else held], axis=1)
        self._since = nothing if since is None else since
        p, q = np.moveaxis(shared.form.held, 1, 0)
        initial = p + q * shared.linearization.initial(shared.recurrence)
        self._slope = np.tile(initial, (len(samples), 1)) if slope is None else slope
        self.ended, self._born = {}, []

    @property
    def _picks(self) -> Indices:
        """Rows of the level's nodes evaluated next, (B, k); shorter lists repeat their last."""
        picked = [one.picked for one in self.refinements]
        longest = max(map(len, picked))
        return np.stack([np.append(one, np.repeat(one[-1], longest - len(one))) for one in picked])

    @property
    def _counts(self) -> Indices:
        return np.array([len(one.picked) for one in self.refinements])

    @property
    def nodes(self) -> Indices:
        """Of each row of :attr:`inputs`."""
        return np.concatenate([self._level.nodes[one.picked] for one in self.refinements])

    @property
    def owners(self) -> Indices:
        """The sample of each row of :attr:`inputs`."""
        return np.repeat(self.samples, self._counts)

    @property
    def inputs(self) -> Array:
        """What the network is asked next, (rows, size): sample by sample, each sample's nodes in order."""
        at = np.concatenate([row * self._S.shape[1] + one.picked for row, one in enumerate(self.refinements)])
        return self._give(take_rows(self._xp.reshape(self._S, (-1, self._S.shape[2])), at))

    def compare(self, D: Array) -> Array:
        """First half of a round: the defects of the outputs D, (rows, size), and the sums that the host needs."""
        xp, picks, counts = self._xp, self._picks, self._counts
        (count, rows, size), k, n = self._S.shape, picks.shape[1], len(self._level.nodes)
        D = host_view(self._shared.xp.astype(D, self._given_dtype, copy=False))
        if D.shape[0] != count * k:
            first = np.cumsum(counts) - counts
            D = take_rows(D, (first[:, None] + np.minimum(np.arange(k), counts[:, None] - 1)).reshape(-1))
        every = np.arange(count)[:, None]
        flat = xp.reshape(self._S, (-1, size))
        X = xp.reshape(take_rows(flat, (every * rows + picks).reshape(-1)), (count, k, size))
        r = xp.reshape(D, (count, k, size)) * self._put(self._held_at(picks)[..., 1:])
        r = r + X * self._put(self._held_at(picks)[..., :1])
        r = r - xp.reshape(take_rows(flat, (every * rows + n + picks).reshape(-1)), (count, k, size))
        since = xp.reshape(self._since, (-1, size))
        moved = xp.reshape(take_rows(since, (every * n + picks).reshape(-1)), (count, k, size))
        self._r = r
        gram = xp.reshape(matmul(xp, r, xp.matrix_transpose(r)), (count, -1))
        sums = [vecdot(xp, *pair) for pair in ((moved, r), (moved, moved), (X, X))]
        return xp.reshape(xp.concat([gram, *sums], axis=1), (-1,))

    def correct(self, D: Array, sums: Float64) -> list[SampleRecord]:
        """Second half: update the slopes, move all states, and decide how each sample goes on."""
        picks, counts, size, k = self._picks, self._counts, self._S.shape[2], self._picks.shape[1]
        sums = sums.reshape(len(counts), -1)
        asked = [self._level.nodes[one.picked] for one in self.refinements]
        lost, real = self._drop(sums, picks, counts)
        pairs = real[:, :, None] & real[:, None, :]
        gram = np.where(pairs, sums[:, : k * k].reshape(-1, k, k), 0.0)
        cross, moved, squares = (np.where(real, part, 0.0) for part in np.split(sums[:, k * k :], 3, axis=1))
        new = self._update(picks, real, cross, moved, squares)
        g = self._slope[:, self._level.nodes]
        T = self._propagation(g, picks, real)
        at_end = self._level.end[picks] * real + ((self._level.end * g)[:, None, :] @ T)[:, 0]
        # the slope may see little of what the network will make of a move, so the move of its last input counts too
        effects = _norms(np.stack([at_end, at_end * new, T[:, -1] * new], axis=1), gram)
        moves = _norms(T, gram)
        lost |= ~(np.isfinite(moves).all(axis=1) & np.isfinite(effects).all(axis=1))
        scale = np.sqrt(size) * np.stack([one.scale for one in self.refinements])
        move, effects = shares(moves, scale), shares(effects, np.broadcast_to(scale[:, -1:], effects.shape))
        self._apply(np.where(lost[:, None, None], 0.0, T), g, picks, real & ~lost[:, None])
        verdicts = [
            one.abandon() if lost[row] else one.after(move[row], effects[row, 0], max(effects[row, 1:]))
            for row, one in enumerate(self.refinements)
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
        if not real.all():  # 0 times NaN is NaN
            self._r = self._xp.where(self._put(real[..., None] * 1.0) > 0, self._r, self._xp.zeros_like(self._r))
        return lost, real

    def _update(
        self, picks: Indices, real: NDArray[np.bool_], cross: Float64, moved: Float64, squares: Float64
    ) -> NDArray[np.bool_]:
        """New slopes and sizes; which of the picked rows were evaluated for the first time."""
        every, nodes = np.arange(len(picks))[:, None], self._level.nodes[picks]
        never = np.stack([~np.isfinite(one.moved) for one in self.refinements])
        new = never[every, picks] & real
        old = self._slope[every, nodes]
        at = np.nonzero(real)
        self._slope[at[0], nodes[at]] = new_slopes(
            self._shared, old[real], np.where(new, 0.0, moved)[real], cross[real]
        )
        scale = np.sqrt(squares / self._S.shape[2])
        for row, one in enumerate(self.refinements):
            one.scale[picks[row, real[row]]] = scale[row, real[row]]
        return new

    def _propagation(self, g: Float64, picks: Indices, real: NDArray[np.bool_]) -> Float64:
        """``T`` with ``dX = T r``, (B, n, k)."""
        response = self._level.response
        right = np.moveaxis(response[:, picks], 1, 0) * real[:, None, :]
        left = np.eye(len(response)) - response * g[:, None, :]
        try:
            return np.linalg.solve(left, right).astype(np.float64, copy=False)
        except np.linalg.LinAlgError:  # of one sample perhaps: the others go on
            return np.stack([_solve(*pair) for pair in zip(left, right, strict=True)])

    def _apply(self, T: Float64, g: Float64, picks: Indices, real: NDArray[np.bool_]) -> None:
        """Move all states by ``T r``; evaluated nodes believe what the network said, the others what it would say."""
        (count, n, k), rows = T.shape, np.arange(T.shape[0])[:, None]
        evaluated = np.zeros((count, n, k))
        evaluated[rows, picks, np.arange(k)] = real
        kept = np.ones((count, n))
        kept[np.broadcast_to(rows, picks.shape)[real], picks[real]] = 0.0
        moves = matmul(self._xp, self._put(np.concatenate([T, evaluated + g[..., None] * T], axis=1)), self._r)
        self._S += moves
        self._since = self._put(kept[..., None]) * self._since + moves[:, :n, :]
        self._r = None

    def successors(self) -> list[Run]:
        born, self._born = self._born, []
        return [*super().successors(), *born]

    @property
    def steps(self) -> Indices:
        return np.zeros(len(self.samples), dtype=np.int64)

    @property
    def errors(self) -> Float64:
        return np.array([one.error for one in self.refinements])

    def states(self) -> Array:
        return self._give(self._start)

    def estimate(self, sample: int) -> Array:
        row = self._row(sample)
        if self.refinements[row].rounds == 0:
            return self._give(self._start[row, :])
        return self._give(self._final(np.array([row]))[0, :])

    def kept(self, sample: int) -> Sequence[Array]:
        return [self._give(self._start[row, :]) for row in np.flatnonzero(self.samples == sample) if self._shared.keep]

    def _row(self, sample: int) -> int:
        return int(np.flatnonzero(self.samples == sample)[0])

    def _go_on(self, verdicts: list[Verdict]) -> None:
        """Samples that are final end; those that refine or give way leave for other runs."""
        rows: dict[Verdict, list[int]] = {verdict: [] for verdict in Verdict}
        for row, (verdict, one) in enumerate(zip(verdicts, self.refinements, strict=True)):
            exhausted = verdict is Verdict.GO_ON and one.exhausted
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
            self._stay(np.array(rows[Verdict.GO_ON], dtype=np.int64))

    def _end(self, rows: Indices) -> None:
        final, steps = self._final(rows), self._form.steps
        for place, row in enumerate(rows.tolist()):
            sample, error, x = int(self.samples[row]), self.refinements[row].error, self._give(final[place, :])
            states = self._all_states(row, final[place, :]) if self._shared.keep else []
            expected = partial(self._expected, self._S[row, len(self._level.nodes) :, :], states) if states else None
            kept = [self._give(state) for state in states]
            self.ended[sample] = Outcome(Status.CONVERGED, steps, error, x, kept, expected=expected)

    def _refine(self, rows: Indices) -> None:
        """Add the midpoints (at first: spread the nodes), with interpolated predictions and slopes."""
        old, refinements = self._level.nodes, [self.refinements[row] for row in rows.tolist()]
        opening = refinements[0].opening
        level = self._levels.first(refinements[0].aims.first) if opening else self._levels.finer(self._level)
        weights = interpolation(level.nodes, old, self._shared.recurrence.stages)
        known, n, xp = np.isin(level.nodes, old), len(old), self._xp
        slope = self._slope[rows]
        if not opening:
            slope[:, level.nodes] = slope[:, old] @ weights.T
        run = SpreadNodes(
            self._shared,
            self._levels,
            level,
            self.samples[rows],
            self._give(take_rows(self._start, rows)),
            self._sliding,
            refinements,
            held=matmul(xp, self._put(weights), take_rows(self._S, rows)[:, n:, :]),
            since=matmul(xp, self._put(weights * known[:, None]), take_rows(self._since, rows)),
            slope=slope,
        )
        run._go_on([one.refine(level, weights, known) for one in refinements])
        self.ended |= run.ended
        run.ended = {}
        self._born += run.successors()

    def _slide(self, rows: Indices, worthless: bool) -> Sequence[Run]:
        """Windows go on, from what is known if that is worth something."""
        samples, start = self.samples[rows], take_rows(self._start, rows)
        if worthless:
            return self._sliding(samples, start)
        nodes, held = self._level.nodes, self._form.held
        weights = interpolation(np.arange(self._form.steps), nodes, self._shared.recurrence.stages)
        slope = (self._slope[rows][:, nodes] @ weights.T - held[:, 0]) / held[:, 1]
        predictions = take_rows(self._S, rows)[:, len(nodes) :, :]
        return self._sliding(samples, start, Outlook(weights, predictions, slope))

    def _stay(self, rows: Indices) -> None:
        """Only these go on here."""
        for name in ("_S", "_since", "_free", "_end_free", "_start"):
            setattr(self, name, take_rows(getattr(self, name), rows))
        self.samples, self._slope = self.samples[rows], self._slope[rows]
        self.refinements = [self.refinements[row] for row in rows.tolist()]

    def _final(self, rows: Indices) -> Array:
        """The samples, (rows, size), of predictions interpolated between the nodes."""
        n = len(self._level.nodes)
        held = take_rows(self._S, rows)[:, n:, :]
        end = matmul(self._xp, self._put(self._level.end[None, :]), held)[:, 0, :]
        return take_rows(self._end_free, rows) + end

    def _all_states(self, row: int, final: Array) -> list[Array]:
        """Every state, by the recurrence with interpolated predictions; the last is the sample."""
        recurrence, xp, n = self._shared.recurrence, self._xp, len(self._level.nodes)
        weights = interpolation(np.arange(len(recurrence)), self._level.nodes, recurrence.stages)
        states, outputs = [self._start[row, :]], []
        for i in range(len(recurrence) - 1):
            h = xp.matmul(self._put(weights[i : i + 1]), self._S[row, n:, :])[0, :]
            outputs.insert(0, combine(recurrence.believed(i, h, states[-1])))
            del outputs[recurrence.memory :]
            z = self._read_noise(i, int(self.samples[row])) if recurrence.c[i] != 0 else None
            states.append(recurrence.advance(i, states[: -recurrence.memory - 1 : -1], outputs, z))
        return [*states, final]

    def _expected(self, held: Array, states: list[Array], i: int) -> Array:
        return self._give(self._output(held, i, states[i]))

    def _output(self, held: Array, i: int, x: Array) -> Array:
        """The output at node i for the state x, (size,), of the predictions ``held``, (n, size), at the nodes."""
        recurrence = self._shared.recurrence
        weights = interpolation(np.array([i]), self._level.nodes, recurrence.stages)
        h = matmul(self._xp, self._put(weights), held)[0, :]
        return combine(recurrence.believed(i, h, x))

    def _give(self, array: Array) -> Array:
        """An array of the nodes' as one of the user's library, in the same memory."""
        return given_back(self._shared.xp, array)

    def _held_at(self, rows: Indices) -> Float64:
        return self._form.held[self._level.nodes[rows]]

    def _made_of_start(self) -> tuple[Array, Array]:
        """What the level's states, and the samples, are made of ``x_T`` and the noise: (B, n, size) and (B, size)."""
        level, start = self._level, self._start
        free, end = self._put(level.free[:, None]) * start[:, None, :], start * level.end_free
        if not self._form.noisy:
            return free, end
        wanted = {*level.nodes.tolist(), self._form.steps}
        states = states_of_noise(self._form, self._shared.noise, self.samples, start)
        rows = [row for i, row in enumerate(states) if i in wanted]
        return free + self._xp.stack(rows[:-1], axis=1), end + rows[-1]

    def _read_noise(self, step: int, sample: int) -> Array:
        """z of a step, which is read once a level."""
        z = self._shared.noise.flat(step, sample)
        self._shared.noise.release(step, sample)
        return z

    def _put(self, table: Float64) -> Array:
        """A host table as an array of the states' kind; the cast is the host's."""
        return uploaded(self._xp, table.astype(self._dtype), self._like["device"])


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
    aims, levels = Aims(recurrence, shared.width, shared.tolerance, within), Levels.of(recurrence)
    level = levels.opening(aims.first)
    refinements = [Refinement(aims, level) for _ in samples]
    return SpreadNodes(shared, levels, level, samples, start, sliding, refinements)
