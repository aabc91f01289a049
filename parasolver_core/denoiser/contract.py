"""What a network is to the solver: one prediction for each row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from parasolver_core.arrays import Array
from parasolver_core.samplers.recurrence import Recurrence
from parasolver_core.samplers.step_rules import StepRule


class DenoiserFn(Protocol):
    """``denoiser(x, t) -> prediction``, the network in the form in which the solver calls it.

    ``x`` is ``(rows, *event)``, where the rows are the time steps and samples of one round in any number: sample by
    sample, and of each sample as many as it has nodes in the round, which need not be the same number for all.
    ``t`` is (rows,), each row's own timestep, integers or floats as the timesteps were given. The prediction has the
    shape, dtype and device of ``x``. Each row must depend on that row alone, and the same row must always give the
    same prediction (evaluation mode, no dropout).

    A denoiser whose attribute ``takes_rows`` is ``True`` is called ``denoiser(x, t, rows)`` with :class:`Rows`, which
    tell the samples of the batch apart: each may have its own class label or prompt. One with the attribute
    ``prediction_type`` is refused where the step rule reads another.
    """

    def __call__(self, x: Array, t: Array, /) -> Array: ...


@dataclass(frozen=True)
class Rows:
    """Which step of which sample each row of a call is.

    Args:
        steps: (rows,), on the host: indices into the recurrence's timesteps.
        samples: (rows,), on the host: places in the batch.
        recurrence: the sampler.
        noise: ``noise(step, sample)``, ``(*event)``, the standard normal ``z`` that the step adds to the sample.
        batch: how many samples the run has, whether or not they are in this call.
    """

    steps: NDArray[np.int64]
    samples: NDArray[np.int64]
    recurrence: Recurrence
    noise: Callable[[int, int], Array]
    batch: int

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, part: slice | NDArray[np.int64]) -> Rows:
        return replace(self, steps=self.steps[part], samples=self.samples[part])


def takes_rows(denoiser: Any) -> bool:
    """Whether a denoiser is called ``denoiser(x, t, rows)``; those that wrap another pass it on."""
    return getattr(denoiser, "takes_rows", False) is True


def predicted_by(denoiser: Any) -> str | None:
    """What a denoiser says that it predicts, by its attribute ``prediction_type``; those that wrap one pass it on."""
    told = getattr(denoiser, "prediction_type", None)
    return told if isinstance(told, str) else None


def check_agreement(denoiser: Any, step_rule: StepRule) -> None:
    """Refuse a denoiser that predicts something else than the step rule reads, where both say what."""
    given, read = predicted_by(denoiser), step_rule.predicts
    if given is not None and read is not None and given != read:
        raise ValueError(
            f"step_rule: it reads the network's output as {read!r}, and the denoiser predicts {given!r}; give the rule "
            f"prediction_type={given!r}, or make it from denoiser.schedule where there is one"
        )


class SharedDenoiser(ABC):
    """A denoiser whose rows several processes share, each of which runs the same solver on the same arguments."""

    @abstractmethod
    def __call__(self, x: Array, t: Array, rows: Rows | None = None, /) -> Array:
        """The prediction for all rows, the same in every process."""

    @property
    @abstractmethod
    def devices(self) -> int:
        """How many processes share the rows."""

    @property
    @abstractmethod
    def max_rows(self) -> int | None:
        """The most rows that this process evaluates in one call, if memory ran out in a larger one; else None."""

    @abstractmethod
    def begin(self, plan: Mapping[str, str]) -> None:
        """Called before the first round with what every process must have been given alike; raises if it was not."""

    @abstractmethod
    def agree(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over the processes, so that all of them decide alike."""

    def end(self, error: BaseException | None = None) -> None:  # noqa: B027
        """Called after the last round, or with the exception that ended the run here: other processes are told.

        Raises if another process has left the run, unless this one leaves it too.
        """


class Telling:
    """Within its ``with`` block, an exception that ends the run is told to the processes that share the rows.

    No generator: that would set attributes of the exception, which it may refuse.
    """

    def __init__(self, denoiser: Any) -> None:
        self._denoiser = denoiser

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and isinstance(self._denoiser, SharedDenoiser):
            self._denoiser.end(error)
