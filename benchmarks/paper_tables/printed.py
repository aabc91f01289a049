"""The two tables as the paper prints them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Printed:
    """A row of the paper's tables."""

    rounds: int
    evaluations: int
    clip: float | None
    fid: float
    seconds: float
    speedup: float

    def __str__(self) -> str:
        quality = f", FID {self.fid}" + (f", CLIP {self.clip}" if self.clip else "")
        return f"{self.rounds} / {self.evaluations}, {self.seconds:g} s, {self.speedup}x{quality}"


PRINTED: dict[str, dict[tuple[str, str], Printed]] = {
    "SD-v2": {
        ("DDPM-1000", "sequential"): Printed(1000, 1000, 25.6, 55.9, 128.0, 1.0),
        ("DDPM-1000", "paradigms"): Printed(65, 2024, 25.6, 55.6, 32.8, 3.9),
        ("DDPM-1000", "parasolver"): Printed(32, 1065, 25.6, 55.3, 15.9, 8.1),
        ("DDIM-50", "sequential"): Printed(50, 50, 25.6, 57.2, 6.3, 1.0),
        ("DDIM-50", "paradigms"): Printed(21, 132, 25.6, 56.9, 3.3, 1.9),
        ("DDIM-50", "parasolver"): Printed(13, 83, 25.6, 56.9, 1.9, 3.3),
        ("DDIM-25", "sequential"): Printed(25, 25, 25.4, 62.9, 3.4, 1.0),
        ("DDIM-25", "paradigms"): Printed(18, 53, 25.4, 62.8, 2.9, 1.2),
        ("DDIM-25", "parasolver"): Printed(11, 49, 25.4, 61.9, 1.2, 2.8),
        ("DPMSolver-50", "sequential"): Printed(50, 50, 25.6, 57.2, 6.3, 1.0),
        ("DPMSolver-50", "paradigms"): Printed(25, 132, 25.6, 57.2, 3.3, 1.8),
        ("DPMSolver-50", "parasolver"): Printed(15, 96, 25.6, 57.1, 2.2, 3.1),
        ("DPMSolver-25", "sequential"): Printed(25, 25, 25.4, 62.3, 3.2, 1.0),
        ("DPMSolver-25", "paradigms"): Printed(15, 81, 25.4, 62.3, 2.2, 1.5),
        ("DPMSolver-25", "parasolver"): Printed(11, 58, 25.4, 62.1, 1.5, 2.1),
    },
    "LSUN Church": {
        ("DDPM-1000", "sequential"): Printed(1000, 1000, None, 12.7, 50.0, 1.0),
        ("DDPM-1000", "paradigms"): Printed(65, 2082, None, 12.7, 10.8, 4.6),
        ("DDPM-1000", "parasolver"): Printed(42, 1079, None, 12.7, 4.1, 12.1),
        ("DDIM-50", "sequential"): Printed(50, 50, None, 15.5, 1.8, 1.0),
        ("DDIM-50", "paradigms"): Printed(23, 202, None, 15.8, 1.5, 1.2),
        ("DDIM-50", "parasolver"): Printed(14, 73, None, 15.7, 0.8, 2.2),
        ("DDIM-25", "sequential"): Printed(25, 25, None, 15.6, 1.1, 1.0),
        ("DDIM-25", "paradigms"): Printed(15, 96, None, 15.7, 0.8, 1.4),
        ("DDIM-25", "parasolver"): Printed(10, 44, None, 15.7, 0.5, 2.2),
    },
}
"""Rounds, NFE, CLIP score, FID, seconds and speed-up as printed, on the authors' GPUs."""
