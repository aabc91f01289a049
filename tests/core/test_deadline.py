"""Seconds that a run may take: what is handed over when they are over, and how far it is off."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from parasolver_core import DDIM, NoiseSchedule, Status, solve, solve_sequential
from parasolver_core.solver.deadline import Deadline
from tests.arrays import to_numpy

SCHEDULE = NoiseSchedule.linear()
TIMES = SCHEDULE.timesteps(60)


def denoiser(x: Any, t: Any) -> Any:
    """Exact for two equal peaks at 2 and -2."""
    kept = SCHEDULE.alphas_cumprod[np.asarray(t).astype(int)][:, None]
    variance = 0.04 * kept + 1 - kept
    mean = np.tanh(2 * np.sqrt(kept) * x / variance) * 2
    return (x - np.sqrt(kept) * (mean + 0.04 * np.sqrt(kept) / variance * (x - np.sqrt(kept) * mean))) / np.sqrt(
        1 - kept
    )


def start() -> Any:
    return np.random.default_rng(0).standard_normal((3, 8))


class Clock:
    """Seconds that pass in the network only: one a call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def __call__(self, x: Any, t: Any) -> Any:
        self.now += 1.0
        return denoiser(x, t)


@pytest.mark.parametrize("rounds", [1, 2, 4, 7])
def test_no_round_is_begun_that_would_end_too_late(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    solution = solve(clock, start(), TIMES, DDIM(SCHEDULE), 16, tolerance=0, check=False, max_seconds=rounds + 0.5)
    assert solution.stats.rounds == rounds
    assert solution.status is Status.MAX_SECONDS
    assert not solution.success
    assert f"after round {rounds}" in solution.message


def test_the_error_of_the_estimate_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = solve_sequential(denoiser, start(), TIMES, DDIM(SCHEDULE)).sample
    told = []
    for rounds in (3, 8, 13, 18):
        clock = Clock(monkeypatch)
        found = solve(clock, start(), TIMES, DDIM(SCHEDULE), 16, tolerance=0, check=False, max_seconds=rounds + 0.5)
        error = np.linalg.norm(found.sample - exact, axis=1) / np.linalg.norm(exact, axis=1)
        assert np.all(error <= found.error_estimate)
        told.append(float(np.max(found.error_estimate)))
    assert told[0] > 10 * told[-1]


def test_a_quiet_round_does_not_hide_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the larger of the last two changes, times the rounds left at the pace so far."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    deadline, steps = Deadline(4.5), np.array([0, 10, 30])
    estimates = [np.array([[3.0, 3.2, 3.6, 4.0, 4.0][k]] * 3)[:, None] for k in range(5)]
    for k in range(5):
        history = [SimpleNamespace(seconds=1.0)] * k
        state = SimpleNamespace(
            stats=SimpleNamespace(history=history),
            evaluator=SimpleNamespace(agree=lambda values: values),
            length=50,
            foresees=True,
            estimate=lambda k=k: estimates[k],
            halt=lambda status: None,
        )
        assert deadline.halts(state) == (k == 4)  # type: ignore[arg-type]
        now[0] += 1.0
    found = SimpleNamespace(steps=steps, sample=estimates[4], stats=SimpleNamespace(rounds=4))
    told = deadline._error(found)  # type: ignore[arg-type]
    np.testing.assert_allclose(told, 2 * 0.4 / 4 * np.array([4, 16, 8 / 3]), rtol=1e-12)


def test_the_first_round_is_always_made() -> None:
    solution = solve(denoiser, start(), TIMES, DDIM(SCHEDULE), 16, max_seconds=1e-12)
    assert (solution.stats.rounds, solution.status) == (1, Status.MAX_SECONDS)
    assert np.all(solution.error_estimate > 0.01)
    assert np.all(np.isfinite(solution.sample))


def test_enough_seconds_change_nothing() -> None:
    plain = solve(denoiser, start(), TIMES, DDIM(SCHEDULE), 16)
    timed = solve(denoiser, start(), TIMES, DDIM(SCHEDULE), 16, max_seconds=600)
    np.testing.assert_array_equal(timed.sample, plain.sample)
    assert timed.success
    np.testing.assert_array_equal(timed.error_estimate, plain.error_estimate)


def test_the_plain_loop_knows_no_error() -> None:
    solution = solve(denoiser, start(), TIMES, DDIM(SCHEDULE), 16, method="sequential", max_seconds=1e-12)
    assert solution.stats.rounds == 1
    assert np.all(np.isinf(solution.error_estimate))


def test_other_libraries(xp: Any) -> None:
    x_T = xp.asarray(start()[:, :4])
    solution = solve(lambda x, t: x / (1 + x * x), x_T, TIMES, DDIM(SCHEDULE), 16, max_seconds=1e-12)
    assert solution.status is Status.MAX_SECONDS
    assert solution.error_estimate.shape == (3,)
    assert bool(np.all(np.isfinite(to_numpy(solution.sample))))


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1.0, ValueError), (float("nan"), ValueError)])
def test_bad_seconds(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="max_seconds: expected a number above 0"):
        solve(denoiser, start(), TIMES, DDIM(SCHEDULE), max_seconds=value)


@pytest.mark.parametrize("value", [True, "1"])
def test_seconds_that_are_no_number(value: Any) -> None:
    with pytest.raises(TypeError, match="max_seconds: expected a number above 0"):
        solve(denoiser, start(), TIMES, DDIM(SCHEDULE), max_seconds=value)


def test_a_deadline_of_none_never_halts() -> None:
    assert not Deadline(None).halts(None)  # type: ignore[arg-type]
