"""Networks as their training code calls them: what they predict, how they count time, and their conditions."""

import inspect
import math
from types import SimpleNamespace
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from torch import Tensor

from parasolver_adapters.wrapping import ModelDenoiser, k_diffusion_denoiser, prediction_of
from parasolver_core import DDIM, DPMSolver, Euler, NoiseSchedule, Rows, check_denoiser, solve, solve_sequential
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


class Style(NamedTuple):
    mean: Tensor
    more: Tensor


def test_conditions_in_a_named_tuple_keep_their_names() -> None:
    style = Style(MEANS[:, None], torch.zeros(1, 1, dtype=torch.float64))
    denoiser = ModelDenoiser(
        lambda x, t, style: at_a_point(x, t, style.mean + style.more),
        LINEAR,
        "epsilon",
        conditions={"style": style},
        null_conditions={"style": Style(-style.mean, style.more)},
        guidance_scale=1.5,
    )
    x_T, timesteps, rule = normal(3, 4), LINEAR.timesteps(10), DDIM(LINEAR)
    got = solve(denoiser, x_T, timesteps, rule, window=4, tolerance=0).sample
    want = solve_sequential(
        lambda x, t: at_a_point(x, t, 2 * MEANS[:, None].repeat(len(x) // 3, 1)), x_T, timesteps, rule
    ).sample
    assert relative(got, want) < 1e-12


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
    with pytest.raises(TypeError, match=r"^schedule: expected NoiseSchedule.karras\(.*got DiscreteSchedule"):
        k_diffusion_denoiser(lambda x, sigma: x, LINEAR)  # type: ignore[arg-type]


def test_conditions_that_do_not_fit_the_batch_are_refused() -> None:
    denoiser = ModelDenoiser(at_a_point, LINEAR, "epsilon", conditions={"mean": MEANS[:2, None]})
    for batch in (1, 3):  # without a refusal, one sample would have the first of a pair of guidance
        said = rf"conditions\['mean'\]: expected one for each of the {batch} samples, or a first axis of 1, got 2"
        with pytest.raises(ValueError, match=said):
            solve(denoiser, normal(batch, 4), LINEAR.timesteps(5), DDIM(LINEAR))
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


def recorded(**options: Any) -> tuple[ModelDenoiser, list[Any]]:
    """A denoiser whose model keeps what it is called with, and gives x back."""
    seen: list[Any] = []

    def model(x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        seen.append((x, t, conditions))
        return x

    return ModelDenoiser(model, LINEAR, "epsilon", **options), seen


def rows_of(batch: int, *samples: int) -> Any:
    nothing: Any = None
    return Rows(np.zeros(len(samples), np.int64), np.array(samples), nothing, nothing, batch)


def test_conditions_are_dealt_out_to_rows_wherever_they_are() -> None:
    each, one, number = torch.arange(3.0)[:, None], torch.tensor([[7.0]]), torch.tensor(5.0)
    denoiser, seen = recorded(conditions={"a": {"b": each}, "c": [one, (each + 10,)], "d": number, "e": "word"})
    assert denoiser.takes_rows
    denoiser(normal(4, 2), torch.arange(4), rows_of(3, 2, 0, 1, 2))
    given = seen[0][2]
    assert given["a"]["b"].ravel().tolist() == [2, 0, 1, 2]
    assert type(given["c"]) is list
    assert given["c"][0].ravel().tolist() == [7] * 4
    assert given["c"][1][0].ravel().tolist() == [12, 10, 11, 12]
    assert given["d"] is number
    assert given["e"] == "word"


@pytest.mark.parametrize(
    ("conditions", "needed"),
    [
        ({}, False),
        ({"a": torch.zeros(1, 2)}, False),
        ({"a": torch.tensor(1.0), "b": "word"}, False),
        ({"a": torch.zeros(2)}, True),
        ({"b": 1, "a": [1, (torch.zeros(3, 1),)]}, True),
        ({"a": {"b": torch.zeros(1), "c": torch.zeros(2)}}, True),
    ],
)
def test_rows_are_asked_for_where_samples_have_conditions_of_their_own(conditions: Any, needed: bool) -> None:
    denoiser, seen = recorded(conditions=conditions)
    assert denoiser.takes_rows is needed
    if not needed:
        denoiser(normal(3, 2), torch.arange(3))
        denoiser(normal(3, 2), torch.arange(3), rows_of(8, 5, 6, 7))
        assert len(seen) == 2
    guided, _ = recorded(
        conditions={"n": None, **conditions}, null_conditions={"n": torch.zeros(2)}, guidance_scale=2.0
    )
    assert guided.takes_rows


def test_every_sample_has_to_have_a_condition() -> None:
    denoiser, seen = recorded(conditions={"a": torch.arange(3.0)})
    denoiser(normal(2, 2), torch.arange(2), rows_of(3, 2, 0))
    assert seen[0][2]["a"].tolist() == [2, 0]
    for batch in (2, 4):
        with pytest.raises(ValueError, match=f"one for each of the {batch} samples, or a first axis of 1, got 3"):
            denoiser(normal(2, 2), torch.arange(2), rows_of(batch, 1, 0))
    denoiser(normal(3, 2), torch.arange(3))  # without rows: one for each row
    assert seen[1][2]["a"].tolist() == [0, 1, 2]


def test_pairs_of_guidance_are_one_call() -> None:
    """The condition's half is first; what is the same in both is given once, and what is not mentioned stays."""
    text, mask, other = torch.arange(2.0)[:, None], torch.ones(1, 3), torch.tensor(4.0)
    denoiser, seen = recorded(
        conditions={"text": text, "extra": {"mask": mask, "n": 5}, "pair": [text, 3], "scale": other},
        null_conditions={"text": torch.zeros(1, 1), "extra": {"mask": 0 * mask}, "pair": [text - 9, 3]},
        guidance_scale=3.0,
    )
    x, t = normal(2, 2), torch.tensor([4, 9])
    found = denoiser(x, t, rows_of(2, 1, 0))
    torch.testing.assert_close(found, x)
    (given, times, conditions), = seen  # fmt: skip
    assert torch.equal(given, torch.cat([x, x]))
    assert times.tolist() == [4, 9, 4, 9]
    assert conditions["text"].ravel().tolist() == [1, 0, 0, 0]
    assert conditions["extra"]["mask"].sum(dim=1).tolist() == [3, 3, 0, 0]
    assert conditions["extra"]["n"] == 5
    assert conditions["pair"][0].ravel().tolist() == [1, 0, -8, -9]
    assert conditions["pair"][1] == 3
    assert conditions["scale"] is other


def test_guidance_goes_from_without_to_with() -> None:
    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return y.expand(x.shape)

    for scale in (0.0, 1.0, 2.5):
        denoiser = ModelDenoiser(
            model,
            LINEAR,
            "epsilon",
            conditions={"y": torch.full((1, 1), 3.0)},
            null_conditions={"y": torch.full((1, 1), 1.0)},
            guidance_scale=scale,
        )
        torch.testing.assert_close(denoiser(torch.zeros(2, 2), torch.arange(2)), torch.full((2, 2), 1 + 2 * scale))


@pytest.mark.parametrize(
    ("given", "null", "said"),
    [
        (torch.ones(1, 2), torch.ones(1, 3), r"shape \(2, 3\) for shape \(2, 2\)"),
        (torch.ones(1, 2), torch.ones(1, 1), r"shape \(2, 1\) for shape \(2, 2\)"),
        (np.zeros(2), np.zeros(2), "got ndarray for ndarray"),
        (torch.ones(1, 2), None, r"NoneType for shape \(2, 2\)"),
        ([1, 2], [1], "got list for list"),
        ("a", "b", "got str for str"),
        ({"a": 1}, {"a": 2}, "got int for int"),
        (torch.tensor(1.0), torch.tensor(0.0), r"shape \(\) for shape \(\).* as a tensor of shape \(1,\)"),
    ],
)
def test_pairs_that_cannot_be_joined_are_refused(given: Any, null: Any, said: str) -> None:
    """Tensors of other shapes were compared with each other, which PyTorch refuses without naming them."""
    denoiser, _ = recorded(conditions={"y": given}, null_conditions={"y": null}, guidance_scale=2.0)
    with pytest.raises(ValueError, match=rf"null_conditions\['y'\](\['a'\])?: expected a tensor shaped like .*{said}"):
        denoiser(normal(2, 2), torch.arange(2))


@pytest.mark.parametrize(
    "output", [(), (3,), [normal(1, 1)], None, SimpleNamespace(sample=3), SimpleNamespace(other=1)]
)
def test_outputs_that_hold_no_prediction_are_refused(output: Any) -> None:
    with pytest.raises(TypeError, match="model: expected a tensor, a tuple that begins with one"):
        prediction_of(output)


def test_outputs_that_hold_a_prediction() -> None:
    x = normal(1, 2)
    for output in (x, (x,), (x, None, 3), SimpleNamespace(sample=x)):
        assert prediction_of(output) is x


def test_k_diffusion_has_levels_of_its_own_by_default() -> None:
    denoiser = k_diffusion_denoiser(lambda x, sigma: x, dtype=torch.float32)
    own = NoiseSchedule.karras()
    assert (denoiser.schedule.sigma_min, denoiser.schedule.sigma_max) == (own.sigma_min, own.sigma_max)  # type: ignore[attr-defined]
    assert (denoiser.prediction_type, denoiser.time, denoiser.dtype) == ("sample", "sigma", torch.float32)
    with pytest.raises(ValueError, match="guidance_scale: expected it and null_conditions together, got None and some"):
        k_diffusion_denoiser(lambda x, sigma: x, null_conditions={})


def test_a_denoiser_tells_its_choices_and_no_weights() -> None:
    denoiser = ModelDenoiser(at_a_point, LINEAR, "epsilon", conditions={"mean": MEANS})
    assert repr(denoiser) == "ModelDenoiser(prediction_type='epsilon', time=None, guidance_scale=None, dtype=None)"
    kinds = inspect.signature(ModelDenoiser).parameters
    assert [name for name, one in kinds.items() if one.kind is one.POSITIONAL_OR_KEYWORD] == [
        *("model", "schedule", "prediction_type")
    ]
    assert len(kinds) == 8
