"""What an accepted trajectory is held against: rows called alone, and what rounding and defects may have grown into."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from parasolver_adapters.vector_field.effort import Effort, Samples
from parasolver_adapters.vector_field.field import Field
from parasolver_adapters.vector_field.grid import Grid
from parasolver_adapters.vector_field.methods import METHODS
from parasolver_adapters.vector_field.problem import Problem
from parasolver_adapters.vector_field.verification import doubt, rows_differ, sensitivity

EPS = {dtype: float(np.finfo(dtype).eps) for dtype in (np.float32, np.float64)}


def problem(f: Any, size: int = 1, steps: int = 100, h: float = 0.25, dtype: Any = np.float64) -> Problem:
    grid = Grid(np.arange(steps + 1) * h, np.zeros(size, dtype), 1)
    return Problem(Field(f, np.zeros(size, dtype), "ty", "column"), grid, METHODS["euler"].bind(grid), 0)


def noted(difference: float, row: int, h: float = 1.0, dtype: Any = np.float64) -> Samples:
    """Rows of one window where the field gives 5 and 1 alone, and in one of them that much more among others."""
    t, f = np.arange(3, 7, dtype=dtype), np.tile(np.array([5.0, 1.0], dtype), (4, 1))
    y = np.array([[1.999, 0.5], [2.0, 0.5], [1.999, 0.5], [1.999, 0.5]], dtype)  # first, largest, middle and last
    f[row, 1] += difference
    samples = Samples()
    samples.keep([(t, y, f)], np.full(4, h))
    return samples


def steady(t: Any, y: Any) -> Any:
    return 0 * y + np.array([5, 1], y.dtype)


@pytest.mark.parametrize("row", range(4))
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(
    ("slope", "h", "allowed"),
    [
        (0.0, 0.01, 5000),  # a thousand roundings of what the field gives
        (30.0, 0.01, 6000),  # what it makes of a hundred of the state
        (1e4, 0.01, 20000),  # but no more than a hundred of the state, in a step
        (1e4, 1.0, 5000),
    ],
)
def test_a_row_may_differ_from_a_call_alone_by_rounding(
    row: int, sign: int, dtype: Any, slope: float, h: float, allowed: int
) -> None:
    def field(t: Any, y: Any) -> Any:
        return slope * (y - np.round(y, 3)) + steady(t, y)

    one = problem(field, 2, dtype=dtype)
    assert rows_differ(one, noted(sign * 0.99 * allowed * EPS[dtype], row, h, dtype)) == ""
    said = rows_differ(one, noted(sign * 1.02 * allowed * EPS[dtype], row, h, dtype))
    assert said.startswith(f"f gave something else for t = {3 + row} among other times than alone, by ")
    by, of = said.split("by ")[1].split(":")[0].split(" of ")
    assert float(by) == pytest.approx(1.02 * allowed * EPS[dtype], rel=0.05, abs=0)
    assert float(of) == 5
    assert rows_differ(one, noted(np.nan, row, h, dtype)) != ""


@pytest.mark.parametrize("dtype", EPS)
def test_rounding_of_steps_that_forget_stays_as_it_is(dtype: Any) -> None:
    """A step that ends where its beginning has no say: half a rounding of the larger of its two states."""
    one = problem(lambda t, y: -4 * y, 3, dtype=dtype)
    states = np.ones((101, 3), dtype)
    assert sensitivity(one, states, [np.zeros((0, 1, 3), dtype)]) == pytest.approx(EPS[dtype] / 2, rel=1e-3, abs=0)
    states[40] = 8  # the step to it and the step from it; the scale reaches two nodes back
    assert sensitivity(one, states, [np.zeros((0, 1, 3), dtype)]) == pytest.approx(EPS[dtype] / 2, rel=1e-3, abs=0)
    states[::2] = 8
    assert sensitivity(one, states, [np.zeros((0, 1, 3), dtype)]) == pytest.approx(EPS[dtype] / 2, rel=1e-3, abs=0)
    states[:] = 0
    assert sensitivity(one, states, [np.zeros((0, 1, 3), dtype)]) == 0
    states[:] = 8
    states[40:] = 1
    assert sensitivity(one, states, [np.zeros((0, 1, 3), dtype)]) == pytest.approx(EPS[dtype] / 2, rel=1e-3, abs=0)


def test_rounding_of_steps_that_add_up_walks_at_random() -> None:
    one = problem(lambda t, y: 0 * y, 30)
    found = sensitivity(one, np.ones((101, 30)), [np.zeros((0, 1, 30))])
    assert 10 <= found / (EPS[np.float64] / 2) <= 45  # the largest of thirty sums of a hundred signs


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_defects_that_are_known_grow_with_the_steps_behind_them(rate: float) -> None:
    """Each step multiplies by 1 + rate / 4; what is not known counts as none."""
    one = problem(lambda t, y: rate * y, 2, steps=30)
    factor, defects = 1 + rate / 4, np.zeros((10, 1, 2))
    defects[2, 0, 1], defects[7, 0, 1] = 1e-6, 3e-6
    states = np.ones((31, 2))
    expected = 1e-6 * factor**27 + 3e-6 * factor**22  # to the last node
    pieces = [defects[:4], defects[4:]]
    assert sensitivity(one, states, pieces) == pytest.approx(expected, rel=1e-6)
    scaled = states.copy()
    scaled[:, 0] = 1e-2  # the other element's size
    assert sensitivity(one, scaled, pieces) == pytest.approx(expected, rel=1e-6)
    scaled[:, 0], scaled[:, 1] = 1.0, 1e-2
    assert sensitivity(one, scaled, pieces) == pytest.approx(100 * expected, rel=1e-6)


@pytest.mark.parametrize("left", [0.0, 0.5])
def test_what_a_correction_by_another_jacobian_leaves_is_reckoned(left: float) -> None:
    """Two windows of a growing field, corrected once by sums of their defects: the rest grows through both."""
    rate, factor, effort = 0.4, 1.1, Effort()
    one = problem(lambda t, y: rate * y, 1, steps=30)
    exact = factor ** np.arange(31.0)
    states: list[Any] = [1.0]
    added = np.zeros(31)
    for lo, hi in ((0, 12), (12, 30)):
        guess = states[lo] * (1 + 1e-5 * np.sin(np.arange(hi - lo + 1))) * factor ** np.arange(hi - lo + 1)
        guess[0] = states[lo]
        defects = factor * guess[:-1] - guess[1:]
        correction = np.cumsum(defects)
        effort.note_left(np, defects[:, None, None], correction[:, None, None], left)
        states += list(guess[1:] + correction)
        added[lo + 1 : hi + 1] = left * defects
    guessed = np.zeros(31)
    for n in range(30):
        guessed[n + 1] = factor * guessed[n] + added[n + 1]
    wrong = exact - states + guessed
    expected = np.max(np.abs(wrong[1:]) / states[1:])
    found = sensitivity(one, np.array(states)[:, None], effort.defects, effort.corrections)
    assert expected > 1e-6
    assert found == pytest.approx(expected, rel=1e-4)


def run(size: int = 2, defect: float = 0.0, states: Any = None, **noted_too: Any) -> tuple[Problem, Any, Effort]:
    """Steps that change nothing, with a defect in the last one of a state of ones."""
    one, effort = problem(lambda t, y: 0 * y, size), Effort(windows=1, **noted_too)
    row = (np.zeros(1), np.ones((1, size)), np.zeros((1, size)), 0.25)
    effort.samples.ends = [(row, row, row)]
    effort.defects = [np.zeros((99, 1, size)), np.full((1, 1, size), defect)]
    return one, np.ones((101, size)) if states is None else states, effort


def jumps(size: int, by: float) -> Any:
    states = np.ones((101, size))
    states[100:] -= by  # which leaves the scale as it is
    return states


def test_nothing_is_doubted_where_the_plain_loop_was_made() -> None:
    one, states, effort = run(states=np.full((101, 2), np.nan), sequential_steps=100)
    assert doubt(one, states, effort, 0.0) == ""
    effort.sequential_steps = 99
    assert doubt(one, states, effort, 0.0) == "the trajectory that was found in parallel is not finite"


def test_a_single_number_that_is_not_finite_is_told() -> None:
    one, states, effort = run()
    for value in (np.nan, np.inf):
        states = np.ones((101, 2))
        states[50, 1] = value
        assert doubt(one, states, effort, 0.0) == "the trajectory that was found in parallel is not finite"


def test_rows_that_differ_are_told() -> None:
    one, states, effort = run()
    other = (np.zeros(1), np.ones((1, 2)), np.ones((1, 2)), 0.25)
    effort.samples.extremes = {"highest": (1.0, other)}
    assert doubt(one, states, effort, 0.0).startswith("f gave something else for t = 0")


@pytest.mark.parametrize(
    ("tolerance", "grown", "allowed"),
    [
        (0.0, 1.9e-9, None),
        (0.0, 2.1e-9, "; tolerance=2e-09 allows it"),
        (1e-4, 1.9e-4, None),
        (1e-4, 2.1e-4, "; tolerance=0.0002 allows it"),
        (1e-4, 0.09, "; tolerance=0.09 allows it"),
        (1e-4, 0.11, ""),
    ],
)
@pytest.mark.parametrize("size", [2, 32, 33])
def test_what_rounding_may_have_grown_into_is_held_against_the_tolerance(
    size: int, tolerance: float, grown: float, allowed: str | None
) -> None:
    """Of wide states it is what was noted on the way; of others what the defects come to, guessed and then measured."""
    one, states, effort = run(size, defect=grown, states=jumps(size, grown))
    if size > 32:
        effort.defects = []
        effort.twin.grown = grown
    said = doubt(one, states, effort, tolerance)
    if allowed is None:
        assert said == ""
    else:
        assert said.startswith(f"rounding may grow to {grown:.1g} of the solution")
        assert said.endswith(f"differ by that much{allowed}")


def test_defects_that_were_guessed_too_large_are_measured() -> None:
    one, states, effort = run(defect=1e-3)
    before = one.field.evaluations
    assert doubt(one, states, effort, 0.0) == ""
    measured = one.field.evaluations - before
    one, states, effort = run(defect=1e-3)
    one = problem(lambda t, y: -y / 10, 2)  # 0.975 to the power of n
    states = 0.975 ** np.arange(101)[:, None] * np.ones(2)
    row = (np.zeros(1), np.ones((1, 2)), np.full((1, 2), -0.1), 0.25)
    effort.samples.ends = [(row, row, row)]
    assert doubt(one, states, effort, 0.0) == ""
    one, states, effort = run(defect=1e-12)
    before = one.field.evaluations
    assert doubt(one, states, effort, 0.0) == ""
    assert measured - (one.field.evaluations - before) >= 100  # every step once more
    one, states, effort = run(defect=1e-3, states=jumps(2, 1e-3))
    assert doubt(one, states, effort, 0.0).startswith("rounding may grow to 0.001 of")


def test_single_precision_may_show_more_rounding() -> None:
    for grown, fine in ((1.9e-5, True), (2.1e-5, False)):
        one = problem(lambda t, y: 0 * y, 40, dtype=np.float32)
        effort = Effort(windows=1)
        row = (np.zeros(1, np.float32), np.ones((1, 40), np.float32), np.zeros((1, 40), np.float32), 0.25)
        effort.samples.ends = [(row, row, row)]
        effort.twin.grown = grown
        assert (doubt(one, np.ones((101, 40), np.float32), effort, 0.0) == "") is fine


def test_defects_that_a_correction_has_taken_away_are_not_measured() -> None:
    """Of a field of 0: one of 1e-3 in a step, and a correction of all states behind it by as much."""
    asked = []
    for corrected in (0.0, 1e-3):
        one, states, effort = run()
        effort.defects[0][40] = 1e-3
        effort.corrections = [corrected * (np.arange(100) >= 40)[:, None, None] * np.ones((1, 1, 2))]
        before = one.field.evaluations
        assert doubt(one, states, effort, 0.0) == ""
        asked.append(one.field.evaluations - before)
    assert asked[0] - asked[1] >= 100  # every step once more
