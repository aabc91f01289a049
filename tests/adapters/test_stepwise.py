"""The solver advanced as far as another loop asks, and what is chosen before it is known what to sample."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from parasolver_adapters.stepwise import Choices, FixedRule
from parasolver_core import (
    DDIM,
    ConvergenceError,
    NoiseSchedule,
    NonFiniteError,
    ParallelIntegralSolver,
    Status,
    solve_sequential,
)

LINEAR = NoiseSchedule.linear()
TIMES = LINEAR.timesteps(12)
RULE = DDIM(LINEAR)
X = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network(x: Any, t: Any) -> Any:
    return torch.tanh(x) * (1 + t[:, None] / 1000)


def begun(denoiser: Any = network, window: Any = 4, rule: Any = RULE, **options: Any) -> Any:
    return Choices.checked(window, **({"tolerance": 0.0} | options)).begin(denoiser, X, rule, TIMES, None)


def test_a_table_goes_with_its_own_timesteps_only() -> None:
    table = RULE.recurrence(TIMES)
    rule = FixedRule(table)
    assert rule.timesteps is table.timesteps
    assert rule.recurrence(TIMES) is table
    assert rule.recurrence(np.array(TIMES)) is table
    other = np.array(TIMES)
    other[-1] += 1
    for wrong in (TIMES[:-1], TIMES[1:], TIMES[:1], other):
        with pytest.raises(ValueError, match=rf"holds a table of 12 timesteps of its own, got {len(wrong)} others"):
            rule.recurrence(wrong)
        with pytest.raises(ValueError, match="timesteps: this rule"):
            rule.check_grid(wrong)


def test_states_are_found_as_far_as_they_are_asked_for() -> None:
    want = solve_sequential(network, X, TIMES, RULE, save="trajectory").trajectory
    assert want is not None
    run = begun()
    rounds = []
    for steps in (1, 0, 5, 3, 12):
        torch.testing.assert_close(run.after(steps), want[steps], rtol=0, atol=1e-12)
        rounds.append(run.state.stats.rounds)
    assert rounds[:2] == [1, 1]
    assert rounds[2] == rounds[3] < rounds[4] <= 12
    assert run.recurrence.timesteps.tolist() == list(TIMES)
    solution = run.solution
    assert (solution.status, solution.trajectory) == (Status.CONVERGED, None)
    torch.testing.assert_close(solution.sample, want[12], rtol=0, atol=1e-12)


def test_too_few_rounds_and_numbers_that_are_none_are_told() -> None:
    run = begun(max_rounds=2, window=2)
    with pytest.raises(ConvergenceError) as few:
        run.after(12)
    assert few.value.solution is not None
    assert few.value.solution.status is Status.MAX_ROUNDS
    broken = begun(lambda x, t: network(x, t) * torch.where(t < 500, torch.nan, 1.0)[:, None])
    with pytest.raises(NonFiniteError) as none:
        broken.after(12)
    assert none.value.solution is not None
    assert none.value.solution.status is Status.NONFINITE_MODEL


@pytest.mark.parametrize(("kind", "status"), [(KeyboardInterrupt, Status.INTERRUPTED), (RuntimeError, Status.FAILED)])
def test_what_was_reached_goes_with_an_exception_of_the_network(kind: Any, status: Status) -> None:
    calls: list[int] = []

    def breaks(x: Any, t: Any) -> Any:
        calls.append(len(x))
        if len(calls) == 4:
            raise kind("stop")
        return network(x, t)

    run = begun(breaks)
    run.after(1)
    with pytest.raises(kind, match="stop") as caught:
        run.after(12)
    assert caught.value.solution.status is status
    assert min(caught.value.solution.steps) >= 1
    assert caught.value.solution.trajectory is not None


@pytest.mark.parametrize(
    ("given", "auto", "sequential", "window"),
    [
        ({}, False, False, 16),
        ({"window": 1}, False, True, 1),
        ({"window": 2}, False, False, 2),
        ({"window": "auto"}, True, False, 2),
        ({"window": 8, "method": "sequential"}, False, True, 1),
        ({"window": "auto", "method": "sequential"}, False, True, 1),
        ({"window": 8, "method": "identity"}, False, False, 8),
    ],
)
def test_what_a_window_says(given: Any, auto: bool, sequential: bool, window: int) -> None:
    choices = Choices.checked(**given, tolerance=1e-3)
    assert (choices.auto, choices.sequential, choices.solver.window) == (auto, sequential, window)
    assert choices.solver.tolerance == 1e-3
    assert isinstance(choices.solver, ParallelIntegralSolver)


def test_windows_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="window: expected an integer of at least 1 or \"auto\", got 'all'"):
        Choices.checked("all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="window: expected an integer of at least 1"):
        Choices.checked(0)


def test_a_window_that_chooses_itself_is_chosen_for_the_batch() -> None:
    run = begun(window="auto", tolerance=1e-3)
    want = solve_sequential(network, X, TIMES, RULE).sample
    assert float((run.after(12) - want).norm() / want.norm()) < 1e-3
    assert 1 <= run._solver.window <= 12
