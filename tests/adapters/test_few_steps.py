"""Fewer than 64 steps in rounds, as callers of ``torchdiffeq.odeint`` with a network make them."""

from __future__ import annotations

import functools
import itertools
import warnings
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("torchdiffeq")
import torch
import torchdiffeq

from parasolver_adapters.samplers.flows import sample_flow
from parasolver_adapters.samplers.rules import step_rule_from_sampler
from parasolver_adapters.vector_field import SequentialFallbackWarning, integrate, odeint
from parasolver_adapters.vector_field.few_steps import _Noted
from parasolver_adapters.vector_field.field import Field
from parasolver_adapters.vector_field.grid import Grid
from parasolver_adapters.vector_field.methods import METHODS
from parasolver_adapters.vector_field.problem import Problem
from parasolver_core import Rows
from tests.arrays import to_numpy

CONDITION = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(1, 6, 4)
MIX = torch.from_numpy(np.random.default_rng(0).standard_normal((8, 4)) / 3)
Y0 = torch.from_numpy(np.random.default_rng(1).standard_normal((1, 6, 4)))
CALLS: list[int] = []


def network(t: Any, y: Any, condition: Any) -> Any:
    return torch.tanh(torch.cat([y, condition], dim=-1) @ MIX) * (1 + t) - 0.5 * y.roll(1, dims=1)


def speech(t: Any, y: Any) -> Any:
    """Two guidance calls, and a condition of batch 1 that is no argument."""
    CALLS.append(1)
    given, none = network(t, y, CONDITION), network(t, y, torch.zeros_like(CONDITION))
    return given + 2.0 * (given - none)


def distance(a: Any, b: Any) -> float:
    return float(np.linalg.norm(to_numpy(a) - to_numpy(b)) / np.linalg.norm(to_numpy(b)))


@pytest.mark.parametrize(
    ("method", "steps"), [("euler", 16), ("euler", 32), ("euler", 63), ("midpoint", 32), ("rk4", 16)]
)
@pytest.mark.parametrize("backwards", [False, True])
def test_the_same_signature_and_the_same_states_in_fewer_calls(method: str, steps: int, backwards: bool) -> None:
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 1.5
    t = t.flip(0) if backwards else t
    want, stages = torchdiffeq.odeint(speech, Y0, t, method=method), {"euler": 1, "midpoint": 2, "rk4": 4}[method]
    for tolerance, limit in ((None, 1e-12), (1e-2, 1e-2)):
        CALLS.clear()
        found = integrate(speech, Y0, t, method=method, few_steps="parallel", tolerance=tolerance)
        assert found.states.shape == (steps + 1, 1, 6, 4)
        assert distance(found.states, want) < limit
        assert distance(found.states[-1], want[-1]) < limit
        assert (found.sequential_steps, found.batching) == (0, "vmap")
    assert found.rounds < 0.7 * stages * steps
    assert torch.equal(found.states[0], Y0)


@pytest.mark.parametrize("t", [[0.0, 1.0], [0.0, 0.5, 1.0], [1.0, 0.0]])
def test_what_callers_of_torchdiffeq_give_besides(t: list[float]) -> None:
    times, own = torch.tensor(t), {"method": "euler", "rtol": 1e-5, "atol": 1e-5, "options": {"step_size": 0.02}}
    want = torchdiffeq.odeint(speech, Y0, times.double(), **own)
    got = odeint(speech, Y0, times.double(), few_steps="parallel", **own)
    assert got.shape == want.shape
    assert distance(got, want) < 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": 0.3}, r"options: expected a step_size that divides .*, got 0.3 for intervals of 1 to 1"),
        ({"step_size": 2.0}, "options: expected a step_size that divides"),
        ({"interp": "cubic"}, r"options: of torchdiffeq's only 'step_size' is known, got \['interp'\]"),
    ],
)
def test_options_that_name_no_steps(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        odeint(speech, Y0, torch.tensor([0.0, 1.0]), method="euler", options=options)


def test_without_being_asked_for_it_says_that_steps_are_made_one_after_another() -> None:
    t = torch.linspace(0, 1, 33, dtype=torch.float64)
    with pytest.warns(SequentialFallbackWarning, match="32 steps were made one after another.*few_steps='parallel'"):
        want = odeint(speech, Y0, t, method="euler")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        silent = odeint(speech, Y0, t, method="euler", few_steps="sequential")
        odeint(speech, Y0, t, method="euler", linearization="sequential")
        odeint(speech, Y0, t[:7], method="euler")
    assert torch.equal(want, silent)


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun", "heun3", "rk4", "rk4_classic"])
def test_every_runge_kutta_method_on_every_library(method: str, xp: Any) -> None:
    y0, t = xp.asarray([0.5, -0.2, 1.0], dtype=xp.float64), np.linspace(0, 2, 21)
    options = functools.partial(odeint, lambda t, y: xp.sin(y) * xp.cos(t) - y, y0, t, method=method)
    assert distance(options(few_steps="parallel"), options(few_steps="sequential")) < 1e-12


def test_substeps_and_a_state_without_axes() -> None:
    y0, t = np.array(0.3), np.linspace(0, 1, 9)
    found = integrate(lambda t, y: y * (1 - y), y0, t, method="midpoint", substeps=4, few_steps="parallel")
    want = odeint(lambda t, y: y * (1 - y), y0, t, method="midpoint", substeps=4, few_steps="sequential")
    assert found.states.shape == (9,)
    assert found.rounds > 0
    assert distance(found.states, want) < 1e-13


def test_gradients_are_those_of_the_plain_loop() -> None:
    t, grads = torch.linspace(0, 1, 17, dtype=torch.float64), []
    for few_steps in ("parallel", "sequential"):
        y0, weight = Y0.clone().requires_grad_(), MIX.clone().requires_grad_()
        y = odeint(lambda t, y, w=weight: torch.tanh(y @ w[:4]) - y, y0, t, method="midpoint", few_steps=few_steps)
        y[-1].square().sum().backward()
        grads.append(torch.cat([y0.grad.flatten(), weight.grad.flatten()]))
    assert distance(*grads) < 1e-9


def test_a_field_that_overflows_ends_as_the_plain_loop_does() -> None:
    t = np.linspace(0, 40, 21)
    with pytest.warns(SequentialFallbackWarning, match="rounds did not end well"):
        found = integrate(lambda t, y: y**3, np.array([3.0]), t, method="euler", few_steps="parallel", throw=False)
    assert not found.success
    assert "NaN or infin" in found.message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"few_steps": "yes"}, "few_steps: expected"),
        ({"few_steps": "parallel", "method": "ab2"}, "few_steps: only Runge-Kutta methods"),
    ],
)
def test_bad_choices(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        odeint(speech, Y0, torch.linspace(0, 1, 17), **options)


def by_hand(f: Any, y: Any, t: Any) -> Any:
    """Euler's method."""
    states = [y]
    for a, b in itertools.pairwise(t):
        states.append(states[-1] + (b - a) * f(a, states[-1]))
    return np.stack(states)


@pytest.mark.parametrize("of", [np.mean, np.max, np.min])
@pytest.mark.parametrize("window", [4, 16, 100])
@pytest.mark.parametrize("kind", ["between", "where large"])
def test_rows_that_act_on_each_other_in_some_steps_only_are_noticed(of: Any, window: int, kind: str) -> None:
    def field(t: Any, y: Any) -> Any:
        on = (t > 3.8) & (t < 4.9) if kind == "between" else np.abs(of(y)) > 4
        return 1.0 + 0.1 * y + np.where(on, np.sin(of(y)), 0.0)

    y0, t = np.array([1.0, 0.3, 1.5]), np.linspace(0, 5, 41)
    with pytest.warns(SequentialFallbackWarning, match="gave something else.*acts on all that it is given"):
        found = integrate(field, y0, t, method="euler", few_steps="parallel", window=window)
    assert found.sequential_steps == 40
    np.testing.assert_allclose(found.states, by_hand(field, y0, t), rtol=1e-14)


@pytest.mark.parametrize("start", [0.3, 0.7])
def test_steps_that_double_rounding_are_told_of(start: float) -> None:
    """Each step of one makes 4 x (1 - x) of x, and doubles a difference on average: 1e17 in 57 steps."""
    y0, t = np.array([start, 0.5 * start]), np.arange(58.0)
    with pytest.warns(SequentialFallbackWarning, match="rounding may grow to"):
        found = integrate(lambda t, y: 3 * y - 4 * y * y, y0, t, method="euler", few_steps="parallel")
    assert found.sequential_steps == 57
    np.testing.assert_allclose(found.states, by_hand(lambda t, y: 3 * y - 4 * y * y, y0, t), rtol=1e-14)


@pytest.mark.parametrize(("size", "checks"), [(32, 4), (33, 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_checks_are_three_calls_or_four(size: int, checks: int, dtype: Any) -> None:
    """Beside those of the three single times with which the field is tried out, two together, and one a round."""
    y0, t = np.linspace(0.5, 1, size, dtype=dtype), np.linspace(0, 1, 41)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = integrate(lambda t, y: np.sin(t) - y, y0, t, method="euler", few_steps="parallel")
    assert found.calls == found.rounds + 5 + checks


@pytest.mark.parametrize("tolerance", [None, 1e-9])
def test_a_small_element_that_is_thrown_far_is_told_of(tolerance: float | None) -> None:
    """Its last state before the throw, -0.02, was right by 6e-6 only: rounding of the other, of 35. It came to 3e-4."""
    field = lambda t, y: 0.0183045242120451 / y**2 + np.cos(t)  # noqa: E731
    y0, t = np.array([-35.355343, -0.5237594], np.float32), np.linspace(0, 2.7620431735375486, 63)
    with pytest.warns(SequentialFallbackWarning, match="rounding may grow to"):
        found = integrate(field, y0, t, method="heun3", few_steps="parallel", tolerance=tolerance)
    assert found.sequential_steps == 62
    assert found.states[8, 1] == pytest.approx(-0.0229, abs=1e-4)
    assert found.states[9, 1] == pytest.approx(13.37, abs=0.01)


@pytest.mark.parametrize("seed", [5, 22, 48])
@pytest.mark.parametrize("of", [np.max, np.std])
def test_rows_that_act_on_each_other_in_a_round_of_wild_guesses_only_are_noticed(of: Any, seed: int) -> None:
    """Of very unequal steps: at the plain loop's states, one at a time or together, nothing is large enough."""
    widths = np.exp(np.random.default_rng(seed).uniform(np.log(1e-4), 0, 60))
    t = np.append(0.0, np.cumsum(widths)) * 7.7 / widths.sum()
    level = 0.9 if of is np.max else 0.35

    def field(t: Any, y: Any) -> Any:
        return np.sin(t) - y + 0.08 * np.where(of(y) > level, of(y), 0.0)

    with pytest.warns(SequentialFallbackWarning, match="gave something else.*acts on all that it is given"):
        found = integrate(field, np.array([0.16]), t, method="rk4_classic", few_steps="parallel")
    assert found.sequential_steps == 60


def test_what_rows_are_called_again_in_other_company() -> None:
    """Of three calls: with a guess of 9, which a later call has replaced by 5; with that; and with a negative state."""
    grid = Grid(np.array([0.0, 1.0, 3.0, 6.0, 10.0]), np.zeros(1), 1)
    method = METHODS["heun"].bind(grid)
    field = Field(lambda t, y: -y, np.zeros(1), "ty", "column")
    noted = _Noted(Problem(field, grid, method, 0), 2)
    table = step_rule_from_sampler(sample_flow, torch.tensor(grid.t), method=method).table
    for nodes, states in [([0, 1, 2], [1.0, 0.4, 9.0]), ([2, 3, 4], [5.0, 0.45, 3.0]), ([5, 6, 7], [0.5, 0.6, -0.7])]:
        rows = Rows(np.array(nodes), np.zeros(3, dtype=np.int64), table, lambda i, sample: None, 1)
        said = noted(np.array(states)[:, None], np.array(nodes, dtype=float), rows)
        np.testing.assert_array_equal(said[:, 0], -np.array(states))
    alone, others, least = noted.groups(16)

    def told(group: Any) -> list[tuple[float, float]]:
        return [(float(y[0, 0]), h) for _, y, _, h in group]

    assert told(alone) == [(5.0, 2.0)]
    # every other one of those that are neither the largest nor the least, nor that of the smallest square: 5, -0.7, 0.4
    assert told(others) == [(1.0, 1.0), (3.0, 3.0), (0.6, 4.0)]
    # 0.4 of the call with the guess, whose largest, mean and squares are the most; 0.5 of the last, where they are the
    # least; and 0.45 of the other, whose least state is the largest
    assert sorted(told(least)) == [(0.4, 1.0), (0.45, 2.0), (0.5, 3.0)]
