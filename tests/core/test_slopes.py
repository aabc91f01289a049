"""Which slopes are followed, and how far: one that was measured across a jump of the network is no one's."""

from typing import Any

import numpy as np
import pytest

from parasolver_core import DDIM, DPMSolver, Euler, Method, NoiseSchedule, solve, solve_sequential
from parasolver_core.rounds.slopes import followed
from parasolver_core.samplers.held_form import HeldForm
from tests.core.any_tables import any_table
from tests.core.test_decisions import Said, shared

LINEAR, FLOW = NoiseSchedule.linear(), NoiseSchedule.flow_matching()
RULES = {
    "ddim": (DDIM(LINEAR, prediction_type="sample"), LINEAR),
    "2m": (DPMSolver(LINEAR, prediction_type="sample", order=2), LINEAR),
    "flow": (Euler(FLOW, prediction_type="sample"), FLOW),
    "flow-3m": (DPMSolver(FLOW, prediction_type="sample", order=3), FLOW),
}


def test_what_is_known_of_a_sampler_at_its_last_node() -> None:
    form = HeldForm(any_table(6, 2, 2))
    np.testing.assert_array_equal(form.latest, np.abs([form.a[:, 0], form.b[:, 0]]))
    np.testing.assert_array_equal(form.held_parts, form.held.T)


class Reaching(Said):
    """An acceptance that says how far slopes are followed."""

    reach = 10.0


@pytest.mark.parametrize(("tolerance", "most"), [(0.02, 0.2), (1e-20, 800 * 2.0**-52)])
def test_a_node_is_final_if_the_next_state_moves_little(tolerance: float, most: float) -> None:
    """Ten tolerances, or a hundred times what is rounding, of what the next state is made of."""
    common = shared(Reaching(1), tolerance=tolerance)
    latest = np.array([[0.5, 0.5, 0.0, 0.0, 0.5], [2.0, 2.0, 1.0, 1.0, 0.25]])
    held = np.array([1.0, 0.0, 3.0, 0.0, 0.0])  # beside the state
    slope = np.array([-4.0, 4.0, 5.0, 5.0, 2.0])
    made_of, weight = latest[0] + latest[1] * held, latest[1] * np.abs(slope)
    for factor, expected in ((0.999, True), (1.001, False)):
        move = factor * most * made_of / weight
        move[3] = 1e-30  # nothing is known of what the state is made of
        told = followed(common, latest, slope, move, held, 2.0**-52)
        assert told.tolist() == [expected, expected, expected, False, expected]
    assert followed(common, latest, slope, np.zeros(5), held, 2.0**-52).all()
    assert followed(shared(Said(1), tolerance=0.0), latest, slope, np.ones(5), held, 2.0**-52).all()


def cubic(g: float) -> Any:
    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            return x - g * x**3

    return network


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", RULES)
def test_no_sample_of_a_network_with_jumps_is_wrong_in_silence(name: str, batch: int) -> None:
    """Large guesses are answered by far larger outputs. The slopes of that, 1e15, made samples of 1e70 and more."""
    rule, schedule = RULES[name]
    wrong = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        network, tolerance = cubic(rng.uniform(0.2, 1.2)), 0.1 if seed % 2 else 0.01
        x_T, grid = (
            rng.standard_normal((batch, int(rng.integers(2, 20)))),
            schedule.timesteps(int(rng.integers(20, 50))),
        )
        window = int(rng.integers(10, 40))
        options: dict[str, Any] = {"tolerance": tolerance, "method": Method(spread=False), "check": False}
        got = solve(network, x_T, grid, rule, window, **options, throw=False)
        want = solve_sequential(network, x_T, grid, rule).sample
        error = np.linalg.norm(got.sample - want, axis=1) / np.linalg.norm(want, axis=1)
        if not np.all(error <= 5 * np.maximum(got.error_estimate, tolerance)):  # one in twenty may miss the tolerance
            wrong.append((seed, error.max()))
    assert wrong == []
