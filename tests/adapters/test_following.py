"""Loops that give a scheduler other states than it has returned: the table follows, or they are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from parasolver_adapters.diffusers import parallel_sampling
from parasolver_adapters.diffusers.options import Choices
from tests.adapters.looping_pipelines import STEPS, looping, predict, refused
from tests.adapters.replay_parts import part_of, rule_of
from tests.adapters.tiny_pipelines import SINGLE, distance, randn

pytestmark = pytest.mark.usefixtures("quiet_diffusers")

KEPT = (torch.arange(8) < 5).to(torch.float64)
PICTURE = randn(1, 3, 8, 8, seed=4)


def scaled(pipe: Any, i: int, t: Any, x: torch.Tensor) -> Any:
    x = x if i == 0 else 0.99 * x
    return predict(pipe, t, x), x


def clamped(pipe: Any, i: int, t: Any, x: torch.Tensor) -> Any:
    x = x.clamp(-1.5, 1.5)
    return predict(pipe, t, x), x


def blended(pipe: Any, i: int, t: Any, x: torch.Tensor) -> Any:
    """As with a soft mask."""
    x = x if i == 0 else 0.8 * x + 0.2 * PICTURE
    return predict(pipe, t, x), x


def painted(pipe: Any, i: int, t: Any, x: torch.Tensor) -> Any:
    """A part is set anew after every step, as inpainting does."""
    x = x if i == 0 else KEPT * x + (1 - KEPT) * PICTURE * (0.2 * i)
    return predict(pipe, t, x), x


def released(pipe: Any, i: int, t: Any, x: torch.Tensor) -> Any:
    """A part is set anew in the first half."""
    return painted(pipe, i, t, x) if i < STEPS // 2 else predict(pipe, t, x)


def by_output(pipe: Any, i: int, t: Any, x: torch.Tensor) -> Any:
    m = predict(pipe, t, x)
    return m, (x if i == 0 else x + 0.1 * m)


def pipeline(name: str) -> Any:
    pipe = looping()
    pipe.scheduler = getattr(diffusers, f"{name}Scheduler")()
    return pipe


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "DEISMultistep", "PNDM", "DPMSolverSinglestep"])
@pytest.mark.parametrize("change", [scaled, clamped, blended, released])
def test_a_scheduler_that_remembers_states_is_refused_where_they_are_changed(name: str, change: Any) -> None:
    """Results were off by 3 % to 100 %, at any tolerance and without a word."""
    refused(pipeline(name), change, f"changes the state before step .*{name}Scheduler, which reads earlier states")


def test_a_state_that_is_changed_by_what_the_network_says() -> None:
    refused(pipeline("DPMSolverMultistep"), by_output, "changes the state by what the network says")


@pytest.mark.parametrize("tolerance", [0.0, 1e-2])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, painted) for name in ("DPMSolverMultistep", "DEISMultistep", "PNDM", "DPMSolverSinglestep")),
        *(("UniPCMultistep", change) for change in (scaled, clamped, blended, painted, released)),
        *(("DDIM", change) for change in (scaled, blended, released, by_output)),
    ],
)
def test_changes_that_are_followed(name: str, change: Any, tolerance: float) -> None:
    pipe = pipeline(name)
    if name == "DDIM":
        pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    want = pipe(change)[0]
    with parallel_sampling(pipe, tolerance=tolerance) as run:
        got = pipe(change)[0]
    assert run.reason is None
    assert distance(got, want) < max(tolerance, SINGLE)


def test_a_step_that_reads_more_is_compared_as_far_as_the_loop_goes_on_with_it() -> None:
    """The loop keeps the first value as it was; what becomes of it at the last step is known to the scheduler only."""
    kept = SimpleNamespace(sample=lambda state: torch.cat([torch.zeros(1), state[1:]]))
    at_the_end = SimpleNamespace(sample=lambda state: None)
    capture = SimpleNamespace(unchanged=False, timesteps=[0, 1, 2, 3], programs=[at_the_end, kept, at_the_end])
    part = part_of(_rule=rule_of(memory=2), _choices=Choices.checked(tolerance=0.0), _capture=capture)
    given, target = {"sample": torch.ones(2), "model_output": torch.ones(2)}, torch.tensor([3.0, -4.0])
    first, second = torch.tensor([5.0, -4.0]), torch.tensor([3.0, -4.1])
    assert part._fault(object(), 1, given, first, target) is None
    assert part._fault(object(), 1, given, second, target) is not None
    assert part._fault(object(), 0, given, first, target) is not None
    assert part._fault(object(), 3, given, first, target) is None
