"""What a run did, and what it noted on the way for the checks behind it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from parasolver_adapters.vector_field.problem import Problem
from parasolver_adapters.vector_field.rounding import local_scale, relative
from parasolver_core.arrays import Array, to_host

_LARGE = 2**22  # elements of a call
Call = tuple[Array, Array, Array]  # t (rows,), y and f (rows, *state)
Row = tuple[Array, Array, Array, float]  # one row of a call, and the length of its step


@dataclass
class Samples:
    """A few rows of the last round of each window, to be compared with the field called alone.

    What couples rows is often silent until something is large or small: a norm that clips, a mean behind a threshold.
    So the rows that are the largest or the least by some measure are among them, in whichever stage of a step.

    Attributes:
        ends: the first, the middle and the last beginning of a step, of each window.
        extremes: by measure, how large the row is that is the largest so far, and that row.
    """

    ends: list[tuple[Row, Row, Row]] = field(default_factory=list)
    extremes: dict[str, tuple[float, Row]] = field(default_factory=dict)

    def keep(self, calls: list[Call], steps: NDArray[np.float64]) -> None:
        """Rows of the calls of one round, whose first rows belong to the steps that were accepted, of these lengths."""
        lengths = np.abs(steps)
        first, middle, last = (row_of(calls[0], n, lengths[n]) for n in (0, len(steps) // 2, len(steps) - 1))
        self.ends.append((first, middle, last))
        for call in calls:
            y = call[1]  # a multistep method starts with calls for its first steps alone
            for measure, (size, n) in largest(y[: min(len(steps), y.shape[0]), ...]).items():
                if measure not in self.extremes or size > self.extremes[measure][0]:
                    self.extremes[measure] = size, row_of(call, n, lengths[n])

    def chosen(self) -> list[Row]:
        """First, middle, last and largest of all windows, each once."""
        rows = [self.ends[0][0], self.ends[len(self.ends) // 2][1], self.ends[-1][2]]
        rows += [row for _, row in self.extremes.values()]
        return list({(float(t[0]), to_host(y).tobytes()): (t, y, f, h) for t, y, f, h in rows}.values())


def row_of(call: Call, n: int, h: float) -> Row:
    """Row n of a call, of a step of that length."""
    t, y, f = call
    return t[n : n + 1], y[n : n + 1, ...], f[n : n + 1, ...], float(h)


def largest(y: Array) -> dict[str, tuple[float, int]]:
    """How large the row is that is the largest by each measure, and where it is."""
    xp: Any = array_namespace(y)
    rows = xp.reshape(y, (y.shape[0], -1))
    measures = {
        "max": xp.max(rows, axis=-1),
        "min": xp.min(rows, axis=-1),
        "mean": xp.mean(rows, axis=-1),
        "square": xp.sum(rows * rows, axis=-1),
    }
    sizes = measures | {f"least {name}": -values for name, values in measures.items()}
    found = {measure: int(xp.argmax(size)) for measure, size in sizes.items()}
    return {measure: (float(sizes[measure][n]), n) for measure, n in found.items()}


class Recorder:
    """The field, remembering its calls since they were last forgotten; of large ones the first, for memory's sake."""

    def __init__(self, f: Any) -> None:
        self._f = f
        self.calls: list[Call] = []

    def __call__(self, t: Array, y: Array) -> Array:
        out = self._f(t, y)
        if not self.calls or math.prod(y.shape) <= _LARGE:
            self.calls.append((t, y, out))
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
        defects: of the steps made in parallel, in pieces ``(n, samples, size)``, as far as is known; see
            :meth:`note_left`.
        corrections: what the states have been moved by since these defects were found, in the same pieces.
    """

    rounds: int = 0
    windows: int = 0
    sequential_steps: int = 0
    note: str = ""
    reached: list[Array] = field(default_factory=list)
    twin: Twin = field(default_factory=Twin)
    samples: Samples = field(default_factory=Samples)
    defects: list[Array] = field(default_factory=list)
    corrections: list[Array] = field(default_factory=list)

    def note_left(self, xp: Any, defects: Array, correction: Array, left: float) -> None:
        r"""Keep what is wrong with steps that are accepted.

        The last correction d of defects r leaves an error e of the states, :math:`e_{n+1} + d_{n+1} = A_n (e_n + d_n) +
        r_n` where A is the Jacobian of a step, which d was not made with. The steps behind begin with e alone.

        Args:
            xp: array namespace.
            defects: of the states before the last correction, (n, samples, size).
            correction: the last, zero if none was made.
            left: guess of the share of the defects that is left after it, as the nonlinear part leaves some.
        """
        self.defects.append(
            xp.concat([defects[:-1, ...], defects[-1:, ...] - correction[-1:, ...]], axis=0) + defects * left
        )
        self.corrections.append(xp.concat([correction[:-1, ...], xp.zeros_like(correction[-1:, ...])], axis=0))
