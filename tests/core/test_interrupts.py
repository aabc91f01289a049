"""An interrupt may come at any line of the core: what it leaves belongs together, and can be gone on from."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

import parasolver_core
from parasolver_core import (
    DDIM,
    DDPM,
    DPMSolver,
    Method,
    NoiseSchedule,
    ParallelIntegralSolver,
    SequentialSolver,
    Solution,
    Status,
    solve,
    solve_sequential,
)
from parasolver_core.planning import auto
from tests.core.problems import Rational, normal

CORE = str(Path(parasolver_core.__file__).parent)
SCHEDULE = NoiseSchedule.linear()
NETWORK = Rational()
FIRST = 5  # line of `solve` within its try block; the wrapper that keeps it out of graphs has two


class InterruptAt:
    """Raises KeyboardInterrupt at the k-th line that runs in the core; with ``None`` it counts the lines only."""

    def __init__(self, line: int | None = None) -> None:
        self.line, self.lines = line, 0

    def __enter__(self) -> "InterruptAt":
        self._before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *raised: object) -> None:
        sys.settrace(self._before)

    def _called(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(CORE) else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self.line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


def interrupted_at(line: int, run: Callable[[], Solution]) -> Solution:
    with pytest.raises(KeyboardInterrupt) as caught, InterruptAt(line):
        run()
    left = caught.value.solution  # type: ignore[attr-defined]
    assert isinstance(left, Solution)
    return left


def lines_of(run: Callable[[], Solution]) -> int:
    run()  # what is remembered between runs is then known
    with InterruptAt() as counted:
        run()
    return counted.lines


RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sequential": (DDIM(SCHEDULE), {"method": "sequential"}),
    "sequential, two steps": (DPMSolver(SCHEDULE), {"method": "sequential"}),
    "window": (DDIM(SCHEDULE), {"window": 6, "tolerance": 1e-9}),
    "window, noise": (DDPM(SCHEDULE), {"window": 6, "tolerance": 1e-9}),
    "window, two steps": (DPMSolver(SCHEDULE), {"window": 6, "tolerance": 1e-9}),
    "window of 1": (DDIM(SCHEDULE), {"window": 1}),
    "warm-up": (DDIM(SCHEDULE), {"window": 6, "warmup_steps": 3, "tolerance": 1e-9}),
    "spread": (DDIM(SCHEDULE), {"window": 12, "tolerance": 0.3}),
    "spread, then a window": (DDIM(SCHEDULE), {"window": 12, "tolerance": 0.3, "max_rounds": None}),
    "paradigms": (DDIM(SCHEDULE), {"window": 6, "method": "paradigms", "tolerance": 1e-9}),
    "parataa": (DDIM(SCHEDULE), {"window": 6, "method": "parataa", "tolerance": 1e-9}),
}


def rough(x: Any, t: Any) -> Any:
    """No interpolation describes it: spread nodes give way to a window."""
    return np.sin(3 * x + 17.0 * t[:, None])


def check_that_it_belongs_together(left: Solution, way: Any, near: float) -> None:
    """Steps, states, trajectory, statuses and stats; states are relatively ``near`` to the sequential ones."""
    n = len(way) - 1
    assert left.status is (Status.CONVERGED if set(left.steps) == {n} else Status.INTERRUPTED)
    assert left.trajectory is not None
    for sample, steps in enumerate(left.steps):
        np.testing.assert_array_equal(left.states[sample], left.trajectory[steps, sample])
        for got, expected in zip(left.trajectory[: steps + 1, sample], way[: steps + 1, sample], strict=True):
            assert np.linalg.norm(got - expected) <= near * np.linalg.norm(expected)
        assert np.all(np.isnan(np.asarray(left.trajectory[steps + 1 :, sample])))
        assert left.statuses[sample] is (Status.CONVERGED if steps == n else Status.INTERRUPTED)
        accepted = [part.accepted for record in left.stats.history for part in record.samples if part.sample == sample]
        assert sum(accepted) == steps
    assert left.stats.rounds == len(left.stats.history)
    assert left.stats.evaluations == sum(record.evaluations for record in left.stats.history)
    assert np.all(np.isfinite(np.asarray(left.sample)))


def prepared(name: str) -> tuple[Callable[[], Solution], Any, float]:
    """A run, the plain loop's states, and how far from them its own may be."""
    rule, options = RUNS[name]
    steps = SCHEDULE.timesteps(60 if "spread" in name else 14)
    network = rough if "then" in name else NETWORK
    x_T = normal((2, 4))
    way = solve_sequential(network, x_T, steps, rule, save="trajectory").trajectory

    def run() -> Solution:
        return solve(network, x_T, steps, rule, save="trajectory", **options)

    return run, way, 0.3 if "spread" in name else 1e-7


@pytest.mark.parametrize("name", RUNS)
def test_what_an_interrupt_leaves_belongs_together(name: str) -> None:
    run, way, near = prepared(name)
    lines = lines_of(run)
    rng = np.random.default_rng(0)
    seen = set()
    for line in rng.integers(FIRST, lines, 40).tolist():
        left = interrupted_at(line, run)
        check_that_it_belongs_together(left, way, near)
        seen.add(left.stats.rounds)
    assert len(seen) > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_an_interrupt_at_every_tenth_line(name: str) -> None:
    run, way, near = prepared(name)
    for line in range(FIRST, lines_of(run), 10):
        check_that_it_belongs_together(interrupted_at(line, run), way, near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_interrupt_in_half_precision(dtype: torch.dtype) -> None:
    x_T, steps = torch.asarray(normal((2, 4))).to(dtype), SCHEDULE.timesteps(14)
    way = solve_sequential(NETWORK, x_T, steps, DDIM(SCHEDULE), save="trajectory").trajectory

    def run() -> Solution:
        return solve(NETWORK, x_T, steps, DDIM(SCHEDULE), 6, tolerance=1e-4, save="trajectory")

    lines = lines_of(run)
    for line in np.linspace(lines // 4, lines - 10, 8).astype(int).tolist():
        left = interrupted_at(line, run)
        assert left.trajectory is not None
        assert left.states.dtype == left.sample.dtype == left.trajectory.dtype == dtype
        for sample, reached in enumerate(left.steps):
            assert torch.equal(left.states[sample], left.trajectory[reached, sample])
            torch.testing.assert_close(left.states[sample], way[reached, sample], rtol=0, atol=0.05)


@pytest.mark.filterwarnings("ignore:x_T. has an RMS")  # a state on the way is no noise
def test_a_run_can_be_gone_on_with_from_what_an_interrupt_left() -> None:
    x_T, steps = normal((1, 4)), SCHEDULE.timesteps(14)
    whole = solve_sequential(NETWORK, x_T, steps, DDIM(SCHEDULE))

    def run() -> Solution:
        return solve(NETWORK, x_T, steps, DDIM(SCHEDULE), 6, tolerance=0)

    for line in np.random.default_rng(1).integers(FIRST, lines_of(run), 25).tolist():
        left = interrupted_at(line, run)
        if left.steps[0] == len(steps):
            rest = left.states
        else:
            rest = solve_sequential(NETWORK, left.states, steps[left.steps[0] :], DDIM(SCHEDULE)).sample
        np.testing.assert_allclose(rest, whole.sample, rtol=1e-12)


def test_stepping_by_hand_after_an_interrupt() -> None:
    solver = ParallelIntegralSolver(DDIM(SCHEDULE), window=6)
    way = solve_sequential(
        NETWORK, normal((2, 4)), SCHEDULE.timesteps(14), DDIM(SCHEDULE), save="trajectory"
    ).trajectory
    torn = 0
    for line in range(5, 400, 13):
        state = solver.init(NETWORK, normal((2, 4)), SCHEDULE.timesteps(14))
        solver.step(state)
        before = state.steps
        with pytest.raises(KeyboardInterrupt), InterruptAt(line):
            solver.step(state)
        assert state.steps == before
        for sample, reached in enumerate(state.steps):
            np.testing.assert_allclose(solver.result(state).states[sample], way[reached, sample], atol=0.05)
        if state.torn:
            torn += 1
            assert solver.result(state).status is Status.RUNNING
            with pytest.raises(RuntimeError, match="its last round was interrupted half-way"):
                solver.step(state)
    assert torn > 5


def test_stepping_by_hand_after_an_interrupt_of_the_plain_loop() -> None:
    interrupts = [KeyboardInterrupt]

    def noise(step: int, sample: int) -> np.ndarray:
        if step == 3 and interrupts:
            raise interrupts.pop()
        return np.zeros(4)

    solver = SequentialSolver(DDPM(SCHEDULE))
    state = solver.init(NETWORK, normal((1, 4)), SCHEDULE.timesteps(14), noise=noise)
    for _ in range(3):
        solver.step(state)
    with pytest.raises(KeyboardInterrupt):
        solver.step(state)
    assert solver.result(state).steps == (3,)
    with pytest.raises(RuntimeError, match="its last round was interrupted half-way"):
        solver.step(state)


def test_an_interrupt_while_the_window_is_chosen() -> None:
    x_T, steps = normal((2, 4)), SCHEDULE.timesteps(14)

    def run() -> Solution:
        auto._MADE.clear()  # choices that are remembered
        costs = {1: 1.0, 64: 1.0}
        return solve(NETWORK, x_T, steps, DDIM(SCHEDULE), "auto", costs=costs, tolerance=1e-9, save="trajectory")

    way = solve_sequential(NETWORK, x_T, steps, DDIM(SCHEDULE), save="trajectory").trajectory
    lines = lines_of(run)
    for line in np.random.default_rng(2).integers(FIRST, lines, 40).tolist():
        check_that_it_belongs_together(interrupted_at(line, run), way, 1e-7)


def test_an_interrupt_before_the_run_has_begun() -> None:
    def noise(step: int, sample: int) -> np.ndarray:
        raise KeyboardInterrupt

    x_T = normal((2, 4))
    with pytest.raises(KeyboardInterrupt) as caught:  # spread nodes ask for noise when they are made
        solve(NETWORK, x_T, SCHEDULE.timesteps(1000), DDPM(SCHEDULE), 50, tolerance=0.2, noise=noise, save="trajectory")
    left = caught.value.solution  # type: ignore[attr-defined]
    assert left.steps == (0, 0)
    assert left.statuses == (Status.INTERRUPTED,) * 2
    assert left.message == "Interrupted before the first round; no step is final."
    np.testing.assert_array_equal(left.states, x_T)
    np.testing.assert_array_equal(left.trajectory[0], x_T)
    assert left.trajectory.shape == (1001, 2, 4)
    assert np.all(np.isnan(left.trajectory[1:]))


class SlottedError(Exception):
    """Refuses attributes."""

    __slots__ = ()

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"no {name} here")


class NoNotesError(Exception):
    def add_note(self, note: str) -> None:
        raise RuntimeError("no notes here")


class SilentError(RuntimeError):
    def __str__(self) -> str:
        raise LookupError("cannot say")


class OwnSolutionError(Exception):
    @property
    def solution(self) -> int:
        return 42


@pytest.mark.parametrize("kind", [SlottedError, NoNotesError, SilentError, OwnSolutionError])
@pytest.mark.parametrize("options", [{"method": "sequential"}, {"window": 6}, {"window": 6, "progress": True}], ids=str)
@pytest.mark.parametrize("where", ["network", "callback", "noise"])
def test_an_exception_that_refuses_attributes_passes_through(kind: Any, options: dict[str, Any], where: str) -> None:
    raised = kind("mine")

    def fail(place: str) -> None:
        if place == where:
            raise raised

    def network(x: Any, t: Any) -> Any:
        fail("network")
        return NETWORK(x, t)

    def noise(step: int, sample: int) -> np.ndarray:
        fail("noise")
        return np.zeros(4)

    with pytest.raises(kind) as caught:
        solve(
            network,
            normal((2, 4)),
            SCHEDULE.timesteps(14),
            DDPM(SCHEDULE),
            noise=noise,
            callback=lambda state: fail("callback"),
            **options,
        )
    assert caught.value is raised
    assert raised.args == ("mine",)
    if kind is NoNotesError:
        assert caught.value.solution.status is Status.FAILED
    if kind is OwnSolutionError:
        assert caught.value.solution == 42


def test_an_exception_raised_twice_carries_the_later_solution() -> None:
    error = ValueError("the same object")

    def network(x: Any, t: Any) -> Any:
        if t.min() < 500:
            raise error
        return NETWORK(x, t)

    for batch in (1, 3):
        with pytest.raises(ValueError, match="the same object") as caught:
            solve(network, normal((batch, 4)), SCHEDULE.timesteps(14), DDIM(SCHEDULE), 3)
        assert caught.value.solution.sample.shape == (batch, 4)  # type: ignore[attr-defined]


def test_a_device_that_is_lost_does_not_hide_the_first_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*args: Any) -> Any:
        raise RuntimeError("device lost")

    def network(x: Any, t: Any) -> Any:
        monkeypatch.setattr("parasolver_core.solver.state.narrow", lost)
        raise ValueError("the first")

    with pytest.raises(ValueError, match="the first"):
        solve(network, normal((2, 4)), SCHEDULE.timesteps(14), DDIM(SCHEDULE))


@pytest.mark.parametrize("method", ["secant", Method(spread=False), "paradigms", "parataa", "parasolver", "sequential"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("noisy", [False, True])
def test_the_trajectory_ends_with_the_sample_to_the_bit(method: Any, dtype: str, noisy: bool) -> None:
    x_T = torch.asarray(normal((2, 6))).to(getattr(torch, dtype))
    rule = DDPM(SCHEDULE) if noisy else DDIM(SCHEDULE)
    steps = SCHEDULE.timesteps(60 if method == "secant" else 20)
    got = solve(NETWORK, x_T, steps, rule, 12, tolerance=0.3, method=method, save="trajectory", seed=1)
    assert got.trajectory is not None
    assert torch.equal(got.trajectory[-1], got.sample)
    assert torch.equal(got.trajectory[0], x_T)
    assert torch.equal(got.states, got.sample)
