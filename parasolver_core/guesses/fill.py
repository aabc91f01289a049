"""Where nodes that enter a window begin: tables of what their states and beliefs are made of.

A new node's state and belief are linear in what is known: the last rows kept (states and beliefs that the sampler's
memory reads), further rows that a fill brings, and the noise. A fill marches the sampler through the new nodes on unit
vectors, for all samples of a batch at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

from parasolver_core.arrays import Array, take_rows, uploaded
from parasolver_core.samplers.held_form import Float64, HeldForm, Indices
from parasolver_core.samplers.recurrence import Recurrence

Behind = Callable[[], tuple[Array, Array]]  # the states and beliefs of the last nodes kept, each (B, size)
Slopes = Callable[[], Float64]  # dh/dx, (B, N)

_KEPT = 2**20  # entries of a table of answers that is kept for all of a sampler's nodes


@dataclass(frozen=True)
class Entering:
    """What new nodes are made of; B samples.

    The columns are the base rows (``x_last, x_{last-1}, ..``, ``h_last, h_{last-1}, ..`` and, where asked for,
    ``h_last`` as the network gave it), the fill's further rows, and the noise ``z_last, z_{last+1}, ..``.

    Args:
        table: (2, K, count + 1, >= columns), of states and beliefs: 0, and then of each node behind node ``last``.
            Entries of nodes beyond N have no meaning.
        which: (B,), the one of the K that is each sample's.
        columns: how many there are.
        noise: how many of them are noise, the last ones.
    """

    table: Float64
    which: Indices
    columns: int
    noise: int

    def rows(self, behind: Indices) -> Float64:
        """Of states and of beliefs, (2, B, k, columns), so far behind the last node; 0 where that is 0."""
        _, K, nodes, columns = self.table.shape
        at = self.which[:, None] * nodes + behind
        return self.table.reshape(2, K * nodes, columns).take(at, axis=1)[..., : self.columns]


class Fill(ABC):
    """A way to fill in nodes.

    ``uncorrected``: whether it reads the last belief as the network gave it too, before the round's correction.
    """

    uncorrected = False

    def __init__(self, form: HeldForm) -> None:
        self._form = form

    def opening(self, recurrence: Recurrence) -> int:
        """How many nodes the first round may hold."""
        return len(recurrence)

    def first(self, x: Array, slope: Float64) -> Array:
        """The belief at node 0 before it is evaluated, (B, size), for the states x and slopes (B, N)."""
        return array_namespace(x).zeros_like(x)

    @abstractmethod
    def entering(self, last: Indices, count: int, slopes: Slopes) -> Entering:
        """The ``count`` nodes behind nodes ``last``, (B,)."""

    def rows(self, samples: Indices, last: Indices, count: int, behind: Behind) -> Array | None:
        """The further rows of these samples, (B, rows, size); ``behind()`` tells of nodes ``last``."""
        return None

    def usable(self, samples: Indices, lo: Indices, defects: Float64, n: Indices) -> Indices:
        """How many leading nodes of each window were filled in well enough to be kept, (B,); unless overridden, all.

        Args:
            samples, lo, n: (B,), first nodes and lengths of the windows.
            defects: (B, longest), sums of squares of what the network said beside what was believed.
        """
        return n

    def _march(
        self, last: Indices, count: int, extra: int, believe: Callable[[int, Indices, Float64], Float64]
    ) -> Entering:
        """The sampler through ``count`` nodes, ``believe(ahead, i, x)`` being what is believed at the new node i."""
        form, base = self._form, self._form.base + self.uncorrected
        noise = count if form.noisy else 0
        unit = np.eye(base + extra + noise)
        xs, hs = list(unit[: form.reads[0]]), list(unit[form.reads[0] : form.base])
        table = np.zeros((2, len(last), count + 1, len(unit)))
        for ahead in range(count):
            i = np.minimum(last + ahead, form.steps - 1)
            state = form.after(i, xs, hs)
            if noise:
                state[:, base + extra + ahead] += form.c[i]
            belief = believe(ahead, np.minimum(i + 1, form.steps - 1), state)
            table[0, :, ahead + 1], table[1, :, ahead + 1] = state, belief
            xs, hs = [state, *xs[:-1]], [table[1, :, ahead + 1], *hs[:-1]]
        return Entering(table, np.arange(len(last)), len(unit), noise)


class Held(Fill):
    """The prediction of the node before them, held constant: as corrected, or as the network gave it.

    Args:
        form: the sampler.
        width: the most nodes of a window.
        uncorrected: whether the prediction held is the network's own.
    """

    def __init__(self, form: HeldForm, width: int, uncorrected: bool = False) -> None:
        super().__init__(form)
        self.uncorrected, self._held = uncorrected, form.base if uncorrected else form.reads[0]
        columns = form.base + uncorrected + (width if form.noisy else 0)
        self._all = self._behind(np.arange(form.steps), width) if form.steps * width * columns <= _KEPT else None

    def opening(self, recurrence: Recurrence) -> int:
        """The nodes whose states hardly depend on the sample; one where its prediction has to come from the network."""
        return 1 if self.uncorrected else recurrence.blind

    def first(self, x: Array, slope: Float64) -> Array:
        """A predicted sample of 0; or, before the network has said anything, an output of 0."""
        return x * float(self._form.held[0, 0]) if self.uncorrected else super().first(x, slope)

    def entering(self, last: Indices, count: int, slopes: Slopes) -> Entering:
        if self._all is None or count >= self._all.table.shape[2]:
            return self._behind(last, count)
        noise = count if self._form.noisy else 0
        return Entering(self._all.table, last, self._form.base + self.uncorrected + noise, noise)

    def _behind(self, last: Indices, count: int) -> Entering:
        def held(ahead: int, i: Indices, x: Float64) -> Float64:
            return np.eye(1, x.shape[1], self._held)

        return self._march(last, count, 0, held)


class Along(Fill):
    """Outputs as along a trajectory that is expected to be near: ``h_i + g_i (x - x_i)``.

    Args:
        form: the sampler.
        states: (B, N + 1, size), of each sample of the run.
        predictions: (B, N, size), of the held quantity.
    """

    def __init__(self, form: HeldForm, states: Array, predictions: Array) -> None:
        super().__init__(form)
        self._states, self._predictions = states, predictions

    def first(self, x: Array, slope: Float64) -> Array:
        xp: Any = array_namespace(x)
        g = uploaded(xp, slope[:, :1], device(x), x.dtype)
        return self._predictions[:, 0, :] + g * (x - self._states[:, 0, :])

    def entering(self, last: Indices, count: int, slopes: Slopes) -> Entering:
        base, every, slope = self._form.base, np.arange(len(last)), slopes()

        def expected(ahead: int, i: Indices, x: Float64) -> Float64:
            g = slope[every, i]
            h = g[:, None] * x
            h[:, base + ahead] -= g
            h[:, base + count + ahead] += 1.0
            return h

        return self._march(last, count, 2 * count, expected)

    def rows(self, samples: Indices, last: Indices, count: int, behind: Behind) -> Array:
        xp: Any = array_namespace(self._states)
        size, parts = self._states.shape[2], []
        for table in (self._states, self._predictions):
            at = np.minimum(last[:, None] + np.arange(1, count + 1), self._form.steps - 1)
            rows = take_rows(xp.reshape(table, (-1, size)), (samples[:, None] * table.shape[1] + at).reshape(-1))
            parts.append(xp.reshape(rows, (len(samples), count, size)))
        return xp.concat(parts, axis=1)


class Interpolated(Fill):
    """Predictions interpolated between nodes that were solved for, whatever the states.

    Args:
        form: the sampler.
        weights: (N, n), of the nodes in the prediction of each step.
        predictions: (B, n, size), of the held quantity at the nodes, of each sample of the run.
    """

    def __init__(self, form: HeldForm, weights: Float64, predictions: Array) -> None:
        super().__init__(form)
        self._weights, self._predictions = weights, predictions

    def first(self, x: Array, slope: Float64) -> Array:
        return self._predictions[:, 0, :]

    def entering(self, last: Indices, count: int, slopes: Slopes) -> Entering:
        base, nodes = self._form.base, self._weights.shape[1]

        def expected(ahead: int, i: Indices, x: Float64) -> Float64:
            h = np.zeros_like(x)
            h[:, base : base + nodes] = self._weights[i]
            return h

        return self._march(last, count, nodes, expected)

    def rows(self, samples: Indices, last: Indices, count: int, behind: Behind) -> Array:
        return (
            self._predictions if len(samples) == self._predictions.shape[0] else take_rows(self._predictions, samples)
        )


class Copies(Fill):
    """The state behind the last node again and again, with the beliefs that would make it so."""

    def __init__(self, form: HeldForm, noise: Callable[[int, int], Array]) -> None:
        super().__init__(form)
        self._noise = noise

    def first(self, x: Array, slope: Float64) -> Array:
        xp: Any = array_namespace(x)
        form = self._form
        if form.b[0, 0] == 0:
            return x * float(form.held[0, 0])
        stay = x * float((1 - form.a[0, 0]) / form.b[0, 0])
        if form.c[0] == 0:
            return stay
        z = xp.stack([self._noise(0, sample) for sample in range(x.shape[0])])
        return stay - z * float(form.c[0] / form.b[0, 0])

    def entering(self, last: Indices, count: int, slopes: Slopes) -> Entering:
        form, noise = self._form, count + 1 if self._form.noisy else 0
        unit = np.eye(form.base + noise)
        xs, hs = list(unit[: form.reads[0]]), list(unit[form.reads[0] : form.base])
        state = form.after(last, xs, hs)
        if noise:
            state[:, form.base] += form.c[last]
        table = np.zeros((2, len(last), count + 1, len(unit)))
        for ahead in range(count):
            i = np.minimum(last + ahead + 1, form.steps - 1)
            xs, hs = [state, *xs[:-1]], [np.zeros_like(state), *hs[:-1]]
            left = state - form.after(i, xs, hs)  # what the new belief has to add
            if noise:
                left[:, form.base + ahead + 1] -= form.c[i]
            gain = form.b[i, 0, None]
            nothing = state * form.held[i, 0, None]  # an output of 0 where the step reads none
            hs[0] = np.where(gain != 0, left / np.where(gain != 0, gain, 1.0), nothing)
            table[0, :, ahead + 1], table[1, :, ahead + 1] = state, hs[0]
            state = np.where(gain != 0, state, state - left)  # a step that reads no output is as it is
        return Entering(table, np.arange(len(last)), len(unit), noise)
