"""Everything that is compared, one sample at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler
from rich.progress import track
from torch import Tensor

from benchmarks.alternatives.caches import (
    CachedDiT,
    GuidedLoop,
    Work,
    cached,
    configurations,
    load_dit,
    magnitude_ratios,
)
from benchmarks.alternatives.results import OURS, SEQUENTIAL, Calls, Run
from benchmarks.frechet import extract_features, load_feature_extractor
from benchmarks.train_dit import CLASSES
from parasolver_adapters.diffusers import step_rule_from_scheduler
from parasolver_adapters.embedded import SCHEDULE
from parasolver_adapters.wrapping import ModelDenoiser
from parasolver_core import DDIM, DPMSolver, StepRule, solve, solve_sequential

GUIDANCE = 3.0
STEPS = 50
TOLERANCES = {8: (0.1, 0.03, 0.01, 3e-3, 1e-3), 4: (0.1, 0.01, 1e-3), 16: (0.1, 0.01, 1e-3)}  # by window
FEWER = (5, 8, 12, 20)
PARTS = ((0.0, 0.8), (0.0, 0.6), (0.2, 0.8))  # of the steps, that guidance is kept in
CALIBRATION_SEED = 10**6  # far from every sample's

Choice = tuple[str, str, Callable[[], tuple[Tensor, Calls]]]


class Sample:
    """One picture by its number, which is its seed and gives its class; all that can be run for it."""

    def __init__(self, network: CachedDiT, work: Work, number: int, steps: int = STEPS) -> None:
        self.network, self.work, self.steps = network, work, steps
        self.labels = torch.tensor([number % CLASSES])
        self.x_T = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(number))
        self.ddim = DDIM(SCHEDULE, prediction_type="v_prediction")

    def loop(
        self, rule: StepRule, timesteps: Any, guided: range | None = None, config: Any = None
    ) -> tuple[Tensor, Calls]:
        """A plain loop, with a cache or guidance in a part of its steps."""
        steps = len(timesteps)
        denoiser = GuidedLoop(self.network, self.work, self.labels, GUIDANCE, steps, guided)
        if config is None:
            found = solve_sequential(denoiser, self.x_T, timesteps, rule, check=False)
        else:
            with cached(self.network, config):
                found = solve_sequential(denoiser, self.x_T, timesteps, rule, check=False)
        return found.sample, denoiser.calls

    def sequential(self, **options: Any) -> tuple[Tensor, Calls]:
        """The sampler that all others are held against."""
        return self.loop(self.ddim, SCHEDULE.timesteps(self.steps), **options)

    def fewer(self, sampler: str, steps: int) -> tuple[Tensor, Calls]:
        """Fewer steps of the same sampler, or of a better one."""
        if sampler == "UniPC":
            betas = 1 - SCHEDULE.alphas_cumprod / np.append(1.0, SCHEDULE.alphas_cumprod[:-1])
            scheduler = UniPCMultistepScheduler(
                trained_betas=betas.tolist(), prediction_type="v_prediction", timestep_spacing="trailing"
            )
            rule = step_rule_from_scheduler(scheduler, steps)
            return self.loop(rule, rule.timesteps)
        second_order = DPMSolver(SCHEDULE, 2, prediction_type="v_prediction")
        return self.loop(self.ddim if sampler == "DDIM" else second_order, SCHEDULE.timesteps(steps))

    def ours(self, window: int, tolerance: float) -> tuple[Tensor, Calls]:
        """The same sampler in parallel."""
        denoiser = ModelDenoiser(
            self.network,
            SCHEDULE,
            "v_prediction",
            conditions={"class_labels": self.labels},
            null_conditions={"class_labels": torch.tensor([CLASSES])},
            guidance_scale=GUIDANCE,
        )
        timesteps = SCHEDULE.timesteps(self.steps)
        found = solve(denoiser, self.x_T, timesteps, self.ddim, window, tolerance=tolerance, check=False)
        return found.sample, [(2 * record.evaluations, 1.0) for record in found.stats.history]

    def choices(self, ratios: list[float]) -> Iterator[Choice]:
        """Method, setting, and what runs it."""
        for method, setting, config in configurations(ratios):
            yield method, setting, partial(self.sequential, config=config)
        for sampler in ("DDIM", "2M", "UniPC"):
            for steps in (one for one in FEWER if one < self.steps):
                yield sampler, f"{steps} steps", partial(self.fewer, sampler, steps)
        for first, end in PARTS:
            guided = range(round(first * self.steps), round(end * self.steps))
            part = f"{first:.0%} to {end:.0%} of the steps"
            yield "part guidance", part, partial(self.sequential, guided=guided)
        for window, tolerances in TOLERANCES.items():
            for tolerance in tolerances:
                setting = f"window {window}, {tolerance:.1%}"
                yield OURS, setting, partial(self.ours, window, tolerance)


class Bench:
    """The network, the classifier that judges its pictures, and the folder of the results."""

    def __init__(self, folder: Path, steps: int = STEPS) -> None:
        self.folder, self.steps = folder, steps
        self.network = load_dit()
        self.work = Work(self.network)
        self.classifier = load_feature_extractor()

    def sample(self, number: int) -> Sample:
        return Sample(self.network, self.work, number, self.steps)

    @cached_property
    def ratios(self) -> list[float]:
        """MagCache's calibration, on a sample that is not among the others."""
        return magnitude_ratios(self.network, self.sample(CALIBRATION_SEED).sequential, self.steps)

    def run(self, number: int) -> list[Run]:
        """All methods on one sample."""
        sample = self.sample(number)
        started = time.perf_counter()
        truth, calls = sample.sequential()
        runs = [self._judged(SEQUENTIAL, "", truth, truth, calls, time.perf_counter() - started, number)]
        for method, setting, make in sample.choices(self.ratios):
            started = time.perf_counter()
            found, calls = make()
            seconds = time.perf_counter() - started
            runs.append(self._judged(method, setting, found, truth, calls, seconds, number))
        return runs

    def _judged(
        self,
        method: str,
        setting: str,
        found: Tensor,
        truth: Tensor,
        calls: Calls,
        seconds: float,
        number: int,
    ) -> Run:
        error = float((found - truth).double().norm() / truth.double().norm())
        features = extract_features(self.classifier, found)[0]
        seen = int(self.classifier(found.clamp(-1.0, 1.0)).argmax())
        return Run(method, setting, error, calls, seconds, features.round(4).tolist(), seen == number % CLASSES)

    def complete(self, first: int, count: int) -> None:
        """Run what is not in the folder yet."""
        for number in track(range(first, first + count), "samples"):
            file = self.folder / f"sample-{number:03d}.json"
            if not file.exists():
                temporary = file.with_suffix(".tmp")
                temporary.write_text(json.dumps([asdict(one) for one in self.run(number)]))
                temporary.replace(file)
