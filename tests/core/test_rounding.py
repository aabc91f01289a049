"""What is below the rounding of the states or the range of their squares, and what the estimate says of it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from parasolver_core import (
    DDIM,
    DPMSolver,
    Euler,
    Method,
    NoiseSchedule,
    Recurrence,
    StepRule,
    solve,
    solve_sequential,
)
from parasolver_core.rounds.squares import at_most, sums_of_squares
from parasolver_core.samplers.held_form import HeldForm
from parasolver_core.samplers.tables import identity_slope
from tests.arrays import to_numpy
from tests.core.problems import normal, relative
from tests.core.test_sizes import Points

LINEAR, FLOW = NoiseSchedule.linear(), NoiseSchedule.flow_matching()
KARRAS = NoiseSchedule.karras(0.3, 80.0, 5.0)


class Table(StepRule):
    """``x' = a x + b m``, without a schedule; held is ``p x + q m``."""

    def __init__(self, a: float, b: float, p: float = 0.0, q: float = 1.0) -> None:
        self.a, self.b, self.held = a, b, (p, q)

    def recurrence(self, timesteps: np.ndarray) -> Recurrence:
        one, nothing = np.ones((len(timesteps), 1)), np.zeros(len(timesteps))
        held = np.tile(self.held, (len(timesteps), 1))
        return Recurrence(timesteps, self.a * one, self.b * one, nothing, held, nothing, nothing)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_of_squares_below_the_range(dtype: Any) -> None:
    rows = np.array([[3e-30, 4e-30], [0, 0], [3, 4], [1.5, np.inf], [0, 1e-44]], dtype=dtype)
    np.testing.assert_allclose(sums_of_squares(rows), [25e-60, 0, 25, np.inf, float(rows[4, 1]) ** 2], rtol=1e-5)
    assert sums_of_squares(np.array([3e-200, 4e-200])) == np.finfo(np.float64).tiny  # not 0


def test_sums_of_a_device_are_not_too_small(xp: Any) -> None:
    rows = xp.asarray([[3e-30, 4e-30], [0.0, 0.0], [3.0, 4.0]], dtype=xp.float32)
    sums = np.asarray(to_numpy(xp.sum(rows * rows, axis=1)), dtype=np.float64)
    np.testing.assert_allclose(at_most(sums, xp, rows), [32e-60, 0, 25], rtol=1e-6)


@pytest.mark.parametrize(("batch", "most"), [(1, 20), (3, 30)], ids=["swept", "together"])
def test_states_whose_squares_underflow_are_not_accepted_unseen(batch: int, most: int) -> None:
    scale, rule, grid = np.float32(1e-24), Table(0.5, 0.25), np.arange(30)[::-1].copy()
    x_T = normal((batch, 4)).astype(np.float32) * scale

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        return (2 * x / (1 + (x / scale) ** 2)).astype(np.float32)

    got = solve(network, x_T, grid, rule, 10, tolerance=1e-3)
    expected = solve_sequential(network, x_T, grid, rule).sample
    assert relative(got.sample / scale, expected / scale) < 1e-3
    assert got.stats.rounds <= most


@pytest.mark.parametrize(("batch", "dtype"), [(1, np.float32), (3, np.float32), (3, np.float64)])
@pytest.mark.parametrize("tolerance", [0.3, 1e-3, 0.0])
@pytest.mark.parametrize("share", [0.1, 1e-22])
def test_data_below_the_rounding_of_the_noise(batch: int, dtype: Any, tolerance: float, share: float) -> None:
    """A guess of the slope times a move of rounding would be far more than the data are."""

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:  # predicts the sample
        return (size * (np.tanh(3 * x) + t[:, None])).astype(x.dtype)

    size = share * float(np.finfo(dtype).eps)
    rule, grid, x_T = DPMSolver(FLOW, prediction_type="sample", order=3), FLOW.timesteps(21), normal((batch, 6))
    got = solve(network, x_T.astype(dtype), grid, rule, 4, tolerance=tolerance).sample
    expected = solve_sequential(network, x_T.astype(dtype), grid, rule).sample
    assert relative(got / size, expected / size) < max(tolerance, 1e-5)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_beliefs_do_not_keep_the_rounding_of_a_wild_start(size: float) -> None:
    """A belief is what the network said, not what was believed and the difference. No move would tell of it."""
    rule, grid, x_T = Table(1.0, 0.1), np.arange(23)[::-1].copy(), normal((2, 4))
    network = lambda x, t: np.ones_like(x)  # noqa: E731
    start = size * normal((24, 2, 4), seed=3)
    got = solve(network, x_T, grid, rule, 23, tolerance=1e-3, start=start)
    assert got.stats.rounds < 5
    assert relative(got.sample, solve_sequential(network, x_T, grid, rule).sample) < 1e-15


@pytest.mark.parametrize("size", [1e3, 1e5])
def test_the_estimate_holds_the_rounding_that_a_wild_start_leaves(size: float) -> None:
    """Beside a tolerance it is not worth making the states again, and no move tells of it."""
    rule, grid, x_T = Table(0.9, 0.3), np.arange(23)[::-1].copy(), np.abs(normal((2, 4)))
    network = lambda x, t: np.ones_like(x)  # noqa: E731
    start = size * np.abs(normal((24, 2, 4), seed=3))
    got = solve(network, x_T, grid, rule, 6, tolerance=1e-1, start=start)
    expected = solve_sequential(network, x_T, grid, rule).sample
    for sample in range(2):
        error = relative(got.sample[sample], expected[sample])
        assert 0 < error < got.error_estimate[sample] < 1e-14 * size


@pytest.mark.parametrize("width", [5, 9])
def test_new_nodes_follow_from_states_that_were_made_again(width: int) -> None:
    """Else no correction finds what the states before them had kept of the rounding of a wild start."""
    rule, grid, x_T = Table(0.9, 0.1), np.arange(23)[::-1].copy(), normal((3, 6)).astype(np.float32)
    start = (1e5 * normal((24, 3, 6), seed=9)).astype(np.float32)
    network = lambda x, t: np.tanh(x)  # noqa: E731
    got = solve(network, x_T, grid, rule, width, tolerance=1e-4, start=start)
    assert got.stats.rounds < 23
    assert relative(got.sample, solve_sequential(network, x_T, grid, rule).sample) < 1e-4


@pytest.mark.parametrize("batch", [1, 3])
def test_copies_of_a_state_do_not_pass_over_a_step_that_reads_no_output(batch: int) -> None:
    """No output makes such a step end where it begins, so its copy would be off for good, and no move would tell."""

    class Gaps(Table):
        def recurrence(self, timesteps: np.ndarray) -> Recurrence:
            recurrence = super().recurrence(timesteps)
            return replace(recurrence, b=recurrence.b * (np.arange(len(timesteps)) % 3 != 0)[:, None])

    rule, grid, x_T = Gaps(0.7, 0.5), np.arange(12)[::-1].copy(), normal((batch, 4))
    network, method = lambda x, t: np.ones_like(x), Method(fill="copy")
    got = solve(network, x_T, grid, rule, 6, tolerance=1e-2, method=method).sample
    assert relative(got, solve_sequential(network, x_T, grid, rule).sample) < 1e-2


def test_no_slope_makes_a_step_the_identity_that_reads_differences() -> None:
    a, p, q = np.full((2, 1), 0.9), np.zeros(2), np.ones(2)
    b = np.array([[0.5, 0.0], [0.5, -0.4999]])
    np.testing.assert_allclose(identity_slope(a, b, p, q), [0.2, np.nan])
    for order in (2, 3):
        recurrence = DPMSolver(LINEAR, order=order).recurrence(LINEAR.timesteps(50))
        assert np.all(recurrence.identity_slope != 0)


@pytest.mark.parametrize("steps", [200, 1000])
@pytest.mark.parametrize("size", [0.01, 0.001])
def test_nodes_that_are_spread_know_small_data(size: float, steps: int) -> None:
    network, x_T, grid = Points(LINEAR, "epsilon", size), normal((40, 8), seed=0), LINEAR.timesteps(steps)
    got = solve(network, x_T, grid, DDIM(LINEAR), 16, tolerance=1e-2)
    assert any(np.any(np.diff(one.nodes) > 1) for record in got.stats.history for one in record.samples)
    expected = solve_sequential(network, x_T, grid, DDIM(LINEAR)).sample
    errors = np.array([relative(a, b) for a, b in zip(got.sample, expected, strict=True)])
    assert np.mean(errors <= 1e-2) >= 0.95, sorted(errors)[-4:]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("batch", "steps", "tolerance"), [(1, 12, 1e-2), (3, 12, 1e-2), (3, 12, 0.0), (2, 200, 1e-2)])
@pytest.mark.parametrize("method", ["secant", "identity", "parataa", "paradigms"])
def test_the_estimate_of_a_parallel_run_is_at_least_rounding(
    method: str, batch: int, steps: int, tolerance: float, dtype: Any
) -> None:
    """The network says the same everywhere, so nothing moves after the first round."""
    rule, grid, x_T = DDIM(LINEAR, prediction_type="sample"), LINEAR.timesteps(steps), normal((batch, 4)).astype(dtype)
    network = lambda x, t: np.full_like(x, 0.3)  # noqa: E731
    got = solve(network, x_T, grid, rule, 6, tolerance=tolerance, method=method)
    assert np.all(got.error_estimate >= np.finfo(dtype).eps)
    assert np.all(got.error_estimate <= max(tolerance, 1e3 * np.finfo(dtype).eps))
    one = solve(network, x_T, grid, rule, 1, tolerance=tolerance, method=method)
    plain = solve_sequential(network, x_T, grid, rule)
    np.testing.assert_array_equal([one.error_estimate, plain.error_estimate], np.zeros((2, batch)))


@pytest.mark.parametrize("method", ["secant", "identity"])
def test_rounding_that_the_sampler_amplifies_is_told(method: str) -> None:
    """By as much as the plain loop makes of a change of x_T in the last place: 1e7 times as much as it was."""
    rule, grid, x_T = DDIM(KARRAS, prediction_type="epsilon"), KARRAS.timesteps(16), 0.8 * normal((2, 4))
    network = lambda x, t: -0.81 * (x - np.floor(x))  # noqa: E731
    got = solve(network, x_T, grid, rule, 8, tolerance=1e-3, method=method)
    plain = solve_sequential(network, x_T, grid, rule).sample
    shaken = relative(solve_sequential(network, np.nextafter(x_T, np.inf), grid, rule).sample, plain)
    assert 1e-10 < relative(got.sample, plain) < 10 * shaken < 1e-7
    assert np.all(got.error_estimate >= np.finfo(np.float64).eps)


@pytest.mark.parametrize(("batch", "warmup_steps"), [(1, 0), (1, 12), (3, 0), (3, 12)])
@pytest.mark.parametrize("method", ["secant", "identity"])
def test_a_network_that_the_rounding_of_its_input_decides(method: str, batch: int, warmup_steps: int) -> None:
    """The last place of x_T decides of the sample, in the plain loop, so that an estimate of 0 would be no one's."""
    rule, grid, x_T = Table(0.5, 0.5), np.arange(23)[::-1].copy(), normal((batch, 1)).astype(np.float32)
    network = lambda x, t: np.float32(1e8) * (x - np.floor(x))  # noqa: E731
    plain = solve_sequential(network, x_T, grid, rule).sample
    assert relative(solve_sequential(network, np.nextafter(x_T, np.float32(9)), grid, rule).sample, plain) > 0.5
    options: dict[str, Any] = {"tolerance": 1e-2, "method": method, "warmup_steps": warmup_steps, "check": False}
    assert np.all(solve(network, x_T, grid, rule, 12, **options).error_estimate >= np.finfo(np.float32).eps)


@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
@pytest.mark.parametrize(("batch", "size"), [(1, 4), (3, 4), (8, 4), (8, 16)])
def test_a_sample_of_zero_is_zero(batch: int, size: int, tolerance: float) -> None:
    """The slope of a network that says 0 is 0, not what rounding leaves of a first guess."""
    rule, grid = Euler(LINEAR, prediction_type="sample"), LINEAR.timesteps(30)
    x_T = normal((batch, size)).astype(np.float32)

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        return np.float32(-0.09) * x * (t > 1.5 * grid[-1])[:, None]

    plain = solve_sequential(network, x_T, grid, rule, save="trajectory").trajectory
    assert plain is not None
    start = (plain * (1 + 0.01 * normal(plain.shape, seed=2))).astype(np.float32)
    got = solve(network, x_T, grid, rule, 12, tolerance=tolerance, start=start)
    assert got.stats.rounds < 12
    np.testing.assert_array_equal(got.sample, np.zeros((batch, size)))


GROWING = (Table(0.9, 1.0, 1.0, -1.0), Table(0.9, 0.5, 1.0, -0.5), Table(0.5, -0.3, 1.0, 0.2))  # 1.9 a step, and 2


@pytest.mark.parametrize("rule", GROWING, ids=["1.9", "1.9 too", "2"])
@pytest.mark.parametrize(("steps", "window"), [(40, 40), (40, 12), (120, 40)])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-5])
def test_what_is_held_may_let_states_grow_that_the_sampler_does_not(
    rule: Table, steps: int, window: int, tolerance: float, xp: Any
) -> None:
    """While predictions are held a state doubles with each step; together with the network's answers none does.

    Rounding must then grow as the sampler lets it, and nodes that are spread over all steps would know nothing.
    """
    grid, x_T = np.arange(steps)[::-1].copy(), normal((3, 8), xp, "float32")

    def network(x: Any, t: Any) -> Any:
        return 0.05 * xp.sin(3 * x) + 0.1

    want = solve_sequential(network, x_T, grid, rule).sample
    got = solve(network, x_T, grid, rule, window, tolerance=tolerance)
    assert relative(got.sample, want) < tolerance
    assert got.stats.rounds < steps / 2
    assert HeldForm(rule.recurrence(grid)).growth() == pytest.approx((2.0 if rule.a < 0.9 else 1.9) ** steps)


def test_how_states_grow_while_predictions_are_held() -> None:
    """Each change by itself: with two states read, 1, 1.5, 1.25, .., whatever the sampler makes of the outputs."""
    n, zero = 12, np.zeros(12)
    a = np.tile([1.5, -1.0], (n, 1))
    a[0, 1] = 0.0
    table = Recurrence(np.arange(n), a, np.ones((n, 1)), zero, np.tile([0.0, 1.0], (n, 1)), zero, zero)
    changes = [0.0, 1.0]
    for _ in range(n):
        changes.append(1.5 * changes[-1] - changes[-2])
    assert HeldForm(table).growth() == pytest.approx(max(np.abs(changes)))
    assert HeldForm(DDIM(LINEAR).recurrence(LINEAR.timesteps(50))).growth() == 1.0  # which only forgets


@pytest.mark.parametrize("method", ["secant", "identity", "paradigms", "parataa"])
def test_the_estimate_is_at_least_rounding_where_all_sums_leave_the_range(method: str) -> None:
    """Then only first nodes are final, one a round, and nothing is known of the others."""
    large = np.float32(1e19)

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        return large * np.tanh(x / large)

    x_T = large * normal((2, 6)).astype(np.float32)
    with pytest.warns(UserWarning, match=r"x_T: has an RMS of 7.05e\+18, far larger"):
        got = solve(network, x_T, LINEAR.timesteps(20), DDIM(LINEAR), 8, method=method, tolerance=0.0)
    assert got.stats.rounds == 20
    assert got.error_estimate.min() >= np.finfo(np.float32).eps
