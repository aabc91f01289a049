"""Networks of the size that people run, with random weights: what a call costs does not depend on what was learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from benchmarks.gpu.lookalikes import OBSERVATION, AudioDiT, RobotUNet
from parasolver_adapters.dit import PRESETS as DIT_PRESETS
from parasolver_adapters.dit import DiT, DiTConfig
from parasolver_adapters.guided_diffusion import PRESETS as ADM_PRESETS
from parasolver_adapters.guided_diffusion import UNet


@dataclass(frozen=True)
class Network:
    """A network and how it is called.

    Args:
        module: on the device, in evaluation mode.
        call: its prediction for x (rows, *event) and t (rows,).
        event: shape of a sample.
        rows: of a node: two with guidance.
    """

    module: nn.Module
    call: Callable[[Tensor, Tensor], Tensor]
    event: tuple[int, ...]
    rows: int

    def nodes(self, x: Tensor, t: Tensor) -> Tensor:
        """The calls of as many nodes as x has rows."""
        return self.call(torch.cat([x] * self.rows), torch.cat([t] * self.rows))


Make = Callable[[torch.device, bool], Network]


def built(make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> tuple[Any, torch.dtype]:
    """With weights of which none is zero and which keep the size of activations; float32 on a CPU."""
    torch.manual_seed(0)
    with torch.device(device):
        module = make()
    dtype = dtype if device.type == "cuda" else torch.float32
    nn.Module.to(module, dtype=dtype)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim > 1:
                weight.normal_(0, weight[0].numel() ** -0.5)
    return module.eval().requires_grad_(False), dtype


def stable_diffusion(side: int, cross: int, **config: Any) -> Make:
    """The U-Nets of Stable Diffusion 1 and 2."""

    def make(device: torch.device, tiny: bool) -> Network:
        size = 16 if tiny else side
        small = {"block_out_channels": (32, 64, 64, 64), "attention_head_dim": 8} if tiny else {}
        options = {"sample_size": size, "cross_attention_dim": cross, **config, **small}
        module, dtype = built(lambda: UNet2DConditionModel(**options), device, torch.float16)
        prompt = torch.randn(1, 77, cross, device=device, dtype=dtype)

        def call(x: Tensor, t: Tensor) -> Tensor:
            return module(x.to(dtype), t, prompt.expand(len(x), -1, -1), return_dict=False)[0]

        return Network(module, call, (4, size, size), 2)

    return make


SDXL = {
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "cross_attention_dim": 2048,
}


def sdxl(device: torch.device, tiny: bool) -> Network:
    small = {"block_out_channels": (32, 64, 64), "transformer_layers_per_block": 1, "attention_head_dim": 8}
    size = 16 if tiny else 128
    options = {"sample_size": size, **SDXL, **(small if tiny else {})}
    module, dtype = built(lambda: UNet2DConditionModel(**options), device, torch.float16)
    prompt = torch.randn(1, 77, 2048, device=device, dtype=dtype)
    pooled = torch.randn(1, 1280, device=device, dtype=dtype)
    sizes = torch.full((1, 6), 1024.0, device=device, dtype=dtype)

    def call(x: Tensor, t: Tensor) -> Tensor:
        k = len(x)
        added = {"text_embeds": pooled.expand(k, -1), "time_ids": sizes.expand(k, -1)}
        return module(x.to(dtype), t, prompt.expand(k, -1, -1), added_cond_kwargs=added, return_dict=False)[0]

    return Network(module, call, (4, size, size), 2)


def dit(pixels: int) -> Make:
    """DiT-XL/2."""

    def make(device: torch.device, tiny: bool) -> Network:
        config = DiTConfig(64, 2, 4, input_size=8) if tiny else DIT_PRESETS[f"dit-xl-2-{pixels}"]
        module, dtype = built(lambda: DiT(config), device, torch.bfloat16)
        side = config.input_size
        return Network(module, lambda x, t: module(x.to(dtype), t, t % 1000), (4, side, side), 2)

    return make


def adm(device: torch.device, tiny: bool) -> Network:
    """The class-conditional U-Net of guided-diffusion for 256 pixels."""
    small = {"num_channels": 32, "num_head_channels": 32, "image_size": 64} if tiny else {}
    config = replace(ADM_PRESETS["adm-256"].unet, use_fp16=device.type == "cuda", **small)
    module, _ = built(lambda: UNet(config), device, torch.float32)
    module.finish()
    return Network(module, lambda x, t: module(x, t, t % 1000), (3, config.image_size, config.image_size), 1)


def church(device: torch.device, tiny: bool) -> Network:
    """The U-Net of google/ddpm-ema-church-256."""
    side, widths = (64, (8,) * 6) if tiny else (256, (128, 128, 256, 256, 512, 512))
    options = {
        "sample_size": side,
        "block_out_channels": widths,
        "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
        "attention_head_dim": None,
        "norm_num_groups": 8 if tiny else 32,
        "downsample_padding": 0,
    }
    module, dtype = built(lambda: UNet2DModel(**options), device, torch.float16)
    return Network(module, lambda x, t: module(x.to(dtype), t, return_dict=False)[0], (3, side, side), 1)


def flux_like(pixels: int) -> Make:
    """A quarter of FLUX.1's blocks at their full width: 5 of 19 and 10 of 38."""

    def make(device: torch.device, tiny: bool) -> Network:
        blocks: dict[str, Any] = {"num_layers": 5, "num_single_layers": 10}
        if tiny:
            blocks = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
            blocks["axes_dims_rope"] = (4, 6, 6)
        cross, side = (64, 4) if tiny else (4096, pixels // 16)
        options = {"joint_attention_dim": cross, "pooled_projection_dim": 768, "guidance_embeds": True, **blocks}
        module, dtype = built(lambda: FluxTransformer2DModel(**options), device, torch.bfloat16)
        text = torch.randn(1, 512, cross, device=device, dtype=dtype)
        pooled = torch.randn(1, 768, device=device, dtype=dtype)
        places = torch.cartesian_prod(*[torch.arange(n, device=device, dtype=torch.float32) for n in (1, side, side)])

        def call(x: Tensor, t: Tensor) -> Tensor:
            k = len(x)
            conditions = (text.expand(k, -1, -1), pooled.expand(k, -1), (t / 1000).to(dtype), places)
            scale = torch.full((k,), 3.5, device=device, dtype=dtype)
            return module(x.to(dtype), *conditions, places.new_zeros(512, 3), scale, return_dict=False)[0]

        return Network(module, call, (side * side, 64), 1)

    return make


def robot(device: torch.device, tiny: bool) -> Network:
    widths = (32, 64, 128) if tiny else (512, 1024, 2048)
    module, dtype = built(lambda: RobotUNet(widths), device, torch.bfloat16)
    observation = torch.randn(1, OBSERVATION, device=device, dtype=dtype)
    return Network(module, lambda x, t: module(x.to(dtype), t, observation), (16, 2), 1)


def audio(device: torch.device, tiny: bool) -> Network:
    size, frames = ((64, 2, 4), 50) if tiny else ((1024, 22, 16), 1000)
    module, dtype = built(lambda: AudioDiT(*size), device, torch.bfloat16)
    return Network(module, lambda x, t: module(x.to(dtype), t), (frames, 100), 2)


NETWORKS: dict[str, Make] = {
    "DiT-XL/2, 256 pixels, guidance": dit(256),
    "robot 1-D U-Net": robot,
    "SD 1.5, 512 pixels, guidance": stable_diffusion(64, 768),
    "church DDPM, 256 pixels": church,
    "audio DiT, 0.3 B, guidance": audio,
    "SDXL, 1024 pixels, guidance": sdxl,
    "ADM, 256 pixels": adm,
    "Flux-like, 512 pixels": flux_like(512),
    "DiT-XL/2, 512 pixels, guidance": dit(512),
    "SD 2.1, 768 pixels, guidance": stable_diffusion(
        96, 1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
    ),
    "Flux-like, 1024 pixels": flux_like(1024),
}
