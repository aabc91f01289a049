"""The loop around a run: what a round is recorded as, what a run has reached, and what is chosen where nothing is."""

import inspect
from typing import Any

import numpy as np
import pytest

from parasolver_core import (
    DDIM,
    DDPM,
    DPMSolver,
    NoiseSchedule,
    ParallelIntegralSolver,
    SequentialSolver,
    Status,
    calibrate,
    solve,
    solve_sequential,
)
from parasolver_core.denoiser.contract import SharedDenoiser
from parasolver_core.solver.sequential import SequentialState
from tests.core.problems import Counted, Rational, TanhNetwork, normal

SCHEDULE = NoiseSchedule.linear()
EMPTY = inspect.Parameter.empty


def defaults(function: Any) -> dict[str, Any]:
    return {
        name: one.default for name, one in inspect.signature(function).parameters.items() if one.default is not EMPTY
    }


NOTHING = dict.fromkeys(("seed", "noise", "max_rows", "state_device")) | {"buckets": (), "warmup_steps": 0}


def test_what_is_chosen_where_nothing_is() -> None:
    run = {"save": "sample", "start": None, "callback": None, "progress": False, "throw": True, "max_seconds": None}
    more = {"costs": None, "max_rounds": None, "subintervals": None, "memory": None, "check": True}
    own = {"window": 5, "tolerance": 1e-2, "method": "secant"}
    assert defaults(solve) == NOTHING | run | more | own
    assert defaults(ParallelIntegralSolver.solve) == {"seed": None, "noise": None} | run
    solver = ParallelIntegralSolver(DDIM(SCHEDULE))
    limits = {"max_rounds": None, "max_rows": None, "buckets": (), "state_device": None, "warmup_steps": 0}
    for name, value in (limits | own | {"check": True, "subintervals": None, "memory": None}).items():
        assert getattr(solver, name) == value
    assert defaults(calibrate) == NOTHING | {"window": 5, "tolerance": 1e-2, "progress": False}


def test_choices_are_told_without_places_in_memory() -> None:
    class Device:
        pass

    told = SequentialSolver(DDIM(SCHEDULE), max_rows=3, buckets=(1, 4), state_device=Device()).choices()
    assert told.pop("state_device").endswith("Device object>")
    assert told == {"max_rounds": "None", "max_rows": "3", "buckets": "(1, 4)", "solver": "SequentialSolver"}


@pytest.mark.parametrize("window", [1, 4])
def test_a_round_is_recorded_with_its_number_rows_and_seconds(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    rows: list[int] = []

    def network(x: Any, t: Any) -> Any:
        rows.append(len(x))
        clock[0] += len(rows)
        return np.tanh(x)

    solver = ParallelIntegralSolver(DDIM(SCHEDULE), window, check=False)
    state = solver.init(network, normal((2, 3)), SCHEDULE.timesteps(6))
    assert solver.result(state).message == "Still running: 0 of 6 steps are final after round 0."
    while not solver.done(state):
        solver.step(state)
        clock[0] += 100.0  # between the rounds
    for number, record in enumerate(state.stats.history, start=1):
        assert (record.round, record.turns, record.evaluations) == (number, 1, rows[number - 1])
        assert record.seconds == record.seconds_denoiser == number
    assert state.stats.rounds == state.stats.calls == len(rows)
    assert state.stats.evaluations == sum(rows)
    assert state.stats.seconds == sum(range(len(rows) + 1))
    with pytest.raises(RuntimeError, match="the run has ended"):
        solver.step(state)


@pytest.mark.parametrize("rounds", [1, 3, 6])
@pytest.mark.parametrize("window", [1, 4])
def test_so_many_rounds_and_no_more(window: int, rounds: int) -> None:
    arguments = (Rational(), normal((2, 3)), SCHEDULE.timesteps(6), DDIM(SCHEDULE))
    got = solve(*arguments, window, tolerance=0, max_rounds=rounds, throw=False)
    assert (got.stats.rounds, got.steps) == (rounds, (rounds, rounds))
    assert got.success == (rounds == 6)


@pytest.mark.parametrize("rule", [DDIM(SCHEDULE), DPMSolver(SCHEDULE, 3), DDPM(SCHEDULE)], ids=["1", "3", "noise"])
def test_the_plain_loop_step_by_step(rule: Any) -> None:
    """Of three samples one gives NaN at the fourth step, and another infinity at the sixth: the third goes on."""
    timesteps, x_T = SCHEDULE.timesteps(9), normal((3, 4))
    network = TanhNetwork(4)

    def failing(x: Any, t: Any) -> Any:
        out = network(x, t)
        index = np.flatnonzero(timesteps == t[0])[0]
        if index == 3:
            out[1] = np.nan
        if index == 5:
            out[0] = np.inf
        return out

    state = SequentialSolver(rule).init(failing, x_T, timesteps, seed=2, save="trajectory")
    solver = SequentialSolver(rule)
    recurrence = rule.recurrence(timesteps)
    exact = []
    for sample in range(3):
        x, m = [x_T[sample]], []
        for i in range(9):
            m.insert(0, network(x[0][None], timesteps[[i]])[0])
            z = np.reshape(state.noise(i, sample), -1) if recurrence.c[i] else None
            x.insert(0, recurrence.advance(i, x, m, z))
        exact.append(np.array(x[::-1]))
    alive = [[0, 1, 2]] * 4 + [[0, 2]] * 2 + [[2]] * 3
    ends = {0: 5, 1: 3, 2: 9}
    for i in range(9):
        assert state.foresees is False
        np.testing.assert_allclose(state.estimate(), [exact[s][min(i, ends[s])] for s in range(3)], rtol=1e-10)
        solver.step(state)
        records = state.stats.history[-1].samples
        assert [one.sample for one in records] == alive[i]
        for one in records:
            assert (one.nodes.tolist(), one.residuals.tolist(), one.defects.tolist()) == ([i], [0.0], [0.0])
            assert (one.accepted, one.error) == (int(i + 1 <= ends[one.sample]), 0.0)
    got = solver.result(state)
    assert got.steps == (5, 3, 9)
    assert got.statuses == (Status.NONFINITE_MODEL, Status.NONFINITE_MODEL, Status.CONVERGED)
    assert dict(state.failures) == {0: (5, 6), 1: (3, 4)}
    assert got.error_estimate.tolist() == [np.inf, np.inf, 0.0]
    assert got.trajectory is not None
    for sample, end in ends.items():
        np.testing.assert_allclose(got.states[sample], exact[sample][end], rtol=1e-10)
        np.testing.assert_allclose(got.trajectory[: end + 1, sample], exact[sample][: end + 1], rtol=1e-10)
        assert np.isnan(got.trajectory[end + 1 :, sample]).all()
    assert got.stats.evaluations == sum(map(len, alive))


def test_final_states_can_be_asked_for_one_by_one() -> None:
    for window in (1, 4):
        solver = ParallelIntegralSolver(DDIM(SCHEDULE), window, tolerance=0, check=False)
        state = solver.init(Rational(), normal((2, 3)), SCHEDULE.timesteps(6), save="trajectory")
        for _ in range(3):
            solver.step(state)
        exact = solve_sequential(
            Rational(), normal((2, 3)), SCHEDULE.timesteps(6), DDIM(SCHEDULE), save="trajectory"
        ).trajectory
        assert exact is not None
        for step in range(4):
            np.testing.assert_allclose(state.final(step), exact[step], rtol=1e-12)
        np.testing.assert_allclose(state.states, exact[3], rtol=1e-12)
        assert state.expected(0, 1) is None


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (np.zeros((6, 2, 3)), "of shape (6, 2, 3)"),
        (np.zeros((7, 3, 2)), "of shape (7, 3, 2)"),
    ],
)
def test_a_warm_start_has_a_state_more_than_there_are_steps(start: np.ndarray, said: str) -> None:
    arguments = (Rational(), normal((2, 3)), SCHEDULE.timesteps(6), DDIM(SCHEDULE))
    with pytest.raises(ValueError, match="start: expected a trajectory like x_T") as refused:
        solve(*arguments, 3, start=start)
    assert said in str(refused.value)
    assert solve(*arguments, 3, start=np.zeros((7, 2, 3))).success
    bad = np.zeros((7, 2, 3))
    bad[3, 1, 2] = np.inf
    with pytest.raises(ValueError, match="start: holds NaN or infinity"):
        solve(*arguments, 3, start=bad)


@pytest.mark.parametrize("window", [1, 4])
def test_no_noise_is_asked_for_where_none_is_added(window: int) -> None:
    def noise(step: int, sample: int) -> Any:
        raise AssertionError

    arguments = (Rational(), normal((2, 3)), SCHEDULE.timesteps(6), DDIM(SCHEDULE), window)
    assert solve(*arguments, noise=noise).success


@pytest.mark.parametrize("window", [1, 4])
def test_a_network_may_give_its_outputs_in_the_same_memory_again(window: int) -> None:
    memory: dict[int, np.ndarray] = {}

    def again(x: Any, t: Any) -> Any:
        out = memory.setdefault(len(x), np.empty_like(x))
        out[...] = Rational()(x, t)
        return out

    arguments = (normal((2, 3)), SCHEDULE.timesteps(9), DPMSolver(SCHEDULE, 3), window)
    got, fresh = (solve(network, *arguments, check=False) for network in (again, Rational()))
    np.testing.assert_array_equal(got.sample, fresh.sample)


@pytest.mark.parametrize("check", [True, False])
def test_every_row_that_the_network_is_given_counts(check: bool) -> None:
    network = Counted(Rational())
    got = solve(network, normal((2, 3)), SCHEDULE.timesteps(9), DDIM(SCHEDULE), 4, check=check)
    assert got.stats.evaluations == sum(network.rows)
    assert got.stats.calls == len(network.rows)


def test_the_plain_loop_takes_windows_and_trajectories_of_one_step() -> None:
    for window, steps, plain in ((1, 6, True), (5, 1, True), (2, 6, False), (5, 2, False)):
        solver = ParallelIntegralSolver(DDIM(SCHEDULE), window)
        state = solver.init(Rational(), normal((2, 3)), SCHEDULE.timesteps(steps))
        assert isinstance(state, SequentialState) is plain


@pytest.mark.parametrize("window", [1, 4])
def test_progress_counts_the_steps_of_all_samples(window: int, capsys: pytest.CaptureFixture[str]) -> None:
    solve(Rational(), normal((2, 3)), SCHEDULE.timesteps(6), DDIM(SCHEDULE), window, progress=True)
    assert " 12/12 " in capsys.readouterr().err.splitlines()[-1]


class Told(SharedDenoiser):
    """One process that shares rows with no other, and keeps what it is told of the run."""

    devices, max_rows = 1, None  # type: ignore[assignment]

    def __init__(self) -> None:
        self.order: list[Any] = []

    def __call__(self, x: Any, t: Any, rows: Any = None, /) -> Any:
        self.order.append("call")
        return Rational()(x, t)

    def begin(self, plan: Any) -> None:
        self.order.append(plan)

    def agree(self, values: Any) -> list[float]:
        return list(values)

    def end(self, error: BaseException | None = None) -> None:
        self.order.append(error)


@pytest.mark.parametrize("window", [1, 4])
def test_who_shares_the_rows_is_told_the_plan_before_the_first_call_and_the_end(window: int) -> None:
    told, solver = Told(), ParallelIntegralSolver(DDIM(SCHEDULE), window, check=False)
    arguments = normal((2, 3)), SCHEDULE.timesteps(6)
    got = solver.solve(told, *arguments)
    plan = solver.choices() | solver.init(Rational(), *arguments).fingerprint()
    assert told.order == [plan, *["call"] * got.stats.calls, None]
    assert {"window", "tolerance", "x_T", "seed or noise"} <= plan.keys()
