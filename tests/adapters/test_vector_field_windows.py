"""How windows follow each other, and when corrections of one end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from parasolver_adapters.vector_field.effort import Effort
from parasolver_adapters.vector_field.field import Field
from parasolver_adapters.vector_field.grid import Grid
from parasolver_adapters.vector_field.jacobian import FieldJacobian
from parasolver_adapters.vector_field.methods import METHODS
from parasolver_adapters.vector_field.newton import ParallelIntegrator, basin, hermite, level_nodes, settled
from parasolver_adapters.vector_field.problem import Problem, integrate_sequentially
from parasolver_adapters.vector_field.surrogate import IdentitySurrogate, SecantSurrogate


def problem(
    f: Callable[..., Any] = lambda t, y: -y, steps: int = 1000, size: int = 1, end: float = 1.0, method: str = "euler"
) -> Problem:
    grid = Grid(np.linspace(0, end, steps + 1), np.zeros(size), 1)
    return Problem(Field(f, np.zeros(size), "ty", "column"), grid, METHODS[method].bind(grid), 0)


@pytest.mark.parametrize(
    ("size", "before", "tolerance", "near", "expected"),
    [
        (1.0e-9, np.inf, 1e-9, 1.0, True),  # nothing known: as much is to come as the last one was
        (1.1e-9, np.inf, 1e-9, 1.0, False),
        (1.0e-9, 0.0, 1e-9, 1.0, True),
        (1.1e-9, 0.0, 1e-9, 1.0, False),
        (9e-9, 9e-8, 1.01e-9, 1.0, True),  # a tenth each time: a ninth of the last one is to come
        (9e-9, 9e-8, 0.99e-9, 1.0, False),
        (5e-9, 1e-8, 5.1e-9, 1.0, True),
        (5e-9, 1e-8, 4.9e-9, 1.0, False),
        (0.89, 1.0, 10.0, 0.0, True),
        (0.91, 1.0, 100.0, 0.0, False),  # hardly any progress says nothing
        (2.0, 1.0, 100.0, 0.0, False),
        (1e-3, 1.0, 1e-5, 2e-3, True),
        (1e-3, 1.0, 1e-5, 9e-4, False),  # outside of the basin
        (1e-3, 1.0, 2e-3, 0.0, True),  # which is as wide as the tolerance at least
        (0.0, 1e-3, 0.0, 0.0, True),
    ],
)
def test_what_is_to_come_of_corrections(
    size: float, before: float, tolerance: float, near: float, expected: bool
) -> None:
    assert settled(size, before, tolerance, near) is expected


def test_the_basin_is_of_the_dtype() -> None:
    assert basin(np, np.dtype(np.float64)) == pytest.approx(1.11e-11, rel=0.01, abs=0)
    assert basin(np, np.dtype(np.float32)) == pytest.approx(1.42e-5, rel=0.01, abs=0)


@pytest.mark.parametrize(
    ("steps", "coarse_steps", "counts"),
    [
        (1, 40, [1, 1]),
        (7, 40, [1, 7]),
        (64, 40, [8, 64]),  # an eighth at most
        (320, 40, [40, 320]),
        (1000, 40, [40, 1000]),  # 25 for one
        (1001, 40, [40, 200, 1001]),
        (25000, 40, [40, 1000, 25000]),
        (40000, 10, [10, 159, 2520, 40000]),
    ],
)
@pytest.mark.parametrize("lo", [0, 13])
def test_levels_refine_by_equal_ratios(lo: int, steps: int, coarse_steps: int, counts: list[int]) -> None:
    levels = level_nodes(lo, lo + steps, coarse_steps)
    assert [len(nodes) - 1 for nodes in levels] == counts
    for nodes in levels:
        assert (nodes[0], nodes[-1]) == (lo, lo + steps)
        gaps = np.diff(nodes)
        assert gaps.min() >= 1
        assert gaps.max() - gaps.min() <= 1


def test_interpolation_between_nodes_is_exact_for_cubics() -> None:
    t = np.array([-1.0, -0.8, -0.5, 0.0, 0.1, 0.7, 1.0, 1.6])
    cubic = np.poly1d([1.0, -2.0, 0.5, 3.0])
    grid = Grid(t, np.zeros(2), 1)
    field = Field(lambda t, y: np.polyval(np.polyder(cubic), t) + 0 * y, np.zeros(2), "ty", "column")
    whole = Problem(field, grid, METHODS["rk4"], 0)
    nodes, finer = np.array([1, 3, 6]), np.array([1, 2, 3, 4, 5, 6])
    states = cubic(t[nodes])[:, None] * np.ones(2)
    found = hermite(whole.coarse(nodes), nodes, states, finer, grid)
    np.testing.assert_allclose(found, cubic(t[finer])[:, None] * np.ones(2), rtol=1e-14)


def test_interpolation_is_between_the_nodes_on_both_sides() -> None:
    """In the middle of two: the mean, and an eighth of what the slopes differ by."""
    t, y, slope = np.arange(7) * 0.5, np.array([1.0, -2.0, 5.0]), np.array([0.3, 7.0, -1.0])
    grid, nodes = Grid(t, np.zeros(1), 1), np.array([0, 2, 6])
    field = Field(lambda t, y: np.interp(t, [0.0, 1.0, 3.0], slope) + 0 * y, np.zeros(1), "ty", "column")
    coarse = Problem(field, grid, METHODS["rk4"], 0).coarse(nodes)
    found = hermite(coarse, nodes, y[:, None], np.array([0, 1, 2, 4, 6]), grid)
    left = (1 - 2) / 2 + 1.0 * (0.3 - 7.0) / 8
    right = (-2 + 5) / 2 + 2.0 * (7.0 + 1.0) / 8
    np.testing.assert_allclose(found[:, 0], [1, left, -2, right, 5], rtol=1e-14)


def integrator(linearization: Any = "full", window: int | None = None, tolerance: float = 1e-12) -> ParallelIntegrator:
    return ParallelIntegrator(linearization, tolerance, window, 40)


def test_elements_are_told_apart_where_each_has_its_own_slope() -> None:
    one, states = problem(size=2, steps=60), np.array([[1.0, -4.0], [-3.0, 2.0], [0.5, 1.0]])
    for linearization, expected in [
        ("full", [[1, 4], [3, 4], [3, 2]]),
        ("diagonal", [[1, 4], [3, 4], [3, 2]]),
        ("secant", [[4, 4], [4, 4], [3, 3]]),
        ("identity", [[4, 4], [4, 4], [3, 3]]),
    ]:
        scale = integrator(linearization).scale(one, states)
        np.testing.assert_array_equal(scale, np.array(expected)[:, None, :])
    kinds = {"full": FieldJacobian, "diagonal": FieldJacobian, "secant": SecantSurrogate, "identity": IdentitySurrogate}
    for linearization, kind in kinds.items():
        surrogate: Any = integrator(linearization).surrogate(one, 3, 50)
        assert type(surrogate) is kind
        if kind is FieldJacobian:
            assert (surrogate.lo, surrogate.hi, surrogate.dense) == (3, 50, linearization == "full")


@dataclass(frozen=True)
class Scripted(ParallelIntegrator):
    """Windows that end as they are told to: how many steps were found, and the calls that this took."""

    script: list[tuple[float, int]] = field(default_factory=list)
    seen: list[tuple[int, int]] = field(default_factory=list)

    def _window(self, problem: Any, lo: int, hi: int, states: Any, effort: Any) -> Any:
        self.seen.append((lo, hi))
        share, calls = self.script[len(self.seen) - 1] if len(self.seen) <= len(self.script) else (1, 0)
        problem.field.calls += calls
        return np.full((int(share * (hi - lo)), problem.size), 5.0), share == 1


def scripted(
    script: list[tuple[float, int]], window: int | None = None, steps: int = 1000, size: int = 1
) -> tuple[list[tuple[int, int]], Effort, Any]:
    runner = Scripted("full", 1e-12, window, 40, script)
    effort = Effort(reached=[np.ones((1, size))])
    states = runner.integrate(problem(steps=steps, size=size), effort)
    assert states.shape == (steps + 1, size)
    return runner.seen, effort, states


@pytest.mark.parametrize(
    ("window", "script", "seen"),
    [
        (None, [], [(0, 1000)]),
        (5000, [], [(0, 1000)]),
        (300, [], [(0, 300), (300, 600), (600, 900), (900, 1000)]),
        # a quarter after a failure, then up to half of what failed
        (None, [(0, 0)], [(0, 1000), (0, 250), (250, 750), (750, 1000)]),
        (None, [(0.1, 0)], [(0, 1000), (100, 350), (350, 850), (850, 1000)]),
        (400, [(1, 0), (0, 0)], [(0, 400), (400, 800), (400, 500), (500, 700), (700, 900), (900, 1000)]),
    ],
)
def test_windows_shrink_where_they_fail_and_grow_again(window: Any, script: Any, seen: Any) -> None:
    found, effort, _ = scripted(script, window)
    assert found == seen
    assert effort.windows == len(seen) - sum(share == 0 for share, _ in script)
    assert (effort.sequential_steps, effort.note) == (0, "")


def test_a_rest_that_is_too_short_is_made_step_by_step() -> None:
    found, effort, states = scripted([], 100, steps=163)
    assert found == [(0, 100)]
    assert (effort.windows, effort.sequential_steps, effort.note) == (1, 63, "")
    np.testing.assert_allclose(states[100:, 0], 5.0 * (1 - 1 / 163) ** np.arange(64), rtol=1e-12)
    found, effort, _ = scripted([], 100, steps=164)
    assert found == [(0, 100), (100, 164)]


def test_a_short_rest_behind_windows_that_shrank_is_a_rest() -> None:
    found, effort, _ = scripted([(0.2, 0)], steps=700)
    assert found == [(0, 700), (140, 315), (315, 665)]
    assert (effort.sequential_steps, effort.note) == (35, "")
    assert scripted([(0, 0)], steps=1003)[0] == [(0, 1003), (0, 250), (250, 751), (751, 1003)]
    assert scripted([], 60)[1].note == ""  # as short as they were asked for


def test_windows_that_are_too_short_to_pay_are_told() -> None:
    found, effort, states = scripted([(0, 0), (0, 0)], steps=256)
    assert found == [(0, 256), (0, 64)]
    assert (effort.windows, effort.sequential_steps) == (0, 256)
    assert effort.note == "Newton's method converged in windows of fewer than 64 steps only"
    np.testing.assert_allclose(states[:, 0], (1 - 1 / 256) ** np.arange(257), rtol=1e-12)
    assert scripted([(0.5, 0), (0, 0)], steps=300)[1].sequential_steps == 150


def test_no_more_than_a_part_of_the_plain_loops_cost_goes_into_windows_that_fail() -> None:
    """Eight in a hundred of a thousand calls."""
    for calls, ends in ((80, False), (81, True)):
        found, effort, _ = scripted([(1, 900), (0, calls)], window=400)
        assert found[:2] == [(0, 400), (400, 800)]
        assert (len(found) == 2) is ends
        note = "Newton's method left its basin, and trying shorter windows would not pay" if ends else ""
        assert effort.note == note
        assert effort.sequential_steps == (600 if ends else 0)
    assert len(scripted([(0, 165), (0, 165)], steps=4000)[0]) == 2  # together
    assert len(scripted([(0, 155), (0, 155)], steps=4000)[0]) > 2


def test_a_wide_state_that_was_found_is_kept() -> None:
    _, effort, states = scripted([], size=33)
    assert (effort.sequential_steps, effort.windows) == (0, 1)
    np.testing.assert_array_equal(states[1:], 5.0)


@pytest.mark.parametrize(("size", "kept"), [(32, 400), (33, 0)])
def test_a_wide_state_is_found_in_windows_altogether_or_not_at_all(size: int, kept: int) -> None:
    _, effort, states = scripted([(1, 0), (0, 900)], window=400, size=size)
    assert effort.sequential_steps == 1000 - kept
    np.testing.assert_array_equal(states[1 : kept + 1], 5.0)
    start = 5.0 if kept else 1.0
    np.testing.assert_allclose(states[kept:, 0], start * 0.999 ** np.arange(1001 - kept), rtol=1e-12)


def corrected(
    one: Problem, guess: Any, linearization: Any = "full", tolerance: float = 0.0, own: float = 1e-12
) -> tuple[Any, int, Effort]:
    effort, n = Effort(), len(one.grid)
    y, accepted = integrator(linearization, tolerance=own)._correct(one, 0, n, guess, None, effort, tolerance)
    return y, accepted, effort


def exact(one: Problem) -> Any:
    return np.concatenate(integrate_sequentially(one, 0, len(one.grid), [np.ones((1, one.size))]))


def test_a_trajectory_that_is_right_is_left_after_one_look() -> None:
    one = problem(lambda t, y: -np.sin(y), 200, 2)
    states = exact(one)
    one.field.calls = one.field.evaluations = 0
    y, accepted, effort = corrected(one, states)
    assert (accepted, effort.rounds) == (200, 1)
    np.testing.assert_allclose(y, states, rtol=1e-13)
    assert [len(defects) for defects in effort.defects] == [200]
    assert len(effort.samples.ends) == 1
    assert np.max(np.abs(effort.defects[0])) < 1e-14


def test_a_tolerance_of_nothing_accepts_what_does_not_move() -> None:
    one = problem(lambda t, y: -np.sin(y), 200)
    y, accepted, _ = corrected(one, exact(one), own=0.0)
    assert accepted == 200
    np.testing.assert_allclose(y, exact(one), rtol=1e-13)


def test_rounding_of_the_field_ends_the_search() -> None:
    """Hundreds of roundings in each step, which no correction takes away."""
    one = problem(lambda t, y: 1e5 - (y + 1e5), 200)
    states = exact(one)
    guess = np.where(np.arange(201)[:, None] > 0, 1.01 * states, states)
    y, accepted, effort = corrected(one, guess)
    assert accepted == 200
    assert effort.rounds <= 6
    assert np.max(np.abs(effort.defects[0])) < 1e-12
    np.testing.assert_allclose(y, states, rtol=1e-9)


def test_newtons_method_squares_what_is_wrong() -> None:
    one = problem(lambda t, y: -(y**2), 200, 1, end=2.0, method="rk4")
    states = exact(one)
    y, accepted, effort = corrected(one, np.where(np.arange(201)[:, None] > 0, 1.1 * states, states))
    assert accepted == 200
    assert 3 <= effort.rounds <= 5
    np.testing.assert_allclose(y, states, rtol=1e-12)


@pytest.mark.parametrize("tolerance", [1e-3, 0.0])
def test_coarse_levels_are_done_when_corrections_promise_to_be(tolerance: float) -> None:
    """And leave nothing noted for the checks behind the finest."""
    one = problem(lambda t, y: -(y**2), 200, 1, end=2.0)
    states = exact(one)
    y, accepted, effort = corrected(
        one, np.where(np.arange(201)[:, None] > 0, 1.02 * states, states), "full", tolerance
    )
    assert accepted == 200
    assert np.max(np.abs(y - states)) < (1e-3 if tolerance else 1e-12)
    assert (effort.rounds < 3) is (tolerance > 0)
    assert (len(effort.defects), len(effort.samples.ends)) == ((0, 0) if tolerance else (1, 1))


def test_what_overflows_is_given_back_as_it_came() -> None:
    one = problem(lambda t, y: np.where(y > 2, np.nan, y), 100)
    guess = np.full((101, 1), 3.0)
    y, accepted, effort = corrected(one, guess, "identity")
    assert y is guess
    assert (accepted, effort.rounds, effort.defects) == (0, 1, [])


def test_no_level_has_more_than_forty_rounds() -> None:
    """Picard's iteration of a stiff field, which makes one step right in each."""
    one = problem(lambda t, y: -150 * (y - np.cos(t)), 400)
    y, accepted, effort = corrected(one, np.where(np.arange(401)[:, None], 2.0, 1.0), "identity")
    assert effort.rounds == 40
    assert 39 <= accepted < 60
    assert [len(defects) for defects in effort.defects] == [accepted]
    np.testing.assert_allclose(y[:40], exact(one)[:40], rtol=1e-11)


def test_half_of_the_plain_loops_cost_is_the_most_for_a_level() -> None:
    """What has converged until then, from the beginning on, is accepted."""
    one = problem(lambda t, y: -3 * y * (1 + np.cos(9 * t)), 40)
    states = exact(one)
    one.field.row_cost = 1.0 / 40  # a round is two calls; forty for the plain loop and half a row each
    one.field.calls = one.field.evaluations = 0
    y, accepted, effort = corrected(one, np.ones((41, 1)), "identity", own=1e-9)
    assert effort.rounds == 11  # 22 is more than (1 + 1 / 40) 40 / 2
    assert 5 < accepted < 40
    np.testing.assert_allclose(y[: accepted + 1], states[: accepted + 1], rtol=1e-9)
    assert [len(defects) for defects in effort.defects] == [accepted]


def test_a_coarse_start_that_runs_away_is_no_window() -> None:
    one = problem(lambda t, y: y**3 * 1e4, 200)
    with np.errstate(all="ignore"):
        found, whole = integrator()._window(one, 0, 200, [np.full((1, 1), 10.0)], Effort())
    assert found.shape == (0, 1)
    assert not whole
    assert one.field.calls == 100  # four stages of 25 coarse steps, and no more


@pytest.mark.parametrize("size", [2, 32, 33])
@pytest.mark.parametrize("linearization", ["full", "secant"])
def test_a_window_is_found_whole(size: int, linearization: Any) -> None:
    """How rounding grows is noted on the way of wide states."""
    one, effort = problem(lambda t, y: -np.sin(y), 1500, size), Effort()
    states = exact(one)
    found, whole = integrator(linearization)._window(one, 100, 1500, [states[:50], states[50:101]], effort)
    assert whole
    np.testing.assert_allclose(found, states[101:], rtol=1e-11)
    assert (effort.twin.grown > 0) == (size == 33)
    assert len(effort.samples.ends) == 1
    assert effort.rounds >= 3  # of the middle level too


def test_a_window_that_a_coarse_level_does_not_find_is_none() -> None:
    one = problem(lambda t, y: -150 * (y - np.cos(9 * t)), 1500, end=10.0)
    found, whole = integrator("identity")._window(one, 0, 1500, [np.zeros((1, 1))], Effort())
    assert (found.shape, whole) == ((0, 1), False)


def test_steps_rest_where_they_miss_their_nodes_by_rounding() -> None:
    one = problem(lambda t, y: -np.sin(y), 400, 2)
    states, scale = exact(one), np.ones((400, 1, 2))
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=states.shape)
    for roundings, rests in ((0.0, True), (100.0, True), (1e4, False)):
        y = states * (1 + roundings * np.finfo(np.float64).eps * signs)
        ends, _ = one.method.advance(one.field, one.grid, 0, 400, y[:-1])
        assert integrator()._rests(one, 0, 400, y, ends, None, scale) is rests


@pytest.mark.parametrize(("coupling", "rests"), [(0.0, False), (400.0, True)])
def test_small_elements_rest_where_a_step_makes_that_much_of_rounding_in_others(coupling: float, rests: bool) -> None:
    """A step makes of one rounding in the large element one of its size in the small one, or nothing."""

    def field(t: Any, y: Any) -> Any:
        return np.stack([0 * y[..., 0], coupling * (y[..., 0] - 1)], axis=-1)

    one = problem(field, 400, 2)
    y = np.ones((401, 2))
    y[:, 1] = 1e-6 + 50 * np.finfo(np.float64).eps * np.where(np.arange(401) % 2, 1, -1)
    ends, _ = one.method.advance(one.field, one.grid, 0, 400, y[:-1])
    scale = np.array([[1.0, 1e-6]]) * np.ones((400, 1, 1))
    assert integrator()._rests(one, 0, 400, y, ends, None, scale) is rests
