"""What a memory says of running samples, and for how long it is asked."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from parasolver_core.guesses.memory import Memory
from parasolver_core.guesses.recall import Recall, Recalled, RecalledAlone
from parasolver_core.samplers.held_form import HeldForm
from tests.arrays import from_numpy, to_numpy
from tests.core.any_tables import any_table, output
from tests.core.problems import normal
from tests.core.test_fill import COUNT, LAST, Known

N, SIZE, SAMPLES = 9, 4, 10
TABLE = any_table(N, 2, 2, noisy=False)


def memory(table: Any = TABLE) -> Memory:
    """Of arbitrary deviations, along two directions and across them."""
    V = np.linalg.qr(normal((SIZE, 2)))[0].T
    rest = np.einsum("ais,bjs->abij", normal((2, N, 30), seed=1), normal((2, N, 30), seed=1))[:, 1]
    return Memory(
        np.arange(float(N)), table.held, normal((N, SIZE), seed=2), normal((N, SIZE), seed=3), V,
        normal((SAMPLES, N, 2), seed=4), normal((SAMPLES, N, 2), seed=5), rest, np.full(N, 40.0),
        np.append(np.full(N - 1, 8.0), 24.0),
    )  # fmt: skip


def expected(own: Memory, last: int, node: int, x: np.ndarray, h: np.ndarray, knows: bool) -> np.ndarray:
    """The formula of a memory: numbers along each direction, and one for all that lies across them."""
    B, C = own.slopes(last, np.array([node]), knows)
    told = own.predictions[node].copy()
    for slopes, away in ((B[0], x - own.states[last]), (C[0], h - own.predictions[last])):
        along = own.directions @ away
        told = told + own.directions.T @ (slopes[:-1] * along) + slopes[-1] * (away - own.directions.T @ along)
    return told


def seen(recall: Recall, samples: np.ndarray, lo: Any, defect: float = 0.0, n: int = 1) -> list[bool]:
    count = len(samples)
    defects = np.full((count, n), defect)
    return recall.right(samples, np.full(count, lo), defects, np.full(count, n)).tolist()


@pytest.mark.parametrize("knows", [False, True])
def test_what_is_expected_behind_a_node(xp: ModuleType, knows: bool) -> None:
    """From the state alone until the network has been compared with it; beyond the last node nothing is."""
    own, x, h = memory(), normal((3, SIZE), seed=6), normal((3, SIZE), seed=7)
    samples, last = np.array([4, 0, 2]), np.array([5, 2, 5])
    recall = Recall(own, from_numpy(normal((5, SIZE)), xp))
    if knows:
        assert seen(recall, samples, 0) == [True] * 3
    got = to_numpy(recall.behind(samples, last, 4, from_numpy(x, xp), from_numpy(h, xp)))
    assert got.shape == (3, 4, SIZE)
    for row, node in enumerate(last.tolist()):
        for ahead in range(1, 5):
            wanted = expected(own, node, min(node + ahead, N - 1), x[row], h[row], knows)
            np.testing.assert_allclose(got[row, ahead - 1], wanted, rtol=1e-9, atol=1e-11)
    first = to_numpy(recall.first(from_numpy(normal((5, SIZE), seed=8), xp)))
    for row, state in enumerate(normal((5, SIZE), seed=8)):
        np.testing.assert_allclose(first[row], expected(own, 0, 0, state, state, False), rtol=1e-9, atol=1e-11)


def test_a_memory_that_was_wrong_says_that_predictions_stay() -> None:
    own, x, h = memory(), normal((3, SIZE), seed=6), normal((3, SIZE), seed=7)
    recall, samples = Recall(own, normal((3, SIZE))), np.arange(3)
    right = recall.right(samples, np.zeros(3, dtype=int), np.array([[0.0], [9.0], [0.0]]), np.ones(3, dtype=int))
    assert right.tolist() == [True, False, True]
    got = recall.behind(samples, np.array([3, 3, 4]), 2, x, h)
    np.testing.assert_allclose(got[1], [h[1], h[1]], rtol=1e-12)  # its prediction at that node, twice
    np.testing.assert_allclose(got[0, 1], expected(own, 3, 5, x[0], h[0], True), rtol=1e-9)
    np.testing.assert_allclose(got[2, 0], expected(own, 4, 5, x[2], h[2], True), rtol=1e-9)


def test_how_long_a_memory_is_asked() -> None:
    """As long as defects are at most half of the squares of predictions, 8 of most nodes; each node counts once."""
    recall, two = Recall(memory(), normal((3, SIZE))), np.array([2, 0])
    assert seen(recall, two, 0, 4.0, 3) == [True, True]  # just half
    assert seen(recall, two, 1, 100.0, 2) == [True, True]  # they were looked at before
    assert seen(recall, np.array([1]), 0, 4.001) == [False]
    assert seen(recall, np.array([1]), 1, 0.0, 4) == [False]  # it is not asked again
    defects = np.array([[9.0, 5.0, 100.0], [0.0, 3.0, 1.0]])  # of nodes 2 and 3; 2, 3 and 4
    assert recall.right(two, np.array([2, 2]), defects, np.array([2, 3])).tolist() == [False, True]
    assert recall.right(two, np.array([5, 5]), np.zeros((2, 9)), np.array([2, 4])).tolist() == [False, True]
    assert recall._seen.tolist() == [9, 5, 7]
    np.testing.assert_array_equal(recall._defects, [16.0, 4.001, 17.0])
    np.testing.assert_array_equal(recall._squares, [88.0, 40.0, 48.0])


@pytest.mark.parametrize(("states", "outputs"), [(1, 1), (2, 3)])
def test_new_nodes_of_many_samples_are_filled_in_by_it(states: int, outputs: int) -> None:
    table = any_table(N, states, outputs, noisy=False)
    own, known = memory(table), Known(table, False)
    recall = Recall(own, known.X[:, 0])
    fill = Recalled(HeldForm(table), recall, 2)
    samples = np.arange(3)
    x, h = known.X[samples, LAST], known.H[samples, LAST]
    rows = fill.rows(samples, LAST, COUNT, lambda: (x, h))
    np.testing.assert_array_equal(rows, recall.behind(samples, LAST, COUNT, x, h))
    entering = fill.entering(LAST, COUNT, lambda: np.zeros((3, N)))
    known.check(entering, LAST, lambda row, last: rows[row], lambda i, row, _: rows[row, i - LAST[row] - 1])
    np.testing.assert_array_equal(fill.first(known.X[:, 0], np.zeros((3, N))), recall.first(known.X[:, 0]))


def test_where_it_was_wrong_the_first_window_begins_anew() -> None:
    """But for the nodes that hardly depend on the sample; windows that have moved on keep what they have."""
    fill = Recalled(HeldForm(TABLE), Recall(memory(), normal((4, SIZE))), 2)
    lo, n = np.array([0, 0, 1, 0]), np.array([5, 5, 5, 1])
    defects = np.where(np.array([True, False, False, False])[:, None], 0.0, 100.0) * np.ones((4, 5))
    assert fill.usable(np.arange(4), lo, defects, n).tolist() == [5, 2, 5, 1]


def test_the_same_of_one_sample() -> None:
    own, x, m = memory(), normal((SIZE,), seed=6), normal((SIZE,), seed=7)
    recall = Recall(own, normal((3, SIZE)))
    alone = RecalledAlone(TABLE.held, recall, 1, 2)
    told = alone(0, x, 9.0)
    np.testing.assert_allclose(told, output(TABLE, 0, expected(own, 0, 0, x, x, False), x), rtol=1e-9)
    recall._seen[1] = 1
    ahead, h = alone.behind(3, 2, x, m), TABLE.held[3, 0] * x + TABLE.held[3, 1] * m
    state = normal((SIZE,), seed=8)
    for i in (4, 5):
        told = output(TABLE, i, expected(own, 3, i, x, h, True), state)
        np.testing.assert_allclose(ahead(i, state, 9.0), told, rtol=1e-9)
    beyond = output(TABLE, 6, expected(own, 3, 5, x, h, True), state)  # asked for, and not used
    np.testing.assert_allclose(ahead(6, state, 9.0), beyond, rtol=1e-9)


def test_how_long_one_sample_asks_it() -> None:
    """Defects of outputs are q times as large for predictions."""
    q = TABLE.held[:, 1]
    for worse, usable in ((0.99, 5), (1.01, 2)):
        alone = RecalledAlone(TABLE.held, Recall(memory(), normal((3, SIZE))), 1, 2)
        assert alone.usable(0, worse * 4.0 / q[:5] ** 2) == usable
    assert alone.usable(1, np.full(4, 100.0)) == 4  # it has moved on
    later = RecalledAlone(TABLE.held, Recall(memory(), normal((3, SIZE))), 1, 2)
    assert later.usable(0, np.full(1, 100.0)) == 1
