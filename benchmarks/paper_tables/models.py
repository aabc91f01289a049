"""A pipeline, and the pictures that are drawn by it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from benchmarks.paper_tables.samplers import Sampler
from parasolver_adapters.diffusers import parallel_sampling
from parasolver_adapters.embedded import load_embedded_model

EMBEDDED = "embedded"
PROMPTS = (
    "a lighthouse on a cliff in a storm, oil painting",
    "a bowl of ripe cherries on a wooden table, studio light",
    "a red tram climbing a steep street in the morning",
    "portrait of an old fisherman, black and white photograph",
    "a snow leopard resting on a rock",
    "an overgrown greenhouse with a piano in it",
    "a paper boat on a puddle that mirrors a city",
    "a village market seen from above, watercolour",
)


@dataclass(frozen=True)
class Model:
    """A loaded pipeline, with what is asked of it.

    Args:
        pipe: StableDiffusionPipeline or another from text to pictures, or DDPMPipeline.
        prompts: one picture each, again from the first if there are more pictures; none without a condition.
        seed: of the first picture's noise; the next has the next.
        given: further arguments of the call.
    """

    pipe: Any
    prompts: tuple[str, ...]
    seed: int
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def table(self) -> str:
        """The table of the paper that has this kind of model."""
        return "SD-v2" if self.prompts else "LSUN Church"

    def use(self, sampler: Sampler) -> None:
        """Give the pipeline the sampler's scheduler, on the model's own noise schedule."""
        scheduler = getattr(diffusers, sampler.scheduler)
        config = {"timestep_spacing": "trailing", **sampler.options}
        self.pipe.scheduler = scheduler.from_config(self.pipe.scheduler.config, **config)

    def prompt(self, number: int) -> str | None:
        return self.prompts[number % len(self.prompts)] if self.prompts else None

    def draw(self, number: int, steps: int, choices: dict[str, Any]) -> Drawn:
        """One picture."""
        generator = torch.Generator().manual_seed(self.seed + number)
        given = {"generator": generator, "num_inference_steps": steps, **self.given}
        if self.prompts:
            given["prompt"] = self.prompt(number)
        self._wait()
        began = time.perf_counter()
        with parallel_sampling(self.pipe, **choices) as run:
            picture = self.pipe(**given).images[0]
        self._wait()
        seconds = time.perf_counter() - began
        assert run.latents is not None
        state = run.latents.float().cpu().numpy()
        return Drawn(picture, state, run.stats.rounds, run.stats.evaluations, seconds)

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Drawn:
    """A picture, the state that it was decoded from ``(1, *event)``, and what it cost."""

    picture: Image.Image
    state: np.ndarray
    rounds: int
    evaluations: int
    seconds: float


def load(name: str, device: str, dtype: torch.dtype, prompts: tuple[str, ...], seed: int, size: int | None) -> Model:
    """The pipeline of that name."""
    if name == EMBEDDED:
        scheduler = diffusers.DDPMScheduler(clip_sample=False)
        pipe: Any = diffusers.DDPMPipeline(load_embedded_model(dtype, device), scheduler)
    else:
        pipe = diffusers.DiffusionPipeline.from_pretrained(name, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    given = {} if size is None else {"height": size, "width": size}
    return Model(pipe, prompts if hasattr(pipe, "tokenizer") else (), seed, given)
