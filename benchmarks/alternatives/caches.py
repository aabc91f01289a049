"""The step caches of diffusers on the small diffusion transformer, and how much of the network each of them ran.

``DiTTransformer2DModel`` is not among the networks that take a cache by ``enable_cache``. Its blocks are
``BasicTransformerBlock``, which the caches know; the mixin is all that is missing, and each cache wants something more:
see the functions that set them up.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from typing import Any

import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, SeaCacheConfig, TaylorSeerCacheConfig
from diffusers.models.cache_utils import CacheMixin
from safetensors.torch import load
from torch import Tensor, nn

from benchmarks.train_dit import CLASSES, MODEL_CONFIG, network_options
from parasolver_adapters.embedded import SCHEDULE
from parasolver_adapters.epsilon_models import guided

_ALPHA, _SIGMA = np.sqrt(SCHEDULE.alphas_cumprod), np.sqrt(1 - SCHEDULE.alphas_cumprod)
NOISE_SHARE = _SIGMA / (_ALPHA + _SIGMA)
"""Of a state, by timestep: the sigma of ``(1 - sigma) x_0 + sigma eps`` that the state is a multiple of."""


class CachedDiT(DiTTransformer2DModel, CacheMixin):
    """The network with ``enable_cache`` and ``cache_context``."""


def load_dit() -> CachedDiT:
    """The trained network, in float32 and evaluation mode; its result's ``sample`` is the velocity."""
    network = CachedDiT(**network_options(MODEL_CONFIG))
    network.load_state_dict(load(resources.files("benchmarks").joinpath("weights/dit.safetensors").read_bytes()))
    return network.eval().requires_grad_(False)


class Work:
    """Counts what runs of a network: the attention and feed-forward modules of its blocks, a row at a time.

    They are nearly all arithmetic of a transformer. What a cache leaves out, be it a block or a module, is not counted.
    """

    def __init__(self, network: DiTTransformer2DModel) -> None:
        self.modules = 0
        inner: list[nn.Module] = [part for block in network.transformer_blocks for part in (block.attn1, block.ff)]
        self.per_row = len(inner)
        for one in inner:  # their own forward is what a cache replaces: a layer inside tells whether it ran
            layer = one.to_q if hasattr(one, "to_q") else one.net[0]
            layer.register_forward_hook(self._count)

    def _count(self, layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        self.modules += len(given[0])

    def take(self) -> float:
        """Rows that ran since the last time, in rows of the whole network."""
        rows, self.modules = self.modules / self.per_row, 0
        return rows


class GuidedLoop:
    """``v = null + w (given - null)`` for a plain loop, which a cache is told the place in.

    Args:
        network: with or without a cache.
        work: counts its calls.
        labels: (batch,).
        guidance_scale: w.
        steps: of the loop.
        guided_steps: those with guidance; in the others the condition is called alone.

    Attributes:
        calls: rows a sample and share of the network that ran, of each call.
    """

    def __init__(
        self,
        network: CachedDiT,
        work: Work,
        labels: Tensor,
        guidance_scale: float,
        steps: int,
        guided_steps: Sequence[int] | None = None,
    ) -> None:
        self.network, self.work, self.labels, self.guidance_scale = network, work, labels, guidance_scale
        self.steps, self.guided_steps = steps, range(steps) if guided_steps is None else guided_steps
        self.calls: list[tuple[int, float]] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocities of x (batch, 1, 28, 28) at the timesteps t (batch,)."""
        step, times = len(self.calls), t.long()
        rows = 2 if step in self.guided_steps else 1
        null = torch.full_like(self.labels, CLASSES)
        labels = torch.cat([self.labels, null][:rows])
        place = {"step_index": step, "num_inference_steps": self.steps, "sigma": float(NOISE_SHARE[int(times[0])])}
        self.work.take()
        with self.network.cache_context("given and null", **place):
            v = self.network(torch.cat([x] * rows), torch.cat([times] * rows), class_labels=labels).sample
        self.calls.append((rows, self.work.take() / (rows * len(x))))
        return v if rows == 1 else guided(v[len(x) :], v[: len(x)], self.guidance_scale)


@contextlib.contextmanager
def cached(network: CachedDiT, config: Any) -> Iterator[None]:
    """The network with a new cache."""
    network.enable_cache(config)
    try:
        yield
    finally:
        network.disable_cache()


def magnitude_ratios(network: CachedDiT, sample: Callable[[], object], steps: int) -> list[float]:
    """MagCache's calibration: how the blocks' residual grows from step to step in one run of ``sample``."""
    printed = io.StringIO()
    config = MagCacheConfig(calibrate=True, num_inference_steps=steps)
    with cached(network, config), contextlib.redirect_stdout(printed):  # it prints them, and keeps no copy
        sample()
    return json.loads(next(line for line in printed.getvalue().splitlines() if line.startswith("[1.0,")))


def _pictures(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The states as SeaCache wants them, (channels, time, height, width), once each: null has the same."""
    states = args[0]
    return list(states[: len(states) // 2, :, None])


def first_block(threshold: float) -> FirstBlockCacheConfig:
    """Skips the other blocks while the first one's residual changes by less; needs a cache context in every call."""
    return FirstBlockCacheConfig(threshold=threshold)


def mag_cache(threshold: float, ratios: list[float]) -> MagCacheConfig:
    """Skips all blocks while the expected change of their residual adds up to less; needs a calibration.

    Its default of at most 3 skipped steps in a row bounds the gain; the bound grows with the threshold here.
    """
    return MagCacheConfig(
        threshold=threshold,
        max_skip_steps=3 if threshold < 0.2 else 6,
        mag_ratios=ratios,
        num_inference_steps=len(ratios),
    )


def taylor_seer(interval: int, order: int) -> TaylorSeerCacheConfig:
    """Runs one step in ``interval`` in full and extrapolates attention and feed-forward outputs between.

    Its default names (``attn``) match no module of this network (``attn1``), and it then does nothing without a word;
    its lite mode, made for networks that end in ``proj_out``, lets the blocks return zeros. So they are named here.
    """
    return TaylorSeerCacheConfig(
        cache_interval=interval,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"transformer_blocks\.\d+\.(attn1|ff)"],
    )


def sea_cache(threshold: float) -> SeaCacheConfig:
    """Skips all blocks while the filtered state changes by less; needs the states, the step and sigma in every call.

    Its default of at most 2 skipped steps in a row bounds the gain; there is no bound here.
    """
    return SeaCacheConfig(threshold=threshold, max_consecutive_cached=0, raw_vision_callback=_pictures)


def configurations(ratios: list[float]) -> Iterator[tuple[str, str, Any]]:
    """Cache, setting and configuration of all that are compared, from careful to bold."""
    for threshold in (0.06, 0.1, 0.2, 0.4):
        yield "FirstBlockCache", f"threshold {threshold:g}", first_block(threshold)
    for threshold in (0.03, 0.06, 0.12, 0.5):
        yield "MagCache", f"threshold {threshold:g}", mag_cache(threshold, ratios)
    for interval, order in ((2, 1), (3, 1), (4, 1), (6, 1), (4, 2)):
        yield "TaylorSeer", f"every {interval}, order {order}", taylor_seer(interval, order)
    for threshold in (0.05, 0.1, 0.15, 0.25):
        yield "SeaCache", f"threshold {threshold:g}", sea_cache(threshold)
