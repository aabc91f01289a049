"""Predicted rounds, measured costs, and the window that follows from them."""

import math
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parasolver_core import DDIM, DDPM, NoiseSchedule, SequentialSolver, solve, solve_sequential
from parasolver_core.methods.expected import sliding_rounds
from parasolver_core.methods.presets import get_method
from parasolver_core.planning.auto import remembered
from parasolver_core.planning.costs import CostTable, cache_folder, describe, keep, measure, recall
from parasolver_core.planning.measurement import measured_costs
from parasolver_core.planning.prediction import (
    Costs,
    candidates,
    choose,
    predict,
    predicted_rounds,
    predicted_rows,
)
from tests.core.problems import Counted, Mixture, Rational, TanhNetwork, normal

SCHEDULE = NoiseSchedule.linear()
METHOD = get_method("secant")
FREE = {1: 0.05, 64: 0.05}  # a batch costs as much as a row
BUSY = {1: 0.05, 64: 3.2}  # a batch costs as much as its rows


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return cache_folder()


def table(steps: int, rule: Any = DDIM) -> Any:
    return rule(SCHEDULE).recurrence(SCHEDULE.timesteps(steps))


def test_costs_between_and_beyond_what_was_measured() -> None:
    costs = CostTable.of({4: 1.0, 1: 0.4, 8: 3.0})
    assert [costs(rows) for rows in (1, 4, 6, 8, 16)] == pytest.approx([0.4, 1.0, 2.0, 3.0, 6.0])
    assert costs(2) == pytest.approx(0.6)
    assert costs.in_calls(9, 4) == pytest.approx(1.0 + 1.0 + 0.4)
    assert costs.in_calls(8, 4) == 2 * costs(4)
    assert costs.in_calls(3, 4) == costs(3)
    assert costs.up_to(7) == CostTable.of({1: 0.4, 4: 1.0})
    assert CostTable.of({4: 1.0, 8: 3.0}).up_to(2) == CostTable.of({4: 1.0})


@pytest.mark.parametrize(
    "costs", [{}, {0: 1.0}, {1: -1.0}, {1: math.nan}, {"many": 1.0}, [1, 2], {1: math.inf}], ids=repr
)
def test_bad_costs(costs: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="costs"):
        solve(Rational(), normal((1, 4)), SCHEDULE.timesteps(10), DDIM(SCHEDULE), window="auto", costs=costs)


def test_bad_windows() -> None:
    arguments = (Rational(), normal((1, 4)), SCHEDULE.timesteps(10), DDIM(SCHEDULE))
    with pytest.raises(ValueError, match='"auto"'):
        solve(*arguments, window="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="costs"):
        solve(*arguments, window=4, costs=FREE)


@pytest.mark.parametrize("rule", [DDIM, DDPM])
@pytest.mark.parametrize(("steps", "window"), [(20, 4), (50, 8), (50, 16), (100, 8), (100, 32)])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-3])
def test_predicted_rounds_are_near_the_real_ones(rule: Any, steps: int, window: int, tolerance: float) -> None:
    """On a network that the constants were not fitted to; they are good to 20 % where they were."""
    network = Mixture(SCHEDULE, "epsilon")
    got = solve(network, normal((1, 16)), SCHEDULE.timesteps(steps), rule(SCHEDULE), window, tolerance=tolerance)
    assert predicted_rounds(table(steps, rule), METHOD, window, tolerance) == pytest.approx(got.stats.rounds, rel=0.4)


@pytest.mark.parametrize(("steps", "window", "tolerance"), [(400, 40, 1e-2), (1000, 64, 1e-2), (1000, 100, 1e-1)])
def test_predicted_rounds_of_spread_nodes(steps: int, window: int, tolerance: float) -> None:
    """This network takes fewer than those that the constants were fitted to, but not less than half as many."""
    assert METHOD.spreads(table(steps), window, tolerance)
    network, rule = Mixture(SCHEDULE, "epsilon"), DDIM(SCHEDULE)
    got = solve(network, normal((1, 16)), SCHEDULE.timesteps(steps), rule, window, tolerance=tolerance)
    assert got.stats.rounds <= predicted_rounds(table(steps), METHOD, window, tolerance) <= 2 * got.stats.rounds


@pytest.mark.parametrize("rule", [DDIM, DDPM])
def test_predicted_rows_grow_fewer_towards_the_end(rule: Any) -> None:
    """As a window does that has reached the last node; of the rows of all rounds they are as many as there are."""
    network, timesteps = Mixture(SCHEDULE, "epsilon"), SCHEDULE.timesteps(100)
    got = solve(network, normal((1, 16)), timesteps, rule(SCHEDULE), 32, tolerance=1e-2)
    rows = predicted_rows(table(100, rule), METHOD, 32, 1e-2)
    assert rows == sorted(rows, reverse=True)
    assert rows[0] == 32
    assert rows[-1] <= 16
    assert sum(rows) == pytest.approx(got.stats.evaluations, rel=0.15)


def test_predictions_are_in_order() -> None:
    for steps in (1, 2, 3, 10, 200, 1000):
        for tolerance in (0.0, 1e-3, 1e-1, 3.0):
            for window in {1, 2, 8, steps}:
                if window <= steps:
                    rounds = predicted_rounds(table(steps), METHOD, window, tolerance)
                    rows = predicted_rows(table(steps), METHOD, window, tolerance)
                    assert 0 < rounds <= steps
                    assert len(rows) == max(round(rounds), 1)
                    assert min(rows) >= 1
                    assert max(rows) <= window
    assert predicted_rows(table(50), METHOD, 1, 1e-2) == [1] * 50
    assert list(candidates(10)) == [2, 3, 4, 6, 8, 10]
    assert list(candidates(1)) == []


def test_predicted_seconds_are_those_of_the_calls() -> None:
    costs = Costs(CostTable.of({1: 1.0, 2: 1.5, 4: 10.0}), CostTable.of({1: 0.25, 8: 0.5}))
    sequential = predict(table(10), METHOD, 1, 1e-2, costs, batch=3)
    assert (sequential.rounds, sequential.evaluations, sequential.max_rows) == (10, 30, 2)  # 3 rows as 2 + 1
    assert sequential.network == pytest.approx(10 * 2.5)
    assert sequential.own == pytest.approx(2.5)
    one, two = (predict(table(50), METHOD, 8, 1e-2, costs, devices=devices) for devices in (1, 2))
    assert one.rounds == two.rounds
    assert one.network / 2 <= two.network < one.network


def test_the_choice_follows_the_costs() -> None:
    free, _ = choose(table(50), METHOD, 1e-2, Costs(CostTable.of(FREE)))
    busy, other = choose(table(50), METHOD, 1e-2, Costs(CostTable.of(BUSY)))
    assert free.window > 16
    assert free.seconds < 0.25 * 50 * 0.05
    assert busy.window == 1
    assert other.window > 1
    shared, _ = choose(table(50), METHOD, 1e-2, Costs(CostTable.of(BUSY)), devices=8)
    assert shared.window >= 8


def test_auto_with_costs_given() -> None:
    network = Counted(Rational())
    x_T, timesteps = normal((2, 4)), SCHEDULE.timesteps(50)
    busy = solve(network, x_T, timesteps, DDIM(SCHEDULE), window="auto", costs=BUSY)
    assert network.rows == [2] * 50
    assert 'window="auto" chose sequential sampling: 50 rounds' in busy.message
    assert np.array_equal(busy.sample, solve_sequential(Rational(), x_T, timesteps, DDIM(SCHEDULE)).sample)
    network.rows.clear()
    free = solve(network, x_T, timesteps, DDIM(SCHEDULE), window="auto", costs=FREE)
    assert len(network.rows) == free.stats.calls
    assert free.stats.rounds < 10
    assert 'window="auto" chose a window of' in free.message


def test_auto_measures_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def tick() -> float:
        clock[0] += 1e-6
        return clock[0]

    monkeypatch.setattr(time, "perf_counter", tick)

    class Slow:
        """A batch costs as much as a row."""

        def __init__(self) -> None:
            self.rows: list[int] = []

        def __call__(self, x: Any, t: Any) -> Any:
            rows.append(x.shape[0])
            clock[0] += 0.004
            return network(x, t)

    rows, network = [], TanhNetwork(4)
    arguments = (Slow(), normal((1, 4)), SCHEDULE.timesteps(40), DDIM(SCHEDULE))
    first = solve(*arguments, window="auto", check=False)
    assert 'window="auto" chose a window of' in first.message
    assert len(rows) > first.stats.calls
    assert len(list(cache.iterdir())) == 1
    rows.clear()
    second = solve(*arguments, window="auto", check=False)
    assert len(rows) == second.stats.calls
    timing = first.message.removeprefix(second.message)
    assert re.fullmatch(r" Timing the network took [\d.]+ m?s; later runs remember it\.", timing)


def test_an_error_while_measuring_has_the_state_reached() -> None:
    def broken(x: Any, t: Any) -> Any:
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom") as caught:
        solve(broken, normal((1, 4)), SCHEDULE.timesteps(10), DDIM(SCHEDULE), window="auto")
    assert caught.value.solution.steps == (0,)  # type: ignore[attr-defined]


def test_auto_and_sequential() -> None:
    network = Counted(Rational())
    solve(network, normal((1, 4)), SCHEDULE.timesteps(10), DDIM(SCHEDULE), window="auto", method="sequential")
    assert network.rows == [1] * 10


def test_measuring_doubles_the_rows_until_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("parasolver_core.planning.costs.time.perf_counter", lambda: clock[0])
    calls = []

    def call(rows: int, cost: Any) -> None:
        calls.append(rows)
        clock[0] += cost(rows)

    flat = measure(lambda rows: call(rows, lambda n: 1.0), 3, 50, calls=1e9)
    assert flat.rows == (3, 6, 12, 24, 48, 50)
    assert flat.seconds == (1.0,) * 6
    assert calls.count(6) == 16  # a warm one, and fifteen that count
    linear = measure(lambda rows: call(rows, float), 1, 64, calls=1e9)
    assert linear.rows == (1, 2, 4)
    odd = {1: 5.0, 2: 4.0, 4: 9.0}
    assert measure(lambda rows: call(rows, odd.__getitem__), 1, 4, calls=1e9).seconds == (4.0, 4.0, 9.0)
    hurried = measure(lambda rows: call(rows, lambda n: 1.0), 1, 64, calls=0.0)
    assert hurried.rows == (1,)


GOOD = b'{"network": {"1": 0.1}, "own": {"1": 0.1}}'
DAMAGED = [
    b"",
    b"[]",
    b"{",
    b"null",
    b'{"network": 3}',
    b'{"network": {}}',
    b'{"network": {"1": "much"}}',
    b'{"network": {"1": 0.1}}',  # a table is missing
    GOOD.replace(b'"own": {"1": 0.1}', b'"own": [[1, 0.1]]'),
    GOOD.replace(b"0.1", b"NaN"),
    GOOD.replace(b"0.1", b"-1"),
    GOOD.replace(b"0.1", b"null"),
    GOOD.replace(b"0.1", b"1" + b"0" * 400),  # no float is so large
    GOOD.replace(b'"1"', b'"1' + b"0" * 400 + b'"'),
    GOOD + b" " * 2_000_000,
    b"[" * 200_000,  # deeper than Python goes
    b"\xff\xfe" + GOOD,
    GOOD.decode().encode("utf-16"),
    b"\x00" * 100,
]


def test_the_cache_survives_damage_and_age(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {"network": CostTable.of({1: 0.1, 2: 0.15}), "own": CostTable.of({1: 0.01})}
    names = ("network", "own")
    assert recall("key", names) is None
    keep("key", tables)
    assert recall("key", names) == tables
    file = cache / "key.json"
    for damaged in DAMAGED:
        file.write_bytes(damaged)
        assert recall("key", names) is None, damaged[:50]
        keep("key", tables)
        assert recall("key", names) == tables
    month = time.time() - 31 * 86400
    os.utime(file, (month, month))
    assert recall("key", names) is None
    keep("other", tables)
    assert [one.name for one in cache.iterdir()] == ["other.json"]
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    keep("key", tables)  # nothing can be written there


def test_something_else_in_the_place_of_a_cached_file(cache: Path) -> None:
    tables, names = {"network": CostTable.of({1: 0.1})}, ("network",)
    (cache / "folder.json" / "inner").mkdir(parents=True)
    os.mkfifo(cache / "pipe.json")  # reading it would wait for ever
    for key in ("folder", "pipe"):
        assert recall(key, names) is None
        keep(key, tables)
    assert recall("pipe", names) == tables
    assert sorted(one.name for one in cache.iterdir()) == ["folder.json", "pipe.json"]


def test_a_relative_cache_folder_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    for relative in ("cache", "./cache", "~/cache", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert cache_folder() == tmp_path / ".cache" / "parasolver" / "costs"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine" / "parasolver" / "costs"


def test_costs_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert recall("key", ("network",)) is None
    keep("key", {"network": CostTable.of({1: 0.1})})


def test_choices_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parasolver_core.planning.auto._MADE", made := {})
    calls: list[int] = []

    def choice(number: int) -> Any:
        calls.append(number)
        return number

    assert [remembered(7, lambda: choice(7)) for _ in range(3)] == [7, 7, 7]
    assert calls == [7]
    most = max(len(made) for number in range(2000) if remembered(number, lambda: choice(number)) is not None)  # noqa: B023
    assert most < 1000
    assert remembered([], lambda: choice(1)) == 1  # cannot be hashed


def test_processes_that_remember_different_costs_measure_again(cache: Path) -> None:
    """Two processes, of which the other one tells a number of its own for what it has kept."""

    def run(others: Any) -> Costs:
        state = SequentialSolver(DDIM(SCHEDULE)).init(Rational(), normal((1, 4)), SCHEDULE.timesteps(10))
        monkey = state.evaluator
        monkey.agree = lambda values: [max(pair) for pair in zip(values, others(values), strict=True)]  # type: ignore[method-assign]
        return measured_costs(state, "key", lambda window: measured.append(window) or 0.001)

    measured: list[int] = []
    run(lambda values: values)
    first = len(measured)
    assert first > 0
    run(lambda values: values)
    assert len(measured) == first  # from what was kept
    run(lambda values: [value + 1 for value in values] if len(values) == 2 else values)
    assert len(measured) == 2 * first


def test_what_costs_depend_on() -> None:
    x = normal((1, 4))

    def made(factor: float) -> Any:
        return lambda x, t: factor * x

    assert describe(made(1.0), x) == describe(made(1.0), x)
    assert describe(made(3.0), x) == describe(made(7.5), x)  # another label, prompt or scale is not another network
    different = [
        describe(made(1.0), x),
        describe(made(2.0), x),
        describe(lambda x, t: x, x),
        describe(made(1.0), normal((2, 4))),
        describe(made(1.0), normal((1, 4), dtype="float32")),
        describe(made(1.0), x, "more"),
        describe(Rational(), x),
    ]
    assert len(set(different)) == len(different)


def test_networks_of_other_sizes_have_other_costs() -> None:
    x = normal((1, 4))

    class Network:
        def __init__(self, width: int, first: float) -> None:
            self._weights = [np.full((4, width), first), np.zeros(4)]

        def parameters(self) -> list[np.ndarray]:
            return self._weights

        def __call__(self, x: np.ndarray, t: np.ndarray) -> np.ndarray:
            return x

    keys = [describe(Network(*one), x) for one in ((8, 0.0), (8, 1.0), (16, 0.0))]
    assert keys[0] == keys[1] != keys[2]


def test_the_rounds_of_a_window_that_slides() -> None:
    """``N / w + (1 - 1 / w) (p + q digits (N / w)^r)``, at most N, and N where nothing is left to settle."""
    ddim, ddpm = (rule(SCHEDULE).recurrence(SCHEDULE.timesteps(64)) for rule in (DDIM, DDPM))
    assert sliding_rounds(ddim, 8, 1e-2) == pytest.approx(8 + 7 / 8 * (2.6 + 1.1 * 2 * 2))
    assert sliding_rounds(ddpm, 16, 1e-3) == pytest.approx(4 + 15 / 16 * (4.1 + 0.9 * 3 * 4**0.55))
    assert sliding_rounds(ddim, 64, 1.0) == pytest.approx(1 + 63 / 64 * 2.6)
    assert sliding_rounds(ddim, 8, 0.0) == sliding_rounds(ddim, 8, 1e-6)
    assert sliding_rounds(ddim, 1, 1e-6) == 64
    assert sliding_rounds(DDIM(SCHEDULE).recurrence(SCHEDULE.timesteps(5)), 2, 1e-6) == 5
