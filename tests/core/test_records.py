"""What is told of rounds and runs: records, sums and messages, word for word."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from parasolver_core import ConvergenceError, NonFiniteError, Status
from parasolver_core.solution import RoundRecord, SampleRecord, SampleRecords, Solution, Stats
from parasolver_core.solver.report import left_by, message_of, raise_for, status_after, within_range


def record(sample: int, nodes: list[int], accepted: int, *residuals: float) -> SampleRecord:
    moves = np.array(residuals)
    return SampleRecord(sample, np.array(nodes), accepted, moves, 10 * moves, 0.125)


TABLES = SampleRecords(
    samples=np.array([4, 7, 9]),
    counts=np.array([2, 3, 1]),
    nodes=np.array([[5, 6, 0], [2, 3, 4], [8, 0, 0]]),
    accepted=np.array([1, 2, 1]),
    residuals=np.array([[0.0, 0.5, 9.0], [0.0, 0.1, 0.2], [0.0, 9.0, 9.0]]),
    defects=np.array([[1.0, 2.0, 9.0], [3.0, 4.0, 5.0], [6.0, 9.0, 9.0]]),
    errors=np.array([0.01, 0.02, 0.03]),
)


def test_a_record_of_many_is_a_row_of_the_tables() -> None:
    assert len(TABLES) == 3
    first, second, third = TABLES
    assert (first.sample, first.accepted, first.error) == (4, 1, 0.01)
    assert (first.nodes.tolist(), first.residuals.tolist(), first.defects.tolist()) == ([5, 6], [0.0, 0.5], [1.0, 2.0])
    assert (first.first, first.window) == (5, 2)
    assert (second.sample, second.nodes.tolist(), second.accepted) == (7, [2, 3, 4], 2)
    assert (third.nodes.tolist(), TABLES[-1].sample) == ([8], 9)
    assert [one.sample for one in TABLES[1:]] == [7, 9]
    assert [one.sample for one in TABLES[::-1]] == [9, 7, 4]
    with pytest.raises(IndexError):
        TABLES[3]


def test_a_round_tells_what_is_largest_of_its_samples() -> None:
    one = RoundRecord(3, 6, TABLES, 0.5, 0.75)
    assert (one.accepted, one.window, one.residual, one.turns) == (4, 3, 0.5, 1)
    assert repr(one) == "RoundRecord(round=3, evaluations=6, accepted=4, residual=0.5, seconds=0.75)"
    nothing = RoundRecord(1, 0, [], 0.0, 0.0)
    assert (nothing.accepted, nothing.window, nothing.residual) == (0, 0, 0.0)


def test_how_a_record_looks() -> None:
    told = repr(record(2, [3, 4, 5], 1, 0.0, 0.1, 0.2))
    assert told == "SampleRecord(sample=2, 3 nodes in 3..5, accepted=1, error=0.125)"
    assert repr(record(2, [], 0)) == "SampleRecord(sample=2, no nodes, accepted=0, error=0.125)"


def test_costs_add_up() -> None:
    nothing = Stats()
    assert (nothing.rounds, nothing.evaluations, nothing.calls, nothing.max_rows) == (0, 0, 0, None)
    assert (nothing.seconds, nothing.seconds_denoiser, nothing.history) == (0.0, 0.0, [])
    first, second = RoundRecord(1, 6, TABLES, 0.5, 0.75), RoundRecord(2, 4, TABLES, 0.25, 1.0, turns=3)
    sums = nothing.after(first, 2, None).after(second, 5, 16)
    assert (sums.rounds, sums.evaluations, sums.calls, sums.max_rows) == (4, 10, 5, 16)
    assert (sums.seconds_denoiser, sums.seconds, sums.history) == (0.75, 1.75, [first, second])
    assert nothing.history == []


def solution(status: Status, message: str = "why") -> Solution:
    sample = np.zeros((2, 3), dtype=np.float32)
    stats = Stats(rounds=7, evaluations=30)
    return Solution(sample, status, message, (status,) * 2, (1, 2), np.zeros(2), stats, None, sample)


def test_how_a_solution_looks() -> None:
    assert repr(solution(Status.CONVERGED)) == "Solution(converged, 7 rounds, 30 evaluations, sample float32 (2, 3))"
    assert solution(Status.CONVERGED).success
    assert not solution(Status.STOPPED).success


@pytest.mark.parametrize("status", Status)
def test_which_endings_are_errors(status: Status) -> None:
    wanted = {
        Status.MAX_ROUNDS: ConvergenceError,
        Status.NONFINITE_MODEL: NonFiniteError,
        Status.NONFINITE_SOLVER: NonFiniteError,
    }.get(status)
    given = solution(status)
    if wanted is None:
        raise_for(given)
        return
    with pytest.raises(wanted, match=r"^why$") as raised:
        raise_for(given)
    assert raised.value.solution is given


def run(**changes: Any) -> Any:
    state = {
        "steps": (5, 3), "length": 20, "batch": 2, "failures": {}, "timesteps": np.arange(20) * 50,
        "stats": Stats(rounds=6, evaluations=33), "evaluator": SimpleNamespace(max_rows=None),
        "x_T": np.zeros((2, 3), dtype=np.float16),
    }  # fmt: skip
    return SimpleNamespace(**state | changes)


@pytest.mark.parametrize(
    ("status", "changes", "message"),
    [
        (Status.CONVERGED, {}, "Converged in 6 rounds instead of 20, with 16.5 evaluations a sample."),
        (
            Status.CONVERGED,
            {"length": 6, "batch": 1, "evaluator": SimpleNamespace(max_rows=8)},
            "Converged in 6 rounds, with 33 evaluations. Memory ran out; the network was called with at most 8 rows "
            "from then on.",
        ),
        (Status.CONVERGED, {"length": 5, "batch": 1}, "Converged in 6 rounds, with 33 evaluations."),
        (
            Status.MAX_ROUNDS,
            {},
            "Not converged within max_rounds=6: 3 of 20 steps are final. Raise max_rounds (20 always suffice), the "
            "window or the tolerance.",
        ),
        (
            Status.MAX_SECONDS,
            {},
            "Time was up (max_seconds) after round 6: 3 of 20 steps are final, and the sample is an estimate; "
            "error_estimate says how far it may be off.",
        ),
        (Status.STOPPED, {}, "Stopped by the callback after round 6; 3 of 20 steps are final."),
        (Status.INTERRUPTED, {}, "Interrupted after round 6; 3 of 20 steps are final."),
        (Status.FAILED, {}, "An error ended the run in round 7; 3 of 20 steps are final."),
        (Status.RUNNING, {}, "Still running: 3 of 20 steps are final after round 6."),
        (Status.NONFINITE_SOLVER, {}, "The sample overflows in float16. Start from an x_T of a wider dtype."),
        (
            Status.NONFINITE_SOLVER,
            {"failures": {1: (4, 2), 0: (3, 5)}},
            "The solver's own arithmetic overflowed for sample 0 at step 3 (timestep 150) in round 5. Use a wider "
            "dtype or a smaller window.",
        ),
        (
            Status.NONFINITE_MODEL,
            {"failures": {1: (4, 2)}},
            "The denoiser gave NaN or infinity for sample 1 at step 4 (timestep 200) in round 2; nothing of it was "
            "accepted and the other samples went on. Check the network there, for example in float32 instead of half "
            "precision.",
        ),
    ],
)
def test_messages(status: Status, changes: dict[str, Any], message: str) -> None:
    assert message_of(status, run(**changes)) == message


def test_what_is_left_of_a_run_that_never_began() -> None:
    x_T = np.arange(6.0).reshape(2, 3)
    left = left_by(KeyboardInterrupt(), None, x_T, [3, 2, 1], "trajectory")
    assert left.status is Status.INTERRUPTED
    assert left.statuses == (Status.INTERRUPTED,) * 2
    assert left.message == "Interrupted before the first round; no step is final."
    assert (left.steps, left.error_estimate.tolist(), left.stats.rounds) == ((0, 0), [np.inf, np.inf], 0)
    np.testing.assert_array_equal(left.sample, x_T)
    assert not np.shares_memory(left.sample, x_T)
    assert left.trajectory is not None
    assert left.trajectory.shape == (4, 2, 3)
    np.testing.assert_array_equal(left.trajectory[0], x_T)
    assert np.isnan(left.trajectory[1:]).all()
    failed = left_by(ValueError(), None, x_T, [3, 2, 1], "sample")
    assert (failed.status, failed.trajectory) == (Status.FAILED, None)
    assert failed.message == "An error ended the run before the first round; no step is final."


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), Status.INTERRUPTED), (ValueError(), Status.FAILED), (SystemExit(), Status.FAILED)],
)
def test_what_an_exception_makes_of_a_run(error: BaseException, status: Status) -> None:
    assert status_after(error) is status


def test_rows_within_the_range_of_their_dtype() -> None:
    rows = np.array([[1.0, 2.0], [np.inf, 1.0], [1.0, -np.inf], [np.nan, 0.0], [65000.0, 0.0]], dtype=np.float16)
    most = np.array([[65504.0, 0.0]], dtype=np.float16)
    assert within_range(np, rows[:, :, None]).tolist() == [True, False, False, False, True]
    assert within_range(np, most).tolist() == [False]  # what was larger may have become the largest
