"""Rounds in which numbers run out of range: what of them is good, and which samples fail.

Nodes are asked at states that are guesses, but for the first of each window: only where that one fails does its sample.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from parasolver_core.arrays import Array, assign, copied, finite_rows, take_rows, uploaded
from parasolver_core.rounds.acceptance import leading
from parasolver_core.rounds.decisions import Sums, Windows
from parasolver_core.rounds.nodes import Nodes
from parasolver_core.samplers.held_form import Indices
from parasolver_core.solution import Status

Failures = dict[int, tuple[Status, int, Array]]  # by row: status, node and last good state


def salvage(nodes: Nodes, windows: Windows, D: Array, found: Sums) -> tuple[Sums, Indices, Failures]:
    """Some sums are not finite: nodes from there on are dropped, to be filled in anew.

    Returns:
        Finite sums, how many leading nodes of each sample are usable, and the samples that fail.
    """
    usable = np.minimum(np.maximum(leading(fine(found)), 1), windows.n)
    inside = np.arange(windows.longest) < usable[:, None]
    states_ok, outputs_ok = well(nodes, D, windows)
    failed: Failures = {}
    for row in np.flatnonzero(~(states_ok & outputs_ok)).tolist():
        status = Status.NONFINITE_MODEL if states_ok[row] else Status.NONFINITE_SOLVER
        failed[row] = status, int(windows.lo[row]), copied(nodes.xp, nodes.first[row, :])
        inside[row] = False
    drop(nodes, inside)
    return within(found, inside), usable, failed


def fine(found: Sums) -> NDArray[np.bool_]:
    """(B, n), where nothing has run out of range."""
    return np.isfinite(found.defects) & np.isfinite(found.cross) & np.isfinite(found.length)


def well(nodes: Nodes, D: Array, windows: Windows) -> tuple[Any, Any]:
    """Of each sample, whether the state and the defect of its first node are finite, and the network's output."""
    first, xp = np.cumsum(windows.n) - windows.n, nodes.xp
    states = finite_rows(xp, nodes.first) & finite_rows(xp, nodes.r[:, 0, :])
    outputs = finite_rows(xp, take_rows(D, first))
    return states | (finite_rows(xp, nodes.first) & ~outputs), outputs


def drop(nodes: Nodes, inside: NDArray[np.bool_]) -> None:
    """Nothing is known of nodes that are not inside, (B, n)."""
    nodes.r, past = where_known(nodes.r, inside), nodes.form.past
    for first in (past, nodes.half + past):
        rows = slice(None), slice(first, first + inside.shape[1]), ...
        nodes.S = assign(nodes.S, rows, where_known(nodes.S[rows], inside))


def within(found: Sums, inside: NDArray[np.bool_]) -> Sums:
    """With 0 for nodes that are not inside, (B, n), and where something has run out of range."""
    pairs = inside[:, :, None] & inside[:, None, :] & np.isfinite(found.gram)
    cross = np.where(inside & np.isfinite(found.cross), found.cross, 0.0)
    length = np.where(inside & np.isfinite(found.length), found.length, 1.0)
    return Sums(np.where(pairs, found.gram, 0.0), cross, length, found.held, found.unit, finite=False)


def where_known(rows: Array, known: NDArray[np.bool_]) -> Array:
    """Rows (B, k, size), and 0 where nothing is known, (B, k): in a product 0 times NaN would be NaN."""
    xp: Any = array_namespace(rows)
    return xp.where(uploaded(xp, known[..., None], device(rows)), rows, xp.zeros_like(rows))


def overflowed(nodes: Nodes, lo: Indices, before: Array, passed: Array, accepted: Indices) -> Failures:
    """Samples whose next first state is not finite: their own arithmetic has run out of range.

    Args:
        nodes: the next windows'.
        lo: (B,), the first nodes before the round.
        before: (B, size), their states.
        passed: (B, most, size), the states that windows have passed by.
        accepted: (B,), how many nodes are final.
    """
    failed: Failures = {}
    for row in np.flatnonzero(~finite_rows(nodes.xp, nodes.first)).tolist():
        fine = finite_rows(nodes.xp, passed[row, ...])
        good = int(leading(fine[: max(int(accepted[row]) - 1, 0)]))
        state = passed[row, good - 1, :] if good else before[row, :]
        failed[row] = Status.NONFINITE_SOLVER, int(lo[row]) + good, state
    return failed
