"""What all samples of a run share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from parasolver_core.rounds.acceptance import Acceptance
from parasolver_core.rounds.linearization import Linearization
from parasolver_core.rounds.memory import Memory
from parasolver_core.samplers.held_form import Float64, HeldForm
from parasolver_core.samplers.noise import NoiseSource
from parasolver_core.samplers.recurrence import Recurrence

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
        memory: of finished samples, which fills in nodes that enter; None: there is none.
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
    memory: Memory | None
