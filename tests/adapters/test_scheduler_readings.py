"""What is read from a scheduler: levels, predictions, its loop, and where it began."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers")
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DDPMWuerstchenScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UnCLIPScheduler,
)

from parasolver_adapters.bands import PROBES
from parasolver_adapters.diffusers import UnsupportedSchedulerError, step_rule_from_scheduler
from parasolver_adapters.diffusers.schedulers import probing
from parasolver_adapters.diffusers.schedulers.stepping import Loop, Node
from parasolver_adapters.draws import Float64, no_noise
from parasolver_core.samplers.recurrence import Recurrence

Config = dict[str, Any]


def scheduler_of(config: Config | None = None, **members: Any) -> Any:
    """A stand-in with these members and configuration."""
    return SimpleNamespace(config=config or {}, **members)


def node_of(scheduler: Any, timestep: int = 3, index: int = 0) -> Node:
    x = torch.linspace(-1, 2, 64, dtype=torch.float64).reshape(PROBES)
    return Node(index, torch.tensor(timestep), x, 2 * x, scheduler)


def test_levels_are_those_of_the_schedulers_noise() -> None:
    add = lambda sample, noise, t: 0.8 * sample + 0.1 * noise * t  # noqa: E731
    scale = lambda sample, t, noise: 0.7 * sample + 0.2 * noise * t  # noqa: E731
    assert probing._levels(node_of(scheduler_of(add_noise=add))) == pytest.approx((0.8, 0.3), rel=1e-6)
    assert probing._levels(node_of(scheduler_of(add_noise=add, scale_noise=scale))) == pytest.approx((0.7, 0.6))
    for nothing in (scheduler_of(), scheduler_of(add_noise=lambda sample: sample)):
        assert np.isnan(probing._levels(node_of(nothing))).all()


@pytest.mark.parametrize(
    ("config", "levels", "expected"),
    [
        ({"prediction_type": "epsilon"}, (0.8, 0.6), (1.25, -0.75)),
        ({"prediction_type": "sample"}, (0.8, 0.6), (0.0, 1.0)),
        ({"prediction_type": "v_prediction"}, (0.8, 0.6), (0.8, -0.6)),
        ({"prediction_type": "flow_prediction"}, (0.7, 0.3), (1.0, -0.3)),
        ({"prediction_type": "flow"}, (0.5, 0.3), (1.25, -0.375)),
        ({}, (0.7, 0.3), (1.0, -0.3)),  # on a linear path it is a velocity
        ({}, (0.3, 0.7 + 9e-7), (1.0, -0.7)),
        ({}, (0.3, 0.7 - 9e-7), (1.0, -0.7)),
        ({}, (0.3, 0.7 + 2e-6), (np.nan, np.nan)),
        ({}, (0.8, 0.6), (np.nan, np.nan)),
        ({"prediction_type": "other"}, (0.7, 0.3), (np.nan, np.nan)),
    ],
)
def test_the_prediction_is_what_the_configuration_says(config: Config, levels: Any, expected: Any) -> None:
    got = probing._prediction(scheduler_of(config), *levels)
    assert got == pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_the_step_itself_says_best_what_the_clean_sample_is() -> None:
    known = (0.8, 0.6, 1.0, 2.0)
    node = node_of(scheduler_of(sigmas=[5.0]))
    m = torch.cos(7 * node.x)

    def refined(scheduler: Any = node.scheduler, **output: Any) -> Any:
        return probing._refine(known, replace(node, scheduler=scheduler), m, SimpleNamespace(**output))

    assert refined() == known
    assert refined(pred_original_sample=None) == known
    assert refined(pred_original_sample=node.x[0]) == known  # of another form
    assert refined(pred_original_sample=node.x**2) == known  # not linear
    assert refined(pred_original_sample=3 * node.x - 4 * m) == pytest.approx((0.8, 0.6, 3, -4))
    outputs = scheduler_of(sigmas=[5.0], precondition_outputs=lambda x, m, sigma: sigma * x + m)
    assert refined(outputs) == pytest.approx((0.8, 0.6, 5, 1))
    assert refined(outputs, pred_original_sample=3 * node.x - 4 * m) == pytest.approx((0.8, 0.6, 3, -4))


@pytest.mark.parametrize(
    ("config", "advice"),
    [
        ({}, []),
        ({"rescale_betas_zero_snr": True, "prediction_type": "epsilon"}, ["use prediction_type='v_prediction'"]),
        ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, []),
        ({"prediction_type": "epsilon"}, []),
        ({"variance_type": "learned"}, ["variance_type='learned'"]),
        ({"variance_type": "fixed_small"}, []),
        ({"solver_type": "bh1", "final_sigmas_type": "zero"}, ["solver_type='bh2'"]),
        ({"solver_type": "bh1", "final_sigmas_type": "sigma_min"}, []),
        ({"solver_type": "bh2", "final_sigmas_type": "zero"}, []),
        (
            {"variance_type": "learned", "solver_type": "bh1", "final_sigmas_type": "zero"},
            ["variance_type='learned'", "solver_type='bh2'"],
        ),
    ],
)
def test_advice_is_on_options_that_are_set(config: Config, advice: list[str]) -> None:
    told = probing._suspects(Loop(scheduler_of(config), (), {}))
    assert len(told.split("; ")) - 1 == len(advice)
    assert all(one in told for one in advice)
    assert told.startswith("; ") is bool(advice)


@pytest.mark.parametrize(
    ("members", "size"), [({}, 1.0), ({"init_noise_sigma": 0.5}, 1.0), ({"init_noise_sigma": 9}, 9.0)]
)
def test_states_begin_in_the_size_that_they_have_in_use(members: dict[str, Any], size: float) -> None:
    assert probing._start_size(Loop(scheduler_of(**members), (), {})) == size
    x = torch.tensor([3.0, 4.0])
    assert probing._ratio(x, x) == 1.0
    assert probing._ratio(x / 4, x) == 0.25
    assert probing._ratio(torch.tensor([1.0, 0.0]), x) == pytest.approx(3 / 25)


class Simple:
    """Euler's steps of ``m``, which fail where they are told to."""

    def __init__(self, fails_at: int = -1, gives: Any = None) -> None:
        self.config: Config = {}
        self.fails_at, self.gives, self.done = fails_at, gives, 0

    def scale_model_input(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x / (1 + t)

    def step(self, m: torch.Tensor, t: torch.Tensor, x: torch.Tensor, gain: float = 1.0) -> Any:
        self.done += 1
        if self.done - 1 == self.fails_at:
            if self.gives is None:
                raise KeyError("boom")
            m = m * self.gives
        return SimpleNamespace(prev_sample=x + 0.1 * gain * m)


def loop_of(scheduler: Any, count: int = 4, **options: Any) -> Loop:
    return Loop(scheduler, tuple(torch.arange(count, 0, -1)), options)


@pytest.mark.parametrize("at", [0, 2])
def test_a_failure_is_that_of_the_schedulers_own_step(at: int) -> None:
    def run(scheduler: Simple) -> list[Any]:
        loop = loop_of(scheduler)
        return list(probing._guarded(loop, lambda node: node.x, torch.ones(PROBES, dtype=torch.float64)))

    assert len(run(Simple())) == 4
    with pytest.raises(
        UnsupportedSchedulerError, match=f"Simple's own sequential run fails at step {at}, KeyError: 'boom'"
    ):
        run(Simple(at))
    for gives in (np.nan, np.inf):
        with pytest.raises(UnsupportedSchedulerError, match=rf"NaN or infinity at step {at} \(timestep {4 - at}\)"):
            run(Simple(at, gives))


def test_a_loop_runs_a_copy_with_its_options() -> None:
    scheduler = Simple()
    loop, x = loop_of(scheduler, gain=2.0), torch.ones(2, 3)
    seen = list(loop.run(lambda node: 3 * node.model_input, x, Float64(no_noise)))
    assert scheduler.done == 0
    assert loop.name == "Simple"
    assert [node.index for node, _, _ in seen] == [0, 1, 2, 3]
    assert [int(node.timestep) for node, _, _ in seen] == [4, 3, 2, 1]
    for node, m, output in seen:
        assert torch.equal(node.x, x)
        assert torch.equal(node.model_input, x / (1 + node.timestep))
        assert torch.equal(m, 3 * node.model_input)
        torch.testing.assert_close(output.prev_sample, x + 0.2 * m)
        assert node.scheduler is not scheduler
        x = output.prev_sample
    assert len(list(loop.run(lambda node: node.x, x, Float64(no_noise)))) == 4  # any number of times


def stepped(kind: type, timesteps: list[int]) -> list[tuple[Any, ...]]:
    """What a scheduler's step is given in its own loop."""
    seen: list[tuple[Any, ...]] = []

    class Stand(Simple):
        def step(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            seen.append((args, kwargs))
            out = args[0] + 1
            return (out, 10 * out) if kind is CogVideoXDPMScheduler else SimpleNamespace(prev_sample=out)

    Stand.__name__ = kind.__name__
    loop = Loop(Stand(), tuple(torch.tensor(timesteps)), {"eta": 0.5})
    list(loop.run(lambda node: node.x, torch.zeros(2, 1), Float64(no_noise)))
    return seen


def test_arguments_that_pipelines_give_some_schedulers() -> None:
    unclip = stepped(UnCLIPScheduler, [9, 5, 2])
    assert [kwargs["prev_timestep"] for _, kwargs in unclip] == [5, 2, None]
    assert all(kwargs["eta"] == 0.5 for _, kwargs in unclip)
    wuerstchen = stepped(DDPMWuerstchenScheduler, [9, 5])
    assert [args[1].tolist() for args, _ in wuerstchen] == [[9, 9], [5, 5]]
    assert all(kwargs == {"eta": 0.5} for _, kwargs in wuerstchen)
    video = stepped(CogVideoXDPMScheduler, [9, 5, 2])
    olds, backs = [args[1] for args, _ in video], [args[3] for args, _ in video]
    assert olds[0] is None
    assert [old.tolist() for old in olds[1:]] == [[[10], [10]], [[20], [20]]]
    assert backs == [None, 9, 5]
    assert [int(args[2]) for args, _ in video] == [9, 5, 2]
    assert all(kwargs == {"eta": 0.5, "return_dict": False} for _, kwargs in video)


@pytest.mark.parametrize(("scheduler", "stages"), [(DDIMScheduler(clip_sample=False), 1), (HeunDiscreteScheduler(), 2)])
def test_a_trace_is_a_run_of_the_loop(scheduler: Any, stages: int) -> None:
    scheduler.set_timesteps(4)
    count = len(scheduler.timesteps)
    traced = probing.trace(Loop(scheduler, tuple(scheduler.timesteps), {}), None)
    assert traced.x.shape == (count + 1, 64)
    assert traced.m.shape == (count, 64)
    assert [draws.shape for draws in traced.draws] == [(0, 64)] * count
    assert traced.x[0].std() == pytest.approx(max(1, float(scheduler.init_noise_sigma)), rel=0.3)
    clean = traced.path.p[:, None] * traced.x[:-1] + traced.path.q[:, None] * traced.m
    assert np.all(np.abs(clean.std(1) - 1) < 0.3)  # its network predicts standard normal samples
    read = step_rule_from_scheduler(scheduler).table
    assert (read.stages, read.input_scale is None) == (stages, stages == 1)


def test_consistency_models_and_shares_of_the_input() -> None:
    """A step of consistency models is their clean sample; Euler's network sees a scaled state."""
    euler = EulerDiscreteScheduler()
    read = step_rule_from_scheduler(euler, 5)
    sigmas: Any = EulerDiscreteScheduler.from_config(euler.config)
    sigmas.set_timesteps(5)
    want = 1 / np.sqrt(sigmas.sigmas[:-1].double().numpy() ** 2 + 1)
    assert read.table.input_scale is not None
    np.testing.assert_allclose(read.table.input_scale, want, rtol=1e-6)
    assert read.band == (1, 1)
    assert step_rule_from_scheduler(LCMScheduler(), 4).independent_noise is True


def test_a_step_of_a_consistency_model_is_its_clean_sample() -> None:
    read = step_rule_from_scheduler(CMStochasticIterativeScheduler(clip_denoised=False), 4)
    assert np.array_equal(read.table.held, np.concatenate([read.table.a, read.table.b], axis=1))


def test_a_scheduler_that_says_little() -> None:
    """Neither how many calls a step takes, nor what its network predicts."""
    table, path, independent = probing.tabulate(loop_of(Simple()), np.arange(4), 0.5)
    np.testing.assert_allclose(table.a, np.ones((4, 1)))
    np.testing.assert_allclose(table.b, np.full((4, 1), 0.1))
    assert (table.stages, independent) == (1, True)
    assert np.isnan(path.p).all()
    assert table.input_scale is not None
    np.testing.assert_allclose(table.input_scale, [1 / 5, 1 / 4, 1 / 3, 1 / 2])


def table_of(count: int = 3) -> Recurrence:
    return step_rule_from_scheduler(DDIMScheduler(clip_sample=False), count).table


@pytest.mark.parametrize(("off", "right"), [(0.9e-8, True), (1.2e-8, False)])
def test_a_table_is_off_the_scheduler_by_rounding_at_most(off: float, right: bool) -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(3)
    loop, table = Loop(scheduler, tuple(scheduler.timesteps), {}), table_of()
    (node, _, output), *_ = probing.run_nonlinear(loop)
    size = float(max(output.prev_sample.abs().max(), node.x.abs().max()))
    a = table.a.copy()
    a[0, 0] += off * size / float(node.x.abs().max())
    wrong = replace(table, a=a)
    if right:
        probing.check_replay(loop, wrong)
    else:
        with pytest.raises(UnsupportedSchedulerError, match=r"step 0 of DDIMScheduler \(timestep 66[67]\) is off"):
            probing.check_replay(loop, wrong)
        probing.check_replay(loop, wrong, tolerance=1e-6)
