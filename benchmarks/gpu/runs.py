"""Whole runs in seconds: the plain loop, the loop with its step captured, and parallel ones, in turns.

Two kinds of networks. Trained ones, small. And ones of real size whose output counts for nothing beside the exact
score of pictures, which takes no time to speak of: there, the cost of a call and the convergence are both real, and
the picture is not the network's. The loops are bare, so that the baseline is the least that a sampler can do.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.device import Lab, distance
from benchmarks.gpu.networks import NETWORKS
from benchmarks.gpu.scores import Score, pictures
from benchmarks.policy import SCHEDULE as POLICY_SCHEDULE
from benchmarks.policy import demonstrations, load_policy
from benchmarks.problems import Denoiser, emoji_denoiser
from parasolver_adapters.embedded import SCHEDULE as EMBEDDED_SCHEDULE
from parasolver_adapters.embedded import EmbeddedDenoiser, load_embedded_model
from parasolver_adapters.graphs import GraphedDenoiser
from parasolver_core import DDIM, DDPM, NoiseSchedule, solve, solve_sequential
from parasolver_core.samplers.schedules import DiscreteSchedule

PART = "runs"
TURNS = 4  # the first warms up, and counts only where there was no time for another
TOLERANCE = 1e-2
LONG, TIMED = 200, 100  # of a sequential loop of more steps, so many are timed

Way = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Problem:
    """A network on the device, a sampler and one start.

    Args:
        name: of the line of results.
        network: what is timed.
        exact: what gives the same, at any cost, for the true sample.
        schedule, prediction_type: of the network.
        x_T: (1, *event).
        steps: of the sampler.
        windows: to try.
        sampler: "DDIM" or "DDPM".
    """

    name: str
    network: Denoiser
    exact: Denoiser
    schedule: DiscreteSchedule
    prediction_type: str
    x_T: Tensor
    steps: int
    windows: tuple[int, ...]
    sampler: str = "DDIM"

    @property
    def rule(self) -> DDIM | DDPM:
        kind = DDIM if self.sampler == "DDIM" else DDPM
        return kind(self.schedule, prediction_type=self.prediction_type)

    @property
    def noise(self) -> dict[str, Any]:
        return {"seed": 0} if self.sampler == "DDPM" else {}


def in_small(lab: Lab, steps: int) -> int:
    return min(steps, 16) if lab.tiny else steps


def start(lab: Lab, *event: int) -> Tensor:
    return torch.randn(1, *event, generator=torch.Generator().manual_seed(0)).to(lab.device)


def policy(lab: Lab, sampler: str, steps: int) -> Problem:
    """The trained diffusion policy."""
    network = load_policy().to(lab.device)
    obstacle = demonstrations(1, torch.Generator().manual_seed(7))[1].to(lab.device)

    def told(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t, obstacle.expand(len(x), -1))

    name, windows = f"policy, trained, {sampler}-{steps}", (8, 16, 32) if sampler == "DDPM" else (16, 50)
    steps = in_small(lab, steps)
    return Problem(name, told, told, POLICY_SCHEDULE, "v_prediction", start(lab, 16, 2), steps, windows, sampler)


def trained(lab: Lab, kind: str) -> Problem:
    """The embedded model or the emoji model."""
    event, windows = ((1, 28, 28), (8, 16)) if kind == "embedded" else ((3, 32, 32), (8, 16))
    network: Denoiser = (
        EmbeddedDenoiser(model=load_embedded_model(device=lab.device))
        if kind == "embedded"
        else emoji_denoiser(lab.device)
    )
    name, steps = f"{kind} model, trained, DDIM-50", in_small(lab, 50)
    return Problem(name, network, network, EMBEDDED_SCHEDULE, "epsilon", start(lab, *event), steps, windows)


def carried(lab: Lab, name: str, sampler: str, steps: int, windows: tuple[int, ...]) -> Problem:
    """A network of real size beside an exact score."""
    made, schedule = NETWORKS[name](lab.device, lab.tiny), NoiseSchedule.linear()
    if name.startswith("robot"):
        data, schedule = demonstrations(300, torch.Generator().manual_seed(1))[0].flatten(1), POLICY_SCHEDULE
    else:
        data = pictures(20 if lab.tiny else 300, made.event)
    score = Score(data.to(lab.device), schedule)

    def network(x: Tensor, t: Tensor) -> Tensor:
        idle = torch.nan_to_num(made.nodes(x, t).float(), 0.0, 0.0, 0.0).clamp(-1, 1).flatten(1)[: len(x)]
        return score(x, t) + 0.0 * idle.mean(dim=1).reshape(-1, *[1] * (x.ndim - 1))

    about, steps = f"{name} beside an exact score, {sampler}-{steps}", in_small(lab, steps)
    return Problem(about, network, score, schedule, "epsilon", start(lab, *made.event), steps, windows, sampler)


CASES: list[tuple[Callable[[Lab], Problem], float]] = [  # and what share of the time each may take
    (lambda lab: policy(lab, "DDPM", 100), 8),
    (lambda lab: carried(lab, "robot 1-D U-Net", "DDPM", 100, (8, 16, 32)), 14),
    (lambda lab: carried(lab, "DiT-XL/2, 256 pixels, guidance", "DDIM", 50, (4, 8, 16)), 20),
    (lambda lab: carried(lab, "church DDPM, 256 pixels", "DDIM", 50, (4, 8, 16)), 16),
    (lambda lab: carried(lab, "church DDPM, 256 pixels", "DDPM", 1000, (32, 64)), 36),
    (lambda lab: trained(lab, "embedded"), 6),
    (lambda lab: trained(lab, "emoji"), 6),
    (lambda lab: policy(lab, "DDIM", 100), 6),
]


class Loops:
    """The sequential loop, bare: ``x = a x + b m + c z`` with the noise drawn on the device, plain and captured.

    Args:
        lab, problem: what is timed.
    """

    def __init__(self, lab: Lab, problem: Problem) -> None:
        self._lab, self._problem = lab, problem
        timesteps = problem.schedule.timesteps(problem.steps)
        table = problem.rule.recurrence(timesteps)
        self.steps = TIMED if problem.steps > LONG else problem.steps
        self.times = problem.steps / self.steps  # as long as the timed steps
        self._times = torch.from_numpy(timesteps).to(lab.device)
        self._host = [table.a[:, 0].tolist(), table.b[:, 0].tolist(), table.c.tolist()]
        self._there = [torch.tensor(one, dtype=torch.float32, device=lab.device) for one in self._host]
        self._noisy = problem.sampler == "DDPM"
        self._x, self._at = problem.x_T.clone(), torch.zeros(1, dtype=torch.int64, device=lab.device)
        self._replay: Callable[[], Any] | None = None

    def plain(self) -> dict[str, Any]:
        x = self._problem.x_T
        for i, (a, b, c) in enumerate(zip(*self._host, strict=True)):
            if i == self.steps:
                break
            x = x * a + self._problem.network(x, self._times[i : i + 1]) * b
            x = x + torch.randn_like(x) * c if self._noisy else x
        return {"sample": x}

    def _step(self) -> Tensor:
        a, b, c = (one[self._at] for one in self._there)
        new = self._x * a + self._problem.network(self._x, self._times[self._at]) * b
        self._x.copy_(new + torch.randn_like(new) * c if self._noisy else new)
        self._at.add_(1)
        return self._x

    def captured(self) -> dict[str, Any]:
        if self._replay is None:
            self._restart()
            self._replay, _ = self._lab.captured(self._step)
        self._restart()
        for _ in range(self.steps):
            self._replay()
        return {"sample": self._x.clone()}

    def _restart(self) -> None:
        self._x.copy_(self._problem.x_T)
        self._at.zero_()


def ways(lab: Lab, problem: Problem, loops: Loops) -> dict[str, Way]:
    """How the sample is drawn, the most wanted first."""
    timesteps = problem.schedule.timesteps(problem.steps)

    def parallel(network: Denoiser, window: int | str) -> dict[str, Any]:
        solution = solve(
            network, problem.x_T, timesteps, problem.rule, window, tolerance=TOLERANCE, check=False, **problem.noise
        )
        stats = solution.stats
        return {"sample": solution.sample, "rounds": stats.rounds, "evaluations": stats.evaluations}

    found: dict[str, Way] = {"plain loop": loops.plain, "captured loop": loops.captured}
    rows = sorted({1, *(one // 4 for one in problem.windows), *(one // 2 for one in problem.windows), *problem.windows})
    graphed = GraphedDenoiser(problem.network, rows=[one for one in rows if one > 0])
    for window in problem.windows[:1] if lab.tiny else problem.windows:
        found[f"window {window}, graphs"] = lambda w=window: parallel(graphed, w)
        found[f"window {window}"] = lambda w=window: parallel(problem.network, w)
    if problem.steps <= LONG:  # measuring for it takes half a sequential run
        found['window "auto"'] = lambda: parallel(problem.network, "auto")
    return found


def raced(lab: Lab, part: str, problem: Problem, seconds: float) -> None:
    """A line for each way: median seconds, times as fast as both loops, rounds, evaluations and the true error."""
    until = min(time.monotonic() + seconds, lab.until)
    loops = Loops(lab, problem)
    truth = solve_sequential(
        problem.exact, problem.x_T, problem.schedule.timesteps(problem.steps), problem.rule, **problem.noise
    ).sample
    every, taken = ways(lab, problem, loops), {}
    told: dict[str, dict[str, Any]] = {}
    for _ in range(2 if lab.tiny else TURNS):
        for name, way in every.items():
            own = taken.setdefault(name, [])
            if "error" in told.get(name, {}) or time.monotonic() + min(own, default=0.0) > until:
                continue
            try:
                lab.wait()
                started = time.perf_counter()
                found = way()
                lab.wait()
                own.append(time.perf_counter() - started)
            except Exception as error:
                told[name] = {"ok": False, "error": f"{type(error).__name__}: {error}"[:200]}
                continue
            told[name] = _judged(name, found, truth, problem, loops)
    seconds_of = {
        name: statistics.median(own[1:] or own) * (loops.times if name.endswith("loop") else 1)
        for name, own in taken.items()
        if own
    }
    for name in every:
        line = told.get(name, {"ok": False, "error": "no time left"})
        if name in seconds_of:
            line["seconds"], line["turns"] = seconds_of[name], len(taken[name])
            for loop in ("plain loop", "captured loop"):
                if loop in seconds_of and loop != name:
                    line[f"times the {loop}"] = seconds_of[loop] / seconds_of[name]
        lab.put(part, problem.name, way=name, **line)


def _judged(name: str, found: dict[str, Any], truth: Tensor, problem: Problem, loops: Loops) -> dict[str, Any]:
    """Whether a sample is what it should be; a loop that draws its own noise, or ends early, cannot be compared."""
    sample = found.pop("sample")
    if not name.endswith("loop"):
        error = distance(sample, truth)
        within = error <= TOLERANCE
        return {"ok": bool(math.isfinite(error)), "error of the sample": error, "within tolerance": within, **found}
    if problem.sampler == "DDPM" or loops.times != 1:
        return {"ok": bool(torch.isfinite(sample).all())}
    error = distance(sample, truth)
    return {"ok": error <= TOLERANCE, "error of the sample": error}


def run(lab: Lab) -> None:
    """All cases, each with its share of the time."""
    for place, (make, share) in enumerate(CASES):
        seconds = lab.left * share / sum(other for _, other in CASES[place:])
        with torch.no_grad():
            try:
                raced(lab, PART, make(lab), seconds)
            except Exception as error:
                lab.put(PART, f"case {place}", ok=False, error=f"{type(error).__name__}: {error}"[:300])
        lab.empty()
