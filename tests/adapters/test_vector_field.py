"""Integration in parallel over time gives what the same method gives one step after another."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parasolver_adapters.vector_field import SequentialFallbackWarning, integrate, odeint
from parasolver_adapters.vector_field.grid import Grid
from parasolver_adapters.vector_field.methods import EXPONENTIAL, METHODS, RungeKutta, phi_functions
from tests.adapters.vector_fields import (
    START,
    TIMES,
    batched_oscillators,
    close,
    logistic,
    lotka_volterra,
    pendulum,
    pendulum_free,
    torch_pendulum,
    wave,
)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("linearization", ["full", "secant", "identity"])
def test_parallel_equals_sequential(method: str, linearization: Any) -> None:
    options: dict[str, Any] = {"method": method}
    expected = integrate(pendulum, START, TIMES, linearization="sequential", **options)
    found = integrate(pendulum, START, TIMES, linearization=linearization, **options)
    assert found.success
    assert found.sequential_steps == 0
    assert found.rounds > 0
    close(found.states, expected.states)


@pytest.mark.parametrize("method", EXPONENTIAL)
@pytest.mark.parametrize("linear", [-3.0, [-1.0, -40.0], [[0.0, 1.0], [-9.0, -0.5]]])
def test_exponential_methods(method: str, linear: Any) -> None:
    options: dict[str, Any] = {"method": method, "linear": linear}
    expected = integrate(pendulum, START, TIMES, linearization="sequential", **options)
    found = integrate(pendulum, START, TIMES, **options)
    assert found.sequential_steps == 0
    close(found.states, expected.states)


def test_stiff_elements_leave_the_others_accurate() -> None:
    """All elements once were squared as often as the stiffest, which left others right to eight digits only."""
    h, linear = np.array([0.01, 0.5]), np.array([-1e8, -1.0, 0.3])
    exp, phi_1, _ = phi_functions(h, linear)
    z = h[:, None] * linear
    np.testing.assert_allclose(exp, np.exp(z), rtol=1e-14, atol=0)
    np.testing.assert_allclose(phi_1, np.expm1(z) / linear, rtol=1e-13, atol=0)


def elementwise(t: Any, y: Any) -> Any:
    return np.cos(t) - 0.2 * y**2


def coupled_samples(t: Any, y: Any) -> Any:
    return np.sin(y).mean(axis=(-2, -1), keepdims=True) - y**3 / 9


@pytest.mark.parametrize("field", [elementwise, coupled_samples])
@pytest.mark.parametrize("linear", [[-30.0, -1.0], [[-30.0, 0.5], [-0.5, -1.0]]])
@pytest.mark.parametrize("linearization", ["full", "diagonal"])
def test_linear_part_of_states_in_a_batch(field: Any, linear: Any, linearization: Any) -> None:
    """The linear part once was added to Jacobians of another shape, and left out of what couples samples."""
    y0 = np.array([[1.0, -0.5], [0.2, 0.8], [-1.0, 0.4]])
    options: dict[str, Any] = {"method": "etdrk2", "linear": linear}
    found = integrate(field, y0, TIMES / 2, linearization=linearization, **options)
    assert found.sequential_steps == 0
    close(found.states, integrate(field, y0, TIMES / 2, linearization="sequential", **options).states)


@pytest.mark.parametrize("name", ["euler", "midpoint", "heun", "heun3", "rk4"])
def test_equals_torchdiffeq(name: str) -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    y0 = torch.tensor([1.0, 1.0], dtype=torch.float64)
    t = torch.linspace(0, 5, 401, dtype=torch.float64) ** 1.2
    expected = torchdiffeq.odeint(lotka_volterra, y0, t, method={"heun": "heun2"}.get(name, name))
    close(odeint(lotka_volterra, y0, t, method=name), expected, 1e-10)
    backwards = torchdiffeq.odeint(torch_pendulum, y0, t.flip(0), method={"heun": "heun2"}.get(name, name))
    close(odeint(torch_pendulum, y0, t.flip(0), method=name), backwards, 1e-10)


ORDERS = [*[(name, None) for name in METHODS], *[(name, -1.0) for name in EXPONENTIAL]]


@pytest.mark.parametrize(("method", "linear"), ORDERS)
def test_order_is_the_declared_one(method: str, linear: float | None) -> None:
    """y' = -y + cos(t) y^2 / 2 from 1: 1/y = u obeys u' = u - cos(t) / 2."""
    declared = EXPONENTIAL[method] if linear is not None else METHODS[method].order

    def field(t: Any, y: Any) -> Any:
        return np.cos(t) * y**2 / 2 - (y if linear is None else 0.0)

    end = 3.0
    u = (np.cos(end) - np.sin(end)) / 4 + 0.75 * np.exp(end)
    counts = np.array([128, 256, 512] if not method.startswith("rk4") else [64, 96, 128])
    errors = []
    for n in counts:
        t = np.linspace(0, end, n + 1)
        y = odeint(field, np.array([1.0]), t, method=method, linear=linear)
        errors.append(abs(y[-1, 0] - 1 / u))
    slopes = [np.log(a / b) / np.log(m / n) for (a, b), (n, m) in zip(pairwise(errors), pairwise(counts), strict=True)]
    assert slopes[-1] == pytest.approx(declared, abs=0.15)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_grid_size_and_method(data: st.DataObject) -> None:
    n = data.draw(st.integers(0, 260))
    backwards, size = data.draw(st.booleans()), data.draw(st.integers(1, 3))
    method = data.draw(st.sampled_from(sorted(METHODS)))
    window = data.draw(st.sampled_from([None, 70, 128]))
    steps = data.draw(st.lists(st.floats(0.5, 2.0), min_size=n, max_size=n))
    t = 0.02 * np.cumsum([0.0, *steps])
    if backwards:
        t = -t
    rng = np.random.default_rng(data.draw(st.integers(0, 100)))
    y0, A = rng.standard_normal(size), 0.5 * rng.standard_normal((size, size))

    def field(t: Any, y: Any) -> Any:
        return np.tanh(y @ A) - 0.3 * y + np.sin(t)

    expected = odeint(field, y0, t, method=method, linearization="sequential")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(odeint(field, y0, t, method=method, window=window, few_steps="sequential"), expected)


def test_field_stays_inside_the_interval_and_y0_is_not_changed() -> None:
    seen: list[Any] = []

    def field(t: Any, y: Any) -> Any:
        seen.append(np.ravel(t))
        return logistic(t, y)

    y0 = np.array([0.3, 0.2, 0.9])
    for t in (np.linspace(1.0, 7.3, 413), np.linspace(7.3, 1.0, 413)):
        for method in METHODS:
            odeint(field, y0, t, method=method)
    times = np.concatenate(seen)
    assert times.min() >= 1.0
    assert times.max() <= 7.3
    np.testing.assert_array_equal(y0, [0.3, 0.2, 0.9])


@pytest.mark.parametrize(
    ("field", "y0", "batching", "linearization"),
    [
        (torch_pendulum, torch.tensor([1.0, 0.0]), "trailing", "full"),
        (batched_oscillators, torch.linspace(-1, 1, 8).reshape(4, 2), "column", "full"),
        (
            lambda t, y: torch.tanh(y @ torch.ones(3, 3) / 3) - y,
            torch.linspace(-1, 1, 15).reshape(5, 3),
            "column",
            "full",
        ),
        (lambda t, y: y * torch.sin(t), torch.linspace(-1, 1, 50), "column", "diagonal"),
        (lambda t, y: -torch.nn.functional.linear(y, torch.eye(2)).flatten(1), torch.ones(3, 2), "merged", "diagonal"),
        (lambda t, y: -torch.sin(y).mean() - y, torch.linspace(-1, 2, 40), "vmap", "secant"),
    ],
)
def test_batching_and_linearization_are_found(field: Any, y0: Any, batching: str, linearization: str) -> None:
    y0 = y0.double()
    with torch.no_grad():
        typed = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            found = integrate(field, y0, TIMES)
            expected = odeint(field, y0, TIMES, linearization="sequential")
        finally:
            torch.set_default_dtype(typed)
    assert (found.batching, found.linearization) == (batching, linearization)
    assert found.sequential_steps == 0
    close(found.states, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strength", [1e-2, 1e-3])
def test_weak_coupling_of_elements_is_not_mistaken_for_rounding(dtype: Any, strength: float) -> None:
    """A mean over the state once was taken over all times at once, since single precision hid it where it was tried."""
    y0, t = torch.ones(10, dtype=dtype), TIMES / 2
    found = integrate(lambda t, y: strength * y.mean() - y, y0, t)
    assert found.batching == "vmap"
    close(found.states, torch.exp((strength - 1) * torch.from_numpy(t))[:, None].expand(-1, 10), 1e-5)


@pytest.mark.parametrize("linearization", ["full", "diagonal", "secant", "identity"])
def test_every_array_library(xp: Any, linearization: Any) -> None:
    def field(t: Any, y: Any) -> Any:
        return xp.stack([y[1, ...], -xp.sin(y[0, ...])])

    y0 = xp.asarray(START, dtype=xp.float64)
    found = integrate(field, y0, TIMES, linearization=linearization)
    assert found.sequential_steps == 0
    close(np.from_dlpack(found.states), odeint(pendulum_free, START, TIMES, linearization="sequential"))


def test_the_diagonal_is_estimated_where_elements_are_coupled() -> None:
    """By differences in a few directions, fewer than the state has elements; without it there are three times as many
    rounds."""
    rng = np.random.default_rng(0)
    coupling, y0, t = 0.02 * rng.standard_normal((20, 20)), np.linspace(-1, 2, 20), np.linspace(0, 2, 101)
    runs = [
        integrate(lambda t, y: y @ coupling - 2 * np.sin(y), y0, t, linearization=name)
        for name in ("diagonal", "identity", "sequential")
    ]
    assert runs[0].linearization == "diagonal"
    assert runs[0].sequential_steps == 0
    assert runs[0].rounds <= runs[1].rounds / 2
    close(runs[0].states, runs[2].states)


def test_runaway_states_do_not_make_earlier_ones_seem_accurate() -> None:
    """A coarse start that explodes once gave a scale of 1e51, next to which every defect was small."""
    t = np.linspace(0, 1, 201)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SequentialFallbackWarning)
        y = odeint(lambda t, y: -300.0 * (y - np.cos(t)), np.array([0.0]), t, method="euler")
    assert np.max(np.abs(y)) < 2


def test_wide_coupled_state() -> None:
    y0 = np.random.default_rng(0).standard_normal(64)
    found = integrate(wave, y0, TIMES / 3)
    assert found.linearization == "secant"
    assert found.sequential_steps == 0
    close(found.states, odeint(wave, y0, TIMES / 3, linearization="sequential"))


@pytest.mark.parametrize("steps", [100, 200])
def test_linear_field_backwards_in_time(steps: int) -> None:
    """A ratio of two corrections was trusted although neither was small: -2e226 was accepted for 1.9e138."""
    t, h = np.linspace(5.15, 0, steps + 1), 5.15 / steps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SequentialFallbackWarning)
        y = odeint(lambda t, y: -155.0 * y + np.sin(t), np.array([0.0375]), t, method="euler")[:, 0]
    expected = [0.0375]
    for now in t[:-1]:
        expected.append((1 + 155 * h) * expected[-1] - h * np.sin(now))
    np.testing.assert_allclose(y, expected, rtol=1e-11)


@pytest.mark.parametrize("rate", [6, 10, 15])
@pytest.mark.parametrize("field", [np.tanh, lambda y: y * (1 - y)])
@pytest.mark.parametrize("other", [False, True])
def test_element_that_decays_to_nothing_and_grows_again(rate: float, field: Any, other: bool) -> None:
    """Defects once were held against the largest value so far: 19.7 was accepted for 1.0004, or NaN told of."""
    t = np.linspace(0, 10, 2001)

    def f(t: Any, y: Any) -> Any:
        if not other:
            return rate * (t - 5) * field(y)
        return np.stack([rate * (t - 5) * field(y[0]), np.cos(t) + 0 * y[1]])

    y0 = np.array([0.5, 1.0]) if other else np.array([0.5])
    found = integrate(f, y0, t)
    assert found.sequential_steps == 0
    assert found.states[1000, 0] < 1e-25
    np.testing.assert_allclose(found.states, odeint(f, y0, t, linearization="sequential"), rtol=1e-10)


def test_substeps_refine_the_grid() -> None:
    coarse, fine = TIMES[::10], TIMES
    close(odeint(pendulum, START, coarse, substeps=10), odeint(pendulum, START, fine)[::10], 1e-12)


def test_float32() -> None:
    y0 = torch.tensor([1.0, 0.3])
    found = integrate(torch_pendulum, y0, TIMES)
    assert found.states.dtype == torch.float32
    assert found.sequential_steps == 0
    close(found.states, odeint(torch_pendulum, y0, TIMES, linearization="sequential"), 2e-5)


@pytest.mark.parametrize("linearization", ["full", "diagonal"])
def test_state_that_rests_at_zero(linearization: Any) -> None:
    """Differences are taken there as well; a step of zero length would give NaN."""
    y0 = np.array([[0.0, 0.0], [1.0, -2.0]])
    found = integrate(lambda t, y: -np.sin(y) * (2 + np.cos(t)), y0, TIMES / 2, linearization=linearization)
    assert found.sequential_steps == 0
    assert found.rounds < 12
    np.testing.assert_array_equal(found.states[:, 0], 0)
    expected = 2 * np.arctan(np.tan(np.array([0.5, -1.0])) * np.exp(-2 * 3.0 - np.sin(3.0)))
    np.testing.assert_allclose(found.states[-1, 1], expected, rtol=1e-6)


def test_steps_end_where_the_next_begin() -> None:
    """To the last bit, which ``t + (t' - t)`` is not."""
    t = np.linspace(-1.0, 1.0, 413) ** 3
    grid = Grid(t, START, 1)
    assert np.any(t[:-1] + np.diff(t) != t[1:])
    np.testing.assert_array_equal(grid.times(0, 412, 1.0), t[1:])
    np.testing.assert_array_equal(grid.times(0, 412, 0.0), t[:-1])


def test_own_method() -> None:
    ralston = RungeKutta(2, ((), (2 / 3,)), (1 / 4, 3 / 4))
    close(
        odeint(pendulum, START, TIMES, method=ralston),
        odeint(pendulum, START, TIMES, method=ralston, linearization="sequential"),
    )
