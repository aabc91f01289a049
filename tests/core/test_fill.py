"""Nodes that enter a window: what their states and beliefs are made of, held against steps one after another."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from parasolver_core.guesses import fill
from parasolver_core.guesses.fill import Along, Copies, Entering, Fill, Held, Interpolated
from parasolver_core.guesses.forecast import AlongTrajectory, BetweenNodes, Blank, Forecast
from parasolver_core.samplers.held_form import HeldForm
from tests.arrays import from_numpy, to_numpy
from tests.core.any_tables import any_table, output, step
from tests.core.problems import normal

N, SIZE, COUNT = 9, 4, 3
LAST = np.array([5, 2, 4])
READS = pytest.mark.parametrize(("states", "outputs"), [(1, 1), (1, 3), (3, 1), (2, 3)])
NOISY = pytest.mark.parametrize("noisy", [False, True])
Expect = Callable[[int, int, Any], Any]


class Known:
    """States and predictions of three samples, of all nodes, and their noise."""

    def __init__(self, table: Any, noisy: bool) -> None:
        self.table, self.form, self.noisy = table, HeldForm(table), noisy
        self.X, self.H = normal((3, N + 1, SIZE), seed=1), normal((3, N, SIZE), seed=2)
        self.z = normal((3, N + 2, SIZE), seed=3)

    def base(self, row: int, last: int) -> list[Any]:
        """The rows that a step reads."""
        states, beliefs = self.form.reads
        return [*(self.X[row, last - k] for k in range(states)), *(self.H[row, last - k] for k in range(beliefs))]

    def follow(self, row: int, last: int, count: int, expect: Expect) -> tuple[list[Any], list[Any]]:
        """The states and predictions behind node ``last`` if ``expect(i, sample, x)`` is what is predicted there."""
        X = dict(enumerate(self.X[row, : last + 1]))
        M = {i: output(self.table, i, self.H[row, i], X[i]) for i in range(last + 1)}
        xs, hs = [], []
        for i in range(last, min(last + count, N)):
            X[i + 1] = step(self.table, i, X, M, self.z[row, i])
            xs.append(X[i + 1])
            if i + 1 < N:
                hs.append(expect(i + 1, row, X[i + 1]))
                M[i + 1] = output(self.table, i + 1, hs[-1], X[i + 1])
        return xs, hs

    def check(self, entering: Entering, last: np.ndarray, further: Any, expect: Expect, steps: int = 0) -> None:
        """``further(row)`` are the rows that the fill brings; the last ones are noise."""
        behind = np.tile(np.arange(1, COUNT + 1), (3, 1))
        x, h = entering.rows(behind)
        assert x.shape == h.shape == (3, COUNT, entering.columns)
        assert entering.noise == (self.noisy * (steps or COUNT))
        for row, node in enumerate(last.tolist()):
            noise = self.z[row, node : node + entering.noise]
            columns = np.stack([*self.base(row, node), *further(row, node), *noise])
            states, predictions = self.follow(row, node, COUNT, expect)
            np.testing.assert_allclose((x[row] @ columns)[: len(states)], states, rtol=1e-9, atol=1e-11)
            wanted = np.reshape(predictions, (-1, SIZE))
            np.testing.assert_allclose((h[row] @ columns)[: len(wanted)], wanted, rtol=1e-9, atol=1e-11)


def nothing(row: int, last: int) -> list[Any]:
    return []


@READS
@NOISY
@pytest.mark.parametrize("kept", [0, 2**20])
@pytest.mark.parametrize("last", [LAST, np.array([7, 6, 8])], ids=["inside", "at the end"])
def test_the_prediction_is_held(
    states: int, outputs: int, noisy: bool, kept: int, last: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fill, "_KEPT", kept)
    known = Known(any_table(N, states, outputs, noisy), noisy)
    held = Held(known.form, COUNT + 1)
    assert (held._all is None) == (kept == 0)
    slopes, corrected = lambda: np.zeros((3, N)), lambda i, row, x: known.H[row, last[row]]
    known.check(held.entering(last, COUNT, slopes), last, nothing, corrected)
    known.check(Held(known.form, COUNT - 1).entering(last, COUNT, slopes), last, nothing, corrected)  # a longer one

    own = Held(known.form, COUNT, uncorrected=True)
    said = normal((3, SIZE), seed=5)  # as the network gave it
    entering = own.entering(last, COUNT, slopes)
    known.check(entering, last, lambda row, node: [said[row]], lambda i, row, x: said[row])


def test_a_table_of_all_nodes_is_kept_where_it_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    form = HeldForm(any_table(N, 1, 1, noisy=False))
    columns = form.base
    for entries, kept in ((N * COUNT * columns, True), (N * COUNT * columns - 1, False)):
        monkeypatch.setattr(fill, "_KEPT", entries)
        assert (Held(form, COUNT)._all is not None) == kept
    noisy = HeldForm(any_table(N, 1, 1))
    monkeypatch.setattr(fill, "_KEPT", N * COUNT * (noisy.base + 1 + COUNT))
    assert Held(noisy, COUNT, uncorrected=True)._all is not None
    monkeypatch.setattr(fill, "_KEPT", N * COUNT * (noisy.base + 1 + COUNT) - 1)
    assert Held(noisy, COUNT, uncorrected=True)._all is None


def test_a_table_of_usual_runs_is_kept_and_not_of_the_longest() -> None:
    few, many = (HeldForm(any_table(n, 2, 2)) for n in (50, 1000))
    assert Held(few, 16)._all is not None
    assert Held(many, 200)._all is None


@READS
@NOISY
def test_predictions_along_a_trajectory(xp: Any, states: int, outputs: int, noisy: bool) -> None:
    """``h_i + g_i (x - x_i)``, whatever the state."""
    known = Known(any_table(N, states, outputs, noisy), noisy)
    near, said, slope = normal((4, N + 1, SIZE), seed=6), normal((4, N, SIZE), seed=7), normal((3, N), seed=8)
    samples = np.array([3, 0, 2])
    along = Along(known.form, from_numpy(near, xp), from_numpy(said, xp))
    rows = to_numpy(along.rows(samples, LAST, COUNT, lambda: (None, None)))

    def expect(i: int, row: int, x: Any) -> Any:
        return said[samples[row], i] + slope[row, i] * (x - near[samples[row], i])

    known.check(along.entering(LAST, COUNT, lambda: slope), LAST, lambda row, last: rows[row], expect)
    beyond = np.array([7, 8, 6])
    rows = to_numpy(along.rows(samples, beyond, COUNT, lambda: (None, None)))
    known.check(along.entering(beyond, COUNT, lambda: slope), beyond, lambda row, last: rows[row], expect)
    every, x = normal((4, N), seed=9), normal((4, SIZE), seed=4)
    first = along.first(from_numpy(x, xp), every)
    np.testing.assert_allclose(to_numpy(first), said[:, 0] + every[:, :1] * (x - near[:, 0]), rtol=1e-13)


@READS
@NOISY
def test_predictions_between_nodes(states: int, outputs: int, noisy: bool) -> None:
    known = Known(any_table(N, states, outputs, noisy), noisy)
    weights, said, samples = normal((N, 2), seed=6), normal((4, 2, SIZE), seed=7), np.array([3, 0, 2])
    between = Interpolated(known.form, weights, said)
    rows = between.rows(samples, LAST, COUNT, lambda: (None, None))
    np.testing.assert_array_equal(rows, said[samples])
    assert between.rows(np.arange(4), LAST, COUNT, lambda: (None, None)) is said
    entering = between.entering(LAST, COUNT, lambda: np.zeros((3, N)))
    known.check(entering, LAST, lambda row, last: rows[row], lambda i, row, x: weights[i] @ said[samples[row]])
    np.testing.assert_array_equal(between.first(normal((4, SIZE)), np.zeros((4, N))), said[:, 0])


@READS
@NOISY
@pytest.mark.parametrize("blank", [None, 4, 6])
def test_copies_of_a_state(states: int, outputs: int, noisy: bool, blank: int | None) -> None:
    """A step that reads no output of its own is as it is, with an output of 0."""
    b = np.tril(np.random.default_rng(4).uniform(0.5, 1.5, (N, outputs)))
    if blank is not None:
        b[blank, 0] = 0.0
    table = any_table(N, states, outputs, noisy, b=b, held=np.tile([0.0, 1.0], (N, 1)))
    known = Known(table, noisy)
    for last in (LAST, np.array([7, 6, 5])):
        entering = Copies(known.form, lambda i, sample: known.z[sample, i]).entering(
            last, COUNT, lambda: np.zeros((3, N))
        )
        x, h = entering.rows(np.tile(np.arange(1, COUNT + 1), (3, 1)))
        assert entering.noise == noisy * (COUNT + 1)
        for row, node in enumerate(last.tolist()):
            noise = known.z[row, node : node + entering.noise] * (np.arange(node, node + entering.noise) < N)[:, None]
            columns = np.stack([*known.base(row, node), *noise])
            X = dict(enumerate(known.X[row, : node + 1]))
            M = {i: output(table, i, known.H[row, i], X[i]) for i in range(node + 1)}
            for i in range(node + 1, min(node + 1 + COUNT, N)):
                X[i] = step(table, i - 1, X, M, known.z[row, i - 1])
                np.testing.assert_allclose(x[row, i - node - 1] @ columns, X[i], rtol=1e-8, atol=1e-10)
                M[i] = np.zeros(SIZE)
                if b[i, 0] != 0:
                    M[i] = (X[i] - step(table, i, X, M, known.z[row, i])) / b[i, 0]
                np.testing.assert_allclose(h[row, i - node - 1] @ columns, M[i], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("reads", [False, True])
def test_the_first_of_copies(xp: Any, noisy: bool, reads: bool) -> None:
    b, c = np.full((N, 1), 0.0 if reads else 0.5), np.full(N, 0.0 if noisy else 0.3)
    b[0], c[0] = 0.5 - b[0], 0.3 - c[0]  # of the others it is the other way round
    table = any_table(N, 1, 1, b=b, c=c)
    x, z = normal((2, SIZE)), normal((2, SIZE), seed=1)

    def noise(i: int, sample: int) -> Any:
        assert (i, noisy) == (0, True)
        return from_numpy(z[sample], xp)

    copies = Copies(HeldForm(table), noise)
    h = to_numpy(copies.first(from_numpy(x, xp), np.zeros((2, N))))
    m = output(table, 0, h, x)
    if reads:
        np.testing.assert_allclose(step(table, 0, [x], [m], z), x, rtol=1e-12)
    else:
        np.testing.assert_allclose(m, 0.0, atol=1e-14)


def test_where_a_run_opens() -> None:
    table = any_table(N, signal=np.array([0.01, 0.05, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]))
    form, x = HeldForm(table), normal((2, SIZE))
    plain, own = Held(form, COUNT), Held(form, COUNT, uncorrected=True)
    assert (plain.uncorrected, own.uncorrected) == (False, True)
    assert (plain.opening(table), own.opening(table)) == (2, 1)
    np.testing.assert_array_equal(plain.first(x, np.zeros((2, N))), np.zeros((2, SIZE)))
    np.testing.assert_allclose(own.first(x, np.zeros((2, N))), table.held[0, 0] * x)
    between: Fill = Interpolated(form, np.zeros((N, 1)), np.zeros((2, 1, SIZE)))
    assert between.opening(table) == N
    assert not between.uncorrected
    n = np.array([3, 4])
    assert between.usable(np.arange(2), np.zeros(2, dtype=np.int64), np.ones((2, 4)), n) is n
    assert plain.rows(np.arange(2), LAST[:2], COUNT, lambda: (x, x)) is None


def test_rows_of_what_is_made_anew_are_those_asked_for() -> None:
    """Each sample's own table, as far behind the last node; nothing at the last node itself."""
    x = np.arange(24.0).reshape(2, 3, 4)
    x[:, 0] = 0.0
    entering = Entering(np.stack([x, -x]), np.array([1, 0, 1]), 3, 0)
    got = entering.rows(np.array([[0, 2], [1, 1], [2, 0]]))
    for values, sign in zip(got, (1, -1), strict=True):
        assert (sign * values).tolist() == [
            [[0, 0, 0], [20, 21, 22]],
            [[4, 5, 6], [4, 5, 6]],
            [[20, 21, 22], [0, 0, 0]],
        ]


# The same of one sample: outputs


def test_a_forecast_is_itself_unless_it_says_otherwise() -> None:
    blank = Blank(any_table(N))
    assert Forecast.behind(blank, 0, 3, np.ones(2), np.ones(2)) is blank
    assert Forecast.usable(blank, 0, np.zeros(5)) == 5


def test_outputs_expected_of_one_sample(xp: Any) -> None:
    table, x = any_table(N), normal((SIZE,))
    h = lambda i, m: table.held[i, 0] * x + table.held[i, 1] * to_numpy(m)  # noqa: E731
    for i in (0, 4):
        np.testing.assert_allclose(h(i, Blank(table)(i, from_numpy(x, xp), 9.0)), 0.0, atol=1e-14)
    weights, said = np.array([[0.0, 1.0, 0.0], [0.5, 0.0, 0.25], [1.0, -2.0, 3.0]]), normal((3, SIZE), seed=1)
    between = BetweenNodes(weights, from_numpy(said, xp), table.held)
    for i in range(3):
        np.testing.assert_allclose(h(i, between(i, from_numpy(x, xp), 9.0)), weights[i] @ said, rtol=1e-11, atol=1e-13)


def test_outputs_along_a_trajectory(xp: Any) -> None:
    table, z, outputs = any_table(N), normal((N, SIZE)), normal((N, SIZE), seed=1)
    X = [normal((SIZE,), seed=2)]
    for i in range(N):
        X.append(step(table, i, X, outputs, z[i]))
    along = AlongTrajectory(table, from_numpy(np.stack(X), xp), lambda i: from_numpy(z[i], xp))
    x = normal((SIZE,), seed=3)
    for i in (0, 3, 8):
        expected = outputs[i] + 1.5 * (x - X[i])
        np.testing.assert_allclose(to_numpy(along(i, from_numpy(x, xp), 1.5)), expected, rtol=1e-9, atol=1e-11)
