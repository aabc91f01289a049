"""What the rows of the next windows are made of: tables on the host, for all samples of a batch at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parasolver_core.guesses.fill import Entering
from parasolver_core.rounds.decisions import Decision
from parasolver_core.rounds.remade import places_of
from parasolver_core.samplers.held_form import Float64, HeldForm, Indices


@dataclass(frozen=True)
class NextRows:
    """``S[source] + C [r; S[base]; further rows]``; B samples.

    Rows that are kept move from where they are, so that the product's rounding is that of the move; new ones begin at
    zero.

    Args:
        source: (B, 2 R + 1), rows of the present buffer.
        C: (B, 2 R + 1, columns), in the states' dtype.
        base: (B, base), rows of the present buffer that new nodes are made of.
        again: which of the rows that are made again takes a row's place, (B, 2 R + 1) and, of the base, (B, base); -1:
            none. None where nothing is made again.
    """

    source: Indices
    C: NDArray[Any]
    base: Indices
    again: tuple[Indices, Indices] | None

    @classmethod
    def of(
        cls, form: HeldForm, decision: Decision, place: Indices, uncorrected: bool, entering: Entering, dtype: Any
    ) -> NextRows:
        """Tables of a round.

        Args:
            form: the sampler.
            decision: of the round.
            place: (B, R), of the next windows' rows in the present ones, beyond their end too.
            uncorrected: whether new nodes read the last belief as the network gave it, too.
            entering: what new nodes are made of.
            dtype: of the states.
        """
        (count, n, _), states, rows = decision.T.shape, form.reads[0], place.shape[1]
        last, half = decision.sound[:, None] - 1, form.past + n
        behind, kept = np.maximum(place - last, 0), np.minimum(place, last)  # behind the last one kept; 0: kept
        base = last - (np.append(form.behind, 0) if uncorrected else form.behind)
        believed = np.arange(base.shape[1]) >= states
        base_T, base_g = _moves(decision, base)
        base_T *= np.where(believed, base_g, 1.0)[..., None]
        again = None
        if decision.grown:
            again = places_of(decision, place, base, believed)
            if uncorrected:
                again[1][:, -1] = -1
            base_T[again[1] >= 0] = 0.0
        if uncorrected:
            base_T[:, -1] = 0.0
        T, g = _moves(decision, np.where(behind > 0, 0, kept))
        moves = np.empty((2, *T.shape))  # of states, and of beliefs
        moves[0] = T
        np.multiply(T, g[..., None], out=moves[1])
        entered = behind.any(axis=0)
        new = int(entered.argmax()) if entered.any() else rows  # no row before it is new
        answers = entering.rows(behind[:, new:])
        moves[:, :, new:] += answers[..., : base.shape[1]] @ base_T
        C = np.empty((count, 2 * rows + 1, n + entering.columns), dtype=dtype)
        C[:, -1] = 0.0
        both = C[:, :-1].reshape(count, 2, rows, -1).swapaxes(0, 1)  # a view, as the moves
        both[..., :n], both[:, :, :new, n:], both[:, :, new:, n:] = moves, 0.0, answers

        source = np.full((count, 2 * rows + 1), 2 * half)  # the row of zeros, at the end
        of_both = source[:, :-1].reshape(count, 2, rows).swapaxes(0, 1)
        np.copyto(of_both, kept + form.past + np.array([0, half])[:, None, None], where=behind == 0)
        return cls(source, C, base + form.past + believed * half, again)


def _moves(decision: Decision, place: Indices) -> tuple[Float64, Float64]:
    """How the states at these places, (B, k), of the present windows move, (B, k, n), and the slopes there, (B, k).

    The first node, and those before it, do not move.
    """
    count, n, _ = decision.T.shape
    at = np.maximum(place, 0) + np.arange(0, count * n, n)[:, None]
    return decision.T.reshape(-1, n).take(at, axis=0), decision.slope.take(at)
