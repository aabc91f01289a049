"""The commands. What is slow to import is imported inside them, so that ``--help`` answers at once."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

from parasolver_core import SolverError, __version__

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError as error:  # the solver itself needs neither
    sys.exit(f"parasolver: the command line needs {error.name}; pip install 'parasolver[demo]'")

app = typer.Typer(
    name="parasolver",
    help="Parallel-in-time sampling of diffusion and flow models: the sequential sample in fewer rounds.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        Console().print(f"parasolver {__version__}", highlight=False)
        raise typer.Exit


def _check_tolerance(value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise typer.BadParameter(f"expected a finite number of at least 0 (0 means exact), got {value}")
    return value


def _check_folder(folder: Path) -> Path:
    """Make the folder and write to it now rather than fail after minutes of sampling."""
    if _rank() > 0:  # only the first process writes
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise typer.BadParameter(f"cannot write to {folder}: {error.strerror or error}") from error
    return folder


def _rank() -> int:
    """Of this process, where torchrun started several."""
    return int(os.environ.get("RANK", "0"))


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[
        Path,
        typer.Option(callback=_check_folder, help="Folder for the pictures and result.json.", file_okay=False),
    ] = Path("parasolver-demo"),
    count: Annotated[int, typer.Option(min=1, max=256, help="Pictures to sample.")] = 16,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the starting noise and of DDPM's.")] = 0,
    window: Annotated[
        int,
        typer.Option(min=1, help="Steps evaluated in one round; DDPM, with its many steps, takes 4 times as many."),
    ] = 16,
    tolerance: Annotated[
        float,
        typer.Option(callback=_check_tolerance, help="Wanted relative distance to the sequential sample."),
    ] = 1e-2,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of the network.", show_default="all cores")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A first look in seconds: samplers of 10 to 50 steps.")
    ] = False,
) -> None:
    """Sample clothes with the embedded model, one step after another and in parallel, and compare.

    Takes DDIM-50, DPM-Solver++(2M)-25 and DDPM-1000; some minutes on two cores. Needs no download.
    """
    console = Console()
    try:
        from parasolver_cli.demo import Settings, run
    except ImportError as error:
        hint = "pip install 'parasolver[demo]'"
        console.print(f"The demo needs {error.name}; {hint}", markup=False, highlight=False)
        raise typer.Exit(1) from error
    run(Settings(out, count, seed, window, tolerance, threads, quick), console)


@app.command()
def sample(
    out: Annotated[
        Path,
        typer.Option(callback=_check_folder, help="Folder for the pictures and result.json.", file_okay=False),
    ] = Path("parasolver-samples"),
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Weights, .safetensors or .pt.", show_default="the embedded model", dir_okay=False),
    ] = None,
    preset: Annotated[
        str, typer.Option(help="The network of the checkpoint, such as dit-xl-2-256 or adm-256.")
    ] = "fashion-mnist",
    sampler: Annotated[
        str, typer.Option(help="ddim, dpm or ddpm (with the variance that the network learned).")
    ] = "ddim",
    steps: Annotated[str, typer.Option(help='A number, or "ddim25", or "10,20,30" for parts of the schedule.')] = "50",
    window: Annotated[str, typer.Option(help='Steps evaluated in one round; 1 is sequential; "auto".')] = "16",
    tolerance: Annotated[
        float, typer.Option(callback=_check_tolerance, help="Wanted relative distance to the sequential sample.")
    ] = 1e-2,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the noise, and of the labels.")] = 0,
    count: Annotated[int, typer.Option(min=1, max=10000, help="Pictures to sample.")] = 8,
    labels: Annotated[
        str | None,
        typer.Option(help='Classes, such as 207,360, in turn; or "none".', show_default="drawn from the seed"),
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Of classifier-free guidance.")] = None,
    guide_all_channels: Annotated[
        bool, typer.Option("--guide-all-channels", help="DiT: guide all four channels, not the published three.")
    ] = False,
    classifier: Annotated[
        Path | None, typer.Option(help="ADM: weights of the classifier that guides.", dir_okay=False)
    ] = None,
    classifier_scale: Annotated[float | None, typer.Option(help="Of its gradient.", show_default="1")] = None,
    vae: Annotated[
        Path | None, typer.Option(help="DiT: a diffusers folder of the autoencoder.", file_okay=False)
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, ...; auto: a GPU if there is one, for each process its own.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    max_rows: Annotated[
        int, typer.Option(min=1, help="The most rows in one call of the network, by one process.")
    ] = 64,
    calibration: Annotated[
        Path | None, typer.Option(help="What --calibrate wrote for this network.", dir_okay=False)
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Find from 8 pictures or more how far the tolerance may be trusted.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Sample sequentially too, and tell the difference.")
    ] = False,
) -> None:
    """Sample pictures from the embedded model, or from a checkpoint of guided-diffusion or DiT.

    Several processes share the rows of each round: torchrun --nproc-per-node 2 -m parasolver_cli sample ...
    The first of them writes the files.
    """
    console = Console(quiet=_rank() > 0)
    try:
        from parasolver_cli.sample import DTYPES, PRESETS, SAMPLERS, Settings, run
    except ImportError as error:
        console.print(f"Sampling needs {error.name}; pip install 'parasolver[demo]'", markup=False, highlight=False)
        raise typer.Exit(1) from error
    for option, value, known in (
        ("--preset", preset, PRESETS),
        ("--sampler", sampler, SAMPLERS),
        ("--dtype", dtype, DTYPES),
    ):
        if value not in known:
            raise typer.BadParameter(f"expected one of {', '.join(known)}, got {value}", param_hint=option)
    settings = Settings(
        out=out,
        checkpoint=checkpoint,
        preset=preset,
        sampler=sampler,
        steps=steps,
        window=_window(window),
        tolerance=tolerance,
        seed=seed,
        count=count,
        labels=_labels(labels),
        guidance_scale=guidance_scale,
        guide_all_channels=guide_all_channels,
        classifier=classifier,
        classifier_scale=classifier_scale,
        vae=vae,
        device=device,
        dtype=dtype,
        max_rows=max_rows,
        calibration=calibration,
        calibrate=calibrate,
        compare=compare,
    )
    try:
        converged = run(settings, console)
    except (ImportError, OSError, TypeError, ValueError, SolverError) as error:  # what the user gave does not fit
        which = f"Process {_rank()}: " if _rank() > 0 else ""  # it may be the only one that failed
        Console().print(f"{which}{error}", markup=False, highlight=False)
        raise typer.Exit(1) from error
    if not converged:
        raise typer.Exit(1)


def _window(text: str) -> int | None:
    """None for "auto"."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f'expected a number of at least 1, or "auto", got {text}', param_hint="--window")
    return int(text)


def _labels(text: str | None) -> tuple[int, ...] | None:
    """Empty where none were asked for, None for "none"."""
    if text == "none":
        return None
    parts = [] if text is None else text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise typer.BadParameter(f'expected classes such as 207,360, or "none", got {text}', param_hint="--labels")
    return tuple(int(part) for part in parts)


@app.command()
def plan(
    costs: Annotated[
        str | None,
        typer.Option(
            help="Seconds of one call of your network by its rows, as rows:seconds,... such as 1:0.05,8:0.06,64:0.3.",
            show_default="measured with the embedded model",
        ),
    ] = None,
    sampler: Annotated[str, typer.Option(help="ddim, dpm or ddpm.")] = "ddim",
    steps: Annotated[int, typer.Option(min=2, max=1000, help="Of the sampler.")] = 50,
    tolerance: Annotated[
        float, typer.Option(callback=_check_tolerance, help="Wanted relative distance to the sequential sample.")
    ] = 1e-2,
    batch: Annotated[int, typer.Option(min=1, help="Samples at once.")] = 1,
    devices: Annotated[str, typer.Option(help="Numbers of devices to compare.")] = "1,2,4,8",
) -> None:
    """Predict whether sampling in parallel pays, and with which window, on 1, 2, 4 and 8 devices."""
    from parasolver_cli.plan import SAMPLERS, Settings, parse_costs, run

    if sampler not in SAMPLERS:
        raise typer.BadParameter(f"expected one of {', '.join(SAMPLERS)}, got {sampler}", param_hint="--sampler")
    try:
        table = None if costs is None else parse_costs(costs)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--costs") from error
    if not all(part.strip().isdecimal() and int(part) > 0 for part in devices.split(",")):
        raise typer.BadParameter(f"expected counts such as 1,2,4,8, got {devices}", param_hint="--devices")
    counts = tuple(int(part) for part in devices.split(","))
    run(Settings(sampler, steps, tolerance, batch, counts, table), Console())


@app.command()
def methods() -> None:
    """List the samplers and the methods to choose from."""
    import parasolver_core
    from parasolver_core.methods import METHODS, SEQUENTIAL

    rules = [rule for rule in vars(parasolver_core).values() if _is_step_rule(rule)]
    table = Table(title="Samplers: step_rule=", title_justify="left", title_style="bold", show_header=False)
    for rule in sorted(rules, key=lambda rule: rule.__name__):
        table.add_row(rule.__name__, _summary(rule))
    Console().print(table)
    table = Table(title="Methods: method=", title_justify="left", title_style="bold", show_header=False)
    for name, method in METHODS.items():
        table.add_row(f'"{name}"', method.summary)
    table.add_row('"sequential"', SEQUENTIAL)
    Console().print(table)


def _is_step_rule(thing: object) -> bool:
    from parasolver_core import StepRule

    return isinstance(thing, type) and issubclass(thing, StepRule) and thing is not StepRule


def _summary(thing: type) -> str:
    """The first sentence of the docstring."""
    return (thing.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ").replace("``", "")


if __name__ == "__main__":
    app()
