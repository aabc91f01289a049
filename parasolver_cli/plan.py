"""``parasolver plan``: what sampling in parallel is predicted to cost on 1, 2, 4 and 8 devices."""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from parasolver_core import DDIM, DDPM, DPMSolver, NoiseSchedule, StepRule
from parasolver_core.costs import CostTable
from parasolver_core.methods import get_method
from parasolver_core.planning import Costs, Prediction, candidates, choose, predict, seconds
from parasolver_core.recurrence import Recurrence

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
    costs: CostTable | None


def parse_costs(text: str) -> CostTable:
    """From ``rows:seconds,rows:seconds``, for example ``1:0.05,8:0.06,64:0.3``."""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        table = {int(rows): float(value) for rows, value in pairs}
        if len(table) < len(pairs):
            raise ValueError("the same rows twice")
        return CostTable.of(table)
    except ValueError as error:
        raise ValueError(f"expected rows:seconds,... such as 1:0.05,8:0.06,64:0.3, got {text!r} ({error})") from error


def run(settings: Settings, console: Console) -> list[Prediction]:
    """Print the costs, every window on one device, and the best choice for each number of devices."""
    schedule = NoiseSchedule.linear()
    recurrence = SAMPLERS[settings.sampler](schedule).recurrence(schedule.timesteps(settings.steps))  # type: ignore[call-arg]
    if settings.costs is None:
        with console.status("Timing the embedded model"):
            costs, source = _embedded(settings), "the embedded model, measured here"
    else:
        costs, source = Costs(settings.costs), "as given"
    console.print(_costs(costs.network, source))
    windows = [window for window in (1, *_WINDOWS) if window <= settings.steps]
    console.print(_windows([_predict(settings, recurrence, costs, window) for window in windows]))
    method = get_method("secant")
    chosen = [
        choose(recurrence, method, settings.tolerance, costs, batch=settings.batch, devices=devices)[0]
        for devices in settings.devices
    ]
    console.print(_choices(chosen, _predict(settings, recurrence, costs, 1)))
    console.print(
        "Predicted: rounds of the default method within some 20 %; a network call on several devices as one of the rows"
        " that each of them gets, without the time to gather them. Sequential sampling is kept where a window is "
        f"predicted to gain less than a tenth. Windows tried: {', '.join(map(str, candidates(settings.steps)))}.",
        highlight=False,
    )
    return chosen


def _predict(settings: Settings, recurrence: Recurrence, costs: Costs, window: int) -> Prediction:
    return predict(recurrence, get_method("secant"), window, settings.tolerance, costs, batch=settings.batch)


def _embedded(settings: Settings) -> Costs:
    """As ``window="auto"`` measures it, cache included."""
    import torch

    from parasolver_adapters.embedded import SAMPLE_SHAPE, SCHEDULE, EmbeddedDenoiser
    from parasolver_core.solver import measure_run

    rule = SAMPLERS[settings.sampler](SCHEDULE)  # type: ignore[call-arg]
    x_T = torch.randn(settings.batch, *SAMPLE_SHAPE, generator=torch.Generator().manual_seed(0))
    return measure_run(EmbeddedDenoiser(), x_T, SCHEDULE.timesteps(settings.steps), rule)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _costs(network: CostTable, source: str) -> Table:
    table = _table(f"One network call ({source})", "rows", "time", "time of a row")
    for rows, value in zip(network.rows, network.seconds, strict=True):
        table.add_row(str(rows), seconds(value), seconds(value / rows))
    return table


def _windows(predictions: list[Prediction]) -> Table:
    table = _table("One device", "window", "rounds", "evaluations", "rows a call", "network", "solver", "time")
    for one in predictions:
        table.add_row(
            "sequential" if one.window == 1 else str(one.window),
            f"{one.rounds:.0f}",
            f"{one.evaluations:.0f}",
            str(one.max_rows),
            seconds(one.network),
            seconds(one.own),
            seconds(one.seconds),
        )
    return table


def _choices(chosen: list[Prediction], sequential: Prediction) -> Table:
    table = _table(
        "The best choice", "devices", "window", "rounds", "evaluations", "time", "sequential", "times as fast"
    )
    for one in chosen:
        table.add_row(
            str(one.devices),
            "sequential" if one.window == 1 else str(one.window),
            f"{one.rounds:.0f}",
            f"{one.evaluations:.0f}",
            seconds(one.seconds),
            seconds(sequential.seconds),
            f"{sequential.seconds / one.seconds:.2f}",
        )
    return table
