"""Several devices, and the window that chooses itself: ``python -m benchmarks.distributed``.

1. Two gloo processes of one thread each against one process of one thread, the embedded model: seconds a round, the two
   measured in turn.
2. 1, 2, 4 and 8 processes whose network takes a given time: seconds of a run over rounds times that time.
3. The solver's own part of a round, for states of Stable Diffusion's size.
4. ``window="auto"`` against the better of sequential sampling and the best fixed window, in turn in one process.

Run it on a machine that does nothing else.
"""

from __future__ import annotations

import json
import multiprocessing
import os
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
from parasolver_core import DDIM, NoiseSchedule, ParallelIntegralSolver, solve, solve_sequential

SCHEDULE = NoiseSchedule.linear()
LATENCY = 0.05  # seconds of a simulated network call
PROBLEMS = (("policy", 50), ("policy", 100), ("mixture", 100), ("clothes", 50), ("emoji", 50))
WINDOWS = (2, 4, 8, 16, 32)


def two_processes(tries: int) -> dict[str, Any]:
    """Median seconds of a round, alone and shared, and the ratio of each try."""
    rounds = _launch(_rounds_alone_and_shared, 2, tries)
    return rounds | {"ratio": statistics.median(rounds["ratios"])}


def _rounds_alone_and_shared(rank: int, tries: int) -> dict[str, Any]:
    from parasolver_adapters.embedded import EmbeddedDenoiser

    network = EmbeddedDenoiser()
    shared = DistributedDenoiser(network)
    x_T = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    arguments = (x_T, SCHEDULE.timesteps(50), DDIM(SCHEDULE), 32)
    alone, together = [], []
    for _ in range(tries):
        torch.distributed.barrier()
        if rank == 0:
            alone.append(_seconds_a_round(solve(network, *arguments)))
        torch.distributed.barrier()  # the other waits meanwhile, and takes no time
        together.append(_seconds_a_round(solve(shared, *arguments)))
    ratios = [one / two for one, two in zip(alone, together, strict=rank == 0)]
    return {"alone": alone, "together": together, "ratios": ratios}


def _seconds_a_round(solution: Any) -> float:
    return float(np.median([one.seconds for one in solution.stats.history if one.evaluations >= 16]))


def simulated(ranks: int) -> dict[str, Any]:
    """A run on so many processes, each of which takes the latency for up to 4 rows."""
    return _launch(_run_with_latency, ranks, ranks)


def _run_with_latency(rank: int, ranks: int) -> dict[str, Any]:
    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        time.sleep(LATENCY)
        return x / (1 + x * x)

    x_T = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    denoiser = DistributedDenoiser(network)
    timesteps, rule = SCHEDULE.timesteps(50), DDIM(SCHEDULE)
    solve(denoiser, x_T, timesteps, rule, 4 * ranks, check=False, max_rounds=2, throw=False)
    started = time.perf_counter()
    solution = solve(denoiser, x_T, timesteps, rule, 4 * ranks, check=False)
    return {"rounds": solution.stats.rounds, "seconds": time.perf_counter() - started}


def own_part(window: int, tries: int = 5) -> float:
    """The solver's own seconds of a round, 4 x 64 x 64 float32 states of PyTorch."""
    x_T = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    solver = ParallelIntegralSolver(DDIM(SCHEDULE), window, check=False)
    return statistics.median(solver.own_seconds(x_T, SCHEDULE.timesteps(50)) for _ in range(tries))


def automatic(name: str, steps: int, tries: int) -> dict[str, Any]:
    """Median seconds of each choice, run in turn; the costs that auto needs have been measured before."""
    from benchmarks.problems import PROBLEMS as NETWORKS

    problem = NETWORKS[name]
    rule = DDIM(problem.schedule, prediction_type=problem.prediction_type)  # type: ignore[arg-type]
    arguments = (problem.make(), problem.starts(1), problem.schedule.timesteps(steps), rule)
    runs: dict[str, Callable[[], Any]] = {"sequential": lambda: solve_sequential(*arguments)}
    runs |= {str(window): lambda window=window: solve(*arguments, window=window) for window in WINDOWS}
    runs["auto"] = lambda: solve(*arguments, window="auto")
    said = runs["auto"]().message
    times: dict[str, list[float]] = {choice: [] for choice in runs}
    for _ in range(tries):
        for choice, run in runs.items():
            started = time.perf_counter()
            run()
            times[choice].append(time.perf_counter() - started)
    return {"problem": name, "steps": steps, "said": said} | {
        "seconds": {choice: statistics.median(values) for choice, values in times.items()}
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


def main(
    tries: Annotated[int, typer.Option(min=1, help="Of each timing; medians are shown.")] = 7,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Time several processes, and the window that chooses itself."""
    torch.set_num_threads(1)
    console, figures = Console(), {}
    pair = figures["two processes"] = two_processes(tries)
    shown = _table("Two processes of one thread, embedded model, window 32", "alone, ms a round", "two, ms", "ratio")
    alone, together = (1e3 * statistics.median(pair[name]) for name in ("alone", "together"))
    shown.add_row(f"{alone:.1f}", f"{together:.1f}", f"{pair['ratio']:.2f}")
    console.print(shown)
    shown = _table(
        f"Simulated devices of {1e3 * LATENCY:.0f} ms a call", "devices", "window", "rounds", "s", "over rounds"
    )
    for ranks in (1, 2, 4, 8):
        run = figures[f"{ranks} simulated"] = simulated(ranks)
        excess = run["seconds"] / (run["rounds"] * LATENCY) - 1
        shown.add_row(str(ranks), str(4 * ranks), str(run["rounds"]), f"{run['seconds']:.2f}", f"{100 * excess:+.1f} %")
    console.print(shown)
    shown = _table("The solver's own part of a round, 4x64x64", "window", "ms", "of a call of 50 ms")
    for window in (4, 8, 16, 32):
        own = figures[f"own, {window}"] = own_part(window)
        shown.add_row(str(window), f"{1e3 * own:.2f}", f"{100 * own / 0.05:.1f} %")
    console.print(shown)
    shown = _table('window="auto", ms', "problem", "steps", "sequential", *map(str, WINDOWS), "auto", "over best")
    for name, steps in PROBLEMS:
        line = figures[f"{name}-{steps}"] = automatic(name, steps, tries)
        times = line["seconds"]
        best = min(value for choice, value in times.items() if choice != "auto")
        shown.add_row(
            name, str(steps), *(f"{1e3 * value:.1f}" for value in times.values()), f"{times['auto'] / best:.2f}"
        )
    console.print(shown)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
