"""What a run did, and what it noted on the way for the checks behind it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parasolver_adapters.vector_field.problem import Problem
from parasolver_adapters.vector_field.rounding import local_scale, relative
from parasolver_core.arrays import Array, to_host


@dataclass
class Samples:
    """A few rows of the last batch of each window, to be compared with the field called alone."""

    rows: list[tuple[Array, Array, Array, float]] = field(default_factory=list)

    def keep(self, recorded: Recorder, steps: NDArray[np.float64]) -> None:
        """The first, the middle, the last and the largest row of those that were accepted."""
        t, y, f = (rows[: len(steps), ...] for rows in recorded.first)
        size = np.max(np.abs(to_host(y).reshape(y.shape[0], -1)), axis=1)
        for n in (0, len(size) // 2, len(size) - 1, int(np.argmax(size))):
            self.rows.append((t[n : n + 1], y[n : n + 1, ...], f[n : n + 1, ...], float(abs(steps[n]))))

    def chosen(self) -> list[tuple[Array, Array, Array, float]]:
        """First, middle, last and largest of all windows."""
        windows = [self.rows[k : k + 4] for k in range(0, len(self.rows), 4)]
        largest = max((w[3] for w in windows), key=lambda row: float(np.max(np.abs(to_host(row[1])))))
        return [windows[0][0], windows[len(windows) // 2][1], windows[-1][2], largest]


class Recorder:
    """The field, remembering its first call: all the steps' beginnings."""

    def __init__(self, f: Any) -> None:
        self._f = f
        self.first: Any = None

    def __call__(self, t: Array, y: Array) -> Array:
        out = self._f(t, y)
        if self.first is None:
            self.first = (t, y, out)
        return out


class Twin:
    """How far rounding grows along coarse solutions, window after window: for states too large for matrices.

    Beside the coarse trajectory goes another, nearly the same, in the same calls of the field. Before each step their
    difference is made small, and the rounding of the steps that this one stands for is added to it.

    Attributes:
        grown: the largest difference so far, of the local size.
    """

    def __init__(self) -> None:
        self.grown = 0.0
        self._apart: Any = None
        self._trial: list[tuple[int, Array, float]] = []

    def integrate(self, level: Problem, nodes: NDArray[np.int64], y: Array) -> Array:
        """The coarse solution at the nodes of a level, from y, ``(1, *state)``."""
        xp, states, eps = level.xp, [y], float(level.xp.finfo(y.dtype).eps)
        field, samples = level.field, np.random.default_rng(2)
        apart = xp.zeros_like(y) if self._apart is None else self._apart
        self._trial = []
        for k, steps in enumerate(np.diff(nodes)):
            signs = samples.choice([-1.0, 1.0], size=(1, *field.shape))
            apart = apart + xp.abs(y) * level.grid.asarray(signs * (eps / 2 * np.sqrt(steps)))
            small = xp.max(xp.abs(y)) * eps**0.5 / xp.max(xp.abs(apart))
            small = float(small) if bool(xp.isfinite(small)) else 1.0
            pair = xp.concat([y, y + apart * small], axis=0)
            pair, _ = level.method.advance(lambda t, y: field(xp.concat([t, t]), y), level.grid, k, k + 1, pair)
            y, apart = pair[:1, ...], (pair[1:, ...] - pair[:1, ...]) / small
            states.append(y)
            scale = local_scale(xp, level.flat(xp.concat(states[-2:], axis=0)), 1)[1:, ...]
            self._trial.append((int(nodes[k + 1]), apart, relative(xp, level.flat(apart), scale)))
        return xp.concat(states, axis=0)

    def accept(self, hi: int, tolerance: float) -> None:
        """The last window was found up to the node ``hi``, to that tolerance."""
        for node, apart, grown in self._trial:
            if node > hi:
                break
            self._apart, self.grown = apart, max(self.grown, grown)
        if self._apart is not None and tolerance:
            self._apart = self._apart * (1 + tolerance / max(self.grown, tolerance))


@dataclass
class Effort:
    """What a run did beside calling the field.

    Args:
        rounds: corrections of a whole window, on all levels.
        windows: windows solved in parallel.
        sequential_steps: steps of the grid made one after another.
        note: why steps were made one after another where parallel integration was tried.
        reached: the trajectory so far, in pieces ``(n, *state)``.
        twin: how rounding grew along coarse solutions of wide states.
        samples: rows of batches, to be compared with the field called alone.
        defects: of the steps made in parallel, in pieces, as far as is known: what the last correction left of them.
    """

    rounds: int = 0
    windows: int = 0
    sequential_steps: int = 0
    note: str = ""
    reached: list[Array] = field(default_factory=list)
    twin: Twin = field(default_factory=Twin)
    samples: Samples = field(default_factory=Samples)
    defects: list[Array] = field(default_factory=list)
