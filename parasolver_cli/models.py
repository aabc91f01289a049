"""The networks that the commands sample from, guided as the options say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from parasolver_adapters import dit, guided_diffusion
from parasolver_adapters.epsilon_models import EpsilonModel

EMBEDDED = "fashion-mnist"
PRESETS = (EMBEDDED, *guided_diffusion.PRESETS, *dit.PRESETS)
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What is sampled from.

    Args:
        labels: in turn for the pictures; empty: drawn from the seed; None: "no class".
        device: where the network computes.
    """

    checkpoint: Path | None = None
    preset: str = EMBEDDED
    seed: int = 0
    count: int = 1
    labels: tuple[int, ...] | None = ()
    guidance_scale: float | None = None
    guide_all_channels: bool = False
    classifier: Path | None = None
    classifier_scale: float | None = None
    vae: Path | None = None
    device: str = "auto"
    dtype: str = "float32"


@dataclass(frozen=True)
class Loaded:
    """A model, the shape of one sample, and how samples become pictures in [-1, 1] of one or three channels."""

    model: EpsilonModel
    event: tuple[int, ...]
    decode: Callable[[Tensor], Tensor]
    labels: list[int] | None
    note: str = ""
    costly: bool = False  # decoding


def load(settings: ModelSettings) -> Loaded:
    """The model that the settings name, guided as they say."""
    if settings.preset == EMBEDDED:
        if settings.checkpoint is not None:
            raise ValueError(
                "preset: a checkpoint needs the name of its network; give --preset, such as dit-xl-2-256 or adm-256"
            )
        return _embedded(settings)
    if settings.checkpoint is None:
        raise ValueError(f"checkpoint: the preset {settings.preset} needs a file with its weights; give --checkpoint")
    if settings.preset in dit.PRESETS:
        return _dit(settings, settings.checkpoint)
    return _guided_diffusion(settings, settings.checkpoint)


def _embedded(settings: ModelSettings) -> Loaded:
    from parasolver_adapters import embedded

    _refuse(settings, "the embedded model", "classifier", "classifier_scale", "vae", "guide_all_channels")
    labels = _labels(settings, len(embedded.CLASS_NAMES), embedded.NO_CLASS)
    network = embedded.load_embedded_model(_dtype(settings), settings.device)
    kind = network.dtype

    def predict(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return network(x.to(kind), t, class_labels=y, return_dict=False)[0].to(x.dtype)

    model = EpsilonModel(
        predict,
        embedded.SCHEDULE,
        labels,
        num_classes=len(embedded.CLASS_NAMES) + 1,
        learn_sigma=False,
        guidance_scale=settings.guidance_scale,
        null_label=embedded.NO_CLASS,
    )
    return Loaded(model, embedded.SAMPLE_SHAPE, lambda sample: sample, labels)


def _guided_diffusion(settings: ModelSettings, checkpoint: Path) -> Loaded:
    _refuse(settings, f"the preset {settings.preset}", "guidance_scale", "vae", "guide_all_channels")
    if settings.classifier is None:
        _refuse(settings, "sampling without a classifier", "classifier_scale")
    preset = guided_diffusion.PRESETS[settings.preset]
    if settings.dtype == "bfloat16":
        raise ValueError("dtype: these networks compute in float32 or float16, got bfloat16")
    if settings.labels is None and preset.unet.num_classes is not None:
        raise ValueError("labels: this network was trained with a class for every picture, got none")
    if preset.unet.num_classes is None and settings.classifier is None and settings.labels:
        raise ValueError(f"labels: the preset {settings.preset} has no classes, got {settings.labels[0]}")
    classes = preset.unet.num_classes or (1000 if settings.classifier else 0)
    labels = _labels(settings, classes, None) if classes else None
    model = guided_diffusion.GuidedDiffusionDenoiser.load(
        checkpoint,
        preset,
        labels,
        classifier=settings.classifier,
        classifier_scale=1.0 if settings.classifier_scale is None else settings.classifier_scale,
        use_fp16=settings.dtype == "float16",
        device=settings.device,
    )
    return Loaded(model, model.event, lambda sample: sample, labels)


def _dit(settings: ModelSettings, checkpoint: Path) -> Loaded:
    _refuse(settings, f"the preset {settings.preset}", "classifier", "classifier_scale")
    config = dit.PRESETS[settings.preset]
    labels = _labels(settings, config.num_classes, config.num_classes)
    vae = None if settings.vae is None else dit.load_vae(settings.vae, settings.device)
    model = dit.DiTDenoiser.load(
        checkpoint,
        config,
        labels,
        settings.guidance_scale,
        device=settings.device,
        dtype=_dtype(settings),
        **({"guided_channels": None} if settings.guide_all_channels else {}),
    )
    if vae is None:
        note = "The pictures show three channels of the latents: give --vae, a folder of diffusers, to decode them."
        return Loaded(model, model.event, lambda sample: sample[:, :3] / sample.abs().amax(), labels, note)
    return Loaded(model, model.event, lambda sample: model.decode(sample, vae), labels, costly=True)


def _refuse(settings: ModelSettings, what: str, *options: str) -> None:
    for name in options:
        if getattr(settings, name) not in (None, False):
            raise ValueError(f"{name}: {what} has no use for it, got {getattr(settings, name)}")


def _labels(settings: ModelSettings, classes: int, null: int | None) -> list[int]:
    """The class of each picture."""
    if settings.labels is None:
        if null is None:
            raise ValueError("labels: this network knows no picture without a class, got none")
        return [null] * settings.count
    drawn = np.random.default_rng(settings.seed).integers(classes, size=settings.count).tolist()
    given = settings.labels or drawn
    limit = classes if null is None else max(classes, null + 1)
    if max(given) >= limit:
        raise ValueError(f"labels: expected classes in 0..{limit - 1}, got {max(given)}")
    return [int(given[i % len(given)]) for i in range(settings.count)]


def _dtype(settings: ModelSettings) -> torch.dtype:
    return getattr(torch, settings.dtype)
