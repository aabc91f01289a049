"""ParaTAA's tables and rounds, held against the definitions of the paper, worked out by hand."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from parasolver_core import (
    DDIM,
    DDPM,
    Method,
    NoiseSchedule,
    ParallelIntegralSolver,
    Recurrence,
    StepRule,
    solve,
    solve_sequential,
)
from parasolver_core.methods.anderson import Anderson, high_order, triangular_weights
from tests.core.problems import TanhNetwork, normal

SCHEDULE = NoiseSchedule.linear()


@pytest.mark.parametrize("order", [1, 2, 3, 4, 9])
def test_states_from_those_some_steps_before(order: int) -> None:
    """Each is what the steps in between make of the state where they begin, one after another."""
    a = np.array([2.0, 3.0, 5.0, 7.0])
    states, forcing = high_order(a, order)
    x, added = np.array([1.0, 10.0, 100.0, 1000.0]), np.array([0.1, 0.2, 0.3, 0.4])
    for i in range(4):
        begin = max(0, i - order + 1)
        state = x[begin]
        for j in range(begin, i + 1):
            state = a[j] * state + added[j]
        assert states[i] @ x + forcing[i] @ added == pytest.approx(state, rel=1e-14)
        assert np.count_nonzero(states[i]) == 1
        assert np.count_nonzero(forcing[i]) == i + 1 - begin


def test_weights_are_least_squares_over_the_nodes_up_to_each() -> None:
    rng = np.random.default_rng(0)
    changes, residual = rng.standard_normal((2, 4, 3)), rng.standard_normal((4, 3))  # two rounds, four nodes
    gram = np.einsum("pnd,qnd->pqn", changes, changes)
    cross = np.einsum("pnd,nd->pn", changes, residual)
    ridge = 0.3
    found = triangular_weights(gram, cross, ridge)
    for i in range(4):
        flat = changes[:, : i + 1].reshape(2, -1).T
        padded = np.concatenate([flat, np.sqrt(ridge) * np.eye(2)])
        expected = np.linalg.lstsq(padded, np.append(residual[: i + 1].reshape(-1), [0.0, 0.0]))[0]
        np.testing.assert_allclose(found[:, i], expected, rtol=1e-12)


def test_no_rounds_have_no_weights() -> None:
    assert triangular_weights(np.zeros((0, 0, 3)), np.zeros((0, 3)), 0.1).shape == (0, 3)


def test_rounds_that_are_the_same_share_the_weight() -> None:
    """A matrix that has no inverse: the least of the weights that fit."""
    found = triangular_weights(np.ones((2, 2, 1)), np.full((2, 1), 3.0), 0.0)
    np.testing.assert_allclose(found, [[1.5], [1.5]])
    nothing = triangular_weights(np.zeros((2, 2, 1)), np.zeros((2, 1)), 0.0)
    np.testing.assert_array_equal(nothing, 0.0)


@pytest.mark.parametrize(("weight", "found"), [(1e4, 1e4), (1.0001e4, 0.0), (-1.0001e4, 0.0), (np.nan, 0.0)])
def test_a_weight_that_is_too_large_is_none(weight: float, found: float) -> None:
    """The other node keeps its own."""
    gram, cross = np.array([[[1.0, 0.0]]]), np.array([[2.0, weight - 2.0]])
    np.testing.assert_allclose(triangular_weights(gram, cross, 0.0), [[2.0, found]])


@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize("where", ["gram", "cross"])
def test_a_node_whose_sums_are_not_finite_makes_a_plain_step(where: str, bad: float) -> None:
    sums = {"gram": np.ones((1, 1, 3)), "cross": np.ones((1, 3))}
    sums[where][..., 1] = bad
    np.testing.assert_allclose(triangular_weights(sums["gram"], sums["cross"], 0.0), [[1.0, 0.0, 0.0]])


def test_nodes_of_which_one_cannot_be_told_do_not_spoil_the_others() -> None:
    """Of two rounds that are the same the inverse is another one, which refuses what is not finite."""
    gram, cross = np.ones((2, 2, 2)), np.ones((2, 2))
    gram[0, 0, 1] = np.inf
    np.testing.assert_allclose(triangular_weights(gram, cross, 0.0), [[0.5, 0.0], [0.5, 0.0]])


def test_one_weight_that_is_too_large_takes_the_others_with_it() -> None:
    gram, cross = np.diag([1.0, 1e-9])[:, :, None], np.ones((2, 1))
    np.testing.assert_array_equal(triangular_weights(gram, cross, 0.0), [[0.0], [0.0]])


def test_what_was_published() -> None:
    method = Anderson()
    assert repr(method) == ("Anderson(acceptance=StepVariance(end=0.0001), order=8, memory=2, ridge=0.001, floor=0.2)")
    assert (method.order, method.memory, method.ridge, method.floor) == (8, 2, 1e-3, 0.2)
    assert (method.spread, method.fill) == (False, "copy")
    assert method.sliding() is method
    assert Anderson(order=1, memory=0, ridge=0.0, floor=0.0).memory == 0


def iterate(method: Method, rule: Any, width: int, steps: int, rounds: int) -> list[np.ndarray]:
    """The states of the window, the final one before it first, after each round."""
    solver = ParallelIntegralSolver(rule, width, tolerance=0, method=method, check=False)
    state = solver.init(TanhNetwork(3, gain=4.0), normal((1, 3)), SCHEDULE.timesteps(steps), seed=4)
    found = []
    for _ in range(rounds):
        solver.step(state)
        assert state.stats.history[-1].samples[0].accepted == 1
        found.append(np.array(state.runs[0]._X))  # type: ignore[union-attr]
        np.testing.assert_array_equal(state.states[0], found[-1][0])
    return found


def by_hand(method: Anderson, rule: Any, width: int, steps: int, rounds: int) -> list[np.ndarray]:
    """The same by the equations of the paper: plain loops over all states of all rounds."""
    recurrence, network = rule.recurrence(SCHEDULE.timesteps(steps)), TanhNetwork(3, gain=4.0)
    solver = ParallelIntegralSolver(rule, steps, tolerance=0, check=False)
    noise = solver.init(network, normal((1, 3)), SCHEDULE.timesteps(steps), seed=4).noise
    x = np.repeat(normal((1, 3)), steps + 1, axis=0)  # all at the start
    a, b, c = recurrence.a[:, 0], recurrence.b[:, 0], recurrence.c
    z = np.stack([noise(i, 0) if c[i] else np.zeros(3) for i in range(steps)])
    past: list[tuple[np.ndarray, np.ndarray, int]] = []  # states, residuals, and the end of the window
    found = []
    for k in range(rounds):
        hi = min(k + width, steps)
        outputs = network(x[:-1], np.asarray(recurrence.timesteps))
        target = np.zeros((steps, 3))
        for i in range(k, hi):
            begin = max(k, i - (method.order or steps) + 1)
            state = x[begin]
            for j in range(begin, i + 1):
                state = a[j] * state + b[j] * outputs[j] + c[j] * z[j]
            target[i] = state
        past = [*past, (x[1:].copy(), target - x[1:], hi)][-method.memory - 1 :]
        new = target.copy()
        changes = [(q[0] - p[0], q[1] - p[1]) for p, q in pairwise(past)]
        for (dx, dr), (_, _, end) in zip(changes, past, strict=False):
            dx[end:], dr[end:] = 0, 0  # nodes that came later
        for i in range(k + 1, hi if changes else 0):  # the first is exact as it is
            columns = np.stack([change[1][k : i + 1].reshape(-1) for change in changes], axis=1)
            left = columns.T @ columns + method.ridge * np.eye(len(changes))
            weights = np.linalg.solve(left, columns.T @ past[-1][1][k : i + 1].reshape(-1))
            new[i] -= sum(w * (dx[i] + dr[i]) for w, (dx, dr) in zip(weights, changes, strict=True))
        x[k + 1 : hi + 1], x[hi + 1 :] = new[k:hi], new[hi - 1]
        found.append(x[k + 1 : min(k + 1 + width, steps) + 1].copy())
    return found


@pytest.mark.parametrize("rule", [DDIM(SCHEDULE), DDPM(SCHEDULE)], ids=["without noise", "with noise"])
@pytest.mark.parametrize("width", [9, 5])
@pytest.mark.parametrize(("order", "memory"), [(8, 2), (3, 1), (None, 3), (1, 0)])
def test_rounds_are_those_of_the_paper(rule: Any, order: int | None, memory: int, width: int) -> None:
    """Without tolerance, each round makes one more state final and lets one node in, a copy, as long as there are."""
    method = Anderson(order=order, memory=memory)
    for got, expected in zip(iterate(method, rule, width, 9, 6), by_hand(method, rule, width, 9, 6), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-7, atol=1e-9)


def test_states_that_do_not_move_are_final_at_once() -> None:
    class Still(StepRule):
        def recurrence(self, timesteps: Any) -> Recurrence:
            own = DDIM(SCHEDULE).recurrence(timesteps)
            return replace(own, a=np.ones_like(own.a))

    got = solve(lambda x, t: 0 * x, normal((1, 6)), SCHEDULE.timesteps(9), Still(), 9, tolerance=0, method="parataa")
    assert got.stats.rounds == 1
    np.testing.assert_array_equal(got.sample, normal((1, 6)))


def test_no_noise_is_asked_for_where_none_is_added() -> None:
    def noise(step: int, sample: int) -> Any:
        raise AssertionError

    arguments = (TanhNetwork(6), normal((1, 6)), SCHEDULE.timesteps(6), DDIM(SCHEDULE))
    assert solve(*arguments, 3, method="parataa", noise=noise).success


@pytest.mark.parametrize("window", [4, 12])
def test_what_a_round_tells(window: int) -> None:
    arguments = (TanhNetwork(6), normal((1, 6)), SCHEDULE.timesteps(12), DDIM(SCHEDULE))
    first, second, *_, last = solve(*arguments, window, tolerance=0, method="parataa", check=False).stats.history
    record = first.samples[0]
    assert record.nodes.tolist() == [*range(window)]
    assert record.accepted == 1
    assert second.samples[0].nodes.tolist() == [*range(1, min(window + 1, 12))]
    assert last.samples[0].nodes[-1] == 11
    # residuals are those of single steps from states that are all copies, RMS over their elements
    recurrence, x = arguments[3].recurrence(arguments[2]), normal((1, 6))
    outputs = arguments[0](np.repeat(x, window, axis=0), arguments[2][:window])
    steps = recurrence.a[:window] * x + recurrence.b[:window] * outputs - x
    np.testing.assert_allclose(record.defects, np.sqrt(np.mean(steps**2, axis=1)), rtol=1e-10)
    # an input moves as the state before it does; the first is final
    wanted = np.zeros(window)
    state = x[0]
    for i in range(window - 1):
        state = recurrence.a[i, 0] * state + recurrence.b[i, 0] * outputs[i]
        begin = max(0, i - 7)
        if begin == 0:
            wanted[i + 1] = np.linalg.norm(state - x[0]) / np.linalg.norm(x[0])
    np.testing.assert_allclose(record.residuals[:9], wanted[:9], rtol=1e-9)


def test_a_state_is_final_within_the_tolerance_times_the_noise_of_its_step_or_the_floor() -> None:
    """All before the first that is not, and that one, which is made of final states."""
    arguments = (TanhNetwork(6), normal((1, 6)), SCHEDULE.timesteps(12), DDIM(SCHEDULE))
    method = Anderson(floor=0.5)
    bound = np.maximum(method.acceptance.bounds(arguments[3].recurrence(arguments[2])), 0.5)
    defects = solve(*arguments, 12, tolerance=0, method=method, check=False).stats.history[0].samples[0].defects
    tolerances = defects / bound
    for tolerance in np.sort(tolerances) * 1.0001:
        got = solve(*arguments, 12, tolerance=float(tolerance), method=method, check=False).stats.history[0].samples[0]
        settled = tolerances <= tolerance
        assert got.accepted == (12 if settled.all() else int(np.argmin(settled)) + 1)
        told = defects[: got.accepted - 1].max(initial=np.finfo(float).eps)
        assert got.error == pytest.approx(told)


def test_the_last_state_of_a_window_is_the_estimate() -> None:
    solver = ParallelIntegralSolver(DDIM(SCHEDULE), 9, tolerance=0, method="parataa", check=False)
    state = solver.init(TanhNetwork(6), normal((2, 6)), SCHEDULE.timesteps(9))
    np.testing.assert_array_equal(state.estimate(), normal((2, 6)))
    solver.step(state)
    np.testing.assert_array_equal(state.estimate(), [run._X[-1] for run in state.runs])  # type: ignore[union-attr]
    assert not np.array_equal(state.estimate(), state.states)


def test_a_trajectory_is_that_of_the_plain_loop() -> None:
    arguments = (TanhNetwork(6), normal((2, 6)), SCHEDULE.timesteps(9), DDIM(SCHEDULE))
    exact = solve_sequential(*arguments, save="trajectory").trajectory
    for window in (3, 9, 20):
        for tolerance in (0.0, 0.9):  # of which the latter takes all at once
            method = Anderson(floor=1e3)
            got = solve(*arguments, window, tolerance=tolerance, method=method, save="trajectory")
            assert got.steps == (9, 9)
            assert got.trajectory is not None
            assert got.trajectory.shape == exact.shape  # type: ignore[union-attr]
            np.testing.assert_array_equal(got.trajectory[-1], got.sample)
            if tolerance == 0:
                np.testing.assert_allclose(got.trajectory, exact, rtol=1e-10, atol=1e-12)


def test_numbers_out_of_range_leave_the_first_step_alone() -> None:
    """Squares of the others overflow: each round makes one step, as the plain loop does, and forgets the rest."""

    def large(x: Any, t: Any) -> Any:
        return np.where(t[:, None] < 900, 1e200, 0.5) * np.ones_like(x)

    arguments = (large, normal((1, 6)), SCHEDULE.timesteps(8), DDIM(SCHEDULE))
    got = solve(*arguments, 4, tolerance=0, method="parataa", check=False, throw=False)
    exact = solve_sequential(*arguments, throw=False)
    assert got.status == exact.status
    np.testing.assert_allclose(got.sample, exact.sample, rtol=1e-12)
    first = got.stats.history[0].samples[0]
    assert (first.accepted, len(first.nodes)) == (1, 4)
    assert np.isnan(first.residuals).all()


@pytest.mark.parametrize(("value", "status"), [(np.nan, "nonfinite_model"), (1.5e308, "nonfinite_solver")])
def test_a_step_that_is_not_finite_ends_the_sample_where_it_is(value: float, status: str) -> None:
    def broken(x: Any, t: Any) -> Any:
        return np.where(t[:, None] < 500, value, x)

    got = solve(
        broken, normal((2, 6)), SCHEDULE.timesteps(8), DDIM(SCHEDULE), 3,
        tolerance=0, method="parataa", throw=False, check=False,
    )  # fmt: skip
    assert {one.value for one in got.statuses} == {status}
    exact = solve_sequential(broken, normal((2, 6)), SCHEDULE.timesteps(8), DDIM(SCHEDULE), throw=False)
    assert got.steps == exact.steps
    np.testing.assert_allclose(got.states, exact.states, rtol=1e-10)
    assert got.stats.history[-1].samples[0].accepted == 0
