"""The few products that move the states and beliefs of many windows: what is done on the device.

A round is, for all samples at once,

    r = D(X) - M ,    X += T r ,    M = D(X_old) + G T r ,

in terms of the held quantity, of which beliefs are kept: ``r = p X + q D - H``, and then ``H = p X + q D``. New nodes
are linear in what is known, so they are rows of the same product.
"""

from __future__ import annotations

import numpy as np

from parasolver_core.arrays import (
    Array,
    assign,
    coarse,
    gram,
    lengths,
    matmul,
    plus_product,
    put_index,
    take_at,
    uploaded_together,
    vecdot,
)
from parasolver_core.rounds.decisions import Sums, Windows
from parasolver_core.rounds.next_rows import NextRows
from parasolver_core.rounds.nodes import Nodes, rectangular
from parasolver_core.rounds.remade import replaced
from parasolver_core.rounds.squares import at_least, at_most
from parasolver_core.samplers.held_form import Float64


def compare(nodes: Nodes, D: Array, windows: Windows) -> Array:
    """``r``, and a vector of the sums that the host needs, for :func:`unpack`; beliefs are then what was said.

    Args:
        nodes: whose ``r`` it becomes.
        D: (rows, size), the outputs.
        windows: where the windows stand.
    """
    xp, past, half, n, count = nodes.xp, nodes.form.past, nodes.half, windows.longest, len(windows.n)
    first_row = D[0, :]
    D = rectangular(D, windows.n, n)
    X, beliefs = nodes.S[:, past:half, :], (slice(None), slice(half + past, 2 * half), ...)
    held = nodes.put(windows.held[..., None]) if nodes.held is None else nodes.held
    said = plus_product(held[1, ...] * xp.reshape(D, (count, n, nodes.size)), held[0, ...], X)
    nodes.r = r = said - nodes.S[beliefs]
    nodes.S = assign(nodes.S, beliefs, said)  # not H + r, which has the rounding of what was believed
    del said  # memory
    products = xp.reshape(gram(xp, r), (count, -1))
    cross = vecdot(xp, nodes.dX[:, past:, :], r)
    sums = xp.reshape(xp.concat([products, cross, lengths(xp, nodes.S)], axis=1), (-1,))
    nodes.dX = None  # memory: not read any more
    return sums if nodes.dtype.itemsize < 8 else xp.concat([sums, coarse(xp, first_row)])


def unpack(nodes: Nodes, sums: Float64, windows: Windows) -> Sums:
    """What :func:`compare` found, brought to the host."""
    unit, n, count, past = windows.eps, windows.longest, len(windows.n), nodes.form.past
    if nodes.dtype.itemsize == 8:
        unit, sums = max(unit, float(sums[-1])), sums[:-1]
    finite, sums = bool(np.isfinite(sums).all()), sums.reshape(count, -1)
    pairs, cross = sums[:, : n * n].reshape(-1, n, n), sums[:, n * n : n * n + n]
    sizes = sums[:, n * n + n : -1].reshape(count, 2, -1)[:, :, past:]  # of X and H
    diagonal = sums[:, : n * n : n + 1]  # a view
    diagonal[...] = at_most(diagonal, nodes.xp, nodes.r)
    length = at_least(sizes[:, 0], nodes.xp, nodes.S[:, past : nodes.half, :])
    return Sums(pairs, cross, length, sizes[:, 1], unit, finite)


def write(nodes: Nodes, next_rows: NextRows, held: Float64, further: list[Array], again: Array | None = None) -> None:
    """The rows of the next windows.

    Args:
        nodes: whose rows they become.
        next_rows: what they are made of.
        held: (2, B, n), the weights of what is held at their nodes.
        further: rows that new nodes are made of, (B, k, size), noise at the end.
        again: states and beliefs that are :func:`~parasolver_core.rounds.remade.made_again`.
    """
    xp, base, source, flat, places = nodes.xp, next_rows.base, next_rows.source, nodes.flat, next_rows.again
    every = np.arange(0, flat.shape[0], nodes.S.shape[1])[:, None]
    at = put_index(flat, np.concatenate([(base + every).reshape(-1), (source + every).reshape(-1)]))
    bases = xp.reshape(take_at(flat, at[: base.size]), (*base.shape, nodes.size))
    if again is not None:  # else new nodes would not follow from the states before them
        assert places is not None
        bases = replaced(bases, again, places[1])
    sources = xp.concat([nodes.r, bases, *further], axis=1)
    nodes.r = bases = None  # memory, here and below
    nodes.S = xp.reshape(take_at(flat, at[base.size :]), (*source.shape, nodes.size))
    del flat
    tables = [next_rows.C, held[..., None].astype(nodes.dtype, copy=False)]
    C, nodes.held = uploaded_together(xp, tables, nodes.device)
    moves = matmul(xp, C, sources)  # everything that is computed
    del sources
    nodes.S += moves
    nodes.dX = moves[:, : nodes.half, :]
    if again is not None:
        assert places is not None
        nodes.S = replaced(nodes.S, again, places[0])
