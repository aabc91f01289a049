"""``parasolver sample``: pictures from the embedded model or from a checkpoint, with a record of the run."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from parasolver_adapters import dit, guided_diffusion
from parasolver_adapters.epsilon_models import EpsilonModel, LearnedVariance, starting_noise
from parasolver_cli.figures import draw_calibration
from parasolver_cli.meter import bar, bars
from parasolver_cli.processes import Processes, processes
from parasolver_core import (
    DDIM,
    DDPM,
    DPMSolver,
    Method,
    Solution,
    Status,
    StepRule,
    __version__,
    calibrate,
    solve,
    solve_sequential,
)
from parasolver_core.denoiser import DenoiserFn

EMBEDDED = "fashion-mnist"
PRESETS = (EMBEDDED, *guided_diffusion.PRESETS, *dit.PRESETS)
DTYPES = ("float32", "float16", "bfloat16")
SAMPLERS = ("ddim", "dpm", "ddpm")


@dataclass(frozen=True)
class Settings:
    """The options of the command.

    Args:
        labels: in turn for the pictures; empty: drawn from the seed; None: "no class".
        window: None: the one with the least predicted time.
        device: "auto": a GPU if there is one.
        max_rows: in one call of the network, by one process.
        calibration: a file with the margins of this network; None: the default's.
        calibrate: whether to find them from these pictures first.
        compare: whether to sample sequentially as well.
    """

    out: Path
    checkpoint: Path | None
    preset: str
    sampler: str
    steps: str
    window: int | None
    tolerance: float
    seed: int
    count: int
    labels: tuple[int, ...] | None
    guidance_scale: float | None
    guide_all_channels: bool
    classifier: Path | None
    classifier_scale: float | None
    vae: Path | None
    device: str
    dtype: str
    max_rows: int
    calibration: Path | None
    calibrate: bool
    compare: bool


@dataclass(frozen=True)
class Loaded:
    """A model, the shape of one sample, and how samples become pictures in [-1, 1] of one or three channels."""

    model: EpsilonModel
    event: tuple[int, ...]
    decode: Callable[[Tensor], Tensor]
    labels: list[int] | None
    note: str = ""


def run(settings: Settings, console: Console) -> bool:
    """Load, sample, save and report; whether every picture converged."""
    with processes(settings.device) as team:
        return _run(replace(settings, device=team.device), team, console)


def _run(settings: Settings, team: Processes, console: Console) -> bool:
    """The work of one process."""
    started = time.perf_counter()
    with console.status("Loading the model"):
        loaded = load(settings)
        timesteps = loaded.model.timesteps(settings.steps)
        denoiser, rule = _sampler(loaded.model, settings.sampler)
        denoiser = team.share(denoiser, settings.max_rows)
    seconds = {"loading": time.perf_counter() - started}
    x_T = starting_noise(settings.count, loaded.event, settings.seed, settings.device)
    options: dict[str, Any] = {"seed": settings.seed, "max_rows": settings.max_rows * team.count, "throw": False}
    arguments = (denoiser, x_T, timesteps, rule)
    method = settings.calibration or "secant"
    if settings.calibrate:
        method, seconds["calibrating"] = _calibrated(settings, arguments, options, team.rank, console)
    solution, error = _solve(settings, arguments, options | {"method": method}, seconds, console)
    if team.rank > 0:
        return solution.success
    started = time.perf_counter()
    with console.status("Drawing"):
        pictures = _pictures(loaded.decode(solution.sample))
        files = _save(pictures, solution.sample, settings.out)
    seconds["drawing"] = time.perf_counter() - started
    record = _record(settings, loaded, timesteps, solution, seconds, error)
    record |= {"processes": team.count, "files": files}
    (settings.out / "result.json").write_text(json.dumps(record, indent=2) + "\n")
    _report(settings, loaded, solution, seconds, error, console)
    return solution.success


def _calibrated(
    settings: Settings, arguments: Any, options: dict[str, Any], rank: int, console: Console
) -> tuple[Method, float]:
    """The method with the margins that these pictures allow, and the seconds it took; writes a file and a picture."""
    if settings.calibration is not None or settings.window is None:
        raise ValueError("calibrate: finds a calibration for one window; give --window a number and no --calibration")
    started = time.perf_counter()
    with console.status("Calibrating"):
        chosen = {key: options[key] for key in ("seed", "max_rows")}
        found = calibrate(*arguments, window=settings.window, tolerance=settings.tolerance, **chosen)
    if rank == 0:
        found.save(settings.out / "calibration.json")
        draw_calibration(found, settings.out / "calibration.png")
    console.print(found.message, highlight=False)
    return found.method, time.perf_counter() - started


def _solve(
    settings: Settings, arguments: Any, options: dict[str, Any], seconds: dict[str, float], console: Console
) -> tuple[Solution, list[float] | None]:
    """The solution, and its error if the user wants to know; adds the seconds of both runs."""
    steps = len(arguments[2]) * settings.count
    with bars(console) as progress:
        show = bar(progress, f"{settings.preset}, {settings.sampler.upper()}", steps)
        choices = {"window": settings.window or "auto", "tolerance": settings.tolerance, "callback": show}
        solution, seconds["sampling"] = _sampled(lambda: solve(*arguments, **choices, **options))
        if not (settings.compare and solution.success):
            return solution, None
        show = bar(progress, "sequentially", steps)
        options = {key: value for key, value in options.items() if key != "method"}
        truth, seconds["sequential_sampling"] = _sampled(lambda: solve_sequential(*arguments, callback=show, **options))
    return solution, _relative(solution.sample, truth.sample) if truth.success else None


def load(settings: Settings) -> Loaded:
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


def _embedded(settings: Settings) -> Loaded:
    from parasolver_adapters import embedded

    _refuse(settings, "the embedded model", "classifier", "classifier_scale", "vae", "guide_all_channels")
    network = embedded.load_embedded_model(_dtype(settings), settings.device)
    kind = network.dtype

    def predict(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return network(x.to(kind), t, class_labels=y, return_dict=False)[0].to(x.dtype)

    labels = _labels(settings, len(embedded.CLASS_NAMES), embedded.NO_CLASS)
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


def _guided_diffusion(settings: Settings, checkpoint: Path) -> Loaded:
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


def _dit(settings: Settings, checkpoint: Path) -> Loaded:
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
    return Loaded(model, model.event, lambda sample: model.decode(sample, vae), labels)


def _refuse(settings: Settings, what: str, *options: str) -> None:
    for name in options:
        if getattr(settings, name) not in (None, False):
            raise ValueError(f"{name}: {what} has no use for it, got {getattr(settings, name)}")


def _labels(settings: Settings, classes: int, null: int | None) -> list[int]:
    """The class of each picture."""
    if settings.labels is None:
        if null is None:
            raise ValueError("labels: this network knows no picture without a class, got none")
        return [null] * settings.count
    drawn = np.random.default_rng(settings.seed).integers(classes, size=settings.count).tolist()
    given = settings.labels or drawn
    return [int(given[i % len(given)]) for i in range(settings.count)]


def _dtype(settings: Settings) -> torch.dtype:
    return getattr(torch, settings.dtype)


def _sampler(model: EpsilonModel, name: str) -> tuple[DenoiserFn, StepRule]:
    rules: dict[str, StepRule] = {
        "ddim": DDIM(model.schedule),
        "dpm": DPMSolver(model.schedule, order=2),
        "ddpm": DDPM(model.schedule),
    }
    learned = name == "ddpm" and model.learn_sigma
    return LearnedVariance(model) if learned else model, rules[name]


def _sampled(sample: Callable[[], Solution]) -> tuple[Solution, float]:
    """The solution and its seconds; what was reached, if the user breaks it off."""
    started = time.perf_counter()
    try:
        solution = sample()
    except KeyboardInterrupt as interrupt:
        solution = getattr(interrupt, "solution", None)
        if solution is None:
            raise
    return solution, time.perf_counter() - started


def _relative(got: Tensor, expected: Tensor) -> list[float]:
    """RMS distance of each sample to the sequential one over the RMS of the latter."""
    difference, size = ((one.double().flatten(1) ** 2).mean(dim=1).sqrt() for one in (got - expected, expected))
    return (difference / size).tolist()


def _pictures(decoded: Tensor) -> NDArray[np.uint8]:
    """(count, height, width, 1 or 3) from values in [-1, 1]; what is not finite becomes black."""
    levels = (decoded.float().nan_to_num(-1.0).clamp(-1, 1) + 1) * 127.5
    return levels.round().to(torch.uint8).permute(0, 2, 3, 1).numpy(force=True)


def _save(pictures: NDArray[np.uint8], samples: Tensor, out: Path) -> list[str]:
    """A file a picture, all of them as a grid, and the samples themselves; the names."""
    digits = max(3, len(str(len(pictures) - 1)))
    named = {f"{i:0{digits}d}.png": picture for i, picture in enumerate(pictures)} | {"grid.png": _grid(pictures)}
    for name, picture in named.items():
        Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(out / name)
    save_file({"samples": samples.contiguous().cpu()}, out / "samples.safetensors")
    return [*named, "samples.safetensors"]


def _grid(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """All pictures side by side, in rows, as nearly square as can be."""
    count, height, width, channels = pictures.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.zeros((rows * columns, height, width, channels), dtype=np.uint8)
    sheet[:count] = pictures
    lines = sheet.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return lines.reshape(rows * height, columns * width, channels)


def _record(
    settings: Settings,
    loaded: Loaded,
    timesteps: NDArray[np.int64],
    solution: Solution,
    seconds: dict[str, float],
    error: list[float] | None,
) -> dict[str, Any]:
    """What was run and what it took, ready for JSON."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}
    checkpoint = settings.checkpoint
    return {
        "version": __version__,
        "settings": given,
        "checkpoint": None if checkpoint is None else {"name": checkpoint.name, "sha256": _sha256(checkpoint)},
        "labels": loaded.labels,
        "timesteps": timesteps.tolist(),
        "status": solution.status.name.lower(),
        "statuses": [status.name.lower() for status in solution.statuses],
        "message": solution.message,
        "rounds": solution.stats.rounds,
        "calls": solution.stats.calls,
        "evaluations": solution.stats.evaluations,
        "error_estimate": solution.error_estimate.tolist(),
        "error_to_sequential": error,
        "seconds": seconds,
        "machine": {
            "device": settings.device,
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _report(
    settings: Settings,
    loaded: Loaded,
    solution: Solution,
    seconds: dict[str, float],
    error: list[float] | None,
    console: Console,
) -> None:
    told = [f"{solution.message} Sampling took {seconds['sampling']:.3g} s."]
    if error is not None:
        told.append(
            f"Sequentially it took {seconds['sequential_sampling']:.3g} s; the pictures differ from those by up to "
            f"{100 * max(error):.2g} %."
        )
    told += [loaded.note] if loaded.note else []
    if solution.status is Status.INTERRUPTED:
        told.append("The pictures are what was reached.")
    told.append(f"The pictures, grid.png, the samples and result.json are in {settings.out}.")
    console.print("\n".join(told), highlight=False, markup=False)
