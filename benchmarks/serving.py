"""When to batch requests and when to sample in parallel: ``python -m benchmarks.serving``.

Requests for the diffusion policy arrive at random (Poisson) at several loads, and are answered by the server of
``examples/server.py`` in three ways: one after another and in parallel, as sequential batches, and with a window that
shrinks as the batch grows. Seconds are from the arrival of a request to its answer.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.policy import SCHEDULE, WAYPOINTS, demonstrations, load_policy
from examples.server import Sampler

WAYS: dict[str, dict[str, int]] = {
    "one at a time, window 32": {"rows": 32, "max_batch": 1},
    "batches of 16, sequential": {"rows": 1, "max_batch": 16},
    "batches of 16, 32 rows a round": {"rows": 32, "max_batch": 16},
}


def main(
    loads: Annotated[str, typer.Option(help="Requests per second.")] = "5,20,100",
    seconds: Annotated[float, typer.Option(help="How long requests arrive.")] = 6.0,
    steps: Annotated[int, typer.Option(help="Steps of DDIM.")] = 100,
) -> None:
    """Print a table: median and 95 % of the seconds to an answer."""
    torch.set_num_threads(1)
    policy = load_policy()
    print("| requests per second | way | answered | median, ms | 95 %, ms | mean batch |\n|---|---|---|---|---|---|")
    for load in map(float, loads.split(",")):
        for way, choices in WAYS.items():
            sampler = Sampler(
                lambda x, t, condition: policy(x, t, condition), SCHEDULE, "v_prediction", steps=steps, **choices
            )
            times, batches = drive(sampler, load, seconds)
            low, high = np.quantile(times, [0.5, 0.95]) * 1000
            print(f"| {load:g} | {way} | {len(times)} | {low:.0f} | {high:.0f} | {np.mean(batches):.1f} |", flush=True)


def drive(sampler: Sampler, load: float, seconds: float) -> tuple[list[float], list[int]]:
    """Seconds of each request, and the batch that it was sampled in."""
    random = np.random.default_rng(0)
    count = max(8, int(load * seconds))
    arrivals = np.cumsum(random.exponential(1 / load, count))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, WAYPOINTS, 2, generator=generator)
    _, obstacles = demonstrations(count, generator)
    sampler.start()
    sampler.submit(noise[0], obstacles[0]).result()  # warm
    ends: dict[int, float] = {}
    answers: list[Any] = []
    start = time.perf_counter()
    for index, arrival in enumerate(arrivals):
        time.sleep(max(0.0, start + arrival - time.perf_counter()))
        answer = sampler.submit(noise[index], obstacles[index])
        answer.add_done_callback(lambda _, index=index: ends.setdefault(index, time.perf_counter()))
        answers.append(answer)
    batches = [answer.result()[1] for answer in answers]
    sampler.stop()
    return [ends[index] - start - arrivals[index] for index in range(count)], batches


if __name__ == "__main__":
    typer.run(main)
