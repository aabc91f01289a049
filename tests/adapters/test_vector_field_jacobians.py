"""Jacobians of fields and of steps, and what they make of defects."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from parasolver_adapters.vector_field.field import Batching, Field
from parasolver_adapters.vector_field.grid import Grid
from parasolver_adapters.vector_field.jacobian import FieldJacobian, StepJacobian
from parasolver_adapters.vector_field.methods import METHODS, ExponentialRungeKutta, StepMethod, adams_weights
from parasolver_adapters.vector_field.problem import Problem

UNEVEN = np.cumsum([0.0, 0.1, 0.2, 0.05, 0.25, 0.1, 0.15, 0.2, 0.1, 0.3, 0.1, 0.05, 0.2])
EVEN = np.arange(13) * 0.125


def problem(
    f: Any,
    y0: Any,
    t: Any = UNEVEN,
    method: str | StepMethod = "rk4",
    batch_dims: int = 0,
    jacobian: Any = None,
    batching: Batching = "column",
) -> Problem:
    grid, own = Grid(t, y0, y0.ndim), METHODS[method] if isinstance(method, str) else method
    return Problem(Field(f, y0, "ty", batching), grid, own.bind(grid), batch_dims, jacobian)


def numbers(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape)


def series(z: Any, order: int) -> Any:
    return sum(z**k / np.prod(np.arange(1, k + 1)) for k in range(order + 1))


@pytest.mark.parametrize(("method", "order"), [("euler", 2), ("midpoint", 2), ("ab3", 3), ("rk4", 4)])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(("lo", "hi"), [(0, 12), (3, 8)])
def test_short_windows_have_a_jacobian_in_the_middle_of_each_step(
    method: str, order: int, dense: bool, lo: int, hi: int
) -> None:
    """Of y' = -(1 + t) y^2, at the mean of both ends."""
    one = problem(lambda t, y: -(1 + t) * y**2, np.zeros(1), method=method)
    y, r = 1 + numbers(hi - lo + 1, 1) ** 2, numbers(hi - lo, 1, 1, seed=1)
    surrogate = FieldJacobian(one, lo, hi, dense)
    assert surrogate.length == 1
    t = (UNEVEN[lo:hi] + UNEVEN[lo + 1 : hi + 1]) / 2
    A = series(-2 * (1 + t) * (y[:-1, 0] + y[1:, 0]) / 2 * np.diff(UNEVEN[lo : hi + 1]), order)
    d, forwards = 0.0, []
    for n in range(hi - lo):
        d = A[n] * d + r[n, 0, 0]
        forwards.append(d)
    d, back = 0.0, []
    for n in range(hi - lo)[::-1]:
        d = A[n] * d + r[n, 0, 0]
        back.append(d)
    np.testing.assert_allclose(surrogate.propagate(r, y).ravel(), forwards, rtol=1e-5)
    np.testing.assert_allclose(surrogate.propagate_back(r, y).ravel(), back[::-1], rtol=1e-5)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("t", [UNEVEN, EVEN])
@pytest.mark.parametrize(("lo", "hi", "length"), [(0, 12, 4), (1, 12, 4), (2, 11, 8), (0, 7, 2)])
def test_a_block_shares_the_jacobian_in_its_middle(dense: bool, t: Any, lo: int, hi: int, length: int) -> None:
    """Its steps are by their own lengths; what passes a whole block is the power of its mean step."""
    one = problem(lambda t, y: -(1 + t) * y**2, np.zeros(1), t)
    surrogate, n = FieldJacobian(one, lo, hi, dense), hi - lo
    surrogate.length = length
    y, r = 1 + numbers(n + 1, 1) ** 2, numbers(n, 1, 1, seed=1)
    start, expected = 0.0, []
    for first in range(0, n, length):
        last = min(first + length, n)
        middle = [(first + last) // 2, -(-(first + last) // 2)]  # one node, or two with the middle between them
        J = -2 * (1 + t[lo + np.array(middle)].mean()) * y[middle, 0].mean()
        mean = (t[lo + last] - t[lo + first]) / (last - first)
        increment = series(J * mean, 4) - 1
        passed, own = start, 0.0
        for j in range(first, last):
            factor = 1 + increment * (t[lo + j + 1] - t[lo + j]) / mean
            passed, own = factor * passed + r[j, 0, 0], factor * own + r[j, 0, 0]
            expected.append(passed)
        start = (1 + increment) ** length * start + own
    np.testing.assert_allclose(surrogate.propagate(r, y).ravel(), expected, rtol=1e-5)


def test_blocks_are_halved_where_progress_is_slow_and_renewed_where_it_is_not_quick() -> None:
    taken: list[int] = []

    def jacobian(t: Any, y: Any) -> Any:
        taken.append(len(y))
        return -np.ones((len(y), 1))

    one = problem(lambda t, y: -y, np.zeros(1), np.linspace(0, 1, 1601), jacobian=jacobian)
    surrogate = FieldJacobian(one, 0, 1600, dense=False)
    assert surrogate.length == 8
    for size, theta, length, renewed in [
        (1e-5, 0.01, 8, False),
        (1e-5, 0.2, 8, True),
        (1e-2, 0.01, 8, True),
        (1e-5, 0.01, 8, False),
        (1e-5, 0.6, 4, True),
        (1.0, 2.0, 2, True),
        (1.0, 2.0, 1, True),
        (1.0, 2.0, 1, True),
    ]:
        surrogate.propagate(np.ones((1600, 1, 1)), np.ones((1601, 1)))
        taken.clear()
        surrogate.update(size, theta)
        surrogate.propagate_back(np.ones((1600, 1, 1)), np.ones((1601, 1)))
        assert (surrogate.length, taken) == (length, [1600 // length] if renewed else [])


def test_blocks_are_longer_in_long_windows_and_of_large_matrices() -> None:
    t = np.linspace(0, 1, 100001)
    small, large = (problem(lambda t, y: -y, np.zeros(size), t) for size in (1, 32))
    lengths = [FieldJacobian(small, 0, steps, dense=False).length for steps in (1, 399, 400, 1600, 100000)]
    assert lengths == [1, 1, 2, 8, 64]
    assert FieldJacobian(large, 0, 1600, dense=False).length == 8
    assert FieldJacobian(large, 0, 1600, dense=True).length > 8
    assert FieldJacobian(small, 0, 1600, dense=True).length == 8


def coupled(t: Any, y: Any, xp: Any = np) -> Any:
    """Samples (..., 3), each for itself."""
    return xp.stack([y[..., 0] * y[..., 1] + t[..., 0], xp.sin(y[..., 2]), 2 * y[..., 0] - y[..., 1] ** 2], -1)


def exact(y: Any) -> Any:
    zero, one = np.zeros(y.shape[:-1]), np.ones(y.shape[:-1])
    rows = [[y[..., 1], y[..., 0], zero], [zero, zero, np.cos(y[..., 2])], [2 * one, -2 * y[..., 1], zero]]
    return np.moveaxis(np.array(rows), (0, 1), (-2, -1))


@pytest.mark.parametrize("kind", ["numpy", "torch", "numpy, single", "torch, single"])
@pytest.mark.parametrize("size", [1.0, 1e3, 1e-3])
def test_jacobians_of_samples(kind: str, size: float) -> None:
    """By differences; by autograd where numbers are too short for them."""
    recorded: list[bool] = []
    library, _, single = kind.partition(", ")
    dtype: Any = np.float32 if single else np.float64

    def field(t: Any, y: Any) -> Any:
        recorded.append(library == "torch" and y.requires_grad)
        return coupled(t, y, np if library == "numpy" else torch)

    states = (size * numbers(5, 4, 3)).astype(dtype)
    states[0, 0, 1] = states[1, 2, 2] = 0
    wrap: Any = np.asarray if library == "numpy" else torch.from_numpy
    one = problem(field, wrap(np.zeros((4, 3), dtype)), batch_dims=1)
    J = FieldJacobian(one, 0, 12, True)._jacobian(wrap(np.zeros(5, dtype)), wrap(states))
    assert any(recorded) == (kind == "torch, single")
    limit = 1e-2 if kind == "numpy, single" else 1e-5
    np.testing.assert_allclose(np.asarray(J), exact(states), rtol=limit, atol=limit * max(size, 1))


def test_a_field_without_a_state_has_no_jacobian() -> None:
    one = problem(lambda t, y: torch.sin(t) + torch.zeros(4, 3), torch.zeros(4, 3), batch_dims=1)
    J = FieldJacobian(one, 0, 12, True)._jacobian(torch.zeros(5), torch.ones(5, 4, 3))
    assert J.shape == (5, 4, 3, 3)
    assert not J.any()


def test_a_field_of_parameters_alone_has_no_jacobian() -> None:
    a = torch.ones(3, requires_grad=True)
    one = problem(lambda t, y: a * torch.cos(t), torch.zeros(3))
    J = FieldJacobian(one, 0, 12, True)._jacobian(torch.zeros(5), torch.ones(5, 3))
    assert J.shape == (5, 1, 3, 3)
    assert not J.any()


def test_differences_are_as_small_as_the_state() -> None:
    one, states = problem(lambda t, y: 1e12 * y**2, np.zeros(2)), 1e-12 * numbers(5, 2)
    for dense in (True, False):
        J = FieldJacobian(one, 0, 12, dense)._jacobian(np.zeros(5), states)
        diagonal = np.diagonal(J, axis1=-2, axis2=-1) if dense else J
        np.testing.assert_allclose(diagonal[:, 0], 2e12 * states, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("shape", "dtype"), [((5, 2), np.float64), ((5, 2, 2), np.float32), ((5, 1, 2, 2), None)])
def test_a_users_jacobian_of_another_shape_or_dtype_is_refused(shape: Any, dtype: Any) -> None:
    one = problem(lambda t, y: y, np.zeros(2), jacobian=lambda t, y: np.zeros(shape, dtype))
    with pytest.raises(ValueError, match=r"jacobian: expected shape \(5, 2, 2\) and dtype float64 .*, got shape \(5, "):
        FieldJacobian(one, 0, 12, True)._jacobian(np.arange(5.0), np.ones((5, 2)))


@pytest.mark.parametrize("size", [1, 8, 9, 40])
def test_diagonals_of_fields_that_act_elementwise(size: int) -> None:
    one = problem(lambda t, y: -(1 + t) * y**2, np.zeros((2, size)), batch_dims=1)
    states, t = numbers(5, 2, size), np.arange(5.0)
    J = FieldJacobian(one, 0, 12, False)._jacobian(t, states)
    np.testing.assert_allclose(J, -2 * (1 + t)[:, None, None] * states, rtol=1e-5, atol=1e-6)


def test_the_diagonal_of_a_small_coupled_state_is_exact() -> None:
    one = problem(coupled, np.zeros(3))
    states = numbers(5, 3)
    J = FieldJacobian(one, 0, 12, False)._jacobian(np.zeros(5), states)
    np.testing.assert_allclose(J[:, 0], np.diagonal(exact(states), axis1=-2, axis2=-1), atol=1e-6)
    matrix = numbers(8, 8)
    one = problem(lambda t, y: y @ matrix.T, np.zeros(8))
    J = FieldJacobian(one, 0, 12, False)._jacobian(np.zeros(5), numbers(5, 8, seed=1))
    np.testing.assert_allclose(J, np.tile(np.diag(matrix), (5, 1, 1)), atol=1e-6)


def test_the_estimated_diagonal_of_a_wide_coupled_state_has_no_bias() -> None:
    """Random signs leave of the 199 others 0.05 on average; all together they are twice the diagonal."""
    one = problem(lambda t, y: y + 0.01 * (y.sum(axis=-1, keepdims=True) - y), np.zeros(200))
    J = FieldJacobian(one, 0, 12, False)._jacobian(np.zeros(5), numbers(5, 200))
    assert J.shape == (5, 1, 200)
    assert abs(J.mean() - 1) < 0.03
    assert np.max(np.abs(J - 1)) < 0.3


@pytest.mark.parametrize("batch_dims", [0, 1, 2])
@pytest.mark.parametrize("dense", [True, False])
def test_a_users_jacobian_is_called_with_columns(batch_dims: int, dense: bool) -> None:
    shape, batch = (2, 3), (2, 3)[:batch_dims]
    size = int(np.prod(shape[batch_dims:]))
    expected = (5, *batch, *((size, size) if dense else (size,)))
    seen: list[Any] = []

    def jacobian(t: Any, y: Any) -> Any:
        seen.append((t.shape, y.shape))
        return np.arange(np.prod(expected, dtype=float)).reshape(expected)

    one = problem(lambda t, y: y, np.zeros(shape), batch_dims=batch_dims, jacobian=jacobian)
    J = FieldJacobian(one, 0, 12, dense)._jacobian(np.arange(5.0), np.ones((5, 2, 3)))
    assert seen == [((5, 1, 1), (5, 2, 3))]
    assert J.shape == (5, one.samples, *((size, size) if dense else (size,)))
    np.testing.assert_array_equal(J.ravel(), np.arange(J.size))


LINEAR = [np.array(-30.0), np.array([-1.0, -40.0]), np.array([[0.0, 3.0], [-9.0, -0.5]])]


@pytest.mark.parametrize("linear", LINEAR)
@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("dense", [True, False])
def test_an_exponential_methods_steps_carry_the_linear_part(linear: Any, batch_dims: int, dense: bool) -> None:
    """Of any length, beside a field whose Jacobian is 1/2: ``exp(h (L + 1/2))``, or that of its diagonal."""
    one = problem(lambda t, y: y / 2, np.zeros((3, 2)), method=ExponentialRungeKutta(2, linear), batch_dims=batch_dims)
    L = linear if linear.ndim == 2 else np.diag(np.broadcast_to(linear, 2))
    L = L if dense else np.diag(np.diag(L))
    r = np.zeros((12, one.samples, one.size))
    start = numbers(3, 2)
    r[3] = start.reshape(r[3].shape)
    found = FieldJacobian(one, 0, 12, dense).propagate(r, np.zeros((13, 3, 2)))
    values, vectors = np.linalg.eig(L + np.eye(2) / 2)
    for n in range(4, 12):
        whole = (vectors * np.exp(values * (UNEVEN[n + 1] - UNEVEN[4]))) @ np.linalg.inv(vectors)
        np.testing.assert_allclose(found[n].reshape(3, 2), start @ whole.real.T, atol=0.02)


def test_turns_of_a_linear_part_are_carried_however_far() -> None:
    """Of eight elements that all act on each other: up to seven radians a step."""
    L = 5.0 * np.sign(np.subtract.outer(np.arange(8), np.arange(8)))
    one = problem(lambda t, y: 0 * y, np.zeros(8), method=ExponentialRungeKutta(2, L))
    r = np.zeros((12, 1, 8))
    r[0, 0] = numbers(8)
    found = FieldJacobian(one, 0, 12, True).propagate(r, np.ones((13, 8)))
    values, vectors = np.linalg.eig(L)
    for n in range(1, 12):
        whole = (vectors * np.exp(values * (UNEVEN[n + 1] - UNEVEN[1]))) @ np.linalg.inv(vectors)
        np.testing.assert_allclose(found[n, 0], whole.real @ r[0, 0], atol=0.1)


@pytest.mark.parametrize(("h", "limit"), [(40.0, 1e-3), (-40.0, 1e-3), (0.001, 1e-8)])
def test_a_linear_part_is_carried_over_steps_of_any_length(h: float, limit: float) -> None:
    """With its sign turned where time runs backwards, so that all of them decay."""
    L, after = -np.sign(h) * np.array([1.0, 0.5]), np.array([0.0, 1.0, 1.01, 2.0])
    one = problem(lambda t, y: 0 * y, np.zeros(2), h * after, ExponentialRungeKutta(1, L))
    r = np.zeros((3, 1, 2))
    r[0] = 1.0
    for dense in (True, False):
        found = FieldJacobian(one, 0, 3, dense).propagate(r, np.ones((4, 2)))
        np.testing.assert_allclose(found[:, 0], np.exp((after[1:, None] - 1) * h * L), rtol=0, atol=limit)


def disturbed(one: Problem, y0: Any, r: Any) -> Any:
    """What disturbances of the ends of all steps come to, in the plain loop."""
    ways = []
    for share in (0.0, 1.0):
        y, past, states = y0[None], None, []
        for n in range(len(one.grid)):
            y, past = one.method.advance(one.field, one.grid, n, n + 1, y, past)
            y = y + share * one.unflat(r[n : n + 1])
            states.append(y)
        ways.append(np.concatenate(states))
    return one.flat(ways[1] - ways[0])


class Taylor(StepMethod):
    """Somebody's own, of second order."""

    order, stages = 2, 2

    def advance(self, field: Any, grid: Grid, lo: int, hi: int, y: Any, past: Any = None) -> Any:
        h = grid.steps(lo, hi)
        return y + h * field(grid.times(lo, hi, 0.5), y + h / 2 * field(grid.times(lo, hi, 0.0), y)), None


MATRIX = np.array([[-0.5, 2.0, 0.0], [-1.0, 0.1, 0.3], [0.2, 0.0, -1.0]])
STEPS = [
    (Taylor(), UNEVEN),
    *[(METHODS[name], t) for name in METHODS for t in (EVEN, UNEVEN) if not (name.startswith("ab") and t is UNEVEN)],
    *[
        (ExponentialRungeKutta(order, linear), UNEVEN)
        for order in (1, 2)
        for linear in (np.array(-0.7), np.array([-1.0, 0.3, -5.0]), np.array(MATRIX[::-1]))
    ],
]


@pytest.mark.parametrize(("method", "t"), STEPS)
@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_jacobians_of_steps_say_what_a_disturbance_comes_to(method: StepMethod, t: Any, shape: Any) -> None:
    """Of a linear field exactly, also by methods that remember."""
    one = problem(lambda t, y: y @ MATRIX.T + t, np.zeros(shape), t, method, batch_dims=len(shape) - 1)
    r = numbers(12, one.samples, 3)
    r[: method.memory] = 0  # those steps are not of the method itself
    expected = disturbed(one, numbers(*shape, seed=1), r)
    found = StepJacobian(one).propagate(r, np.ones((13, *shape)))
    assert found.shape == r.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_jacobians_of_steps_do_not_ask_the_users_jacobian() -> None:
    one = problem(lambda t, y: -y, np.zeros(1), EVEN, "euler", jacobian=lambda t, y: 1 / 0)
    r = np.zeros((12, 1, 1))
    r[0] = 1
    found = StepJacobian(one).propagate(r, np.zeros((13, 1)))
    np.testing.assert_allclose(found.ravel(), 0.875 ** np.arange(12), rtol=1e-6)


@pytest.mark.parametrize("name", ["ab2", "ab3"])
def test_blocks_of_a_method_that_remembers_have_equal_steps(name: str) -> None:
    """Of their mean: what a longer step multiplies a remembered output with is no multiple of its length."""
    means = np.repeat((UNEVEN[[4, 8, 12]] - UNEVEN[[0, 4, 8]]) / 4, 4)
    found, r = [], numbers(12, 1, 3)
    for t in (UNEVEN, np.cumsum([0.0, *means])):
        surrogate = StepJacobian(problem(lambda t, y: y @ MATRIX.T, np.zeros(3), t, name))
        surrogate.length = 4
        found.append(surrogate.propagate(r, np.ones((13, 3))))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ab2", "ab3"])
def test_a_long_step_enlarges_what_those_before_it_have_said(name: str) -> None:
    """A step fifty times the one before weighs remembered outputs with 25 and more: rounding of 1e-8 became 6e-5."""
    t = np.cumsum([0.0, *[0.1] * 5, 1e-3, 0.05, *[0.1] * 4])
    one = problem(lambda t, y: y @ MATRIX.T, np.zeros(3), t, name)
    order = one.method.memory + 1
    weights, r = adams_weights(t, order), numbers(len(t) - 1, 1, 3)
    assert np.abs(weights[6] / one.grid.h[6]).max() > 20
    d = [np.zeros(3)]
    for n in range(len(t) - 1):
        past = sum(weights[n, k] * d[n - k] for k in range(order)) if n >= order - 1 else one.grid.h[n] * d[n]
        d.append(d[n] + MATRIX @ past + r[n, 0])
    found = StepJacobian(one).propagate(r, np.ones((len(t), 3)))[:, 0]
    np.testing.assert_allclose(found, d[1:], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["euler", "midpoint", "heun3", "rk4"])
def test_where_the_stages_are_known_they_have_jacobians_of_their_own(name: str) -> None:
    """Of steps that are long for a field of the third power, whose Jacobian is another in each stage."""
    one = problem(lambda t, y: MATRIX.T @ y[..., None] @ np.ones(1) - 0.3 * (1 + t) * y**3, np.full(3, 1.5), EVEN, name)
    calls: list[np.ndarray] = []

    def field(t: Any, y: Any) -> Any:
        calls.append(np.array(y))
        return one.field(t, y)

    r = 1e-7 * numbers(12, 1, 3)
    y, moved = [np.full((1, 3), 1.5)], [np.full((1, 3), 1.5)]
    for n in range(12):
        y.append(one.method.advance(field, one.grid, n, n + 1, y[n], None)[0])
        moved.append(one.method.advance(one.field, one.grid, n, n + 1, moved[n], None)[0] + r[n])
    stages = np.reshape(calls, (12, one.method.stages, 3))
    expected = np.array(moved[1:]) - np.array(y[1:])
    found = StepJacobian(one, stages).propagate(r, np.concatenate(y))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    if name != "euler":
        in_the_middle = StepJacobian(one).propagate(r, np.concatenate(y))
        assert np.abs(in_the_middle - expected).max() > 1e-3 * np.abs(expected).max()
