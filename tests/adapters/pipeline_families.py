"""Pipelines and calls of them that are sampled in parallel: the table of the docs, which the tests run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from tests.adapters.tiny_pipelines import (
    ROUNDING,
    SINGLE,
    controlnet,
    ddim,
    ddim_pipeline,
    ddpm_pipeline,
    dit,
    flux,
    generator,
    half_mask,
    latents_of,
    picture,
    pixart,
    qwen_image,
    randn,
    sana,
    sd3,
    sdxl,
    stable_diffusion,
    text,
)
from tests.adapters.tiny_videos import animatediff, cogvideox, ltx, stable_audio, wan


@dataclass(frozen=True)
class Family:
    """A pipeline and a call of it.

    Args:
        title: what the table in the docs says.
        build: makes the pipeline.
        given: the call's arguments; made anew for each call, as generators are used up.
        limit: how far a run with tolerance 0 may be from the untouched pipeline, RMS over RMS. Not rounding in float64
            where the pipeline or its scheduler computes a part in float32.
    """

    title: str
    build: Callable[[], Any]
    given: Callable[[], dict[str, Any]]
    limit: float = ROUNDING

    def call(self, pipe: Any, **changes: Any) -> torch.Tensor:
        """The pipeline's first output, as a tensor."""
        given = {"generator": generator(), "num_inference_steps": 12} | self.given() | changes
        output = pipe(**given)[0]
        return torch.as_tensor(output)


def _sd(
    title: str, batch: int = 1, scheduler: Callable[[], Any] = ddim, limit: float = ROUNDING, **given: Any
) -> Family:
    return Family(
        f"StableDiffusionPipeline, {title}",
        lambda: stable_diffusion(scheduler=scheduler()),
        lambda: latents_of(**text(batch), **given),
        limit,
    )


def _scheduler(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(diffusers, name).from_config(ddim().config, **options)


def _pooled(batch: int = 1) -> dict[str, Any]:
    return text(batch, pooled_prompt_embeds=16, negative_pooled_prompt_embeds=16)


def _masked(batch: int = 1) -> dict[str, Any]:
    masks = {
        f"{name}_attention_mask": torch.ones(batch, 5, dtype=torch.int64) for name in ("prompt", "negative_prompt")
    }
    return text(batch) | masks


FAMILIES = [
    _sd("DDIM"),
    _sd("DDIM, no guidance", guidance_scale=1.0),
    _sd("DDIM, guidance_rescale", guidance_rescale=0.7),
    _sd("DDIM, eta=1", eta=1.0),
    _sd("DDIM, batch of 2", batch=2),
    Family(
        "StableDiffusionPipeline, DDIM, eta=1, a generator for each sample",
        stable_diffusion,
        lambda: latents_of(**text(2), eta=1.0, generator=[generator(1), generator(2)]),
    ),
    _sd("DDPM", scheduler=_scheduler("DDPMScheduler")),
    _sd(
        "DDPM, timesteps of one's own",
        scheduler=_scheduler("DDPMScheduler"),
        timesteps=[960, 820, 700, 590, 480, 380, 290, 200, 130, 70, 30, 10],
    ),
    _sd("PNDM", scheduler=_scheduler("PNDMScheduler")),
    _sd("DPM-Solver++", scheduler=_scheduler("DPMSolverMultistepScheduler"), limit=SINGLE),
    _sd(
        "DPM-Solver++ SDE",
        scheduler=_scheduler("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"),
        limit=SINGLE,
    ),
    _sd("UniPC", scheduler=_scheduler("UniPCMultistepScheduler")),
    _sd("Heun", scheduler=_scheduler("HeunDiscreteScheduler")),
    _sd("Euler ancestral", scheduler=_scheduler("EulerAncestralDiscreteScheduler"), limit=SINGLE),
    Family(
        "StableDiffusionImg2ImgPipeline",
        lambda: stable_diffusion("StableDiffusionImg2ImgPipeline"),
        lambda: latents_of(**text(), image=picture(), strength=0.7),
    ),
    Family(
        "StableDiffusionInstructPix2PixPipeline",
        lambda: stable_diffusion("StableDiffusionInstructPix2PixPipeline", unet={"in_channels": 8}),
        lambda: latents_of(**text(), image=picture()),
    ),
    Family(
        "StableDiffusionInpaintPipeline, 9 channels",
        lambda: stable_diffusion("StableDiffusionInpaintPipeline", unet={"in_channels": 9}),
        lambda: latents_of(**text(), image=picture(), mask_image=half_mask(), height=32, width=32),
    ),
    Family(
        "StableDiffusionInpaintPipeline, 4 channels",
        lambda: stable_diffusion("StableDiffusionInpaintPipeline"),
        lambda: latents_of(**text(), image=picture(), mask_image=half_mask(), height=32, width=32),
    ),
    Family(
        "StableDiffusionInpaintPipeline, 4 channels, DPM-Solver++",
        lambda: stable_diffusion(
            "StableDiffusionInpaintPipeline", scheduler=_scheduler("DPMSolverMultistepScheduler")()
        ),
        lambda: latents_of(**text(), image=picture(), mask_image=half_mask(), height=32, width=32),
        SINGLE,
    ),
    Family("StableDiffusionControlNetPipeline", controlnet, lambda: latents_of(**text(), image=picture())),
    Family(
        "StableDiffusionControlNetPipeline, guess mode, part of the steps",
        controlnet,
        lambda: latents_of(**text(), image=picture(), guess_mode=True, control_guidance_end=0.5),
    ),
    Family("StableDiffusionXLPipeline", sdxl, lambda: latents_of(**_sdxl_text())),
    Family(
        "StableDiffusionXLPipeline, denoising_end, batch of 2",
        sdxl,
        lambda: latents_of(**_sdxl_text(2), denoising_end=0.6),
    ),
    Family(
        "AnimateDiffPipeline, batch of 2",
        animatediff,
        lambda: latents_of(**text(2), num_frames=2, height=16, width=16),
    ),
    Family("StableDiffusion3Pipeline", sd3, lambda: latents_of(**_pooled(), height=16, width=16), SINGLE),
    Family(
        "StableDiffusion3Pipeline, skip-layer guidance, batch of 2",
        sd3,
        lambda: latents_of(**_pooled(2), height=16, width=16, skip_guidance_layers=[0], skip_layer_guidance_stop=0.5),
        SINGLE,
    ),
    Family("FluxPipeline", flux, lambda: latents_of(**_flux_text(False), height=16, width=16), SINGLE),
    Family(
        "FluxPipeline, true CFG, batch of 2",
        flux,
        lambda: latents_of(**_flux_text(True, 2), true_cfg_scale=3.0, height=16, width=16),
        SINGLE,
    ),
    Family(
        "QwenImagePipeline, true CFG",
        qwen_image,
        lambda: latents_of(
            **text(),
            prompt_embeds_mask=torch.ones(1, 5, dtype=torch.int64),
            negative_prompt_embeds_mask=torch.ones(1, 5, dtype=torch.int64),
            height=32,
            width=32,
        ),
        SINGLE,
    ),
    Family("DiTPipeline", dit, lambda: {"class_labels": [1, 2], "output_type": "np"}, 1e-5),
    Family(
        "PixArtAlphaPipeline, batch of 2",
        pixart,
        lambda: latents_of(**_masked(2), negative_prompt=None, height=16, width=16, use_resolution_binning=False),
        SINGLE,
    ),
    Family(
        "SanaPipeline",
        sana,
        lambda: latents_of(**_masked(), negative_prompt=None, height=256, width=256, use_resolution_binning=False),
        SINGLE,
    ),
    Family("DDIMPipeline", ddim_pipeline, lambda: {"batch_size": 2, "eta": 0.5, "output_type": "np"}),
    Family("DDPMPipeline, clip_sample", ddpm_pipeline, lambda: {"batch_size": 2, "output_type": "np"}),
    Family("WanPipeline", lambda: wan(1), lambda: latents_of(**text(), num_frames=5, height=32, width=32), SINGLE),
    Family(
        "WanPipeline, two experts, batch of 2",
        wan,
        lambda: latents_of(**text(2), num_frames=5, height=32, width=32),
        SINGLE,
    ),
    Family("CogVideoXPipeline", cogvideox, lambda: latents_of(**text(), num_frames=8, height=16, width=16), SINGLE),
    Family(
        "CogVideoXPipeline, dynamic guidance, DPM, batch of 2",
        lambda: cogvideox(diffusers.CogVideoXDPMScheduler()),
        lambda: latents_of(**text(2), num_frames=8, height=16, width=16, use_dynamic_cfg=True),
        SINGLE,
    ),
    Family("LTXPipeline, batch of 2", ltx, lambda: latents_of(**_masked(2), num_frames=9, height=64, width=64), SINGLE),
    Family(
        "StableAudioPipeline",
        stable_audio,
        lambda: {
            "prompt_embeds": randn(1, 5, 4, seed=1),
            "negative_prompt_embeds": randn(1, 5, 4, seed=2),
            "attention_mask": torch.ones(1, 5, dtype=torch.int64),
            "negative_attention_mask": torch.ones(1, 5, dtype=torch.int64),
            "audio_end_in_s": 1.8e-4,
            "output_type": "latent",
        },
    ),
]


def _sdxl_text(batch: int = 1) -> dict[str, Any]:
    return text(batch, pooled_prompt_embeds=32, negative_pooled_prompt_embeds=32)


def _flux_text(negative: bool, batch: int = 1) -> dict[str, Any]:
    given = _pooled(batch)
    return given if negative else {name: value for name, value in given.items() if "negative" not in name}
