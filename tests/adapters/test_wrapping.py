"""Networks as their training code calls them: what they predict, how they count time, and their conditions."""

import math
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from torch import Tensor

from parasolver_adapters.wrapping import ModelDenoiser, k_diffusion_denoiser
from parasolver_core import DDIM, DPMSolver, Euler, NoiseSchedule, check_denoiser, solve, solve_sequential
from parasolver_core.samplers.schedules import PredictionType
from tests.adapters.weights import relative
from tests.core.problems import Gaussian

LINEAR = NoiseSchedule.linear()
MEANS = torch.tensor([-0.5, 0.0, 0.8], dtype=torch.float64)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def at_a_point(x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
    """eps of data that sits at a mean of each row, (rows, 1)."""
    alpha, sigma = (torch.as_tensor(level[:-1])[:, None] for level in LINEAR.levels(t.numpy()))
    return (x - alpha * mean) / sigma


@pytest.mark.parametrize("prediction_type", [one for one in get_args(PredictionType) if one != "flow"])
def test_the_declared_prediction_reaches_the_step_rule(prediction_type: Any) -> None:
    gaussian = Gaussian(LINEAR, prediction_type)
    denoiser = ModelDenoiser(gaussian, LINEAR, prediction_type)
    x_T, timesteps = normal(2, 3), LINEAR.timesteps(40)
    got = solve(denoiser, x_T, timesteps, DDIM(denoiser.schedule), window=8, tolerance=0).sample
    expected = solve_sequential(gaussian, x_T, timesteps, DDIM(LINEAR, prediction_type=prediction_type)).sample
    assert relative(got, expected) < 1e-12
    assert LINEAR.default_prediction_type == "epsilon"


@pytest.mark.parametrize(
    ("schedule", "time", "t", "expected"),
    [
        (LINEAR, None, [0, 999], [0, 999]),
        (LINEAR, "timestep", [0, 999], [0, 999]),
        (LINEAR, "unit", [0, 333, 999], [0.0, 1 / 3, 1.0]),
        (LINEAR, "sigma", [0, 999], [0.0100005, 157.40689]),
        (LINEAR, lambda t: t / 1000, [0, 250], [0.0, 0.25]),
        (NoiseSchedule.flow_matching(), "unit", [0.25, 1.0], [0.25, 1.0]),
        (NoiseSchedule.flow_matching(), "timestep", [0.25, 1.0], [250.0, 1000.0]),
        (NoiseSchedule.karras(), "sigma", [0.1, 80.0], [0.1, 80.0]),
    ],
)
def test_time_as_the_model_counts_it(schedule: Any, time: Any, t: list[float], expected: list[float]) -> None:
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return x

    ModelDenoiser(model, schedule, "epsilon", time=time)(normal(len(t), 3), torch.tensor(t))
    np.testing.assert_allclose(seen[0].numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("mean", [MEANS[:, None], MEANS[1:2, None]])
@pytest.mark.parametrize("method", ["secant", "sequential"])
def test_conditions_are_those_of_each_sample(mean: Tensor, method: str) -> None:
    denoiser = ModelDenoiser(at_a_point, LINEAR, "epsilon", conditions={"mean": mean})
    arguments = normal(3, 4), LINEAR.timesteps(20), DDIM(denoiser.schedule)
    assert check_denoiser(denoiser, *arguments[:2]).ok
    sample = solve(denoiser, *arguments, window=5, method=method, tolerance=0).sample
    assert float((sample - mean).abs().max()) < 1e-10


def test_conditions_may_be_nested_and_other_things_pass() -> None:
    mode = object()

    def model(x: Tensor, t: Tensor, extra: dict[str, Any], pair: Any, mode_: Any, scale: Tensor) -> tuple[Tensor]:
        assert mode_ is mode
        assert scale.ndim == 0
        return (at_a_point(x, t, extra["mean"] + pair[1]),)

    conditions = {"extra": {"mean": MEANS[:, None]}, "pair": (1, MEANS[:, None]), "mode_": mode}
    denoiser = ModelDenoiser(model, LINEAR, "epsilon", conditions=conditions | {"scale": torch.tensor(2.0)})
    sample = solve(denoiser, normal(3, 4), LINEAR.timesteps(20), DDIM(LINEAR), tolerance=0).sample
    assert float((sample - 2 * MEANS[:, None]).abs().max()) < 1e-10


def test_classifier_free_guidance() -> None:
    denoiser = ModelDenoiser(
        at_a_point,
        LINEAR,
        "epsilon",
        conditions={"mean": MEANS[:, None]},
        null_conditions={"mean": torch.zeros(1, 1, dtype=torch.float64)},
        guidance_scale=3.0,
    )
    sample = solve(denoiser, normal(3, 4), LINEAR.timesteps(20), DDIM(LINEAR), tolerance=0).sample
    assert float((sample - 3 * MEANS[:, None]).abs().max()) < 1e-10


def test_a_model_of_k_diffusion() -> None:
    schedule = NoiseSchedule.karras(0.01, 50.0)

    def model(x: Tensor, sigma: Tensor, mean: Tensor) -> Tensor:
        return mean + (x - mean) / (1 + sigma[:, None] ** 2)

    denoiser = k_diffusion_denoiser(model, schedule, conditions={"mean": MEANS[:, None]})
    x_T, timesteps = 50 * normal(3, 64), schedule.timesteps(60)
    arguments = denoiser, x_T, timesteps, DPMSolver(denoiser.schedule, order=2)
    parallel, sequential = solve(*arguments, window=16), solve_sequential(*arguments)
    assert relative(parallel.sample, sequential.sample) < 1e-2
    # the flow of data N(mean, 1) keeps (x - mean) / sqrt(1 + sigma^2)
    exact = MEANS[:, None] + (x_T - MEANS[:, None]) / (1 + 50.0**2) ** 0.5
    assert relative(sequential.sample, exact) < 1e-2
    euler = solve(denoiser, x_T, schedule.timesteps(500), Euler(denoiser.schedule), window=32).sample
    assert relative(euler, exact) < 2e-2


@pytest.mark.parametrize("wrapped", ["tensor", "tuple", "sample"])
def test_a_module_in_half_precision(wrapped: str) -> None:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, x: Tensor, t: Tensor) -> Any:
            out = self.layer(x)
            return {"tensor": out, "tuple": (out, None), "sample": SimpleNamespace(sample=out)}[wrapped]

    torch.manual_seed(0)
    module = Module().eval().requires_grad_(False)
    x, t = normal(3, 4).float(), torch.tensor([1, 2, 3])
    wide = ModelDenoiser(module, LINEAR, "epsilon")(x, t)
    half = ModelDenoiser(module.bfloat16(), LINEAR, "epsilon", dtype=torch.bfloat16)(x, t)
    assert half.dtype is torch.float32
    assert 0 < relative(half, wide) < 0.02


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model": torch.nn.Linear(2, 2)}, r"model: it is in training mode.*eval\(\)"),
        ({"prediction_type": "eps"}, "prediction_type: expected one of 'epsilon'"),
        ({"time": "seconds"}, "time: expected None or 'timestep' for this schedule, got 'seconds'"),
        ({"schedule": NoiseSchedule.flow_matching(), "time": "sigma"}, "time: expected None or 'unit'"),
        ({"guidance_scale": 2.0}, "guidance_scale: expected it and null_conditions together"),
        ({"guidance_scale": math.inf, "null_conditions": {}}, "guidance_scale: expected a finite number, got inf"),
        (
            {"guidance_scale": 2.0, "null_conditions": {"y": 1}},
            "null_conditions: expected names of conditions, got 'y'",
        ),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], named: str) -> None:
    arguments: dict[str, Any] = {"model": lambda x, t: x, "schedule": LINEAR, "prediction_type": "epsilon"}
    with pytest.raises(ValueError, match=named):
        ModelDenoiser(**(arguments | options))


def test_things_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(TypeError, match="model: expected model"):
        ModelDenoiser(3, LINEAR, "epsilon")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="schedule: expected a NoiseSchedule"):
        ModelDenoiser(lambda x, t: x, 1000, "epsilon")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: expected a tensor, a tuple"):
        ModelDenoiser(lambda x, t: "x", LINEAR, "epsilon")(normal(1, 2), torch.tensor([3]))
    with pytest.raises(ValueError, match="time: expected the function to give a tensor of shape"):
        ModelDenoiser(lambda x, t: x, LINEAR, "epsilon", time=lambda t: t[:1])(normal(2, 2), torch.tensor([3, 4]))


def test_conditions_that_do_not_fit_the_batch_are_refused() -> None:
    denoiser = ModelDenoiser(at_a_point, LINEAR, "epsilon", conditions={"mean": MEANS[:2, None]})
    with pytest.raises(
        ValueError, match=r"conditions\['mean'\]: expected one for each sample.*got 2 for a batch of at"
    ):
        solve(denoiser, normal(3, 4), LINEAR.timesteps(5), DDIM(LINEAR))
    with pytest.raises(ValueError, match=r"conditions\['mean'\]: got 2 for 3 rows"):
        denoiser(normal(3, 4), torch.tensor([1, 2, 3]))
    pair: dict[str, Any] = {"conditions": {"mean": MEANS[:, None]}, "null_conditions": {"mean": None}}
    with pytest.raises(ValueError, match=r"null_conditions\['mean'\]: expected a tensor shaped like"):
        ModelDenoiser(at_a_point, LINEAR, "epsilon", guidance_scale=2.0, **pair)(normal(3, 4), torch.tensor([1, 2, 3]))


def test_a_step_rule_that_reads_another_prediction_is_refused() -> None:
    schedule = NoiseSchedule.linear()
    denoiser = ModelDenoiser(lambda x, t: x, schedule, "v_prediction")
    x_T, timesteps = torch.zeros(1, 4), schedule.timesteps(9)
    with pytest.raises(ValueError, match=r"^step_rule: it reads .*'epsilon'.* predicts 'v_prediction'"):
        solve(denoiser, x_T, timesteps, DDIM(schedule))
    assert solve(denoiser, x_T, timesteps, DDIM(denoiser.schedule)).success
    assert solve(denoiser, x_T, timesteps, DDIM(schedule, prediction_type="v_prediction")).success
