"""Samplers, windows and tolerances that are compared, and what is asked of our method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from diffusers import HeunDiscreteScheduler, UniPCMultistepScheduler

from benchmarks.problems import PROBLEMS, Problem
from parasolver_adapters.diffusers import step_rule_from_scheduler
from parasolver_core import DDIM, DDPM, DPMSolver, Euler, NoiseSchedule, StepRule
from parasolver_core.methods.presets import METHODS
from parasolver_core.rounds.acceptance import RelativeMove
from parasolver_core.rounds.margins import Margins

SCHEDULERS = {"UniPC": UniPCMultistepScheduler, "Heun": HeunDiscreteScheduler}
OURS, IDENTITY, PUBLISHED = "secant", "identity", ("paradigms", "parasolver", "parataa", "parareal")
MAX_ROWS = 256


@dataclass(frozen=True)
class Setting:
    """A sampler, its number of steps and the window; a step of Heun's method has two nodes."""

    name: str
    sampler: str
    steps: int
    window: int

    @property
    def noisy(self) -> bool:
        return self.sampler == "DDPM"


SETTINGS = {
    one.name: one
    for one in (
        Setting("DDIM-50, window 16", "DDIM", 50, 16),
        Setting("DDIM-50, window 8", "DDIM", 50, 8),
        Setting("DDIM-50, window 50", "DDIM", 50, 50),
        Setting("DDIM-100, window 5", "DDIM", 100, 5),
        Setting("2M-25, window 8", "2M", 25, 8),
        Setting("3M-25, window 8", "3M", 25, 8),
        Setting("UniPC-25, window 8", "UniPC", 25, 8),
        Setting("Heun-25, window 16", "Heun", 25, 16),
        Setting("flow Euler-50, window 16", "flow", 50, 16),
        Setting("flow Euler-28, window 8", "flow", 28, 8),
        Setting("flow Euler-28, window 28", "flow", 28, 28),
        Setting("DDIM-1000, window 32", "DDIM", 1000, 32),
        Setting("DDPM-100, window 16", "DDPM", 100, 16),
        Setting("DDPM-1000, window 100", "DDPM", 1000, 100),
    )
}
QUICK = {
    "policy": (
        "DDIM-50, window 16",
        "DDIM-50, window 50",
        "2M-25, window 8",
        "DDIM-1000, window 32",
        "DDPM-1000, window 100",
    ),
    "mixture": (
        "DDIM-50, window 16",
        "DDIM-50, window 50",
        "2M-25, window 8",
        "DDIM-1000, window 32",
        "DDPM-1000, window 100",
    ),
    "clothes": ("DDIM-50, window 16", "DDIM-50, window 50", "2M-25, window 8"),
    "emoji": ("DDIM-50, window 16",),
}
FULL = {name: tuple(SETTINGS) for name in PROBLEMS}


@dataclass(frozen=True)
class Target:
    """What is asked of our method: at most these shares of a baseline's rounds and evaluations at an error."""

    setting: str
    error: float
    rounds: float
    evaluations: float
    baseline: str = "parasolver"


TARGETS = (
    Target("DDIM-50, window 16", 1e-2, 0.75, 0.75),
    Target("DDIM-50, window 50", 1e-2, 0.70, 0.60),
    Target("2M-25, window 8", 1e-2, 0.85, 0.80, IDENTITY),
    Target("DDIM-1000, window 32", 1e-2, 0.30, 0.35),
    Target("DDPM-1000, window 100", 1e-2, 0.8, 1.1),
    Target("DDPM-1000, window 100", 5e-2, 0.65, 1.0),
)
ERRORS = (5e-2, 2e-2, 1e-2, 4e-3)


def step_rule(problem: Problem, setting: Setting, steps: int | None = None) -> tuple[StepRule, np.ndarray]:
    """The sampler on the problem's schedule, and its timesteps."""
    schedule, kind, steps = problem.schedule, problem.prediction_type, steps or setting.steps
    if setting.sampler in SCHEDULERS:
        betas = 1 - schedule.alphas_cumprod / np.append(1.0, schedule.alphas_cumprod[:-1])
        scheduler = SCHEDULERS[setting.sampler](
            trained_betas=betas.tolist(), prediction_type=kind, timestep_spacing="trailing"
        )
        rule = step_rule_from_scheduler(scheduler, steps)
        return rule, rule.timesteps
    if setting.sampler == "flow":
        path = NoiseSchedule.flow_matching()
        return Euler(path), path.timesteps(steps)
    options: dict[str, Any] = {"prediction_type": kind}
    rules: dict[str, Callable[[], StepRule]] = {
        "DDIM": lambda: DDIM(schedule, **options),
        "DDPM": lambda: DDPM(schedule, **options),
        "2M": lambda: DPMSolver(schedule, 2, **options),
        "3M": lambda: DPMSolver(schedule, 3, **options),
    }
    return rules[setting.sampler](), schedule.timesteps(steps)


def allowed(method: str, tolerance: float) -> dict[str, Any]:
    """Method and tolerance of a run. Above 1: the loosest tolerance, with margins so many times wider."""
    if tolerance < 1:
        return {"method": method, "tolerance": tolerance}
    acceptance = RelativeMove(Margins().times(tolerance))
    return {"method": replace(METHODS[method], acceptance=acceptance), "tolerance": 0.99}


def tolerances(method: str, setting: Setting) -> tuple[float, ...]:
    """From loose to tight, so that all errors reach from about 0.1 to 1e-3; for those above 1 see :func:`allowed`."""
    if method in (OURS, IDENTITY):
        return (16.0, 4.0, 0.99, 0.6, 0.3, 0.1, 0.05, 0.03, 0.01, 3e-3)
    if method == "parataa":
        return (0.99, 0.3, 0.1, 0.03, 0.01, 3e-3)
    return (0.99, 0.55, 0.3, 0.1, 0.03) if setting.noisy else (0.99, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3)


def methods_for(setting: Setting) -> tuple[str, ...]:
    """The published methods where they are defined; fewer steps where there is no noise to follow."""
    if setting.sampler == "DDIM":
        return (OURS, IDENTITY, *PUBLISHED, "few steps")
    if setting.sampler == "DDPM":
        return (OURS, IDENTITY, "paradigms", "parasolver", "parataa")
    if setting.sampler in ("Heun", "flow"):  # which start or end elsewhere than the alternatives
        return (OURS, IDENTITY, "paradigms", "parasolver")
    return (OURS, IDENTITY, "paradigms", "parasolver", "few steps")
