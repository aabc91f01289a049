"""What the host makes of a round's sums: slopes, moves, what is final; held against sums over vectors."""

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest

from parasolver_core import Identity, Recurrence, Secant
from parasolver_core.rounds.acceptance import Acceptance, RelativeMove, RoundView
from parasolver_core.rounds.decisions import Decision, Sums, Windows
from parasolver_core.rounds.remade import known_behind
from parasolver_core.rounds.salvage import fine, within
from parasolver_core.rounds.shared import Shared
from parasolver_core.rounds.slopes import new_slopes
from parasolver_core.samplers.held_form import HeldForm
from tests.core.any_tables import any_table
from tests.core.problems import normal

UNIT, SIZE = 2.0**-52, 4
SIGNAL = np.array([0.1, 0.3, 0.5, 0.7, 0.9, 0.96, 0.97, 0.98, 0.99])


class Said(Acceptance):
    """Takes what it is told to; keeps the views."""

    many: ClassVar[bool] = True

    def __init__(self, count: Any, error: Any = 0.0) -> None:
        self.count, self.error, self.views = count, error, []

    def bounds(self, recurrence: Recurrence) -> np.ndarray:
        return np.arange(1.0, len(recurrence) + 1)

    def accept(self, view: RoundView, tolerance: float) -> Any:
        self.views.append(view)
        return self.count, self.error


class OneByOne(Said):
    """The same, asked sample by sample."""

    def accept(self, view: RoundView, tolerance: float) -> Any:
        self.views.append(view)
        return len(view.move), 0.25 * len(view.move)


def shared(acceptance: Any, tolerance: float = 0.01, linearization: Any = None, table: Any = None) -> Shared:
    table = any_table(9, 2, 2, noisy=False, signal=SIGNAL) if table is None else table
    nothing: Any = None
    return Shared(
        np, np.float64, table, HeldForm(table), nothing, linearization or Secant(), acceptance, "held",
        acceptance.bounds(table), 6, 0, tolerance, False, None,
    )  # fmt: skip


def windows(common: Shared, count: int = 2, eps: float = UNIT, slope: Any = None) -> Windows:
    """Of up to three samples: nodes 0 .. 3, 3 .. 5 and 6 .. 7."""
    made = Windows(common, count, SIZE, eps, slope)
    lo, hi = np.array([0, 3, 6])[:count], np.array([4, 6, 8])[:count]
    made.slide(lo, hi, lo)
    return made


def sums(r: np.ndarray, X: np.ndarray, dX: Any = 0.0, held: Any = np.inf, unit: float = UNIT) -> Sums:
    gram, cross = r @ r.swapaxes(1, 2), np.broadcast_to((dX * r).sum(axis=2), r.shape[:2])
    return Sums(gram, cross, np.linalg.norm(X, axis=2), np.broadcast_to(held, r.shape[:2]), unit)


def moves(form: HeldForm, lo: int, slope: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Of the states, (n, size), by slopes dh/dx, one after another."""
    dX, dH = np.zeros_like(r), np.zeros_like(r)
    for j in range(len(r)):
        for k in range(j):
            dX[j] += form.a[lo + j - 1, k] * dX[j - 1 - k] if k < form.reads[0] else 0.0
            dX[j] += form.b[lo + j - 1, k] * dH[j - 1 - k] if k < form.reads[1] else 0.0
        dH[j] = r[j] + slope[j] * dX[j]
    return dX


def test_where_windows_stand() -> None:
    made = Windows(shared(Said(1)), 2, SIZE, UNIT, None)
    assert (made.lo.tolist(), made.n.tolist(), made.longest, made.begun) == ([0, 0], [1, 1], 1, False)
    assert made.error.tolist() == [0.0, 0.0]
    made.slide(np.array([7, 3]), np.array([9, 7]), np.array([7, 3]))
    assert (made.n.tolist(), made.longest, made.last.tolist()) == ([2, 4], 4, [8, 6])
    assert made.nodes.tolist() == [[7, 8, 8, 8], [3, 4, 5, 6]]  # beyond N the last node
    assert made.inside.tolist() == [[True, True, False, False], [True] * 4]


def test_slopes_to_begin_with() -> None:
    common = shared(Said(1))
    p, q = common.recurrence.held.T
    np.testing.assert_allclose(windows(common).slope_held, [p + q * common.recurrence.slope] * 2, rtol=1e-14)
    own = np.stack([np.full(9, 2.0), np.full(9, 3.0)])
    own[1, 4] = np.nan  # the sampler's first guess in its place
    expected = p + q * np.where(np.isnan(own), common.recurrence.slope, own)
    np.testing.assert_allclose(windows(common, slope=own).slope_held, expected, rtol=1e-14)
    picard = windows(shared(Said(1), linearization=Identity()))
    np.testing.assert_allclose(picard.slope_held, [p + q * common.recurrence.identity_slope] * 2, rtol=1e-14)


def test_before_anything_was_evaluated_nothing_moves() -> None:
    found = windows(shared(Said(1))).nothing()
    assert found.T.tolist() == [[[0.0]], [[0.0]]]
    assert found.slope.tolist() == found.move.tolist() == found.defect.tolist() == [[0.0], [0.0]]
    assert (found.accepted.tolist(), found.sound.tolist(), found.grown) == ([0, 0], [4, 3], False)


def test_what_a_round_finds_and_the_next_one_makes_of_it() -> None:
    """The second knows how far the first has moved each node, so that slopes are measured."""
    accept = Said(np.array([2, 1, 1]), np.array([0.03, 0.02, 0.01]))
    common = shared(accept)
    form, (p, q), made = common.form, common.recurrence.held.T, windows(common, 3)
    slope = np.stack([common.recurrence.slope] * 3)
    usable, dX = np.array([4, 3, 2]), np.ones((3, 4, SIZE))  # of the first round they are not known
    X = 1 + normal((3, 4, SIZE), seed=3) ** 2
    for turn in range(2):
        r = 0.1 * normal((3, 4, SIZE), seed=4 + turn)
        got = made.decide(sums(r, X, dX), usable)
        for row, (lo, n) in enumerate(((0, 4), (3, 3), (6, 2))):
            nodes = slice(lo, lo + n)
            length = np.linalg.norm(X[row, :n], axis=1)
            if turn:
                cross, squares = (dX[row, 1:n] * r[row, 1:n]).sum(axis=1), (dX[row, 1:n] ** 2).sum(axis=1)
                slope[row, lo + 1 : lo + n] += cross / q[lo + 1 : lo + n] / squares
            held_slope = p[nodes] + q[nodes] * slope[row, nodes]
            moved = moves(form, lo, held_slope, r[row, :n])
            relative = np.linalg.norm(moved, axis=1) / length
            np.testing.assert_allclose(got.move[row, :n], relative, rtol=1e-10)
            np.testing.assert_allclose(got.T[row, :n, :n] @ r[row, :n], moved, rtol=1e-9, atol=1e-12)
            # that of the first node, which does not move, tells nothing
            np.testing.assert_allclose(got.slope[row, 1:n], held_slope[1:], rtol=1e-10)
            rms = np.sqrt((r[row, :n] ** 2).mean(axis=1))
            np.testing.assert_allclose(got.defect[row, :n], rms / np.abs(q[nodes]), rtol=1e-12)
            np.testing.assert_allclose(accept.views[turn].size[row, :n], length / SIZE**0.5, rtol=1e-12)
            np.testing.assert_array_equal(accept.views[turn].bound[row, :n], np.arange(lo, lo + n) + 1)
            dX[row, 1:n] = moved[1:]
        assert accept.views[turn].lo.tolist() == [0, 3, 6]
        assert accept.views[turn].rounding == 8 * UNIT
        assert accept.views[turn].move[1, 3] == np.inf  # beyond the window: never settled
        np.testing.assert_array_equal(accept.views[turn].smallness, np.ones((3, 4)))
        assert (got.accepted.tolist(), got.sound.tolist(), got.grown) == ([2, 1, 1], [4, 3, 2], False)
        assert made.error.tolist() == [0.03, 0.02, 0.01]
        assert made.begun
    np.testing.assert_allclose(made.slope_held, p + q * slope, rtol=1e-10)


@pytest.mark.parametrize(("moved", "stays"), [(7.9, True), (8.1, False)])
def test_moves_of_rounding_alone_leave_a_guessed_output_as_it_is(moved: float, stays: bool) -> None:
    """So many units in the last place of the state: a guess of the slope times that would be worth nothing."""
    table = any_table(9, 1, 1, noisy=False, a=np.ones((9, 1)), b=np.ones((9, 1)), held=np.tile([0.5, 2.0], (9, 1)))
    common = shared(Said(np.array([1])), table=table)
    made, X, r = windows(common, 1), np.ones((1, 4, SIZE)), np.zeros((1, 4, SIZE))
    r[0, 0] = moved * UNIT * 2  # half of it moves node 1, as b in terms of what is held is b / q
    got = made.decide(sums(r, X), np.array([4]))
    assert got.move[0, 1] == pytest.approx(moved * UNIT, rel=1e-6, abs=0.0)
    guess = 0.5 + 2 * common.recurrence.slope[1]
    assert got.slope[0, 1] == pytest.approx(0.5 if stays else guess, rel=1e-12)
    # what is no more than rounding tells nothing of the slope in the next round
    made.decide(sums(np.ones((1, 4, SIZE)), X, np.full((1, 4, SIZE), moved * UNIT)), np.array([4]))
    assert (made.slope_held[0, 1] == pytest.approx(guess, rel=1e-9)) == stays


def test_a_slope_that_was_measured_holds_for_moves_of_rounding_too() -> None:
    table = any_table(9, 1, 1, noisy=False, a=np.ones((9, 1)), b=np.ones((9, 1)), held=np.tile([0.5, 2.0], (9, 1)))
    made, X = windows(shared(Said(np.array([1])), table=table), 1), np.ones((1, 4, SIZE))
    first = made.decide(sums(np.ones((1, 4, SIZE)), X), np.array([4]))
    dX = np.ones((1, 4, SIZE)) * first.move[..., None]
    measured = made.decide(sums(1e-20 * np.ones((1, 4, SIZE)), X, 1e19 * dX), np.array([4]))
    assert np.all(measured.move <= UNIT)
    np.testing.assert_array_equal(measured.slope[:, 1:], made.slope_held[:, 1:4])
    assert measured.slope[0, 1] != first.slope[0, 1]


@pytest.mark.parametrize(("steep", "holds"), [(99.0, True), (101.0, False)])
def test_a_slope_that_makes_much_of_rounding_says_nothing(steep: float, holds: bool) -> None:
    """It was left by a jump of a cubic, and made an error of all of the output of a rounding of the state."""
    table = any_table(9, 1, 1, noisy=False, a=np.ones((9, 1)), b=np.ones((9, 1)), held=np.tile([0.5, 2.0], (9, 1)))
    X = np.ones((1, 4, SIZE))

    def measured(held: Any) -> np.ndarray:
        made = windows(shared(Said(np.array([1])), table=table), 1)
        first = made.decide(sums(np.ones((1, 4, SIZE)), X), np.array([4]))
        return made.decide(sums(1e-20 * X, X, 1e19 * X * first.move[..., None], held), np.array([4])).slope

    slopes = measured(np.inf)
    found = measured(np.abs(slopes - 0.5) * np.linalg.norm(X, axis=2) / steep)  # of the output's slope alone
    np.testing.assert_array_equal(found[:, 1:], slopes[:, 1:] if holds else np.full((1, 3), 0.5))


def test_moves_out_of_all_reach_are_not_kept() -> None:
    """Of more than a thousand times the state; whatever the acceptance says, no node from there on is final."""
    table = any_table(9, 1, 1, noisy=False, a=np.ones((9, 1)), b=np.ones((9, 1)), slope=np.zeros(9))
    table = replace(table, held=np.tile([0.0, 1.0], (9, 1)))
    made, X = windows(shared(Said(np.array([4])), table=table), 1), np.ones((1, 4, SIZE))
    r = np.zeros((1, 4, SIZE))
    r[0, 0], r[0, 1], r[0, 2] = 1.0, 998.0, 2.0  # moves of 1, 999 and 1001
    got = made.decide(sums(r, X), np.array([4]))
    np.testing.assert_allclose(got.move, [[0.0, 1.0, 999.0, 1001.0]])
    assert (got.sound.tolist(), got.accepted.tolist(), known_behind(got).tolist()) == ([3], [3], [3])
    np.testing.assert_allclose(made._moved[0, :4], [0.0, 4.0, 4 * 999.0**2, 4 * 1001.0**2])
    r[0, 2] = 1.0
    assert made.decide(sums(r, X), np.array([4])).sound.tolist() == [4]
    assert made.decide(sums(r, X), np.array([2])).sound.tolist() == [2]  # no more has told anything
    r[0, 0] = 2e3
    got = made.decide(sums(r, X), np.array([4]))
    assert (got.sound.tolist(), got.accepted.tolist()) == ([1], [1])


def test_how_many_states_behind_the_first_are_known() -> None:
    nothing = np.zeros((3, 2, 2))
    found = Decision(nothing, nothing[0], nothing[0], nothing[0], np.array([2, 1, 0]), np.array([2, 4, 1]))
    assert known_behind(found).tolist() == [2, 3, 0]
    assert not found.grown


def test_an_acceptance_that_takes_one_sample_is_asked_for_each() -> None:
    accept = OneByOne(0)
    made = windows(shared(accept))
    X, r = np.ones((2, 4, SIZE)), 0.01 * normal((2, 4, SIZE))
    got = made.decide(sums(r, X), np.array([4, 2]))
    assert [(view.lo, len(view.move)) for view in accept.views] == [(0, 4), (3, 2)]
    for row, view in enumerate(accept.views):
        np.testing.assert_array_equal(view.move, got.move[row, : len(view.move)])
        np.testing.assert_array_equal(view.size, np.ones(len(view.move)))
        np.testing.assert_array_equal(view.bound, np.arange(view.lo + 1, view.lo + 1 + len(view.move)))
        assert (view.rounding, np.shape(view.smallness)) == (8 * UNIT, (len(view.move),))
    assert got.accepted.tolist() == [4, 2]
    assert made.error.tolist() == [1.0, 0.5]
    assert (OneByOne.many, Said.many, RelativeMove.many) == (False, True, True)


def test_the_estimate_is_the_largest_so_far_and_at_least_rounding() -> None:
    accept = Said(np.array([0, 1]), np.array([0.0, 0.5]))
    made, X, r = windows(shared(accept)), np.ones((2, 4, SIZE)), np.zeros((2, 4, SIZE))
    assert made.decide(sums(r, X, unit=1e-7), np.array([4, 3])).accepted.tolist() == [1, 1]  # the first is always
    assert made.error.tolist() == [1e-7, 0.5]
    accept.error = np.array([np.nan, 0.25])
    made.decide(sums(r, X, unit=1e-7), np.array([4, 3]))
    assert made.error.tolist() == [1e-7, 0.5]


def test_small_data_make_states_count_for_less() -> None:
    accept = Said(np.array([1]))
    common = shared(accept)
    made = Windows(common, 1, SIZE, UNIT, None)
    made.slide(np.array([5]), np.array([9]), np.array([5]))
    X, r = np.ones((1, 4, SIZE)), np.zeros((1, 4, SIZE))
    X[0, 3] = 0.01
    made.decide(sums(r, X, held=[9, 9, 9, 2e-3]), np.array([4]))
    expected = common.small_data.smallness(8, 1e-6, 1e-4)[5:]
    assert np.all(expected < 0.2)
    np.testing.assert_allclose(accept.views[0].smallness[0], expected, rtol=1e-12)
    both = windows(common)
    both.slide(np.array([5, 0]), np.array([9, 3]), np.array([5, 0]))
    X = np.concatenate([X, X])
    both.decide(sums(np.zeros_like(X), X, held=[9, 9, 2e-3, 2e-3]), np.array([4, 3]))
    np.testing.assert_allclose(accept.views[1].smallness, [expected, np.ones(4)], rtol=1e-12)


def once_large(size: float, accepted: int, tolerance: float = 0.0, kept: bool = True) -> tuple[Decision, Windows]:
    """Node 2 was moved from so many times the size that it then has, 0.001."""
    table = any_table(9, 1, 1, noisy=False, a=np.ones((9, 1)), b=np.ones((9, 1)), slope=np.zeros(9))
    table = replace(table, held=np.tile([0.0, 1.0], (9, 1)))
    made = windows(shared(Said(np.array([accepted])), tolerance, table=table), 1, eps=1e-3)
    X, r = np.ones((1, 4, SIZE)), np.zeros((1, 4, SIZE))
    X[0, 2], r[0, 1] = size, 1 - size
    X[0, 3] = size if kept else 1e-9
    return made.decide(sums(1e-3 * r, 1e-3 * X), np.array([4])), made


def test_states_that_were_much_larger_are_made_again() -> None:
    """A state keeps the rounding of the largest that it ever was; it may now be as small as size less move."""
    found, made = once_large(1.5, 4)
    assert not found.grown  # 1.5 moved by 0.5, so 1 at least, and 1.5 + 0.5 at most
    assert made.error.tolist() == [UNIT]
    found, made = once_large(3.0, 4)
    assert found.grown  # 5 to 1
    assert made.error.tolist() == [UNIT]  # made again, it holds none of that
    assert not once_large(3.0, 4, tolerance=100.0)[0].grown  # a ten-thousandth of the tolerance, in units of 1e-3: 10
    assert once_large(3.0, 4, tolerance=40.0)[0].grown
    assert not once_large(3.0, 2, tolerance=1e4, kept=False)[0].grown


def test_states_that_are_made_again_are_those_behind_the_first_node() -> None:
    made, X, r = windows(shared(Said(np.array([1])), 0.0), 1), np.ones((1, 2, SIZE)), np.zeros((1, 2, SIZE))
    made.slide(np.array([0]), np.array([2]), np.array([1]))
    made.sizes.largest[0, 0] = 9.0
    assert not made.decide(sums(r, X), np.array([2])).grown
    made.sizes.largest[0, 1] = 9.0
    assert made.decide(sums(r, X), np.array([2])).grown
    zero = windows(shared(Said(np.array([1])), 0.0), 1)
    assert not zero.decide(sums(np.zeros((1, 4, SIZE)), np.zeros((1, 4, SIZE))), np.array([4])).grown


def test_final_states_that_are_not_made_again_are_told_of_as_less_exact() -> None:
    found, made = once_large(9.0, 3, tolerance=1e4)
    assert not found.grown
    assert made.error.tolist() == [UNIT]  # 17 beside 17, as large as it may be after this round
    X, r = np.ones((1, 4, SIZE)), np.zeros((1, 4, SIZE))
    made.decide(sums(r, 1e-3 * X), np.array([4]))
    assert made.error[0] == pytest.approx(1e-3 * 17)  # now it is known to be of size 0.001
    rest = windows(shared(Said(np.array([2])), 1e4), 1, eps=1e-3)
    rest.sizes.largest[0, 2] = 100.0
    rest.decide(sums(r, X), np.array([4]))
    assert rest.error.tolist() == [UNIT]  # it is not final yet


def test_new_nodes_were_never_large() -> None:
    made = windows(shared(Said(np.array([1]))), 1)
    made.sizes.least[:], made.sizes.largest[:] = 1.0, 2.0
    made.slide(np.array([2]), np.array([6]), np.array([3]))
    assert made.sizes.largest[0, :9].tolist() == [2, 2, 2, 2, 0, 0, 2, 2, 2]
    assert made.sizes.least[0, :9].tolist() == [1, 1, 1, 1, 0, 0, 1, 1, 1]


def test_samples_that_go_on_keep_what_is_known_of_them() -> None:
    made = windows(shared(Said(np.array([2, 1]), np.array([0.5, 0.25]))))
    r, X = 0.1 * normal((2, 4, SIZE)), np.ones((2, 4, SIZE))
    made.decide(sums(r, X), np.array([4, 3]))
    slopes, moved = made.slope_held.copy(), made._moved.copy()
    made.stay(np.array([1]))
    assert (made.lo.tolist(), made.n.tolist(), made.longest, made.error.tolist()) == ([3], [3], 4, [0.25])
    np.testing.assert_array_equal(made.slope_held, slopes[1:])
    np.testing.assert_array_equal(made._moved, moved[1:])
    made.decide(sums(r[1:], X[1:], 0.1 * X[1:]), np.array([3]))
    assert not np.array_equal(made.slope_held, slopes[1:])


def test_what_is_out_of_range_is_left_out() -> None:
    gram = np.array([[[4.0, np.inf], [np.inf, 9.0]], [[1.0, 2.0], [2.0, np.nan]]])
    cross, length = np.array([[1.0, np.nan], [3.0, 4.0]]), np.array([[1.0, 2.0], [np.inf, 4.0]])
    found = Sums(gram, cross, length, np.array([[5.0, 6.0], [7.0, 8.0]]), UNIT)
    assert found.finite
    np.testing.assert_array_equal(found.defects, [[4, 9], [1, np.nan]])
    assert fine(found).tolist() == [[True, False], [False, False]]
    rest = within(found, np.array([[True, True], [True, False]]))
    assert rest.gram.tolist() == [[[4, 0], [0, 9]], [[1, 0], [0, 0]]]
    assert rest.cross.tolist() == [[1, 0], [3, 0]]
    assert rest.length.tolist() == [[1, 2], [1, 1]]
    assert (rest.held.tolist(), rest.unit, rest.finite) == ([[5.0, 6.0], [7.0, 8.0]], UNIT, False)


@pytest.mark.parametrize("share", [1.0, 0.01])
@pytest.mark.parametrize(("left", "slope"), [(7.0, 0.0), (9.0, None)])
def test_what_rounding_leaves_of_a_slope_that_cancels_is_none(left: float, slope: float | None, share: float) -> None:
    """The inputs' own rounding is the more of a move, the less of an input that is."""
    common, left = shared(Said(1)), left / share
    old, moved = np.array([-4.0, 2.0, 3.0]), np.array([2.0, 0.0, 1.0])
    cross = np.array([2 * (4.0 - 4 * left * UNIT), 5.0, np.inf])
    new = new_slopes(common, old, moved, cross, np.array([2.0, 2.0, 1.0]) / share**2, UNIT)
    assert new[0] == pytest.approx(-4 * left * UNIT if slope is None else slope, rel=0.1, abs=0.0)
    assert new[1:].tolist() == [2.0, 3.0]  # none is found there


def test_slopes_of_two_evaluations() -> None:
    """``dm/dx`` along the last move; Picard's stay as they are."""
    slope, moved, cross = np.array([1.0, 2.0, 3.0]), np.array([4.0, 0.0, 0.5]), np.array([2.0, 9.0, -1.0])
    assert Secant().update(slope, moved, cross).tolist() == [1.5, 2.0, 1.0]
    assert Identity().update(slope, moved, cross) is slope
    table = any_table(3)
    for linearization, guess in ((Secant(), table.slope), (Identity(), table.identity_slope)):
        first = linearization.initial(table)
        np.testing.assert_array_equal(first, guess)
        assert not np.shares_memory(first, guess)
