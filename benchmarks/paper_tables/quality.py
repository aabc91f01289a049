"""How good the pictures are: FID, CLIP score, and the embedded model's own distance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console

from benchmarks.frechet import distance_to_reference
from benchmarks.paper_tables.models import Model


@dataclass(frozen=True)
class Quality:
    """A column: ``measure(pictures, prompts)``, and how many decimals to show."""

    title: str
    measure: Callable[[list[Path], list[str]], float]
    decimals: int


def qualities(model: Model, embedded: bool, reference: Path | None, console: Console) -> list[Quality]:
    """The columns that can be filled; what cannot is said."""
    if embedded:
        return [Quality("Frechet distance", _clothes_distance, 3)]
    makers: dict[str, Callable[[], Any]] = {}
    if reference is None:
        console.print("No FID: it needs --reference, a folder with real pictures.")
    else:
        makers["FID"] = lambda: _fid(reference)
    if model.prompts:
        makers["CLIP score"] = _clip_score
    found = []
    for title, make in makers.items():
        try:
            found.append(Quality(title, make(), 1))
        except (ImportError, OSError) as error:  # OSError also where weights cannot be downloaded
            console.print(f"No {title}: {type(error).__name__}: {str(error).splitlines()[0]}")
    return found


def _clothes_distance(pictures: list[Path], prompts: list[str]) -> float:
    images = np.stack([np.asarray(Image.open(one), dtype=np.float32) for one in pictures])
    return distance_to_reference(torch.from_numpy(images)[:, None] / 127.5 - 1) if len(images) > 1 else float("nan")


def _fid(reference: Path) -> Callable[[list[Path], list[str]], float]:
    from torchmetrics.image.fid import FrechetInceptionDistance

    real = sorted(one for one in reference.rglob("*") if one.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if len(real) < 2:
        raise typer.BadParameter(f"--reference: expected a folder with pictures, found {len(real)} in {reference}")
    metric = FrechetInceptionDistance(feature=2048, reset_real_features=False)
    for one in real:
        metric.update(_pixels(one), real=True)

    def measure(pictures: list[Path], prompts: list[str]) -> float:
        metric.reset()
        for one in pictures:
            metric.update(_pixels(one), real=False)
        return float(metric.compute()) if len(pictures) > 1 else float("nan")

    return measure


def _clip_score() -> Callable[[list[Path], list[str]], float]:
    from torchmetrics.multimodal import CLIPScore

    metric = CLIPScore("openai/clip-vit-base-patch16")

    def measure(pictures: list[Path], prompts: list[str]) -> float:
        metric.reset()
        for one, prompt in zip(pictures, prompts, strict=True):
            metric.update(_pixels(one), [prompt])
        return float(metric.compute())

    return measure


def _pixels(file: Path) -> torch.Tensor:
    """``(1, 3, height, width)``, uint8."""
    return torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)[None]
