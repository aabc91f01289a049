"""A few of the random fields of `make fuzz`, and that a wrong answer is noticed and told."""

import re
from dataclasses import replace
from typing import Any

import pytest

from tests.fuzz import odeint as fuzz


@pytest.mark.parametrize("seed", range(30))
def test_random_fields_have_the_answer_of_the_plain_loop(seed: int) -> None:
    assert fuzz.run(seed)[0] == ""


@pytest.mark.parametrize("fault", ["states", "status", "error"])
def test_a_wrong_answer_is_told_with_the_way_to_repeat_it(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from parasolver_adapters.vector_field import integrate
    from parasolver_core.solution import Status

    def wrong(*arguments: Any, **options: Any) -> Any:
        found = integrate(*arguments, **options)
        if options.get("linearization") == "sequential":
            return found
        if fault == "error":
            raise ZeroDivisionError("by nothing")
        return replace(found, **{"states": {"states": found.states * 1.01}, "status": {"status": Status.FAILED}}[fault])

    monkeypatch.setattr(fuzz, "integrate", wrong)
    assert fuzz.main(["--seed", "13", "--count", "2"]) == 1
    told = capsys.readouterr().out
    assert re.search(r"^    python -m tests.fuzz.odeint --seed 13 --count 1 --verbose$", told, re.MULTILINE)
    assert "odeint: 2 problems from seed 13, 2 failures" in told
    assert {"states": "off by", "status": "Status.FAILED for", "error": "ZeroDivisionError: by nothing"}[fault] in told


def test_time_limit(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--count", "5", "--seconds", "-1"]) == 0
    assert "odeint: 0 problems" in capsys.readouterr().out
