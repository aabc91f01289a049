"""Schedulers of the user's own: what their steps may do, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("diffusers")
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from parasolver_adapters.diffusers import PipelineNotParallelError, parallel_loop
from parasolver_adapters.diffusers.schedulers.rule import UnsupportedSchedulerError, step_rule_from_scheduler
from tests.adapters.tiny_pipelines import distance, randn

pytestmark = pytest.mark.usefixtures("quiet_diffusers")

STEPS = 12


class Own(DDIMScheduler):
    """Its steps, changed by :meth:`last`."""

    def __init__(self, **config: Any) -> None:
        super().__init__(clip_sample=False, **config)

    def step(self, model_output: Any, timestep: Any, sample: Any, generator: Any = None, **options: Any) -> Any:
        output = super().step(model_output, timestep, sample, generator=generator, **options)
        assert not isinstance(output, tuple)
        output.prev_sample = self.last(output.prev_sample, model_output, sample, generator)
        return output

    def last(self, x: Tensor, model_output: Tensor, sample: Tensor, generator: Any) -> Tensor:
        return x


class IntoSample(Own):
    def last(self, x: Tensor, model_output: Tensor, sample: Tensor, generator: Any) -> Tensor:
        return sample.copy_(x)


class IntoOutput(Own):
    def last(self, x: Tensor, model_output: Tensor, sample: Tensor, generator: Any) -> Tensor:
        model_output.mul_(0.5)
        return x


class Shared(Own):
    """All values of a sample have the same noise."""

    def last(self, x: Tensor, model_output: Tensor, sample: Tensor, generator: Any) -> Tensor:
        return x + 0.1 * torch.randn((len(x), *[1] * (x.ndim - 1)), generator=generator, dtype=x.dtype)


class Flat(Own):
    def last(self, x: Tensor, model_output: Tensor, sample: Tensor, generator: Any) -> Tensor:
        return x + 0.1 * torch.randn(x.numel(), generator=generator, dtype=x.dtype).reshape(x.shape)


def loop_of(scheduler: Any, **options: Any) -> tuple[Any, nn.Module]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 6), nn.Tanh()).requires_grad_(False).double()

    def loop(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x), t, x, generator=generator, **options).prev_sample
        return x

    return loop, network


@pytest.mark.parametrize(("kind", "name"), [(IntoSample, "sample"), (IntoOutput, "model_output")])
def test_steps_that_write_into_what_they_are_given_are_refused(kind: Any, name: str) -> None:
    """The state that a step read was the one that it returned, so a step seemed to change nothing."""
    message = f"{kind.__name__}.step writes into the {name} that it is given"
    with pytest.raises(UnsupportedSchedulerError, match=message):
        step_rule_from_scheduler(kind(), STEPS)
    scheduler = kind()
    loop, network = loop_of(scheduler)
    want = loop(randn(2, 6))
    options: dict[str, Any] = {"scheduler": scheduler, "networks": [network]}
    with pytest.raises(PipelineNotParallelError, match=message):
        parallel_loop(loop, 5, **options)(randn(2, 6))
    with pytest.warns(UserWarning, match="sampled sequentially"):
        assert torch.equal(parallel_loop(loop, 5, fallback="sequential", **options)(randn(2, 6)), want)


@pytest.mark.parametrize("kind", [Shared, Flat])
def test_noise_of_another_shape_than_the_state(kind: Any) -> None:
    """It ended in an error about the shape of an array."""
    scheduler = kind()
    loop, network = loop_of(scheduler)
    sample = parallel_loop(loop, 5, scheduler=scheduler, networks=[network], tolerance=0.0)
    for seed in (0, 1):
        own, ours = (torch.Generator().manual_seed(seed) for _ in range(2))
        assert distance(sample(randn(2, 6), ours), loop(randn(2, 6), own)) < 1e-12
        assert torch.equal(own.get_state(), ours.get_state())
        assert sample.run.reason is None


@pytest.mark.parametrize("options", [{}, {"eta": 0.5}])
def test_a_step_that_passes_options_on(options: dict[str, Any]) -> None:
    """It was refused, as if it needed an argument of that name."""
    scheduler = Own()
    loop, network = loop_of(scheduler, **options)
    sample = parallel_loop(loop, 5, scheduler=scheduler, networks=[network], tolerance=0.0)
    want = loop(randn(2, 6), torch.manual_seed(0))
    assert distance(sample(randn(2, 6), torch.manual_seed(0)), want) < 1e-12
    assert sample.run.reason is None
    rule = step_rule_from_scheduler(scheduler, STEPS, **options)
    assert rule.table.stochastic == bool(options)


class Deaf(Own):
    """It ignores the generator that it is given."""

    def last(self, x: Tensor, model_output: Tensor, sample: Tensor, generator: Any) -> Tensor:
        return x + 0.1 * torch.randn(x.shape, dtype=x.dtype)


def test_a_step_that_ignores_its_generator_is_refused() -> None:
    """A fallback did not help."""
    scheduler = Deaf()
    loop, network = loop_of(scheduler)
    torch.manual_seed(3)
    want = loop(randn(2, 6), torch.Generator())
    sample = parallel_loop(loop, 5, scheduler=scheduler, networks=[network])
    with pytest.raises(PipelineNotParallelError, match="Deaf ignores it and draws from the global stream"):
        sample(randn(2, 6), torch.Generator())
    sample = parallel_loop(loop, 5, scheduler=scheduler, networks=[network], fallback="sequential")
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="sampled sequentially"):
        assert torch.equal(sample(randn(2, 6), torch.Generator()), want)


class Listed(Own):
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.timesteps = self.timesteps.numpy()  # type: ignore[assignment]


def test_timesteps_that_are_no_tensor_are_refused() -> None:
    scheduler = Listed()
    loop, network = loop_of(scheduler)
    with pytest.raises(PipelineNotParallelError, match="Listed has no tensor of timesteps, got ndarray"):
        parallel_loop(loop, 5, scheduler=scheduler, networks=[network])(randn(2, 6))


class AnyStep(DDIMScheduler):
    def step(self, *args: Any, **kwargs: Any) -> Any:
        return super().step(*args, **kwargs)


def test_a_step_whose_arguments_have_no_names_is_refused() -> None:
    """It ended in an error about the length of a tuple."""
    scheduler = AnyStep(clip_sample=False)
    loop, network = loop_of(scheduler)
    want = loop(randn(2, 6), torch.manual_seed(0))
    sample = parallel_loop(loop, 5, scheduler=scheduler, networks=[network])
    with pytest.raises(PipelineNotParallelError, match=r"never called scheduler.step\(model_output"):
        sample(randn(2, 6), torch.manual_seed(0))
    sample = parallel_loop(loop, 5, scheduler=scheduler, networks=[network], fallback="sequential")
    with pytest.warns(UserWarning, match="sampled sequentially"):
        assert torch.equal(sample(randn(2, 6), torch.manual_seed(0)), want)
