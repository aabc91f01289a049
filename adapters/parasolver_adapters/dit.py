"""Checkpoints of facebookresearch/DiT: diffusion transformers on the latents of an autoencoder, of timm's layers.

Reference: Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023, https://arxiv.org/abs/2212.09748.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parasolver_adapters.checkpoints import load_weights, read_state_dict
from parasolver_adapters.epsilon_models import EpsilonModel, Labels, LearnedVariance, space_timesteps, starting_noise
from parasolver_adapters.extras import install
from parasolver_adapters.guided_diffusion.unet import timestep_embedding
from parasolver_core import NoiseSchedule

__all__ = [
    "PRESETS",
    "DiT",
    "DiTConfig",
    "DiTDenoiser",
    "LearnedVariance",
    "load_dit",
    "load_vae",
    "space_timesteps",
    "starting_noise",
]

_FREQUENCIES = 256  # channels of the timestep before its layers
_PIXELS_A_LATENT = 8


@dataclass(frozen=True)
class DiTConfig:
    """A diffusion transformer.

    Args:
        hidden_size: channels of a token.
        depth: number of blocks.
        num_heads: attention heads.
        patch_size: latents along the side of a token.
        input_size: latents along the side of a picture, pixels / 8.
        in_channels: channels of a latent.
        num_classes: classes without the label for "no class", which has number ``num_classes``.
        null_class: whether the network was trained with that label.
        learn_sigma: whether it gives twice the channels, the second half for the variance.
    """

    hidden_size: int
    depth: int
    num_heads: int
    patch_size: int = 2
    input_size: int = 32
    in_channels: int = 4
    num_classes: int = 1000
    null_class: bool = True
    learn_sigma: bool = True

    def __post_init__(self) -> None:
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size: expected a multiple of patch_size={self.patch_size}, got {self.input_size}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size: expected a multiple of num_heads={self.num_heads}, got {self.hidden_size}")

    @property
    def labels(self) -> int:
        """How many labels the network knows, "no class" included."""
        return self.num_classes + self.null_class


_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}

PRESETS: dict[str, DiTConfig] = {
    f"dit-{size}-{patch}-{pixels}": DiTConfig(*shape, patch_size=patch, input_size=pixels // _PIXELS_A_LATENT)
    for size, shape in _SIZES.items()
    for patch in (2, 4, 8)
    for pixels in (256, 512)
}
"""The paper's architectures at 256 and 512 pixels; weights were published for "dit-xl-2-256" and "dit-xl-2-512"."""


class DiT(nn.Module):
    """``eps`` and, with ``learn_sigma``, the variance's interpolation weight, stacked along the channels."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.x_embedder = _timm().PatchEmbed(config.input_size, config.patch_size, config.in_channels, size)
        self.t_embedder = _TimestepEmbedder(size)
        self.y_embedder = _LabelEmbedder(config.labels, size)
        self.pos_embed = nn.Parameter(torch.zeros(1, (config.input_size // config.patch_size) ** 2, size))
        self.blocks = nn.ModuleList(_Block(size, config.num_heads) for _ in range(config.depth))
        out_channels = config.in_channels * (2 if config.learn_sigma else 1)
        self.final_layer = _FinalLayer(size, config.patch_size**2 * out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """Predict.

        Args:
            x: noisy latents, (rows, in_channels, input_size, input_size).
            t: (rows,), timesteps of the training schedule; may be fractions.
            y: (rows,), class labels; ``num_classes`` is "no class".
        """
        if y is None:
            raise ValueError(f"labels: this network takes labels in 0..{self.config.labels - 1}, got none")
        condition = self.t_embedder(t) + self.y_embedder(y)
        tokens = self.x_embedder(x.to(self.pos_embed.dtype)) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self._pictures(self.final_layer(tokens, condition)).to(x.dtype)

    def _pictures(self, tokens: Tensor) -> Tensor:
        """Tokens (rows, h w, p p channels) side by side, (rows, channels, h p, w p)."""
        patch, side = self.config.patch_size, self.config.input_size // self.config.patch_size
        grid = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (side, side))
        return grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class _TimestepEmbedder(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCIES, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(t, _FREQUENCIES).to(next(self.mlp.parameters()).dtype))


class _LabelEmbedder(nn.Module):
    def __init__(self, labels: int, size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(labels, size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class _Block(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the condition (adaLN-Zero, section 3.2)."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        layers = _timm()
        self.attn = layers.Attention(size, num_heads=heads, qkv_bias=True)
        self.mlp = layers.Mlp(size, hidden_features=4 * size, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 6 * size))

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(condition)[:, None].chunk(6, dim=2)
        tokens = tokens + gate * self.attn(_modulated(tokens, shift, scale))
        return tokens + gate_mlp * self.mlp(_modulated(tokens, shift_mlp, scale_mlp))


class _FinalLayer(nn.Module):
    def __init__(self, size: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 2 * size))

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=2)
        return self.linear(_modulated(tokens, shift, scale))


def _modulated(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale) + shift


def get_preset(preset: str | DiTConfig) -> DiTConfig:
    """The architecture of that name, or the architecture itself."""
    if isinstance(preset, DiTConfig):
        return preset
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, or a DiTConfig, got {preset!r}")
    return PRESETS[preset]


def load_dit(path: str | Path, config: DiTConfig, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> DiT:
    """The network with the weights of a checkpoint file, ready for sampling.

    Args:
        path: see :func:`~parasolver_adapters.checkpoints.read_state_dict`; every key must match. A file of the training
            script gives its averaged weights.
        config: its architecture.
        device: where it computes.
        dtype: what it computes in; pictures go in and out as they are.
    """
    with torch.device("meta"):
        network = DiT(config)
    load_weights(network, read_state_dict(path), str(path), dtype)
    return network.eval().requires_grad_(False).to(device)


def load_vae(folder: str | Path, device: Any = "cpu") -> Any:
    """The autoencoder in a folder of diffusers, such as a copy of "stabilityai/sd-vae-ft-mse"; safetensors only."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(str(folder), use_safetensors=True, local_files_only=True)
    return vae.eval().requires_grad_(False).to(device)


@dataclass(frozen=True, eq=False)
class DiTDenoiser(EpsilonModel):
    """A DiT network as ``eps = denoiser(x, t)``, for DDIM and DPM-Solver; for DDPM see :class:`LearnedVariance`.

    The arguments are those of :class:`~parasolver_adapters.epsilon_models.EpsilonModel`. Published samples were made
    with DDPM on 250 timesteps, ``guidance_scale=4``, and guidance of the first three channels only, which is what
    ``guided_channels`` is by default; None guides all of them.

    Example::

        name = "dit-xl-2-256"
        model = DiTDenoiser.load("DiT-XL-2-256x256.pt", name, labels=[207, 360], guidance_scale=4.0)
        x_T = starting_noise(2, model.event, seed=0)
        solution = solve(model, x_T, model.timesteps(50), DDIM(model.schedule), window=16)
        pictures = model.decode(solution.sample, load_vae("sd-vae-ft-mse"))
    """

    guided_channels: int | None = 3

    @classmethod
    def load(
        cls,
        path: str | Path,
        preset: str | DiTConfig,
        labels: Labels,
        guidance_scale: float | None = None,
        *,
        device: Any = "cpu",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> DiTDenoiser:
        """Load a checkpoint.

        Args:
            path: a ``.safetensors`` or ``.pt`` file; its keys must match the preset's, every one.
            preset: a name in :data:`PRESETS`, or a :class:`DiTConfig` for a network of your own.
            labels: the class of all samples, or one of each sample of the batch; 1000 is "no class".
            guidance_scale: of classifier-free guidance.

        Other arguments:
            device, dtype: where and in what to compute.
            options: further arguments of the class, such as ``guided_channels``.

        Raises:
            CheckpointError: the file is damaged, unsafe, or of another network.
        """
        return cls.of(load_dit(path, get_preset(preset), device, dtype), labels, guidance_scale, **options)

    @classmethod
    def of(cls, network: DiT, labels: Labels, guidance_scale: float | None = None, **options: Any) -> DiTDenoiser:
        """Around a network that has its weights."""
        config = network.config
        return cls(
            network,
            NoiseSchedule.linear(),
            labels,
            num_classes=config.labels,
            learn_sigma=config.learn_sigma,
            guidance_scale=guidance_scale,
            null_label=config.num_classes if config.null_class else None,
            **options,
        )

    @property
    def event(self) -> tuple[int, int, int]:
        """Shape of the latents of one picture."""
        if not isinstance(self.network, DiT):
            raise TypeError(f"network: only a DiT knows its size, got {type(self.network).__name__}")
        config = self.network.config
        return config.in_channels, config.input_size, config.input_size

    @staticmethod
    def decode(latents: Tensor, vae: Any) -> Tensor:
        """Pictures (batch, 3, 8 size, 8 size), mostly within [-1, 1].

        Args:
            latents: (batch, channels, size, size), samples.
            vae: a diffusers ``AutoencoderKL``; see :func:`load_vae`. Pictures are decoded one by one, to save memory.
        """
        scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
        with torch.no_grad():
            return torch.cat([vae.decode(latents, return_dict=False)[0] for latents in scaled.split(1)])


def _timm() -> Any:
    try:
        import timm.layers
    except ImportError as error:
        raise ImportError(f"DiT is built from timm's layers: {install('timm')}") from error
    return timm.layers
