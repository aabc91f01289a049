"""What all samples of a run share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from parasolver_core.arrays import Array, given_back, host_view
from parasolver_core.guesses.memory import Memory
from parasolver_core.rounds.acceptance import Acceptance, RoundView
from parasolver_core.rounds.linearization import Linearization
from parasolver_core.samplers.held_form import Float64, HeldForm
from parasolver_core.samplers.noise import NoiseSource
from parasolver_core.samplers.recurrence import Recurrence, StepNoise
from parasolver_core.samplers.small_data import SmallData

FillName = Literal["held", "evaluated", "copy"]


@dataclass(frozen=True)
class Shared:
    """What all samples of a run share.

    Args:
        xp: array namespace.
        dtype: of the states.
        recurrence, form: the sampler, and the same in terms of the quantity that is held.
        noise: of each step and sample.
        linearization, acceptance, fill: of the method.
        bound: (N,), of the acceptance.
        width: the most nodes evaluated in one round.
        warmup_steps: how many nodes after the first are evaluated one at a time.
        tolerance: wanted relative error.
        keep: whether to keep the final states.
        memory: of finished samples, which fills in nodes that enter; None: there is none.
    """

    xp: Any
    dtype: Any
    recurrence: Recurrence
    form: HeldForm
    noise: NoiseSource
    linearization: Linearization
    acceptance: Acceptance
    fill: FillName
    bound: Float64
    width: int
    warmup_steps: int
    tolerance: float
    keep: bool
    memory: Memory | None

    @cached_property
    def small_data(self) -> SmallData:
        """What the states' sizes tell of the sample's."""
        return SmallData(self.recurrence.signal, self.form)

    def accept(self, view: RoundView) -> tuple[Any, Any]:
        """What the acceptance says of a round."""
        told = self.acceptance.accept(view, self.tolerance)
        if not isinstance(told, (tuple, list)) or len(told) != 2:
            name = type(self.acceptance).__name__
            raise TypeError(f"acceptance: {name}.accept must return a pair (count, error), got {told!r}")
        return told[0], told[1]

    def taken(self, D: Array) -> Array:
        """The network's outputs as a run's own arithmetic reads them: in the states' dtype, as NumPy's on a CPU."""
        return host_view(self.xp.astype(D, self.dtype, copy=False))

    def given(self, array: Array) -> Array:
        """An array of a run's as one of the user's library, in the same memory."""
        return given_back(self.xp, array)

    def noise_of(self, sample: int) -> StepNoise:
        """The noise of one sample's steps, each (size,), as :func:`~parasolver_core.arrays.host_view` gives it."""

        c = self.recurrence.c.tolist()

        def noise(step: int) -> Array | None:
            return self.noise.flat(step, sample) if c[step] != 0 else None

        return noise
