"""Whole runs in seconds: the plain loop, the plain loop with a captured step, and parallel, in turns.

The networks are those that are trained here. The loops are bare, so that the baseline is the
least that a sampler can do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.device import Lab, distance
from benchmarks.policy import SCHEDULE as POLICY_SCHEDULE
from benchmarks.policy import demonstrations, load_policy
from benchmarks.problems import Denoiser
from parasolver_adapters.embedded import SCHEDULE as EMBEDDED_SCHEDULE
from parasolver_adapters.embedded import EmbeddedDenoiser, load_embedded_model
from parasolver_core import DDIM, Solution, solve
from parasolver_core.samplers.schedules import DiscreteSchedule

PART = "runs"
TURNS = 7


@dataclass(frozen=True)
class Problem:
    """A trained network on the device, DDIM and its start."""

    name: str
    network: Denoiser
    schedule: DiscreteSchedule
    prediction_type: str
    x_T: Tensor
    steps: int
    window: int


def problems(lab: Lab) -> list[Problem]:
    """The diffusion policy and the embedded model, one sample."""
    policy = load_policy().to(lab.device)
    obstacle = demonstrations(1, torch.Generator().manual_seed(7))[1].to(lab.device)
    embedded = EmbeddedDenoiser(model=load_embedded_model(device=lab.device))

    def start(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(lab.device)

    def told(x: Tensor, t: Tensor) -> Tensor:
        return policy(x, t, obstacle.expand(len(x), -1))

    few = 10 if lab.tiny else 100
    return [
        Problem("policy, DDIM-100", told, POLICY_SCHEDULE, "v_prediction", start(16, 2), few, 100),
        Problem("embedded model, DDIM-50", embedded, EMBEDDED_SCHEDULE, "epsilon", start(1, 28, 28), few // 2, 16),
    ]


def captured_network(lab: Lab, problem: Problem) -> Denoiser:
    """The network of one row as a CUDA graph: copied in, replayed. On a CPU the network."""
    x, t = problem.x_T.clone(), torch.zeros(1, dtype=torch.int64, device=lab.device)
    replay, output = lab.captured(lambda: problem.network(x, t))

    def network(given: Tensor, times: Tensor) -> Tensor:
        x.copy_(given)
        t.copy_(times)
        replay()
        return output

    return network if lab.cuda else problem.network


def in_turns(lab: Lab, problem: Problem) -> dict[str, Any]:
    """Median milliseconds of each, and what the parallel run ends with."""
    rule = DDIM(problem.schedule, prediction_type=problem.prediction_type)
    timesteps = problem.schedule.timesteps(problem.steps)
    recurrence, times = rule.recurrence(timesteps), torch.from_numpy(timesteps).to(lab.device)

    def loop(network: Denoiser) -> Tensor:
        x = problem.x_T
        for i in range(len(recurrence)):
            x = recurrence.advance(i, [x], [network(x, times[i : i + 1])], None)
        return x

    def parallel() -> Solution:
        return solve(problem.network, problem.x_T, timesteps, rule, problem.window, tolerance=1e-2, check=False)

    graph = captured_network(lab, problem)
    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: loop(problem.network),
        "captured": lambda: loop(graph),
        "parallel": parallel,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + (1 if lab.tiny else TURNS)):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            lab.wait()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: 1e3 * statistics.median(found[1:]) for name, found in seconds.items()}  # the first warms up
    truth, found = loop(problem.network), parallel()
    error = distance(found.sample, truth)
    ok = error <= 1e-2 and distance(loop(graph), truth) < 1e-3
    return {"ok": ok, **medians, "rounds": found.stats.rounds, "error": error}


def run(lab: Lab) -> None:
    """Both problems."""
    with torch.no_grad():
        for problem in problems(lab):
            lab.measure(PART, problem.name, lambda p=problem: in_turns(lab, p))
