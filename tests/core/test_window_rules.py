"""What a window that slides asks of its acceptance, of noise and of outputs out of range; swept, and together."""

from typing import Any

import numpy as np
import pytest

from parasolver_core import (
    DDIM,
    DDPM,
    Identity,
    Method,
    NoiseSchedule,
    ParallelIntegralSolver,
    Recurrence,
    Status,
    StepRule,
    solve,
    solve_sequential,
)
from parasolver_core.rounds.acceptance import Acceptance, RoundView
from tests.core.any_tables import small_data
from tests.core.problems import Rational, TanhNetwork, normal

SCHEDULE = NoiseSchedule.linear()
BATCHES = pytest.mark.parametrize("batch", [1, 2], ids=["swept", "together"])


class Seeing(Acceptance):
    """Takes one node a round, and keeps what it was shown."""

    def __init__(self) -> None:
        self.views: list[RoundView] = []

    def bounds(self, recurrence: Recurrence) -> np.ndarray:
        return np.arange(1.0, len(recurrence) + 1)

    def accept(self, view: RoundView, tolerance: float) -> tuple[int, float]:
        self.views.append(view)
        return 1, 0.0


def begun(rule: Any, batch: int, network: Any, *, width: int = 14, dtype: str = "float64", **options: Any) -> Any:
    seeing = Seeing()
    method = Method(acceptance=seeing, spread=False)
    solver = ParallelIntegralSolver(rule, width, tolerance=0.01, method=method, check=False, **options)
    state = solver.init(network, normal((2, 5), dtype=dtype)[:batch], SCHEDULE.timesteps(14), seed=3)
    return solver, state, state.runs[0], seeing  # type: ignore[union-attr]


@BATCHES
def test_an_acceptance_is_shown_sizes_bounds_and_how_small_the_data_are(batch: int) -> None:
    rule = DDIM(SCHEDULE, prediction_type="sample")
    outputs: list[np.ndarray] = []

    def network(x: Any, t: Any) -> Any:
        outputs.append(0.02 * np.tanh(x))
        return outputs[-1]

    solver, state, run, seeing = begun(rule, batch, network)
    recurrence = rule.recurrence(SCHEDULE.timesteps(14))
    for number in range(3):
        inputs, n = np.array(run.inputs), len(run.nodes) // batch
        solver.step(state)
        for sample in range(batch):
            view = seeing.views[number * batch + sample]
            x, m = inputs[sample * n : sample * n + n], outputs[-1][sample * n : sample * n + n]
            nodes = np.arange(number, number + n)
            assert view.lo == number
            np.testing.assert_allclose(view.size, np.sqrt(np.mean(x**2, axis=1)), rtol=1e-12)
            np.testing.assert_array_equal(view.bound, nodes + 1)
            small = small_data(recurrence).smallness(nodes[-1], np.mean(m[-1] ** 2), np.mean(x[-1] ** 2))[nodes]
            np.testing.assert_allclose(view.smallness, small, rtol=1e-10)
            assert (small.min() < 0.1) == (number > 0)  # in the first round no prediction tells of the sample
            assert view.move[0] == 0
            assert view.rounding == 8 * np.finfo(np.float64).eps


@BATCHES
@pytest.mark.parametrize(
    ("dtype", "coarse", "unit"),
    [("float64", False, np.float64), ("float64", True, np.float32), ("float32", False, np.float32)],
)
def test_rounding_is_that_of_the_network_where_it_is_coarser(batch: int, dtype: str, coarse: bool, unit: Any) -> None:
    def network(x: Any, t: Any) -> Any:
        return np.tanh(x).astype(np.float32).astype(np.float64) if coarse else np.tanh(x)

    solver, state, run, seeing = begun(DDIM(SCHEDULE), batch, network, dtype=dtype)
    solver.step(state)
    solver.step(state)
    eps = float(np.finfo(unit).eps)
    assert {view.rounding for view in seeing.views} == {8 * eps}
    assert run.errors.tolist() == [eps] * batch  # the least that is told


@BATCHES
def test_noise_that_the_next_round_is_likely_to_read(batch: int) -> None:
    """Of the steps behind the last node, as many as the window holds, and then as were final in a round."""
    solver, state, run, _ = begun(DDPM(SCHEDULE), batch, TanhNetwork(5), width=6)
    last = run.nodes.max()
    c = DDPM(SCHEDULE).recurrence(SCHEDULE.timesteps(14)).c
    assert c[13] == 0
    assert run.upcoming == [(i, s) for i in range(last, last + 6) if i < 14 and c[i] for s in range(batch)]
    for _ in range(8):
        solver.step(state)
        last = run.nodes.max()
        assert run.upcoming == [(last, s) for s in range(batch) if c[last]]
    assert last == 13
    solver, state, run, _ = begun(DDIM(SCHEDULE), batch, TanhNetwork(5), width=6)
    assert run.upcoming == []


@BATCHES
def test_steps_whose_squares_run_out_of_range_are_made_one_by_one(batch: int) -> None:
    """As the plain loop makes them, which squares nothing; where numbers are small again the window opens."""

    def large(x: Any, t: Any) -> Any:
        return np.where(t[:, None] > 600, 1e200, 0.0) + 0.1 * x

    arguments = (large, normal((2, 5))[:batch], SCHEDULE.timesteps(14), DDIM(SCHEDULE))
    exact = solve_sequential(*arguments)
    method = Method(spread=False)
    got = solve(*arguments, 4, tolerance=0.0, method=method, check=False)
    np.testing.assert_allclose(got.sample, exact.sample, rtol=1e-9)
    alone = [one for part in got.stats.history for one in part.samples if np.isnan(one.residuals).any()]
    assert alone
    assert {one.accepted for one in alone} == {1}


@BATCHES
@pytest.mark.parametrize(("value", "status"), [(np.nan, "nonfinite_model"), (1.5e308, "nonfinite_solver")])
@pytest.mark.parametrize("fill", ["held", "evaluated", "copy"])
def test_a_step_that_is_not_finite_ends_the_sample_where_it_is(
    batch: int, value: float, status: str, fill: Any
) -> None:
    def broken(x: Any, t: Any) -> Any:
        return np.where(t[:, None] < 500, value, np.tanh(x))

    arguments = (broken, normal((2, 5))[:batch], SCHEDULE.timesteps(8), DDIM(SCHEDULE))
    exact = solve_sequential(*arguments, throw=False)
    method = Method(spread=False, fill=fill)
    got = solve(*arguments, 3, tolerance=0, method=method, throw=False, check=False)
    assert {one.value for one in got.statuses} == {status}
    assert got.steps == exact.steps
    assert got.message.split(" in round ")[0] == exact.message.split(" in round ")[0]
    np.testing.assert_allclose(got.states, exact.states, rtol=1e-10)
    last = got.stats.history[-1].samples[0]
    assert last.accepted == 0
    assert np.isnan(last.residuals[0]) or status == "nonfinite_solver"


class LastStepOverflows(StepRule):
    def recurrence(self, timesteps: np.ndarray) -> Recurrence:
        n = len(timesteps)
        b = np.full((n, 1), 0.1)
        b[-1] = 1e300
        return Recurrence(np.asarray(timesteps), np.full((n, 1), 0.9), b, np.zeros(n))


@BATCHES
@pytest.mark.parametrize("tolerance", [0.0, 0.9])
@pytest.mark.parametrize("window", [3, 9])
def test_a_last_step_that_overflows_leaves_the_state_before_it(batch: int, tolerance: float, window: int) -> None:
    def network(x: Any, t: Any) -> Any:
        return 1e10 * (np.arange(5) == 2) + np.tanh(x)  # of one element

    arguments = (network, normal((2, 5))[:batch], np.arange(9.0), LastStepOverflows())
    exact = solve_sequential(*arguments, throw=False, save="trajectory")
    method = Method(spread=False)
    got = solve(*arguments, window, tolerance=tolerance, method=method, throw=False, check=False, save="trajectory")
    for one in (exact, got):
        assert one.statuses == (Status.NONFINITE_SOLVER,) * batch
        assert f"sample 0 at step {one.steps[0]} (timestep {one.steps[0]:.1f})" in one.message
        assert one.trajectory is not None
        np.testing.assert_array_equal(one.trajectory[one.steps[0]], one.states)
        assert np.isnan(one.trajectory[one.steps[0] + 1 :]).all()
    assert exact.steps == (8,) * batch
    if batch == 1 or tolerance == 0:  # samples that move together lose the whole round, of several steps then
        assert got.steps == exact.steps
        scale = np.abs(exact.states).max()  # of which the rounding is
        np.testing.assert_allclose(got.states, exact.states, rtol=0, atol=(0.5 if tolerance else 1e-15) * scale)


@pytest.mark.parametrize("fill", ["held", "evaluated", "copy"])
def test_large_states_go_on_as_small_ones_of_which_they_are_copies(fill: Any) -> None:
    """With slopes that do not change, as of those a part of the elements is asked."""
    method = Method(linearization=Identity(), spread=False, fill=fill)
    small, times = normal((1, 5)), 2000

    def run(start: Any) -> list[np.ndarray]:
        solver = ParallelIntegralSolver(DDIM(SCHEDULE), 5, tolerance=0, method=method, check=False)
        state = solver.init(Rational(), start, SCHEDULE.timesteps(12))
        found = []
        for _ in range(6):
            found.append(np.array(state.runs[0].inputs))  # type: ignore[union-attr]
            solver.step(state)
        return [*found, np.array(state.estimate())]

    for one, many in zip(run(small), run(np.tile(small, times)), strict=True):
        np.testing.assert_allclose(many, np.tile(one, times), rtol=1e-10, atol=1e-12)
