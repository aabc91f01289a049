"""Calling somebody's sampler, and what is read off its runs before it is believed."""

import functools
import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from torch import Tensor

from parasolver_adapters.samplers import UnsupportedSamplerError, sample_flow
from parasolver_adapters.samplers.calls import SamplerCall, Stub, same_draws, sources, time_of
from parasolver_adapters.samplers.rules import _stages, path_of
from parasolver_adapters.vector_field.methods import METHODS
from parasolver_core import NoiseSchedule

X = torch.zeros(1, 2)


def test_a_stub_counts_calls_and_has_the_networks_attributes() -> None:
    seen: list[Any] = []

    def reply(i: int, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        seen.append((i, args, kwargs))
        return x + i

    stub = Stub(reply, SimpleNamespace(sigma_min=0.25))
    assert [float(stub(X, 7, scale=k)[0, 0]) for k in range(3)] == [0.0, 1.0, 2.0]
    assert seen == [(k, (7,), {"scale": k}) for k in range(3)]
    assert stub.sigma_min == 0.25
    for name in ("missing", "__wrapped__", "__len__"):
        with pytest.raises(AttributeError):
            getattr(stub, name)
    assert not hasattr(Stub(reply, SimpleNamespace(__wrapped__=1)), "__wrapped__")


def test_a_sampler_that_never_ends_is_stopped() -> None:
    stub = Stub(lambda i, x, args, kwargs: x, None)
    for _ in range(10_000):
        stub(X)
    with pytest.raises(UnsupportedSamplerError, match="more than 10000 times; is its step size adaptive"):
        stub(X)


def sampler(
    model: Any, x: Any, sigmas: Any = None, callback: Any = "own", *, disable: Any = False, **others: Any
) -> Any:
    return {"model": model, "x": x, "sigmas": sigmas, "callback": callback, "disable": disable} | others


def test_arguments_of_a_sampler_are_replaced_by_name_where_it_has_them() -> None:
    call = SamplerCall(sampler, (5,), {"callback": "mine", "churn": 2})
    whole = {"model": 1, "x": 2, "sigmas": 5, "callback": "mine", "disable": False, "churn": 2}
    assert call.run(1, 2) == whole
    assert call.run(1, 2, sigmas=6, callback=None, churn=3, unknown=4) == whole | {
        "sigmas": 6,
        "callback": None,
        "churn": 3,
    }
    assert call.silent(1, 2, sigmas=7) == whole | {"sigmas": 7, "callback": None, "disable": True}
    assert [call.given(name) for name in ("sigmas", "callback", "churn", "disable", "x", "nothing")] == [
        5, "mine", 2, None, None, None,
    ]  # fmt: skip
    plain = {"model": 1, "x": 2, "sigmas": None, "callback": "own", "disable": False}
    assert SamplerCall(sampler).run(1, 2) == plain
    with torch.enable_grad():
        assert SamplerCall(lambda model, x: torch.is_grad_enabled()).silent(None, X) is False
        assert SamplerCall(lambda model, x: torch.is_grad_enabled()).run(None, X) is True


def test_a_function_without_a_signature_is_called_as_it_is() -> None:
    call = SamplerCall(max, (3,))
    with pytest.raises(ValueError, match="signature"):
        inspect.signature(max)
    assert call.run(1, 2, disable=True) == 3
    assert call.given("key") is None
    assert SamplerCall(max, (), {"key": abs}).given("key") is abs


def test_names_and_devices() -> None:
    assert SamplerCall(sampler).name == "sampler"
    assert SamplerCall(functools.partial(functools.partial(sampler), sigmas=1)).name == "sampler"

    class Callable:
        def __call__(self, model: Any, x: Any) -> Any: ...

    assert SamplerCall(Callable()).name == "Callable"
    assert SamplerCall(sampler, (3,), {"a": "b"}).device == torch.device("cpu")
    meta = torch.zeros(2, device="meta")
    assert SamplerCall(sampler, (3, [meta]), {"a": X}).device.type == "meta"
    assert SamplerCall(sampler, (3,), {"a": {"b": meta}}).device.type == "meta"


def test_where_a_sampler_may_draw_from() -> None:
    found = sources(torch.zeros(2, 3, dtype=torch.float64))
    assert set(found) == {"noise_sampler", "randn_like"}
    for draw in found.values():
        drawn = draw(1.0, sigma=2.0)
        assert (drawn.shape, drawn.dtype) == ((2, 3), torch.float64)
        assert bool(drawn.any())


@pytest.mark.parametrize(
    ("args", "kwargs", "time"),
    [
        ((torch.tensor([3.5, 1.0]),), {}, 3.5),
        ((torch.tensor(2),), {}, 2),
        ((torch.tensor([]),), {}, 7),
        ((0.25, 9.0), {}, 0.25),
        ((4,), {"sigma": 5}, 4),
        ((), {"sigma": torch.tensor([0.5])}, 0.5),
        (("word",), {"sigma": 5}, 7),
        ((), {}, 7),
    ],
)
def test_the_time_is_the_first_argument_behind_x(args: Any, kwargs: Any, time: float) -> None:
    assert time_of(args, kwargs, 7) == time


def test_what_is_drawn_within_is_drawn_again() -> None:
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    for broken in (False, True):
        torch.manual_seed(4)
        try:
            with same_draws(X, ((1, {"g": [generator]}), {})):
                first = torch.rand(2), torch.rand(2, generator=generator)
                if broken:
                    raise KeyError
        except KeyError:
            assert broken
        assert torch.equal(torch.rand(2), first[0])
        assert torch.equal(generator.get_state(), before)


def test_paths_of_networks() -> None:
    """``x = x_0 + t eps`` where nothing is said; a flow's line from data to noise also at its clean end."""
    assert path_of(None, "sample")(3.0) == (1.0, 3.0, 0.0, 1.0)
    assert path_of(None, "epsilon")(-3.0) == (1.0, 3.0, 1.0, -3.0)
    flow = path_of(NoiseSchedule.flow_matching(), "flow")
    assert flow(0.25) == (0.75, 0.25, 1.0, -0.25)
    assert flow(0.0) == (1.0, 0.0, 1.0, 0.0)
    assert flow(1.0) == (0.0, 1.0, 1.0, -1.0)
    for outside in (-0.1, 1.1):
        with pytest.raises(ValueError, match="timesteps"):
            flow(outside)
    linear = NoiseSchedule.linear()
    alpha, sigma, p, q = path_of(linear, "epsilon")(500)
    levels = [float(level[0]) for level in linear.levels(np.array([500]))]
    assert (alpha, sigma) == tuple(levels)
    assert (p, q) == pytest.approx((1 / alpha, -sigma / alpha))


@pytest.mark.parametrize("steps", [4, 9, 30])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("part", ["a", "b", "c"])
def test_the_calls_of_a_step_are_the_period_of_the_tables_pattern(steps: int, stages: int, part: str) -> None:
    """Whatever its ends look like."""
    n = steps * stages
    band = np.ones((n, 1)), np.ones((n, 2)), np.ones(n)
    table = {"a": band[0][:, 0], "b": band[1][:, 1], "c": band[2]}[part]
    table[:] = np.where(np.arange(n) % stages == stages - 1, 0.0, 2.0)
    assert _stages(band) == stages
    table[0], table[-1] = 2.0 - table[0], 2.0 - table[-1]
    assert _stages(band) == (stages if n > 12 else _stages(band))


def test_a_table_without_a_period_has_one_call_a_step() -> None:
    irregular = np.random.default_rng(0).random(40) > 0.5
    assert _stages((np.ones((40, 1)), irregular[:, None] * 1.0, np.ones(40))) == 1
    for n in (1, 2, 3):
        assert _stages((np.ones((n, 1)), np.ones((n, 1)), np.ones(n))) == 1


@pytest.mark.parametrize("name", ["euler", "midpoint", "heun", "heun3", "rk4", "rk4_classic"])
def test_the_flows_loop_takes_each_methods_steps(name: str) -> None:
    """``x' = t - 2 x``: the same as the integrator's table says, and what is told of each step."""
    method: Any = METHODS[name]
    times, told, seen = torch.tensor([1.0, 0.7, 0.1], dtype=torch.float64), [], []

    def model(x: Tensor, t: Tensor, scale: float) -> Tensor:
        seen.append(t)
        return scale * x + t[:, None]

    x = start = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    for i in range(2):
        t, h = float(times[i]), float(times[i + 1] - times[i])
        K: list[Any] = []
        for row in method.a:
            K.append(-2 * (x + h * sum(w * k for w, k in zip(row, K, strict=True))) + t + sum(row) * h)
        x = x + h * sum(w * k for w, k in zip(method.b, K, strict=True))
    for one in (name, method):
        told.clear()
        seen.clear()
        got = sample_flow(model, start, times, {"scale": -2.0}, told.append, method=one)
        torch.testing.assert_close(got, x, rtol=1e-14, atol=0)
        assert [(step["i"], float(step["t"])) for step in told] == [(0, 1.0), (1, pytest.approx(0.7))]
        assert told[0]["x"] is start
        assert len(seen) == 2 * len(method.b)
        assert {tuple(t.shape) for t in seen} == {(2,)}


def test_integers_as_times_of_a_flow_are_the_states_numbers() -> None:
    x = torch.ones(1, 1)
    got = sample_flow(lambda x, t: t[:, None] * x, x, [2, 1, 0], method="euler")
    assert got.dtype is torch.float32
    assert float(got) == (1 - 2) * (1 - 1)
    for wrong in ("ab2", METHODS["ab2"], None):
        with pytest.raises(ValueError, match=r"method: expected one of 'euler', .*'rk4_classic', got"):
            sample_flow(lambda x, t: x, x, [1, 0], method=wrong)  # type: ignore[arg-type]
