"""The U-Net and the classifier of Dhariwal and Nichol (2021), with the tensors' names of the published checkpoints.

Reference: "Diffusion Models Beat GANs on Image Synthesis", NeurIPS 2021, https://arxiv.org/abs/2105.05233, section 3
and appendix B.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)

_GROUPS = 32
_CHANNEL_MULT = {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)}


@dataclass(frozen=True)
class UNetConfig:
    """A network of this family; the names are those of the published command lines.

    Args:
        image_size: pixels along a side.
        num_channels: channels of the first level.
        num_res_blocks: residual blocks of each level.
        channel_mult: multipliers of ``num_channels``, one a level; None: those published for 64, 128, 256 and 512.
        attention_resolutions: at which sizes in pixels there is attention.
        num_heads: heads of each attention layer.
        num_head_channels: instead, channels of each head.
        num_heads_upsample: heads on the way up, if not as on the way down.
        num_classes: None for a network without class labels.
        learn_sigma: whether the network gives twice the channels, the second half for the variance.
        use_scale_shift_norm: whether the time scales and shifts the normalised features, or is added to them.
        resblock_updown: whether residual blocks change the resolution, or convolutions between them.
        use_new_attention_order: whether queries, keys and values are split before the heads, or after.
        dropout: of the training; evaluation mode does not use it.
        use_fp16: whether convolutions and attention compute in half precision.
        in_channels: channels of a picture.
    """

    image_size: int
    num_channels: int = 128
    num_res_blocks: int = 2
    channel_mult: tuple[float, ...] | None = None
    attention_resolutions: tuple[int, ...] = (16, 8)
    num_heads: int = 4
    num_head_channels: int | None = None
    num_heads_upsample: int | None = None
    num_classes: int | None = None
    learn_sigma: bool = False
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    dropout: float = 0.0
    use_fp16: bool = False
    in_channels: int = 3

    def __post_init__(self) -> None:
        if self.channel_mult is None and self.image_size not in _CHANNEL_MULT:
            sizes = ", ".join(map(str, _CHANNEL_MULT))
            raise ValueError(
                f"channel_mult: expected one multiplier a level for image_size={self.image_size}, got None "
                f"(known for {sizes})"
            )
        if self.image_size % 2 ** (len(self.widths) - 1):
            raise ValueError(f"image_size: expected a multiple of 2 ** {len(self.widths) - 1}, got {self.image_size}")
        odd = [width for width in self.widths if width % _GROUPS]
        if odd:
            raise ValueError(f"num_channels: each level needs a multiple of {_GROUPS} channels, got {odd[0]}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(int(mult * self.num_channels) for mult in self.channel_mult or _CHANNEL_MULT[self.image_size])

    def heads(self, channels: int, upward: bool = False) -> int:
        """Attention heads of a layer."""
        if self.num_head_channels is not None:
            if channels % self.num_head_channels:
                raise ValueError(f"num_head_channels: {self.num_head_channels} does not divide a layer of {channels}")
            return channels // self.num_head_channels
        return (self.num_heads_upsample if upward else None) or self.num_heads


class UNet(nn.Module):
    """``eps`` and, with ``learn_sigma``, the variance's interpolation weight, stacked along the channels."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        embedding = 4 * config.num_channels
        self.time_embed = _time_embedding(config.num_channels)
        if config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_classes, embedding)
        self.input_blocks, skips = _way_down(config, embedding)
        self.middle_block = _bottom(config, embedding)
        self.output_blocks = _way_up(config, embedding, skips)
        out_channels = config.in_channels * (2 if config.learn_sigma else 1)
        self.out = nn.Sequential(_Norm(config.widths[0]), nn.SiLU(), _conv(config.widths[0], out_channels))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict.

        Args:
            x: noisy pictures, (rows, channels, size, size), of data in [-1, 1].
            t: (rows,), timesteps of the training schedule; may be fractions.
            y: (rows,), class labels, if the network has classes.
        """
        if (y is None) != (self.config.num_classes is None):
            needs = "no labels" if self.config.num_classes is None else f"labels in 0..{self.config.num_classes - 1}"
            raise ValueError(f"labels: this network takes {needs}, got {'none' if y is None else 'labels'}")
        emb = self.time_embed(timestep_embedding(t, self.config.num_channels))
        if y is not None:
            emb = emb + self.label_emb(y)
        h, skips = x.to(torch.float16 if self.config.use_fp16 else x.dtype), []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h.to(x.dtype))

    def finish(self) -> UNet:
        """Ready for sampling, once the weights are loaded: evaluation mode, and half precision if so configured."""
        return _finish(self, self.config, self.input_blocks, self.middle_block, self.output_blocks)


class Classifier(nn.Module):
    """Logits of the class of a noisy picture: the way down of the U-Net, and attention pooling."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        if config.num_classes is None:
            raise ValueError("num_classes: a classifier needs classes, got None")
        self.config = config
        embedding = 4 * config.num_channels
        self.time_embed = _time_embedding(config.num_channels)
        self.input_blocks, _ = _way_down(config, embedding)
        self.middle_block = _bottom(config, embedding)
        width, size = config.widths[-1], config.image_size // 2 ** (len(config.widths) - 1)
        pool = _AttentionPool(size, width, config.heads(width), config.num_classes)
        self.out = nn.Sequential(_Norm(width), nn.SiLU(), pool)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """``(rows, num_classes)`` logits of pictures ``(rows, channels, size, size)`` at timesteps (rows,)."""
        emb = self.time_embed(timestep_embedding(t, self.config.num_channels))
        h = x.to(torch.float16 if self.config.use_fp16 else x.dtype)
        for block in self.input_blocks:
            h = block(h, emb)
        return self.out(self.middle_block(h, emb).to(x.dtype))

    def finish(self) -> Classifier:
        """As :meth:`UNet.finish`."""
        return _finish(self, self.config, self.input_blocks, self.middle_block)


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """``cos(w t), sin(w t)`` for ``channels / 2`` frequencies w from 1 to nearly 1/10000, (rows, channels), float32."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    phase = t.float()[:, None] * frequencies
    return F.pad(torch.cat([phase.cos(), phase.sin()], dim=1), (0, channels % 2))


def _time_embedding(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, 4 * channels), nn.SiLU(), nn.Linear(4 * channels, 4 * channels))


def _way_down(config: UNetConfig, embedding: int) -> tuple[nn.ModuleList, list[int]]:
    """Blocks from full resolution to the lowest, and the channels that each of them gives."""
    channels, resolution = config.widths[0], config.image_size
    blocks: list[nn.Module] = [_Stage(_conv(config.in_channels, channels))]
    skips = [channels]
    for level, width in enumerate(config.widths):
        for _ in range(config.num_res_blocks):
            stage = [_ResBlock(config, channels, embedding, width), *_attention(config, width, resolution)]
            blocks.append(_Stage(*stage))
            channels = width
            skips.append(channels)
        if level < len(config.widths) - 1:
            blocks.append(_Stage(_change_of_resolution(config, channels, embedding, "down")))
            skips.append(channels)
            resolution //= 2
    return nn.ModuleList(blocks), skips


def _bottom(config: UNetConfig, embedding: int) -> _Stage:
    width = config.widths[-1]
    before, after = (_ResBlock(config, width, embedding, width) for _ in range(2))
    return _Stage(before, _Attention(width, config.heads(width), config.use_new_attention_order), after)


def _way_up(config: UNetConfig, embedding: int, skips: list[int]) -> nn.ModuleList:
    """Blocks back to full resolution; each takes what a block on the way down gave, last first."""
    channels, resolution = config.widths[-1], config.image_size // 2 ** (len(config.widths) - 1)
    remaining, blocks = list(skips), []
    for level, width in reversed(list(enumerate(config.widths))):
        for i in range(config.num_res_blocks + 1):
            stage: list[nn.Module] = [_ResBlock(config, channels + remaining.pop(), embedding, width)]
            stage += _attention(config, width, resolution, upward=True)
            channels = width
            if level > 0 and i == config.num_res_blocks:
                stage.append(_change_of_resolution(config, channels, embedding, "up"))
                resolution *= 2
            blocks.append(_Stage(*stage))
    return nn.ModuleList(blocks)


def _attention(config: UNetConfig, width: int, resolution: int, upward: bool = False) -> Iterator[nn.Module]:
    """The attention layer of a block, if there is attention at that resolution."""
    if resolution in config.attention_resolutions:
        yield _Attention(width, config.heads(width, upward), config.use_new_attention_order)


def _change_of_resolution(config: UNetConfig, channels: int, embedding: int, way: Literal["up", "down"]) -> nn.Module:
    if config.resblock_updown:
        return _ResBlock(config, channels, embedding, channels, way)
    return _Upsample(channels) if way == "up" else _Downsample(channels)


class _Stage(nn.ModuleList):
    """Layers one after another, of which the residual blocks are told the time."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(layers)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            h = layer(h, emb) if isinstance(layer, _ResBlock) else layer(h)
        return h


class _ResBlock(nn.Module):
    """Two convolutions beside a skip connection, with the time in between, and a change of resolution before both."""

    def __init__(
        self, config: UNetConfig, channels: int, embedding: int, width: int, way: Literal["up", "down"] | None = None
    ) -> None:
        super().__init__()
        self._way, self._scale_shift = way, config.use_scale_shift_norm
        self.in_layers = nn.Sequential(_Norm(channels), nn.SiLU(), _conv(channels, width))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * width if self._scale_shift else width))
        self.out_layers = nn.Sequential(_Norm(width), nn.SiLU(), nn.Dropout(config.dropout), _conv(width, width))
        self.skip_connection = nn.Identity() if width == channels else nn.Conv2d(channels, width, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, convolution = self.in_layers
        h = convolution(_resample(activation(norm(x)), self._way))
        time = self.emb_layers(emb).to(h.dtype)[:, :, None, None]
        if self._scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + time)
        return self.skip_connection(_resample(x, self._way)) + h


def _resample(x: Tensor, way: str | None) -> Tensor:
    if way == "up":
        return F.interpolate(x, scale_factor=2, mode="nearest")
    return F.avg_pool2d(x, 2) if way == "down" else x


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(_resample(x, "up"))


class _Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class _Attention(nn.Module):
    """Self-attention over the pixels, added to its input."""

    def __init__(self, channels: int, heads: int, new_order: bool) -> None:
        super().__init__()
        self._heads, self._new_order = heads, new_order
        self.norm = _Norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2)
        mixed = _attend(self.qkv(self.norm(pixels)), self._heads, self._new_order)
        return (pixels + self.proj_out(mixed)).view(x.shape)


class _AttentionPool(nn.Module):
    """What a query of the mean pixel gathers from all of them, and from itself."""

    def __init__(self, size: int, channels: int, heads: int, out_channels: int) -> None:
        super().__init__()
        self._heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(channels, size**2 + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2)
        pixels = torch.cat([pixels.mean(dim=2, keepdim=True), pixels], dim=2) + self.positional_embedding.to(x.dtype)
        return self.c_proj(_attend(self.qkv_proj(pixels), self._heads, new_order=True))[:, :, 0]


def _attend(qkv: Tensor, heads: int, new_order: bool) -> Tensor:
    """Scaled dot-product attention between pixels, ``(rows, 3 channels, pixels)`` to ``(rows, channels, pixels)``.

    The channels are numbered (kind, head, channel) in the new order and (head, kind, channel) in the old one.
    """
    rows, width, pixels = qkv.shape
    channels = width // 3
    if new_order:
        split = qkv.view(rows, 3, heads, channels // heads, pixels)
    else:
        split = qkv.view(rows, heads, 3, channels // heads, pixels).transpose(1, 2)
    query, key, value = split.transpose(-1, -2).contiguous().unbind(1)  # the fast kernels need it
    mixed = F.scaled_dot_product_attention(query, key, value)
    return mixed.transpose(-1, -2).reshape(rows, channels, pixels)


class _Norm(nn.GroupNorm):
    """Group normalisation that computes in float32, whatever it is given."""

    def __init__(self, channels: int) -> None:
        super().__init__(_GROUPS, channels)

    def forward(self, input: Tensor) -> Tensor:
        wide = input if input.dtype == self.weight.dtype else input.to(self.weight.dtype)
        return super().forward(wide).to(input.dtype)


def _conv(channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 3, padding=1)


def _finish(network: Network, config: UNetConfig, *torso: nn.Module) -> Network:
    if config.use_fp16:
        for module in (module for part in torso for module in part.modules()):
            if isinstance(module, (nn.Conv1d, nn.Conv2d)):
                module.half()
    return network.eval().requires_grad_(False)
