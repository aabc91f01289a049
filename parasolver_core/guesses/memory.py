"""What finished samples of a network tell of those to come: where their predictions are likely to be."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from parasolver_core.arrays import to_host
from parasolver_core.samplers.held_form import Float64
from parasolver_core.samplers.implied import implied_outputs
from parasolver_core.samplers.recurrence import Recurrence
from parasolver_core.samplers.step_rules import StepRule, table
from parasolver_core.solution import Solution

_FEWEST = 8  # samples: fewer say too little of the others
_MOST_DIRECTIONS = 12
_SHARE = 2  # samples a direction
_NODES = 10  # whose predictions the directions are taken from
_PULL = 2.0  # towards the common slopes: as if so many samples more had been seen that follow them
_PULL_COMMON = 1e-3  # of the common ones towards the held prediction
KIND = "parasolver memory 1"


@dataclass(frozen=True, eq=False, repr=False)
class Memory:
    """Learnt from finished samples of a network, for others of the same network, sampler and steps: :meth:`learn`.

    Of every node i the predicted sample is expected at

        h_i = E[h_i] + B (x_l - E[x_l]) + C (h_l - E[h_l]),

    with the state ``x_l`` and the prediction ``h_l`` of the last node l that is known. ``B`` and ``C`` are numbers: one
    each along every direction in which predictions vary most, and one each for all else. They are regressed on the
    samples, with a pull of those along the directions towards the common ones, and of these towards a prediction that
    stays.

    It changes what a run costs, and not its result: each sample's first defects are compared with its own predictions,
    and a memory that explains less than half of them is not asked again.

    Args:
        timesteps: (N,), of the samples.
        held: (N, 2), ``p`` and ``q`` of :class:`~parasolver_core.samplers.recurrence.Recurrence`.
        states, predictions: (N, size), means.
        directions: (r, size), orthonormal.
        along_states, along_predictions: (n, N, r), the samples' deviations from the means, along the directions.
        rest: (2, N, N), sums over samples and elements of ``x_i h_j`` and ``h_i h_j``, of what deviates otherwise.
        rest_states: (N,), the same of ``x_i x_i``.
        squares: (N,), means over the samples of the sum of squares of a prediction.
    """

    timesteps: Float64
    held: Float64
    states: Float64
    predictions: Float64
    directions: Float64
    along_states: Float64
    along_predictions: Float64
    rest: Float64
    rest_states: Float64
    squares: Float64

    @classmethod
    def learn(cls, solutions: Solution | Iterable[Solution], timesteps: ArrayLike, step_rule: StepRule) -> Memory:
        """A memory of finished samples; 16 to 64 are a good number.

        Args:
            solutions: with ``save="trajectory"``, of the same timesteps and step rule. Samples that did not converge
                are left out.
            timesteps, step_rule: as they were given to :func:`~parasolver_core.sampling.solve`.

        Raises:
            ValueError: a solution without trajectory, fewer than 8 samples, or a step rule that adds noise.
        """
        recurrence = table(step_rule, timesteps)
        if recurrence.stochastic:
            raise ValueError("step_rule: a memory follows samplers that add no noise; got one that does")
        found = [solutions] if isinstance(solutions, Solution) else list(solutions)
        parts = [_trajectories(solution, len(recurrence)) for solution in found]
        if len(sizes := sorted({part.shape[2] for part in parts})) != 1:
            raise ValueError(f"solutions: expected some, of samples of one size, got {len(parts)} of sizes {sizes}")
        X = np.concatenate(parts, axis=1)
        if X.shape[1] < _FEWEST:
            raise ValueError(f"solutions: expected at least {_FEWEST} samples that converged, got {X.shape[1]}")
        outputs = implied_outputs(recurrence, np, list(X), lambda step: None)
        H = np.stack([p * x + q * m for x, m, (p, q) in zip(X, outputs, recurrence.held, strict=False)])
        return cls(_numbers(recurrence), recurrence.held, *_statistics(X[:-1], H))

    @property
    def samples(self) -> int:
        """How many it was learnt from."""
        return len(self.along_states)

    @property
    def size(self) -> int:
        """Elements of a sample."""
        return self.states.shape[1]

    def __repr__(self) -> str:
        seen = hashlib.sha256(b"".join(getattr(self, table.name).tobytes() for table in fields(self)))
        return f"Memory({self.samples} samples of size {self.size}, {len(self.held)} steps, {seen.hexdigest()[:12]})"

    def check(self, recurrence: Recurrence, size: int) -> None:
        """Refuse a run that it was not learnt for.

        Raises:
            ValueError: other steps, another schedule or prediction type, another size, or a sampler that adds noise.
        """
        if recurrence.stochastic:
            raise ValueError("memory: it follows samplers that add no noise, and this one does; leave it out")
        if size != self.size:
            raise ValueError(f"memory: learnt from samples of {self.size} elements, got {size}")
        steps = _numbers(recurrence)
        if steps.shape != self.timesteps.shape or not np.allclose(steps, self.timesteps, rtol=1e-6, atol=0):
            raise ValueError(f"memory: learnt with other timesteps, {len(self.timesteps)} of them, got {len(steps)}")
        if not np.allclose(recurrence.held, self.held, rtol=1e-6, atol=0):
            raise ValueError("memory: learnt with another noise schedule or prediction type; learn it anew")

    def slopes(self, last: int, nodes: NDArray[np.int64], known: bool) -> tuple[Float64, Float64]:
        """``B`` and ``C`` of nodes behind node ``last``, each (count, r + 1): along the directions, and for all else.

        Args:
            last: the node that is known.
            nodes: (count,).
            known: whether its prediction is, too, and not its state alone.
        """
        x, h, target = self.along_states[:, last], self.along_predictions[:, last], self.along_predictions[:, nodes]
        pairs = np.stack([_pair(x, h), _pair(h, h)])
        xx = np.append(_pair(x, x), self.rest_states[last])
        xh, hh = np.append(pairs, self.rest[:, last, last, None], axis=1)
        with_x, with_h = (
            np.append(np.einsum("nr,ncr->cr", source, target), rest[last, nodes, None], axis=1)
            for source, rest in ((x, self.rest[0]), (h, self.rest[1]))
        )
        common = _fit((xx[-1:], xh[-1:], hh[-1:]), (with_x[:, -1:], with_h[:, -1:]), (0.0, 1.0), _PULL_COMMON, known)
        pull = _PULL / self.samples
        along = _fit((xx[:-1], xh[:-1], hh[:-1]), (with_x[:, :-1], with_h[:, :-1]), common, pull, known)
        B, C = (np.append(directions, rest, axis=1) for directions, rest in zip(along, common, strict=True))
        return B, C

    def save(self, file: str | os.PathLike[str]) -> None:
        """As a NumPy archive, ``.npz``, in single precision."""
        tables = {table.name: getattr(self, table.name) for table in fields(self)}
        exact = ("timesteps", "held")
        kept = {name: value if name in exact else value.astype(np.float32) for name, value in tables.items()}
        with Path(file).open("wb") as stream:
            np.savez(stream, kind=np.array(KIND), **kept)

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Memory:
        """What :meth:`save` has written.

        Raises:
            ValueError: the file holds something else.
        """
        with np.load(file, allow_pickle=False) as archive:
            if "kind" not in archive or str(archive["kind"]) != KIND:
                raise ValueError(f"file: expected one that Memory.save has written, got {os.fspath(file)}")
            return cls(**{table.name: archive[table.name].astype(np.float64) for table in fields(cls)})


def _numbers(recurrence: Recurrence) -> Float64:
    return np.asarray(recurrence.timesteps, dtype=np.float64)


def _trajectories(solution: Solution, steps: int) -> Float64:
    """(N + 1, n, size) of the samples that converged."""
    if not isinstance(solution, Solution):
        raise TypeError(f"solutions: expected what solve returns, got {type(solution).__name__}")
    if solution.trajectory is None:
        raise ValueError('solutions: expected solutions of runs with save="trajectory", got one without trajectory')
    states = to_host(solution.trajectory).astype(np.float64)
    if len(states) != steps + 1:
        raise ValueError(f"solutions: expected trajectories of {steps} steps, got one of {len(states) - 1}")
    states = states.reshape(*states.shape[:2], -1)
    return states[:, np.isfinite(states).all(axis=(0, 2))]


def _statistics(X: Float64, H: Float64) -> Sequence[Float64]:
    """The tables of a :class:`Memory` behind ``held``, from the states and predictions, each (N, n, size)."""
    states, predictions = X.mean(axis=1), H.mean(axis=1)
    squares = np.einsum("ind,ind->i", H, H) / H.shape[1]
    X, H = X - states[:, None], H - predictions[:, None]
    V = _directions(H)
    x, h = X @ V.T, H @ V.T
    X, H = X - x @ V, H - h @ V
    across = np.stack([np.tensordot(left, H, axes=([1, 2], [1, 2])) for left in (X, H)])
    return (
        states,
        predictions,
        V,
        np.moveaxis(x, 1, 0),
        np.moveaxis(h, 1, 0),
        across,
        np.einsum("ind,ind->i", X, X),
        squares,
    )


def _directions(H: Float64) -> Float64:
    """Those in which predictions vary most, (r, size)."""
    steps, count, size = H.shape
    some = np.unique(np.linspace(0, steps - 1, _NODES).astype(np.int64))
    _, _, V = np.linalg.svd(H[some].reshape(-1, size), full_matrices=False)
    return V[: min(_MOST_DIRECTIONS, count // _SHARE)]


def _pair(a: Float64, b: Float64) -> Float64:
    """Sums over the samples of products, (r,)."""
    return np.einsum("nr,nr->r", a, b)


def _fit(
    among: tuple[Float64, Float64, Float64],
    across: tuple[Float64, Float64],
    prior: tuple[Float64 | float, Float64 | float],
    pull: float,
    known: bool,
) -> tuple[Float64, Float64]:
    """Least squares for ``target = B x + C h``, pulled towards a prior; x alone where h is not known.

    Args:
        among: sums of ``x x``, ``x h`` and ``h h``, each (k,).
        across: sums of ``x target`` and ``h target``, each (count, k).
        prior: of B and C.
        pull: in units of ``x x`` and ``h h``.
        known: whether h is.
    """
    (xx, xh, hh), (with_x, with_h) = among, across
    tiny = np.finfo(np.float64).tiny
    if not known:
        B = (with_x + pull * xx * prior[0]) / np.maximum((1 + pull) * xx, tiny)
        return B, np.zeros_like(B)
    left_x = with_x - prior[0] * xx - prior[1] * xh  # what the prior does not explain
    left_h = with_h - prior[0] * xh - prior[1] * hh
    wide_x, wide_h = (1 + pull) * xx, (1 + pull) * hh
    determinant = np.maximum(wide_x * wide_h - xh**2, tiny)  # above 0 with a pull, by Cauchy and Schwarz
    B, C = (wide_h * left_x - xh * left_h) / determinant, (wide_x * left_h - xh * left_x) / determinant
    return prior[0] + B, prior[1] + C
