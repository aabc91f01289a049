"""The network of a subinterval: the sampler's steps from its start to its end, one call after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from array_api_compat import device
from numpy.typing import NDArray

from parasolver_core.arrays import Array, copied, given_back, take_rows, working_dtype
from parasolver_core.denoiser.contract import DenoiserFn
from parasolver_core.denoiser.evaluator import Evaluator
from parasolver_core.samplers.noise import NoiseSource
from parasolver_core.samplers.subintervals import Subintervals
from parasolver_core.samplers.terms import combine

Indices = NDArray[np.int64]


class SubintervalEvaluator(Evaluator):
    """Evaluates whole subintervals: the rows of a round go through their steps together, a network call a step.

    Args:
        denoiser, x_T, noise, max_rows, buckets, state_device: as for :class:`Evaluator`; of the sampler's steps.
        tables: of the shorter sampler.
        keep: whether to keep the states between the borders, for a trajectory.
    """

    def __init__(
        self,
        denoiser: DenoiserFn,
        x_T: Array,
        tables: Subintervals,
        noise: NoiseSource,
        max_rows: int | None,
        buckets: Sequence[int] = (),
        state_device: Any = None,
        *,
        keep: bool = False,
    ) -> None:
        super().__init__(denoiser, x_T, tables.fine, noise, max_rows, buckets, state_device)
        self._tables, self._draws, self._keep = tables, noise, keep
        self._states = working_dtype(self._xp, x_T.dtype)
        self._between: dict[tuple[int, int], list[Array]] = {}  # by sample and node

    def turns(self, nodes: Indices) -> int:
        return int(self._tables.lengths[nodes].max())

    def rows(self, nodes: Indices) -> int:
        return int(self._tables.lengths[nodes].sum())

    def between(self, sample: int, node: int) -> list[Array]:
        """A sample's states inside a subinterval when it was last evaluated, each (size,)."""
        return self._between.get((sample, node), [])

    def __call__(self, x: Array | list[Array], nodes: Indices, samples: Indices, again: Any = None) -> Array:
        """The mean prediction of each row's subinterval, and how what travels with its state changes."""
        xp, tables = self._xp, self._tables
        given = xp.concat(x) if isinstance(x, list) else x
        parts = [xp.astype(given, self._states, copy=False)]
        if tables.rows > 1:
            parts = [parts[0][:, k, ...] for k in range(tables.rows)]
        xs, hs = self._histories(parts, nodes)
        mean = self._of_before(xs, hs, nodes)
        moving = [*xs, *hs, mean]  # what the steps change, row by row
        for ahead in range(self.turns(nodes)):
            taking = tables.taking_part(nodes, ahead)
            every = len(taking) == len(nodes)
            before = moving if every else [take_rows(part, taking) for part in moving]
            after = self._step(before, nodes[taking], samples[taking], ahead)
            moving = after if every else [self._merged(a, b, taking) for a, b in zip(moving, after, strict=True)]
        return self._outputs(parts, moving, nodes)

    def _histories(self, parts: list[Array], nodes: Indices) -> tuple[list[Array], list[Array]]:
        """The states and the earlier predictions that the first steps read."""
        x = self._tables.form.reads[0]
        unscaled = self._column(1 / self._tables.scale[nodes], parts[0])
        return parts[:x], [part * unscaled for part in parts[x:]]

    def _of_before(self, xs: list[Array], hs: list[Array], nodes: Indices) -> Array:
        """What earlier states and predictions add to the mean."""
        tables, total = self._tables, self._xp.zeros_like(xs[0])
        for k, x in enumerate(xs[1:]):
            total = total + (x - xs[0]) * self._column(tables.states[nodes, k], x)
        for k, h in enumerate(hs):
            total = total + h * self._column(tables.predictions[nodes, k], h)
        return total

    def _step(self, moving: list[Array], nodes: Indices, samples: Indices, ahead: int) -> list[Array]:
        """One step of each row: states, predictions and mean after it."""
        tables, form, xp = self._tables, self._tables.form, self._xp
        step, (reads, _) = tables.ends[nodes] + ahead, form.reads
        xs, hs, mean = moving[:reads], moving[reads:-1], moving[-1]
        m = xp.astype(super().__call__(xs[0], step, samples), self._states, copy=False)
        p, q = form.held[step].T
        hs = [combine([(self._column(p, m), xs[0]), (self._column(q, m), m)]), *hs]
        terms = [(self._column(form.a[step, k], m), x) for k, x in enumerate(xs)]
        terms += [(self._column(form.b[step, k], m), h) for k, h in enumerate(hs)]
        if np.any(form.c[step]):
            at = zip(step.tolist(), samples.tolist(), strict=True)
            wanted = [(i, sample) if form.c[i] != 0 else None for i, sample in at]
            z = xp.reshape(given_back(xp, self._draws.block(wanted)), m.shape)
            terms.append((self._column(form.c[step], m), z))
        new = combine(terms)
        if self._keep:
            self._note(new, nodes, samples, ahead)
        mean = mean + hs[0] * self._column(tables.weights[nodes, step], m)
        return [new, *xs[: reads - 1], *hs[: len(hs) - 1], mean]

    def _note(self, states: Array, nodes: Indices, samples: Indices, ahead: int) -> None:
        """Keep the states that are not at a border."""
        for row, (node, sample) in enumerate(zip(nodes.tolist(), samples.tolist(), strict=True)):
            kept = self._between.setdefault((sample, node), [])
            del kept[ahead:]
            if ahead + 1 < self._tables.lengths[node]:
                kept.append(self._xp.reshape(copied(self._xp, states[row, ...]), (-1,)))

    def _outputs(self, parts: list[Array], moving: list[Array], nodes: Indices) -> Array:
        """What makes ``x' = A x + B output`` of everything that travels."""
        tables, reads, mean = self._tables, self._tables.form.reads[0], moving[-1]
        if tables.rows == 1:
            return mean
        a, over_b = self._column(tables.a[nodes], mean), self._column(1 / tables.b[nodes], mean)
        scale = self._column(tables.scale[nodes + 1], mean)
        after = [*moving[1:reads], *[h * scale for h in moving[reads:-1]]]
        changes = [(new - old * a) * over_b for new, old in zip(after, parts[1:], strict=True)]
        return self._xp.stack([mean, *changes], axis=1)

    def _merged(self, whole: Array, part: Array, rows: Indices) -> Array:
        """``whole`` with some rows replaced."""
        rest = np.setdiff1d(np.arange(whole.shape[0]), rows)
        order = np.argsort(np.concatenate([rows, rest]))
        return take_rows(self._xp.concat([part, take_rows(whole, rest)]), order)

    def _column(self, values: NDArray[np.float64], like: Array) -> Array:
        """A number for each row."""
        column = self._xp.asarray(values, dtype=like.dtype, device=device(like))
        return self._xp.reshape(column, (-1,) + (1,) * (like.ndim - 1))
