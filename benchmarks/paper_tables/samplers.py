"""The samplers and the methods that the tables compare."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sampler:
    """A scheduler and how many steps it takes; ``window`` is about the evaluations per round that the paper reports."""

    name: str
    scheduler: str
    steps: int
    window: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def noisy(self) -> bool:
        return self.scheduler == "DDPMScheduler"


# The paper's DPM-Solver is that of order 1, where DPM-Solver++ is the same.
_DPM = {"solver_order": 1, "final_sigmas_type": "sigma_min"}
SAMPLERS = {
    one.name: one
    for one in (
        Sampler("DDPM-1000", "DDPMScheduler", 1000, 32),
        Sampler("DDIM-50", "DDIMScheduler", 50, 8),
        Sampler("DDIM-25", "DDIMScheduler", 25, 8),
        Sampler("DPMSolver-50", "DPMSolverMultistepScheduler", 50, 8, _DPM),
        Sampler("DPMSolver-25", "DPMSolverMultistepScheduler", 25, 8, _DPM),
    )
}
METHODS = {
    "sequential": "sequential",
    "paradigms": "ParaDiGMS",
    "parasolver": "ParaSolver",
    "halves": "ParaSolver, N / 2 subintervals",
    "fifths": "ParaSolver, N / 5 subintervals",
    "loose": "ours, tolerance 5 %",
    "default": "ours, tolerance 1 %",
}
OURS = {"loose": 5e-2, "default": 1e-2}
GROUPED = {"halves": 2, "fifths": 5}  # the most steps of a subinterval


def options(sampler: Sampler, method: str, table: str) -> dict[str, Any]:
    """The arguments of ``parallel_sampling``; the tolerances of the published methods are those of their own code."""
    if method == "sequential":
        return {"method": "sequential"}
    if method in OURS:
        return {"tolerance": OURS[method]}
    if method in GROUPED:
        subintervals = math.ceil(sampler.steps / GROUPED[method])
        return {**options(sampler, "parasolver", table), "subintervals": subintervals}
    if sampler.noisy:
        published = {"paradigms": 0.5, "parasolver": 0.55}[method]
    elif table == "SD-v2":
        published = {"paradigms": 1e-2, "parasolver": 5e-2}[method]
    else:
        published = {"paradigms": 1e-3, "parasolver": 5e-3}[method]
    # of the preconditioning steps (5 with noise, else 1) the first is the first round itself
    return {"method": method, "tolerance": published, "warmup_steps": 4 * (method == "parasolver" and sampler.noisy)}
