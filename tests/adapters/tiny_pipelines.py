"""Tiny pipelines of diffusers, built from configs with random weights; prompts are given as embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)

DTYPE = torch.float64  # a batch differs from its rows by rounding, which the float32 samplers would amplify


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def _unet(**changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        **{
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "layers_per_block": 1,
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
        }
        | changes
    )


def _vae(**changes: Any) -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        **{
            "block_out_channels": (8, 8),
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": 4,
            "norm_num_groups": 4,
        }
        | changes
    )


def stable_diffusion(cls: Any = StableDiffusionPipeline, scheduler: Any = None, **changes: Any) -> Any:
    scheduler = scheduler or DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    unet = changes.pop("unet", {})
    pipe = cls(
        vae=_vae(),
        text_encoder=None,
        tokenizer=None,
        unet=_unet(**unet),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **({} if "image_encoder" not in cls.__init__.__annotations__ else {}),
        **changes,
    )
    return ready(pipe)


def ready(pipe: Any) -> Any:
    pipe.to(DTYPE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text(batch: int = 1, length: int = 5, width: int = 16) -> dict[str, torch.Tensor]:
    return {
        "prompt_embeds": randn(batch, length, width, seed=1),
        "negative_prompt_embeds": randn(batch, length, width, seed=2),
    }
