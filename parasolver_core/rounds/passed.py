"""What some want of a round beside the next windows: states that it passes by, and single nodes."""

from __future__ import annotations

import numpy as np

from parasolver_core.arrays import Array, matmul
from parasolver_core.rounds.decisions import Decision
from parasolver_core.rounds.nodes import Nodes
from parasolver_core.samplers.held_form import Indices


def passed_by(nodes: Nodes, decision: Decision, again: Array | None) -> Array:
    """The states behind nodes that become final, but for the last of them, as the round moves them: (B, most, size).

    Args:
        again: states that are :func:`~parasolver_core.rounds.remade.made_again`, if any are.
    """
    most = max(int(decision.accepted.max()) - 1, 0)
    if again is not None:
        return again[:, :most, :]
    behind = np.minimum(np.arange(1, most + 1), np.maximum(decision.accepted - 1, 0)[:, None])
    states = nodes.rows(nodes.form.past + behind)
    states += matmul(nodes.xp, nodes.put(decision.T[np.arange(len(behind))[:, None], behind]), nodes.r)
    return states


def moved(nodes: Nodes, decision: Decision, at: Indices) -> tuple[Array, Array]:
    """The states and held quantities of the windows' nodes number ``at``, (B,), as the round moves them."""
    every = np.arange(len(at))
    T = decision.T[every, at]
    moves = np.stack([T, T * decision.slope[every, at, None]], axis=1)
    rows = nodes.rows(np.stack([at, at + nodes.half], axis=1) + nodes.form.past)
    rows = rows + matmul(nodes.xp, nodes.put(moves), nodes.r)
    return rows[:, 0, :], rows[:, 1, :]
