"""Margins for one network: what is found, what is promised of it, and the file that keeps it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from parasolver_core import DDIM, DDPM, Calibration, NoiseSchedule, calibrate, solve, solve_sequential
from parasolver_core.calibration import Trial, _trial, _widest
from parasolver_core.methods.presets import get_method
from parasolver_core.rounds.acceptance import RelativeMove
from parasolver_core.rounds.margins import Margins
from tests.core.problems import Mixture, TanhNetwork, normal, relative

SCHEDULE = NoiseSchedule.linear()
NETWORK = TanhNetwork(size=32)
ARGUMENTS = (NETWORK, normal((8, 32), seed=1), SCHEDULE.timesteps(40), DDIM(SCHEDULE), 12)


def margins(found: Calibration) -> Margins:
    assert isinstance(found.method.acceptance, RelativeMove)
    return found.method.acceptance.margins


@pytest.fixture(scope="module")
def found() -> Calibration:
    return calibrate(*ARGUMENTS, tolerance=0.05)


def test_a_smooth_network_gets_wider_margins_and_other_samples_keep_within_the_tolerance(found: Calibration) -> None:
    assert found.gain > 1
    assert margins(found) == Margins().times(found.gain)
    assert found.after.rounds < found.before.rounds
    assert max(found.after.errors) <= 0.5 * 0.05
    arguments = (NETWORK, normal((32, 32), seed=2), *ARGUMENTS[2:4])
    exact = solve_sequential(*arguments).sample
    default, own = (solve(*arguments, 12, tolerance=0.05, method=method) for method in ("secant", found.method))
    errors = [relative(one, other) for one, other in zip(own.sample, exact, strict=True)]
    assert np.mean(np.array(errors) <= 0.05) >= 0.95
    assert own.stats.evaluations < default.stats.evaluations


def test_errors_are_those_to_the_sequential_sample(found: Calibration) -> None:
    exact = solve_sequential(*ARGUMENTS[:4]).sample
    got = solve(*ARGUMENTS, tolerance=0.05, check=False)
    errors = [relative(one, other) for one, other in zip(got.sample, exact, strict=True)]
    np.testing.assert_allclose(found.before.errors, errors, atol=0.05 / 30)
    assert found.before.evaluations == pytest.approx(got.stats.evaluations / 8, abs=0.2)


def trial(gain: float, worst: float) -> Trial:
    return Trial(gain, (0.0, worst), 10 - gain, 100.0)


@pytest.mark.parametrize(
    ("worst", "gain", "tried"),
    [
        ({1: 0.6}, 1.0, [1.0]),  # in units of the tolerance
        ({1: 0.1, 2: 0.2, 4: 0.4, 8: 0.6, 32**0.5: 0.45}, 32**0.5, [1, 2, 4, 8, 32**0.5]),
        ({1: 0.1, 2: 0.2, 4: 0.4, 8: 0.6, 32**0.5: 0.55}, 4.0, [1, 2, 4, 8, 32**0.5]),
        ({1: 0.1, 2: 0.2, 4: 0.4, 8: 20.0}, 2.0, [1, 2, 4, 8]),  # a sample flips: back by one more step
        ({1: 0.1, 2: 20.0}, 1.0, [1, 2]),
        ({1: 0.1, 2: float("nan")}, 1.0, [1, 2]),
        ({1: 0.1, 2: 0.1, 4: 0.1, 8: 0.1, 16: 0.1}, 16.0, [1, 2, 4, 8, 16]),
    ],
)
def test_margins_are_doubled_until_a_sample_is_not_safe(worst: dict[float, float], gain: float, tried: list) -> None:
    made: list[float] = []

    def attempt(wider: float) -> Trial:
        made.append(wider)
        return trial(wider, 0.01 * next(value for key, value in worst.items() if key == pytest.approx(wider)))

    assert _widest(attempt, 0.01) == pytest.approx(gain)
    assert made == pytest.approx(tried)


def test_what_of_a_trial_is_safe() -> None:
    """Half of the tolerance is; more than twice it is another mode, and so is what no number is."""
    assert trial(1.0, 0.5).within(1.0)
    assert not trial(1.0, 0.51).within(1.0)
    assert not trial(1.0, 2.0).flipped(1.0)
    assert trial(1.0, 2.01).flipped(1.0)
    nothing = Trial(1.0, (0.0, float("nan"), 0.1), 1.0, 1.0)
    assert np.isnan(nothing.worst)
    assert not nothing.within(1.0)
    assert nothing.flipped(1.0)
    assert Trial(1.0, (0.3, 0.1), 1.0, 1.0).worst == 0.3


def test_what_a_run_cost_and_how_far_off_it_was() -> None:
    """Rounds and evaluations are those of a mean sample; samples leave at different times."""
    truth = np.array([[[3.0, 4.0]], [[0.0, 2.0]]])
    sample = np.array([[[3.0, 5.0]], [[1.0, 2.0]]])
    history = [
        SimpleNamespace(samples=[SimpleNamespace(nodes=range(n)) for n in part]) for part in ((1, 1), (4, 3), (2,))
    ]
    solution: Any = SimpleNamespace(sample=sample, stats=SimpleNamespace(history=history))
    found = _trial(2.0, solution, truth)
    assert found.gain == 2.0
    assert found.errors == pytest.approx((0.2, 0.5))
    assert (found.rounds, found.evaluations) == (2.5, 5.5)


def calibrated(
    monkeypatch: pytest.MonkeyPatch, found: dict[float, tuple[float, float]], window: int = 4
) -> tuple[Calibration, list]:
    """With margins so many times as wide, errors in units of the tolerance and rounds; and what runs were made."""
    runs: list[tuple[float, float]] = []

    def solved(*arguments: Any, tolerance: float, method: Any, **options: Any) -> Any:
        gain = method.acceptance.margins.factor / Margins().factor
        runs.append((round(gain, 6), tolerance))
        sample = np.ones((8, 1)) if len(runs) == 1 else np.ones((8, 1)) + 0.01 * found[round(gain, 6)][0]
        rounds = int(found[round(gain, 6)][1])
        history = [SimpleNamespace(samples=[SimpleNamespace(nodes=range(3))] * 8)] * rounds
        return SimpleNamespace(sample=sample, stats=SimpleNamespace(history=history, rounds=rounds))

    monkeypatch.setattr("parasolver_core.calibration.solve", solved)
    return calibrate(NETWORK, np.ones((8, 1)), range(5), DDIM(SCHEDULE), window, tolerance=0.01), runs


def test_of_what_is_safe_the_fewest_rounds_count_and_then_the_narrowest(monkeypatch: pytest.MonkeyPatch) -> None:
    between = round(8**0.5, 6)
    table = {1.0: (0.1, 9), 2.0: (0.4, 7), 4.0: (0.8, 5), between: (0.45, 7)}
    found, runs = calibrated(monkeypatch, table)
    assert runs == [(1.0, 0.01 / 30), (1.0, 0.01), (2.0, 0.01), (4.0, 0.01), (between, 0.01)]
    assert (found.gain, found.window, found.steps, found.tolerance) == (2.0, 4, 5, 0.01)
    assert margins(found) == Margins().times(2.0)
    assert [one.rounds for one in found.trials] == [9, 7, 5, 7]
    assert found.after.evaluations == 21
    assert (found.before.gain, found.after.gain) == (1.0, 2.0)
    slower, _ = calibrated(monkeypatch, {1.0: (0.1, 6), 2.0: (0.4, 7), 4.0: (0.8, 5), between: (0.45, 7)})
    assert slower.gain == 1.0


def test_where_a_sample_flipped_margins_are_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are half as wide as the widest that were safe, which have been tried on the way."""
    found, runs = calibrated(monkeypatch, {1.0: (0.1, 9), 2.0: (0.2, 7), 4.0: (9.0, 5)}, window=2)
    assert [gain for gain, _ in runs[1:]] == [1.0, 2.0, 4.0]
    assert found.gain == 1.0


def test_the_sentence_on_a_calibration() -> None:
    first, second = Trial(1.0, (0.001, 0.002), 9.0, 90.0), Trial(2.0, (0.001, 0.004), 7.5, 80.4)
    wider = Calibration(get_method("secant"), 2.0, 0.01, 8, 50, (first, second))
    assert wider.message == (
        "Margins 2 times as wide take 7.5 rounds instead of 9.0 and 80 evaluations instead of 90; the worst of 2 "
        "samples is off by 0.4 times the tolerance of 0.01 instead of 0.2."
    )
    same = Calibration(get_method("secant"), 1.0, 0.01, 8, 50, (first, second))
    assert same.message == (
        "The default margins stay: with them the worst of 2 samples is off by 0.2 times the tolerance of 0.01, and "
        "wider ones saved nothing safely (9.0 rounds)."
    )


def test_modes_that_flip_do_not_widen_the_margins_beyond_what_is_safe() -> None:
    network = Mixture(SCHEDULE, "epsilon", mean=0.9, std=0.1)
    arguments = (network, normal((16, 4), seed=3), SCHEDULE.timesteps(40), DDIM(SCHEDULE), 12)
    found = calibrate(*arguments, tolerance=0.02)
    assert found.gain >= 1
    assert found.gain == 1 or max(found.after.errors) <= 0.01
    later = [one for one in found.trials if one.gain > found.gain]
    assert all(not one.within(0.02) or one.rounds >= found.after.rounds for one in later) or any(
        one.flipped(0.02) for one in later
    )


def test_a_sampler_with_noise_and_a_seed() -> None:
    found = calibrate(*ARGUMENTS[:3], DDPM(SCHEDULE), 12, tolerance=0.05, seed=5)
    assert found.gain >= 1
    assert len(found.before.errors) == 8


def test_the_file_is_a_method(found: Calibration, tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    found.save(file)
    assert get_method(file) == get_method(str(file)) == found.method
    record = json.loads(file.read_text())
    assert (record["tolerance"], record["window"], record["steps"]) == (0.05, 12, 40)
    one, other = (solve(*ARGUMENTS, tolerance=0.05, method=method) for method in (file, found.method))
    np.testing.assert_array_equal(one.sample, other.sample)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "another"}', '{"kind": "parasolver calibration 1"}'])
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"method: .*is not what Calibration.save writes"):
        solve(*ARGUMENTS, method=file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        solve(*ARGUMENTS, method=tmp_path / "none.json")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x_T": normal((7, 32))}, "at least 8 samples"),
        ({"tolerance": 0.0}, "tolerance: expected a number above 0"),
        ({"window": 1}, "window"),
        ({"window": "auto"}, "window"),
    ],
)
def test_bad_arguments(change: dict[str, Any], match: str) -> None:
    names = ("denoiser", "x_T", "timesteps", "step_rule", "window")
    arguments: dict[str, Any] = dict(zip(names, ARGUMENTS, strict=True)) | change
    with pytest.raises((ValueError, TypeError), match=match):
        calibrate(**arguments)


def test_messages_say_what_is_saved(found: Calibration) -> None:
    assert f"{found.after.rounds:.1f} rounds instead of {found.before.rounds:.1f}" in found.message
    same = Calibration(get_method("secant"), 1.0, 0.01, 8, 50, (trial(1.0, 0.006),))
    assert "The default margins stay" in same.message


def test_progress_counts_the_runs(capsys: pytest.CaptureFixture[str]) -> None:
    found = calibrate(*ARGUMENTS, tolerance=0.05, progress=True)
    assert (
        f" {len(found.trials) + 1}/" in capsys.readouterr().err.splitlines()[-1]
    )  # the one that is the truth included
