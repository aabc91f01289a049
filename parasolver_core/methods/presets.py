"""Methods: the choices that make one parallel solver out of the parts, under the names users know.

``"secant"`` is the default and the best that was found; ``"identity"`` is its sliding window with Picard's slope.
``"paradigms"``, ``"parasolver"`` and ``"parataa"`` are the published methods, for comparison, with their stop rules:
see :class:`~parasolver_core.rounds.step_variance.StepVariance` and :class:`Anderson` for what ``tolerance`` then means.
Preconditioning steps are ``warmup_steps`` plus one, since the first call of ``"parasolver"`` is always alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from parasolver_core.methods.anderson import Anderson
from parasolver_core.methods.method import Method
from parasolver_core.rounds.acceptance import RelativeMove
from parasolver_core.rounds.linearization import Identity
from parasolver_core.rounds.margins import Margins
from parasolver_core.rounds.step_variance import StepVariance

CALIBRATED = "parasolver calibration 1"  # what a calibration file says it is


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
        if isinstance(getattr(method, "method", None), Method):  # a calibration
            raise ValueError(f"method: got a {type(method).__name__}; give its attribute method")
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
