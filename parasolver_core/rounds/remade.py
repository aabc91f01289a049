"""States that are made again by the recurrence itself, for the rounding that they have of what was much larger.

A state that is moved keeps the rounding of the largest that it ever was. Where a round decides that this is too much
(:class:`~parasolver_core.rounds.sizes.Sizes`), the states that it keeps take the place of moved ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from parasolver_core.arrays import Array, take_rows, uploaded
from parasolver_core.rounds.decisions import Decision
from parasolver_core.rounds.nodes import Nodes
from parasolver_core.samplers.held_form import Indices
from parasolver_core.samplers.terms import combine

Draw = Callable[[Indices, Indices, int], Array]  # (first, end, count): z of the steps, zero from the end on


def made_again(nodes: Nodes, decision: Decision, lo: Indices, draw: Draw) -> Array | None:
    """The states behind the first nodes by the recurrence itself, if they are to be made again; and their beliefs.

    Node by node, as the plain loop makes them, so that each follows from what is stored of those before it. In one
    product of all, parts cancel where a slope is far off, and no later round notices what their rounding leaves.
    Beliefs follow their states, so that rounding grows no faster than the sampler itself lets it.

    Returns:
        (B, most + k, size), the ``most`` states behind the first nodes, and what is held at the first k of them.
    """
    form, most = nodes.form, int(known_behind(decision).max())
    if not decision.grown or most == 0:
        return None
    n, place = decision.slope.shape[1], form.past
    slope = decision.slope.copy()
    slope[:, 0] = 0.0  # the first state stays what it is
    g = nodes.put(slope[..., None])
    d = nodes.S[:, nodes.half + place : 2 * nodes.half, :] - g * nodes.S[:, place : nodes.half, :]
    i = np.minimum(lo[:, None] + np.arange(most), form.steps - 1)
    a, b, c = (nodes.put(table[i][..., None]) for table in (form.a, form.b, form.c[:, None]))
    z = draw(lo, lo + known_behind(decision), most) if form.noisy else None
    xs, (_, *hs) = nodes.history(slice(None), 0)
    states, held = [], []
    for ahead in range(most):
        hs = [d[:, ahead, :] + g[:, ahead, :] * xs[0], *hs][: form.reads[1]]
        terms = [(a[:, ahead, k, :], x) for k, x in enumerate(xs)] + [(b[:, ahead, k, :], h) for k, h in enumerate(hs)]
        xs = [combine(terms if z is None else [*terms, (c[:, ahead, 0, :], z[:, ahead, :])]), *xs][: form.reads[0]]
        states, held = [*states, xs[0]], [*held, hs[0]]
    if most < n:
        held.append(d[:, most, :] + g[:, most, :] * xs[0])
    return nodes.xp.stack([*states, *held[1:]], axis=1)


def known_behind(decision: Decision) -> Indices:
    """(B,), how many states behind the first are known: those of nodes that are kept, or behind final ones."""
    return np.maximum(decision.accepted, decision.sound - 1)


def places_of(
    decision: Decision, place: Indices, base: Indices, believed: NDArray[np.bool_]
) -> tuple[Indices, Indices]:
    """Which row of :func:`made_again` is that of a row of the next windows, and of one of the base; -1: none.

    Those are the states behind the first node, and then the beliefs of the nodes that are kept.

    Args:
        place: (B, R), of the next windows' rows in the present ones.
        base: (B, base), the nodes that new ones are made of.
        believed: (base,), whether it is what is held there, not the state.
    """
    known, last = known_behind(decision), decision.sound[:, None] - 1
    states = known.max()

    def row(at: Indices, belief: bool | NDArray[np.bool_]) -> Indices:
        there = (at > 0) & (at <= np.where(belief, last, known[:, None]))
        return np.where(there, at - 1 + np.where(belief, states, 0), -1)

    of_rows = [row(place, belief=False), row(place, belief=True), np.full_like(place[:, :1], -1)]
    return np.concatenate(of_rows, axis=1), row(base, believed)


def replaced(rows: Array, by: Array, place: Indices) -> Array:
    """Rows (B, k, size); where a place is not -1, those at that place of ``by``, (B, most, size)."""
    xp: Any = array_namespace(rows)
    (batch, count), (_, most, size) = place.shape, by.shape
    index = np.arange(batch)[:, None] * most + np.maximum(place, 0)
    other = xp.reshape(take_rows(xp.reshape(by, (-1, size)), index.reshape(-1)), (batch, count, size))
    return xp.where(uploaded(xp, (place >= 0)[..., None], device(rows)), other, rows)
