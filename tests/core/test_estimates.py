"""How far an estimate is off when the seconds are over: by hand, from rounds of a clock that the test turns."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from parasolver_core import Status
from parasolver_core.solution import Solution, Stats
from parasolver_core.solver.deadline import Deadline, _apart, check_seconds


class Run:
    """A run whose estimates are given, one before each round; each round takes so many seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limit: float, estimates: list[float], foresees: bool = True):
        self.now, self.asked = 100.0, 0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)
        self.deadline, self.estimates, self.foresees, self.length = Deadline(limit), estimates, foresees, 50
        self.stats = SimpleNamespace(history=[])
        self.evaluator = SimpleNamespace(agree=list)
        self.halted: Any = None

    def halt(self, status: Status) -> None:
        self.halted = status

    def estimate(self) -> np.ndarray:
        self.asked += 1
        return np.full((2, 3), self.estimates[len(self.stats.history)])

    def rounds(self, *seconds: float) -> list[bool]:
        """Whether the run was halted before each round and after the last."""
        told = [self.deadline.halts(self)]  # type: ignore[arg-type]
        for each in seconds:
            self.now += each
            self.stats.history.append(SimpleNamespace(seconds=each))
            told.append(self.deadline.halts(self))  # type: ignore[arg-type]
        return told


def told(run: Run, steps: tuple[int, int], statuses: tuple[Status, Status], sample: Any) -> np.ndarray:
    rounds = len(run.stats.history)
    solution = Solution(
        sample, statuses[1], "", statuses, steps, np.array([0.25, 0.75]), Stats(rounds=rounds), None, sample
    )
    return run.deadline.told(solution).error_estimate


def test_a_round_that_would_end_just_in_time_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, 3.0, [1.0] * 9)
    assert run.rounds(1.0, 1.0, 1.0) == [False, False, False, True]
    assert run.halted is Status.MAX_SECONDS
    late = Run(monkeypatch, 2.999, [1.0] * 9)
    assert late.rounds(1.0, 1.0) == [False, False, True]


def test_estimates_are_made_when_three_rounds_or_fewer_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """They cost time, and only the last two are of use."""
    run = Run(monkeypatch, 7.5, [float(k) for k in range(1, 10)])
    assert run.rounds(1.0, 1.0, 1.0, 1.0) == [False] * 5
    assert run.asked == 1  # before the first round; 3.5 seconds are left
    run.rounds()
    assert run.asked == 1
    run.now += 0.5  # just three
    run.rounds()
    assert run.asked == 2


def test_the_error_is_twice_the_larger_change_times_the_rounds_left(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, 3.5, [9.0, 6.0, 5.0, 4.0])
    assert run.rounds(1.0, 1.0, 1.0) == [False] * 3 + [True]
    both = (Status.MAX_SECONDS, Status.MAX_SECONDS)
    error = told(run, (10, 0), both, np.full((2, 3), 4.0))
    # before the last two rounds 6 and 5 were estimated; steps are left for 3 (50 - 10) / 10 rounds, or 3 more
    np.testing.assert_allclose(error, [2 * 12 * 0.25, 2 * 3 * 0.25])
    error = told(run, (50, 49), both, np.full((2, 3), 5.0))  # a round is left at least
    np.testing.assert_allclose(error, [2 * 0.2, 2 * 0.2])
    error = told(run, (1, 25), both, np.full((2, 3), 4.0))
    np.testing.assert_allclose(error, [2 * 147 * 0.25, 2 * 3 * 0.25])


def test_only_samples_that_were_halted_have_a_guessed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, 2.5, [9.0, 5.0, 4.0])
    run.rounds(1.0, 1.0)
    error = told(run, (50, 25), (Status.CONVERGED, Status.MAX_SECONDS), np.full((2, 3), 4.0))
    np.testing.assert_allclose(error, [0.25, 2 * 2 * 0.8])  # 9 became 5
    untouched = told(run, (50, 50), (Status.CONVERGED, Status.CONVERGED), np.full((2, 3), 4.0))
    assert untouched.tolist() == [0.25, 0.75]


def test_after_the_first_round_alone_its_change_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, 1.5, [9.0, 6.0])
    assert run.rounds(1.0) == [False, True]
    error = told(run, (5, 5), (Status.MAX_SECONDS,) * 2, np.full((2, 3), 6.0))
    np.testing.assert_allclose(error, [2 * 9 * 0.5] * 2)


def test_a_run_that_foresees_nothing_has_an_infinite_error(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, 1.5, [9.0, 6.0], foresees=False)
    run.rounds(1.0)
    assert run.asked == 0
    assert told(run, (5, 5), (Status.MAX_SECONDS,) * 2, np.full((2, 3), 6.0)).tolist() == [np.inf, np.inf]


def test_processes_that_share_the_rows_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """If another one has no time left, neither has this one."""
    run = Run(monkeypatch, 100.0, [1.0] * 5)
    run.rounds(1.0)
    asked: list[list[float]] = []

    def agree(values: list[float]) -> list[float]:
        asked.append(values)
        return [0.5, -3.0]

    run.evaluator.agree = agree
    assert run.rounds(2.0)[-1]
    assert asked[-1] == pytest.approx([2.0 - 97.0, 97.0 - 6.0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_how_far_apart_states_are(dtype: Any) -> None:
    """RMS of the difference over RMS of the first, sample by sample; infinite where that says nothing."""
    state = np.array([[[3.0, 4.0]], [[0.0, 0.0]], [[np.nan, 1.0]], [[1.0, 1.0]]], dtype=dtype)
    other = np.array([[[3.0, 2.0]], [[1.0, 0.0]], [[1.0, 1.0]], [[1.0, 1.0]]], dtype=dtype)
    np.testing.assert_allclose(_apart(state, other), [0.4, np.inf, np.inf, 0.0])


@pytest.mark.parametrize("seconds", [None, 1, 0.5, 1e-9, np.float32(2.0), np.int64(3), float("inf")])
def test_seconds_that_are_fine(seconds: Any) -> None:
    check_seconds(seconds)
    assert Deadline(seconds)._end > 0


def test_infinite_seconds_are_no_limit() -> None:
    deadline = Deadline(float("inf"))
    assert not deadline.halts(None)  # type: ignore[arg-type]
