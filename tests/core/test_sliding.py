"""Which window takes samples that slide, and what is filled in where they begin."""

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from parasolver_core import DDIM, DDPM, DPMSolver, Method, NoiseSchedule, ParallelIntegralSolver, solve_sequential
from parasolver_core.guesses.fill import Along, Copies, Held, Interpolated
from parasolver_core.guesses.forecast import AlongTrajectory, BetweenNodes
from parasolver_core.methods.levels import interpolation
from parasolver_core.methods.sample_window import SampleWindow
from parasolver_core.methods.sliding import Outlook, Sliding
from parasolver_core.methods.warm_start import near_trajectory
from parasolver_core.methods.window_batch import WindowBatch
from parasolver_core.planning import auto
from parasolver_core.planning.costs import CostTable
from parasolver_core.planning.prediction import Prediction
from tests.arrays import on_a_device
from tests.core.any_tables import any_table
from tests.core.problems import TanhNetwork, normal
from tests.core.test_learning import Given

SCHEDULE = NoiseSchedule.linear()


def state_of(shape: tuple[int, ...], rule: Any = None, xp: Any = None, tolerance: float = 0.01, **options: Any) -> Any:
    chosen = {name: options.pop(name) for name in ("method", "window") if name in options}
    solver = ParallelIntegralSolver(
        rule or DDIM(SCHEDULE), chosen.pop("window", 4), tolerance=tolerance, check=False, **chosen
    )
    return solver.init(TanhNetwork(shape[1]), normal(shape, xp), SCHEDULE.timesteps(8), seed=1, **options)


@pytest.mark.parametrize(
    ("shape", "tolerance", "swept"),
    [
        ((1, 5), 0.01, 1),
        ((2, 5), 0.01, 0),
        ((2, 5), 0.0, 2),
        ((2, 2**13), 0.01, 0),  # 2^15 elements in a window of 4
        ((2, 2**13 + 1), 0.01, 2),
    ],
)
def test_single_samples_large_states_and_exact_runs_are_swept(
    shape: tuple[int, int], tolerance: float, swept: int
) -> None:
    state = state_of(shape, tolerance=tolerance) if shape[1] < 99 else large(shape, tolerance)
    kinds = [type(run) for run in state.runs]
    assert kinds == ([SampleWindow] * swept or [WindowBatch])
    assert np.concatenate([run.samples for run in state.runs]).tolist() == [*range(shape[0])]


def large(shape: tuple[int, int], tolerance: float) -> Any:
    solver = ParallelIntegralSolver(DDIM(SCHEDULE), 4, tolerance=tolerance, check=False)
    return solver.init(lambda x, t: x, normal(shape), SCHEDULE.timesteps(8))


def test_states_and_estimates_are_of_the_users_library(xp: ModuleType) -> None:
    for shape in ((1, 5), (2, 5)):
        state = state_of(shape, xp=xp)
        for array in (state.states, state.estimate(), state.runs[0].inputs, state.runs[0].states()):
            assert type(array) is type(state.x_T)


@pytest.mark.parametrize(
    ("value", "sane"), [(1e6, True), (-1e6, True), (1.001e6, False), (-1.001e6, False), (np.nan, False)]
)
@pytest.mark.parametrize("step", [0, 4, 8])
def test_a_warm_start_that_is_wild_is_left_alone(value: float, sane: bool, step: int) -> None:
    trajectory = np.ones((9, 3, 5))
    trajectory[step, 1, 2] = value
    shared = state_of((3, 5))._shared
    sliding = Sliding(shared, trajectory)
    assert isinstance(sliding._fill(np.arange(3), None, None), Along if sane else Held)
    assert isinstance(sliding._fill(np.array([0]), None, None), Along)  # of the others nothing is asked


@pytest.mark.parametrize(("latest", "before", "kind"), [(0.02, 0.08, Held), (0.08, 0.02, Along)])
def test_a_warm_start_whose_predictions_grow_is_left_alone(latest: float, before: float, kind: type) -> None:
    """Of a step that gives the latest prediction a quarter of the one before, rounding grows fourfold each time."""
    n, shape = 30, (2, 5)
    table = any_table(
        n, 1, 2, noisy=False, a=np.full((n, 1), 0.95), b=np.tril(np.tile([latest, before], (n, 1))), slope=np.zeros(n),
        held=np.tile([0.0, 1.0], (n, 1)),
    )  # fmt: skip
    x_T, network = torch.from_numpy(normal(shape)).float(), lambda x, t: torch.tanh(2 * x) - 0.3
    arguments = (network, x_T, table.timesteps, Given(table))
    plain = solve_sequential(*arguments, save="trajectory")
    with on_a_device():
        solver = ParallelIntegralSolver(Given(table), 12, tolerance=0.0, method="identity", check=False)
        state = solver.init(*arguments[:3], start=plain.trajectory)
        assert isinstance(state.runs[0]._fill, kind)
        got = solver.solve(*arguments[:3], start=plain.trajectory, save="trajectory")
    torch.testing.assert_close(got.trajectory, plain.trajectory, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("fill", "kind"), [("held", Held), ("evaluated", Held), ("copy", Copies)])
def test_without_a_warm_start_nodes_begin_as_the_method_says(fill: Any, kind: type) -> None:
    shared = state_of((2, 5), method=Method(spread=False, fill=fill))._shared
    found = Sliding(shared, None)._fill(np.arange(2), None, None)
    assert type(found) is kind
    if kind is Held:
        assert found.uncorrected == (fill == "evaluated")


@pytest.mark.parametrize("rule", [DDIM(SCHEDULE), DDPM(SCHEDULE), DPMSolver(SCHEDULE, 3)], ids=["1", "noise", "3"])
def test_predictions_of_a_warm_start_are_those_that_made_its_steps(rule: Any) -> None:
    arguments = (TanhNetwork(5), normal((3, 5)), SCHEDULE.timesteps(8), rule)
    trajectory = solve_sequential(*arguments, seed=1, save="trajectory").trajectory
    shared = state_of((3, 5), rule)._shared
    along = near_trajectory(shared, trajectory, np.array([2, 0]))
    assert along is not None
    states, predictions = along._states, along._predictions
    assert states.shape == (2, 9, 5)
    assert predictions.shape == (2, 8, 5)
    for row, sample in enumerate((2, 0)):
        x = np.asarray(trajectory)[:, sample]
        np.testing.assert_array_equal(states[row], x)
        p, q = shared.recurrence.held.T[..., None]
        m = TanhNetwork(5)(x[:-1], np.asarray(shared.recurrence.timesteps))
        np.testing.assert_allclose(predictions[row], p * x[:-1] + q * m, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("count", [1, 2])
def test_windows_go_on_from_what_spread_nodes_have_found(count: int) -> None:
    shared = state_of((3, 5))._shared
    weights = interpolation(np.arange(8), np.array([0, 7]))
    outlook = Outlook(weights, normal((count, 2, 5)), np.arange(8.0 * count).reshape(count, 8))
    sliding, start = Sliding(shared, None), normal((3, 5))[[2, 0][:count]]
    (run,) = sliding(np.array([2, 0][:count]), start, outlook)
    if count == 1:
        assert isinstance(run, SampleWindow)
        assert isinstance(run._forecast, BetweenNodes)
        np.testing.assert_array_equal(run._forecast.predictions, outlook.predictions[0])
        np.testing.assert_array_equal(run._slope, outlook.slope[0])
    else:
        assert isinstance(run, WindowBatch)
        assert isinstance(run._fill, Interpolated)
        np.testing.assert_array_equal(run._windows._slope[:, :8], outlook.slope)
    np.testing.assert_array_equal(run.states(), start)
    warm = Sliding(shared, np.ones((9, 3, 5)))(np.array([1]), normal((1, 5)))[0]
    assert isinstance(warm, SampleWindow)
    assert isinstance(warm._forecast, AlongTrajectory)


@pytest.mark.parametrize(("took", "told"), [(0.099, False), (0.2, True)])
@pytest.mark.parametrize("given", [None, CostTable.of({1: 1.0})])
def test_timing_that_takes_longer_than_a_tenth_of_the_run_is_told(
    took: float, told: bool, given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    best = Prediction(4, 1, 1, 5.0, 20.0, 0.75, 0.25)

    def choose(key: Any, choose_now: Any) -> Any:
        clock[0] += took
        return best, Prediction(1, 1, 1, 8.0, 8.0, 2.0, 0.0)

    monkeypatch.setattr(auto, "remembered", choose)
    solver: Any = ParallelIntegralSolver(DDIM(SCHEDULE), 2)
    problem = (TanhNetwork(5), normal((1, 5)), SCHEDULE.timesteps(8), DDIM(SCHEDULE))
    found, said = auto.choose_window(problem, solver, given, {"seed": None, "noise": None, "start": None})
    assert found is best
    sentence = " Timing the network took 200 ms; later runs remember it."
    assert said.endswith(sentence) == (told and given is None)
    assert said.startswith('window="auto" chose a window of 4: 5 rounds in 1 s')


def test_so_many_choices_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "_MADE", {})
    made = SimpleNamespace(count=0)

    def choice() -> Any:
        made.count += 1
        return made.count

    for number in range(256):
        auto.remembered(number, choice)
    assert auto.remembered(0, choice) == 1
    auto.remembered(256, choice)  # all others are forgotten
    assert auto.remembered(256, choice) == 257
    assert auto.remembered(0, choice) == 258
