"""A few of the random programs of `make fuzz`, and that a broken promise is noticed and told."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from parasolver_core import Solution, Status, solve
from tests.arrays import on_a_device
from tests.fuzz import solve as fuzz

FIRST = 380  # of the programs that are run in every test


@pytest.mark.parametrize("number", range(FIRST, FIRST + 30))
def test_random_programs_keep_the_promises(number: int) -> None:
    assert fuzz.guarded(fuzz.run, number).complaints == []


@pytest.mark.parametrize("number", range(FIRST, FIRST + 30))
def test_random_programs_keep_the_promises_on_a_device(number: int) -> None:
    with on_a_device():
        assert fuzz.guarded(fuzz.run, number).complaints == []


def test_parts_of_a_move_that_cancel_leave_no_rounding_unseen() -> None:
    """Beliefs of 1e7 and a move of 1e-3 made of them: the states are to be made again, by the recurrence."""
    assert fuzz.guarded(fuzz.run, 8010627).complaints == []


def test_states_whose_squares_underflow_have_a_finite_estimate() -> None:
    """States of several samples that decay to 1e-32, in float32."""
    assert fuzz.guarded(fuzz.run, 8201909).complaints == []


def test_rounding_grows_as_the_sampler_lets_it_and_not_as_beliefs_that_are_held_do() -> None:
    """Beliefs that do not follow their states carry an error of 1e-7 on to 1e-3 in this table of 71 steps."""
    assert fuzz.guarded(fuzz.run, 8300269).complaints == []


def test_parts_of_a_step_that_cancel_are_told_of_on_a_device() -> None:
    """In terms of what is held, a state of 4 is made of two of 1,000: the estimate has their rounding."""
    with on_a_device():
        assert fuzz.guarded(fuzz.run, 8801122).complaints == []


@pytest.mark.parametrize("number", [8904545, 8967902])
def test_slopes_that_a_jump_has_left_are_not_followed(number: int) -> None:
    """A cubic was asked at 1e80, or at 1e6: of that slope, 1e77 or 1e6, rounding made 0.2 and more."""
    assert fuzz.guarded(fuzz.run, number).complaints == []


def test_predictions_of_a_warm_start_that_cancel_are_not_taken() -> None:
    """States did not follow from them but for 120 roundings."""
    with on_a_device():
        assert fuzz.guarded(fuzz.run, 8924070).complaints == []


def changed(solution: Solution, fault: str) -> Solution:
    faults: dict[str, Any] = {
        "sample": {"sample": solution.sample * 1.001},
        "hole": {"sample": solution.sample * np.nan},
        "status": {"status": Status.MAX_ROUNDS},
        "steps": {"steps": tuple(steps - 1 for steps in solution.steps)},
        "estimate": {"error_estimate": solution.error_estimate * np.nan},
    }
    return replace(solution, **faults[fault])


@pytest.mark.parametrize("fault", ["sample", "hole", "status", "steps", "estimate"])
def test_a_broken_promise_is_told_with_the_way_to_repeat_it(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuzz, "solve", lambda *args, **options: changed(solve(*args, **options), fault))
    assert fuzz.main(["--seed", str(FIRST), "--count", "4"]) == 1
    assert re.search(r"^python -m tests.fuzz.solve --seed 38\d --count 1$", capsys.readouterr().out, re.MULTILINE)


def test_time_limit(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--count", "5", "--seconds", "-1"]) == 0
    assert "0 programs" in capsys.readouterr().out
