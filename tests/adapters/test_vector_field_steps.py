"""Single steps, grids and tables, against what they are by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from parasolver_adapters.vector_field.field import Field
from parasolver_adapters.vector_field.grid import Grid, check_times
from parasolver_adapters.vector_field.methods import (
    METHODS,
    AdamsBashforth,
    ExponentialRungeKutta,
    RungeKutta,
    adams_weights,
    get_method,
    matrix_exponential,
    phi_functions,
)
from parasolver_adapters.vector_field.problem import Problem, integrate_sequentially
from tests.arrays import from_numpy, to_numpy

UNEVEN = np.array([0.0, 0.1, 0.3, 0.35, 0.6, 1.0])


def slopes(t: Any, y: Any) -> Any:
    """y' = t + 2 y of states (rows, 2), one time a row."""
    return np.asarray(t)[:, None] + 2 * y


def test_times_and_lengths_of_steps(xp: Any) -> None:
    grid = Grid(UNEVEN, xp.zeros((3, 2), dtype=xp.float32), 2)
    assert len(grid) == 5
    assert grid.steps(1, 2) == pytest.approx(0.2)
    assert isinstance(grid.steps(1, 2), float)
    assert isinstance(grid.steps(0, 1), float)
    assert grid.steps(0, 0).shape == (0, 1, 1)
    assert grid.steps(1, 4).dtype == xp.float32
    np.testing.assert_allclose(to_numpy(grid.steps(1, 4)), np.reshape([0.2, 0.05, 0.25], (3, 1, 1)), rtol=1e-6)
    np.testing.assert_allclose(to_numpy(grid.times(1, 4, 0.25)), [0.15, 0.3125, 0.4125], rtol=1e-6)
    np.testing.assert_array_equal(to_numpy(grid.times(1, 3, 0.0)), np.float32([0.1, 0.3]))
    np.testing.assert_array_equal(to_numpy(grid.times(1, 3, 1.0)), np.float32([0.3, 0.35]))
    coarse = grid.part(np.array([0, 2, 5]))
    np.testing.assert_array_equal(coarse.t, [0.0, 0.3, 1.0])
    assert (coarse.ndim, coarse.dtype, coarse.column(np.arange(2)).shape) == (2, xp.float32, (2, 1, 1))


@pytest.mark.parametrize(
    ("t", "message"),
    [
        ([0, 2, 1, 3], "got 2.0 then 1.0 at index 1"),
        ([0, 2, 2, 1, 3], "got 2.0 then 2.0 at index 1"),
        ([3, 1, 2, 0], "got 1.0 then 2.0 at index 1"),
        ([3, 1, 1, 0], "got 1.0 then 1.0 at index 1"),
        ([0, 1, np.inf, np.nan], "got inf at index 2"),
        (3.0, r"got shape \(\)"),
        ([[0.0, 1.0]], r"got shape \(1, 2\)"),
    ],
)
def test_times_that_are_refused_are_named(t: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_times(t)


def test_times_of_any_real_kind() -> None:
    for t in ([0, 1, 3], np.array([0, 1, 3], dtype=np.float32), (0.0, 1.0, 3.0)):
        np.testing.assert_array_equal(check_times(t), [0.0, 1.0, 3.0])
        assert check_times(t).dtype == np.float64
    np.testing.assert_array_equal(check_times([3, 1]), [3.0, 1.0])
    np.testing.assert_array_equal(check_times([3]), [3.0])
    for wrong in ([True, False], [0j, 1j], ["a"]):
        with pytest.raises(TypeError, match="t: expected real numbers"):
            check_times(wrong)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if isinstance(method, RungeKutta)])
def test_runge_kutta_steps_are_those_of_their_table(name: str) -> None:
    method: Any = METHODS[name]
    grid, y = Grid(UNEVEN, np.zeros(2), 1), np.array([[1.0, -1.0], [2.0, 0.5], [0.0, 3.0]])
    found, past = method.advance(slopes, grid, 1, 4, y)
    assert past is None
    assert method.stages == len(method.b)
    for n, begin in zip((1, 2, 3), y, strict=True):
        h, K = grid.h[n], []
        for row in method.a:
            inner = begin + h * sum(w * k for w, k in zip(row, K, strict=True))
            K.append(UNEVEN[n] + sum(row) * h + 2 * inner)
        end = begin + h * sum(w * k for w, k in zip(method.b, K, strict=True))
        np.testing.assert_allclose(found[n - 1], end, rtol=1e-14)
        np.testing.assert_allclose(method.advance(slopes, grid, n, n + 1, begin[None])[0][0], end, rtol=1e-14)
    # exp(x) up to the order, for the 2 x of y' = 2 y
    growth = method.advance(lambda t, y: 2 * y, Grid(np.array([0.0, 1.0]), np.zeros(1), 1), 0, 1, np.ones((1, 1)))[0]
    series = [1, 2, 4 / 2, 8 / 6, 16 / 24][: method.order + 1]
    np.testing.assert_allclose(growth, sum(series), rtol=1e-14)


@pytest.mark.parametrize(
    ("order", "weights"),
    [(1, [1.0]), (2, [3 / 2, -1 / 2]), (3, [23 / 12, -16 / 12, 5 / 12]), (4, [55 / 24, -59 / 24, 37 / 24, -9 / 24])],
)
def test_weights_of_adams_and_bashforth(order: int, weights: list[float]) -> None:
    table = adams_weights(np.arange(8) * 0.5, order)
    assert table.shape == (7, order)
    np.testing.assert_array_equal(table[: order - 1], 0)
    np.testing.assert_allclose(table[order - 1 :], np.tile(weights, (8 - order, 1)) * 0.5, rtol=1e-12)
    np.testing.assert_array_equal(adams_weights(np.arange(order) * 1.0, order), np.zeros((order - 1, order)))
    uneven = adams_weights(UNEVEN, order)  # integrates polynomials below the order
    for n in range(order - 1, 5):
        for k in range(order):
            whole = (UNEVEN[n + 1] ** (k + 1) - UNEVEN[n] ** (k + 1)) / (k + 1)
            assert uneven[n] @ UNEVEN[n - np.arange(order)] ** k == pytest.approx(whole, rel=1e-11, abs=1e-13)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_adams_and_bashforths_steps_begin_with_runge_and_kutta(order: int) -> None:
    t = np.array([0.0, 0.1, 0.3, 0.35, 0.6, 1.0, 1.1, 1.5])
    grid = Grid(t, np.zeros(2), 1)
    method, table = AdamsBashforth(order).bind(grid), adams_weights(t, order)
    assert (method.memory, method.stages, method.order) == (order - 1, 1, order)
    states, outputs = [np.array([[1.0, -1.0]])], []
    for n in range(7):
        outputs.append(slopes(t[n : n + 1], states[-1]))
        if n < order - 1:
            states.append(METHODS["rk4"].advance(slopes, grid, n, n + 1, states[-1])[0])
        else:
            states.append(states[-1] + sum(table[n, k] * outputs[n - k] for k in range(order)))
    y, f = np.concatenate(states), np.concatenate(outputs)
    for lo in range(7):
        for hi in range(lo + 1, 8):
            known = min(lo, order - 1)
            given = f[lo - known : lo] if known else None
            found, past = method.advance(slopes, grid, lo, hi, y[lo:hi], given)
            np.testing.assert_allclose(found, y[lo + 1 : hi + 1], rtol=1e-13)
            if order == 1:
                assert past is None
            else:
                np.testing.assert_allclose(past, f[max(hi - (order - 1), 0) : hi], rtol=1e-14)


def test_exponential_steps_by_hand(xp: Any) -> None:
    """y' = -2 y + N, in a step of 1/2 from 0."""
    grid = Grid(np.array([0.0, 0.5, 1.5]), xp.zeros(1, dtype=xp.float64), 1)
    e, L = np.exp(-1.0), np.array(-2.0)
    phi_1, phi_2 = 0.5 * (1 - e), 0.5 * e  # h phi_k(-1): phi_1 = 1 - 1/e, phi_2 = 1/e
    y = from_numpy(np.array([[3.0]]), xp)
    field = lambda t, y: 10 + 100 * t[:, None] + y  # noqa: E731
    first = 3 * e + phi_1 * 13.0
    second = first + phi_2 * (10 + 50 + first - 13)
    for order, end in ((1, first), (2, second)):
        method = ExponentialRungeKutta(order, L).bind(grid)
        found, past = method.advance(field, grid, 0, 1, y)
        np.testing.assert_allclose(to_numpy(found), [[end]], rtol=1e-14)
        assert past is None
        assert (method.stages, method.coupled_axes, method.memory) == (order, 0, 0)
        both, _ = method.advance(field, grid, 0, 2, xp.concat([y, y]))
        np.testing.assert_allclose(to_numpy(both)[:1], [[end]], rtol=1e-14)
        alone, _ = method.advance(field, grid, 1, 2, y)
        np.testing.assert_allclose(to_numpy(both)[1:], to_numpy(alone), rtol=1e-14)
    assert method.starter.order == 2
    np.testing.assert_array_equal(to_numpy(method.derivative(from_numpy(np.array([[5.0]]), xp), y, grid)), [[-1.0]])


@pytest.mark.parametrize(
    "linear", [np.array(-0.7), np.array([-1.0, 0.3]), np.array([[0.0, 1.0], [-2.0, -0.5]]), np.zeros((2, 2))]
)
@pytest.mark.parametrize("shape", [(2,), (3, 2)])
def test_exponential_steps_solve_linear_equations_exactly(linear: Any, shape: tuple[int, ...]) -> None:
    """With a constant beside the linear part, of any length of step, and linear in time with the second order."""
    grid = Grid(np.array([0.0, 3.0, 3.5, 4.5]), np.zeros(shape), len(shape))
    L = linear if linear.ndim == 2 else np.diag(np.broadcast_to(linear, 2))
    method = ExponentialRungeKutta(2, linear).bind(grid)
    assert method.coupled_axes == (linear.ndim == 2)
    y = np.arange(3 * np.prod(shape)).reshape(3, *shape) - 2.0
    found, _ = method.advance(lambda t, y: 0 * y + 1 + t.reshape(-1, *(1,) * len(shape)), grid, 0, 3, y)
    for n in range(3):
        wide = np.zeros((4, 4))  # (y, s, 1): y' = L y + 1 + t_n + s, s' = 1
        wide[:2, :2], wide[:2, 2], wide[:2, 3], wide[2, 3] = L, 1, 1 + grid.t[n], 1
        steps = 2**14
        once = np.eye(4) + wide * grid.h[n] / steps
        power = once + (wide * grid.h[n] / steps) @ (wide * grid.h[n] / steps) / 2
        whole = np.linalg.matrix_power(power, steps)
        rows = y[n].reshape(-1, 2)
        start = np.concatenate([rows, np.tile([0.0, 1.0], (len(rows), 1))], axis=1)
        np.testing.assert_allclose(found[n].reshape(-1, 2), (start @ whole.T)[:, :2], rtol=1e-6, atol=1e-6)


def test_exponentials_of_matrices() -> None:
    angles = np.array([0.1, 3.0, 40.0])
    turns = angles[:, None, None] * np.array([[0.0, -1.0], [1.0, 0.0]])
    rows = np.array([[np.cos(angles), -np.sin(angles)], [np.sin(angles), np.cos(angles)]])
    np.testing.assert_allclose(matrix_exponential(turns), np.moveaxis(rows, -1, 0), rtol=0, atol=1e-13)
    np.testing.assert_array_equal(matrix_exponential(np.zeros((1, 3, 3))), np.eye(3)[None])
    assert matrix_exponential(np.zeros((0, 2, 2))).shape == (0, 2, 2)
    exp, phi_1, phi_2 = phi_functions(np.array([0.5, 2.0]), np.array(-1.5))
    z = np.array([-0.75, -3.0])
    np.testing.assert_allclose(exp, np.exp(z), rtol=1e-14)
    np.testing.assert_allclose(phi_1, np.array([0.5, 2.0]) * (np.exp(z) - 1) / z, rtol=1e-14)
    np.testing.assert_allclose(phi_2, np.array([0.5, 2.0]) * (np.exp(z) - 1 - z) / z**2, rtol=1e-13)


def test_methods_by_name() -> None:
    assert get_method("rk4", None) is METHODS["rk4"]
    assert get_method(METHODS["ab3"], None) is METHODS["ab3"]
    exponential: Any = get_method("etd1", np.array(2.0))
    assert (exponential.order, float(exponential.linear)) == (1, 2.0)
    for name, linear in (("etd1", None), ("rk4", np.array(1.0))):
        with pytest.raises(ValueError, match=f"method='{name}' {'with' if name == 'rk4' else 'without'} it"):
            get_method(name, linear)


def problem(method: str = "ab3", shape: tuple[int, ...] = (4, 3), batch_dims: int = 1) -> Problem:
    grid = Grid(UNEVEN, np.zeros(shape), len(shape))
    field = Field(lambda t, y: t + 2 * y, np.zeros(shape), "ty", "column")
    return Problem(field, grid, METHODS[method].bind(grid), batch_dims)


def test_samples_and_sizes_of_a_problem() -> None:
    for batch_dims, samples, size in ((0, 1, 12), (1, 4, 3), (2, 12, 1)):
        one = problem(batch_dims=batch_dims)
        assert (one.samples, one.size) == (samples, size)
        rows = np.arange(24.0).reshape(2, 4, 3)
        assert one.flat(rows).shape == (2, samples, size)
        np.testing.assert_array_equal(one.unflat(one.flat(rows)), rows)
    assert problem(shape=(), batch_dims=0).size == 1
    for method, stages in (("rk4", 4), ("heun3", 3), ("ab3", 1)):
        one = problem(method)
        assert one.sequential_cost(10) == pytest.approx(10 * stages * one.field.cost(1, 1))


def test_what_a_step_needs_to_know_of_the_nodes_before() -> None:
    one = problem()
    rows = np.arange(6 * 12.0).reshape(6, 4, 3)
    pieces = [rows[:1], rows[1:4], rows[4:]]
    assert one.past(0, pieces) is None
    assert problem("rk4").past(3, pieces) is None
    for lo, known in ((1, 1), (2, 2), (4, 2)):
        past = one.past(lo, pieces)
        nodes = slice(lo - known, lo)
        np.testing.assert_allclose(past, UNEVEN[nodes].reshape(-1, 1, 1) + 2 * rows[nodes])


def test_the_coarse_problem_and_the_plain_loop() -> None:
    one = problem()
    coarse = one.coarse(np.array([0, 2, 5]))
    np.testing.assert_array_equal(coarse.grid.t, UNEVEN[[0, 2, 5]])
    assert coarse.method is METHODS["rk4"]
    y = [np.ones((1, 4, 3))]
    states = integrate_sequentially(one, 0, 5, y)
    assert states is y
    assert [len(state) for state in states] == [1] * 6
    pieces = [states[0], np.concatenate(states[1:4])]
    again = integrate_sequentially(one, 3, 5, pieces, one.past(3, pieces))
    np.testing.assert_array_equal(np.concatenate(again), np.concatenate(states))
