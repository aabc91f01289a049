"""The promise is about the sample: data much smaller than the noise, and networks coarser than the states."""

import numpy as np
import pytest
import torch

from parasolver_core import DDIM, DDPM, Euler, NoiseSchedule, StepRule, solve, solve_sequential
from tests.core.any_tables import small_data
from tests.core.problems import normal, prediction, relative

LINEAR, FLOW = NoiseSchedule.linear(), NoiseSchedule.flow_matching(2.0)
FEW = NoiseSchedule.flow_matching(3.0)


class Points:
    """The exact network of four points of that size."""

    def __init__(self, schedule: NoiseSchedule, kind: str, size: float) -> None:
        self.schedule, self.kind = schedule, kind
        self.points = size * normal((4, 8), seed=5)

    def __call__(self, x: np.ndarray, t: np.ndarray) -> np.ndarray:
        alpha, sigma = (level[:-1, None] for level in self.schedule.levels(t))
        weight = -((x[:, None] - alpha[:, None] * self.points) ** 2).sum(-1) / (2 * sigma**2)
        weight = np.exp(weight - weight.max(1, keepdims=True))
        clean = (weight / weight.sum(1, keepdims=True)) @ self.points
        return prediction(clean, x, alpha, sigma, self.kind)


CASES = [(DDIM(LINEAR), LINEAR, "epsilon"), (DDPM(LINEAR), LINEAR, "epsilon"), (Euler(FLOW), FLOW, "flow")]


@pytest.mark.parametrize(("rule", "schedule", "kind"), CASES, ids=["ddim", "ddpm", "flow"])
@pytest.mark.parametrize(("size", "width", "tolerance"), [(0.01, 16, 1e-2), (0.001, 16, 1e-2), (0.001, 50, 1e-3)])
def test_the_tolerance_holds_for_data_much_smaller_than_the_noise(
    rule: StepRule, schedule: NoiseSchedule, kind: str, size: float, width: int, tolerance: float
) -> None:
    network, x_T, grid = Points(schedule, kind, size), normal((60, 8)), schedule.timesteps(50)
    got = solve(network, x_T, grid, rule, width, tolerance=tolerance).sample
    expected = solve_sequential(network, x_T, grid, rule).sample
    errors = np.array([relative(a, b) for a, b in zip(got, expected, strict=True)])
    assert np.mean(errors <= tolerance) >= 0.95, sorted(errors)[-4:]


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("steps", [2, 4, 8])
@pytest.mark.parametrize("near", [False, True], ids=["cold", "near"])
@pytest.mark.parametrize("rule", [DDIM(FEW, prediction_type="sample", eta=1.0), Euler(FEW)], ids=["ddim", "flow"])
def test_so_few_steps_that_the_last_node_alone_tells_the_size_of_the_data(
    rule: StepRule, near: bool, steps: int, batch: int
) -> None:
    """Half of the last node's state is noise, and yet what is predicted there is the sample."""
    grid, x_T, weights = FEW.timesteps(steps), normal((batch, 4)), np.cos(np.arange(16)).reshape(4, 4)

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        clean = 1e-3 * np.tanh(x @ weights)
        return clean if isinstance(rule, DDIM) else (x - clean) / t[:, None]

    plain = solve_sequential(network, x_T, grid, rule, save="trajectory")
    assert plain.trajectory is not None
    start = plain.trajectory * (1 + 0.01 * normal(plain.trajectory.shape, seed=2)) if near else None
    got = solve(network, x_T, grid, rule, 5, tolerance=0.05, start=start)
    assert got.stats.rounds <= 5
    for one, expected, told in zip(got.sample, plain.sample, got.error_estimate, strict=True):
        assert relative(one, expected) <= 0.05
        assert told <= 0.05


def test_what_the_last_step_takes_of_noise_is_part_of_the_sample() -> None:
    recurrence = Euler(NoiseSchedule.flow_matching(3.0, final_sigma=0.1)).recurrence(FEW.timesteps(4))
    told = small_data(recurrence)
    alpha, sigma = 0.5, 0.5  # at the last node
    a, b = 0.1 / sigma, 0.9 - alpha * 0.1 / sigma
    size = np.sqrt(b**2 * 1e-6 + a**2 * 0.25)
    assert recurrence.signal is not None
    expected = size / np.sqrt(1 - recurrence.signal**2 * (1 - size**2))
    np.testing.assert_allclose(told.smallness(3, 1e-6, 0.25), expected, rtol=1e-9)
    np.testing.assert_array_equal(told.smallness(2, 1e-6, 0.25), np.ones(4))
    np.testing.assert_array_equal(told.smallness(3, 1e-6, 2.0), np.ones(4))


@pytest.mark.parametrize("size", [1.0, 0.001])
def test_nothing_changes_in_what_zero_means_for_small_data(size: float) -> None:
    network, x_T, grid = Points(LINEAR, "epsilon", size), normal((8, 8)), LINEAR.timesteps(30)
    got = solve(network, x_T, grid, DDIM(LINEAR), 8, tolerance=0)
    assert got.stats.rounds < 25
    assert relative(got.sample, solve_sequential(network, x_T, grid, DDIM(LINEAR)).sample) < 1e-12 / size


def test_data_of_the_usual_size_are_not_small() -> None:
    recurrence = DDIM(LINEAR).recurrence(LINEAR.timesteps(50))
    told = small_data(recurrence)
    np.testing.assert_array_equal(told.smallness(49, 0.25**2), np.ones(50))
    np.testing.assert_array_equal(told.smallness(0, 0.0), np.ones(50))  # with so much noise nothing is known
    np.testing.assert_array_equal(told.smallness(49, float("nan")), np.ones(50))
    small = told.smallness(49, 0.01**2)
    signal, noise = recurrence.signal, np.sqrt(1 - recurrence.signal**2)
    np.testing.assert_allclose(small, 0.01 / np.sqrt((0.01 * signal) ** 2 + noise**2), rtol=1e-12)
    assert small[0] == pytest.approx(0.01, rel=1e-2)


@pytest.mark.parametrize("rule", [DDIM(LINEAR), DDPM(LINEAR)], ids=["ddim", "ddpm"])
def test_float64_states_stop_at_the_rounding_of_a_float32_network(rule: StepRule) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64)]
    network = torch.nn.Sequential(*layers).requires_grad_(False)
    single = lambda x, t: network(x.float()).double()  # noqa: E731
    x_T, grid = torch.as_tensor(normal((2, 64))), LINEAR.timesteps(50)
    got = solve(single, x_T, grid, rule, 16, tolerance=0)
    assert got.stats.rounds <= 20
    assert relative(got.sample, solve_sequential(single, x_T, grid, rule).sample) < 1e-6
    own = solve(lambda x, t: network(x), x_T.float(), grid, rule, 16, tolerance=0)
    assert abs(got.stats.rounds - own.stats.rounds) <= 2
