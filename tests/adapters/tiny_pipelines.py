"""Tiny pipelines of diffusers, built from configs with random weights; prompts are given as embeddings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
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


def _ready(pipe: Any) -> Any:
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
    return _ready(
        getattr(diffusers, name)(
            vae=_vae(),
            text_encoder=None,
            tokenizer=None,
            unet=_unet(**(unet or {})),
            scheduler=scheduler or ddim(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **more,
        )
    )


def controlnet() -> Any:
    torch.manual_seed(2)
    net = ControlNetModel.from_unet(_unet(), conditioning_embedding_out_channels=(8, 8))
    for block in [*net.controlnet_down_blocks, net.controlnet_mid_block]:
        torch.nn.init.normal_(block.weight, std=0.1)  # zero otherwise, and of no effect
    return stable_diffusion("StableDiffusionControlNetPipeline", controlnet=net)


def sdxl() -> Any:
    unet = _unet(
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=16,
        transformer_layers_per_block=1,
    )
    return _ready(
        diffusers.StableDiffusionXLPipeline(
            vae=_vae(),
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            unet=unet,
            scheduler=ddim(),
            add_watermarker=False,
        )
    )


def animatediff() -> Any:
    torch.manual_seed(2)
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=4
    )
    return _ready(
        diffusers.AnimateDiffPipeline(
            vae=_vae(), text_encoder=None, tokenizer=None, unet=_unet(), motion_adapter=adapter, scheduler=ddim()
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
    return _ready(
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
    return _ready(
        diffusers.StableDiffusion3Pipeline(
            transformer=transformer, scheduler=flow_match(), vae=_vae(shift_factor=0.0), **encoders
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
    return _ready(
        diffusers.FluxPipeline(transformer=transformer, scheduler=flow_match(), vae=_vae(shift_factor=0.0), **encoders)
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
    return _ready(diffusers.DiTPipeline(transformer=transformer, vae=_vae(), scheduler=DDIMScheduler()))


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
    return _ready(
        diffusers.PixArtAlphaPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=_vae(),
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
    return _ready(
        diffusers.SanaPipeline(
            tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=flow_match()
        )
    )


def ddim_pipeline() -> Any:
    return _ready(diffusers.DDIMPipeline(unet=unconditional_unet(), scheduler=DDIMScheduler(clip_sample=False)))


def ddpm_pipeline() -> Any:
    return _ready(diffusers.DDPMPipeline(unet=unconditional_unet(), scheduler=DDPMScheduler(clip_sample=True)))


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


def wan(experts: int = 2) -> Any:
    def expert(seed: int) -> Any:
        torch.manual_seed(seed)
        return diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            rope_max_seq_len=32,
        )

    return _ready(
        diffusers.WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            scheduler=flow_match(),
            transformer=expert(0),
            transformer_2=expert(1) if experts == 2 else None,
            boundary_ratio=0.8 if experts == 2 else None,
        )
    )


def cogvideox(scheduler: Any = None) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=5,
        use_rotary_positional_embeddings=True,
    )
    return _ready(
        diffusers.CogVideoXPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=transformer,
            scheduler=scheduler or diffusers.CogVideoXDDIMScheduler(),
        )
    )


def ltx() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=16,
    )
    return _ready(
        diffusers.LTXPipeline(
            scheduler=flow_match(), vae=None, text_encoder=None, tokenizer=None, transformer=transformer
        )
    )


def stable_audio() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.StableAudioDiTModel(
        sample_size=4,
        in_channels=3,
        num_layers=1,
        attention_head_dim=4,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=4,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=4,
        num_attention_heads=2,
    )
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        audio_channels=2,
    )
    projection = diffusers.StableAudioProjectionModel(text_encoder_dim=4, conditioning_dim=4, min_value=0, max_value=32)
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
    )
    return _ready(
        diffusers.StableAudioPipeline(
            vae=vae,
            text_encoder=None,
            projection_model=projection,
            tokenizer=None,
            transformer=transformer,
            scheduler=scheduler,
        )
    )


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


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _latents(**given: Any) -> dict[str, Any]:
    return {"output_type": "latent", **given}


def _sd(
    title: str, batch: int = 1, scheduler: Callable[[], Any] = ddim, limit: float = ROUNDING, **given: Any
) -> Family:
    return Family(
        f"StableDiffusionPipeline, {title}",
        lambda: stable_diffusion(scheduler=scheduler()),
        lambda: _latents(**text(batch), **given),
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
        lambda: _latents(**text(2), eta=1.0, generator=[generator(1), generator(2)]),
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
        lambda: _latents(**text(), image=picture(), strength=0.7),
    ),
    Family(
        "StableDiffusionInstructPix2PixPipeline",
        lambda: stable_diffusion("StableDiffusionInstructPix2PixPipeline", unet={"in_channels": 8}),
        lambda: _latents(**text(), image=picture()),
    ),
    Family(
        "StableDiffusionInpaintPipeline, 9 channels",
        lambda: stable_diffusion("StableDiffusionInpaintPipeline", unet={"in_channels": 9}),
        lambda: _latents(**text(), image=picture(), mask_image=half_mask(), height=32, width=32),
    ),
    Family(
        "StableDiffusionInpaintPipeline, 4 channels",
        lambda: stable_diffusion("StableDiffusionInpaintPipeline"),
        lambda: _latents(**text(), image=picture(), mask_image=half_mask(), height=32, width=32),
    ),
    Family(
        "StableDiffusionInpaintPipeline, 4 channels, DPM-Solver++",
        lambda: stable_diffusion(
            "StableDiffusionInpaintPipeline", scheduler=_scheduler("DPMSolverMultistepScheduler")()
        ),
        lambda: _latents(**text(), image=picture(), mask_image=half_mask(), height=32, width=32),
        SINGLE,
    ),
    Family("StableDiffusionControlNetPipeline", controlnet, lambda: _latents(**text(), image=picture())),
    Family(
        "StableDiffusionControlNetPipeline, guess mode, part of the steps",
        controlnet,
        lambda: _latents(**text(), image=picture(), guess_mode=True, control_guidance_end=0.5),
    ),
    Family("StableDiffusionXLPipeline", sdxl, lambda: _latents(**_sdxl_text())),
    Family(
        "StableDiffusionXLPipeline, denoising_end, batch of 2",
        sdxl,
        lambda: _latents(**_sdxl_text(2), denoising_end=0.6),
    ),
    Family(
        "AnimateDiffPipeline, batch of 2",
        animatediff,
        lambda: _latents(**text(2), num_frames=2, height=16, width=16),
    ),
    Family("StableDiffusion3Pipeline", sd3, lambda: _latents(**_pooled(), height=16, width=16), SINGLE),
    Family(
        "StableDiffusion3Pipeline, skip-layer guidance, batch of 2",
        sd3,
        lambda: _latents(**_pooled(2), height=16, width=16, skip_guidance_layers=[0], skip_layer_guidance_stop=0.5),
        SINGLE,
    ),
    Family("FluxPipeline", flux, lambda: _latents(**_flux_text(False), height=16, width=16), SINGLE),
    Family(
        "FluxPipeline, true CFG, batch of 2",
        flux,
        lambda: _latents(**_flux_text(True, 2), true_cfg_scale=3.0, height=16, width=16),
        SINGLE,
    ),
    Family(
        "QwenImagePipeline, true CFG",
        qwen_image,
        lambda: _latents(
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
        lambda: _latents(**_masked(2), negative_prompt=None, height=16, width=16, use_resolution_binning=False),
        SINGLE,
    ),
    Family(
        "SanaPipeline",
        sana,
        lambda: _latents(**_masked(), negative_prompt=None, height=256, width=256, use_resolution_binning=False),
        SINGLE,
    ),
    Family("DDIMPipeline", ddim_pipeline, lambda: {"batch_size": 2, "eta": 0.5, "output_type": "np"}),
    Family("DDPMPipeline, clip_sample", ddpm_pipeline, lambda: {"batch_size": 2, "output_type": "np"}),
    Family("WanPipeline", lambda: wan(1), lambda: _latents(**text(), num_frames=5, height=32, width=32), SINGLE),
    Family(
        "WanPipeline, two experts, batch of 2",
        wan,
        lambda: _latents(**text(2), num_frames=5, height=32, width=32),
        SINGLE,
    ),
    Family("CogVideoXPipeline", cogvideox, lambda: _latents(**text(), num_frames=8, height=16, width=16), SINGLE),
    Family(
        "CogVideoXPipeline, dynamic guidance, DPM, batch of 2",
        lambda: cogvideox(diffusers.CogVideoXDPMScheduler()),
        lambda: _latents(**text(2), num_frames=8, height=16, width=16, use_dynamic_cfg=True),
        SINGLE,
    ),
    Family("LTXPipeline, batch of 2", ltx, lambda: _latents(**_masked(2), num_frames=9, height=64, width=64), SINGLE),
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
