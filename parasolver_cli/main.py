"""The commands. What is slow to import is imported inside them, so that ``--help`` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from parasolver_adapters.extras import install
from parasolver_cli.entry import INTERRUPTED, begin_work
from parasolver_core import __version__

try:
    import typer

    from parasolver_cli import options as given
    from parasolver_cli.terminal import Column, print_json, print_table, reported, results
except ImportError as error:  # the solver itself needs neither typer nor rich
    if sys.argv[1:] == ["--version"]:
        print(f"parasolver {__version__}")
        sys.exit()
    sys.exit(f"parasolver: the command line needs {error.name}: {install('demo')}")

app = typer.Typer(
    name="parasolver",
    help="Parallel-in-time sampling of diffusion and flow models: the sequential sample in fewer rounds.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",  # joins the lines of a paragraph
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        results().print(f"parasolver {__version__}", highlight=False)
        raise typer.Exit


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
    out: given.Out = Path("parasolver-demo"),
    count: Annotated[
        int | None, typer.Option(min=1, max=256, help="Pictures to sample.", show_default="16; 4 with --quick")
    ] = None,
    seed: given.SeedOption = 0,
    window: Annotated[
        int,
        typer.Option(min=1, help="Steps of the pictures' samplers evaluated in one round; 4 times as many for DDPM."),
    ] = 16,
    tolerance: given.Tolerance = 1e-2,  # type: ignore[assignment]
    threads: given.Threads = None,
    quick: Annotated[bool, typer.Option("--quick", help="A first look in seconds: fewer steps and pictures.")] = False,
    overwrite: given.Overwrite = False,
    as_json: given.Json = False,
) -> None:
    """Show where parallel sampling is faster on this machine, and where it needs another.

    A pendulum, robot paths from a small policy, and pictures of clothes, each one step after another and in parallel.
    Some minutes on two cores. Needs no download.
    """
    given.check_out(out, overwrite)
    with reported():
        from parasolver_cli.demo import Settings, run

        begin_work()
        count = (4 if quick else 16) if count is None else count
        if not run(Settings(out, count, seed, window, tolerance, threads, quick), as_json):
            raise typer.Exit(INTERRUPTED)


@app.command()
def sample(
    out: given.Out = Path("parasolver-samples"),
    checkpoint: given.Checkpoint = None,
    preset: given.Preset = "fashion-mnist",
    sampler: given.SamplerName = "ddim",
    steps: given.Steps = "50",
    window: given.Window = "16",
    tolerance: given.Tolerance = 1e-2,  # type: ignore[assignment]
    method: given.MethodName = "secant",
    seed: given.SeedOption = 0,
    count: given.Count = 8,
    labels: given.Labels = None,
    guidance_scale: given.Guidance = None,
    guide_all_channels: given.AllChannels = False,
    vae: given.Vae = None,
    classifier: given.ClassifierFile = None,
    classifier_scale: given.ClassifierScale = None,
    device: given.Device = "auto",
    dtype: given.Dtype = "float32",
    max_rows: given.MaxRows = 64,
    calibration: given.Calibration = None,
    calibrate: given.Calibrate = False,
    compare: given.Compare = False,
    overwrite: given.Overwrite = False,
    as_json: given.Json = False,
) -> None:
    """Sample pictures from the embedded model, or from a checkpoint of guided-diffusion or DiT.

    Several processes share the rows of each round: torchrun --nproc-per-node 2 -m parasolver_cli sample ...
    The first of them writes the files.
    """
    values: dict[str, Any] = dict(locals())  # the options by name, as they are called in the settings
    for name in ("overwrite", "as_json"):
        del values[name]
    given.check_out(out, overwrite)
    values |= {"window": given.read_window(window), "labels": given.read_labels(labels, preset == "fashion-mnist")}
    with reported():
        from parasolver_cli.sample import CHOICES, Settings, run
        from parasolver_core import Status

        for name, known in CHOICES.items():
            given.check_choice(f"--{name}", values[name], known)
        begin_work()
        status = run(Settings(**values), as_json)
        if status is not Status.CONVERGED:
            raise typer.Exit(INTERRUPTED if status is Status.INTERRUPTED else 1)


@app.command()
def bench(
    network: Annotated[
        str,
        typer.Option(help="fashion-mnist, policy, or yours: file.py:function, which returns (denoiser, x_T)."),
    ] = "fashion-mnist,policy",
    checkpoint: given.Checkpoint = None,
    preset: given.Preset = "fashion-mnist",
    sampler: given.SamplerName = "ddim",
    steps: Annotated[int, typer.Option(min=2, max=1000, help="Steps of the sampler.")] = 50,
    tolerance: given.Tolerance = 1e-2,  # type: ignore[assignment]
    batch: Annotated[int, typer.Option(min=1, max=1000, help="Samples at once; not of your own function.")] = 1,
    device: given.Device = "auto",
    dtype: given.Dtype = "float32",
    threads: given.Threads = None,
    budget: Annotated[float, typer.Option(min=1, help="Seconds in all; slower windows are left out.")] = 60,
    as_json: given.Json = False,
) -> None:
    """Measure whether parallel sampling pays on this machine, and with which window.

    Samples a network sequentially and with windows of 2, 4, 8, ..., and compares the seconds. Your own function is
    called with the device, and may return a step rule as a third value; without it the network predicts the noise on
    the linear schedule of 1000 timesteps.
    """
    with reported("nothing was kept"):
        from parasolver_cli.bench import SAMPLERS, Settings, run
        from parasolver_cli.sample import CHOICES

        given.check_choice("--sampler", sampler, SAMPLERS)
        given.check_choice("--dtype", dtype, CHOICES["dtype"])
        given.check_choice("--preset", preset, CHOICES["preset"])
        names = tuple(name.strip() for name in network.split(","))
        begin_work()
        run(
            Settings(names, checkpoint, preset, sampler, steps, tolerance, batch, device, dtype, threads, budget),
            as_json,
        )


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
    steps: Annotated[int, typer.Option(min=2, max=1000, help="Steps of the sampler.")] = 50,
    tolerance: given.Tolerance = 1e-2,  # type: ignore[assignment]
    batch: Annotated[int, typer.Option(min=1, help="Samples at once.")] = 1,
    devices: Annotated[str, typer.Option(help="Numbers of devices to compare.")] = "1,2,4,8",
    device: Annotated[str | None, typer.Option(help="A card whose costs are known: h100.")] = None,
    network: Annotated[str | None, typer.Option(help="With --device: a part of the name of a network.")] = None,
    graphs: Annotated[bool, typer.Option("--graphs", help="With --device: its calls as CUDA graphs.")] = False,
    as_json: given.Json = False,
) -> None:
    """Predict whether sampling in parallel pays, and with which window, on 1, 2, 4 and 8 devices."""
    from parasolver_cli.cards import card_costs
    from parasolver_cli.plan import SAMPLERS, Settings, parse_costs, run
    from parasolver_core.planning.prediction import Costs

    given.check_choice("--sampler", sampler, SAMPLERS)
    if device is None and (network is not None or graphs):
        raise typer.BadParameter("needs --device", param_hint="--graphs" if network is None else "--network")
    if device is not None and costs is not None:
        raise typer.BadParameter("give either costs or a card whose costs are known", param_hint="--device")
    source = "as given"
    try:
        table = None if costs is None else Costs(parse_costs(costs))
        if device is not None:
            known = card_costs(device, network, graphs)
            table, source = known.costs, known.source
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--costs" if device is None else "--device") from error
    counts = given.read_counts(devices)
    with reported("nothing was kept"):
        begin_work()
        run(Settings(sampler, steps, tolerance, batch, counts, table, source), as_json)


@app.command()
def methods(as_json: given.Json = False) -> None:
    """Tell apart the samplers and the methods to choose from."""
    with reported():
        import parasolver_core
        from parasolver_core.methods.presets import METHODS, SEQUENTIAL

        rules = sorted(filter(_is_step_rule, vars(parasolver_core).values()), key=lambda rule: rule.__name__)
        samplers = {rule.__name__: _summary(rule) for rule in rules}
        ways = {name: method.summary for name, method in METHODS.items()} | {"sequential": SEQUENTIAL}
        if as_json:
            print_json({"samplers": samplers, "methods": ways})
            return
        for title, name, table in (
            ("Samplers: the argument step_rule of solve", "sampler", samplers),
            ("Methods: the argument method of solve, and --method of parasolver sample", "method", ways),
        ):
            columns = [Column(name, words=True), Column("what it does", words=True)]
            print_table(results(), title, columns, [*table.items()])


def _is_step_rule(thing: object) -> bool:
    import inspect

    from parasolver_core import StepRule

    return isinstance(thing, type) and issubclass(thing, StepRule) and not inspect.isabstract(thing)


def _summary(thing: type) -> str:
    """The first sentence of the docstring."""
    return (thing.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ").replace("``", "")
