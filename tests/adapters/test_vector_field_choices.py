"""What the front doors make of their arguments."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from parasolver_adapters.vector_field import SequentialFallbackWarning, integrate, odeint, solve_ivp
from parasolver_adapters.vector_field.field import Field
from parasolver_adapters.vector_field.grid import Grid
from parasolver_adapters.vector_field.methods import METHODS, ExponentialRungeKutta
from parasolver_adapters.vector_field.odeint import _Choices
from parasolver_adapters.vector_field.problem import Problem
from parasolver_core.solution import Status
from tests.adapters.vector_fields import START, TIMES, close, pendulum


def decay(t: Any, y: Any) -> Any:
    return -y


def problem(shape: tuple[int, ...] = (2,), steps: int = 200, method: Any = "rk4", dtype: Any = None) -> Problem:
    y0 = np.ones(shape, dtype)
    grid = Grid(np.linspace(0, 1, steps + 1), y0, len(shape))
    own = METHODS[method] if isinstance(method, str) else method
    return Problem(Field(decay, y0, "ty", "auto"), grid, own.bind(grid), 0)


def choices(**changes: Any) -> _Choices:
    given = {"linearization": "auto", "tolerance": None, "window": None, "coarse_steps": 40, "batch_dims": None}
    return _Choices(**(given | {"few_steps": None} | changes))


@pytest.mark.parametrize(
    ("t", "step", "substeps"),
    [([0.0, 1.0], 1.0, 1), ([0.0, 1.0], 0.25, 4), ([0.0, -1.0], 0.25, 4), ([0.0, 1.0, 2.0], 0.5, 2), ([3.0], 0.5, 1)],
)
def test_step_sizes_of_torchdiffeq_divide_the_times(t: list[float], step: float, substeps: int) -> None:
    calls: list[int] = []
    options: dict[str, Any] = {"method": "euler", "linearization": "sequential", "options": {"step_size": step}}
    y = odeint(lambda t, y: calls.append(1) or -y, np.ones(1), t, **options)
    assert len(calls) == substeps * (len(t) - 1)
    assert len(y) == len(t)
    h = -step if t[-1] < t[0] else step
    np.testing.assert_allclose(y[:, 0], (1 - h) ** (substeps * np.arange(len(t))), rtol=1e-12)


@pytest.mark.parametrize("step", [0.2501, 0.2499, 1.01, 3.0])
def test_step_sizes_that_are_off_by_more_than_rounding_are_refused(step: float) -> None:
    with pytest.raises(ValueError, match="options: expected a step_size that divides all"):
        odeint(decay, np.ones(1), [0.0, 1.0], options={"step_size": step})
    odeint(decay, np.ones(1), [0.0, 1.0], options={"step_size": 0.25001})
    with pytest.raises(ValueError, match="for intervals of 1 to 2"):
        odeint(decay, np.ones(1), [0.0, 1.0, 3.0], options={"step_size": step})


def test_substeps_are_of_equal_length() -> None:
    seen: list[float] = []
    times: list[float] = [0.0, 1.0, 1.5, 4.0]
    options: dict[str, Any] = {"method": "euler", "substeps": 5, "linearization": "sequential"}
    found = integrate(lambda t, y: seen.append(float(t)) or -y, np.ones(1), times, **options)
    expected = [a + (b - a) * k / 5 for a, b in pairwise(times) for k in range(5)]
    np.testing.assert_allclose(seen, expected, rtol=1e-15)
    np.testing.assert_array_equal(found.t, times)
    assert found.sequential_steps == 15


def test_results_in_the_shape_of_scipys() -> None:
    grid = np.array([0.0, 0.5, 2.0])
    found = solve_ivp(decay, (0, 2), np.array([[1.0, 2.0, 3.0]]), "euler", grid, linearization="sequential")
    assert found.y.shape == (1, 3, 3)
    np.testing.assert_allclose(found.y[0], np.outer([1, 2, 3], [1, 0.5, -0.25]))
    np.testing.assert_array_equal(found.t, grid)
    assert (found.status, found.success, found.nfev) == (0, True, 2)
    assert found.message == found.solution.message
    equal = solve_ivp(decay, (1, 0), [1.0], steps=4, linearization="sequential")
    np.testing.assert_allclose(equal.t, [1, 0.75, 0.5, 0.25, 0])
    broken = solve_ivp(lambda t, y: y * np.nan, (0, 1), [1.0], steps=4, linearization="sequential")
    assert (broken.status, broken.success) == (-1, False)
    assert broken.solution.status is Status.NONFINITE_MODEL


@pytest.mark.parametrize(
    ("t_span", "given", "message"),
    [
        ((0, 1), {}, "steps: give either"),
        ((0, 1), {"steps": 3, "t_eval": [0, 1]}, "steps: give either"),
        ((0, 1), {"steps": 0}, "steps: expected an integer of at least 1"),
        ((0, 1), {"t_eval": [0.1, 1]}, "t_eval: expected to begin and end .* got 0.1 to 1.0"),
        ((0, 1), {"t_eval": [0, 0.9]}, "t_eval: expected to begin and end .* got 0.0 to 0.9"),
        ((0, 0), {"steps": 3}, "t: expected strictly"),
    ],
)
def test_grids_that_are_refused(t_span: Any, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve_ivp(decay, t_span, [1.0], **given)


@pytest.mark.parametrize(
    ("shape", "method", "given", "dims", "linearization"),
    [
        ((1,), "rk4", {}, 1, "diagonal"),
        ((4, 3), "rk4", {}, 2, "diagonal"),
        ((4, 3), "rk4", {"batch_dims": 1}, 1, "full"),
        ((4, 32), "rk4", {"batch_dims": 1}, 1, "full"),
        ((4, 33), "rk4", {"batch_dims": 1}, 1, "secant"),
        ((4, 8), "rk4", {"batch_dims": 0}, 0, "full"),
        ((4, 9), "rk4", {"batch_dims": 0}, 0, "secant"),
        ((4, 9), "rk4", {"batch_dims": 0, "linearization": "full"}, 0, "full"),
        ((4, 3), ExponentialRungeKutta(2, np.array([-1.0, -2.0, -3.0])), {}, 2, "diagonal"),
        ((4, 3), ExponentialRungeKutta(2, -np.eye(3)), {}, 1, "full"),
        ((4, 3), ExponentialRungeKutta(2, -np.eye(3)), {"batch_dims": 0}, 0, "full"),
    ],
)
def test_what_stands_for_the_jacobian(shape: Any, method: Any, given: Any, dims: int, linearization: str) -> None:
    """Of axes that the method itself couples none counts samples."""
    one = problem(shape, method=method)
    prepared, integrator = choices(window=150, coarse_steps=7, **given).prepare(one, np.ones(shape))
    assert prepared.batch_dims == dims
    assert integrator is not None
    assert (integrator.linearization, integrator.window, integrator.coarse_steps) == (linearization, 150, 7)
    assert integrator.tolerance == 64 * np.finfo(np.float64).eps
    single = problem(shape, method=method, dtype=np.float32)
    _, integrator = choices(**given).prepare(single, np.ones(shape, np.float32))
    assert integrator is not None
    assert integrator.tolerance == 64 * np.finfo(np.float32).eps
    _, integrator = choices(tolerance=1e-3, **given).prepare(problem(shape, method=method), np.ones(shape))
    assert integrator is not None
    assert integrator.tolerance == 1e-3


@pytest.mark.parametrize(
    ("steps", "given", "parallel", "warned"),
    [
        (7, {}, False, False),
        (8, {}, False, True),
        (63, {}, False, True),
        (64, {}, True, False),
        (63, {"few_steps": "sequential"}, False, False),
        (63, {"few_steps": "parallel"}, True, False),
        (200, {"window": 63}, False, False),
        (200, {"window": 64}, True, False),
        (200, {"linearization": "sequential"}, False, False),
        (30, {"linearization": "sequential"}, False, False),
    ],
)
def test_few_steps_are_made_one_after_another(steps: int, given: Any, parallel: bool, warned: bool) -> None:
    one = problem(steps=steps)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _, integrator = choices(**given).prepare(one, np.ones(2))
    assert (integrator is not None) == parallel
    assert [f"{steps} steps were made one after another" in str(one.message) for one in seen] == [True] * warned
    assert (one.field.calls > 0) == parallel


def test_rounds_of_few_steps_have_sixteen_nodes_unless_a_window_is_given() -> None:
    asked = choices(few_steps="parallel")
    assert asked.rounds(problem(steps=63)) == 16
    assert asked.rounds(problem(steps=64)) is None
    assert choices(few_steps="parallel", window=5).rounds(problem(steps=20)) == 5
    assert choices().rounds(problem(steps=20)) is None
    _, integrator = asked.prepare(one := problem(steps=20), np.ones(2))
    assert integrator is not None
    assert integrator.linearization == "secant"
    assert (one.field.calls, one.field.batching) == (5, "column")  # tried with three rows


@pytest.mark.parametrize(("row_cost", "parallel"), [(0.5, False), (0.05, True)])
def test_the_plain_loop_is_taken_where_a_batch_costs_as_much(row_cost: float, parallel: bool) -> None:
    """Five rounds of 4 (1 + 200 c) calls against 200 steps of 4 (1 + c): up to c of about a quarter."""
    for linearization, taken in (("auto", parallel), ("full", True)):
        one = problem()
        one.field.row_cost = row_cost
        _, integrator = choices(linearization=linearization).prepare(one, np.ones(2))
        assert (integrator is not None) == taken


def test_rounds_of_a_batch_may_cost_what_the_loop_does() -> None:
    for cost, parallel in ((0.2425, True), (0.2460, False)):  # 5 (1 + 200 c) = 200 (1 + c) at c = 195 / 800
        one = problem()
        one.field.row_cost = cost
        assert (choices().prepare(one, np.ones(2))[1] is not None) == parallel


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"linearization": "secants"}, ValueError, "linearization: expected one of auto, identity"),
        ({"tolerance": 2.0}, ValueError, "tolerance: expected less than 1"),
        ({"window": 0}, ValueError, "window: expected an integer of at least 1"),
        ({"coarse_steps": 0}, ValueError, "coarse_steps: expected an integer of at least 1"),
        ({"coarse_steps": None}, TypeError, "coarse_steps: expected"),
        ({"batch_dims": -1}, ValueError, "batch_dims: expected an integer of at least 0"),
        ({"batch_dims": 2}, ValueError, "batch_dims: got 2 for a state with 1 axes"),
    ],
)
def test_choices_that_are_refused(given: Any, error: type[Exception], message: str) -> None:
    choices(batch_dims=1).check(np.ones(2))
    choices(batch_dims=0, tolerance=0, window=1, coarse_steps=1).check(np.ones(2))
    with pytest.raises(error, match=message):
        choices(**given).check(np.ones(2))


@pytest.mark.parametrize(
    ("y0", "error", "message"),
    [
        (np.ones(2, np.float16), TypeError, "y0: expected float32 or float64, got dtype float16"),
        (torch.ones(2).bfloat16(), TypeError, "y0: expected float32 or float64, got dtype torch.bfloat16"),
        (np.ones(2) * 1j, TypeError, "y0: expected float32 or float64, got dtype complex128"),
        (np.ones((2, 0)), ValueError, r"y0: expected no empty axis, got shape \(2, 0\)"),
        (np.array([1.0, np.nan]), ValueError, "y0: holds NaN"),
    ],
)
def test_states_that_are_refused(y0: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        odeint(decay, y0, TIMES)


@pytest.mark.parametrize(
    ("linear", "shape"),
    [
        (2.0, ()),
        (2.0, (3,)),
        ([1.0, 2.0, 3.0], (3,)),
        ([1.0, 2.0, 3.0], (2, 3)),
        (np.eye(3), (3,)),
        (np.eye(3), (2, 3)),
        (torch.eye(3), (2, 3)),
    ],
)
def test_linear_parts_that_fit(linear: Any, shape: Any) -> None:
    y = odeint(lambda t, y: 0 * y, np.ones(shape), [0.0, 1.0], method="etd1", linear=linear, linearization="sequential")
    rates = np.asarray(linear) if np.ndim(linear) == 1 else 2.0 if np.ndim(linear) == 0 else 1.0
    np.testing.assert_allclose(y[1], np.exp(rates) * np.ones(shape), rtol=1e-13)


@pytest.mark.parametrize(
    ("linear", "message"),
    [
        (np.ones((1, 3)), r"linear: expected a number, shape \(3,\) or \(3, 3\), got shape \(1, 3\)"),
        ([1.0, np.inf, 2.0], "linear: holds NaN or infinity"),
    ],
)
def test_linear_parts_that_do_not_fit(linear: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        odeint(decay, np.ones(3), TIMES, method="etd1", linear=linear)


def test_a_jacobian_that_nobody_can_call_is_refused() -> None:
    with pytest.raises(TypeError, match=r"jacobian: expected a function jacobian\(t, y\), got ndarray"):
        odeint(pendulum, START, TIMES, jacobian=np.eye(2))  # type: ignore[arg-type]


def test_what_a_doubted_trajectory_is_replaced_by() -> None:
    """The plain loop, and every step of it is counted; where nothing is doubted nothing is said."""

    def shared(t: Any, y: Any) -> Any:
        return -y / np.maximum(np.sqrt(np.sum(y * y)), 3.0)

    with pytest.warns(SequentialFallbackWarning, match="^300 of 300 steps were made one after another: f gave"):
        found = integrate(shared, np.array([0.5, 0.2]), TIMES)
    assert (found.sequential_steps, found.success) == (300, True)
    np.testing.assert_array_equal(found.states, odeint(shared, np.array([0.5, 0.2]), TIMES, linearization="sequential"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = integrate(pendulum, START, TIMES)
    assert found.message.endswith("evaluations of the field.")
    close(found.states, odeint(pendulum, START, TIMES, linearization="sequential"))


def test_gradients_are_recorded_where_torch_records_them() -> None:
    y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
    for linearization in ("auto", "sequential"):
        assert odeint(decay, y0, TIMES, linearization=linearization).requires_grad
        with torch.no_grad():
            assert not odeint(decay, y0, TIMES, linearization=linearization).requires_grad


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.uint64])
def test_counts_of_few_bits_or_without_a_sign(kind: Any) -> None:
    """A window of 100 steps slides over 300; twice as many are no int8."""
    t = np.linspace(0.0, 3.0, 301)
    want = integrate(decay, np.ones(2), t, window=100, coarse_steps=20, batch_dims=0)
    got = integrate(decay, np.ones(2), t, window=kind(100), coarse_steps=kind(20), batch_dims=kind(0))
    np.testing.assert_array_equal(got.states, want.states)
    assert (got.rounds, got.calls, got.sequential_steps) == (want.rounds, want.calls, 0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"step_size": 0}, "options: expected a finite step_size above 0, got 0"),
        ({"step_size": -0.5}, "options: expected a finite step_size above 0, got -0.5"),
        ({"step_size": float("nan")}, "options: expected a finite step_size above 0, got nan"),
        ({"step_size": "x"}, "options: step_size: expected a number, got 'x'"),
        (3, "options: of torchdiffeq's only 'step_size' is known, got 3"),
        (
            {"norm": 1, "perturb": True},
            r"options: of torchdiffeq's only 'step_size' is known, got \['norm', 'perturb'\]",
        ),
    ],
    ids=str,
)
def test_options_that_are_no_step_size(options: Any, told: str) -> None:
    with pytest.raises((ValueError, TypeError), match="^" + told):
        odeint(decay, np.ones(1), [0.0, 1.0], options=options)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("event_fn", "look for the event in the states"),
        ("events", "look for them in the states"),
        ("dense_output", "name the wanted times in t"),
        ("args", r"give lambda t, y: f\(t, y, \*args\) as f"),
        ("max_step", "steps are those of the grid"),
    ],
)
def test_arguments_of_other_libraries_are_told_what_to_do(name: str, told: str) -> None:
    other: dict[str, Any] = {name: None}
    with pytest.raises(TypeError, match=f"^{name}: not an argument here; {told}"):
        odeint(decay, np.ones(1), [0.0, 1.0], **other)
    with pytest.raises(TypeError, match=f"^{name}: not an argument here; {told}"):
        solve_ivp(decay, (0.0, 1.0), [1.0], steps=3, **other)


def test_tolerances_of_steps_that_are_adapted() -> None:
    np.testing.assert_array_equal(
        odeint(decay, np.ones(1), [0.0, 1.0], rtol=1e-3, atol=1e-6), odeint(decay, np.ones(1), [0.0, 1.0])
    )
    for name in ("rtol", "atol"):
        with pytest.raises(TypeError, match=f"^{name}: not an argument here; step sizes are not adapted"):
            solve_ivp(decay, (0.0, 1.0), [1.0], steps=3, **{name: 1e-3})


@pytest.mark.parametrize(
    ("y0", "told"),
    [
        (np.ma.array([1.0]), "expected a plain array, got a masked one"),
        (np.ones(1).view(np.recarray), "expected a plain array, got the subclass recarray"),
        (np.ones(1, dtype=np.dtype("f8").newbyteorder()), "expected numbers in this machine's byte order"),
        (np.ones(1, dtype=np.float16), "expected float32 or float64, got dtype float16"),
    ],
    ids=["masked", "recarray", "bytes", "half"],
)
def test_states_that_are_no_plain_numbers(y0: Any, told: str) -> None:
    with pytest.raises(TypeError, match="^y0: " + told):
        integrate(decay, y0, [0.0, 1.0])


def test_a_state_wider_than_double_precision() -> None:
    if np.finfo(np.longdouble).bits == 64:
        pytest.skip("this machine has nothing wider")
    with pytest.raises(TypeError, match=r"^y0: expected float32 or float64, got dtype"):
        integrate(decay, np.ones(1, dtype=np.longdouble), [0.0, 1.0])
