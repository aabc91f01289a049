"""Linearizations and acceptances of a user's."""

from typing import Any

import numpy as np
import pytest

from parasolver_core import DDIM, Identity, Linearization, Method, Recurrence, Secant, solve
from parasolver_core import solve_sequential as sequential
from parasolver_core.rounds.acceptance import Acceptance, RelativeMove, RoundView
from parasolver_core.rounds.margins import Margins
from parasolver_core.rounds.step_variance import StepVariance
from tests.core.forward_rules import TABLE, ExplicitEuler, loop
from tests.core.problems import TanhNetwork, normal, relative


class Remembering(Acceptance):
    """The default rule; it notes what it said in every round of the one sample."""

    def __init__(self) -> None:
        self.inner, self.errors = RelativeMove(), []

    def bounds(self, recurrence: Recurrence) -> np.ndarray:
        return self.inner.bounds(recurrence)

    def accept(self, view: RoundView, tolerance: float) -> tuple[int, float]:
        count, error = self.inner.accept(view, tolerance)
        self.errors.append(error)
        return count, error


@pytest.mark.parametrize("tolerance", [0.0, 1e-3, 5e-2])
def test_the_error_estimate_is_the_largest_error_accepted_in_any_round(tolerance: float) -> None:
    said = Remembering()
    got = solve(
        TanhNetwork(), normal((1, 6)), TABLE.timesteps(30), DDIM(TABLE), 8,
        tolerance=tolerance, method=Method(acceptance=said, spread=False),
    )  # fmt: skip
    assert got.error_estimate[0] == max(said.errors)
    assert got.error_estimate[0] > (1e-3 * tolerance if tolerance else 0)
    accepted = np.maximum(np.maximum.accumulate(said.errors), np.finfo(np.float64).eps)  # rounding is always left
    assert [record.samples[0].error for record in got.stats.history] == accepted.tolist()
    assert got.error_estimate[0] <= max(tolerance, 1e-12)


def test_what_the_default_acceptance_says() -> None:
    """The largest effect of the leading nodes that are within the tolerance, or not moved but for rounding."""
    ones = np.ones(5)
    view = RoundView(3, np.array([0.0, 1e-3, 2e-3, 9.0, 1e-4]), ones, ones / 2, 1e-12, ones)
    rule = RelativeMove(Margins(loosest=1e9))
    assert rule.accept(view, 5e-3) == (3, pytest.approx(4e-3))
    assert rule.accept(view, 3e-3) == (2, pytest.approx(2e-3))
    assert rule.accept(view, 1e-9) == (1, 0.0)
    assert rule.accept(view, 20.0) == (5, pytest.approx(18.0))
    small = RoundView(3, view.move, ones, ones / 2, 1e-12, ones / 4)  # of the state's size a quarter counts
    assert rule.accept(small, 9e-3) == (2, pytest.approx(8e-3))
    looser = RelativeMove(Margins(loosest=3e-3))  # twice its size at three times that tolerance
    assert looser.accept(view, 9e-3) == (3, pytest.approx(8e-3))
    nan = RoundView(3, np.array([0.0, np.nan, 0.0]), np.ones(3), np.ones(3), 1e-12, np.ones(3))
    assert rule.accept(nan, 1.0) == (1, 0.0)


@pytest.mark.parametrize("end", [0.0, 1e-4])
def test_the_published_stop_rule_estimates_a_finite_error(end: float) -> None:
    """A step to no noise at all allows no move: it is final where its input is, and adds nothing to the estimate."""
    rule = StepVariance(end=end)
    bound = rule.bounds(DDIM(TABLE).recurrence(TABLE.timesteps(20)))
    assert (bound[-1] == 0) == (end == 0)
    assert np.all(bound[:-1] > 0)
    view = RoundView(17, np.array([0.0, 1e-3, 1e-17]), np.ones(3), bound[-3:], 1e-12)
    count, error = rule.accept(view, 0.1)
    assert count == 3
    assert error == pytest.approx(1e-3 / bound[-2])
    moved = RoundView(17, np.array([0.0, 1e-3, 1e-3]), np.ones(3), bound[-3:], 1e-12)
    assert rule.accept(moved, 1.0)[0] == (2 if end == 0 else 3)


class Everything(Acceptance):
    """Takes whatever a round gives."""

    def accept(self, view: RoundView, tolerance: float) -> tuple[int, float]:
        return len(view.move), 0.0


def test_a_node_that_was_moved_out_of_all_reach_is_not_final_whatever_the_acceptance_says() -> None:
    """A first round of copies, on a network whose outputs are a million times the states."""
    method = Method(acceptance=Everything(), spread=False, fill="copy")
    arguments = (normal((1, 6)), TABLE.timesteps(10), DDIM(TABLE), 10)
    far = solve(lambda x, t: np.tanh(x) + 1e6, *arguments, method=method)
    assert far.stats.history[0].samples[0].accepted == 1
    calm = solve(TanhNetwork(), *arguments, method=method)
    assert calm.stats.history[0].samples[0].accepted == 10


class Lost(Secant):
    """Its slopes are not finite every other time."""

    def update(self, slope: np.ndarray, moved: np.ndarray, cross: np.ndarray) -> np.ndarray:
        new = super().update(slope, moved, cross)
        new[::2] = np.nan
        new[1::4] = np.inf
        return new


@pytest.mark.parametrize("spread", [True, False])
def test_slopes_that_are_not_finite_are_left_as_they_were(spread: bool) -> None:
    n = 200 if spread else 20
    arguments = (TanhNetwork(), normal((2, 6)), TABLE.timesteps(n), DDIM(TABLE))
    got = solve(*arguments, 16, tolerance=5e-2, method=Method(linearization=Lost(), spread=spread))
    assert got.success
    assert relative(got.sample, sequential(*arguments).sample) < 5e-2
    assert got.stats.rounds < n / 2


# Linearizations and methods


class Known(Linearization):
    """A slope that the user knows."""

    def __init__(self, slope: float) -> None:
        self.slope = slope
        self.updates = 0

    def initial(self, recurrence: Recurrence) -> np.ndarray:
        return np.full(len(recurrence), self.slope)

    def update(self, slope: np.ndarray, moved: np.ndarray, cross: np.ndarray) -> np.ndarray:
        assert slope.shape == moved.shape == cross.shape
        assert slope.dtype == moved.dtype == cross.dtype == np.float64
        assert np.all(moved >= 0)
        self.updates += 1
        return slope


def decay(y: np.ndarray, t: np.ndarray) -> np.ndarray:
    return -2.0 * y + np.sin(t)[:, None]


def test_a_known_slope_needs_three_rounds_where_a_wrong_one_needs_many() -> None:
    """Newton on an affine problem: the first call, one correction, and a round that finds nothing to correct."""
    t, y = np.linspace(0, 2, 41), normal((2, 3))
    exact = loop(ExplicitEuler(), decay, y, t)[-1]
    right, wrong = (
        solve(decay, y, t, ExplicitEuler(), 41, tolerance=1e-9, method=Method(linearization=Known(slope)))
        for slope in (-2.0, 1.0)
    )
    assert right.stats.rounds <= 4
    assert wrong.stats.rounds > 6
    for got in (right, wrong):
        assert relative(got.sample, exact) < 1e-9


def test_linearization_is_told_once_a_round() -> None:
    known = Known(-2.0)
    got = solve(decay, normal((1, 3)), np.linspace(0, 2, 41), ExplicitEuler(), 8, method=Method(linearization=known))
    assert known.updates == got.stats.rounds


@pytest.mark.parametrize(
    ("method", "name"),
    [(Method(linearization=Identity()), "identity"), (Method(linearization=Secant()), "secant"), (Method(), "secant")],
)
def test_a_method_is_its_preset(method: Method, name: str) -> None:
    arguments = (TanhNetwork(), normal((2, 6)), TABLE.timesteps(20), DDIM(TABLE), 8)
    by_object, by_name = (solve(*arguments, method=one, check=False) for one in (method, name))
    np.testing.assert_array_equal(by_object.sample, by_name.sample)
    assert by_object.stats.evaluations == by_name.stats.evaluations


class AllAtOnce(Acceptance):
    """Everything is final after a round, right or wrong."""

    def accept(self, view: Any, *limits: float) -> tuple[int, Any]:
        return self.answer(view)

    @staticmethod
    def answer(view: Any) -> tuple[int, Any]:
        return len(view.move), 0.0


def test_a_written_acceptance_decides() -> None:
    got = solve(
        TanhNetwork(), normal((1, 6)), TABLE.timesteps(17), DDIM(TABLE), 4, method=Method(acceptance=AllAtOnce())
    )
    assert [one.accepted for record in got.stats.history for one in record.samples] == [
        2,
        4,
        4,
        4,
        3,
    ]  # in the first round only what needs no prediction


class NothingEver(AllAtOnce):
    @staticmethod
    def answer(view: Any) -> tuple[int, Any]:
        return 0, 0.0


def test_an_acceptance_of_nothing_does_not_hang() -> None:
    """The first node had its final input, so a count below 1 is either refused or read as 1."""
    arguments = (TanhNetwork(), normal((1, 6)), TABLE.timesteps(10), DDIM(TABLE), 4)
    try:
        got = solve(*arguments, method=Method(acceptance=NothingEver()), max_rounds=10, throw=False)
    except ValueError:
        return
    assert got.success


class NaNSlope(Known):
    def __init__(self) -> None:
        super().__init__(float("nan"))


def test_a_slope_that_is_not_finite_is_never_accepted() -> None:
    got = solve(
        TanhNetwork(), normal((1, 6)), TABLE.timesteps(10), DDIM(TABLE), 4,
        method=Method(linearization=NaNSlope()), throw=False,
    )  # fmt: skip
    assert np.all(np.isfinite(got.states))
    assert np.all(np.isfinite(got.sample))
