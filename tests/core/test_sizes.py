"""The promise is about the sample: data much smaller than the noise, and networks coarser than the states."""

import numpy as np
import pytest
import torch

from parasolver_core import DDIM, DDPM, Euler, NoiseSchedule, StepRule, solve, solve_sequential
from tests.core.problems import normal, prediction, relative

LINEAR, FLOW = NoiseSchedule.linear(), NoiseSchedule.flow_matching(2.0)


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


@pytest.mark.parametrize("size", [1.0, 0.001])
def test_nothing_changes_in_what_zero_means_for_small_data(size: float) -> None:
    network, x_T, grid = Points(LINEAR, "epsilon", size), normal((8, 8)), LINEAR.timesteps(30)
    got = solve(network, x_T, grid, DDIM(LINEAR), 8, tolerance=0)
    assert got.stats.rounds < 25
    assert relative(got.sample, solve_sequential(network, x_T, grid, DDIM(LINEAR)).sample) < 1e-12 / size


def test_data_of_the_usual_size_are_not_small() -> None:
    recurrence = DDIM(LINEAR).recurrence(LINEAR.timesteps(50))
    np.testing.assert_array_equal(recurrence.smallness(49, 0.25**2), np.ones(50))
    np.testing.assert_array_equal(recurrence.smallness(0, 0.0), np.ones(50))  # with so much noise nothing is known
    np.testing.assert_array_equal(recurrence.smallness(49, float("nan")), np.ones(50))
    small = recurrence.smallness(49, 0.01**2)
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
