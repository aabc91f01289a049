"""Loops around ``scheduler.step`` that are nobody's pipeline, as policies of robots have them."""

from __future__ import annotations

import functools
from typing import Any

import pytest

pytest.importorskip("diffusers")
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from benchmarks.policy import load_policy
from benchmarks.policy_loops import OBSTACLES, ddim, ddpm, known_beginning
from parasolver_adapters.diffusers import PipelineNotParallelError, parallel_loop, parallel_sampling
from parasolver_core import ConvergenceError, Status
from tests.adapters.tiny_pipelines import distance

pytestmark = pytest.mark.usefixtures("quiet_diffusers")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("make", [ddpm, ddim])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_policys_own_loop_is_run_unchanged(make: Any, batch: int) -> None:
    actor, condition = make(), OBSTACLES[:batch].double()
    want = actor.conditional_sample(batch, condition, seeded())
    for tolerance, limit in ((0.0, 1e-10), (1e-2, 1e-2)):
        sample, generator = parallel_loop(actor.conditional_sample, 16, tolerance=tolerance), seeded()
        assert distance(sample(batch, condition, generator=generator), want) < limit
        assert sample.run.stats.rounds < actor.steps
        assert sample.run.status is Status.CONVERGED
    once = seeded()
    actor.conditional_sample(batch, condition, once)
    assert torch.equal(generator.get_state(), once.get_state())


def test_the_loop_may_stay_inside_the_object_that_calls_it() -> None:
    actor = ddim()
    torch.manual_seed(1)
    want, after = actor.conditional_sample(2, OBSTACLES[:2].double()), torch.rand(1)
    actor.conditional_sample = parallel_loop(actor.conditional_sample, 16, tolerance=0.0)  # type: ignore[method-assign]
    torch.manual_seed(1)
    assert distance(actor.conditional_sample(2, OBSTACLES[:2].double()), want) < 1e-10
    assert torch.equal(torch.rand(1), after)
    assert type(actor.noise_scheduler) is DDIMScheduler
    assert "forward" not in vars(actor.network)


def test_a_loop_that_writes_what_is_known_into_the_state() -> None:
    actor, (data, mask) = ddpm(), known_beginning(2)
    want = actor.inpaint(data, mask, OBSTACLES[:2].double(), seeded())
    for tolerance, limit in ((0.0, 1e-10), (1e-2, 1e-2)):
        sample = parallel_loop(actor.inpaint, 16, tolerance=tolerance)
        assert distance(sample(data, mask, OBSTACLES[:2].double(), seeded()), want) < limit
    assert sample.run.stats.rounds < 35


def test_a_function_with_its_scheduler_and_networks_named_and_two_calls_a_step() -> None:
    network, scheduler = load_policy(torch.float64), ddim().noise_scheduler

    @torch.no_grad()
    def guided(x: Tensor, /, scale: float, obstacle: Tensor) -> Tensor:
        scheduler.set_timesteps(30)
        for t in scheduler.timesteps:
            with_it, without = (network(x, t.expand(len(x)), one) for one in (obstacle, torch.zeros_like(obstacle)))
            x = scheduler.step(without + scale * (with_it - without), t, x).prev_sample
        return x

    x = torch.randn(2, 16, 2, generator=seeded(), dtype=torch.float64)
    own = {"scale": 1.5, "obstacle": OBSTACLES[:2].double()}
    sample = parallel_loop(guided, 16, scheduler=scheduler, networks=[network], tolerance=0.0)
    assert distance(sample(x, **own), guided(x, **own)) < 1e-10
    assert sample.run.stats.rounds < 25


def test_what_a_pass_that_is_only_watched_writes_into_arguments_is_taken_back() -> None:
    actor, scheduler = ddim(), ddim().noise_scheduler

    @torch.no_grad()
    def loop(x: Tensor) -> Tensor:
        scheduler.set_timesteps(10)
        x.mul_(0.5)
        for t in scheduler.timesteps:
            x = scheduler.step(actor.network(x, t.expand(len(x)), OBSTACLES[:2].double()), t, x).prev_sample
        return x

    x = torch.randn(2, 16, 2, generator=seeded(), dtype=torch.float64)
    own, ours = x.clone(), x.clone()
    want = loop(own)
    sample = parallel_loop(loop, 5, scheduler=scheduler, networks=[actor.network], tolerance=0.0)
    assert distance(sample(ours), want) < 1e-10
    assert torch.equal(ours, own)


def test_a_window_of_one_calls_the_loop_as_it_is() -> None:
    actor, condition = ddim(), OBSTACLES[:2].double()
    want = actor.conditional_sample(2, condition, seeded())
    sample = parallel_loop(actor.conditional_sample, 1)
    assert torch.equal(sample(2, condition, seeded()), want)
    assert sample.run.stats.rounds == actor.steps


def test_a_loop_with_momentum_is_refused() -> None:
    network, scheduler = load_policy(torch.float64), ddim().noise_scheduler

    @torch.no_grad()
    def loop(x: Tensor) -> Tensor:
        scheduler.set_timesteps(10)
        before = torch.zeros_like(x)
        for t in scheduler.timesteps:
            output = network(x, t.expand(len(x)), OBSTACLES[:2].double())
            x, before = scheduler.step(output + 0.1 * before, t, x).prev_sample, output
        return x

    x = torch.randn(2, 16, 2, generator=seeded(), dtype=torch.float64)
    sample = parallel_loop(loop, 5, scheduler=scheduler, networks=[network])
    with pytest.raises(PipelineNotParallelError, match="uses what an earlier step computed"):
        sample(x)
    sample = parallel_loop(loop, 5, scheduler=scheduler, networks=[network], fallback="sequential")
    with pytest.warns(UserWarning, match="sampled sequentially: a step of the loop uses") as told:
        assert torch.equal(sample(x), loop(x))
    assert told[0].filename == __file__


def test_a_network_that_was_not_named_is_refused() -> None:
    actor = ddim()
    sample = parallel_loop(actor.conditional_sample, 5, networks=[nn.Linear(1, 1)])
    with pytest.raises(PipelineNotParallelError, match="never calls one of the networks"):
        sample(2, OBSTACLES[:2].double(), seeded())


def test_a_loop_that_is_not_done_in_time_gives_its_estimate() -> None:
    actor, condition = ddpm(), OBSTACLES.double()
    want = actor.conditional_sample(4, condition, seeded())
    sample = parallel_loop(actor.conditional_sample, 16, tolerance=1e-3, max_seconds=1e-9)
    got = sample(4, condition, seeded())
    assert sample.run.status is Status.MAX_SECONDS
    assert sample.run.stats.rounds == 1
    assert got.shape == want.shape
    assert distance(got, want) <= sample.run.error_estimate
    sample = parallel_loop(actor.conditional_sample, 16, tolerance=1e-3, max_seconds=600)
    assert distance(sample(4, condition, seeded()), want) < 1e-3
    assert sample.run.status is Status.CONVERGED
    assert sample.run.error_estimate < 1e-3


def test_too_few_rounds_are_an_error_with_what_was_reached() -> None:
    actor = ddpm()
    sample = parallel_loop(actor.conditional_sample, 16, max_rounds=2)
    with pytest.raises(ConvergenceError, match="max_rounds=2") as caught:
        sample(4, OBSTACLES.double(), seeded())
    assert caught.value.solution.sample.shape == (4, 16, 2)


class Two:
    """An object with two schedulers."""

    def __init__(self) -> None:
        self.network, self.first, self.second = nn.Linear(1, 1), DDPMScheduler(), DDIMScheduler()

    def sample(self) -> None: ...


class Empty:
    scheduler = DDPMScheduler()

    def __init__(self) -> None:
        self.own = DDPMScheduler()

    def sample(self) -> None: ...


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: parallel_loop("x"), TypeError, "call: expected a function"),  # type: ignore[arg-type]
        (lambda: parallel_loop(lambda: 1), ValueError, "0 were found among the attributes of a function"),
        (lambda: parallel_loop(Two().sample), ValueError, "scheduler: .* 2 were found among the attributes of Two"),
        (lambda: parallel_loop(Two().sample, scheduler=1), TypeError, "scheduler: expected a scheduler of diffusers"),
        (lambda: parallel_loop(Empty().sample), ValueError, "networks: .* none were found among the attributes of Emp"),
        (
            functools.partial(parallel_loop, Empty().sample, networks=[1]),
            TypeError,
            "networks: expected torch modules, got int",
        ),
        (lambda: parallel_loop(Empty().sample, networks=[]), ValueError, "networks: expected the modules .* got none"),
        (lambda: parallel_loop(ddim().conditional_sample, 0), ValueError, "window"),
        (lambda: parallel_loop(ddim().conditional_sample, max_seconds=0), ValueError, "max_seconds: expected"),
    ],
)
def test_bad_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_an_object_that_is_no_pipeline_is_told_of_loops() -> None:
    with pytest.raises(TypeError, match="parallel_loop"), parallel_sampling(ddim()):
        pass
