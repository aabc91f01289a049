"""The stop rule of published methods: a move beside the noise of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from parasolver_core.rounds.acceptance import Acceptance, Float64, RoundView
from parasolver_core.samplers.recurrence import Recurrence


@dataclass(frozen=True)
class StepVariance(Acceptance):
    """Accept the leading nodes whose input moved little beside the noise that a DDPM step adds there: a published rule.

    A move d, RMS over the state's elements, is small if ``d^2 <= tolerance^2 v`` with the variance
    ``v = (1 - abar') / (1 - abar) (1 - abar / abar')`` of the step from ``abar`` to ``abar'``, also for samplers that
    add no noise. The tolerance is then not a distance to the sequential sample: 0.1 is usual, up to 0.5 with noise.
    Made for variance-preserving schedules, whose states have RMS 1.

    Args:
        end: the noise variance ``1 - abar'`` at which the last step is taken to end, about the first beta of the
            schedule that the network was trained on. With 0 the last node is final only when its input is.

    Reference: Shih et al., "Parallel Sampling of Diffusion Models", NeurIPS 2023, algorithm 1; ParaSolver, ICLR 2025.
    """

    end: float = 1e-4
    many: ClassVar[bool] = True

    def bounds(self, recurrence: Recurrence) -> Float64:
        if recurrence.signal is None:
            raise ValueError(
                "method: its stop rule weighs a move by the variance of a diffusion step, and this step rule has no "
                "noise levels; use method='identity' or 'secant'"
            )
        now = recurrence.signal**2
        after = np.maximum(np.append(now[1:], 1 - self.end), now)
        return np.sqrt((1 - after) / np.maximum(1 - now, np.finfo(float).tiny) * (1 - now / after))

    def accept(self, view: RoundView, tolerance: float) -> tuple[int, float]:
        still = np.where(view.move <= view.rounding, 0.0, np.inf)  # a step without noise allows no move at all
        return view.leading(np.divide(view.move * view.size, view.bound, out=still, where=view.bound > 0), tolerance)
