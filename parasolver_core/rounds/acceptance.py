"""How far a round's result is final: the error estimate against the tolerance."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from parasolver_core.rounds.margins import Margins
from parasolver_core.samplers.recurrence import Recurrence

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class RoundView:
    """What is known of one sample's window after a round; n nodes, the first of them ``lo``.

    For an acceptance that takes :attr:`~Acceptance.many` samples, ``lo`` is (B,) and what is (n,) here is (B, n).

    Args:
        lo: first node of the window.
        move: (n,), RMS move of each node's input by this round's correction, over the RMS of that input; 0 for the
            first, whose input is final.
        size: (n,), RMS of each node's input.
        bound: (n,), the acceptance's own :meth:`Acceptance.bounds` of these nodes.
        rounding: the relative size of moves that are no more than the arithmetic's own noise.
        smallness: (n,), at most 1: what of a node's size counts where the data are much smaller than the noise, see
            :class:`~parasolver_core.samplers.small_data.SmallData`.
    """

    lo: int | NDArray[np.int64]
    move: Float64
    size: Float64
    bound: Float64
    rounding: float
    smallness: Float64 | float = 1.0

    def of(self, row: int, count: int) -> RoundView:
        """Of one of many samples, the first ``count`` nodes."""
        at = row, slice(count)
        lo, small = int(np.asarray(self.lo)[row]), np.asarray(self.smallness)[at]
        return RoundView(lo, self.move[at], self.size[at], self.bound[at], self.rounding, small)

    def leading(self, effect: Float64, tolerance: float) -> tuple[Any, Any]:
        """How many leading nodes, at least 1, have an effect within the tolerance, and the largest effect of them."""
        settled = (effect <= tolerance) | (self.move <= self.rounding)  # NaN is never settled
        settled[..., 0] = True
        count = leading(settled)
        if effect.ndim == 1:
            return count, effect[:count].max()
        beyond = np.arange(effect.shape[1]) >= count[:, None]
        return count, np.where(beyond, -np.inf, effect).max(axis=1)


def leading(flags: NDArray[np.bool_]) -> Any:
    """How many leading flags of each row hold, (B,); of flags (n,), how many."""
    if flags.ndim == 1:
        return len(flags) if flags.all() else flags.argmin()
    return np.where(flags.all(axis=1), flags.shape[1], flags.argmin(axis=1))


def shares(lengths: Float64, of: Float64) -> Float64:
    """``lengths / of``; 0 is 0 of anything, also of the state 0, where many differential equations start."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(lengths != 0, lengths / of, 0.0)


class Acceptance(ABC):
    """Decides how many nodes of a window are final.

    ``many``: whether :meth:`accept` takes a view of many samples, too, and then returns a pair of (B,). Said by the
    class that defines it; one that does not say so is asked sample by sample.
    ``reach``: by how many tolerances the next state may follow a node's slope for the node to be final, see
    :func:`~parasolver_core.rounds.slopes.followed`; unless overridden, any number.
    """

    many: ClassVar[bool] = False
    reach: ClassVar[float] = math.inf

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "accept" in vars(cls):  # what a class says of its own says nothing of one that takes its place
            cls.many = vars(cls).get("many", False)

    def bounds(self, recurrence: Recurrence) -> Float64:
        """(N,), the move of each node's input that is worth a tolerance of 1; ones unless overridden."""
        return np.ones(len(recurrence))

    def spread_tolerance(self, recurrence: Recurrence, tolerance: float) -> float:
        """What the estimated error of spread nodes must be within; the tolerance itself unless overridden."""
        return tolerance

    @abstractmethod
    def accept(self, view: RoundView, tolerance: float) -> tuple[int, float]:
        """``(count, error)``: how many nodes, at least 1, are final, and the relative error that this leaves.

        The first node had its final input, so it is always final.
        """


@dataclass(frozen=True)
class RelativeMove(Acceptance):
    """Accept the leading nodes whose input the last correction moved little, as seen from the sample.

    A correction is the error of the state before it, and what is left behind is smaller by the contraction of a round.
    Later steps amplify it again, or forget it where noise is added, by something between 1 and
    :attr:`~parasolver_core.samplers.recurrence.Recurrence.influence`, of which the root is taken, and amplify it more
    where the network decides between two modes of the data. The margins stand for all this, and are chosen so that the
    distance to the sequential sample keeps within the tolerance for at least 95 % of the samples of trained networks.

    Args:
        margins: how far the move is trusted.
    """

    margins: Margins = field(default_factory=Margins)
    many: ClassVar[bool] = True
    reach: ClassVar[float] = 10.0  # with 1 and 3, smooth networks took as many rounds; a jump leaves any number

    def bounds(self, recurrence: Recurrence) -> Float64:
        factor = self.margins.noisy_factor if recurrence.stochastic else self.margins.factor
        return factor / np.sqrt(recurrence.influence)

    def spread_tolerance(self, recurrence: Recurrence, tolerance: float) -> float:
        return (self.margins.noisy_spread if recurrence.stochastic else self.margins.spread) * tolerance

    def accept(self, view: RoundView, tolerance: float) -> tuple[int, float]:
        caution = math.sqrt(1 + tolerance / self.margins.loosest)
        return view.leading(shares(view.move, view.bound * view.smallness) * caution, tolerance)
