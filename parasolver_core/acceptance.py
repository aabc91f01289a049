"""How far a round's result is final: the error estimate against the tolerance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class RoundView:
    """What is known of one sample's window after a round; n nodes, the first of them ``lo``.

    Args:
        lo: first node of the window.
        move: (n,), RMS move of each node's input by this round's correction, over the RMS of that input; 0 for the
            first, whose input is final.
        signal: (n,), the inverse of how an error in the node's input may grow on its way to the sample.
        rounding: the relative size of moves that are no more than the arithmetic's own noise.
        noisy: whether the sampler adds noise.
    """

    lo: int
    move: Float64
    signal: Float64
    rounding: float
    noisy: bool = False


class Acceptance(ABC):
    """Decides how many nodes of a window are final."""

    @abstractmethod
    def accept(self, view: RoundView, tolerance: float) -> tuple[int, float]:
        """``(count, error)``: how many nodes, at least 1, are final, and the relative error that this leaves.

        The first node had its final input, so it is always final.
        """


@dataclass(frozen=True)
class RelativeMove(Acceptance):
    """Accept the leading nodes whose input the last correction moved little, as seen from the sample.

    A correction is the error of the state before it, and what is left behind is smaller by the contraction of a round.
    Later steps amplify it again, by up to 1 / signal on average, and by more where the network decides between two
    modes of the data. ``factor`` stands for both, and is chosen so that the distance to the sequential sample keeps
    within the tolerance for at least 95 % of samples.

    Args:
        factor: the largest accepted move over signal, in units of the tolerance.
        noisy_factor: the same for samplers that add noise, whose trajectories decide again and again.
    """

    factor: float = 0.2
    noisy_factor: float = 0.06

    def accept(self, view: RoundView, tolerance: float) -> tuple[int, float]:
        effect = view.move / view.signal / (self.noisy_factor if view.noisy else self.factor)
        settled = (effect <= tolerance) | (view.move <= view.rounding)  # NaN is never settled
        settled[0] = True
        count = int(np.argmin(settled)) if not settled.all() else len(settled)
        return count, float(np.max(effect[:count]))
