"""The margins of the error estimates: tuned numbers, and where they come from."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True)
class Margins:
    """How far the estimates may be trusted, in units of the tolerance.

    Chosen on four networks (two perceptrons trained on digits, random features fitted to patches of photographs, the
    exact mixture of such patches) so that with DDIM-50, DPM-Solver++(2M)-25 and DDPM-100, windows of 8, 16 and all
    steps, and tolerances of 5 and 1 %, 95 % of samples keep within the tolerance, but for those that a small error
    takes to another mode of the data. Checked on networks that had no part in it: ``docs/benchmarks.md``.

    Args:
        factor, noisy_factor: of the largest accepted move times the root of its influence, without and with noise.
        loosest: the tolerance from about which on they fall with its root: where much is still open, a small
            error may decide it.
        spread, noisy_spread: of the estimated error of spread nodes, without and with noise.
    """

    factor: float = 0.29
    noisy_factor: float = 0.22
    loosest: float = 0.02
    spread: float = 1.3
    noisy_spread: float = 0.4

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")

    def times(self, gain: float) -> Margins:
        """All of them larger by that factor: what calibration finds for one network."""
        grown = {name: gain * getattr(self, name) for name in ("factor", "noisy_factor", "spread", "noisy_spread")}
        return replace(self, **grown)
