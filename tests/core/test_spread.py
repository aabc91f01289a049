"""A round of spread nodes: its slopes, moves and effects, by hand; and what it tells of each sample."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from parasolver_core import DDIM, DDPM, Linearization, Method, Recurrence, Status, StepRule
from parasolver_core.methods.refinement import Verdict
from parasolver_core.methods.run import Run
from parasolver_core.methods.spread import SpreadNodes, _norms, _propagation
from tests.core.problems import TanhNetwork, normal
from tests.core.spread_parts import BATCH, SAMPLES, SCHEDULE, SIZE, by_the_plain_loop, round_of, run_of, shared_of

NODES = [0, 3, 7, 11]


class Known(Linearization):
    """A slope that is right."""

    def initial(self, recurrence: Recurrence) -> np.ndarray:
        return np.full(len(recurrence), 0.7)

    def update(self, slope: np.ndarray, moved: np.ndarray, cross: np.ndarray) -> np.ndarray:
        return slope


def affine(run: Run) -> np.ndarray:
    return 0.7 * np.asarray(run.inputs) + np.cos(run.nodes)[:, None]


def smooth(run: Run) -> np.ndarray:
    return TanhNetwork(SIZE)(np.asarray(run.inputs), run.nodes)


def states(run: SpreadNodes) -> np.ndarray:
    count = len(run._states.level.nodes)
    return np.asarray(run._states.inputs([np.arange(count)] * 2)).reshape(2, count, SIZE).copy()


def test_moves_are_those_of_the_linear_system() -> None:
    """``dX = C (G dX + r)`` with the defects r of the nodes that were asked."""
    rng = np.random.default_rng(0)
    C, g, r = rng.normal(size=(4, 4)), rng.normal(size=(2, 4)), rng.normal(size=(2, 3))
    picks, real = np.array([[0, 2, 3], [1, 3, 3]]), np.array([[True, True, True], [True, True, False]])
    T = _propagation(C, g, picks, real)
    for row in range(2):
        dX, told = T[row] @ r[row], np.zeros(4)
        told[picks[row, real[row]]] = r[row, real[row]]
        np.testing.assert_allclose(dX, C @ (g[row] * dX + told), rtol=1e-10)
    assert not T[1, :, 2].any()
    rows = rng.normal(size=(2, 3, 5))
    moves = np.linalg.norm(T @ rows, axis=2)
    np.testing.assert_allclose(_norms(T, rows @ rows.swapaxes(1, 2)), moves, rtol=1e-10)


def test_a_system_without_a_solution_spoils_no_other() -> None:
    C, g = np.array([[0.0, 0.0], [1.0, 2.0]]), np.array([[0.0, 0.5], [0.0, 0.25]])
    T = _propagation(C, g, np.array([[0, 1]] * 2), np.ones((2, 2), dtype=bool))
    assert np.isnan(T[0]).all()
    np.testing.assert_allclose(T[1], [[0, 0], [2, 4]])


def test_a_sum_of_squares_that_rounding_made_negative_is_zero() -> None:
    np.testing.assert_array_equal(_norms(np.ones((1, 1, 2)), np.array([[[1.0, -1.0], [-1.0, 0.999]]])), 0.0)


@pytest.mark.parametrize("rule", [DDIM(SCHEDULE), DDPM(SCHEDULE)])
def test_right_slopes_solve_an_affine_network_at_once(rule: StepRule) -> None:
    shared = shared_of(rule, method=Method(linearization=Known()))
    run = run_of(shared, NODES)
    first = round_of(run, affine(run))
    assert all(np.all(one.defects > 0.01) for one in first)
    second = round_of(run, affine(run))
    for record in second:
        assert record.residuals.max() < 1e-10
    held = np.asarray(run._states.predictions(np.array([0, 1])))
    for row, sample in enumerate(SAMPLES.tolist()):
        x, m = by_the_plain_loop(shared, sample, NODES, held[row])
        np.testing.assert_allclose(m[NODES], 0.7 * x[NODES] + np.cos(NODES)[:, None], rtol=1e-8)
        np.testing.assert_allclose(run.estimate(sample), x[-1], rtol=1e-9)


def test_what_a_round_tells() -> None:
    """Of two samples, of which one was asked at three nodes and the other at two of them."""
    shared = shared_of(DDIM(SCHEDULE))
    run = run_of(shared, NODES)
    run.refinements[0].picked, run.refinements[1].picked = np.array([0, 1, 3]), np.array([0, 2])
    assert run.nodes.tolist() == [0, 3, 11, 0, 7]
    assert run.owners.tolist() == [2, 2, 2, 0, 0]
    assert not run.lends
    before, held, D = states(run), np.asarray(run._states.predictions(np.array([0, 1]))).copy(), smooth(run)
    records = round_of(run, D)
    after, level, outputs = states(run), run._states.level, [D[:3], D[3:]]
    for row, (record, picked) in enumerate(zip(records, ([0, 1, 3], [0, 2]), strict=True)):
        assert record.sample == SAMPLES[row]
        assert record.nodes.tolist() == [NODES[k] for k in picked]
        assert record.accepted == 0
        assert record.error == run.refinements[row].error
        p, q = shared.recurrence.held[record.nodes].T[..., None]
        r = p * before[row, picked] + q * outputs[row] - held[row, picked]
        np.testing.assert_allclose(record.defects, np.sqrt(np.mean(r**2, axis=1)), rtol=1e-10)
        size = np.ones(4)  # of a node that was not asked nothing is known
        size[picked] = np.sqrt(np.mean(before[row, picked] ** 2, axis=1))
        np.testing.assert_allclose(run.refinements[row].scale, size, rtol=1e-12)
        size = size * run.refinements[row].smallness[NODES]
        moves = np.sqrt(np.mean((after[row] - before[row]) ** 2, axis=1)) / size
        np.testing.assert_allclose(record.residuals, moves[picked], rtol=1e-6)
        moved = np.full(4, np.inf)
        moved[picked] = moves[picked]
        np.testing.assert_allclose(run.refinements[row].moved, moved, rtol=1e-6)
        X = level.free[:, None] * normal((BATCH, SIZE))[SAMPLES[row]]
        X = X + level.response @ np.asarray(run._states.predictions(np.array([row])))[0]
        np.testing.assert_allclose(after[row], X, rtol=1e-10)  # states are what the predictions make of them


class Heard:
    """What each sample is told of its rounds."""

    def __init__(self, run: SpreadNodes) -> None:
        self.told: list[tuple[Any, ...]] = []
        for refinement in run.refinements:
            refinement.after = lambda *told: self.told.append(told) or Verdict.GO_ON  # type: ignore[method-assign]


def test_a_samples_change_is_that_of_its_estimate_and_midpoints_are_told_apart() -> None:
    """What is new makes a part of it; the move of the last input counts for the sample where it is larger."""
    shared = shared_of(DDIM(SCHEDULE))
    run = run_of(shared, NODES)
    round_of(run, smooth(run))
    for refinement in run.refinements:
        refinement.moved[[1, 2]] = np.inf  # as if these had not been asked yet
    heard, D = Heard(run), smooth(run)
    before, ends, slope = states(run), [np.array(run.estimate(int(s))) for s in SAMPLES], run._slope[:, NODES].copy()
    held = np.asarray(run._states.predictions(np.array([0, 1]))).copy()
    round_of(run, D)
    after, level, g = states(run), run._states.level, run._slope[:, NODES]
    assert not np.array_equal(slope[:, [0, 3]], g[:, [0, 3]])
    np.testing.assert_array_equal(slope[:, [1, 2]], g[:, [1, 2]])  # a node asked once has told nothing of its slope
    for row, (move, change, midpoints) in enumerate(heard.told):
        size = np.sqrt(np.mean(before[row] ** 2, axis=1)) * run.refinements[row].smallness[NODES]
        np.testing.assert_allclose(move, np.sqrt(np.mean((after[row] - before[row]) ** 2, axis=1)) / size, rtol=1e-5)
        end = np.array(run.estimate(int(SAMPLES[row])))
        assert change == pytest.approx(np.sqrt(np.mean((end - ends[row]) ** 2)) / size[-1], rel=1e-6)
        p, q = shared.recurrence.held[NODES].T[..., None]
        r = p * before[row] + q * D[4 * row : 4 * row + 4] - held[row]
        r[[0, 3]] = 0
        dX = np.linalg.solve(np.eye(4) - level.response * g[row], level.response @ r)
        parts = level.end @ (r + g[row][:, None] * dX), dX[-1]
        assert midpoints == pytest.approx(max(np.sqrt(np.mean(part**2)) for part in parts) / size[-1], rel=1e-6)


def test_slopes_are_learned_from_moves_between_two_rounds() -> None:
    """Of an affine network, exactly; those of nodes that were not asked are left alone."""
    shared = shared_of(DDIM(SCHEDULE))
    run = run_of(shared, NODES)
    p, q = shared.recurrence.held.T
    initial = p + q * shared.linearization.initial(shared.recurrence)
    np.testing.assert_allclose(run._slope, [initial] * 2)
    round_of(run, affine(run))
    np.testing.assert_allclose(run._slope, [initial] * 2)
    run.refinements[1].picked = np.array([1])
    round_of(run, affine(run))
    learned, others = np.array(NODES[1:]), np.setdiff1d(np.arange(12), NODES[1:])
    np.testing.assert_allclose(run._slope[0, learned], (p + 0.7 * q)[learned], rtol=1e-6)
    np.testing.assert_allclose(run._slope[1, 3], (p + 0.7 * q)[3], rtol=1e-6)
    np.testing.assert_allclose(run._slope[1, [7, 11]], initial[[7, 11]])
    np.testing.assert_allclose(run._slope[:, others], [initial[others]] * 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_output_that_is_not_finite_is_left_out(bad: float) -> None:
    """The others do what they would do without it, and it stays due."""
    shared = shared_of(DDIM(SCHEDULE))
    run, other = run_of(shared, NODES), run_of(shared, NODES)
    D = smooth(run)
    other.refinements[0].picked = np.array([0, 1, 3])
    expected = round_of(other, np.delete(D, 2, axis=0))
    D[2, 1] = bad
    records = round_of(run, D)
    np.testing.assert_allclose(states(run), states(other), rtol=1e-12)
    np.testing.assert_allclose(run._states._since, other._states._since, rtol=1e-9, atol=1e-12)
    assert [one._dropped for one in run.refinements] == [1, 0]
    np.testing.assert_array_equal(run.refinements[0].moved, other.refinements[0].moved)
    assert np.isinf(run.refinements[0].moved[2])
    assert records[0].nodes.tolist() == NODES
    assert np.isnan(records[0].residuals).tolist() == np.isnan(records[0].defects).tolist() == [0, 0, 1, 0]
    np.testing.assert_allclose(records[0].residuals[[0, 1, 3]], expected[0].residuals, rtol=1e-10)
    np.testing.assert_allclose(records[1].residuals, expected[1].residuals, rtol=1e-10)
    assert run.told == other.told == [Verdict.GO_ON, Verdict.REFINE]  # type: ignore[attr-defined]


def test_a_sample_whose_first_output_is_not_finite_gives_way_alone() -> None:
    shared = shared_of(DDIM(SCHEDULE))
    run, other = run_of(shared, NODES), run_of(shared, NODES)
    D = smooth(run)
    round_of(other, D.copy())
    before = states(run)
    D[4] = np.nan
    records = round_of(run, D)
    assert run.told == [Verdict.REFINE, Verdict.GIVE_WAY]  # type: ignore[attr-defined]
    np.testing.assert_allclose(states(run)[0], states(other)[0], rtol=1e-12)
    np.testing.assert_array_equal(states(run)[1], before[1])
    assert np.isnan(records[1].residuals).all()
    assert np.isnan(records[1].defects).all()
    assert run.refinements[1].worthless


def test_a_move_that_no_number_is_makes_its_sample_give_way() -> None:
    """The outputs are fine, and what follows from them by the slopes is not."""
    slope = np.zeros((2, 12))
    run = run_of(shared_of(DDIM(SCHEDULE)), NODES, slope=slope)
    slope[1, 3] = 1 / run._states.level.response[1, 1]  # the system has no solution, or nearly none
    before = states(run)
    records = round_of(run, smooth(run))
    assert run.told == [Verdict.REFINE, Verdict.GIVE_WAY]  # type: ignore[attr-defined]
    np.testing.assert_array_equal(states(run)[1], before[1])
    assert np.isnan(records[1].residuals).all()
    assert np.isfinite(records[0].residuals).all()


@pytest.mark.parametrize(("size", "end"), [(1e153, 0.0), (1.0, 1e200)], ids=["of a node", "of the sample"])
def test_a_move_whose_square_runs_out_of_range_makes_its_sample_give_way(size: float, end: float) -> None:
    run = run_of(shared_of(DDIM(SCHEDULE)), NODES)
    round_of(run, smooth(run))
    run._states.level = replace(run._states.level, end=np.full(4, end))
    round_of(run, size * smooth(run))
    assert run.told[2:] == [Verdict.GIVE_WAY] * 2  # type: ignore[attr-defined]


class TakesSome(StepRule):
    """DDIM whose last step takes some of the state besides the prediction."""

    def recurrence(self, timesteps: np.ndarray) -> Recurrence:
        own = DDIM(SCHEDULE).recurrence(timesteps)
        a = own.a.copy()
        a[-1] += 0.01
        return replace(own, a=a)


@pytest.mark.parametrize("rule", [DDIM(SCHEDULE), TakesSome()], ids=["ddim", "some"])
def test_small_data_are_told_from_the_last_node_of_each_sample(rule: StepRule) -> None:
    shared = shared_of(rule)
    run, recurrence = run_of(shared, NODES), shared.recurrence
    run.refinements[0].picked, run.refinements[1].picked = np.array([0, 1, 2]), np.array([3])
    before = states(run)
    p, q = recurrence.held[11]
    D = np.concatenate([np.zeros((3, SIZE)), ((0.01 - p * before[1, 3]) / q)[None]])  # a prediction of 0.01
    round_of(run, D)
    np.testing.assert_array_equal(run.refinements[0].smallness, 1.0)  # nothing was asked at its last node
    expected = shared.small_data.smallness(11, 1e-4, float(np.mean(before[1, 3] ** 2)))
    assert expected.min() < 0.1
    np.testing.assert_allclose(run.refinements[1].smallness, expected, rtol=1e-10)


def test_moves_of_small_data_count_for_more() -> None:
    shared = shared_of(DDIM(SCHEDULE))
    run, small = run_of(shared, NODES), run_of(shared, NODES)
    for refinement in small.refinements:
        refinement.smallness = np.linspace(0.5, 0.25, 12)
    heard, louder = Heard(run), Heard(small)
    for one in (run, small):
        for refinement in one.refinements:
            refinement.picked = np.array([0, 1, 2])
        round_of(one, smooth(one))
    for (move, *effects), (more, *larger) in zip(heard.told, louder.told, strict=True):
        np.testing.assert_allclose(more, move / np.linspace(0.5, 0.25, 12)[NODES], rtol=1e-10)
        np.testing.assert_allclose(larger, 4 * np.array(effects), rtol=1e-10)


def test_before_a_round_the_estimate_is_the_start() -> None:
    run = run_of(shared_of(DDIM(SCHEDULE), save="trajectory"), NODES)
    start = normal((BATCH, SIZE))
    np.testing.assert_array_equal(run.estimate(0), start[0])
    np.testing.assert_array_equal(run.states(), start[SAMPLES])
    np.testing.assert_array_equal(run.kept(2), start[[2]])
    assert run.kept(1) == []
    assert run.steps.tolist() == [0, 0]
    assert run.errors.tolist() == [np.inf, np.inf]
    round_of(run, smooth(run))
    assert not np.array_equal(run.estimate(0), start[0])
    np.testing.assert_array_equal(run.kept(2), start[[2]])  # nothing is final yet
    np.testing.assert_array_equal(run.states(), start[SAMPLES])
    without = run_of(shared_of(DDIM(SCHEDULE)), NODES)
    assert without.kept(2) == []


def go_on(run: SpreadNodes, *verdicts: Verdict) -> list[Run]:
    del run._go_on  # type: ignore[attr-defined]
    run._go_on(list(verdicts))
    return run.successors()


@pytest.mark.parametrize("save", ["sample", "trajectory"])
def test_a_sample_that_is_final_ends(save: Any) -> None:
    shared = shared_of(DDIM(SCHEDULE), save=save)
    run = run_of(shared, NODES)
    round_of(run, smooth(run))
    held = np.asarray(run._states.predictions(np.array([1])))[0].copy()
    x, m = by_the_plain_loop(shared, 0, NODES, held)
    run.refinements[1].error = 0.03125
    assert go_on(run, Verdict.GO_ON, Verdict.CONVERGED) == [run]
    assert run.samples.tolist() == [2]
    assert len(run.refinements) == len(run._slope) == 1
    outcome = run.ended[0]
    assert (outcome.status, outcome.steps, outcome.error, outcome.failed_node) == (Status.CONVERGED, 12, 0.03125, -1)
    np.testing.assert_allclose(outcome.state, x[-1], rtol=1e-10)
    if save == "sample":
        assert (list(outcome.kept), outcome.expected) == ([], None)
        return
    np.testing.assert_allclose(outcome.kept, x, rtol=1e-10, atol=1e-12)
    assert outcome.expected is not None
    np.testing.assert_allclose(outcome.expected(4), m[4], rtol=1e-9)


def test_a_sample_that_is_refined_goes_on_in_another_run() -> None:
    shared = shared_of(DDIM(SCHEDULE), steps=49)
    nodes = [0, 12, 24, 36, 48]
    run = run_of(shared, nodes)
    round_of(run, smooth(run))
    run.refinements[1]._opening = False
    slope = run._slope.copy()
    slope[1, nodes] = np.arange(5.0)
    run._slope = slope.copy()
    stays, finer = go_on(run, Verdict.GO_ON, Verdict.REFINE)
    assert stays is run
    assert isinstance(finer, SpreadNodes)
    assert finer.samples.tolist() == [0]
    level = run._levels.finer(run._states.level).nodes
    assert finer._states.level.nodes.tolist() == level.tolist()
    np.testing.assert_allclose(finer._slope[0, level], np.interp(level, nodes, np.arange(5.0)), rtol=1e-12)
    between = np.setdiff1d(np.arange(49), level)
    np.testing.assert_array_equal(finer._slope[0, between], slope[1, between])
    assert run.successors() == [run]  # told once


def test_the_opening_goes_on_with_the_first_level() -> None:
    run = run_of(shared_of(DDIM(SCHEDULE), steps=49), [0])
    round_of(run, smooth(run))
    slope = run._slope.copy()
    (first,) = go_on(run, Verdict.REFINE, Verdict.REFINE)
    assert isinstance(first, SpreadNodes)
    assert first.samples.tolist() == SAMPLES.tolist()
    assert first._states.level.nodes.tolist() == run._levels.first(8).nodes.tolist()
    np.testing.assert_array_equal(first._slope, slope)  # nothing is known of other nodes
    assert len(run.samples) == 0


@pytest.mark.parametrize("worthless", [False, True])
def test_a_window_goes_on_from_what_is_known_if_that_is_worth_something(worthless: bool) -> None:
    shared = shared_of(DDIM(SCHEDULE))
    run = run_of(shared, NODES)
    round_of(run, smooth(run))
    run.refinements[0]._wild = worthless
    slid: list[tuple[Any, ...]] = []
    run._sliding = lambda *told: slid.append(told) or []  # type: ignore[assignment]
    slope, held = run._slope.copy(), np.asarray(run._states.predictions(np.array([0]))).copy()
    go_on(run, Verdict.GIVE_WAY, Verdict.GO_ON)
    ((samples, start, *outlook),) = slid
    assert samples.tolist() == [2]
    np.testing.assert_array_equal(start, normal((BATCH, SIZE))[[2]])
    assert bool(outlook) != worthless
    if outlook:
        every, (p, q) = np.arange(12), shared.recurrence.held.T
        between = [np.interp(every, NODES, held[0, :, k]) for k in range(SIZE)]
        np.testing.assert_allclose(outlook[0].weights @ outlook[0].predictions[0], np.transpose(between), rtol=1e-10)
        g = np.interp(every, NODES, slope[0, NODES])
        np.testing.assert_allclose(outlook[0].slope, [(g - p) / q], rtol=1e-9)


def test_a_sample_that_should_go_on_and_is_exhausted_gives_way() -> None:
    run = run_of(shared_of(DDIM(SCHEDULE)), NODES)
    round_of(run, smooth(run))
    run.refinements[1].rounds = 99
    slid: list[tuple[Any, ...]] = []
    run._sliding = lambda *told: slid.append(told) or []  # type: ignore[assignment]
    assert go_on(run, Verdict.GO_ON, Verdict.GO_ON) == [run]
    assert [told[0].tolist() for told in slid] == [[0]]
    assert run.samples.tolist() == [2]
