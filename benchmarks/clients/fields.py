"""Callers of ``torchdiffeq.odeint``; data at t = 1.

Calls that find out how a field takes many times count as rounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torchdiffeq
from sklearn.datasets import make_moons
from torch import Tensor

from benchmarks.clients.table import Client, Run, seeded
from benchmarks.problems import PROBLEMS, flow_denoiser
from benchmarks.published import torchcfm
from parasolver_adapters.diffusers import ParallelRun
from parasolver_adapters.samplers import parallel, sample_flow
from parasolver_adapters.vector_field import integrate
from parasolver_core.solution import Stats


def callers_of_odeint() -> Iterator[Client]:
    problem = PROBLEMS["policy"]
    velocity, x = flow_denoiser(problem.make(), problem), problem.starts(1)

    def field(t: Tensor, y: Tensor) -> Tensor:
        return -velocity(y, (1 - t).reshape(-1).expand(len(y)))

    for method, steps in (("euler", 32), ("midpoint", 16), ("midpoint", 32), ("rk4", 16)):
        t, own = torch.linspace(1e-3, 1, steps + 1), {"method": method}

        def plain(t: Tensor = t, own: Any = own) -> Tensor:
            return integrate(field, x, t, few_steps="sequential", **own).states[-1]

        def ours(tolerance: float, t: Tensor = t, own: Any = own) -> Run:
            found = integrate(field, x, t, few_steps="parallel", tolerance=tolerance, **own)
            return found.states[-1], ParallelRun(Stats(rounds=found.calls))

        calls = steps * {"euler": 1, "midpoint": 2, "rk4": 4}[method]
        yield Client(f"odeint, {method}, {steps} steps", 2, calls, 16, plain, ours)


def flows_of_torchcfm() -> Iterator[Client]:
    """A small network that is trained here by its OT-CFM; sampled by ``torchdiffeq.odeint``, as in its examples."""
    flows = torchcfm()
    if flows is None:
        return
    model, x = trained(flows.ExactOptimalTransportConditionalFlowMatcher(sigma=0.0)), seeded(lambda: torch.randn(64, 2))

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return model(torch.cat([x, t.expand(len(x))[:, None]], 1))

    for method, steps in (("euler", 32), ("euler", 100), ("midpoint", 32)):
        t, own = torch.linspace(0, 1, steps + 1), {"method": method}

        def plain(t: Tensor = t, own: Any = own) -> Tensor:
            return torchdiffeq.odeint(lambda t, x: velocity(x, t), x, t, **own)[-1]

        def ours(tolerance: float, t: Tensor = t, own: Any = own) -> Run:
            sample = parallel(sample_flow, 16, tolerance=tolerance)
            found = sample(velocity, x, t, **own)
            assert sample.solution is not None
            return found, sample.solution

        calls = steps * {"euler": 1, "midpoint": 2}[method]
        yield Client(f"torchcfm OT-CFM, {method}, {steps} steps", 2, calls, 16, plain, ours)


def trained(matcher: Any, steps: int = 1000) -> torch.nn.Module:
    """A network of two moons."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(3, 64), torch.nn.SELU(), torch.nn.Linear(64, 64), torch.nn.SELU(), torch.nn.Linear(64, 2)]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(steps):
        moons = torch.from_numpy(make_moons(128, noise=0.05, random_state=step)[0]).float()
        t, x, velocity = matcher.sample_location_and_conditional_flow(torch.randn_like(moons), moons)
        optimizer.zero_grad()
        (model(torch.cat([x, t[:, None]], 1)) - velocity).square().mean().backward()
        optimizer.step()
    return model.requires_grad_(False)
