"""Several devices, and the window that chooses itself: ``python -m benchmarks.distributed``.

1. ``pair``: two gloo processes of one thread each against one process of one thread, the embedded model: seconds a
   round, measured in turn. To compare, what this machine allows: the network called with all rows in one process, and
   with half of them in each of two at the same time, without a solver and without communication.
2. ``simulated``: 1, 2, 4 and 8 processes whose network takes a given time for 4 rows: seconds of a run over rounds
   times that time. They share the cores of this machine, so the CPU time of a process in a round is shown as well.
3. ``own``: the solver's part of a round, all that is not the network itself, for states of Stable Diffusion's size.
4. ``auto``: ``window="auto"`` against the better of sequential sampling and the best fixed window, in turn in one
   process, for the samplers of the latency benchmark.

Run it on a machine that does nothing else.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from parasolver_adapters.distributed import DistributedDenoiser, process_group
from parasolver_core import DDIM, NoiseSchedule, solve, solve_sequential

SCHEDULE = NoiseSchedule.linear()
CALL = 0.05  # seconds of the network call that the solver's part is compared with
PAIR_WINDOW, CALLS = 32, 5
LATENCIES = (0.05, 0.2)  # of a simulated call
RANKS = (1, 2, 4, 8)
OWN_WINDOWS = (4, 8, 16, 32)
SAMPLERS = (("DDIM", 50), ("DDIM", 100), ("DDPM", 100), ("2M", 50))
PROBLEMS = (
    *((name, *sampler) for name in ("policy", "mixture") for sampler in SAMPLERS),
    ("clothes", "DDIM", 50),
    ("emoji", "DDIM", 50),
)
WINDOWS = (2, 4, 8, 16, 32, 64)
PARTS = ("pair", "simulated", "own", "auto")


def two_processes(tries: int) -> dict[str, Any]:
    """Median seconds of a round, alone and shared, and the ratio of each try."""
    rounds = _launch(_rounds_alone_and_shared, 2, tries)
    return rounds | {name: statistics.median(rounds[f"{name}s"]) for name in ("ratio", "limit")}


def _rounds_alone_and_shared(rank: int, tries: int) -> dict[str, Any]:
    from parasolver_adapters.embedded import EmbeddedDenoiser

    network = EmbeddedDenoiser()
    shared = DistributedDenoiser(network)
    x_T = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    arguments = (x_T, SCHEDULE.timesteps(50), DDIM(SCHEDULE), PAIR_WINDOW)
    alone, together, ratios, limits = [], [], [], []

    def call(rows: int) -> float:
        x, t = x_T.expand(rows, -1, -1, -1).contiguous(), torch.full((rows,), 500)
        times = []
        for _ in range(CALLS):
            started = time.perf_counter()
            network(x, t)
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    for _ in range(tries):
        torch.distributed.barrier()
        whole = call(PAIR_WINDOW) if rank == 0 else math.nan
        torch.distributed.barrier()
        limits.append(whole / call(PAIR_WINDOW // 2))
        torch.distributed.barrier()
        if rank == 0:
            alone.append(_seconds_a_round(solve(network, *arguments)))
        torch.distributed.barrier()  # the other waits meanwhile, and takes no time
        together.append(_seconds_a_round(solve(shared, *arguments)))
        if rank == 0:
            ratios.append(alone[-1] / together[-1])
    return {"alone": alone, "together": together, "ratios": ratios, "limits": limits}


def _seconds_a_round(solution: Any) -> float:
    return float(np.median([one.seconds for one in solution.stats.history if one.evaluations == PAIR_WINDOW]))


def simulated(ranks: int, latency: float) -> dict[str, Any]:
    """A run on so many processes, each of which takes the latency for up to 4 rows."""
    return _launch(_run_with_latency, ranks, ranks, latency)


def _run_with_latency(rank: int, ranks: int, latency: float) -> dict[str, Any]:
    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        time.sleep(latency)
        return x / (1 + x * x)

    x_T = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    denoiser = DistributedDenoiser(network)
    timesteps, rule = SCHEDULE.timesteps(50), DDIM(SCHEDULE)
    solve(denoiser, x_T, timesteps, rule, 4 * ranks, check=False, max_rounds=2, throw=False)
    started, busy = time.perf_counter(), time.process_time()
    solution = solve(denoiser, x_T, timesteps, rule, 4 * ranks, check=False)
    return {
        "rounds": solution.stats.rounds,
        "seconds": time.perf_counter() - started,
        "cpu_a_round": (time.process_time() - busy) / solution.stats.rounds,
    }


def own_part(window: int, tries: int) -> float:
    """Seconds of a full round outside the network, 4 x 64 x 64 float32 states of PyTorch: the median of a few runs."""
    x_T = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    inside = [0.0]

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        started = time.perf_counter()
        prediction = x / (1 + x * x)
        inside[0] += time.perf_counter() - started
        return prediction

    def callback(state: Any) -> None:
        record = state.stats.history[-1]
        if record.evaluations == window:
            rounds.append(record.seconds - inside[0])
        inside[0] = 0.0

    rounds: list[float] = []
    for _ in range(tries):
        solve(network, x_T, SCHEDULE.timesteps(100), DDIM(SCHEDULE), window, check=False, callback=callback)
    return statistics.median(rounds)


def automatic(name: str, sampler: str, steps: int, tries: int) -> dict[str, Any]:
    """Median seconds of each choice, run in turn; the costs that auto needs have been measured before."""
    from benchmarks.pareto.settings import Setting, step_rule
    from benchmarks.problems import PROBLEMS as NETWORKS

    problem = NETWORKS[name]
    rule, timesteps = step_rule(problem, Setting("", sampler, steps, 1))
    arguments = (problem.make(), problem.starts(1), timesteps, rule)
    windows = sorted({min(window, steps) for window in WINDOWS})
    runs: dict[str, Callable[[], Any]] = {"sequential": lambda: solve_sequential(*arguments)}
    runs |= {str(window): lambda window=window: solve(*arguments, window=window) for window in windows}
    runs["auto"] = lambda: solve(*arguments, window="auto")
    said = runs["auto"]().message
    times: dict[str, list[float]] = {choice: [] for choice in runs}
    for turn in range(tries):
        for choice in list(runs)[:: 1 if turn % 2 == 0 else -1]:  # none always comes after the same other
            started = time.perf_counter()
            runs[choice]()
            times[choice].append(time.perf_counter() - started)
    seconds = {choice: statistics.median(values) for choice, values in times.items()}
    best = min((choice for choice in seconds if choice != "auto"), key=lambda choice: seconds[choice])
    over = statistics.median(auto / other for auto, other in zip(times["auto"], times[best], strict=True))
    return {
        "problem": name,
        "sampler": f"{sampler}-{steps}",
        "said": said,
        "seconds": seconds,
        "best": best,
        "over": over,
    }


def _launch(work: Callable[..., dict[str, Any]], ranks: int, *args: Any) -> dict[str, Any]:
    """What rank 0 returns."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = multiprocessing.get_context("spawn")
    receive, send = processes.Pipe(duplex=False)
    workers = [processes.Process(target=_work, args=(rank, ranks, port, send, work, args)) for rank in range(ranks)]
    for worker in workers:
        worker.start()
    answer = receive.recv() if receive.poll(600) else None
    for worker in workers:
        worker.join(30)
    if answer is None:
        raise RuntimeError(f"no answer from {ranks} processes")
    return answer


def _work(rank: int, ranks: int, port: int, send: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with process_group():
        seen = work(rank, *args)
    if rank == 0:
        send.send(seen)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _pair(tries: int) -> tuple[dict[str, Any], Table]:
    pair = two_processes(tries)
    columns = ("alone, ms a round", "two, ms", "ratio", "ratio of the network's calls")
    table = _table(f"Two processes of one thread, embedded model, window {PAIR_WINDOW}", *columns)
    alone, together = (1e3 * statistics.median(pair[name]) for name in ("alone", "together"))
    table.add_row(f"{alone:.1f}", f"{together:.1f}", f"{pair['ratio']:.2f}", f"{pair['limit']:.2f}")
    return pair, table


def _simulated() -> tuple[dict[str, Any], Table]:
    figures = {}
    columns = ("latency, ms", "devices", "window", "rounds", "s", "over rounds", "CPU time a round, ms")
    table = _table("Simulated devices, 4 rows a call each", *columns)
    for latency in LATENCIES:
        for ranks in RANKS:
            run = figures[f"{ranks} of {latency} s"] = simulated(ranks, latency)
            excess = run["seconds"] / (run["rounds"] * latency) - 1
            told = (str(run["rounds"]), f"{run['seconds']:.2f}", f"{excess:+.1%}", f"{1e3 * run['cpu_a_round']:.1f}")
            table.add_row(f"{1e3 * latency:.0f}", str(ranks), str(4 * ranks), *told)
    return figures, table


def _own(tries: int) -> tuple[dict[str, Any], Table]:
    figures = {window: own_part(window, tries) for window in OWN_WINDOWS}
    table = _table("The solver's part of a round, 4x64x64", "window", "ms", f"of a call of {1e3 * CALL:.0f} ms")
    for window, own in figures.items():
        table.add_row(str(window), f"{1e3 * own:.2f}", f"{own / CALL:.1%}")
    return {str(window): own for window, own in figures.items()}, table


def _auto(tries: int) -> tuple[dict[str, Any], Table]:
    figures = {}
    columns = (
        "problem",
        "sampler",
        "sequential, ms",
        "best window",
        "best, ms",
        "auto's window",
        "auto, ms",
        "over best",
    )
    table = _table('window="auto"', *columns)
    for name, sampler, steps in PROBLEMS:
        line = figures[f"{name}, {sampler}-{steps}"] = automatic(name, sampler, steps, tries)
        ms = {choice: f"{1e3 * value:.1f}" for choice, value in line["seconds"].items()}
        chosen = re.search(r"window of (\d+)|sequentially", line["said"])
        told = "?" if chosen is None else chosen[1] or "sequential"
        over = f"{line['over'] - 1:+.1%}"
        table.add_row(name, line["sampler"], ms["sequential"], line["best"], ms[line["best"]], told, ms["auto"], over)
    return figures, table


def main(
    tries: Annotated[int, typer.Option(min=1, help="Of each timing; medians are shown.")] = 7,
    part: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(PARTS)}; may be repeated.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Time several processes, and the window that chooses itself."""
    torch.set_num_threads(1)
    measure: dict[str, Callable[[], tuple[dict[str, Any], Table]]] = {
        "pair": lambda: _pair(tries),
        "simulated": _simulated,
        "own": lambda: _own(tries),
        "auto": lambda: _auto(tries),
    }
    unknown = set(part or ()) - set(PARTS)
    if unknown:
        raise typer.BadParameter(f"expected some of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    figures: dict[str, Any] = {}
    for name in part or PARTS:
        figures[name], table = measure[name]()
        Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
