"""The states of samples whose nodes are those of one level: what the device holds of them, and how a round moves it.

The system between the nodes is linear, so all that is done are products with the tables of a
:class:`~parasolver_core.methods.levels.Level`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from parasolver_core.arrays import Array, matmul, plus_product, take_rows, uploaded, vecdot
from parasolver_core.methods.levels import Level, interpolation
from parasolver_core.rounds.nodes import rectangular
from parasolver_core.rounds.salvage import where_known
from parasolver_core.rounds.shared import Shared
from parasolver_core.rounds.squares import at_most
from parasolver_core.samplers.free_states import states_of_noise
from parasolver_core.samplers.held_form import Float64, Indices
from parasolver_core.samplers.terms import combine


class LevelStates:
    """States and held quantities at the nodes of one level; B samples, n nodes.

    The buffer ``S`` is (B, 2 n, size): the states at the nodes, then the held quantities. ``since`` (B, n, size) is by
    how much each state has moved since its node was evaluated.

    Args:
        shared: what all samples share.
        level: the nodes.
        samples: their places in the batch.
        start: their ``x_T``, (B, size), as :func:`~parasolver_core.arrays.host_view` gives it.
        held, since: (B, n, size); None: 0.
    """

    def __init__(
        self,
        shared: Shared,
        level: Level,
        samples: Indices,
        start: Array,
        held: Array | None = None,
        since: Array | None = None,
    ) -> None:
        self._xp: Any = array_namespace(start)
        self._shared, self._form, self.level, self.samples, self.start = shared, shared.form, level, samples, start
        self.dtype, self._device = np.dtype(f"f{self._xp.finfo(start.dtype).bits // 8}"), device(start)
        self.size = start.shape[1]
        self._free, self._end_free = self._made_of_start()
        nothing = self._xp.zeros_like(self._free)
        X = self._free if held is None else self._free + matmul(self._xp, self._put(level.response), held)
        self._S = self._xp.concat([X, nothing if held is None else held], axis=1)
        self._since = nothing if since is None else since
        self._r: Array | None = None

    def inputs(self, picked: list[Indices]) -> Array:
        """The states at the nodes that each sample picks, (rows, size)."""
        at = np.concatenate([row * self._S.shape[1] + nodes for row, nodes in enumerate(picked)])
        return take_rows(self._flat(self._S), at)

    def compare(self, D: Array, picks: Indices, counts: Indices) -> Array:
        """The defects of the outputs, kept for :meth:`move`, and a vector of the sums that the host needs.

        Of each sample ``<r, r'>``, ``<dX, r>``, ``<dX, dX>``, ``<h, h>`` of what is said, ``<X, X>``.

        Args:
            D: (rows, size), the outputs.
            picks: (B, k), the nodes that were asked; shorter lists repeat their last.
            counts: (B,), how many there are.
        """
        xp, (count, k), rows, n = self._xp, picks.shape, self._S.shape[1], len(self.level.nodes)
        D = rectangular(D, counts, k)
        every, shape = np.arange(count)[:, None], (count, k, self.size)
        held = self._form.held[self.level.nodes[picks]]
        X = xp.reshape(take_rows(self._flat(self._S), (every * rows + picks).reshape(-1)), shape)
        said = plus_product(xp.reshape(D, shape) * self._put(held[..., 1:]), self._put(held[..., :1]), X)
        r = said - xp.reshape(take_rows(self._flat(self._S), (every * rows + n + picks).reshape(-1)), shape)
        moved = xp.reshape(take_rows(self._flat(self._since), (every * n + picks).reshape(-1)), shape)
        self._r = r
        gram = xp.reshape(matmul(xp, r, xp.matrix_transpose(r)), (count, -1))
        sums = [vecdot(xp, *pair) for pair in ((moved, r), (moved, moved), (said, said), (X, X))]
        return xp.reshape(xp.concat([gram, *sums], axis=1), (-1,))

    def squares(self, gram: Float64) -> Float64:
        """(B, k), ``<r, r>``, of the Gram matrices that :meth:`compare` gave."""
        return at_most(np.einsum("bii->bi", gram), self._xp, self._r)

    def drop(self, known: NDArray[np.bool_]) -> None:
        """Nothing is known of picked nodes, (B, k), whose outputs were not finite."""
        self._r = where_known(self._r, known)

    def move(self, T: Float64, g: Float64, picks: Indices, known: NDArray[np.bool_]) -> None:
        """Move all states by ``T r``; evaluated nodes believe what the network said, the others what it would say.

        Args:
            T: (B, n, k), moves of the states for unit defects.
            g: (B, n), slopes dh/dx.
            picks, known: (B, k), the nodes that were asked, and whether they told something.
        """
        (count, n, k), rows = T.shape, np.arange(T.shape[0])[:, None]
        evaluated = np.zeros((count, n, k))
        evaluated[rows, picks, np.arange(k)] = known
        kept = np.ones((count, n))
        kept[np.broadcast_to(rows, picks.shape)[known], picks[known]] = 0.0
        moves = matmul(self._xp, self._put(np.concatenate([T, evaluated + g[..., None] * T], axis=1)), self._r)
        self._S += moves
        self._since = self._put(kept[..., None]) * self._since + moves[:, :n, :]
        self._r = None

    def refined(self, rows: Indices, level: Level, weights: Float64, known: NDArray[np.bool_]) -> LevelStates:
        """These samples at another level.

        Args:
            rows: of the samples.
            level: the nodes.
            weights: (nodes, n), of the nodes here in the predictions there.
            known: (nodes,), which of those there are nodes here.
        """
        start, since = take_rows(self.start, rows), take_rows(self._since, rows)
        held = matmul(self._xp, self._put(weights), self.predictions(rows))
        since = matmul(self._xp, self._put(weights * known[:, None]), since)
        return LevelStates(self._shared, level, self.samples[rows], start, held, since)

    def stay(self, rows: Indices) -> None:
        """Only these samples go on."""
        for name in ("_S", "_since", "_free", "_end_free", "start"):
            setattr(self, name, take_rows(getattr(self, name), rows))
        self.samples = self.samples[rows]

    def predictions(self, rows: Indices) -> Array:
        """(rows, n, size), the held quantities at the nodes."""
        return take_rows(self._S, rows)[:, len(self.level.nodes) :, :]

    def final(self, rows: Indices) -> Array:
        """The samples, (rows, size), of predictions interpolated between the nodes."""
        end = matmul(self._xp, self._put(self.level.end[None, :]), self.predictions(rows))[:, 0, :]
        return take_rows(self._end_free, rows) + end

    def trajectory(self, row: int, final: Array) -> list[Array]:
        """Every state of a sample, by the recurrence with interpolated predictions; the last is the sample."""
        recurrence, sample, held = self._shared.recurrence, int(self.samples[row]), self._held(row)

        def noise(step: int) -> Array | None:
            return self._read_noise(step, sample) if recurrence.c[step] != 0 else None

        x = self.start[row, :]
        march = recurrence.march(0, [x], [self._output(held, 0, x)], lambda i, x: self._output(held, i, x), noise)
        *states, _ = (state for state, _ in march)
        return [x, *states, final]

    def expected(self, row: int, states: list[Array]) -> Callable[[int], Array]:
        """Gives the output at node i, (size,), as interpolated, on a sample's trajectory."""
        held = self._held(row)
        return lambda i: self._output(held, i, states[i])

    def _held(self, row: int) -> Array:
        return self._S[row, len(self.level.nodes) :, :]

    def _output(self, held: Array, i: int, x: Array) -> Array:
        """The output at node i for the state x, (size,), of the predictions ``held``, (n, size), at the nodes."""
        recurrence = self._shared.recurrence
        weights = interpolation(np.array([i]), self.level.nodes, recurrence.stages)
        h = matmul(self._xp, self._put(weights), held)[0, :]
        return combine(recurrence.terms().of_belief(i, h, x))

    def _made_of_start(self) -> tuple[Array, Array]:
        """What the level's states, and the samples, are made of ``x_T`` and the noise: (B, n, size) and (B, size)."""
        level, start = self.level, self.start
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

    def _flat(self, rows: Array) -> Array:
        return self._xp.reshape(rows, (-1, self.size))

    def _put(self, table: Float64) -> Array:
        """A host table as an array of the states' kind; the cast is the host's."""
        return uploaded(self._xp, table.astype(self.dtype), self._device)
