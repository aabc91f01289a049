"""``parasolver sample``: pictures from the embedded model or from a checkpoint, with a record of the run."""

from __future__ import annotations

import hashlib
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

from parasolver_adapters.epsilon_models import EpsilonModel, LearnedVariance, space_timesteps, starting_noise
from parasolver_cli import report, terminal
from parasolver_cli.figures import draw_calibration
from parasolver_cli.folder import prepared, write_record
from parasolver_cli.meter import bar, bars
from parasolver_cli.models import DTYPES, PRESETS, Loaded, ModelSettings, load
from parasolver_cli.processes import Processes, processes
from parasolver_cli.watching import Watch, first_sample, relative_errors
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
from parasolver_core.denoiser.contract import DenoiserFn
from parasolver_core.methods.presets import METHODS

SAMPLERS = ("ddim", "dpm", "ddpm")
CHOICES = {"preset": PRESETS, "sampler": SAMPLERS, "dtype": DTYPES, "method": (*METHODS, "sequential")}
_MOST_DECODED = 12  # rounds of the report that go through an autoencoder
_TRAIN_STEPS = 1000  # of all networks here


@dataclass(frozen=True, kw_only=True)
class Settings(ModelSettings):
    """The options of the command.

    Args:
        window: None: the one with the least predicted time.
        max_rows: in one call of the network, by one process.
        calibration: a file with the margins of this network; None: the default's.
        calibrate: whether to find them from these pictures first.
        compare: whether to sample sequentially as well.
    """

    out: Path
    sampler: str
    steps: str
    window: int | None
    tolerance: float
    method: str
    max_rows: int
    calibration: Path | None
    calibrate: bool
    compare: bool


@dataclass
class Run:
    """What came of it."""

    solution: Solution
    watch: Watch
    seconds: dict[str, float]
    truth: Tensor | None = None
    errors: list[float] | None = None
    interrupted: bool = False  # while comparing; the pictures are done

    @property
    def status(self) -> Status:
        """How the command ended."""
        return Status.INTERRUPTED if self.interrupted else self.solution.status


def run(settings: Settings, as_json: bool = False) -> Status:
    """Check, load, sample, save and report; how the pictures ended."""
    _check(settings)
    with processes(settings.device) as team:
        return _run(replace(settings, device=team.device), team, as_json)


def _check(settings: Settings) -> None:
    """What can be told before the network is loaded."""
    space_timesteps(_TRAIN_STEPS, settings.steps)
    if settings.method != "secant":
        for name in ("calibration", "calibrate"):
            if getattr(settings, name):
                raise ValueError(f"{name}: is of the method secant, got --method {settings.method}")
    if settings.calibrate and (settings.calibration is not None or settings.window is None):
        raise ValueError("calibrate: finds a calibration for one window; give --window a number and no --calibration")


def _run(settings: Settings, team: Processes, as_json: bool) -> Status:
    """The work of one process."""
    started, console = time.perf_counter(), terminal.progress()
    with console.status("Loading the model"):
        loaded = load(settings)
        timesteps = loaded.model.timesteps(settings.steps)
        denoiser, rule = sampler_of(loaded.model, settings.sampler)
        denoiser = team.share(denoiser, settings.max_rows)
    seconds = {"loading": time.perf_counter() - started}
    x_T = starting_noise(settings.count, loaded.event, settings.seed, settings.device)
    options: dict[str, Any] = {"seed": settings.seed, "max_rows": settings.max_rows * team.count, "throw": False}
    arguments = (denoiser, x_T, timesteps, rule)
    if team.rank > 0:
        method = settings.calibration or settings.method
        if settings.calibrate:
            method, _ = _calibrated(settings, arguments, options, None, console)
        return _solve(settings, arguments, options | {"method": method}, seconds, console).status
    with prepared(settings.out) as folder:
        method, files = settings.calibration or settings.method, []
        if settings.calibrate:
            method, seconds["calibrating"] = _calibrated(settings, arguments, options, folder, console)
            files += ["calibration.json", "calibration.png"]
        done = _solve(settings, arguments, options | {"method": method}, seconds, console)
        started = time.perf_counter()
        with console.status("Drawing"):
            files += _save(loaded, done, settings)
        seconds["drawing"] = time.perf_counter() - started
        record = _record(settings, loaded, timesteps, done) | {"processes": team.count}
        record = write_record(folder, record, files)
    if as_json:
        terminal.print_json(record)
    _tell(settings, loaded, done, terminal.progress() if as_json else terminal.results())
    return done.status


def _calibrated(
    settings: Settings, arguments: Any, options: dict[str, Any], folder: Path | None, console: Console
) -> tuple[Method, float]:
    """The method with the margins that these pictures allow, and the seconds it took; writes a file and a picture."""
    assert settings.window is not None
    started = time.perf_counter()
    with console.status("Calibrating"):
        chosen = {key: options[key] for key in ("seed", "max_rows")}
        found = calibrate(*arguments, window=settings.window, tolerance=settings.tolerance, **chosen)
    if folder is not None:
        found.save(folder / "calibration.json")
        draw_calibration(found, folder / "calibration.png")
    console.print(found.message, highlight=False)
    return found.method, time.perf_counter() - started


def _solve(
    settings: Settings, arguments: Any, options: dict[str, Any], seconds: dict[str, float], console: Console
) -> Run:
    """The solution, and its error if the user wants to know; adds the seconds of both runs."""
    steps = len(arguments[2]) * settings.count
    with bars(console) as progress:
        show = bar(progress, f"{settings.preset}, {settings.sampler.upper()}", steps)
        watch = Watch(min(settings.count, report.SHOWN), show)
        choices = {"window": settings.window or "auto", "tolerance": settings.tolerance, "callback": watch}
        solution, seconds["sampling"] = _sampled(lambda: solve(*arguments, **choices, **options))
        seconds["sampling"] -= watch.seconds
        watch.finish(solution.stats.rounds, solution.sample)
        done = Run(solution, watch, seconds)
        if not (settings.compare and solution.success):
            return done
        show = bar(progress, "sequentially", steps)
        options = {key: value for key, value in options.items() if key != "method"}
        truth, seconds["sequential_sampling"] = _sampled(lambda: solve_sequential(*arguments, callback=show, **options))
    done.interrupted = truth.status is Status.INTERRUPTED
    if truth.success:
        done.truth = truth.sample
        done.errors = relative_errors(*(one.numpy(force=True) for one in (solution.sample, truth.sample))).tolist()
    return done


def sampler_of(model: EpsilonModel, name: str) -> tuple[DenoiserFn, StepRule]:
    """The denoiser and the step rule of a name; DDPM with the variance that the network learned, if it did."""
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


def _levels(decoded: Tensor) -> NDArray[np.float32]:
    """(count, height, width, 1 or 3) in 0..255 from values in [-1, 1]; what is not finite becomes black."""
    levels = (decoded.float().nan_to_num(-1.0).clamp(-1, 1) + 1) * 127.5
    return levels.permute(0, 2, 3, 1).numpy(force=True)


def _pictures(decoded: Tensor) -> NDArray[np.uint8]:
    return np.round(_levels(decoded)).astype(np.uint8)


def _save(loaded: Loaded, done: Run, settings: Settings) -> list[str]:
    """A file a picture, all of them as a grid, the samples themselves and the report; the names."""
    samples = done.solution.sample
    pictures = _pictures(loaded.decode(samples))
    digits = max(3, len(str(len(pictures) - 1)))
    named = {f"{i:0{digits}d}.png": one for i, one in enumerate(pictures)} | {"grid.png": report.tiled(pictures)}
    for name, picture in named.items():
        Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(settings.out / name)
    file = settings.out / "samples.safetensors"
    save_file({"samples": samples.contiguous().cpu()}, file)
    file.chmod((settings.out / "grid.png").stat().st_mode)  # it is written for its owner alone
    (settings.out / "report.html").write_text(_page(loaded, done, pictures, settings), encoding="utf-8")
    return [*named, file.name, "report.html"]


def _page(loaded: Loaded, done: Run, pictures: NDArray[np.uint8], settings: Settings) -> str:
    stats, steps = done.solution.stats, len(loaded.model.timesteps(settings.steps))
    name = f"{settings.sampler.upper()}-{steps}"
    columns = ["", "rounds", "evaluations a sample", "seconds", "error, worst"]
    error = "not measured; see --compare" if done.errors is None else f"{100 * max(done.errors):.2g} %"
    evaluations = f"{stats.evaluations / settings.count:.4g}"
    rows = [["in parallel", str(stats.rounds), evaluations, f"{done.seconds['sampling']:.3g}", error]]
    if done.truth is not None:
        rows.insert(0, ["sequentially", str(steps), str(steps), f"{done.seconds['sequential_sampling']:.3g}", ""])
    lead = f"{done.solution.message}\nError: distance to the sequential sample, relative to its size."
    story = _story(loaded, done, pictures, name, steps)
    return report.page(f"ParaSolver: {settings.preset}, {name}", lead, columns, rows, [story])


def _story(loaded: Loaded, done: Run, pictures: NDArray[np.uint8], name: str, steps: int) -> report.Story:
    watch = done.watch
    every = -(-len(watch.rounds) // _MOST_DECODED) if loaded.costly else 1
    kept = sorted({*range(0, len(watch.rounds), every), len(watch.rounds) - 1})
    frames = [report.grid(_pictures(loaded.decode(watch.frames[i]))) for i in kept]
    ends, errors = {"parallel": report.grid(pictures)}, None
    if done.truth is not None:
        got, truth = (_levels(loaded.decode(one)) for one in (done.solution.sample, done.truth))
        gain = report.round_gain(got, truth, 255.0)
        ends = {"sequential": report.grid(np.round(truth).astype(np.uint8))} | ends
        ends[f"difference × {gain:g}"] = report.grid(report.differences(got, truth, gain))
        first = done.truth[:1].numpy(force=True)
        errors = [float(relative_errors(watch.frames[i][:1].numpy(force=True), first)[0]) for i in kept]
    records = first_sample(done.solution.stats)
    shown = [watch.rounds[i] for i in kept]
    return report.Story(name, steps, done.solution.stats.rounds, shown, frames, errors, ends, records)


def _record(settings: Settings, loaded: Loaded, timesteps: NDArray[np.int64], done: Run) -> dict[str, Any]:
    """What was run and what it took, ready for JSON."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}
    checkpoint, solution = settings.checkpoint, done.solution
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
        "error_to_sequential": done.errors,
        "seconds": done.seconds,
        "machine": machine(settings.device),
    }


def machine(device: str) -> dict[str, Any]:
    """What the seconds depend on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _tell(settings: Settings, loaded: Loaded, done: Run, console: Console) -> None:
    seconds = done.seconds
    told = [f"{done.solution.message} Sampling took {seconds['sampling']:.3g} s."]
    if done.errors is not None:
        told.append(
            f"Sequentially it took {seconds['sequential_sampling']:.3g} s; the pictures differ from those by up to "
            f"{100 * max(done.errors):.2g} %."
        )
    told += [loaded.note] if loaded.note else []
    if done.solution.status is Status.INTERRUPTED:
        told.append("The pictures are what was reached.")
    if done.interrupted:
        told.append("The comparison was interrupted; the pictures are kept.")
    folder = settings.out if settings.out.name else settings.out.resolve()  # "." would be read as the parent
    told.append(f"The pictures, report.html, grid.png, the samples and result.json are in {folder}.")
    console.print("\n".join(told), highlight=False, markup=False)
