"""The command; see the package's docstring."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.paper_tables.folder import Folder, draw_all
from benchmarks.paper_tables.models import EMBEDDED, PROMPTS, load
from benchmarks.paper_tables.quality import qualities
from benchmarks.paper_tables.report import report
from benchmarks.paper_tables.samplers import METHODS, SAMPLERS


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
