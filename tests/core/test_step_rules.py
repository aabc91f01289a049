"""What the step rules say of themselves and refuse, and the orders and weights of the steps of DPM-Solver++."""

import math
from typing import Any

import numpy as np
import pytest

from parasolver_core import DDIM, DDPM, DPMSolver, Euler, NoiseSchedule, Recurrence, StepRule
from parasolver_core.samplers.step_rules import _difference_weights, table
from tests.core.forward_rules import ExplicitEuler

LINEAR, KARRAS, FLOW = NoiseSchedule.linear(), NoiseSchedule.karras(), NoiseSchedule.flow_matching()


def test_what_noise_is_multiplied_with_at_the_first_timestep() -> None:
    assert Euler(KARRAS).start_scale(np.array([80.0, 1.0])) == np.hypot(0.5, 80)
    assert Euler(KARRAS).start_scale(np.array([2.0, 80.0])) == np.hypot(0.5, 2)
    assert DDIM(LINEAR).start_scale(np.array([500, 20])) == 1
    assert Euler(FLOW).start_scale(np.array([0.5])) == 1
    assert math.isnan(ExplicitEuler().start_scale(np.array([1.0])))


def test_what_a_rule_reads_of_the_network() -> None:
    assert [rule.predicts for rule in (DDIM(LINEAR), Euler(KARRAS), Euler(FLOW))] == ["epsilon", "sample", "flow"]
    assert DDIM(LINEAR, prediction_type="sample").predicts == "sample"
    own = ExplicitEuler()
    assert own.predicts is None
    own.prediction_type = 3  # type: ignore[attr-defined]
    assert own.predicts is None
    own.prediction_type = "sample"  # type: ignore[attr-defined]
    assert own.predicts == "sample"


def test_what_a_rule_is_unless_told() -> None:
    assert DDIM(LINEAR).eta == 0
    assert DDIM(LINEAR, eta=1).eta == 1
    assert DDPM(LINEAR).variance_type == "fixed_small"
    own = DPMSolver(LINEAR)
    assert (own.order, own.solver_type, own.stochastic, own.lower_order_final) == (2, "midpoint", False, True)


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ([3.0, 3.0, 1.0], "got 3.0 at index 0, then 3.0"),
        ([3.0, 1.0, 2.0, 4.0], "got 1.0 at index 1, then 2.0"),
        ([3.0, 0.001], "got 0.001 at index 1, then the clean end"),
    ],
)
def test_noise_that_does_not_fall_is_named_by_its_place(grid: list[float], said: str) -> None:
    schedule = NoiseSchedule.karras(final_sigma=0.002)
    with pytest.raises(ValueError, match=said):
        Euler(schedule).recurrence(np.array(grid))
    assert len(Euler(schedule).recurrence(np.array([3.0, 0.002]))) == 2  # of length 0


def test_noise_falls_beside_the_signal() -> None:
    assert len(Euler(FLOW).recurrence(np.array([0.6, 0.59]))) == 2
    with pytest.raises(ValueError, match=r"got 0\.5 at index 0, then 0\.6"):
        Euler(FLOW).recurrence(np.array([0.5, 0.6]))


def test_a_table_is_asked_of_a_rule() -> None:
    np.testing.assert_array_equal(table(DDIM(LINEAR), [300, 20]).timesteps, [300, 20])
    with pytest.raises(TypeError, match="got the class DDIM; make an object of it"):
        table(DDIM, [3, 2])  # type: ignore[arg-type]
    for wrong in (LINEAR, int, "ddim"):
        with pytest.raises(TypeError, match="expected a StepRule such as DDIM"):
            table(wrong, [3, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected no duplicates"):
        table(DDIM(LINEAR), [3, 3])

    class Longer(StepRule):
        def recurrence(self, timesteps: Any) -> Recurrence:
            return ExplicitEuler().recurrence(np.append(timesteps, 0))

    with pytest.raises(ValueError, match="its table has 3 steps for 2 timesteps"):
        table(Longer(), [3, 2])


@pytest.mark.parametrize(
    ("order", "steps", "lower", "final", "orders"),
    [
        (3, 6, True, 0.5, [1, 2, 3, 3, 2, 1]),
        (3, 6, False, 0.5, [1, 2, 3, 3, 3, 3]),
        (3, 6, False, 0.0, [1, 2, 3, 3, 3, 1]),  # to zero noise
        (2, 4, False, 0.5, [1, 2, 2, 2]),
        (3, 14, True, 0.5, [1, 2, *[3] * 10, 2, 1]),
        (3, 15, True, 0.5, [1, 2, *[3] * 13]),
        (3, 15, True, 0.0, [1, 2, *[3] * 12, 1]),
    ],
)
def test_the_orders_of_steps(order: int, steps: int, lower: bool, final: float, orders: list[int]) -> None:
    rule = DPMSolver(KARRAS, order=order, lower_order_final=lower)
    sigma = np.append(np.arange(steps, 0.0, -1), final)
    assert [rule._order_of_step(i, steps, sigma) for i in range(steps)] == orders
    sigma[2] = sigma[1]
    assert rule._order_of_step(1, steps, sigma) == 1  # a step of length 0


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_weights_are_the_differences_of_the_docstring(order: int, solver_type: str) -> None:
    lam, m, i = np.array([-1.0, -0.4, 0.5, 0.8]), np.array([1.3, -0.6, 0.4]), 2
    h, r0, r1 = 0.3, 0.9 / 0.3, 0.6 / 0.3
    shrink = np.exp(-h) - 1
    first, second = (m[0] - m[1]) / r0, (m[1] - m[2]) / r1
    expected = -shrink * m[0]
    if order == 2:
        expected += (-shrink / 2 if solver_type == "midpoint" else shrink / h + 1) * first
    if order == 3:
        d2 = (first - second) / (r0 + r1)
        expected += (shrink / h + 1) * (first + r0 * d2) - ((shrink + h) / h**2 - 0.5) * d2
    weights = _difference_weights(lam, i, order, h, solver_type)
    assert len(weights) == order
    assert weights @ m[:order] == pytest.approx(expected, rel=1e-9)


def test_the_noise_of_the_stochastic_variant() -> None:
    grid = np.array([8.0, 4.0, 1.0])
    made = DPMSolver(KARRAS, stochastic=True, order=1).recurrence(grid)
    sigma = np.array([8.0, 4.0, 1.0, 0.0])
    np.testing.assert_allclose(made.c, sigma[1:] * np.sqrt(1 - (sigma[1:] / sigma[:-1]) ** 2), rtol=1e-12)
    np.testing.assert_allclose(made.a[:, 0], (sigma[1:] / sigma[:-1]) ** 2, rtol=1e-12)
    np.testing.assert_allclose(made.b[:, 0], 1 - (sigma[1:] / sigma[:-1]) ** 2, rtol=1e-12)
    plain = DPMSolver(KARRAS, order=1).recurrence(grid)
    np.testing.assert_array_equal(plain.c, 0.0)
    np.testing.assert_allclose(plain.a[:, 0], sigma[1:] / sigma[:-1], rtol=1e-12)


def test_the_noise_of_ancestral_steps() -> None:
    """``eta sigma' / sigma sqrt(sigma^2 - sigma'^2)`` over noise levels; the large variance all that there is left."""
    grid = np.array([8.0, 4.0, 1.0])
    levels = np.array([8.0, 4.0, 1.0, 0.0])
    small = levels[1:] / levels[:-1] * np.sqrt(levels[:-1] ** 2 - levels[1:] ** 2)
    np.testing.assert_allclose(DDIM(KARRAS, eta=0.5).recurrence(grid).c, 0.5 * small, rtol=1e-12)
    ddim = DDIM(KARRAS, eta=0.5).recurrence(grid)
    a = np.sqrt(levels[1:] ** 2 - (0.5 * small) ** 2) / levels[:-1]
    np.testing.assert_allclose(ddim.a[:, 0], a, rtol=1e-12)
    np.testing.assert_allclose(ddim.b[:, 0], 1 - a, rtol=1e-12)
    large = DDPM(KARRAS, variance_type="fixed_large").recurrence(grid)
    np.testing.assert_allclose(large.c, [48**0.5, 15**0.5, 0.0], rtol=1e-12)
    np.testing.assert_allclose(DDPM(KARRAS).recurrence(grid).c, small, rtol=1e-12)
