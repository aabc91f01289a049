"""A method: the choices that make one parallel solver out of the parts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from parasolver_core.arrays import Array
from parasolver_core.methods.run import Run
from parasolver_core.methods.sliding import Sliding
from parasolver_core.methods.spread import spread
from parasolver_core.rounds.acceptance import Acceptance, RelativeMove
from parasolver_core.rounds.linearization import Linearization, Secant
from parasolver_core.rounds.shared import FillName, Shared
from parasolver_core.samplers.held_form import HeldForm
from parasolver_core.samplers.recurrence import Recurrence

_FEWEST_NODES = 5  # fewer do not show a trajectory's shape
_FEWEST_STEPS = 64  # a window slides over fewer in as few rounds
_NODES, _NODES_NOISY = 5.5, 7.0  # spread nodes: over the root of the tolerance; over the tolerance
_SHARE, _SHARE_NOISY = 3, 2  # how many times as many steps there must be before nodes are spread
_SMALL_WINDOW, _LOST_STEPS = 8, 8  # in smaller windows, each node fewer is worth so many steps of a window that slides
_GROWTH = 1e4  # where states outgrow what is held so many times, rounding alone is a thousandth of them
_LOST_ROUNDS = 7  # with noise: what spreading must be expected to save before it is tried


@dataclass(frozen=True)
class Method:
    """How a parallel solver linearizes, accepts and fills in.

    Args:
        linearization: how the surrogate's slope is chosen.
        acceptance: how many nodes are final after a round.
        spread: whether to begin with nodes spread over the whole trajectory where that takes fewer evaluations than a
            sliding window (:meth:`spreads`). Never with a tolerance of 0, nor with another kind of acceptance or fill
            than the default ones: both are a window's, and spread nodes would not ask them.
        fill: where nodes that enter a window begin. ``"held"``: with the predicted sample of the node before them, as
            corrected, held constant; ``"evaluated"``: as the network gave it; ``"copy"``: all at the state before them,
            also in the first round, which is then a full window. A warm start takes its place.
        summary: what the method is, for those who choose one.
    """

    linearization: Linearization = field(default_factory=Secant)
    acceptance: Acceptance = field(default_factory=RelativeMove)
    spread: bool = True
    fill: FillName = "held"
    summary: str = field(default="", kw_only=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, kind in (("linearization", Linearization), ("acceptance", Acceptance)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name}: expected an object of {kind.__name__}, got {getattr(self, name)!r}")
        if not isinstance(self.spread, bool):
            raise TypeError(f"spread: expected True or False, got {self.spread!r}")
        if self.fill not in ("held", "evaluated", "copy"):
            raise ValueError(f'fill: expected "held", "evaluated" or "copy", got {self.fill!r}')

    def check_choices(self, *, start: bool, warmup_steps: int, memory: bool) -> None:
        """Refuse what a run was asked for and this method cannot honour.

        Args:
            start: whether there is a warm start.
            warmup_steps: of the run.
            memory: whether there is a memory of earlier samples.
        """
        if memory and self.fill != "held":
            raise ValueError(
                f"memory: this method fills in nodes by its own rule, fill={self.fill!r}; use method='secant'"
            )

    def begin(self, shared: Shared, start: Array, trajectory: Array | None) -> list[Run]:
        """The runs that take all samples from ``start``.

        Args:
            shared: what all samples share.
            start: (batch, size), their ``x_T`` in the working dtype.
            trajectory: a warm start, (N + 1, batch, size); None: there is none.
        """
        samples, sliding = np.arange(start.shape[0]), Sliding(shared, trajectory)
        if self.spreads(shared.recurrence, shared.width, shared.tolerance):
            return [spread(shared, samples, start, sliding)]
        return list(sliding(samples, start))

    def sliding(self) -> Method:
        """The same method without spread nodes."""
        return replace(self, spread=False) if self.spread else self

    def spreads(self, recurrence: Recurrence, window: int, tolerance: float) -> bool:
        """Whether to spread nodes: few of the steps must be enough for the tolerance.

        A window that slides takes some rounds and about ``N / window``, spread nodes as many and twice ``n / window``,
        and some more where they end up sliding, which gives the factor 3 (so nothing is lost at a looser tolerance);
        more steps are asked for in a window of 5 to 7, into which not even the first levels fit. With noise
        about every other attempt finds that more nodes are needed and slides after all, some rounds later, so the gain
        must be worth the risk. Where states grow by themselves while predictions are held, these tell nothing of them.
        """
        if not self.spread or self.fill != "held" or type(self.acceptance) is not RelativeMove:
            return False
        few = window < _FEWEST_NODES or len(recurrence) < _FEWEST_STEPS * recurrence.stages
        if few or tolerance <= 0:
            return False
        if recurrence.stochastic:
            share, lost = _SHARE_NOISY, _LOST_ROUNDS * window
        else:
            share, lost = _SHARE, _LOST_STEPS * max(_SMALL_WINDOW * recurrence.stages - window, 0)
        enough = share * self.needed_nodes(recurrence, tolerance) + lost <= len(recurrence)
        return enough and HeldForm(recurrence).growth() <= _GROWTH

    def needed_nodes(self, recurrence: Recurrence, tolerance: float) -> float:
        """About how many nodes must be spread for a tolerance.

        Interpolating linearly between n nodes was measured to leave an error of about ``(2.5 / n)^2``, and of
        ``20 / n`` times a margin where noise makes the trajectory rough; without noise, estimating that error safely
        takes twice as many nodes. Where a step has several nodes, so many steps are needed.
        """
        tolerance = self.acceptance.spread_tolerance(recurrence, tolerance)
        nodes = _NODES_NOISY / tolerance if recurrence.stochastic else _NODES / math.sqrt(tolerance)
        return nodes * recurrence.stages
