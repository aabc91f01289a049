"""How many rounds a window that slides is expected to take."""

from __future__ import annotations

import math

from parasolver_core.samplers.recurrence import Recurrence

FINEST = 1e-6  # a smaller tolerance is the arithmetic's
_SLIDING, _SLIDING_NOISY = (2.6, 1.1, 1 / 3), (4.1, 0.9, 0.55)  # p, q, r of sliding_rounds; by benchmarks.planning


def sliding_rounds(recurrence: Recurrence, window: int, tolerance: float) -> float:
    """About how many rounds a sliding window takes with the default slopes and acceptance.

    ``N / window + (1 - 1 / window) (p + q log10(1 / tolerance) (N / window)^r)``: what a window costs that moves on by
    itself each round, and how many rounds nodes take to settle, of which a window of 1 needs none. Within some 20 % of
    what ``benchmarks.planning`` counts.
    """
    p, q, r = _SLIDING_NOISY if recurrence.stochastic else _SLIDING
    lengths, digits = len(recurrence) / window, math.log10(1 / min(max(tolerance, FINEST), 1.0))
    return min(lengths + (1 - 1 / window) * (p + q * digits * lengths**r), float(len(recurrence)))
