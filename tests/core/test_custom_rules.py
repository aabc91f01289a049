"""What a user writes: step rules in increasing time, linearizations, acceptances and methods."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.linalg import expm

from parasolver_core import DDIM, Identity, Linearization, Method, NoiseSchedule, Recurrence, Secant, StepRule, solve
from parasolver_core import solve_sequential as sequential
from parasolver_core.rounds.acceptance import Acceptance, Margins, RelativeMove, RoundView, StepVariance
from tests.core.problems import EPS, Rational, TanhNetwork, normal, relative

TABLE = NoiseSchedule.scaled_linear()


def table(timesteps: np.ndarray, **changes: Any) -> Recurrence:
    """``x' = x + h m``, with h the distance to the next timestep and the last one repeated."""
    n, h = len(timesteps), steps_of(timesteps)
    parts: dict[str, Any] = {
        "timesteps": timesteps,
        "a": np.ones((n, 1)),
        "b": h[:, None],
        "c": np.zeros(n),
    }
    return Recurrence(**(parts | changes))


def steps_of(timesteps: np.ndarray) -> np.ndarray:
    h = np.diff(timesteps)
    return np.append(h, h[-1])


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
    assert [record.samples[0].error for record in got.stats.history] == np.maximum.accumulate(said.errors).tolist()
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


class Longer(StepRule):
    def recurrence(self, timesteps: np.ndarray) -> Recurrence:
        return table(np.append(timesteps, timesteps[-1] + 1))


def test_a_table_with_another_number_of_rows_is_refused() -> None:
    for run in (solve, sequential):
        with pytest.raises(ValueError, match=r"^step_rule: its table has 6 steps for 5 timesteps; one row a timestep$"):
            run(Rational(), normal((1, 3)), np.arange(5.0), Longer())


class ExplicitEuler(StepRule):
    def recurrence(self, timesteps: np.ndarray) -> Recurrence:
        return table(timesteps)


class AdamsBashforth(StepRule):
    """Two steps, on a uniform grid; the first is Euler's."""

    def recurrence(self, timesteps: np.ndarray) -> Recurrence:
        h = steps_of(timesteps)
        b = np.stack([1.5 * h, -0.5 * h], axis=1)
        b[0] = h[0], 0.0
        return table(timesteps, b=b)


class LeapFrog(StepRule):
    """``x_{i+1} = x_{i-1} + 2 h m_i``: memory in the states, not in the outputs."""

    def recurrence(self, timesteps: np.ndarray) -> Recurrence:
        h = steps_of(timesteps)
        a = np.tile([0.0, 1.0], (len(h), 1))
        a[0] = 1.0, 0.0
        b = 2 * h[:, None]
        b[0] = h[0]
        return table(timesteps, a=a, b=b)


def loop(rule: StepRule, f: Callable[[Any, Any], Any], y: np.ndarray, t: np.ndarray) -> np.ndarray:
    """All states by a plain loop, each formula as its textbook has it."""
    ys, fs = [y], []
    for i, h in enumerate(steps_of(t)):
        fs.append(f(ys[i], np.full(len(y), t[i])))
        if isinstance(rule, AdamsBashforth) and i:
            ys.append(ys[i] + h * (1.5 * fs[i] - 0.5 * fs[i - 1]))
        elif isinstance(rule, LeapFrog) and i:
            ys.append(ys[i - 1] + 2 * h * fs[i])
        else:
            ys.append(ys[i] + h * fs[i])
    return np.stack(ys)


def pendulum(y: np.ndarray, t: np.ndarray) -> np.ndarray:
    return np.stack([y[:, 1], -np.sin(y[:, 0]) + 0.1 * np.cos(t)], axis=1)


@pytest.mark.parametrize("method", ["secant", "identity", "sequential"])
@pytest.mark.parametrize("window", [1, 7, 60])
@pytest.mark.parametrize("rule", [ExplicitEuler(), AdamsBashforth(), LeapFrog()], ids=lambda r: type(r).__name__)
def test_forward_in_time_is_the_plain_loop(rule: StepRule, window: int, method: str) -> None:
    t = np.linspace(0.0, 3.0, 50)
    y = normal((3, 2))
    got = solve(pendulum, y, t, rule, window, tolerance=0, method=method, save="trajectory")
    # 50 steps of 8 ulp each, of a motion that amplifies by less than e^3 = 20
    assert relative(got.trajectory, loop(rule, pendulum, y, t)) < 50 * 8 * 20 * EPS
    assert got.stats.rounds <= 50


def test_adams_bashforth_against_the_matrix_exponential() -> None:
    matrix = np.array([[0.0, 1.0], [-1.0, -0.2]])
    y = normal((1, 2))
    errors = []
    for n in (100, 200):
        t = np.arange(n) * (4.0 / n)
        got = solve(lambda y, t: y @ matrix.T, y, t, AdamsBashforth(), 20, tolerance=1e-10).sample
        errors.append(relative(got, y @ expm(4.0 * matrix).T))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.15)


def test_integer_times_forward() -> None:
    got = solve(Rational(), normal((1, 3)), np.arange(6), ExplicitEuler(), 3, tolerance=0)
    expected = sequential(Rational(), normal((1, 3)), np.arange(6), ExplicitEuler())
    assert relative(got.sample, expected.sample) < 100 * EPS


def test_a_long_memory_over_many_slides() -> None:
    """A rule that reads five states and outputs back, through windows far shorter and longer than that."""

    class LongMemory(StepRule):
        def recurrence(self, timesteps: np.ndarray) -> Recurrence:
            n = len(timesteps)
            rng = np.random.default_rng(0)
            a, b = rng.normal(size=(2, n, 5)) / 5
            for i in range(5):
                a[i, i + 1 :] = b[i, i + 1 :] = 0.0
            return table(timesteps, a=a, b=b)

    x_T, t = normal((2, 6)), np.arange(40) / 40
    expected = sequential(TanhNetwork(), x_T, t, LongMemory(), save="trajectory").trajectory
    for window in (1, 2, 3, 6, 11, 39, 40, 100):
        got = solve(TanhNetwork(), x_T, t, LongMemory(), window, tolerance=0, save="trajectory").trajectory
        assert relative(got, expected) < 1e-11, window


# Recurrence tables


REFUSED = {
    "a of another length": ("a", {"a": np.ones((3, 1))}),
    "a 1-D": ("a", {"a": np.ones(4)}),
    "b of another length": ("b", {"b": np.ones((5, 1))}),
    "c of another length": ("c", {"c": np.zeros(5)}),
    "c 2-D": ("c", {"c": np.zeros((4, 1))}),
    "held of one column": ("held", {"held": np.ones((4, 1))}),
    "slope of another length": ("slope", {"slope": np.zeros(3)}),
    "identity_slope of another length": ("identity_slope", {"identity_slope": np.zeros(3)}),
    "NaN in a": ("a", {"a": np.array([[1.0], [np.nan], [1.0], [1.0]])}),
    "inf in b": ("b", {"b": np.array([[1.0], [np.inf], [1.0], [1.0]])}),
    "NaN in c": ("c", {"c": np.array([0, np.nan, 0, 0])}),
    "NaN in slope": ("slope", {"slope": np.array([0, np.nan, 0, 0])}),
    "a reads before the start": ("a", {"a": np.ones((4, 2))}),
    "b reads before the start": ("b", {"b": np.tril(np.ones((4, 4)), 1)}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_recurrence_refuses(case: str) -> None:
    name, change = REFUSED[case]
    with pytest.raises(ValueError, match=f"^{name}: "):
        table(np.arange(4.0), **change)


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_recurrence_names_the_step(name: str) -> None:
    values = np.zeros((4, 1)) if name != "c" else np.zeros(4)
    values[2] = np.nan
    with pytest.raises(ValueError, match=r"step 2 \(timestep 20.0\)"):
        table(np.arange(0.0, 40.0, 10.0), **{name: values})


def test_recurrence_refuses_a_held_quantity_without_the_output() -> None:
    with pytest.raises(ValueError, match=r"^held: "):
        table(np.arange(4.0), held=np.tile([1.0, 0.0], (4, 1)))


def test_a_rule_that_returns_a_table_for_another_grid_is_refused() -> None:
    class Short(StepRule):
        def recurrence(self, timesteps: np.ndarray) -> Recurrence:
            return table(timesteps[:-1])

    with pytest.raises(ValueError, match="step_rule"):
        solve(Rational(), normal((1, 2)), np.arange(6), Short())


def test_what_a_table_leaves_out() -> None:
    """The output is held, the field does not depend on the state, and Picard's slope follows from the steps."""
    b = np.array([[0.5, 0.0], [0.75, -0.25], [0.0, 0.0]])
    short = Recurrence(timesteps=np.arange(3.0), a=np.array([[0.9], [0.8], [0.7]]), b=b, c=np.zeros(3))
    np.testing.assert_array_equal(short.held, [[0.0, 1.0]] * 3)
    np.testing.assert_array_equal(short.slope, np.zeros(3))
    np.testing.assert_allclose(short.identity_slope, [0.2, 0.4, 0.0], rtol=1e-14)  # 0.9 + 0.5 g = 1; no slope does
    given = replace(short, held=np.tile([1.0, 2.0], (3, 1)), slope=np.full(3, 7.0))
    np.testing.assert_array_equal(given.identity_slope, short.identity_slope)  # as it is: it was filled in
    table = Recurrence(short.timesteps, short.a, b, short.c, given.held, given.slope)
    assert table.identity_slope[0] == pytest.approx(0.2)  # at one node what is held does not matter
    assert table.identity_slope[2] == 7.0


def test_recurrence_properties() -> None:
    leap = LeapFrog().recurrence(np.arange(4.0))
    assert (len(leap), leap.memory, leap.stochastic) == (4, 2, False)
    assert AdamsBashforth().recurrence(np.arange(4.0)).memory == 2
    assert table(np.arange(4.0), c=np.array([0, 0, 1.0, 0])).stochastic


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
