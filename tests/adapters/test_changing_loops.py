"""Loops that change what is around them between two steps: the scheduler, tensors that they hold, autocast."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from parasolver_adapters.diffusers import PipelineNotParallelError, parallel_loop, parallel_sampling
from tests.adapters.tiny_pipelines import SINGLE, ddim_pipeline, distance, randn

pytestmark = pytest.mark.usefixtures("quiet_diffusers")

STEPS = 12
MULTISTEP, DDIM = diffusers.DPMSolverMultistepScheduler, diffusers.DDIMScheduler


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 6)
        self.requires_grad_(False).to(dtype)

    def forward(self, x: Tensor, t: Any, condition: Tensor | None = None) -> Tensor:
        t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1)
        hidden = self.first(x) + torch.sin(t / 100) + (0 if condition is None else condition)
        return 2 * self.last(torch.tanh(hidden))


NET = Net()


def run(scheduler: Any, x: Tensor, predict: Callable[[int, Any, Tensor], Tensor]) -> Tensor:
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(predict(i, t, x), t, x).prev_sample
    return x


def is_right(loop: Callable[[Any, Tensor], Tensor], make: Any, network: nn.Module = NET) -> None:
    want = loop(make(), randn(2, 6))
    scheduler = make()
    sample = parallel_loop(loop, 8, scheduler=scheduler, networks=[network], tolerance=0.0)
    assert distance(sample(scheduler, randn(2, 6)), want) < SINGLE
    assert sample.run.reason is None
    assert sample.run.stats.rounds <= STEPS


@pytest.mark.parametrize("how", ["in place", "NumPy", "a number"])
@pytest.mark.parametrize("make", [lambda: DDIM(clip_sample=False), MULTISTEP])
def test_a_tensor_that_the_loop_writes_into_at_every_step(make: Any, how: str) -> None:
    """It is the same at the steps that are looked at, the first and the last; results were off by a tenth."""

    def loop(scheduler: Any, x: Tensor) -> Tensor:
        scheduler.set_timesteps(STEPS)
        condition, weight = torch.zeros(2, 16, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)

        def predict(i: int, t: Any, x: Tensor) -> Tensor:
            now = 3 * math.sin(math.pi * i / STEPS)
            if how == "NumPy":
                condition.numpy()[:] = now
            elif how == "in place":
                condition.fill_(now)
            else:
                weight.fill_(now)
            return NET(x, t, condition=condition) * weight

        return run(scheduler, x, predict)

    is_right(loop, make)


@pytest.mark.parametrize("steps", [STEPS, 5])
def test_autocast_around_the_network_alone(steps: int) -> None:
    """It was called without, for all steps, and results were off by 1e-3."""
    network = Net(torch.float32)

    def loop(scheduler: Any, x: Tensor) -> Tensor:
        scheduler.set_timesteps(STEPS)

        def predict(i: int, t: Any, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=i < steps):
                return network(x.float(), t).double()

        return run(scheduler, x, predict)

    is_right(loop, lambda: DDIM(clip_sample=False), network)


@pytest.mark.parametrize("kind", [DDIM, MULTISTEP, diffusers.UniPCMultistepScheduler])
def test_a_scheduler_that_is_set_before_the_call(kind: Any) -> None:
    """Passes that are only watched leave it where it was, and so do refusals."""

    def make() -> Any:
        scheduler = kind(**({"clip_sample": False} if kind is DDIM else {}))
        scheduler.set_timesteps(STEPS)
        return scheduler

    is_right(lambda scheduler, x: run(scheduler, x, lambda i, t, x: NET(x, t)), make)

    def by_value(i: int, t: Any, x: Tensor) -> Tensor:
        return NET(x, t) * float(x.norm() > i)

    scheduler, unused = make(), make()
    sample = parallel_loop(lambda scheduler, x: run(scheduler, x, by_value), 8, scheduler=scheduler, networks=[NET])
    with pytest.raises(PipelineNotParallelError, match="decides by the values of the state"):
        sample(scheduler, randn(2, 6))
    assert vars(scheduler).keys() == vars(unused).keys()
    for name, value in vars(unused).items():
        now = vars(scheduler)[name]
        assert torch.equal(value, now) if isinstance(value, Tensor) else value == now, name


def change_sigmas(scheduler: Any) -> None:
    scheduler.sigmas = scheduler.sigmas * torch.linspace(1, 0.9, len(scheduler.sigmas))


CHANGES: dict[str, Any] = {
    "sigmas": change_sigmas,
    "alphas_cumprod": lambda scheduler: scheduler.alphas_cumprod.mul_(0.95),
    "config": lambda scheduler: scheduler.register_to_config(prediction_type="sample"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_loop_that_changes_its_scheduler_on_the_way_is_refused(name: str) -> None:
    """Steps that read several states were off by as much as a tenth without a word."""

    def loop(scheduler: Any, x: Tensor) -> Tensor:
        scheduler.set_timesteps(STEPS)

        def predict(i: int, t: Any, x: Tensor) -> Tensor:
            if i == STEPS // 2:
                CHANGES[name](scheduler)
            return NET(x, t)

        return run(scheduler, x, predict)

    want, scheduler = loop(MULTISTEP(), randn(2, 6)), MULTISTEP()
    before = copy.deepcopy(scheduler)
    sample = parallel_loop(loop, 8, scheduler=scheduler, networks=[NET])
    with pytest.raises(PipelineNotParallelError, match=rf"changes the scheduler between two steps \({name}\)"):
        sample(scheduler, randn(2, 6))
    assert torch.equal(scheduler.alphas_cumprod, before.alphas_cumprod)
    assert scheduler.config == before.config
    sample = parallel_loop(loop, 8, scheduler=scheduler, networks=[NET], fallback="sequential")
    with pytest.warns(UserWarning, match="sampled sequentially"):
        assert torch.equal(sample(scheduler, randn(2, 6)), want)


@pytest.mark.parametrize("each", [0.0, 1.0])
def test_noise_that_the_loop_draws_itself_is_refused(each: float) -> None:
    noise = randn(2, 6, seed=3)

    def loop(scheduler: Any, x: Tensor) -> Tensor:
        scheduler.set_timesteps(STEPS)
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(NET(x, t), t, x, eta=1.0, variance_noise=noise + i * each).prev_sample
        return x

    scheduler = DDIM(clip_sample=False)
    with pytest.raises(PipelineNotParallelError, match="noise of each step"):
        parallel_loop(loop, 8, scheduler=scheduler, networks=[NET])(scheduler, randn(2, 6))


@pytest.mark.parametrize("kept", ["the last", "all"])
@pytest.mark.parametrize("make", [lambda: DDIM(clip_sample=False), diffusers.UniPCMultistepScheduler])
def test_outputs_of_networks_that_the_loop_keeps(make: Any, kept: str) -> None:
    """They were zeros."""

    def loop(scheduler: Any, x: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        scheduler.set_timesteps(STEPS)

        def predict(i: int, t: Any, x: Tensor) -> Tensor:
            unguided, guided = NET(torch.cat([x, x]), t, condition=torch.ones(4, 1, dtype=x.dtype)).chunk(2)
            outputs.append(guided)
            return unguided + 2 * (guided - NET(x, t))

        run(scheduler, x, predict)
        return outputs[-1] if kept == "the last" else torch.cat(outputs)

    is_right(loop, make)


def test_a_network_whose_output_no_step_reads() -> None:
    critic = Net()

    def loop(scheduler: Any, x: Tensor) -> Tensor:
        values: list[Tensor] = []
        scheduler.set_timesteps(STEPS)

        def predict(i: int, t: Any, x: Tensor) -> Tensor:
            values.append(critic(x, t).mean())
            return NET(x, t)

        return run(scheduler, x, predict) + torch.stack(values).mean()

    want, scheduler = loop(DDIM(clip_sample=False), randn(2, 6)), DDIM(clip_sample=False)
    sample = parallel_loop(loop, 8, scheduler=scheduler, networks=[NET, critic], tolerance=0.0)
    assert distance(sample(scheduler, randn(2, 6)), want) < SINGLE


WAYS = ["a hook", "weights", "a number", "a number of the first step", "a hook in the last step"]


@pytest.mark.parametrize("way", WAYS)
def test_a_network_that_the_loop_changes_between_its_calls_is_refused(way: str) -> None:
    """Rounds called it as it was at the step that they were made for; results were off by a hundredth."""
    network, factor = Net(), [1.0]
    network.first.register_forward_hook(lambda module, given, output: output * factor[0])

    def loop(scheduler: Any, x: Tensor) -> Tensor:
        scheduler.set_timesteps(STEPS)
        weights = network.last.weight.data.clone()

        def predict(i: int, t: Any, x: Tensor) -> Tensor:
            wave = 1 + 0.3 * math.sin(math.pi * i / (STEPS - 1))  # the same at both ends
            if way == "weights":
                network.last.weight.data.copy_(weights * (2 - wave / 2))
            if way.startswith("a number"):
                factor[0] = 1 + 0.1 * i if way == "a number" else 0.5 + (i > 0) * 0.5
            hooked = way == "a hook" or (way == "a hook in the last step" and i == STEPS - 1)
            hook = network.last.register_forward_hook(lambda module, given, output: output * (2 - wave / 2))
            if not hooked:
                hook.remove()
            m = network(x, t)
            hook.remove()
            network.last.weight.data.copy_(weights)
            return m

        return run(scheduler, x, predict)

    want, scheduler = loop(DDIM(clip_sample=False), randn(2, 6)), DDIM(clip_sample=False)
    factor[0] = 1.0
    sample = parallel_loop(loop, 8, scheduler=scheduler, networks=[network], tolerance=0.0)
    with pytest.raises(PipelineNotParallelError, match="is changed by the loop between its calls"):
        sample(scheduler, randn(2, 6))
    sample = parallel_loop(loop, 8, scheduler=scheduler, networks=[network], fallback="sequential")
    with pytest.warns(UserWarning, match="sampled sequentially"):
        assert torch.equal(sample(scheduler, randn(2, 6)), want)


class Switching(diffusers.DDIMPipeline):
    """It goes on with another scheduler from the middle, and has its own again at the end."""

    @torch.no_grad()
    def __call__(self, other: bool = False) -> Any:  # type: ignore[override]
        first = self.scheduler
        second = diffusers.EulerDiscreteScheduler() if other else type(first).from_config(first.config, beta_end=0.01)
        x = randn(1, 3, 8, 8)
        for scheduler in (first, second):
            scheduler.set_timesteps(STEPS)
        for i in range(STEPS):
            if i == STEPS // 2:
                self.scheduler = second
            t = self.scheduler.timesteps[i]
            x = self.scheduler.step(self.unet(x, t).sample, t, x).prev_sample
        self.scheduler = first
        return (x,)


def test_a_scheduler_that_the_loop_replaces_is_there_again_after_a_refusal() -> None:
    """The fallback began with the second one."""
    tiny = ddim_pipeline()
    pipe = Switching(tiny.unet, tiny.scheduler)
    scheduler, want = pipe.scheduler, pipe()[0]
    with pytest.raises(PipelineNotParallelError, match="two schedulers in one loop"), parallel_sampling(pipe):
        pipe()
    assert pipe.scheduler is scheduler
    with pytest.warns(UserWarning, match="sampled sequentially"), parallel_sampling(pipe, fallback="sequential"):
        got = pipe()[0]
    assert torch.equal(got, want)
    assert pipe.scheduler is scheduler


def test_a_scheduler_of_another_kind_takes_over() -> None:
    tiny = ddim_pipeline()
    pipe = Switching(tiny.unet, tiny.scheduler)
    want = pipe(other=True)[0]
    with parallel_sampling(pipe, tolerance=0.0) as run:
        got = pipe(other=True)[0]
    assert distance(got, want) < SINGLE
    assert run.steps == STEPS // 2  # the rest is the loop's own
