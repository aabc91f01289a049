"""Checkpoints of openai/guided-diffusion (ADM): ImageNet at 64 to 512 pixels, LSUN, and networks trained like them.

Reference: Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", NeurIPS 2021,
https://arxiv.org/abs/2105.05233.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from parasolver_adapters.checkpoints import load_weights, read_state_dict
from parasolver_adapters.epsilon_models import (
    ClassifierGuidance,
    EpsilonModel,
    Labels,
    LearnedVariance,
    space_timesteps,
    starting_noise,
)
from parasolver_adapters.guided_diffusion.unet import Classifier, UNet, UNetConfig
from parasolver_core import NoiseSchedule
from parasolver_core.samplers.schedules import DiscreteSchedule

__all__ = [
    "PRESETS",
    "Classifier",
    "ClassifierGuidance",
    "GuidedDiffusionDenoiser",
    "LearnedVariance",
    "Preset",
    "UNet",
    "UNetConfig",
    "load_classifier",
    "load_unet",
    "space_timesteps",
    "starting_noise",
]


@dataclass(frozen=True)
class Preset:
    """How a published network was trained.

    Args:
        unet: its network.
        noise_schedule: "linear" or "cosine", of 1000 steps.
        classifier: the published classifier of noisy pictures that goes with it.
        file: the name under which the weights were published.
    """

    unet: UNetConfig
    noise_schedule: Literal["linear", "cosine"] = "linear"
    classifier: UNetConfig | None = None
    file: str = ""

    @property
    def schedule(self) -> DiscreteSchedule:
        """The schedule of the training."""
        return NoiseSchedule.squared_cosine(1000) if self.noise_schedule == "cosine" else NoiseSchedule.linear()


def _unet(image_size: int, **options: Any) -> UNetConfig:
    common: dict[str, Any] = {"num_channels": 256, "learn_sigma": True, "resblock_updown": True, "num_classes": 1000}
    if "num_heads" not in options:
        common["num_head_channels"] = 64
    return UNetConfig(image_size, attention_resolutions=(32, 16, 8), **(common | options))


def _classifier(image_size: int, depth: int = 2) -> UNetConfig:
    return UNetConfig(
        image_size,
        num_res_blocks=depth,
        attention_resolutions=(32, 16, 8),
        num_head_channels=64,
        num_classes=1000,
        resblock_updown=True,
    )


_LSUN = _unet(256, num_classes=None, dropout=0.1)

PRESETS: dict[str, Preset] = {
    "adm-64": Preset(
        _unet(64, num_channels=192, num_res_blocks=3, use_new_attention_order=True, dropout=0.1),
        "cosine",
        _classifier(64, depth=4),
        "64x64_diffusion.pt",
    ),
    "adm-128": Preset(_unet(128, num_heads=4), classifier=_classifier(128), file="128x128_diffusion.pt"),
    "adm-256": Preset(_unet(256), classifier=_classifier(256), file="256x256_diffusion.pt"),
    "adm-256-uncond": Preset(
        _unet(256, num_classes=None), classifier=_classifier(256), file="256x256_diffusion_uncond.pt"
    ),
    "adm-512": Preset(_unet(512), classifier=_classifier(512), file="512x512_diffusion.pt"),
    "lsun-bedroom": Preset(_LSUN, file="lsun_bedroom.pt"),
    "lsun-cat": Preset(_LSUN, file="lsun_cat.pt"),
    "lsun-horse": Preset(_LSUN, file="lsun_horse.pt"),
    "lsun-horse-nodropout": Preset(replace(_LSUN, dropout=0.0), file="lsun_horse_nodropout.pt"),
}
"""The published networks by name; all of them learned their variance."""


def get_preset(preset: str | Preset) -> Preset:
    """The preset of that name, or the preset itself."""
    if isinstance(preset, Preset):
        return preset
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, or a Preset, got {preset!r}")
    return PRESETS[preset]


def load_unet(path: str | Path, config: UNetConfig, device: Any = "cpu") -> UNet:
    """The network with the weights of a checkpoint file, ready for sampling.

    Args:
        path: see :func:`~parasolver_adapters.checkpoints.read_state_dict`; every key must match.
        config: its architecture.
        device: where it computes.
    """
    with torch.device("meta"):
        network = UNet(config)
    load_weights(network, read_state_dict(path), str(path))
    return network.finish().to(device)


def load_classifier(path: str | Path, config: UNetConfig, device: Any = "cpu") -> Classifier:
    """The same for a classifier of noisy pictures."""
    with torch.device("meta"):
        network = Classifier(config)
    load_weights(network, read_state_dict(path), str(path))
    return network.finish().to(device)


@dataclass(frozen=True, eq=False)
class GuidedDiffusionDenoiser(EpsilonModel):
    """An ADM network as ``eps = denoiser(x, t)``, for DDIM and DPM-Solver; for DDPM see :class:`LearnedVariance`.

    The arguments are those of :class:`~parasolver_adapters.epsilon_models.EpsilonModel`. Pictures are (3, size, size)
    in [-1, 1]; the predicted clean sample is clipped to that range, as in the published samples.

    Example::

        model = GuidedDiffusionDenoiser.load("256x256_diffusion.pt", "adm-256", labels=[207, 360])
        x_T = starting_noise(2, model.event, seed=0)
        solution = solve(model, x_T, model.timesteps("ddim50"), DDIM(model.schedule), window=16)
        pictures = solution.sample
    """

    clip_denoised: bool = True

    @classmethod
    def load(
        cls,
        path: str | Path,
        preset: str | Preset,
        labels: Labels | None = None,
        *,
        classifier: str | Path | None = None,
        classifier_scale: float = 1.0,
        use_fp16: bool = False,
        device: Any = "cpu",
        **options: Any,
    ) -> GuidedDiffusionDenoiser:
        """Load a checkpoint.

        Args:
            path: a ``.safetensors`` or ``.pt`` file; its keys must match the preset's, every one.
            preset: a name in :data:`PRESETS`, or a :class:`Preset` for a network of your own.
            labels: the class of all samples, or one of each sample of the batch.

        Other arguments:
            classifier: file of the classifier that guides towards the labels; the network may be unconditional.
            classifier_scale: of its gradient; published were 1, 0.5, 1 (10 without labels) and 4 for 64 to 512 pixels.
            use_fp16: compute convolutions and attention in half precision, as the published samples of most presets.
            device: where to compute.
            options: further arguments of the class, such as ``clip_denoised``, ``guidance_scale`` and ``null_label``.

        Raises:
            CheckpointError: the file is damaged, unsafe, or of another network.
        """
        chosen = get_preset(preset)
        config, guide = replace(chosen.unet, use_fp16=use_fp16), None
        if classifier is not None:
            if chosen.classifier is None:
                raise ValueError(f"classifier: the preset {preset!r} has none; got {str(classifier)!r}")
            network = load_classifier(classifier, replace(chosen.classifier, use_fp16=use_fp16), device)
            guide = ClassifierGuidance(network, classifier_scale)
        return cls(
            load_unet(path, config, device),
            chosen.schedule,
            labels,
            num_classes=config.num_classes,
            learn_sigma=config.learn_sigma,
            classifier=guide,
            **options,
        )

    @property
    def event(self) -> tuple[int, int, int]:
        """Shape of one picture."""
        if not isinstance(self.network, UNet):
            raise TypeError(f"network: only a UNet knows its size, got {type(self.network).__name__}")
        config = self.network.config
        return config.in_channels, config.image_size, config.image_size
