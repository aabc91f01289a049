"""What all samples of a run share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from parasolver_core.arrays import Array
from parasolver_core.rounds.acceptance import Acceptance
from parasolver_core.rounds.linearization import Linearization
from parasolver_core.samplers.held_form import Float64, HeldForm
from parasolver_core.samplers.noise import NoiseSource
from parasolver_core.samplers.recurrence import Recurrence, StepNoise

FillName = Literal["held", "evaluated", "copy"]


@dataclass(frozen=True)
class Shared:
    """What all samples of a run share.

    Args:
        xp: array namespace.
        recurrence, form: the sampler, and the same in terms of the quantity that is held.
        noise: of each step and sample.
        linearization, acceptance, fill: of the method.
        bound: (N,), of the acceptance.
        width: the most nodes evaluated in one round.
        warmup_steps: how many nodes after the first are evaluated one at a time.
        tolerance: wanted relative error.
        keep: whether to keep the final states.
    """

    xp: Any
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

    def noise_of(self, sample: int) -> StepNoise:
        """The noise of one sample's steps, each (size,), as :func:`~parasolver_core.arrays.host_view` gives it."""

        def noise(step: int) -> Array | None:
            return self.noise.flat(step, sample) if self.recurrence.c[step] != 0 else None

        return noise
