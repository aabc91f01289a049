"""What is faster on any machine: a differential equation of many steps, and robot paths from a small network."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parasolver_adapters.embedded import policy
from parasolver_adapters.vector_field import integrate
from parasolver_cli.outcome import Row
from parasolver_cli.report import Story
from parasolver_cli.watching import Watch, first_sample, relative_errors
from parasolver_core import DDIM, solve, solve_sequential

OBSTACLES = ((0.0, 0.05, 0.3), (-0.25, -0.1, 0.25), (0.3, 0.1, 0.35), (0.1, -0.15, 0.2))
_POLICY_STEPS, _POLICY_WINDOW = 100, 32
_LENGTH = 10.0  # seconds of the pendulum's time


def pendulum(quick: bool) -> Row:
    """A pendulum by RK4: one step after another, and all steps at once."""
    steps = 2000 if quick else 10_000
    t = torch.linspace(0, _LENGTH, steps + 1, dtype=torch.float64)
    y0 = torch.tensor([1.0, 0.0], dtype=torch.float64)

    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[1], -torch.sin(y[0])])

    integrate(field, y0, t[:101])  # what is imported and compiled at first
    parallel, seconds_parallel = _timed(lambda: integrate(field, y0, t))
    sequential, seconds_sequential = _timed(lambda: integrate(field, y0, t, linearization="sequential"))
    distance = (parallel.states - sequential.states).abs().max() / sequential.states.abs().max()
    return Row(
        f"Pendulum, RK4-{steps}",
        steps=steps,
        rounds=parallel.rounds,
        evaluations=(sequential.evaluations, parallel.evaluations),
        error=float(distance),
        seconds=(seconds_sequential, seconds_parallel),
        count=1,
        tolerance=1e-10,
    )


@dataclass(frozen=True)
class Path:
    """One path of the policy, sampled twice."""

    sequential: Any
    parallel: Any
    watch: Watch
    seconds: tuple[float, float]


def paths(seed: int, tolerance: float) -> tuple[Row, Story]:
    """Robot paths past obstacles, one at a time, as a robot asks for them."""
    network = policy.load_policy()
    found = [_path(network, obstacle, seed + i, tolerance) for i, obstacle in enumerate(OBSTACLES)]
    name = f"Robot paths, DDIM-{_POLICY_STEPS}"
    sequential, parallel = (
        torch.cat([getattr(one, which).sample for one in found]).numpy() for which in ("sequential", "parallel")
    )
    rounds = max(one.parallel.stats.rounds for one in found)
    row = Row(
        name,
        steps=_POLICY_STEPS,
        rounds=rounds,
        evaluations=(_POLICY_STEPS, float(np.mean([one.parallel.stats.evaluations for one in found]))),
        error=float(relative_errors(parallel, sequential).max()),
        seconds=(sum(one.seconds[0] for one in found), sum(one.seconds[1] for one in found)),
        count=len(found),
        tolerance=tolerance,
    )
    frames = [
        torch.cat([one.watch.frames[min(i, len(one.watch.frames) - 1)] for one in found]).numpy() for i in range(rounds)
    ]
    errors = [float(relative_errors(frame[:1], sequential[:1])[0]) for frame in frames]
    ends = {"sequential": sequential, "parallel": parallel}
    records = first_sample(found[0].parallel.stats)
    return row, Story(name, _POLICY_STEPS, rounds, range(1, rounds + 1), frames, errors, ends, records, OBSTACLES)


def _path(network: policy.Policy, obstacle: tuple[float, ...], seed: int, tolerance: float) -> Path:
    told = torch.tensor([obstacle])
    x_T = torch.randn(1, policy.WAYPOINTS, 2, generator=torch.Generator().manual_seed(seed))
    rule = DDIM(policy.SCHEDULE, prediction_type=policy.PREDICTION_TYPE)
    timesteps = policy.SCHEDULE.timesteps(_POLICY_STEPS)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t, told.expand(len(x), -1))

    arguments: Any = (denoiser, x_T, timesteps, rule)
    choices: dict[str, Any] = {"window": _POLICY_WINDOW, "tolerance": tolerance}
    watch = Watch(1)
    solve(*arguments, **choices, callback=watch)  # the first run finds caches cold, and is the one that is looked at
    pairs = [
        (_timed(lambda: solve_sequential(*arguments)), _timed(lambda: solve(*arguments, **choices))) for _ in range(3)
    ]
    seconds = (min(one[1] for one, _ in pairs), min(one[1] for _, one in pairs))
    (sequential, _), (parallel, _) = pairs[-1]
    return Path(sequential, parallel, watch, seconds)


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    found = run()
    return found, max(time.perf_counter() - started, math.ulp(1.0))
