"""What a window is predicted to cost, worked out by hand, and which one is chosen by that."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from parasolver_core import DDIM, DDPM, NoiseSchedule
from parasolver_core.methods.presets import get_method
from parasolver_core.planning import prediction
from parasolver_core.planning.costs import CostTable
from parasolver_core.planning.prediction import (
    Costs,
    Prediction,
    candidates,
    choose,
    explain,
    predict,
    predicted_rounds,
    predicted_rows,
    seconds,
)
from parasolver_core.samplers.recurrence import Recurrence

SCHEDULE = NoiseSchedule.linear()
METHOD = get_method("secant")


def table(steps: int, rule: Any = DDIM) -> Recurrence:
    return rule(SCHEDULE).recurrence(SCHEDULE.timesteps(steps))


@dataclass
class Spreading:
    """A method that spreads so many nodes in any window."""

    nodes: float
    fill: str = "held"

    def spreads(self, recurrence: Recurrence, window: int, tolerance: float) -> bool:
        return True

    def needed_nodes(self, recurrence: Recurrence, tolerance: float) -> float:
        self.asked = tolerance
        return self.nodes


def test_the_rounds_of_spread_nodes() -> None:
    """``p + q log10(1 / tolerance) + r n / window``, at most one a step."""
    ddim, ddpm, few = table(400), table(400, DDPM), table(12)
    method: Any = Spreading(100.0)
    assert predicted_rounds(ddim, method, 20, 1e-3) == pytest.approx(2.5 + 4 * 3 + 0.9 * 5)
    assert method.asked == 1e-3
    assert predicted_rounds(ddpm, method, 20, 1e-3) == pytest.approx(8 + 0.4 * 5)
    assert predicted_rounds(ddim, method, 2, 1.0) == pytest.approx(2.5 + 0.9 * 50)
    assert predicted_rounds(ddim, method, 20, 4.0) == pytest.approx(2.5 + 0.9 * 5)  # nothing is wanted
    assert predicted_rounds(ddim, method, 20, 1e-9) == pytest.approx(2.5 + 4 * 6 + 0.9 * 5)  # arithmetic is no finer
    assert method.asked == 1e-6
    assert predicted_rounds(few, method, 20, 1e-3) == 12


@pytest.mark.parametrize(
    ("nodes", "window", "steps", "rows"),
    [(40.0, 40, 400, 20), (100.0, 20, 400, 17), (100.0, 40, 30, 30), (0.4, 40, 400, 1)],
    ids=["half of the nodes", "85 % of the window", "all steps", "at least one"],
)
def test_the_rows_of_spread_nodes(nodes: float, window: int, steps: int, rows: int) -> None:
    method: Any = Spreading(nodes)
    rounds = round(predicted_rounds(table(steps), method, window, 0.1))
    assert predicted_rows(table(steps), method, window, 0.1) == [1] + [rows] * (rounds - 1)


def test_the_rows_of_a_window_that_slides() -> None:
    """What is left of the steps goes down evenly, with noise a little faster; the first round sees the blind nodes."""
    ddim, ddpm = table(10), table(10, DDPM)
    blind = int(np.sum(SCHEDULE.alphas_cumprod[ddim.timesteps] < 0.01))
    assert 2 < blind < 6
    # 10 / 4 + 3 / 4 (2.6) and 10 / 4 + 3 / 4 (4.1) rounds
    assert predicted_rows(ddim, METHOD, 4, 1.0) == [min(blind, 4), 4, 4, 3]
    assert predicted_rows(ddpm, METHOD, 4, 1.0) == [min(blind, 4), 4, 4, 4, 3, 1]
    assert predicted_rows(ddim, METHOD, 10, 1.0) == [blind, 9, 4]
    assert predicted_rows(ddim, get_method("paradigms"), 10, 1.0) == [1, 9, 4]
    assert predicted_rows(ddim, METHOD, 2, 1.0) == [2, 2, 2, 2, 2, 2]
    assert predicted_rows(ddim, METHOD, 1, 1.0) == [1] * 10
    assert predicted_rows(table(1), METHOD, 2, 1.0) == [1]
    assert predicted_rows(table(2), METHOD, 2, 1.0) == [1, 1]


def test_candidates_are_powers_of_two_and_half_as_many_more_below_the_steps() -> None:
    assert list(candidates(2)) == [2]
    assert list(candidates(3)) == [2, 3]
    assert list(candidates(8)) == [2, 3, 4, 6, 8]
    assert list(candidates(12)) == [2, 3, 4, 6, 8, 12]
    assert list(candidates(13)) == [2, 3, 4, 6, 8, 12, 13]


@pytest.mark.parametrize(
    ("network", "options", "size", "each"),
    [
        ({1: 1.0, 2: 1.5, 4: 2.0}, {}, 4, 2.0),
        ({1: 1.0, 2: 1.5, 4: 2.0}, {"max_rows": 3}, 2, 3.0),
        ({1: 1.0, 2: 1.5, 4: 2.0}, {"max_rows": 4}, 4, 2.0),
        ({1: 1.0, 2: 1.5, 4: 2.0}, {"max_rows": 9}, 4, 2.0),
        ({1: 1.0, 2: 1.5, 4: 2.0}, {"devices": 2}, 4, 1.5),
        ({1: 1.0, 2: 1.5, 4: 2.0}, {"devices": 3}, 4, 1.5),
        ({4: 2.0, 8: 3.0}, {"max_rows": 3}, 3, 4.0),  # smaller than what was measured
        ({1: 1.0, 4: 4.19}, {}, 4, 4.19),  # timings are no better than 5 %
        ({1: 1.0, 4: 4.21}, {}, 1, 4.0),
    ],
)
def test_the_seconds_of_the_calls(network: dict[int, float], options: dict[str, int], size: int, each: float) -> None:
    """Four samples, one step after another, in the largest calls that cost no more."""
    found = predict(table(5), METHOD, 1, 1e-2, Costs(CostTable.of(network)), batch=4, **options)
    assert (found.window, found.max_rows, found.devices) == (1, size, options.get("devices", 1))
    assert (found.rounds, found.evaluations, found.own) == (5, 20, 0.0)
    assert found.network == found.seconds == pytest.approx(5 * each)


def test_one_sample_on_one_device_unless_more_are_told() -> None:
    found = predict(table(5), METHOD, 1, 1e-2, Costs(CostTable.of({1: 1.0, 2: 1.5})))
    assert (found.evaluations, found.devices, found.network) == (5.0, 1, 5.0)


def test_the_solvers_own_seconds_are_those_of_its_rounds() -> None:
    """A round of one node of a window is no plain step: it costs as much as that of two."""
    costs = Costs(CostTable.of({1: 1.0}), CostTable.of({1: 0.1, 2: 0.3, 3: 0.5}))
    assert costs.of_solver([1, 1, 2, 3], 3) == pytest.approx(0.3 + 0.3 + 0.3 + 0.5)
    assert costs.of_solver([1, 1], 1) == pytest.approx(0.2)
    found = predict(table(10), METHOD, 4, 1.0, Costs(CostTable.of({1: 1.0}), CostTable.of({1: 0.1, 2: 0.3, 4: 0.5})))
    rows = predicted_rows(table(10), METHOD, 4, 1.0)
    assert found.own == pytest.approx(sum({1: 0.3, 2: 0.3, 3: 0.4, 4: 0.5}[count] for count in rows))
    assert found.seconds == pytest.approx(found.network + found.own)


def test_rounds_to_warm_up_with_have_one_node_and_end_with_the_steps() -> None:
    costs = Costs(CostTable.of({1: 1.0, 64: 64.0}))
    plain, warmed, long = (predict(table(10), METHOD, 4, 1.0, costs, warmup_steps=steps) for steps in (0, 3, 8))
    assert warmed.rounds == plain.rounds + 3
    assert warmed.evaluations == plain.evaluations + 3
    assert (long.rounds, long.evaluations) == (10, 8 + sum(predicted_rows(table(10), METHOD, 4, 1.0)[:2]))
    assert predict(table(10), METHOD, 1, 1.0, costs, warmup_steps=3).rounds == 10


def chosen(monkeypatch: pytest.MonkeyPatch, costs: dict[int, tuple[int, float]], **options: Any) -> tuple[int, int]:
    """The windows of the two choices, where each window takes so many rounds and seconds."""

    def told(recurrence: Recurrence, method: Any, window: int, *others: Any, **limits: Any) -> Prediction:
        rounds, taken = costs[window]
        return Prediction(window, 1, 1, rounds, rounds, taken, 0.0)

    monkeypatch.setattr(prediction, "predict", told)
    best, other = choose(table(max(costs)), METHOD, 1e-2, Costs(CostTable.of({1: 1.0})), **options)
    return best.window, other.window


@pytest.mark.parametrize(
    ("costs", "options", "windows"),
    [
        ({1: (4, 1.0), 2: (3, 0.8), 3: (2, 0.5), 4: (1, 0.7)}, {}, (3, 1)),
        ({1: (4, 1.0), 2: (3, 0.505), 3: (2, 0.5), 4: (1, 0.7)}, {}, (2, 1)),  # fewer nodes, and as fast within 1 %
        ({1: (4, 1.0), 2: (3, 0.506), 3: (2, 0.5), 4: (1, 0.7)}, {}, (3, 1)),
        ({1: (4, 1.0), 2: (3, 0.95), 3: (2, 0.9), 4: (1, 0.97)}, {}, (1, 3)),  # in parallel for more than 10 % alone
        ({1: (4, 1.0), 2: (3, 0.95), 3: (2, 0.89), 4: (1, 0.97)}, {}, (3, 1)),
        ({1: (4, 1.0), 2: (3, 5.0), 3: (2, 4.0), 4: (1, 3.0)}, {}, (1, 4)),
        ({1: (4, 1.0), 2: (3, 0.2), 3: (2, 0.5), 4: (1, 0.7)}, {"max_rounds": 2}, (3, 1)),
        ({1: (4, 1.0), 2: (3, 5.0), 3: (2, 4.0), 4: (2, 3.0)}, {"max_rounds": 2}, (4, 1)),  # no other fits
        ({1: (4, 1.0), 2: (3, 5.0), 3: (2, 4.0), 4: (2, 3.0)}, {"max_rounds": 4}, (1, 4)),
        ({1: (4, 1.0), 2: (3, 0.2), 3: (2, 0.5), 4: (2, 0.4)}, {"max_rounds": 1}, (4, 1)),  # none fits: fewest rounds
        ({1: (4, 1.0), 2: (5, 0.2), 3: (6, 0.2), 4: (7, 0.1)}, {"max_rounds": 4}, (1, 1)),
        ({1: (1, 1.0)}, {}, (1, 1)),
        ({1: (1, 1.0)}, {"max_rounds": 0}, (1, 1)),
    ],
)
def test_the_choice(
    costs: dict[int, tuple[int, float]],
    options: dict[str, int],
    windows: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert chosen(monkeypatch, costs, **options) == windows


def test_the_limits_reach_the_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []

    def note(*arguments: Any, **limits: Any) -> Prediction:
        told.append(limits)
        return Prediction(1, 1, 1, 1.0, 1.0, 1.0, 0.0)

    monkeypatch.setattr(prediction, "predict", note)
    given = {"batch": 3, "devices": 2, "max_rows": 5, "warmup_steps": 4}
    costs = Costs(CostTable.of({1: 1.0}))
    choose(table(3), METHOD, 1e-2, costs, **given)
    assert told == [given] * 3  # sequentially, and two windows
    told.clear()
    choose(table(3), METHOD, 1e-2, costs)
    assert told == [{"batch": 1, "devices": 1, "max_rows": None, "warmup_steps": 0}] * 3


def test_the_sentence_on_a_choice() -> None:
    one = Prediction(1, 1, 1, 50.0, 50.0, 2.0, 0.5)
    many = Prediction(8, 1, 1, 11.6, 90.0, 0.4, 0.02)
    assert explain(many, one) == (
        'window="auto" chose a window of 8: 12 rounds in 420 ms as predicted, '
        "not sequential sampling: 50 rounds in 2.5 s."
    )
    assert explain(one, many, 60).startswith('window="auto" chose within max_rounds=60 sequential sampling: 50 rounds')
    assert [seconds(value) for value in (1.0, 0.999, 0.0015, 12.34)] == ["1 s", "999 ms", "1.5 ms", "12.3 s"]
