"""``parasolver plan``: what sampling in parallel is predicted to cost on 1, 2, 4 and 8 devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from parasolver_cli.terminal import Column, print_json, print_table, progress, results
from parasolver_core import DDIM, DDPM, DPMSolver, NoiseSchedule, StepRule, __version__
from parasolver_core.methods.presets import get_method
from parasolver_core.planning.costs import CostTable
from parasolver_core.planning.prediction import Costs, Prediction, candidates, choose, predict, seconds
from parasolver_core.samplers.recurrence import Recurrence

SAMPLERS: dict[str, type[StepRule]] = {"ddim": DDIM, "dpm": DPMSolver, "ddpm": DDPM}
_WINDOWS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Settings:
    """The options of the command."""

    sampler: str
    steps: int
    tolerance: float
    batch: int
    devices: tuple[int, ...]
    costs: Costs | None
    source: str = "as given"


def parse_costs(text: str) -> CostTable:
    """From ``rows:seconds,rows:seconds``, for example ``1:0.05,8:0.06,64:0.3``."""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        table = {int(rows): float(value) for rows, value in pairs}
        if len(table) < len(pairs):
            raise ValueError("the same rows twice")
        return CostTable.of(table)
    except ValueError as error:
        example = "rows:seconds,... such as 1:0.05,8:0.06,64:0.3"
        raise ValueError(f"expected {example}, got {text!r}: {_why(error)}") from error


def _why(error: ValueError) -> str:
    """What Python says of numbers that are none, in plain words."""
    text = str(error)
    return "each part is two numbers around a colon" if "unpack" in text or "literal" in text else text


def run(settings: Settings, as_json: bool = False) -> list[Prediction]:
    """Tell the costs, every window on one device, and the best choice for each number of devices."""
    schedule = NoiseSchedule.linear()
    recurrence = SAMPLERS[settings.sampler](schedule).recurrence(schedule.timesteps(settings.steps))  # type: ignore[call-arg]
    if settings.costs is None:
        console = progress()
        if not console.is_terminal:
            console.print("Timing the embedded model", highlight=False)
        with console.status("Timing the embedded model"):
            costs, source = _embedded(settings), "the embedded model, measured here"
    else:
        costs, source = settings.costs, settings.source
    windows = [_predict(settings, recurrence, costs, window) for window in (1, *_WINDOWS) if window <= settings.steps]
    method = get_method("secant")
    chosen = [
        choose(recurrence, method, settings.tolerance, costs, batch=settings.batch, devices=devices)[0]
        for devices in settings.devices
    ]
    if as_json:
        print_json(_record(settings, costs, source, windows, chosen))
    else:
        _tell(settings, costs, source, windows, chosen)
    return chosen


def _tell(settings: Settings, costs: Costs, source: str, windows: list[Prediction], chosen: list[Prediction]) -> None:
    console = results()
    _print(console, f"One network call ({source})", ("rows", "time", "time of a row"), _costs(costs.network))
    titles = ("window", "rounds", "evaluations", "rows a call", "network", "solver", "time")
    _print(console, "One device", titles, [_window(one) for one in windows])
    titles = ("devices", "window", "rounds", "evaluations", "time", "sequential", "gain")
    _print(console, "The best choice", titles, [_choice(one, windows[0]) for one in chosen])
    console.print(
        "Predicted: rounds of the default method within some 20 %; a network call on several devices as one of the rows"
        " that each of them gets, without the time to gather them. Sequential sampling is kept where a window is "
        f"predicted to gain less than a tenth. Windows tried: {', '.join(map(str, candidates(settings.steps)))}.",
        highlight=False,
    )


def _record(
    settings: Settings, costs: Costs, source: str, windows: list[Prediction], chosen: list[Prediction]
) -> dict[str, Any]:
    """All figures of the tables, ready for JSON."""
    network = dict(zip(map(str, costs.network.rows), costs.network.seconds, strict=True))
    given = asdict(settings) | {"costs": None if settings.costs is None else network}
    del given["source"]
    return {
        "version": __version__,
        "settings": given,
        "costs": {"source": source, "seconds_by_rows": network},
        "windows": [_figures(one, windows[0]) for one in windows],
        "best": [_figures(one, windows[0]) for one in chosen],
    }


def _figures(one: Prediction, sequential: Prediction) -> dict[str, Any]:
    return asdict(one) | {"seconds": one.seconds, "times_as_fast": sequential.seconds / one.seconds}


def _predict(settings: Settings, recurrence: Recurrence, costs: Costs, window: int) -> Prediction:
    return predict(recurrence, get_method("secant"), window, settings.tolerance, costs, batch=settings.batch)


def _embedded(settings: Settings) -> Costs:
    """As ``window="auto"`` measures it, cache included."""
    import torch

    from parasolver_adapters.embedded import SAMPLE_SHAPE, SCHEDULE, EmbeddedDenoiser
    from parasolver_core.planning.measurement import measure_run

    rule = SAMPLERS[settings.sampler](SCHEDULE)  # type: ignore[call-arg]
    x_T = torch.randn(settings.batch, *SAMPLE_SHAPE, generator=torch.Generator().manual_seed(0))
    return measure_run(EmbeddedDenoiser(), x_T, SCHEDULE.timesteps(settings.steps), rule)


def _print(console: Console, title: str, names: Sequence[str], rows: list[list[str]]) -> None:
    print_table(console, title, [Column(name) for name in names], rows)


def _costs(network: CostTable) -> list[list[str]]:
    pairs = zip(network.rows, network.seconds, strict=True)
    return [[str(rows), seconds(value), seconds(value / rows)] for rows, value in pairs]


def _window(one: Prediction) -> list[str]:
    return [
        "sequential" if one.window == 1 else str(one.window),
        f"{one.rounds:.0f}",
        f"{one.evaluations:.0f}",
        str(one.max_rows),
        seconds(one.network),
        seconds(one.own),
        seconds(one.seconds),
    ]


def _choice(one: Prediction, sequential: Prediction) -> list[str]:
    return [
        str(one.devices),
        "sequential" if one.window == 1 else str(one.window),
        f"{one.rounds:.0f}",
        f"{one.evaluations:.0f}",
        seconds(one.seconds),
        seconds(sequential.seconds),
        f"{sequential.seconds / one.seconds:.2f}x",
    ]
