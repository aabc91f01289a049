"""The pipelines that are tested, and what is refused: ``python -m tests.adapters.pipeline_survey --write``."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler

from parasolver_adapters.diffusers import PipelineNotParallelError, parallel_sampling
from tests.adapters.pipeline_families import FAMILIES
from tests.adapters.tiny_pipelines import (
    DTYPE,
    ddim,
    ddim_pipeline,
    generator,
    half_mask,
    picture,
    randn,
    stable_diffusion,
    text,
)
from tests.adapters.tiny_videos import cogvideox, ltx

PAGE = Path(__file__).parents[2] / "docs/tested_pipelines.md"


class Odd(diffusers.DDIMPipeline):
    """A loop that does what cannot be recorded."""

    @torch.no_grad()
    def __call__(self, kind: str, steps: int = 6, generator: Any = None) -> Any:
        self.scheduler.set_timesteps(steps)
        x, kept = torch.randn(1, 3, 8, 8, generator=generator, dtype=DTYPE), torch.zeros(1, 3, 8, 8, dtype=DTYPE)
        scheduler = copy.deepcopy(self.scheduler) if kind in ("copied scheduler", "schedulers") else self.scheduler
        self.kept = scheduler
        for i, t in enumerate(scheduler.timesteps):
            if kind == "shape" and i == 3:
                x = x[..., :-2]
            if kind == "switch":
                self.unet.mid_block.attentions[0].scale = float(i > 2)
            m = self.unet(x, t).sample
            if kind == "randomness":
                m = m + 0.01 * torch.randn_like(m)
            if kind == "decision" and float(m.abs().max()) > 10:
                m = m * 0.5
            if kind == "NumPy":
                m = m / (1 + float(np.abs(m.numpy()).max()))
            if kind == "gradient":
                with torch.enable_grad():
                    own = x.detach().requires_grad_(True)
                    m = m + torch.autograd.grad(self.unet(own, t).sample.norm(), own)[0]
            if kind == "momentum":
                kept = m = m + 0.1 * kept
            if kind == "buffer":
                m = kept.copy_(m) * 1.0
            if kind == "schedulers" and i % 2:
                scheduler = copy.deepcopy(scheduler)
            options = {"use_clipped_model_output": i > 2} if kind == "options" else {}
            x = x if kind == "no step" else scheduler.step(m, t, x, **options).prev_sample
        if kind == "two loops":
            for t in scheduler.timesteps:
                x = scheduler.step(self.unet(x, t).sample, t, x).prev_sample
        return (x,)


class SignScheduler(DDIMScheduler):
    """Not linear in the network's output."""

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
        return super().step(torch.sign(model_output), timestep, sample, return_dict=return_dict)


@dataclass(frozen=True)
class Refusal:
    """A pipeline and a call of it that are refused.

    Args:
        what: as the page has it.
        build: makes the pipeline.
        call: calls it; returns the sample.
        repeats: whether two calls with the same arguments give the same sample.
    """

    what: str
    build: Callable[[], Any]
    call: Callable[[Any], torch.Tensor]
    repeats: bool = True

    def reason(self) -> str:
        """What the user is told."""
        try:
            with parallel_sampling(pipe := self.build()):
                self.call(pipe)
        except PipelineNotParallelError as error:
            return str(error)
        raise AssertionError(f"not refused: {self.what}")


def odd(what: str, kind: str, repeats: bool = True) -> Refusal:
    """A loop of the given kind."""

    def build() -> Any:
        tiny = ddim_pipeline()
        return Odd(tiny.unet, tiny.scheduler)

    return Refusal(what, build, lambda pipe: pipe(kind, generator=generator())[0], repeats)


def _sample(pipe: Any) -> torch.Tensor:
    return pipe(**text(), num_inference_steps=8, generator=generator(), output_type="latent").images


def _cached() -> Any:
    pipe = cogvideox()
    pipe.transformer.enable_cache(
        diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        )
    )
    return pipe


def _video(pipe: Any) -> torch.Tensor:
    given = {"num_frames": 8, "height": 16, "width": 16, "num_inference_steps": 4}
    return pipe(**text(), **given, generator=generator(), output_type="latent").frames


def _mixing() -> Any:
    pipe = stable_diffusion()
    own = pipe.unet.forward
    pipe.unet.forward = functools.wraps(own)(lambda x, *args, **kwargs: own(x - x.mean(), *args, **kwargs))
    return pipe


def pag() -> Any:
    """A pipeline with perturbed-attention guidance."""
    pipe = diffusers.StableDiffusionPAGPipeline(**stable_diffusion().components, requires_safety_checker=False)
    pipe.set_pag_applied_layers("mid")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _self_attention_guidance() -> Any:
    """A pipeline with an attention store, and a hook that it sets in its call."""
    pipe = diffusers.StableDiffusionSAGPipeline(**stable_diffusion().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _frames_of_ltx(pipe: Any) -> torch.Tensor:
    given = {"latents": randn(1, 8, 8), "num_frames": 9, "height": 64, "width": 64, "num_inference_steps": 6}
    return pipe(**text(), **given, **ATTENDED, generator=generator(), output_type="latent").frames


ATTENDED = {f"{name}_attention_mask": torch.ones(1, 5, dtype=torch.int64) for name in ("prompt", "negative_prompt")}


def _inpainting_of_if() -> Any:
    """With a fixed variance, as that which the network learns is refused before."""
    parts = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker"))
    unet = stable_diffusion(unet={"in_channels": 3, "out_channels": 6}).unet
    scheduler = diffusers.DDPMScheduler(clip_sample=False)
    pipe = diffusers.IFInpaintingPipeline(**parts, unet=unet, scheduler=scheduler, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _picture_of_if(pipe: Any) -> torch.Tensor:
    given = {"image": 2 * picture() - 1, "mask_image": half_mask(), "strength": 1.0, "num_inference_steps": 6}
    return torch.as_tensor(pipe(**text(), **given, generator=generator(), output_type="pt").images)


def _shifting() -> Any:
    pipe = stable_diffusion()
    prepare, shift = type(pipe).prepare_latents, iter(range(9))
    pipe.prepare_latents = lambda *args: prepare(pipe, *args) + next(shift)
    return pipe


REFUSALS = [
    Refusal(
        "a scheduler that is not linear",
        lambda: stable_diffusion(scheduler=SignScheduler.from_config(ddim().config)),
        _sample,
    ),
    Refusal("a network with a step cache", _cached, _video),
    Refusal("a network that mixes the rows of its batch, as normalisation in training mode", _mixing, _sample),
    Refusal("perturbed-attention guidance", pag, _sample),
    Refusal("latents that are not the same in two calls", _shifting, _sample, repeats=False),
    odd("random numbers in the loop", "randomness", repeats=False),
    odd("decisions by the values of the state", "decision"),
    odd("values of the state outside torch, as in NumPy", "NumPy"),
    odd("gradients through a network, as universal guidance", "gradient"),
    Refusal(
        "features from inside a network, as in self-attention guidance",
        _self_attention_guidance,
        lambda pipe: pipe(**text(), num_inference_steps=4, generator=generator(), output_type="latent").images,
    ),
    Refusal(
        "a frame that the loop keeps as it was: image-to-video of LTX and Sana",
        lambda: diffusers.LTXImageToVideoPipeline(**ltx().components),
        _frames_of_ltx,
    ),
    Refusal("pixels that the loop keeps as they were: inpainting of IF", _inpainting_of_if, _picture_of_if),
    odd("momentum, or a guidance that remembers earlier steps", "momentum"),
    odd("layers that the loop switches, as GLIGEN", "switch"),
    odd("a buffer that the loop writes to", "buffer"),
    odd("a state that changes its shape", "shape"),
    odd("arguments of `scheduler.step` that change", "options"),
    odd("two schedulers in one loop", "schedulers"),
    odd("no scheduler in the loop", "no step"),
]

HEADER = f"""# Pipelines that are tested

This page is written by `python -m tests.adapters.pipeline_survey --write`, with diffusers {diffusers.__version__}.
The tests run every line of it on tiny networks with random weights, and compare with the untouched pipeline. Other
pipelines work in the same way, unless a line of the second table applies to them: no code is special to one pipeline.

*Distance at tolerance 0*: relative RMS distance to the untouched pipeline that the tests allow. They run in float64, so
1e-12 is rounding; it is 1e-6, or 1e-5, where the pipeline or its scheduler computes a part in float32. With a tolerance
of 1 % every line keeps within 1 %, in fewer rounds than steps. In float32 a batch differs from its rows by rounding,
about 3e-7, which a sampler may amplify.

| Pipeline | As called | Distance at tolerance 0 |
|---|---|---|
"""


def page(reasons: dict[str, str]) -> str:
    """The page of the documentation."""
    rows = []
    for family in FAMILIES:
        name, _, call = family.title.partition(", ")
        rows.append(f"| {name} | {call or 'as usual'} | {family.limit:.0e} |")
    refused = [f"| {what} | {reason} |" for what, reason in reasons.items()]
    lines = [*rows, "", "## What is refused", "", "| | the error says |", "|---|---|", *refused, ""]
    return HEADER + "\n".join(lines) + "\n" + FOOTER


FOOTER = """In modular pipelines also guiders that change the network between two calls of one step (skip-layer and
perturbed-attention guidance) and those with momentum. [Schedulers of diffusers](schedulers.md)
says which schedulers are linear.
"""


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("usage: python -m tests.adapters.pipeline_survey --write")
    diffusers.logging.set_verbosity_error()
    PAGE.write_text(page({one.what: one.reason() for one in REFUSALS}))
