"""Are the promises kept for a pipeline of diffusers, with generators of the host and of the card?"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import diffusers
import torch
from torch import Tensor

from benchmarks.gpu.device import Lab, distance
from parasolver_adapters.diffusers import parallel_sampling

PART = "pipelines"
SCHEDULERS = ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler")
BOUNDS = {torch.float32: (1e-3, 1e-2), torch.float16: (3e-2, 4e-2)}  # of tolerance=0 and of 1 %
STEPS = 20


def tiny_pipeline(scheduler: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Stable Diffusion in small, with random weights and no text encoder."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        attention_head_dim=2,
        cross_attention_dim=16,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=2, sample_size=8)
    options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    own = getattr(diffusers, scheduler)(**options)
    if "clip_sample" in own.config:
        own.register_to_config(clip_sample=False)
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet.eval(),
        scheduler=own,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, dtype)


def found(lab: Lab, scheduler: str, generator: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A line of results for a pipeline, with generators on a device."""
    pipe = tiny_pipeline(scheduler, lab.device, dtype)
    prompt = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(3)).to(lab.device, dtype)

    def drawn(**options: Any) -> tuple[Tensor, Any]:
        with parallel_sampling(pipe, **options) if options else nullcontext() as run:
            pictures = pipe(
                prompt_embeds=prompt,
                negative_prompt_embeds=-prompt,
                num_inference_steps=6 if lab.tiny else STEPS,
                generator=torch.Generator(generator).manual_seed(42),
                output_type="latent",
            ).images
        return pictures, run

    truth, _ = drawn()
    (same, _), (zero, _), (near, run) = drawn(window=1), drawn(window=5, tolerance=0.0), drawn(window=5, tolerance=1e-2)
    values = {"zero": distance(zero, truth), "percent": distance(near, truth)}
    exact, percent = BOUNDS[dtype]
    equal = bool(torch.equal(same, truth))
    ok = equal and values["zero"] <= exact and values["percent"] <= percent
    return {"ok": ok, "same": equal, "rounds": run.stats.rounds, **values}


def run(lab: Lab) -> None:
    """All schedulers, both kinds of generator, float32 and float16."""
    generators = {"host": torch.device("cpu")} | ({"card": lab.device} if lab.cuda else {})
    for scheduler in SCHEDULERS:
        for where, generator in generators.items():
            for dtype in BOUNDS if lab.cuda else (torch.float32,):
                name = f"{scheduler}, generator of the {where}, {dtype}"
                lab.measure(PART, name, lambda s=scheduler, g=generator, d=dtype: found(lab, s, g, d))
