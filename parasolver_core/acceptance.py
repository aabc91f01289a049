"""How far a round's result is final: the error estimate against the tolerance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class RoundView:
    """What is known of one sample's window after a round; n nodes, the first of them ``lo``. RMS over the event.

    Args:
        lo: first node of the window.
        steps: number of steps of the whole trajectory.
        move: (n,), RMS move of each node's input by this round's correction; 0 for the first.
        scale: (n,), RMS of each node's input.
        defect: (n,), RMS defect of each node in this round.
        unexplained: (n,), RMS of the part of the defect that the slope does not explain, over the RMS move that
            caused it: how wrong the next prediction will be for each unit of ``move``. NaN without history.
        slope: (n,), slopes used in the correction.
        response: (n, n), ``T``: change of state ``lo + 1 + i`` for a unit defect at each node.
        growth: (n,), change of the same states for a unit error in state ``lo``.
        carried: estimated RMS error of state ``lo``.
        noise: (n,), standard deviation of the noise that each step adds.
    """

    lo: int
    steps: int
    move: Float64
    scale: Float64
    defect: Float64
    unexplained: Float64
    slope: Float64
    response: Float64
    growth: Float64
    carried: float
    noise: Float64


class Acceptance(ABC):
    """Decides how many nodes of a window are final."""

    @abstractmethod
    def accept(self, view: RoundView, tolerance: float, rounding: float) -> tuple[int, Float64]:
        """``(count, error)``: how many nodes, at least 1, are final, and the estimated RMS error (n,) of their results.

        The first node had its final input, so it is always final. ``rounding`` is the relative size of moves that
        are no more than the arithmetic's own noise.
        """


@dataclass(frozen=True)
class ErrorEstimate(Acceptance):
    """Accept while the estimated relative error of a state, as it will reach the sample, is within the tolerance.

    A node whose input moved by ``move`` after it was evaluated has an output that is predicted, not evaluated. The
    prediction misses by about ``unexplained * move``, and ``response`` (the correction's own matrix) carries that
    miss, and the error already accepted, to the states behind it.

    Args:
        unknown: stands for ``unexplained`` at nodes without history, in units of the slope.
        trust: the largest accepted relative move, in units of the tolerance, whatever the estimate says.
    """

    unknown: float = 1.0
    trust: float = 10.0

    def accept(self, view: RoundView, tolerance: float, rounding: float) -> tuple[int, Float64]:
        unexplained = np.where(
            np.isnan(view.unexplained), self.unknown * np.abs(view.slope), view.unexplained
        )
        miss = np.abs(view.response) @ (unexplained * view.move)
        error = np.abs(view.growth) * view.carried + miss
        budget = tolerance * view.scale * np.sqrt((view.lo + 1 + np.arange(len(error))) / view.steps)
        settled = view.move <= rounding * view.scale
        final = settled | ((error <= budget) & (view.move <= self.trust * tolerance * view.scale))
        final[0] = True
        count = int(np.argmin(final)) if not final.all() else len(final)
        return count, error
