"""What the device holds of spread nodes, held against plain loops and plain sums."""

from typing import Any

import numpy as np
import pytest

from parasolver_core import DDIM, DDPM, DPMSolver
from parasolver_core.methods.levels import Level, interpolation
from tests.core.problems import normal
from tests.core.spread_parts import (
    BATCH,
    SAMPLES,
    SCHEDULE,
    SIZE,
    STEPS,
    NoiseToTheEnd,
    by_the_plain_loop,
    shared_of,
    states_of,
)

RULES = [DDIM(SCHEDULE), DPMSolver(SCHEDULE, 3), DDPM(SCHEDULE), NoiseToTheEnd()]
NODES = [0, 3, 7, 11]


def numbers(*shape: int, seed: int = 5) -> np.ndarray:
    return normal(shape, seed=seed)


@pytest.mark.parametrize("rule", RULES, ids=["one", "three", "noise", "noise to the end"])
@pytest.mark.parametrize("nodes", [NODES, [0, 11], [*range(STEPS)]], ids=len)
def test_states_samples_and_outputs_are_those_of_the_plain_loop(rule: Any, nodes: list[int]) -> None:
    shared, held = shared_of(rule, save="trajectory"), numbers(2, len(nodes), SIZE)
    states = states_of(shared, nodes, held)
    every = np.arange(len(nodes))
    inputs = states.inputs([every, every[::2]])
    finals = states.final(np.array([0, 1]))
    np.testing.assert_array_equal(states.predictions(np.array([1])), held[1:])
    for row, (sample, picked) in enumerate(zip(SAMPLES, (every, every[::2]), strict=True)):
        x, m = by_the_plain_loop(shared, int(sample), nodes, held[row])
        asked = inputs[: len(nodes)] if row == 0 else inputs[len(nodes) :]
        np.testing.assert_allclose(asked, x[np.array(nodes)[picked]], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(finals[row], x[-1], rtol=1e-10, atol=1e-12)
        found = states.trajectory(row, finals[row])
        assert found[-1] is not x[-1]
        np.testing.assert_allclose(np.array(found), x, rtol=1e-10, atol=1e-12)
        expected = states.expected(row, found)
        np.testing.assert_allclose([expected(i) for i in range(STEPS)], m, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rule", RULES, ids=["one", "three", "noise", "noise to the end"])
def test_at_first_all_predictions_are_zero(rule: Any) -> None:
    shared = shared_of(rule)
    states, given = states_of(shared, NODES), states_of(shared, NODES, np.zeros((2, 4, SIZE)))
    np.testing.assert_array_equal(states.inputs([np.arange(4)] * 2), given.inputs([np.arange(4)] * 2))
    assert not states.predictions(np.array([0, 1])).any()


def test_a_trajectory_ends_with_the_sample_that_was_told() -> None:
    states, final = states_of(shared_of(DDIM(SCHEDULE)), NODES, numbers(2, 4, SIZE)), np.full(SIZE, 7.0)
    found = states.trajectory(0, final)
    assert len(found) == STEPS + 1
    assert found[-1] is final
    np.testing.assert_array_equal(found[0], normal((BATCH, SIZE))[2])


def test_the_sums_of_a_round() -> None:
    """Of samples that were asked at three nodes and at two: the third of those repeats the second."""
    shared, held, since = shared_of(DDPM(SCHEDULE)), numbers(2, 4, SIZE), numbers(2, 4, SIZE, seed=6)
    states = states_of(shared, NODES, held, since)
    picks, D = np.array([[0, 1, 3], [1, 2, 2]]), numbers(5, SIZE, seed=7)
    sums = np.asarray(states.compare(D, picks, np.array([3, 2]))).reshape(2, -1)
    rows = [D[:3], np.concatenate([D[3:], D[4:]])]
    for sample in range(2):
        X = np.asarray(states.inputs([picks[sample]] * 2)).reshape(2, 3, SIZE)[sample]
        p, q = shared.recurrence.held[np.array(NODES)[picks[sample]]].T
        said = p[:, None] * X + q[:, None] * rows[sample]
        r, moved = said - held[sample, picks[sample]], since[sample, picks[sample]]
        gram, cross, moves, sizes, squares = np.split(sums[sample], np.cumsum([9, 3, 3, 3]))
        real = slice(0, 3 - sample)
        np.testing.assert_allclose(gram.reshape(3, 3)[real, real], (r @ r.T)[real, real], rtol=1e-10)
        for got, wanted in (
            (cross, moved * r), (moves, moved * moved), (sizes, said * said), (squares, X * X)
        ):  # fmt: skip
            np.testing.assert_allclose(got[real], wanted.sum(axis=1)[real], rtol=1e-10)


def after_a_move(known: np.ndarray) -> tuple[Any, ...]:
    shared, held, since = shared_of(DDIM(SCHEDULE)), numbers(2, 4, SIZE), numbers(2, 4, SIZE, seed=6)
    states = states_of(shared, NODES, held, since)
    picks, D = np.array([[0, 1, 3], [1, 2, 2]]), numbers(5, SIZE, seed=7)
    X = np.asarray(states.inputs([np.arange(4)] * 2)).reshape(2, 4, SIZE)
    states.compare(D, picks, np.array([3, 2]))
    states.drop(known)
    T, g = numbers(2, 4, 3, seed=8), numbers(2, 4, seed=9)
    rows = np.stack([D[:3], np.concatenate([D[3:], D[4:]])])
    p, q = np.moveaxis(shared.recurrence.held[np.array(NODES)[picks]], 2, 0)
    r = p[..., None] * np.take_along_axis(X, picks[..., None], axis=1) + q[..., None] * rows
    r = np.where(known[..., None], r - np.take_along_axis(held, picks[..., None], axis=1), 0.0)
    states.move(T, g, picks, known)
    return states, (X, held, since), (T @ r, g, r, picks)


@pytest.mark.parametrize(
    "known", [[[True, True, True], [True, True, False]], [[True, False, True], [True, False, False]]], ids=str
)
def test_a_round_moves_states_and_what_is_believed_of_them(known: Any) -> None:
    """Evaluated nodes believe what the network said, and all what it would say of the move."""
    known = np.array(known)
    states, (X, held, since), (dX, g, r, picks) = after_a_move(known)
    told, fresh = np.zeros_like(held), np.zeros((2, 4), dtype=bool)
    for row in range(2):
        for k in np.flatnonzero(known[row]):
            told[row, picks[row, k]] = r[row, k]
            fresh[row, picks[row, k]] = True
    every = np.array([0, 1])
    moved = np.asarray(states.inputs([np.arange(4)] * 2)).reshape(2, 4, SIZE)
    np.testing.assert_allclose(moved, X + dX, rtol=1e-10)
    np.testing.assert_allclose(states.predictions(every), held + told + g[..., None] * dX, rtol=1e-9, atol=1e-12)
    expected = np.where(fresh[..., None], 0.0, since) + dX  # since the node was evaluated
    np.testing.assert_allclose(states._since, expected, rtol=1e-9, atol=1e-12)


def test_a_finer_level_takes_what_is_known_of_the_samples_that_go_there() -> None:
    shared, held, since = shared_of(DDPM(SCHEDULE)), numbers(2, 4, SIZE), numbers(2, 4, SIZE, seed=6)
    states = states_of(shared, NODES, held, since)
    finer = Level.of(shared.recurrence, np.array([0, 2, 3, 5, 7, 9, 11]))
    weights, known = interpolation(finer.nodes, np.array(NODES)), np.isin(finer.nodes, NODES)
    found = states.refined(np.array([1]), finer, weights, known)
    assert found.samples.tolist() == [0]
    assert found.level is finer
    between = np.array([np.interp(finer.nodes, NODES, held[1, :, k]) for k in range(SIZE)]).T
    np.testing.assert_allclose(found.predictions(np.array([0]))[0], between, rtol=1e-12)
    x, _ = by_the_plain_loop(shared, 0, finer.nodes.tolist(), between)
    np.testing.assert_allclose(found.inputs([np.arange(7)]), x[finer.nodes], rtol=1e-10, atol=1e-12)
    wanted = np.zeros((7, SIZE))
    wanted[known] = since[1]
    np.testing.assert_allclose(found._since[0], wanted, rtol=1e-12)
    np.testing.assert_array_equal(found.start, normal((BATCH, SIZE))[[0]])


def test_samples_that_stay_keep_all_that_is_theirs() -> None:
    shared, held, since = shared_of(DDPM(SCHEDULE)), numbers(2, 4, SIZE), numbers(2, 4, SIZE, seed=6)
    states, whole = (states_of(shared, NODES, held, since) for _ in range(2))
    states.stay(np.array([1]))
    assert states.samples.tolist() == [0]
    np.testing.assert_array_equal(states.predictions(np.array([0])), whole.predictions(np.array([1])))
    np.testing.assert_array_equal(states.final(np.array([0])), whole.final(np.array([1])))
    np.testing.assert_array_equal(states.inputs([np.arange(4)]), whole.inputs([np.arange(0), np.arange(4)]))
    np.testing.assert_array_equal(states._since, since[1:])
    np.testing.assert_array_equal(states.start, whole.start[1:])
    picks, D = np.array([[0, 1, 3]]), numbers(3, SIZE, seed=7)
    states.compare(D, picks, np.array([3]))
    states.move(np.zeros((1, 4, 3)), np.zeros((1, 4)), picks, np.ones((1, 3), dtype=bool))
    assert not states._since[0, [0, 1, 3]].any()
    np.testing.assert_array_equal(states._since[0, 2], since[1, 2])


def test_squares_below_the_range_are_told_as_what_they_may_be() -> None:
    states = states_of(shared_of(DDIM(SCHEDULE)), NODES)
    r = np.ones((2, 4, SIZE)) * np.array([[1.0, 1e-170, 0.0, 2.0], [3.0, 1.0, 1.0, 1.0]])[..., None]
    states._r = r
    tiny = np.finfo(np.float64).tiny
    squares = states.squares(r @ r.swapaxes(1, 2))
    np.testing.assert_array_equal(squares, [[SIZE, tiny, 0, 4 * SIZE], [9 * SIZE, SIZE, SIZE, SIZE]])
