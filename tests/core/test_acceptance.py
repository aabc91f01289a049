"""What is final, number by number: leading nodes, limits, margins."""

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest

from parasolver_core import DDIM, NoiseSchedule
from parasolver_core.rounds.acceptance import (
    Acceptance,
    RelativeMove,
    RoundView,
    leading,
    shares,
)
from parasolver_core.rounds.margins import Margins
from parasolver_core.rounds.step_variance import StepVariance
from tests.core.any_tables import any_table

SIGNAL = np.array([0.1, 0.5, 0.8])


@pytest.mark.parametrize(
    ("flags", "count"),
    [([True, True, False, True], 2), ([False, True], 0), ([True, True, True], 3), ([True], 1), ([False], 0)],
)
def test_how_many_leading_flags_hold(flags: list[bool], count: int) -> None:
    assert leading(np.array(flags)) == count
    assert leading(np.array([flags, [True] * len(flags), [False] * len(flags)])).tolist() == [count, len(flags), 0]


def test_shares_of_nothing() -> None:
    got = shares(np.array([0.0, 0.0, 3.0, 3.0, np.inf]), np.array([0.0, 2.0, 2.0, 0.0, 1.0]))
    assert got.tolist() == [0.0, 0.0, 1.5, np.inf, np.inf]


def view(move: Any, size: Any = 1.0, bound: Any = 1.0, rounding: float = 1e-12, lo: Any = 3) -> RoundView:
    ones = np.ones(np.shape(move))
    return RoundView(lo, np.array(move), size * ones, bound * ones, rounding)


def test_leading_nodes_within_the_tolerance() -> None:
    """A limit is within; moves of rounding are, whatever their effect; the first node always is."""
    told = view([0.5, 0.2, 1e-12, 0.2, 0.3])
    effect = np.array([9.0, 0.2, 5.0, 0.1, 0.4])
    assert told.leading(effect, 0.2) == (4, 9.0)
    assert told.leading(effect, 0.19) == (1, 9.0)
    assert told.leading(effect, 0.4) == (5, 9.0)
    assert view([0.0, 0.1, 0.2]).leading(np.array([0.0, 0.1, 0.05]), 0.2) == (3, 0.1)
    many = view([[0.0, 0.1, 0.2], [0.0, 0.1, 0.2]], lo=np.array([3, 4]))
    count, largest = many.leading(np.array([[0.0, 0.3, 0.1], [0.0, 0.1, 0.3]]), 0.2)
    assert (count.tolist(), largest.tolist()) == ([1, 2], [0.0, 0.1])


def test_one_of_many_samples() -> None:
    values = np.arange(6.0).reshape(2, 3)
    whole = RoundView(np.array([5, 7]), values, values + 1, values + 2, 0.5, values + 3)
    one = whole.of(1, 2)
    assert (one.lo, one.rounding) == (7, 0.5)
    for got, first in ((one.move, 3), (one.size, 4), (one.bound, 5), (one.smallness, 6)):
        assert np.asarray(got).tolist() == [first, first + 1]
    assert view([0.0]).smallness == 1.0


def test_what_an_acceptance_does_unless_it_says_otherwise() -> None:
    class First(Acceptance):
        def accept(self, view: RoundView, tolerance: float) -> tuple[int, float]:
            return 1, 0.0

    class Many(First):
        many: ClassVar[bool] = True

        def accept(self, view: RoundView, tolerance: float) -> Any:
            return np.ones(2), np.zeros(2)

    class Renamed(Many):
        pass

    class Again(Many):
        def accept(self, view: RoundView, tolerance: float) -> Any:
            return 1, 0.0

    assert [one.many for one in (Acceptance, First, Many, Renamed, Again)] == [False, False, True, True, False]
    table = any_table(4)
    assert First().bounds(table).tolist() == [1.0] * 4
    assert First().spread_tolerance(table, 0.07) == 0.07


def test_margins_grow_together_but_for_where_they_fall() -> None:
    margins = Margins(factor=0.1, noisy_factor=0.2, loosest=0.3, spread=0.4, noisy_spread=0.5)
    grown = margins.times(2.0)
    assert grown == Margins(factor=0.2, noisy_factor=0.4, loosest=0.3, spread=0.8, noisy_spread=1.0)
    for name in ("factor", "noisy_factor", "loosest", "spread", "noisy_spread"):
        for wrong in (0.0, -1.0, float("inf")):
            with pytest.raises(ValueError, match=f"^{name}: expected a finite number above 0"):
                replace(margins, **{name: wrong})
        assert getattr(replace(margins, **{name: 1e-9}), name) == 1e-9


def test_margins_are_those_of_the_noise() -> None:
    accept = RelativeMove(Margins(factor=0.1, noisy_factor=0.2, loosest=0.03, spread=3.0, noisy_spread=0.5))
    plain, noisy = (any_table(3, noisy=noisy, signal=SIGNAL) for noisy in (False, True))
    np.testing.assert_allclose(accept.bounds(plain), 0.1 * SIGNAL**0.5, rtol=1e-14)
    np.testing.assert_allclose(accept.bounds(noisy), 0.2 * SIGNAL**0.5, rtol=1e-14)
    assert accept.spread_tolerance(plain, 0.1) == pytest.approx(0.3)
    assert accept.spread_tolerance(noisy, 0.1) == pytest.approx(0.05)


def test_the_default_rule_takes_many_samples_at_once() -> None:
    accept = RelativeMove(Margins(loosest=0.1))
    move = np.array([[0.0, 0.01, 0.03], [0.0, 0.04, 0.0]])
    small = np.array([[1.0, 1.0, 1.0], [1.0, 0.5, 1.0]])
    told = RoundView(np.array([0, 1]), move, np.ones((2, 3)), np.full((2, 3), 0.5), 1e-12, small)
    count: Any
    error: Any
    count, error = accept.accept(told, 0.3)  # twice the size: moves of 0.04, 0.12; 0.32
    assert count.tolist() == [3, 1]
    np.testing.assert_allclose(error, [0.12, 0.0])
    for row in range(2):
        assert accept.accept(told.of(row, 3), 0.3) == (count[row], pytest.approx(error[row]))


def test_the_published_rule_weighs_moves_by_the_variance_of_a_step() -> None:
    """``v = (1 - abar') / (1 - abar) (1 - abar / abar')``; the last step ends at ``1 - abar' = end``."""
    rule = StepVariance(end=0.01)
    abar = np.append(SIGNAL**2, 0.99)
    expected = np.sqrt((1 - abar[1:]) / (1 - abar[:-1]) * (1 - abar[:-1] / abar[1:]))
    np.testing.assert_allclose(rule.bounds(any_table(3, signal=SIGNAL)), expected, rtol=1e-12)
    assert StepVariance().end == 1e-4
    assert rule.many
    back = rule.bounds(any_table(3, signal=np.array([0.5, 0.8, 0.4])))  # a step to more noise allows no move
    assert back[1] == 0.0
    clean = rule.bounds(any_table(3, signal=np.array([0.5, 0.8, 1.0])))
    assert np.all(np.isfinite(clean))
    assert clean[2] == 0.0
    with pytest.raises(ValueError, match=r"^method: its stop rule weighs a move"):
        rule.bounds(any_table(3))
    # moves are of the state's size
    assert rule.accept(view([0.0, 0.01, 0.01], size=3.0, bound=0.5), 0.06) == (3, pytest.approx(0.06))
    assert rule.accept(view([0.0, 0.01, 0.01], size=3.0, bound=0.5), 0.059) == (1, 0.0)
    still = view([0.0, 1e-12, 1.1e-12], bound=0.0)
    assert rule.accept(still, 1.0) == (2, 0.0)


def test_the_margins_of_the_defaults() -> None:
    """Those that the benchmarks of the documentation were made with."""
    table = DDIM(NoiseSchedule.linear()).recurrence(NoiseSchedule.linear().timesteps(50))
    noisy = DDIM(NoiseSchedule.linear(), eta=1.0).recurrence(NoiseSchedule.linear().timesteps(50))
    accept = RelativeMove()
    np.testing.assert_allclose(accept.bounds(table), 0.29 / np.sqrt(table.influence))
    np.testing.assert_allclose(accept.bounds(noisy), 0.22)
    assert accept.spread_tolerance(table, 0.01) == pytest.approx(0.013)
    assert accept.spread_tolerance(noisy, 0.01) == pytest.approx(0.004)
    assert accept.accept(view([0.0, 0.1, 0.1], bound=1.0), 0.06)[1] == 0.0  # 0.1 counts twice at three times 0.02
    assert accept.accept(view([0.0, 0.1, 0.1], bound=4.0), 0.06) == (3, pytest.approx(0.05))
