"""What a denoiser, a step rule and a start say of themselves has to agree."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from parasolver_core import DDIM, DDPM, DPMSolver, Euler, NoiseSchedule, StepRule, clip_sample, solve, solve_sequential
from parasolver_core.denoiser.contract import predicted_by
from tests.core.problems import Rational, normal

TABLE, KARRAS, FLOW = NoiseSchedule.linear(), NoiseSchedule.karras(0.03, 14.6), NoiseSchedule.flow_matching()


class Predicting:
    """A denoiser that says what it predicts."""

    def __init__(self, prediction_type: Any) -> None:
        self.prediction_type = prediction_type

    def __call__(self, x: Any, t: Any) -> Any:
        return x / (1 + x * x)


@pytest.mark.parametrize("run", [solve, solve_sequential])
@pytest.mark.parametrize(
    ("rule", "reads"),
    [
        (DDIM(TABLE), "epsilon"),
        (DDPM(TABLE, prediction_type="sample"), "sample"),
        (DPMSolver(TABLE, prediction_type="v_prediction"), "v_prediction"),
        (Euler(FLOW), "flow"),
        (Euler(KARRAS), "sample"),
    ],
)
def test_a_denoiser_and_a_rule_that_contradict_each_other_are_refused(rule: Any, reads: str, run: Any) -> None:
    grid, x_T = rule.schedule.timesteps(12), rule.schedule.init_noise_sigma * normal((2, 4))
    for kind in ("epsilon", "sample", "v_prediction", "flow"):
        if kind == reads:
            assert run(Predicting(kind), x_T, grid, rule).success
            continue
        for denoiser in (Predicting(kind), clip_sample(Predicting(kind), rule.schedule)):
            with pytest.raises(ValueError, match=rf"^step_rule: it reads .*'{reads}'.* predicts '{kind}'"):
                run(denoiser, x_T, grid, rule)


@pytest.mark.parametrize("told", [None, 3, object()])
def test_a_denoiser_that_says_nothing_is_taken_as_it_is(told: Any) -> None:
    assert predicted_by(Predicting(told)) is None
    assert solve(Predicting(told), normal((2, 4)), TABLE.timesteps(12), DDIM(TABLE)).success


class OwnRule(StepRule):
    """A rule of one's own around another's table."""

    def __init__(self, prediction_type: str | None = None) -> None:
        if prediction_type is not None:
            self.prediction_type = prediction_type

    def recurrence(self, timesteps: Any) -> Any:
        return DDIM(TABLE).recurrence(timesteps)


def test_a_rule_of_ones_own() -> None:
    grid = TABLE.timesteps(12)
    assert solve(Predicting("sample"), normal((2, 4)), grid, OwnRule()).success
    assert solve(Predicting("sample"), normal((2, 4)), grid, OwnRule("sample")).success
    with pytest.raises(ValueError, match=r"^step_rule: it reads .*'epsilon'"):
        solve(Predicting("sample"), normal((2, 4)), grid, OwnRule("epsilon"))


def test_clipping_takes_the_clean_sample_from_what_the_denoiser_predicts() -> None:
    with pytest.raises(ValueError, match=r"^prediction_type: the denoiser predicts 'sample', got 'epsilon'"):
        clip_sample(Predicting("sample"), TABLE, "epsilon")
    with pytest.raises(ValueError, match=r"^prediction_type: expected one of .*did you mean 'epsilon'"):
        clip_sample(Rational(), TABLE, "eps")
    x, t = 5 * normal((3, 4)), np.array([900, 500, 10])
    np.testing.assert_allclose(clip_sample(lambda x, t: x, TABLE, "sample")(x, t), np.clip(x, -1, 1), rtol=1e-12)
    clipped = clip_sample(Predicting("sample"), TABLE)
    assert predicted_by(clipped) == "sample"


@pytest.mark.parametrize(("schedule", "kind"), [(KARRAS, "epsilon"), (FLOW, "flow")])
def test_clipping_at_times_that_are_no_integers(schedule: Any, kind: str) -> None:
    """Both predict ``(x - sample) / t``."""
    x, t = 5 * normal((3, 4)), np.array([0.9, 0.5, 0.1])
    clipped = clip_sample(lambda x, t: np.tanh(x), schedule, kind, clip_range=0.7)(x, t)
    sample = x - t[:, None] * np.tanh(x)
    assert (np.abs(sample) < 0.7).any()
    np.testing.assert_allclose(clipped, (x - np.clip(sample, -0.7, 0.7)) / t[:, None], rtol=1e-12)


def test_a_class_in_the_place_of_a_rule() -> None:
    with pytest.raises(
        TypeError, match=r"^step_rule: got the class DDIM; make an object of it, such as DDIM\(schedule\)"
    ):
        solve(Rational(), normal((2, 4)), TABLE.timesteps(12), DDIM)  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [1, 6])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_noise_that_was_not_scaled_is_told(window: int, dtype: str) -> None:
    x_T = torch.asarray(normal((2, 16))).to(getattr(torch, dtype))
    with pytest.warns(
        UserWarning, match=r"^x_T: has an RMS of .*noise of 14.61; give noise \* schedule.init_noise_sigma"
    ):
        solve(Rational(), x_T, KARRAS.timesteps(12), Euler(KARRAS), window)


@pytest.mark.parametrize(("rule", "scale"), [(DDIM(TABLE), 1.0), (Euler(KARRAS), 14.6)])
def test_a_start_far_larger_than_the_noise_is_told(rule: StepRule, scale: float) -> None:
    grid = rule.schedule.timesteps(12)  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match=r"^x_T: has an RMS of .*far larger than the noise of 1"):
        solve(Rational(), 60 * scale * normal((2, 4)), grid, rule, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(Rational(), 10 * scale * normal((2, 4)), grid, rule, 6)


@pytest.mark.parametrize(
    ("x_T", "grid"),
    [
        (14.6 * normal((2, 16)), KARRAS.timesteps(12)),
        (0.02 * normal((2, 16)), KARRAS.timesteps(12)),  # no standard normal noise either; who knows
        (np.zeros((2, 16)), KARRAS.timesteps(12)),
        (normal((1, 8)), KARRAS.timesteps(12)),  # too few numbers to be sure
        (normal((2, 16)), np.array([1.0, 0.5, 0.1])),  # a start on the way
        (normal((2, 16)), np.array([3.0, 0.5, 0.1])),
    ],
    ids=["scaled", "small", "zero", "few", "late", "nearly"],
)
def test_a_start_that_may_be_meant_is_not_told_of(x_T: Any, grid: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(Rational(), x_T, grid, Euler(KARRAS))


def test_other_paths_begin_with_standard_normal_noise() -> None:
    for schedule in (TABLE, FLOW):
        assert Euler(schedule).start_scale(schedule.timesteps(10)) == 1.0
    assert Euler(KARRAS).start_scale(KARRAS.timesteps(10)) == pytest.approx(np.hypot(14.6, 0.5))
