"""Flows with a few steps, by a loop that the project has."""

from typing import Any

import pytest

pytest.importorskip("torch")
import torch
from torch import Tensor
from torchdiffeq import odeint as torch_odeint

from parasolver_adapters.samplers import parallel, sample_flow, step_rule_from_sampler
from parasolver_core import NoiseSchedule
from tests.adapters.sampled_networks import WEIGHTS, normal
from tests.adapters.weights import relative


def velocity(x: Tensor, t: Tensor) -> Tensor:
    """Of a flow with noise at t = 1 and data at t = 0."""
    return x - torch.tanh(x @ WEIGHTS + t[:, None])


@pytest.mark.parametrize(
    ("method", "calls"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4), ("rk4_classic", 4)]
)
def test_flows_with_few_steps_of_runge_kutta(method: str, calls: int) -> None:
    x, times, seen = normal(3, 12), torch.linspace(1, 0, 17), []
    flow: dict[str, Any] = {"schedule": NoiseSchedule.flow_matching(), "prediction_type": "flow"}
    sampler = parallel(sample_flow, 16, tolerance=1e-3, **flow)
    got = sampler(velocity, x, times, method=method, callback=lambda told: seen.append(told["i"]))
    assert relative(got, sample_flow(velocity, x, times, method=method)) < 1e-3
    assert seen == list(range(16))
    assert sampler.solution is not None
    assert sampler.solution.stats.rounds <= 12  # of 16 to 64
    assert step_rule_from_sampler(sample_flow, times, method=method, **flow).table.stages == calls
    if method != "rk4_classic":  # which that library does not have
        name = {"heun": "heun2"}.get(method, method)
        reference = torch_odeint(lambda t, x: velocity(x, t.expand(len(x))), x, times, method=name)[-1]
        assert relative(sample_flow(velocity, x, times, method=method), reference) < 1e-6
    with pytest.raises(ValueError, match="method: expected one of 'euler', 'midpoint'"):
        sample_flow(velocity, x, times, method="dopri5")


def test_both_conventions_of_flows() -> None:
    """Data at t = 1 runs as it is, without a schedule; with this library's, which has data at t = 0, it is refused."""

    def theirs(x: Tensor, t: Tensor) -> Tensor:
        return -velocity(x, 1 - t)

    x, up, down = normal(3, 12), torch.linspace(0, 1, 17), torch.linspace(1, 0, 17)
    want = sample_flow(theirs, x, up)
    assert relative(sample_flow(velocity, x, down), want) < 1e-5
    assert relative(parallel(sample_flow, 16, tolerance=0)(theirs, x, up), want) < 3e-6
    flow = NoiseSchedule.flow_matching()
    with pytest.raises(ValueError, match=r"schedule: by it the noise grows from time 0 to .*data is at t = 0 here"):
        parallel(sample_flow, schedule=flow, prediction_type="flow")(theirs, x, up)
