"""Only the first node of a window has its true input: what a network says to a guess ends no sample."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import array_api_compat
import numpy as np
import pytest
import torch

from parasolver_core import (
    DDIM,
    DDPM,
    Euler,
    Method,
    NoiseSchedule,
    ParallelIntegralSolver,
    Status,
    StepRule,
    solve,
    solve_sequential,
)
from parasolver_core.methods.sample_window import SampleWindow
from tests.arrays import to_numpy
from tests.core.problems import Mixture, normal, relative

TABLE = NoiseSchedule.linear()
GRID = TABLE.timesteps(20)
NAN, INF = float("nan"), float("inf")


def bounded(limit: float) -> Callable[[Any, Any], Any]:
    """Finite as far as ``limit``, and NaN beyond."""

    def network(x: Any, t: Any) -> Any:
        xp = array_api_compat.array_namespace(x)
        y = 0.9 * x + 0.5 * xp.sin(6 * x)
        return xp.where(xp.abs(x) > limit, xp.asarray(NAN, dtype=x.dtype), y)

    return network


@pytest.mark.parametrize("method", ["secant", "identity", "paradigms", "parasolver", "parataa"])
@pytest.mark.parametrize(("steps", "window", "tolerance"), [(20, 8, 0.0), (20, 20, 0.05), (40, 12, 0.03)])
def test_what_a_network_says_to_a_guess_ends_no_sample(
    xp: ModuleType, method: str, steps: int, window: int, tolerance: float
) -> None:
    x_T, grid, rule = normal((2, 6), xp, seed=3), NoiseSchedule.linear().timesteps(steps), DDIM(NoiseSchedule.linear())
    way = solve_sequential(bounded(INF), x_T, grid, rule, save="trajectory")
    network = bounded(1.2 * float(np.max(np.abs(to_numpy(way.trajectory)))))
    got = solve(network, x_T, grid, rule, window, tolerance=tolerance, method=method)
    assert got.stats.rounds <= steps
    assert np.all(np.isfinite(got.error_estimate))
    if method in ("secant", "identity"):
        assert relative(got.sample, way.sample) <= max(tolerance, 1e-10)


@pytest.mark.parametrize("rule", [DDIM(TABLE), DDPM(TABLE)])
@pytest.mark.parametrize(("batch", "tolerance"), [(1, 0.0), (1, 1e-2), (2, 1e-2)])
def test_copies_are_what_the_network_is_given_first(rule: StepRule, batch: int, tolerance: float) -> None:
    """Beliefs that make the state behind each node the same again, the noise of its step included."""
    x_T, calls = normal((batch, 6), seed=3), []

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        calls.append(x.copy())
        return np.tanh(x)

    solver = ParallelIntegralSolver(rule, window=8, tolerance=tolerance, method=Method(spread=False, fill="copy"))
    state = solver.init(network, x_T, GRID, seed=1)
    (run,) = state.runs
    if isinstance(run, SampleWindow):
        for node in range(8):
            np.testing.assert_allclose(run._correction.behind(node), x_T[0], rtol=1e-12, atol=1e-12)
    solver.step(state)
    np.testing.assert_allclose(calls[0], np.repeat(x_T, 8, axis=0), rtol=1e-12, atol=1e-12)


def test_outputs_that_are_not_finite_are_left_out_where_nodes_are_spread() -> None:
    """The nodes go on without them: no window that slides over all steps."""
    x_T, grid, rule = normal((1, 6), seed=3), TABLE.timesteps(400), DDIM(TABLE)
    healthy, calls = Mixture(TABLE, "epsilon"), 0

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        return np.where((calls == 3) & (t[:, None] < 500), NAN, healthy(x, t))

    whole = solve(healthy, x_T, grid, rule, 20, check=False)
    got = solve(network, x_T, grid, rule, 20, check=False)
    assert relative(got.sample, solve_sequential(healthy, x_T, grid, rule).sample) <= 1e-2
    assert got.stats.rounds <= whole.stats.rounds + 3 < 20
    assert np.isnan(got.stats.history[2].samples[0].defects[-1])


@pytest.mark.parametrize("steps", [20, 60])
def test_a_guess_beyond_the_range_of_float16_ends_no_sample(steps: int) -> None:
    """States are float32: cast for the network, a guess may become infinite."""
    schedule = NoiseSchedule.karras(1.0, 80.0)
    x_T = torch.asarray(80 * normal((2, 6)), dtype=torch.float16)
    network = lambda x, t: x - torch.clamp(x, -3, 3) * 350 * torch.sin(x / 10)  # noqa: E731
    grid, rule = schedule.timesteps(steps), Euler(schedule)
    expected = solve_sequential(network, x_T, grid, rule, throw=False)
    got = solve(network, x_T, grid, rule, 16, tolerance=0, check=False, throw=False)
    assert got.statuses == expected.statuses


def test_nan_in_an_element_that_stands_for_no_other_is_seen() -> None:
    """Of a large state on a CPU only stripes are compared with belief; the sums of the moves see all of it."""
    x_T, rule = normal((1, 9000)), DDIM(TABLE)

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        out = x / (1 + x * x)
        out[t == GRID[7], 4000] = NAN
        return out

    got = solve(network, x_T, GRID, rule, 6, throw=False)
    assert (got.status, got.steps) == (Status.NONFINITE_MODEL, (7,))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("seed", range(12))
def test_a_move_that_is_no_number_is_not_small(seed: int) -> None:
    """Outputs near 1e19, whose squares overflow in float32, and a start that is near: never wrong and "Converged"."""
    rng = np.random.default_rng(seed)
    schedule, steps = NoiseSchedule.karras(0.02, 80.0), int(rng.integers(2, 6))
    x_T = (80 * rng.standard_normal((1, 6))).astype(np.float32)
    network = lambda x, t: x - x * x * x  # noqa: E731
    grid, rule = schedule.timesteps(steps), Euler(schedule)
    expected = solve_sequential(network, x_T, grid, rule, save="trajectory", throw=False)
    if expected.success:
        start = expected.trajectory * (1 + 0.01 * rng.standard_normal(expected.trajectory.shape))
        got = solve(network, x_T, grid, rule, steps, tolerance=0, start=start.astype(np.float32), throw=False)
        assert not got.success or relative(got.sample, expected.sample) < 1e-3


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tolerance", [0.0, 1e-2])
def test_a_last_step_that_overflows_is_not_counted(tolerance: float, batch: int) -> None:
    schedule = NoiseSchedule.karras(5.0, 80.0)
    rule, grid = Euler(schedule, prediction_type="epsilon"), schedule.timesteps(6)
    last = lambda x, t: np.where(t[:, None] < 5.1, np.float32(3e38), np.zeros_like(x))  # noqa: E731
    x_T = normal((batch, 6)).astype(np.float32)
    got = solve(last, x_T, grid, rule, 4, tolerance=tolerance, check=False, throw=False)
    expected = solve_sequential(last, x_T, grid, rule, throw=False)
    assert got.statuses == expected.statuses == (Status.NONFINITE_SOLVER,) * batch
    assert got.steps == expected.steps == (5,) * batch
    assert "The solver's own arithmetic overflowed" in got.message
    assert "Use a wider dtype or a smaller window." in got.message
    np.testing.assert_allclose(got.states, expected.states, rtol=1e-6)


@pytest.mark.parametrize("tolerance", [0.0, 1e-2])
def test_a_step_that_overflows_is_not_counted(tolerance: float) -> None:
    """Its input and the output there are finite, the state behind is not: swept, and many samples together."""
    schedule = NoiseSchedule.karras(0.3, 80.0, 5.0)
    x_T, grid = normal((3, 6)).astype(np.float32), schedule.timesteps(4)
    rule = Euler(schedule, prediction_type="epsilon")
    x_T *= np.array([[1.0], [500.0], [4300.0]], dtype=np.float32) / np.abs(x_T).max(axis=1, keepdims=True)

    def cubic(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return 0.2 * x - x**3

    got = solve(cubic, x_T, grid, rule, 7, tolerance=tolerance, throw=False)
    expected = solve_sequential(cubic, x_T, grid, rule, throw=False)
    assert got.statuses == expected.statuses
    assert Status.NONFINITE_SOLVER in got.statuses
    assert got.steps == expected.steps
    counts = [0, 0, 0]
    for record in got.stats.history:
        for one in record.samples:
            counts[one.sample] += one.accepted
    assert tuple(counts) == got.steps
