"""Margins for one network: how far its own errors let the tolerance be taken at its word.

The default margins suit the worst of many networks, and leave most others far within their tolerance. A few samples of
a network, sampled with wider and wider margins, tell how wide they may be for it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from parasolver_core.arrays import Array, to_host
from parasolver_core.denoiser.contract import DenoiserFn
from parasolver_core.methods.method import Method
from parasolver_core.methods.presets import CALIBRATED
from parasolver_core.rounds.acceptance import RelativeMove
from parasolver_core.rounds.margins import Margins
from parasolver_core.samplers.noise import NoiseFn, Seed
from parasolver_core.samplers.step_rules import StepRule
from parasolver_core.sampling import solve
from parasolver_core.solution import Solution
from parasolver_core.solver.progress import Meter
from parasolver_core.validation import check_count, check_start, check_tolerance

_FEWEST = 8  # samples: fewer say too little of the others
_FINER = 30.0  # the samples that errors are measured against have a tolerance so many times smaller
_WITHIN = 0.5  # of the tolerance, all samples: there is to be room for those that were not tried
_FLIPPED = 2.0  # an error of so many tolerances is a sample at another mode of the data
_WIDEST = 16.0  # wider margins than so many times the default's are not tried
_MOST_RUNS = 7  # the one for the truth, all doublings and one between


@dataclass(frozen=True)
class Trial:
    """One way of sampling that was tried.

    Args:
        gain: the margins, in units of the default's.
        errors: relative distance of each sample to a far more accurate one.
        rounds, evaluations: mean of the samples.
    """

    gain: float
    errors: tuple[float, ...]
    rounds: float
    evaluations: float

    @property
    def worst(self) -> float:
        """The largest error; NaN if there is one."""
        return float(np.max(self.errors))

    def within(self, tolerance: float) -> bool:
        """Whether all samples are so near that others may be expected to be within the tolerance."""
        return self.worst <= _WITHIN * tolerance  # NaN is not

    def flipped(self, tolerance: float) -> bool:
        """Whether a sample has gone to another mode of the data."""
        return not self.worst <= _FLIPPED * tolerance


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate` found; ``method`` samples with it, and :meth:`save` keeps it.

    Args:
        method: with the margins that were found.
        gain: how many times the default's they are, at least 1.
        tolerance, window, steps: of the runs.
        trials: all that was tried, the first with the default margins.
    """

    method: Method
    gain: float
    tolerance: float
    window: int
    steps: int
    trials: tuple[Trial, ...]

    @property
    def before(self) -> Trial:
        """With the default margins."""
        return self.trials[0]

    @property
    def after(self) -> Trial:
        """With the margins that were found."""
        return next(trial for trial in self.trials if trial.gain == self.gain)

    @property
    def message(self) -> str:
        """One sentence on what it saves."""
        found, default, count = self.after, self.before, len(self.before.errors)
        worst = default.worst / self.tolerance
        if self.gain == 1:
            return (
                f"The default margins stay: with them the worst of {count} samples is off by {worst:.2g} times the "
                f"tolerance of {self.tolerance:g}, and wider ones saved nothing safely ({default.rounds:.1f} rounds)."
            )
        return (
            f"Margins {self.gain:.3g} times as wide take {found.rounds:.1f} rounds instead of {default.rounds:.1f} and "
            f"{found.evaluations:.0f} evaluations instead of {default.evaluations:.0f}; the worst of {count} samples "
            f"is off by {found.worst / self.tolerance:.2g} times the tolerance of {self.tolerance:g} instead of "
            f"{worst:.2g}."
        )

    def save(self, file: str | os.PathLike[str]) -> None:
        """As JSON, which ``method=`` of :func:`~parasolver_core.sampling.solve` takes by its name."""
        assert isinstance(self.method.acceptance, RelativeMove)
        record = {
            "kind": CALIBRATED,
            "margins": asdict(self.method.acceptance.margins),
            "gain": self.gain,
            "tolerance": self.tolerance,
            "window": self.window,
            "steps": self.steps,
            "message": self.message,
            "trials": [asdict(trial) for trial in self.trials],
        }
        Path(file).write_text(json.dumps(record, indent=2) + "\n")


def calibrate(
    denoiser: DenoiserFn,
    x_T: Array,
    timesteps: ArrayLike,
    step_rule: StepRule,
    window: int = 5,
    *,
    tolerance: float = 1e-2,
    seed: Seed | None = None,
    noise: Array | NoiseFn | None = None,
    max_rows: int | None = None,
    buckets: Sequence[int] = (),
    state_device: Any = None,
    warmup_steps: int = 0,
    progress: bool = False,
) -> Calibration:
    """Find the widest margins with which a network's samples keep within half of the tolerance.

    Doubles the margins of the default method until a sample is off by more than half of the tolerance, and tries once
    between the last two. Where a sample has then gone to another mode of the data, the margins found are halved again:
    there may be other samples that flip sooner. Of what is safe the fewest rounds count; never less than the default
    margins. The samples are compared with those of a run with a tolerance thirty times tighter, so that no sequential
    run is needed; all in all it takes about as long as four to eight runs.

    Args:
        denoiser, timesteps, step_rule, window, tolerance: of the runs to come; ``tolerance`` above 0. What is found is
            meant for these, and for smaller tolerances.
        x_T: where to start, as in :func:`~parasolver_core.sampling.solve`: at least 8 typical samples; 16 are better.
        seed, noise, max_rows, buckets, state_device, warmup_steps: as in :func:`~parasolver_core.sampling.solve`.
        progress: show a bar (needs tqdm).

    Returns:
        A :class:`Calibration`, whose ``method`` is for ``solve(..., method=...)``.

    Raises:
        ValueError: fewer than 8 samples, or a tolerance of 0.
        SolverError: as :func:`~parasolver_core.sampling.solve`.
    """
    _check(x_T, window, tolerance)
    options: dict[str, Any] = {
        "seed": seed,
        "noise": noise,
        "max_rows": max_rows,
        "buckets": buckets,
        "state_device": state_device,
        "warmup_steps": warmup_steps,
    }

    def sample(gain: float, within: float) -> Solution:
        return solve(denoiser, x_T, timesteps, step_rule, window, tolerance=within, method=_wider(gain), **options)

    trials: list[Trial] = []
    with Meter(progress, _MOST_RUNS, "run") as show:
        truth = sample(1.0, tolerance / _FINER).sample

        def attempt(gain: float) -> Trial:
            found = sample(gain, tolerance)
            trials.append(_trial(gain, found, truth))
            show(len(trials) + 1, found.stats.rounds)
            return trials[-1]

        gain = _widest(attempt, tolerance)
    best = min((trial for trial in trials if trial.gain <= gain), key=lambda trial: (trial.rounds, trial.gain))
    steps = len(np.asarray(timesteps))
    return Calibration(_wider(best.gain), best.gain, float(tolerance), int(window), steps, tuple(trials))


def _check(x_T: Array, window: int, tolerance: float) -> None:
    check_start(x_T)
    check_count("window", window, minimum=2)
    check_tolerance(tolerance)
    if not tolerance > 0:
        raise ValueError("tolerance: expected a number above 0; with 0 every node is evaluated at its final input")
    if x_T.shape[0] < _FEWEST:
        raise ValueError(f"x_T: expected at least {_FEWEST} samples to learn from, got {x_T.shape[0]}")


def _wider(gain: float) -> Method:
    """The default method with its margins so many times as wide."""
    return Method(acceptance=RelativeMove(Margins().times(gain)))


def _widest(attempt: Callable[[float], Trial], tolerance: float) -> float:
    """The widest margins with which all samples are safe; never below 1."""
    gain, failed = 1.0, attempt(1.0)
    while failed.within(tolerance) and failed.gain < _WIDEST:
        gain, failed = failed.gain, attempt(2 * failed.gain)
    if failed.within(tolerance):
        return failed.gain
    if failed.gain == 1.0:
        return 1.0
    if failed.flipped(tolerance):  # others may flip sooner
        return max(gain / 2, 1.0)
    between = attempt(math.sqrt(gain * failed.gain))
    return between.gain if between.within(tolerance) else gain


def _trial(gain: float, found: Solution, truth: Array) -> Trial:
    """What a run cost, and how far its samples are from the truth."""
    count = truth.shape[0]
    rows, exact = (to_host(samples).astype(np.float64).reshape(count, -1) for samples in (found.sample, truth))
    errors = np.linalg.norm(rows - exact, axis=1) / np.linalg.norm(exact, axis=1)
    taken = [len(record.nodes) for part in found.stats.history for record in part.samples]
    return Trial(gain, tuple(errors.tolist()), len(taken) / count, sum(taken) / count)
