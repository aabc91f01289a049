"""What calls cost: how they are timed, and what is kept of them; clocks are turned by hand."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from parasolver_core import DDIM, DDPM, NoiseSchedule, SequentialSolver
from parasolver_core.methods.presets import get_method
from parasolver_core.planning import measurement
from parasolver_core.planning.costs import CostTable, cache_folder, describe, keep, measure, recall
from parasolver_core.planning.measurement import cost_key, measure_run, measured_costs
from tests.core.problems import Rational, normal

SCHEDULE = NoiseSchedule.linear()
TABLES = {"network": CostTable.of({1: 0.1})}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return cache_folder()


def test_the_table_at_its_ends() -> None:
    table = CostTable((2, 4), (1.0, 3.0))
    assert [table(rows) for rows in (1, 2, 3, 4, 5, 8)] == pytest.approx([1.0, 1.0, 2.0, 3.0, 3.75, 6.0])
    assert CostTable.of(table) is table
    assert CostTable.of({4: 3, 2: 1}) == table
    assert table.up_to(4) == table
    assert table.up_to(3) == table.up_to(2) == table.up_to(1) == CostTable((2,), (1.0,))
    assert (table.in_calls(4, 4), table.in_calls(5, 4), table.in_calls(0, 4)) == (3.0, 4.0, 0.0)


@pytest.mark.parametrize(
    ("rows", "seconds"),
    [
        ((), ()),
        ((1,), (1.0, 2.0)),
        ((1, 2), (1.0,)),
        ((2, 1), (1.0, 1.0)),
        ((1, 1), (1.0, 1.0)),
        ((0,), (1.0,)),
        ((1,), (0.0,)),
        ((1, 2), (1.0, -1.0)),
        ((1, 2), (np.inf, 1.0)),
    ],
)
def test_tables_that_cannot_be(rows: tuple[int, ...], seconds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"^costs: expected"):
        CostTable(rows, seconds)


class Timed:
    """Calls that take as long as told, by a clock that nothing else turns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost: Callable[[int], float]) -> None:
        self.now, self.cost, self.rows = 0.0, cost, []
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def __call__(self, rows: int) -> None:
        self.rows.append(rows)
        self.now += self.cost(rows)


@pytest.mark.parametrize(
    ("calls", "least", "made"),
    [
        (9.9, 0.0, {1: 3, 2: 3, 4: 3}),  # a larger size would take 10; there is time to repeat them once
        (9.0, 0.0, {1: 3, 2: 3, 4: 3}),
        (8.9, 0.0, {1: 2, 2: 2, 4: 2}),
        (10.0, 0.0, {1: 2, 2: 2, 4: 2, 8: 2}),
        (0.0, 5.0, {1: 2, 2: 2, 4: 2, 8: 2}),
        (12.0, 2.5, {1: 2, 2: 2, 4: 2, 8: 2, 16: 2}),
        (5.9, 0.0, {1: 5}),
        (0.0, 0.0, {1: 2}),
    ],
)
def test_what_is_spent_on_timing(
    calls: float, least: float, made: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first call of each size is not charged for, the second counts double, as both, and two of the next are seen."""
    call = Timed(monkeypatch, lambda rows: 0.5)
    assert measure(call, 1, 64, calls, least).rows == tuple(made)
    assert {rows: call.rows.count(rows) for rows in call.rows} == made


@pytest.mark.parametrize(
    ("cost", "rows"),
    [
        ({1: 1.0, 2: 1.91, 4: 3.7, 8: 8.0}, (1, 2, 4)),
        ({1: 1.0, 2: 2.0, 4: 3.8, 8: 8.0}, (1, 2, 4)),
        ({1: 1.0, 2: 1.89, 4: 3.7, 8: 8.0}, (1, 2, 4, 8)),
        ({1: 1.0, 2: 2.0, 4: 3.7, 8: 8.0}, (1, 2, 4, 8)),
        ({1: 1.0, 2: 1.0, 4: 2.0, 8: 4.0}, (1, 2, 4, 8)),
        ({1: 2.0, 2: 1.0, 4: 2.0, 8: 4.0}, (1, 2, 4, 8)),
    ],
)
def test_sizes_are_doubled_until_they_gain_nothing_twice(
    cost: dict[int, float], rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measure(Timed(monkeypatch, cost.__getitem__), 1, 8, 1e9).rows == rows


def test_seconds_are_those_on_which_processes_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure(Timed(monkeypatch, lambda rows: 1.0), 1, 2, 10.0, agree=lambda values: [2 * values[0]])
    assert found == CostTable((1, 2), (2.0, 2.0))


def test_the_fastest_of_a_few_calls_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = iter([9.0, 5.0, 1.0, 3.0, *[2.0] * 100])
    found = measure(Timed(monkeypatch, lambda rows: next(slow)), 1, 1, 4.0)
    assert found == CostTable((1,), (1.0,))


@pytest.mark.parametrize(("days", "kept"), [(29.9, True), (30.1, False)])
def test_tables_are_kept_for_a_month(days: float, kept: bool, cache: Path) -> None:
    keep("old", TABLES)
    then = time.time() - days * 86400
    os.utime(cache / "old.json", (then, then))
    assert recall("old", ["network"]) == (TABLES if kept else None)
    keep("new", TABLES)
    assert (cache / "old.json").exists() == kept


@pytest.mark.parametrize(("size", "known"), [(10**6, True), (10**6 + 1, False)])
def test_a_file_that_is_too_large_is_none_of_ours(size: int, known: bool, cache: Path) -> None:
    keep("key", TABLES)
    file = cache / "key.json"
    file.write_text(file.read_text().ljust(size))
    assert (recall("key", ["network"]) is not None) == known


@pytest.mark.parametrize(("rows", "known"), [(2**31, True), (2**31 + 1, False)])
def test_a_table_of_too_many_rows_is_none_of_ours(rows: int, known: bool) -> None:
    keep("key", {"network": CostTable.of({1: 0.1}), "own": CostTable.of({1: 0.1, rows: 0.2})})
    assert (recall("key", ["network", "own"]) is not None) == known
    assert recall("key", ["network"]) is not None


def test_the_other_variable_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_folder() == tmp_path / "local" / "parasolver" / "costs"


def test_kinds_of_things_that_have_parameters() -> None:
    """A class has none, nor has what is no function of that name, nor what fails when it is asked."""
    x = normal((1, 4))

    def holding(thing: Any) -> str:
        def denoiser(x: Any, t: Any) -> Any:
            return thing

        return describe(denoiser, x)

    class Network:
        weights: Any = ()

        def parameters(self) -> Any:
            return self.weights

    class Broken:
        def parameters(self) -> Any:
            raise RuntimeError

    small, large = Network(), Network()
    small.weights, large.weights = [np.zeros(2)], [np.zeros(3)]
    assert holding(small) != holding(large)
    assert holding(Broken()) == holding(Broken())
    assert holding(Network) == holding(Network)


def own_of(steps: int, most: int, seconds: dict[int, float]) -> CostTable:
    probe: Any = SimpleNamespace(recurrence=range(steps), evaluator=SimpleNamespace(agree=list))
    return measurement._own_costs(probe, most, seconds.__getitem__)


def test_the_solvers_own_seconds_go_on_as_between_two_windows() -> None:
    found = own_of(100, 64, {1: 0.1, 2: 1.0, 16: 2.4})
    assert found.rows == (1, 2, 16, 64)
    assert found.seconds == pytest.approx((0.1, 1.0, 2.4, 2.4 + 48 * 0.1))
    assert own_of(100, 64, {1: 0.1, 2: 3.0, 16: 2.0}).seconds[-1] == 2.0  # they do not fall
    assert own_of(16, 16, {1: 0.1, 2: 1.0, 16: 2.4}).rows == (1, 2, 16)
    assert own_of(5, 5, {1: 0.1, 2: 1.0, 5: 2.4}).rows == (1, 2, 5)
    assert own_of(2, 2, {1: 0.1, 2: 1.0}).rows == (1, 2)
    assert own_of(1, 1, {1: 0.1}).rows == (1,)


class Probe:
    """A run of three samples that has not begun, on a network of two devices."""

    def __init__(self, steps: int, room: int | None) -> None:
        self.xp, self.batch, self.recurrence = np, 3, range(steps)
        self.xs = [np.arange(6.0).reshape(3, 2)]
        self.evaluator, self.asked = self, []
        self.max_rows, self.devices, self.agree = room, 2, list

    def __call__(self, x: np.ndarray, nodes: np.ndarray, owners: np.ndarray) -> np.ndarray:
        self.asked.append((x, nodes, owners))
        return x


def test_the_network_is_timed_on_rows_of_all_samples_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    probe: Any = Probe(9, None)
    told: list[Any] = []

    def noted(call: Any, *others: Any) -> CostTable:
        told.extend(others)
        call(7)
        call(1)
        return CostTable.of({3: 1.0, 6: 1.0, 12: 1.0})

    monkeypatch.setattr(measurement, "measure", noted)
    assert measurement._network_costs(probe, 4).rows == (3, 6, 12)
    assert told[:4] == [3, 12, 4.5, 0.2]  # at most half as long as a sequential run, and 0.2 s at least
    (x, nodes, owners), (one, node, owner) = probe.asked
    np.testing.assert_array_equal(x, probe.xs[0][[0, 1, 2, 0, 1, 2, 0]])
    assert nodes.tolist() == [0, 1, 2, 4, 5, 6, 8]
    assert owners.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert (one.tolist(), node.tolist(), owner.tolist()) == ([[0.0, 1.0]], [0], [0])
    crowded: Any = Probe(9, 3)  # memory ran out in larger calls than three rows a device
    assert measurement._network_costs(crowded, 4).rows == (3, 6)
    probe.agree = lambda values: [max(values[0], -4.0)]  # in another process memory ran out in calls of four
    assert measurement._network_costs(probe, 4).rows == (3,)


def test_the_fastest_of_four_runs_is_the_solvers_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    solver = SequentialSolver(DDIM(SCHEDULE), max_rows=5)
    probe: Any = solver.init(Rational(), normal((1, 4)), SCHEDULE.timesteps(10))
    times = iter([4.0, 3.0, 5.0, 2.0, 1.0])
    stubs: list[Any] = []
    clock = [5.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def once(stub: Any, x_T: Any, timesteps: Any) -> float:
        stubs.append(stub)
        clock[0] += 0.01
        return next(times)

    monkeypatch.setattr(measurement, "_own_seconds_once", once)
    method = get_method("identity")
    assert measurement._own_seconds(solver, probe, 4, method, 0.125) == 2.0
    assert len(stubs) == 4
    assert (stubs[0].window, stubs[0].method, stubs[0].tolerance) == (4, method, 0.125)
    assert (stubs[0].check, stubs[0].max_rows, stubs[0].max_rounds) == (False, 5, 8)
    monkeypatch.setattr(measurement, "_OWN_BUDGET", 0.005)
    times = iter([-4.0, 3.0])
    assert measurement._own_seconds(solver, probe, 1, method, 0.125) == 1e-9  # of no time at all
    assert len(stubs) == 5  # there was no time for more
    assert isinstance(stubs[-1], SequentialSolver)
    assert (stubs[-1].max_rows, stubs[-1].max_rounds) == (5, 8)
    times = iter([1.0])
    measurement._own_seconds(solver, probe, 2, method, 0.125)
    assert stubs[-1].window == 2


@pytest.mark.parametrize(("rule", "drawn"), [(DDIM(SCHEDULE), 0.0), (DDPM(SCHEDULE), 0.25)])
def test_the_median_of_the_rounds_without_network_and_noise(
    rule: Any, drawn: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first, in which the window opens, is left out; of each step that became final the noise is taken off."""

    class Stub:
        def init(self, network: Any, x_T: Any, timesteps: Any) -> Any:
            rounds = [(9.0, 1.0, 1), (3.0, 1.0, 1), (6.0, 2.0, 2), (8.0, 1.0, 3)]
            history = [
                SimpleNamespace(seconds=s, seconds_denoiser=d, samples=[SimpleNamespace(accepted=a)])
                for s, d, a in rounds
            ]
            self.left = len(history)
            x = np.linspace(-9.0, 9.0, 37)
            assert np.max(np.abs(network(x, timesteps))) <= 0.5  # whatever the states become
            return SimpleNamespace(recurrence=rule.recurrence(timesteps), stats=SimpleNamespace(history=history))

        def done(self, state: Any) -> bool:
            return self.left == 0

        def step(self, state: Any) -> None:
            self.left -= 1

    monkeypatch.setattr(measurement, "_seconds_of_noise", lambda state: 0.25)
    stub: Any = Stub()
    wanted = float(np.median([2.0 - drawn, 4.0 - 2 * drawn, 7.0 - 3 * drawn]))
    assert measurement._own_seconds_once(stub, normal((1, 4)), SCHEDULE.timesteps(10)) == wanted


def test_the_median_time_of_a_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seconds, drawn, forgotten = [0.0], [5.0, 1.0, 2.0, 9.0, 3.0], [], []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    class Noise:
        def __call__(self, step: int, sample: int) -> None:
            drawn.append((step, sample))
            clock[0] += seconds[step]

        def forget(self, step: int, sample: int) -> None:
            forgotten.append((step, sample))

    state: Any = SimpleNamespace(noise=Noise(), recurrence=range(5))
    assert measurement._seconds_of_noise(state) == 3.0
    assert drawn == forgotten == [(step, 0) for step in range(5)]
    seconds[:] = [1.0] * 20
    state.recurrence = range(20)
    drawn.clear()
    measurement._seconds_of_noise(state)
    assert len(drawn) == 8


def test_costs_are_kept_for_each_sampler_shape_and_method(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(rule: Any, steps: int, key: str = "key") -> None:
        probe = SequentialSolver(rule).init(Rational(), normal((1, 4)), SCHEDULE.timesteps(steps))
        measured_costs(probe, key, lambda window: 0.001)

    made(DDIM(SCHEDULE), 10)
    made(DDIM(SCHEDULE), 12)
    made(DDPM(SCHEDULE), 10)
    assert sorted(one.name for one in cache.iterdir()) == [
        "key-10-1-False-1.json", "key-10-1-True-1.json", "key-12-1-False-1.json"
    ]  # fmt: skip
    made(DDIM(SCHEDULE), 100)
    made(DDIM(SCHEDULE), 70)  # beyond 64 steps there are no more rows
    assert [one.name for one in cache.iterdir() if "-64-" in one.name] == ["key-64-1-False-1.json"]
    solver = SequentialSolver(DDIM(SCHEDULE))
    keys = {
        cost_key(Rational(), normal((1, 4)), solver, get_method("secant")),
        cost_key(Rational(), normal((1, 4)), solver, get_method("identity")),
        cost_key(Rational(), normal((1, 4)), SequentialSolver(DDIM(SCHEDULE), max_rows=3), get_method("secant")),
    }
    assert len(keys) == 3


def test_processes_tell_each_other_what_they_have_kept() -> None:
    told: list[list[float]] = []
    for tables in (None, {1: 0.1}, {1: 0.2}):
        probe = SequentialSolver(DDIM(SCHEDULE)).init(Rational(), normal((1, 4)), SCHEDULE.timesteps(10))
        if tables:
            keep("key-10-1-False-1", dict.fromkeys(("network", "own"), CostTable.of(tables)))
        first: list[Any] = []
        probe.evaluator.agree = lambda values: first.append(values) or list(values)  # type: ignore[method-assign]  # noqa: B023
        measured_costs(probe, "key", lambda window: 0.001)
        told.append(first[0])
    assert all(number == -other for number, other in told)
    assert len({number for number, _ in told}) == 3


def test_costs_are_described_for_every_library(xp: ModuleType) -> None:
    keys = [describe(Rational(), normal(shape, xp)) for shape in ((1, 4), (1, 4), (2, 4))]
    assert keys[0] == keys[1] != keys[2]


def test_costs_of_a_run_are_those_that_a_choice_finds(cache: Path) -> None:
    arguments = (Rational(), normal((2, 4)), SCHEDULE.timesteps(6), DDIM(SCHEDULE))
    found = measure_run(*arguments)
    assert found.network.rows[0] == 2
    assert found.own is not None
    assert found.own.rows == (1, 2, 6)
    assert measure_run(*arguments) == found  # as kept
    assert len(list(cache.iterdir())) == 1
