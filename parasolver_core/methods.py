"""Methods: the choices that make one parallel solver out of the parts, under the names users know.

``"secant"`` is the default and the best that was found; ``"identity"`` is its sliding window with Picard's slope.
``"paradigms"``, ``"parasolver"`` and ``"parataa"`` are the published methods, for comparison, with their stop rules:
see :class:`~parasolver_core.acceptance.StepVariance` and :class:`Anderson` for what ``tolerance`` then means.
Preconditioning steps are ``warmup_steps`` plus one, since the first call of ``"parasolver"`` is always alone.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from parasolver_core.acceptance import Acceptance, Margins, RelativeMove, StepVariance
from parasolver_core.linearization import Identity, Linearization, Secant
from parasolver_core.recurrence import Recurrence
from parasolver_core.validation import check_count

_FEWEST_NODES = 5  # fewer do not show a trajectory's shape
_FEWEST_STEPS = 64  # a window slides over fewer in as few rounds
_NODES, _NODES_NOISY = 5.5, 8.0  # spread nodes: over the root of the tolerance; over the tolerance
_SHARE, _SHARE_NOISY = 3, 2  # how many times as many steps there must be before nodes are spread
_SMALL_WINDOW, _LOST_STEPS = 8, 8  # in smaller windows, each node fewer is worth so many steps of a window that slides
_LOST_ROUNDS = 7  # with noise: what spreading must be expected to save before it is tried
CALIBRATED = "parasolver calibration 1"  # what a calibration file says it is
FINEST = 1e-6  # a smaller tolerance is the arithmetic's
_SLIDING, _SLIDING_NOISY = (2.6, 1.1, 1 / 3), (4.1, 0.9, 0.55)  # p, q, r of sliding_rounds; by benchmarks.planning


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
    fill: Literal["held", "evaluated", "copy"] = "held"
    summary: str = field(default="", kw_only=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, kind in (("linearization", Linearization), ("acceptance", Acceptance)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name}: expected an object of {kind.__name__}, got {getattr(self, name)!r}")
        if not isinstance(self.spread, bool):
            raise TypeError(f"spread: expected True or False, got {self.spread!r}")
        if self.fill not in ("held", "evaluated", "copy"):
            raise ValueError(f'fill: expected "held", "evaluated" or "copy", got {self.fill!r}')

    def check_choices(self, *, start: bool, warmup_steps: int) -> None:
        """Refuse what a run was asked for and this method cannot honour: unless overridden, nothing.

        Args:
            start: whether there is a warm start.
            warmup_steps: of the run.
        """

    def spreads(self, recurrence: Recurrence, window: int, tolerance: float) -> bool:
        """Whether to spread nodes: few of the steps must be enough for the tolerance.

        A window that slides takes some rounds and about ``N / window``, spread nodes as many and twice ``n / window``,
        and some more where they end up sliding, which gives the factor 3 (so nothing is lost at a looser tolerance);
        more steps are asked for in a window of 5 to 7, into which not even the first levels fit. With noise
        about every other attempt finds that more nodes are needed and slides after all, some rounds later, so the gain
        must be worth the risk.
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
        return share * self.needed_nodes(recurrence, tolerance) + lost <= len(recurrence)

    def needed_nodes(self, recurrence: Recurrence, tolerance: float) -> float:
        """About how many nodes must be spread for a tolerance.

        Interpolating linearly between n nodes was measured to leave an error of about ``(2.5 / n)^2``, and of
        ``20 / n`` times a margin where noise makes the trajectory rough; without noise, estimating that error safely
        takes twice as many nodes. Where a step has several nodes, so many steps are needed.
        """
        tolerance = self.acceptance.spread_tolerance(recurrence, tolerance)
        nodes = _NODES_NOISY / tolerance if recurrence.stochastic else _NODES / math.sqrt(tolerance)
        return nodes * recurrence.stages


def sliding(method: Method) -> Method:
    """The same method without spread nodes."""
    return replace(method, spread=False) if method.spread else method


def sliding_rounds(recurrence: Recurrence, window: int, tolerance: float) -> float:
    """About how many rounds a sliding window takes with the default slopes and acceptance.

    ``N / window + (1 - 1 / window) (p + q log10(1 / tolerance) (N / window)^r)``: what a window costs that moves on by
    itself each round, and how many rounds nodes take to settle, of which a window of 1 needs none. Within some 20 % of
    what ``benchmarks.planning`` counts.
    """
    p, q, r = _SLIDING_NOISY if recurrence.stochastic else _SLIDING
    lengths, digits = len(recurrence) / window, math.log10(1 / min(max(tolerance, FINEST), 1.0))
    return min(lengths + (1 - 1 / window) * (p + q * digits * lengths**r), float(len(recurrence)))


@dataclass(frozen=True)
class Anderson(Method):
    """ParaTAA, in :mod:`parasolver_core.anderson`: no slopes, but a memory of earlier rounds.

    A state is final when its residual, RMS over its elements, is within ``tolerance * max(sd, floor)``, with the
    standard deviation ``sd`` of the noise that a DDPM step adds there. For rules that read one node: DDIM, DDPM, Euler.

    Args:
        order: how many steps back the fixed-point equation of a state begins; None: at the window's first node. The
            paper's best were about 8.
        memory: how many changes between rounds are combined; 0: none, plain fixed-point iteration.
        ridge: added to the diagonal of the least squares problem.
        floor: see above; published are a tolerance of 0.05 and a floor of 0.2.

    Reference: Tang et al., "Accelerating Parallel Sampling of Diffusion Models", ICML 2024, algorithm 1.
    """

    linearization: Linearization = field(default_factory=Secant, init=False, repr=False)  # of no use to it,
    spread: bool = field(default=False, init=False, repr=False)  # like these two
    fill: Literal["held", "evaluated", "copy"] = field(default="copy", init=False, repr=False)
    acceptance: Acceptance = field(default_factory=StepVariance)
    order: int | None = 8
    memory: int = 2
    ridge: float = 1e-3
    floor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("order", self.order, optional=True)
        check_count("memory", self.memory, minimum=0)
        for name in ("ridge", "floor"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
        if type(self.acceptance) is not StepVariance:
            raise TypeError(
                f"acceptance: this method has a stop rule of its own, with the bounds of a StepVariance, got "
                f"{self.acceptance!r}"
            )

    def check_choices(self, *, start: bool, warmup_steps: int) -> None:
        if start:
            raise ValueError("start: method='parataa' begins with copies of x_T; use method='secant' for a warm start")
        if warmup_steps:
            raise ValueError(
                f"warmup_steps: method='parataa' opens its window at once, got {warmup_steps}; leave it out, or use "
                "another method"
            )


METHODS: dict[str, Method] = {
    "secant": Method(
        summary="The default: at each node the scalar slope that best explains how the output last changed with its "
        "input. A sliding window, or nodes spread over the whole trajectory where fewer evaluations do."
    ),
    "identity": Method(
        linearization=Identity(),
        spread=False,
        summary="Picard iteration, each step's Jacobian taken to be the identity; the sliding window of the default.",
    ),
    "paradigms": Method(
        linearization=Identity(),
        acceptance=StepVariance(end=0.0),
        spread=False,
        fill="copy",
        summary="ParaDiGMS (Shih et al., 2023): Picard iteration; new nodes are copies of the last state; accepts by "
        "the noise variance of a step, which is what tolerance then means.",
    ),
    "parataa": Anderson(
        summary="ParaTAA (Tang et al., 2024): a fixed-point equation over several steps with triangular Anderson "
        "acceleration, no slopes; accepts by residuals against the noise of a step."
    ),
    "parasolver": Method(
        linearization=Identity(),
        acceptance=StepVariance(),
        spread=False,
        fill="evaluated",
        summary="ParaSolver as published (Lu et al., 2025): Picard iteration; new nodes hold the predicted sample of "
        "the last evaluation; accepts by the noise variance of a step.",
    ),
}
SEQUENTIAL = "The plain loop, one step after another, whatever the window: what the others are measured against."


def get_method(method: str | os.PathLike[str] | Method) -> Method:
    """The preset of that name, what a calibration file holds, or the method itself."""
    if isinstance(method, Method):
        return method
    if isinstance(method, str) and method == "sequential":
        raise ValueError("method: 'sequential' is no parallel method; use SequentialSolver, or solve_sequential")
    if isinstance(method, os.PathLike) or (isinstance(method, str) and method.endswith(".json")):
        return _calibrated(method)
    if not isinstance(method, str) or method not in METHODS:
        names = ", ".join(repr(name) for name in [*METHODS, "sequential"])
        raise ValueError(f"method: expected one of {names}, a calibration's JSON file or a Method, got {method!r}")
    return METHODS[method]


def _calibrated(file: str | os.PathLike[str]) -> Method:
    """The default method with the margins of a file that :meth:`parasolver_core.Calibration.save` wrote."""
    try:
        record = json.loads(Path(file).read_text())
        if record["kind"] != CALIBRATED:
            raise ValueError(f"its kind is {record['kind']!r}")
        return Method(acceptance=RelativeMove(Margins(**record["margins"])))
    except OSError as error:
        raise ValueError(f"method: the calibration {os.fspath(file)!r} cannot be read: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"method: {os.fspath(file)!r} is not what Calibration.save writes ({error}); calibrate again"
        ) from error
