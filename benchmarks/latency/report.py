"""The tables."""

from __future__ import annotations

import math

import numpy as np

from benchmarks.latency.devices import BatchCost, Device, break_even, mean_speedup
from benchmarks.latency.replays import Replay
from benchmarks.latency.timings import Timing

GPUS = (1, 2, 4, 8)


def timing_table(timings: list[Timing]) -> list[dict[str, str]]:
    """One row for each sampler, window and tolerance."""
    return [
        {
            "network": one.problem,
            "sampler": f"{one.sampler}-{one.steps}",
            "window": str(one.window),
            "tolerance": f"{one.tolerance:.1%}",
            "rounds / evaluations": f"{one.rounds:.1f} / {one.evaluations:.0f}",
            "error, mean / worst": f"{one.error:.2%} / {one.worst:.2%}",
            "ms: sequential / bare / parallel": " / ".join(
                f"{1e3 * seconds:.1f}" for seconds in (one.sequential, one.bare, one.parallel)
            ),
            "ms a round: network / own": f"{1e3 * one.network / one.rounds:.2f} / {1e3 * one.own / one.rounds:.2f}",
            "speed-up: sequential / bare": f"{one.sequential / one.parallel:.1f} / {one.bare / one.parallel:.1f}",
            "limit: own = 0": f"{one.bare / one.predicted:.1f}",
        }
        for one in timings
    ]


def cost_table(costs: list[BatchCost]) -> list[dict[str, str]]:
    """Milliseconds of a call for each number of rows."""
    return [
        {
            "network": one.problem,
            **{str(rows): f"{1e3 * seconds:.2f}" for rows, seconds in zip(one.rows, one.seconds, strict=True)},
            "k": f"{one.free:.1f}",
        }
        for one in costs
    ]


def replay_table(replays: list[Replay], overhead: float) -> list[dict[str, str]]:
    """Where it breaks even, and the speed-up on some machines."""
    rows = []
    for one in replays:
        even = [break_even(one.steps, one.rounds, gpus, overhead) for gpus in GPUS]

        def at(free: float, gpus: int, one: Replay = one) -> str:
            return f"{mean_speedup(one.steps, one.rounds, Device(free, gpus, overhead)):.1f}"

        rows.append(
            {
                "network": one.problem,
                "setting": one.name,
                "rounds": f"{np.mean([len(rounds) for rounds in one.rounds]):.1f}",
                "evaluations": f"{np.mean([sum(rounds) for rounds in one.rounds]):.0f}",
                "error": f"{one.error:.2%}",
                f"break-even k, {' / '.join(map(str, GPUS))} GPUs": " / ".join(str(k or "-") for k in even),
                "k = 4": at(4, 1),
                "k = 16": at(16, 1),
                "k = 64": at(64, 1),
                "8 GPUs, k = 1": at(1, 8),
                "8 GPUs, k = 4": at(4, 8),
                "batch free": at(math.inf, 1),
            }
        )
    return rows
