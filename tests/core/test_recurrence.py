"""Tables are checked, and say what they are."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from parasolver_core import DPMSolver, NoiseSchedule, Recurrence, StepRule, solve
from parasolver_core.samplers.held_form import HeldForm
from parasolver_core.samplers.sample_form import added_noise_share
from tests.core.forward_rules import AdamsBashforth, LeapFrog, table
from tests.core.problems import Rational, normal

LINEAR = NoiseSchedule.linear()
REFUSED = {
    "a of another length": ("a", {"a": np.ones((3, 1))}),
    "a 1-D": ("a", {"a": np.ones(4)}),
    "b of another length": ("b", {"b": np.ones((5, 1))}),
    "b 1-D": ("b", {"b": np.ones(4)}),
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
    with pytest.raises(ValueError, match=r"^held: q is 0 at step 2;"):
        table(np.arange(4.0), held=np.array([[1.0, 1.0], [1.0, -1.0], [1.0, 0.0], [1.0, 2.0]]))


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


def test_the_share_of_added_noise() -> None:
    """Of the variances that ancestral steps add, each next to that of the state after it."""
    alpha, sigma = np.array([0.5, 0.8, 2.0]), np.array([3.0, 2.0, 1.0])
    full = np.array([4 - (0.5 * 4 / (0.8 * 3)) ** 2, 1 - (0.8 * 1 / (2 * 2)) ** 2])
    ancestral = np.sqrt(np.append(full, 9.0))  # what the last step adds does not count
    assert added_noise_share(alpha, sigma, ancestral) == pytest.approx(1.0, rel=1e-12)
    only_last = added_noise_share(alpha, sigma, ancestral * [0, 0.5, 1])
    assert only_last == pytest.approx(0.25 * (full[1] / 5) / (full[0] / 4.64 + full[1] / 5), rel=1e-12)


def test_recurrence_properties() -> None:
    leap = LeapFrog().recurrence(np.arange(4.0))
    assert (len(leap), leap.memory, leap.stochastic) == (4, 2, False)
    assert AdamsBashforth().recurrence(np.arange(4.0)).memory == 2
    assert table(np.arange(4.0), c=np.array([0, 0, 1.0, 0])).stochastic


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_samplers_that_hold_the_predicted_sample_read_one_state(order: int, prediction_type: Any) -> None:
    """What rounding leaves of states that cancel is none: earlier ones would be kept and multiplied for nothing."""
    rule = DPMSolver(LINEAR, order=order, prediction_type=prediction_type)
    form = HeldForm(rule.recurrence(LINEAR.timesteps(20)))
    assert form.reads == (1, order)
    assert not form.cancels
