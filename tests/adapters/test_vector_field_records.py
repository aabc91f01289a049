"""What a run notes on its way, and what its record says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from parasolver_adapters.vector_field import effort, integrate
from parasolver_adapters.vector_field.effort import Effort, Recorder, Samples, Twin
from parasolver_adapters.vector_field.field import Field
from parasolver_adapters.vector_field.grid import Grid
from parasolver_adapters.vector_field.methods import METHODS
from parasolver_adapters.vector_field.newton import ParallelIntegrator
from parasolver_adapters.vector_field.problem import Problem, integrate_sequentially
from parasolver_adapters.vector_field.result import every, finished, partial
from parasolver_core.solution import Status
from tests.adapters.vector_fields import TIMES, wave

EPS = float(np.finfo(np.float64).eps)


def problem(
    f: Any, shape: tuple[int, ...] = (2,), steps: int = 4, method: str = "rk4", batch_dims: int = 0, h: float = 0.25
) -> Problem:
    grid = Grid(np.arange(steps + 1) * h, np.zeros(shape), len(shape))
    return Problem(Field(f, np.zeros(shape), "ty", "column"), grid, METHODS[method].bind(grid), batch_dims)


@pytest.mark.parametrize(("large", "kept"), [(6, 3), (5, 1)])
def test_calls_are_recorded_and_of_large_ones_the_first(large: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effort, "_LARGE", large)
    field, y = Recorder(lambda t, y: t + y), np.ones((2, 3))
    assert field.calls == []
    for t in (1.0, 2.0, 3.0):
        np.testing.assert_array_equal(field(t, y * t), 2 * t * y)
    assert [t for t, _, _ in field.calls] == [1.0, 2.0, 3.0][:kept]
    for t, at, f in field.calls:
        np.testing.assert_array_equal(at, y * t)
        np.testing.assert_array_equal(f, 2 * t * y)


def kept(*windows: list[list[list[float]]]) -> Samples:
    """Of windows of calls of rows; their times count on, steps have the lengths 1, 2, ..., and the last is dropped."""
    samples, now = Samples(), 0
    for calls in windows:
        field = Recorder(lambda t, y: 10 * y)
        for rows in calls:
            field(float(now) + np.arange(len(rows)), np.array(rows))
            now += 100
        samples.keep(field.calls, -np.arange(1.0, len(calls[0])))
    return samples


def times_of(samples: Samples) -> list[float]:
    return [float(row[0][0]) for row in samples.chosen()]


def test_first_middle_and_last_of_all_windows_are_chosen() -> None:
    """The middle one is that of the middle window; rows that were not accepted do not count, however large."""
    rest = [0.5, 0.5]
    samples = kept([[rest] * 6 + [[9.0, 9.0]]], [[rest] * 4], [[rest] * 5 + [[-9.0, -9.0]]], [[rest] * 3])
    assert times_of(samples) == [0, 202, 301]
    assert [h for *_, h in samples.chosen()] == [1, 3, 2]
    for t, y, f, _ in samples.chosen():
        assert (t.shape, y.shape, f.shape) == ((1,), (1, 2), (1, 2))
        np.testing.assert_array_equal(f, 10 * y)


def test_the_largest_rows_of_all_calls_are_chosen() -> None:
    """By their largest and their smallest elements, means and squares, each the largest and the least."""
    rest, late = [0.0, 0.0, 0.0], [9.0, -9.0, 9.0]
    highest, lowest, square = [3.0, -2.0, -2.0], [2.0, -3.0, 2.0], [2.9, -2.9, 2.9]
    mean, lowest_mean = [2.5, 1.0, 1.0], [-2.5, -1.0, -1.0]
    samples = kept(
        [[rest, highest, rest, late], [rest, rest, lowest, late]],
        [[rest, rest, rest, late], [mean], [rest, lowest_mean]],  # a multistep method starts with steps of its own
        [[rest, square, rest, late]],
    )
    assert times_of(samples) == [0, 201, 502, 1, 300, 501, 401, 102]


def test_the_least_of_the_largest_elements_and_the_largest_of_the_least_are_chosen_too() -> None:
    """And the smallest row: what acts on all rows as a threshold may do so below as well as above."""
    rest = [2.0, -2.0, 0.0]
    samples = kept([[rest, [1.0, 0.5, 1.5], rest, [-0.5, -1.0, -1.5], rest, [0.1, -0.1, 0.2], rest, rest, rest]])
    assert sorted(times_of(samples)) == [0, 1, 3, 4, 5, 7]


def grown_in_steps(factor: float, twin: Twin, y: Any, nodes: list[int], h: float = 0.25) -> Any:
    """Of y' = rate y, which an Euler step of a coarse level multiplies by the factor."""
    steps = len(nodes) - 1
    level = problem(lambda t, y: (factor - 1) / h * y, y.shape, steps, "euler", h=h)
    return twin.integrate(level, np.array(nodes), y[None])


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_rounding_walks_at_random_within_a_step_and_grows_with_the_state(factor: float) -> None:
    """Half a rounding for each step that a coarse one stands for, times their root."""
    twin, y = Twin(), np.ones(64)
    found = grown_in_steps(factor, twin, y, [0, 16, 20, 25])
    np.testing.assert_allclose(found, factor ** np.arange(4)[:, None] * y, rtol=1e-12)
    twin.accept(15, 0.0)
    assert twin.grown == 0.0
    for node, grown in ((16, 2.0), (20, 3.0), (25, 3.0 + np.sqrt(5) / 2)):
        grown_in_steps(factor, one := Twin(), y, [0, 16, 20, 25])
        one.accept(node, 0.0)
        assert one.grown == pytest.approx(grown * EPS, rel=1e-5, abs=0)
    grown_in_steps(factor, whole := Twin(), y, [0, 16, 20])
    whole.accept(99, 0.0)
    assert whole.grown == pytest.approx(3.0 * EPS, rel=1e-5, abs=0)


@pytest.mark.parametrize(("tolerance", "more"), [(0.0, 1.0), (EPS, 1.5), (2 * EPS, 2.0), (1.0, 2.0)])
def test_the_next_window_goes_on_from_what_was_accepted(tolerance: float, more: float) -> None:
    """A window's own error lies on top, as far as it is no larger than what was there."""
    twin, y = Twin(), np.ones(64)
    grown_in_steps(1.0, twin, y, [0, 16, 32])
    twin.accept(16, tolerance)
    grown_in_steps(1.0, twin, y, [16, 20])
    twin.accept(20, tolerance)
    assert twin.grown == pytest.approx((2.0 * more + 1.0) * EPS, rel=1e-5, abs=0)
    grown_in_steps(1e-3, twin, y, [20, 24])  # what decays does not take back what was there
    twin.accept(24, tolerance)
    assert twin.grown == pytest.approx((2.0 * more + 1.0) * EPS, rel=1e-5, abs=0)


@pytest.mark.parametrize("tolerance", [0.0, 1e-6])
def test_a_wide_state_that_rests_at_zero(tolerance: float) -> None:
    """A tolerance of 0 was divided by how far rounding had grown, which was 0 too."""
    found = integrate(wave, np.zeros(64), TIMES, tolerance=tolerance)
    assert found.sequential_steps == 0
    np.testing.assert_array_equal(found.states, 0)


def test_the_twin_needs_as_many_calls_as_the_plain_loop() -> None:
    level, y = problem(wave, (64,), 5), np.random.default_rng(0).standard_normal((1, 64))
    found = Twin().integrate(level, np.arange(6), y)
    assert (level.field.calls, level.field.evaluations) == (20, 40)
    np.testing.assert_allclose(found, np.concatenate(integrate_sequentially(level, 0, 5, [y])), rtol=1e-12)


@pytest.mark.parametrize(
    ("element", "named"),
    [
        (True, "for the state, although"),
        ([False, False, True], "for element (2,) of the state, although"),
        ([[False, False], [True, True]], "for sample 1 (element (1, 0) of the state), although"),
    ],
)
def test_a_field_that_gives_no_number_is_blamed_with_time_and_element(element: Any, named: str) -> None:
    one = problem(lambda t, y: np.where((t >= 0.8) & np.asarray(element), np.nan, 0 * y), np.shape(element), h=0.5)
    states = np.concatenate(integrate_sequentially(one, 0, 4, [np.ones((1, *np.shape(element)))]))
    solution = finished(one, states, Effort(), None)
    assert solution.status is Status.NONFINITE_MODEL
    assert not solution.success
    # the second step goes from 0.5 to 1; its stages are at 0.5, 2/3, 5/6 and 1
    assert solution.message.startswith("f gave NaN or infinity at t = 0.833333 for")
    assert "States up to t = 0.5 are valid" in solution.message
    assert named in solution.message


@pytest.mark.parametrize("method", ["euler", "ab3"])
def test_a_state_that_overflows_is_told_apart(method: str) -> None:
    one = problem(lambda t, y: np.where(t == 0.75, 1.7e308, 0 * y), method=method)
    states = np.full((5, 2), 1.7e308)
    states[4, 1] = np.inf
    solution = finished(one, states, Effort(), None)
    assert solution.status is Status.NONFINITE_SOLVER
    assert solution.message.startswith("In the step from t = 0.75 to 1 element (1,) of the state became NaN")


def test_what_a_record_says() -> None:
    one = problem(lambda t, y: -y)
    integrate_sequentially(one, 0, 4, [np.ones((1, 2))])
    states, effort = np.ones((5, 2)), Effort(rounds=3, windows=2, sequential_steps=1)
    solution = finished(one, states, effort, ParallelIntegrator("secant", 1e-6, None, 40))
    assert (solution.status, solution.success) == (Status.CONVERGED, True)
    assert solution.message == "4 steps with 16 calls and 16 evaluations of the field."
    assert (solution.calls, solution.evaluations, solution.rounds, solution.windows) == (16, 16, 3, 2)
    assert (solution.sequential_steps, solution.linearization, solution.batching) == (1, "secant", "column")
    np.testing.assert_array_equal(solution.t, one.grid.t)
    noted = finished(one, states, replace(effort, note="so it is"), None)
    assert noted.linearization == "sequential"
    nothing = finished(one, states, Effort(), None)
    assert (nothing.rounds, nothing.windows, nothing.sequential_steps) == (0, 0, 0)
    assert "field (1 of 4 steps were made one after another: so it is. The result" in noted.message
    assert noted.message.endswith(").")
    thinned = every(2, solution)
    np.testing.assert_array_equal(thinned.t, [0, 0.5, 1])
    assert len(thinned.states) == 3


@pytest.mark.parametrize(
    ("kind", "status", "said"),
    [(KeyboardInterrupt, Status.INTERRUPTED, "Interrupted"), (ValueError, Status.FAILED, "ValueError")],
)
def test_what_a_record_says_of_a_run_that_was_cut_off(kind: Any, status: Status, said: str) -> None:
    one = problem(lambda t, y: -y)
    effort = Effort(sequential_steps=7, reached=[np.zeros((1, 2)), np.ones((2, 2))])
    found = partial(one, effort, None, kind)
    assert (found.status, found.message, found.sequential_steps) == (status, f"{said} after 2 of 4 steps.", 2)
    np.testing.assert_array_equal(found.t, one.grid.t[:3])
    np.testing.assert_array_equal(found.states, [[0, 0], [1, 1], [1, 1]])
    assert partial(one, effort, ParallelIntegrator("full", 1e-6, None, 40), kind).sequential_steps == 7
