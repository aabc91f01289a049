"""Which scheduler becomes a rule: its timesteps, where it begins, its options, and the noise of its own loop."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers")
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from parasolver_adapters.diffusers import UnsupportedSchedulerError, step_rule_from_scheduler
from parasolver_adapters.diffusers.schedulers import rule
from parasolver_adapters.diffusers.schedulers.clipping import ClippingDenoiser


def scheduler_of(config: dict[str, Any] | None = None, **members: Any) -> Any:
    """A stand-in with these members and configuration."""
    return SimpleNamespace(config=config or {}, **members)


@pytest.mark.parametrize(
    ("scheduler", "given", "expected"),
    [
        (DDIMScheduler(), None, 0.5),
        (FlowMatchEulerDiscreteScheduler(), None, 1.0),
        (scheduler_of({"sigma_data": 0.3}), None, 0.3),
        (scheduler_of({"sigma_data": 0.3}), 2.0, 2.0),
        (scheduler_of({}, scale_noise=1), None, 1.0),
        (scheduler_of({}), 1e-9, 1e-9),
    ],
)
def test_the_deviation_of_the_data(scheduler: Any, given: float | None, expected: float) -> None:
    assert rule._sigma_data(scheduler, given) == expected
    for wrong in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="sigma_data: expected a finite number > 0"):
            rule._sigma_data(scheduler, wrong)


@pytest.mark.parametrize("begin", [0, 1, 3])
def test_a_loop_begins_where_it_is_told(begin: int) -> None:
    seen: list[int] = []
    scheduler = scheduler_of(timesteps=torch.tensor([9, 7, 5, 1]), set_begin_index=seen.append)
    loop = rule._loop(scheduler, begin, {"eta": 1.0})
    assert [int(t) for t in loop.timesteps] == [9, 7, 5, 1][begin:]
    assert seen == ([begin] if begin else [])
    assert loop.options == {"eta": 1.0}
    without = rule._loop(scheduler_of(timesteps=torch.tensor([9, 7, 5, 1])), begin, {})
    assert len(without.timesteps) == 4 - begin


@pytest.mark.parametrize("begin", [-1, 3, 4])
def test_a_loop_that_leaves_out_the_last_timestep(begin: int) -> None:
    class SCMScheduler(SimpleNamespace):
        pass

    scheduler = SCMScheduler(timesteps=torch.tensor([9, 7, 5, 0]))
    assert [int(t) for t in rule._loop(scheduler, 2, {}).timesteps] == [5]
    with pytest.raises(ValueError, match=rf"begin_index: expected 0\.\.2, got {begin}"):
        rule._loop(scheduler, begin, {})


def test_a_scheduler_with_or_without_timesteps_of_its_own() -> None:
    def prepared(count: int | None = None, **members: Any) -> Any:
        return rule._with_timesteps(scheduler_of(**members), count)

    times = torch.tensor([3, 1])
    assert prepared(timesteps=times).timesteps.tolist() == [3, 1]
    assert prepared(timesteps=times, num_inference_steps=None, custom_timesteps=True) is not None
    assert prepared(timesteps=times, num_inference_steps=2, _step_index=None, counter=0) is not None
    assert prepared(timesteps=times, _step_index=0) is not None
    for members in ({}, {"timesteps": None}, {"timesteps": times, "num_inference_steps": None}):
        with pytest.raises(ValueError, match="num_inference_steps: expected a number"):
            prepared(**members)
    for members in ({"_step_index": 1}, {"counter": 2}):
        with pytest.raises(ValueError, match="in the middle of a run"):
            prepared(timesteps=times, **members)
    for count in (True, 2.0, 0, -1):
        with pytest.raises(ValueError, match="num_inference_steps: expected an integer of at least 1"):
            prepared(count, set_timesteps=lambda count: None)  # type: ignore[arg-type]
    seen: list[int] = []
    prepared(1, set_timesteps=seen.append, _step_index=7)
    assert seen == [1]


def test_steps_that_need_more_than_a_loop_has(monkeypatch: pytest.MonkeyPatch) -> None:
    class More(DDIMScheduler):
        def step(self, model_output: Any, timestep: Any, sample: Any, mask: Any, extra: Any = None) -> Any:  # type: ignore[override]
            raise NotImplementedError

    with pytest.raises(UnsupportedSchedulerError, match=r"More\.step needs mask besides"):
        step_rule_from_scheduler(More(clip_sample=False), 4)
    rule._check_scheduler(More(clip_sample=False), {"mask": 1, "extra": 2})
    for option in ("generator", "return_dict", "sample", "variance_noise"):
        with pytest.raises(ValueError, match=f"{option}: it differs from step to step"):
            rule._check_scheduler(More(clip_sample=False), {option: 1, "mask": 1})
    with pytest.raises(TypeError, match=r"eta: More\.step takes no such argument; it takes model_output, timestep, "):
        rule._check_scheduler(More(clip_sample=False), {"eta": 1, "mask": 1})


@pytest.mark.parametrize(
    ("configured", "predicts"),
    [("epsilon", "epsilon"), ("flow_prediction", "flow"), ("sample", "sample"), ("other", None), (None, None)],
)
def test_what_a_rule_predicts_is_a_name_that_is_known(configured: str | None, predicts: str | None) -> None:
    read = step_rule_from_scheduler(DDIMScheduler(clip_sample=False), 3)
    loop = replace(read.loop, scheduler=scheduler_of({"prediction_type": configured}))
    assert replace(read, loop=loop).predicts == predicts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_noise_of_a_loop_is_at_least_single(dtype: torch.dtype) -> None:
    scheduler = DDPMScheduler(clip_sample=False)
    read = step_rule_from_scheduler(scheduler, 5)
    generator = torch.Generator().manual_seed(5)
    noise = read.noise(generator, (2, 1, 3), dtype)
    assert noise.shape == (5, 2, 1, 3)
    assert noise.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    again = torch.Generator().manual_seed(5)
    for row in noise[:-1]:  # the last step adds none
        torch.testing.assert_close(
            row, torch.randn(2, 1, 3, generator=again, dtype=dtype).to(noise.dtype), rtol=1e-5, atol=1e-5
        )
    assert not noise[-1].any()
    assert torch.equal(generator.get_state(), again.get_state())  # it is advanced as the loop would


def test_noise_lies_where_it_is_wanted() -> None:
    read = step_rule_from_scheduler(DDPMScheduler(clip_sample=False), 2)
    torch.manual_seed(5)
    assert read.noise(None, (1, 2)).device == torch.device("cpu")
    torch.manual_seed(5)
    want = torch.randn(1, 2)
    torch.manual_seed(5)
    torch.testing.assert_close(read.noise(None, (1, 2))[0], want, rtol=1e-5, atol=1e-6)
    with torch.device("meta"):
        assert read.noise(torch.Generator("cpu"), (1, 2)).device.type == "cpu"
        assert read.noise(torch.Generator("cpu"), (1, 2), device="cpu").device.type == "cpu"


def test_a_scheduler_is_copied_with_all_that_it_holds() -> None:
    scheduler = DDIMScheduler(clip_sample=True)
    before = copy.deepcopy(dict(scheduler.config))
    step_rule_from_scheduler(scheduler, 3, clipping="denoiser")
    assert dict(scheduler.config) == before


def test_the_denoiser_that_a_rule_expects() -> None:
    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x

    assert step_rule_from_scheduler(DDIMScheduler(clip_sample=False), 3).wrap_denoiser(network) is network
    clipping = step_rule_from_scheduler(DDIMScheduler(), 3, clipping="denoiser")
    wrapped: Any = clipping.wrap_denoiser(network)
    assert isinstance(wrapped, ClippingDenoiser)
    assert (wrapped.denoiser, wrapped.clip) == (network, clipping.clip)
    assert step_rule_from_scheduler(FlowMatchEulerDiscreteScheduler(), 3).init_noise_sigma == 1.0


def test_generators_that_a_scheduler_ignores() -> None:
    class Ignoring(DDPMScheduler):
        def step(self, model_output: Any, timestep: Any, sample: Any, generator: Any = None) -> Any:  # type: ignore[override]
            torch.rand(1)  # no normal draw, and of the global stream
            return super().step(model_output, timestep, sample, generator=generator)

    read = step_rule_from_scheduler(Ignoring(clip_sample=False), 3)
    with pytest.raises(ValueError, match="generator: Ignoring ignores it"):
        read.noise(torch.Generator(), (1, 2))
    assert read.noise(None, (1, 2)).shape == (3, 1, 2)
    alone = step_rule_from_scheduler(DDPMScheduler(clip_sample=False), 3)
    one = alone.noise([torch.Generator().manual_seed(1)], (1, 2))
    torch.testing.assert_close(one, alone.noise(torch.Generator().manual_seed(1), (1, 2)))


def test_the_warning_of_noise_that_is_correlated_is_of_the_line_that_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    tabulate = rule.tabulate
    monkeypatch.setattr(rule, "tabulate", lambda *given: (*tabulate(*given)[:2], False))
    with pytest.warns(UserWarning, match="DDPMScheduler draws noise that is correlated") as told:
        assert not step_rule_from_scheduler(DDPMScheduler(clip_sample=False), 3).independent_noise
    assert told[0].filename == __file__
