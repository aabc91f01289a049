"""What a user writes: step rules in increasing time, linearizations, acceptances and methods."""

import math

import numpy as np
import pytest
from scipy.linalg import expm

from parasolver_core import Recurrence, StepRule, solve
from parasolver_core import solve_sequential as sequential
from tests.core.forward_rules import AdamsBashforth, ExplicitEuler, LeapFrog, loop, table
from tests.core.problems import EPS, Rational, TanhNetwork, normal, relative


class Longer(StepRule):
    def recurrence(self, timesteps: np.ndarray) -> Recurrence:
        return table(np.append(timesteps, timesteps[-1] + 1))


def test_a_table_with_another_number_of_rows_is_refused() -> None:
    for run in (solve, sequential):
        with pytest.raises(ValueError, match=r"^step_rule: its table has 6 steps for 5 timesteps; one row a timestep$"):
            run(Rational(), normal((1, 3)), np.arange(5.0), Longer())


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
