"""Tiny pipelines of diffusers, built from configs with random weights; prompts are given as embeddings."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)

ROUNDING, SINGLE = 1e-12, 1e-6  # of computations in float64, and with parts in float32
DTYPE = torch.float64  # a batch differs from its rows by rounding, which the float32 samplers would amplify


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def conditional_unet(**changes: Any) -> UNet2DConditionModel:
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


def vae_of_pictures(**changes: Any) -> AutoencoderKL:
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


def ready(pipe: Any) -> Any:
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.to(DTYPE).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ddim(**changes: Any) -> DDIMScheduler:
    """As in the configuration of Stable Diffusion v2."""
    return DDIMScheduler(
        **{
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
        }
        | changes
    )


def flow_match() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def text(batch: int = 1, width: int = 16, **more: int) -> dict[str, torch.Tensor]:
    """Embeddings of prompts and of negative prompts; ``more`` are widths of pooled ones."""
    given = {
        "prompt_embeds": randn(batch, 5, width, seed=1),
        "negative_prompt_embeds": randn(batch, 5, width, seed=2),
    }
    for name, size in more.items():
        given[name] = randn(batch, size, seed=len(given))
    return given


def picture(seed: int = 7) -> torch.Tensor:
    return randn(1, 3, 32, 32, seed=seed).clamp(-1, 1) * 0.5 + 0.5


def half_mask() -> torch.Tensor:
    mask = torch.zeros(1, 1, 32, 32, dtype=DTYPE)
    mask[..., 12:] = 1.0
    return mask


def stable_diffusion(
    name: str = "StableDiffusionPipeline", scheduler: Any = None, unet: Any = None, **more: Any
) -> Any:
    return ready(
        getattr(diffusers, name)(
            vae=vae_of_pictures(),
            text_encoder=None,
            tokenizer=None,
            unet=conditional_unet(**(unet or {})),
            scheduler=scheduler or ddim(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **more,
        )
    )


def controlnet() -> Any:
    torch.manual_seed(2)
    net = ControlNetModel.from_unet(conditional_unet(), conditioning_embedding_out_channels=(8, 8))
    for block in [*net.controlnet_down_blocks, net.controlnet_mid_block]:
        torch.nn.init.normal_(block.weight, std=0.1)  # zero otherwise, and of no effect
    return stable_diffusion("StableDiffusionControlNetPipeline", controlnet=net)


def sdxl() -> Any:
    unet = conditional_unet(
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=16,
        transformer_layers_per_block=1,
    )
    return ready(
        diffusers.StableDiffusionXLPipeline(
            vae=vae_of_pictures(),
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            unet=unet,
            scheduler=ddim(),
            add_watermarker=False,
        )
    )


def qwen_image() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    return ready(
        diffusers.QwenImagePipeline(
            scheduler=flow_match(), vae=None, text_encoder=None, tokenizer=None, transformer=transformer
        )
    )


def sd3() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=24,
    )
    encoders = dict.fromkeys(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))
    return ready(
        diffusers.StableDiffusion3Pipeline(
            transformer=transformer, scheduler=flow_match(), vae=vae_of_pictures(shift_factor=0.0), **encoders
        )
    )


def flux() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    encoders = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return ready(
        diffusers.FluxPipeline(
            transformer=transformer, scheduler=flow_match(), vae=vae_of_pictures(shift_factor=0.0), **encoders
        )
    )


def dit() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=4,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        norm_num_groups=4,
    )
    for block in transformer.parameters():
        torch.nn.init.normal_(block, std=0.1)
    return ready(diffusers.DiTPipeline(transformer=transformer, vae=vae_of_pictures(), scheduler=DDIMScheduler()))


def pixart() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=16,
        cross_attention_dim=16,
        in_channels=4,
        out_channels=8,
        use_additional_conditions=False,
    )
    return ready(
        diffusers.PixArtAlphaPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=vae_of_pictures(),
            transformer=transformer,
            scheduler=DPMSolverMultistepScheduler(),
        )
    )


def sana() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=16,
        sample_size=8,
    )
    return ready(
        diffusers.SanaPipeline(
            tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=flow_match()
        )
    )


def ddim_pipeline() -> Any:
    return ready(diffusers.DDIMPipeline(unet=unconditional_unet(), scheduler=DDIMScheduler(clip_sample=False)))


def ddpm_pipeline() -> Any:
    return ready(diffusers.DDPMPipeline(unet=unconditional_unet(), scheduler=DDPMScheduler(clip_sample=True)))


def unconditional_unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=8,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents_of(**given: Any) -> dict[str, Any]:
    """The arguments of a call that gives latents, which are not decoded."""
    return {"output_type": "latent", **given}


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def watch(network: Any, what: Any) -> list[Any]:
    """``what`` of the arguments of each true call of a network."""
    own, seen = network.forward, []

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(what(*args, **kwargs))
        return own(*args, **kwargs)

    network.forward = forward
    return seen


_latents, _ready = latents_of, ready  # as scripts that are kept outside of the project call them
