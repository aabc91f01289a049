"""Tiny pipelines of videos and of sound, as those of pictures."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from tests.adapters.tiny_pipelines import conditional_unet, ddim, flow_match, ready, vae_of_pictures


def animatediff() -> Any:
    torch.manual_seed(2)
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=4
    )
    return ready(
        diffusers.AnimateDiffPipeline(
            vae=vae_of_pictures(),
            text_encoder=None,
            tokenizer=None,
            unet=conditional_unet(),
            motion_adapter=adapter,
            scheduler=ddim(),
        )
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

    return ready(
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
    return ready(
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
    return ready(
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
    return ready(
        diffusers.StableAudioPipeline(
            vae=vae,
            text_encoder=None,
            projection_model=projection,
            tokenizer=None,
            transformer=transformer,
            scheduler=scheduler,
        )
    )
