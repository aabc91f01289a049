"""Does a network fit? What parallel sampling asks of a denoiser, tried on a few rows."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np
from numpy.typing import ArrayLike, NDArray

from parasolver_core.arrays import Array, no_grad, to_host, working_dtype
from parasolver_core.denoiser.alone import distance
from parasolver_core.denoiser.contract import DenoiserFn
from parasolver_core.denoiser.evaluator import Evaluator
from parasolver_core.samplers.noise import NoiseSource
from parasolver_core.samplers.recurrence import Recurrence
from parasolver_core.samplers.step_rules import StepRule, table
from parasolver_core.validation import check_start, check_timesteps

_STEPS, _SAMPLES = 4, 2  # rows tried: the first, the last and two steps in between, of two samples
_BETWEEN = 12  # further steps, of one sample: a network may take another way at some of them only


@dataclass(frozen=True)
class DenoiserReport:
    """What :func:`check_denoiser` found.

    Args:
        problems: one sentence each: what is wrong, and what to do. Empty for a denoiser that fits.
        batching_error: the largest difference between a row evaluated in a batch and alone, RMS over RMS of the row;
            solutions with ``tolerance=0`` equal the sequential ones up to this, as the sampler amplifies it. NaN if it
            could not be measured.
        repeat_error: the same between two equal calls; 0 for a network that repeats itself to the last bit.
        rows: how many rows were tried.
    """

    problems: tuple[str, ...]
    batching_error: float
    repeat_error: float
    rows: int

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def __str__(self) -> str:
        errors = f"batching error {self.batching_error:.1e}, repeat error {self.repeat_error:.1e}, {self.rows} rows"
        if self.ok:
            return f"The denoiser fits parallel sampling ({errors})."
        return "\n".join(
            [f"The denoiser does not fit parallel sampling ({errors}):", *map("- {}".format, self.problems)]
        )


def check_denoiser(
    denoiser: DenoiserFn, x_T: Array, timesteps: ArrayLike, *, step_rule: StepRule | None = None
) -> DenoiserReport:
    """Try a denoiser on a few rows and say what is wrong with it.

    Tried are: shape, dtype, device and array library of the prediction; any number of rows; finite values; equal calls
    giving equal predictions (no dropout, no random numbers); each row depending on itself alone (no normalisation over
    the batch, no conditions tiled over the rows); and rows of different timesteps together giving what each gives
    alone, at steps between as well, where a network may take another way. What it does only at steps that are not
    tried, or only away from ``x_T``, is not seen.

    Args:
        denoiser: ``denoiser(x, t) -> prediction``, as :func:`~parasolver_core.sampling.solve` takes it.
        x_T: where sampling would start, ``(batch, *event)``; up to two of its samples are used.
        timesteps: (N,), of which up to four are used for all tests, and up to twelve between them for the last.

    Other arguments:
        step_rule: the sampler, for a denoiser that reads it (see :class:`~parasolver_core.denoiser.contract.Rows`).

    Returns:
        A :class:`DenoiserReport`; print it, or look at ``ok`` and ``problems``.

    Raises:
        ValueError, TypeError: ``x_T``, ``timesteps`` or ``step_rule`` is not as described.

    Example::

        report = check_denoiser(denoiser, x_T, schedule.timesteps(50))
        assert report.ok, report
    """
    check_start(x_T)
    xp = array_api_compat.array_namespace(x_T)
    recurrence = _no_sampler(check_timesteps(timesteps)) if step_rule is None else table(step_rule, timesteps)
    with no_grad(xp), np.errstate(all="ignore"):
        trial = _Trial(xp, denoiser, x_T, recurrence)
        return trial.report()


class _Trial:
    """The rows tried, and what the denoiser said to them."""

    def __init__(self, xp: Any, denoiser: DenoiserFn, x_T: Array, recurrence: Recurrence) -> None:
        noise = NoiseSource(x_T, working_dtype(xp, x_T.dtype), len(recurrence), 0, None)
        self._xp, self._x_T = xp, x_T
        self._evaluate = Evaluator(denoiser, x_T, recurrence, noise, None)
        self._timesteps = recurrence.timesteps
        steps = np.unique(np.linspace(0, len(recurrence) - 1, _STEPS).round().astype(np.int64))
        samples = np.arange(min(_SAMPLES, x_T.shape[0]))
        between = np.linspace(0, len(recurrence) - 1, _BETWEEN + 2).round().astype(np.int64)
        self._main = len(steps) * len(samples)
        between = np.setdiff1d(between, steps)
        self._steps = np.concatenate([np.tile(steps, len(samples)), between])
        self._samples = np.concatenate([np.repeat(samples, len(steps)), np.full(len(between), samples[-1])])
        self._limit = float(np.sqrt(float(xp.finfo(x_T.dtype).eps)))

    def report(self) -> DenoiserReport:
        everything, rows = np.arange(self._main), np.arange(len(self._steps))
        try:
            alone = np.concatenate([self._predict(rows[i : i + 1]) for i in rows])
        except Exception as error:
            return self._broken(f"It fails for a single row: {_describe(error)}{self._hint_of_pairs()}")
        try:
            together, again = self._predict(everything), self._predict(everything)
            between = self._predict(rows[self._main :]) if len(rows) > self._main else alone[self._main :]
        except Exception as error:
            return self._broken(
                f"It works for one row and fails for {len(everything)}: {_describe(error)}. A round evaluates any "
                "number of rows; conditions must be repeated to x.shape[0] rows, not to a fixed batch"
            )
        alone, between = alone[: self._main], (alone[self._main :], between)
        found = (self._not_finite(predictions) for predictions in (alone, together, again))
        problems = tuple(itertools.chain.from_iterable(found))[:1]
        if problems:
            return DenoiserReport(problems, float("nan"), float("nan"), len(rows))
        batching, repeat = distance(together, alone), distance(again, together)
        if not repeat <= self._limit:
            problems = (
                f"Two equal calls differ by {repeat:.1e} of their size: it draws random numbers or changes with each "
                "call. Call .eval() on the network, which switches dropout off, and draw nothing inside",
            )
        elif not batching <= self._limit:
            problems = (self._why_batches_differ(alone, batching),)
        else:
            finite = np.isfinite(between[0]).all(axis=1)  # a network need not like x_T at every step
            further = distance(between[1][finite], between[0][finite]) if finite.any() else 0.0
            batching = max(batching, further)
            if not further <= self._limit:
                problems = (self._one_timestep(further),)
        return DenoiserReport(problems, batching, repeat, len(rows))

    def _hint_of_pairs(self) -> str:
        """What to do, if it works for the samples of one timestep, as a plain loop over timesteps calls it."""
        try:
            self._predict(np.flatnonzero(self._steps[: self._main] == self._steps[0]))
        except Exception:
            return ""
        return (
            f". It works for {len(set(self._samples))} rows, but a round evaluates any number of them; repeat "
            "conditions to x.shape[0] rows, and call .eval() on the network (for batch normalisation)"
        )

    def _predict(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Predictions for some of the rows, (len(rows), size), on the host."""
        index = self._xp.asarray(self._samples[rows], device=array_api_compat.device(self._x_T))
        x = self._xp.take(self._x_T, index, axis=0)
        prediction = self._evaluate(x, self._steps[rows], self._samples[rows])
        flat = self._xp.reshape(prediction, (len(rows), -1))
        wide = self._xp.astype(flat, working_dtype(self._xp, flat.dtype))  # NumPy has no bfloat16
        return np.array(to_host(wide), dtype=np.float64)

    def _not_finite(self, predictions: NDArray[np.float64]) -> tuple[str, ...]:
        bad = ~np.isfinite(predictions).all(axis=1)
        if not bad.any():
            return ()
        row = int(np.argmax(bad))
        timestep = self._timesteps[self._steps[row]]
        return (
            f"It gives NaN or infinity for sample {self._samples[row]} at timestep {timestep}. "
            "Check the network there, for example in float32 instead of half precision",
        )

    def _why_batches_differ(self, alone: NDArray[np.float64], batching: float) -> str:
        """Copies of one row, and rows of one timestep, tell the usual causes apart."""
        differ = f"differ from the same rows alone by up to {batching:.1e} of their size"
        copies = np.zeros(self._main, dtype=np.int64)
        if not distance(self._predict(copies), alone[copies]) <= self._limit:
            return f"Copies of one row in a batch {differ}: the network depends on the number of rows"
        same_step = np.flatnonzero(self._steps[: self._main] == self._steps[0])
        if len(same_step) > 1 and not distance(self._predict(same_step), alone[same_step]) <= self._limit:
            return (
                f"Rows in a batch {differ}: the network mixes its rows. Call .eval() (batch normalisation in training "
                "mode does this), and take no mean, norm or attention over the first axis"
            )
        return self._one_timestep(batching)

    @staticmethod
    def _one_timestep(batching: float) -> str:
        return (
            f"Rows of different timesteps in one batch differ from the same rows alone by up to {batching:.1e} of "
            "their size: the network mixes its rows, or takes one timestep for all of them, such as t[0]. Use each "
            "row's own t, shaped (rows, 1, ...), and call .eval()"
        )

    def _broken(self, problem: str) -> DenoiserReport:
        return DenoiserReport((problem,), float("nan"), float("nan"), len(self._steps))


def _no_sampler(timesteps: NDArray[Any]) -> Recurrence:
    """A table that goes nowhere, for a denoiser that is only called."""
    n = len(timesteps)
    ones = np.ones((n, 1))
    nothing = np.zeros(n)
    return Recurrence(timesteps, ones, ones, nothing, np.ones((n, 2)), nothing, nothing)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
