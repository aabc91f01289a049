"""The options of the commands, and how their values are read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from parasolver_adapters.extras import missing
from parasolver_cli.folder import check_folder
from parasolver_cli.terminal import rank

_DIT, _ADM, _DEVICE = "Only for DiT", "Only for guided-diffusion (ADM)", "Device"
_MOST_SEED = 2**63 - 1


def read_seed(given: Any) -> int:
    """As torch's generators take it."""
    text = str(given).strip()
    if not (text.isascii() and text.isdecimal()) or int(text) > _MOST_SEED:
        raise typer.BadParameter(f"expected a number from 0 to 2**63 - 1, got {text}")
    return int(text)


def read_tolerance(given: Any) -> float:
    """A share of the sample's size: ``0.01`` or ``1%``."""
    text = str(given).strip()
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError as error:
        raise typer.BadParameter(f"expected a share such as 0.01 or 1%, got {text}") from error
    if not (math.isfinite(value) and value >= 0):
        raise typer.BadParameter(f"expected a finite number of at least 0 (0 means exact), got {text}")
    if value >= 1:
        raise typer.BadParameter(f"{text} means {100 * value:g} %; for {value:g} % give {value / 100:g} or {value:g}%")
    return value


def read_window(given: Any) -> int | None:
    """None for "auto"."""
    text = str(given)
    if text == "auto":
        return None
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise typer.BadParameter(f'expected a number of at least 1, or "auto", got {text}', param_hint="--window")
    return int(text)


def read_labels(text: str | None, named: bool) -> tuple[int, ...] | None:
    """Empty where none were asked for, None for "none"; names of classes where the network has some."""
    if text == "none":
        return None
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if named and parts and missing("torch", "safetensors", "diffusers") is None:
        from parasolver_adapters.embedded import class_label

        try:
            return tuple(map(class_label, parts))
        except ValueError as error:
            raise typer.BadParameter(str(error).removeprefix("labels: "), param_hint="--labels") from error
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise typer.BadParameter(f'expected classes such as 207,360, or "none", got {text}', param_hint="--labels")
    return tuple(map(int, parts))


def read_counts(text: str) -> tuple[int, ...]:
    """Numbers of at least 1, such as 1,2,4,8."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"expected counts such as 1,2,4,8, got {text}", param_hint="--devices")
    return tuple(map(int, parts))


def check_choice(option: str, value: str, known: Any) -> None:
    """Refuse what is none of the known names."""
    if value not in known:
        raise typer.BadParameter(f"expected one of {', '.join(known)}, got {value}", param_hint=option)


def check_out(folder: Path, overwrite: bool) -> None:
    """Fail now rather than after minutes of sampling."""
    if rank() > 0:  # only the first process writes
        return
    try:
        check_folder(folder, overwrite)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from error


Out = Annotated[Path, typer.Option(help="Folder for the pictures, report.html and result.json.", file_okay=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the results of an earlier run in that folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print the record on stdout, and nothing else there.")]
Count = Annotated[int, typer.Option(min=1, max=10_000, help="Pictures to sample.")]
SeedOption = Annotated[
    int, typer.Option(parser=read_seed, metavar="INTEGER", help="Seed of the noise, and of labels that are drawn.")
]
Tolerance = Annotated[
    float,
    typer.Option(
        parser=read_tolerance, metavar="SHARE", help="Wanted distance to the sequential sample, such as 0.01 or 1%."
    ),
]
Window = Annotated[str, typer.Option(help='Steps evaluated in one round; 1 is sequential; "auto": the fastest.')]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of the network.", show_default="all cores")]
SamplerName = Annotated[
    str, typer.Option(help="ddim, dpm or ddpm (with the variance that the network learned, if it did).")
]
Steps = Annotated[str, typer.Option(help='A number, or "ddim25", or "10,20,30" for parts of the schedule.')]
MethodName = Annotated[str, typer.Option(help='How the steps are corrected; "parasolver methods" tells them apart.')]
Labels = Annotated[
    str | None,
    typer.Option(
        help='Classes in turn: numbers such as 207,360; names for the embedded model, such as sneaker,bag; or "none".',
        show_default="drawn from the seed",
    ),
]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Weights, .safetensors or .pt.", show_default="the embedded model", dir_okay=False)
]
Preset = Annotated[str, typer.Option(help="The network of the checkpoint, such as dit-xl-2-256 or adm-256.")]
Guidance = Annotated[float | None, typer.Option(help="Scale of classifier-free guidance.", show_default="none")]
Calibration = Annotated[Path | None, typer.Option(help="What --calibrate wrote for this network.", dir_okay=False)]
Calibrate = Annotated[
    bool, typer.Option("--calibrate", help="Find from 8 pictures or more how far the tolerance may be trusted.")
]
Compare = Annotated[bool, typer.Option("--compare", help="Sample sequentially too, and tell the difference.")]
AllChannels = Annotated[
    bool,
    typer.Option(
        "--guide-all-channels", rich_help_panel=_DIT, help="Guide all four channels, not the published three."
    ),
]
Vae = Annotated[
    Path | None, typer.Option(rich_help_panel=_DIT, help="A diffusers folder of the autoencoder.", file_okay=False)
]
ClassifierFile = Annotated[
    Path | None, typer.Option(rich_help_panel=_ADM, help="Weights of the classifier that guides.", dir_okay=False)
]
ClassifierScale = Annotated[
    float | None, typer.Option(rich_help_panel=_ADM, help="Scale of the classifier's gradient.", show_default="1")
]
Device = Annotated[
    str,
    typer.Option(rich_help_panel=_DEVICE, help="cpu, cuda, ...; auto: a GPU if there is one, each process its own."),
]
Dtype = Annotated[str, typer.Option(rich_help_panel=_DEVICE, help="float32, float16 or bfloat16.")]
MaxRows = Annotated[
    int, typer.Option(rich_help_panel=_DEVICE, min=1, help="The most rows in one call of the network, by one process.")
]
