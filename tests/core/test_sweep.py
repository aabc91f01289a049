"""A window that is swept: its states, beliefs and sums, held against the same on whole vectors, one step at a time."""

import numpy as np
import pytest

from parasolver_core import Recurrence
from parasolver_core.rounds import sweep
from parasolver_core.rounds.sweep import SweepCorrection, leading_sums
from tests.core.any_tables import any_table, output, step
from tests.core.problems import normal

N, WIDTH = 12, 4
READS = pytest.mark.parametrize(("states", "outputs"), [(1, 1), (1, 3), (3, 1), (2, 3)])


@pytest.fixture(params=["whole", "blocks", "blocks, two rows at once", "blocks and whole moves"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """States of 33 numbers, as small ones are; or in blocks, their moves kept in stripes, or whole."""
    blocks(monkeypatch, 33 if request.param == "whole" else 4)
    if request.param != "blocks":
        monkeypatch.setattr(sweep, "_CALL", 0)
    return request.param


def blocks(monkeypatch: pytest.MonkeyPatch, whole: int = 4) -> None:
    for name, value in {"_WHOLE": whole, "_STRIPE": 2, "_PERIOD": 5, "_BLOCK": 10}.items():
        monkeypatch.setattr(sweep, name, value)


SAMPLED = [5 * stripe + place for stripe in range(6) for place in range(2)]


class Plain:
    """The same window by the equations."""

    def __init__(self, table: Recurrence, z: np.ndarray, start: np.ndarray) -> None:
        self.table, self.z = table, z
        self.X, self.M, self.dX = {0: start}, {0: np.zeros_like(start)}, {}

    def fill(self, first: int, hi: int, h: np.ndarray) -> None:
        for i in range(first, hi):
            self.X[i] = step(self.table, i - 1, self.X, self.M, self.z[i - 1])
            self.M[i] = output(self.table, i, h, self.X[i])

    def move(self, D: np.ndarray, slope: np.ndarray, lo: int) -> np.ndarray:
        new = dict(self.X)
        for j, said in enumerate(D):
            if j:
                new[lo + j] = step(self.table, lo + j - 1, new, self.M, self.z[lo + j - 1])
            self.dX[lo + j] = new[lo + j] - self.X[lo + j]
            self.M[lo + j] = said + slope[j] * self.dX[lo + j]
        self.X = new
        return np.sqrt([(self.dX[lo + j] ** 2).mean() for j in range(len(D))])


def made(kind: str, table: Recurrence, z: np.ndarray, start: np.ndarray, width: int = WIDTH) -> SweepCorrection:
    noise = lambda i: z[i] if table.c[i] else None  # noqa: E731
    return SweepCorrection(table, noise, width, start, kind == "blocks and whole moves")


def fill(own: SweepCorrection, plain: Plain, first: int, hi: int, lo: int = 0) -> None:
    """With the prediction of the node before them."""
    own.make_room(max(min(lo, first - 1) - own._recurrence.memory + 1, 0), first, hi)
    p, q = plain.table.held[first - 1]
    xs, ms = own.history(first - 1)
    own.fill(first, hi, xs, ms, [(float(p), xs[0]), (float(q), ms[0])])
    plain.fill(first, hi, p * plain.X[first - 1] + q * plain.M[first - 1])


def agree(own: SweepCorrection, plain: Plain, lo: int, hi: int) -> None:
    for i, x, m in zip(range(lo, hi), own.X[own.rows(lo, hi)], own.M[own.rows(lo, hi)], strict=True):
        np.testing.assert_allclose(x, plain.X[i], rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(m, plain.M[i], rtol=1e-11, atol=1e-13)
    xs, ms = own.history(hi - 1)
    back = range(hi - 1, max(hi - 1 - own._recurrence.memory, -1), -1)
    np.testing.assert_allclose(xs, [plain.X[i] for i in back], rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(ms, [plain.M[i] for i in back], rtol=1e-11, atol=1e-13)


@READS
def test_rounds_of_a_window_that_slides(kind: str, states: int, outputs: int) -> None:
    table, z = any_table(N, states, outputs), normal((N, 33), seed=1)
    start = normal((33,), seed=2)
    own, plain = made(kind, table, z, start), Plain(table, z, start)
    fill(own, plain, 1, WIDTH)
    lo, hi = 0, WIDTH
    stripes = kind in ("blocks", "blocks, two rows at once")
    sampled = SAMPLED if stripes else slice(None)
    assert [[len(part) for part in own.history(i)] for i in (0, 1)] == [[1, 1], [min(2, table.memory)] * 2]
    for turn, accepted in enumerate([1, 4, 2, 2, 3]):
        agree(own, plain, lo, hi)
        D, slope = normal((hi - lo, 33), seed=10 + turn), normal((hi - lo,), seed=20 + turn)
        found = own.read(own.compare(D, lo), lo)
        for j, i in enumerate(range(lo, hi)):
            r, dX = D[j] - plain.M[i], plain.dX.get(i, np.zeros(33))
            known = i in plain.dX
            assert found.defect[j] == pytest.approx((r[sampled] ** 2).mean(), rel=1e-10)
            assert found.cross[j] == pytest.approx((dX[sampled] * r[sampled]).mean() if known else 0.0, rel=1e-9)
            assert found.size[j] == pytest.approx((plain.X[i] ** 2).mean(), rel=1e-10)
            assert not known or found.moved[j] == pytest.approx((dX[sampled] ** 2).mean(), rel=1e-10)
        np.testing.assert_allclose(own.move(D, slope, lo), plain.move(D, slope, lo), rtol=1e-9, atol=1e-14)
        agree(own, plain, lo, hi)
        np.testing.assert_allclose(own.behind(hi - 1), step(table, hi - 1, plain.X, plain.M, z[hi - 1]), rtol=1e-11)
        if not stripes:
            for i in range(lo, hi):
                np.testing.assert_allclose(own.last_move(i), plain.dX[i], rtol=1e-9, atol=1e-13)
        for i in (lo - 1, hi):
            assert own.last_move(i).shape == (33,)
            assert not own.last_move(i).any()  # no round has moved it
        lo += accepted
        first, hi = hi, min(lo + WIDTH, N)
        if first < hi:
            fill(own, plain, first, hi, lo)
            plain.dX = {i: dX for i, dX in plain.dX.items() if lo <= i < first}
    assert hi == N


@pytest.mark.parametrize("n", [1, 3])
def test_a_window_of_one_node(n: int) -> None:
    table, z, start, D = any_table(n, 1, 1), normal((n, 33)), normal((33,)), normal((1, 33), seed=1)
    own, plain = made("whole", table, z, start, width=1), Plain(table, z, start)
    assert own.read(own.compare(D, 0), 0).defect == pytest.approx((D**2).mean(axis=1))
    assert not own.last_move(0).any()
    assert own.move(D, np.ones(1), 0).tolist() == [0.0]
    plain.move(D, np.ones(1), 0)
    np.testing.assert_allclose(own.behind(0), step(table, 0, plain.X, plain.M, z[0]), rtol=1e-12)


def test_what_is_at_hand_is_two_blocks_or_the_rows_that_are_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks(monkeypatch)
    for call, rows in ((0, 2), (24, 3), (1000, 4)):  # of 12 sampled numbers each; two blocks are 20
        monkeypatch.setattr(sweep, "_CALL", call)
        own = made("blocks", any_table(N), np.zeros((N, 33)), np.ones(33))
        assert (own._together, own._work.size) == (rows, 12 * rows)
    own = made("blocks and whole moves", any_table(N), np.zeros((N, 8)), np.ones(8))
    assert own._work.size == 4 * 8
    assert made("blocks", any_table(N), np.zeros((N, 33)), np.ones(33), width=1)._work.size == 20
    monkeypatch.undo()
    long = SweepCorrection(any_table(1000), lambda i: None, 1000, np.ones(64))
    assert 64 * long._together < 2**14


def test_a_part_of_what_was_compared() -> None:
    table, z, start = any_table(N), normal((N, 33)), normal((33,))
    own, plain = made("whole", table, z, start), Plain(table, z, start)
    fill(own, plain, 1, WIDTH)
    D = normal((WIDTH, 33), seed=3)
    own.move(D, np.ones(WIDTH), 0)
    sums = own.compare(2 * D, 0)
    np.testing.assert_array_equal(leading_sums(sums, 2), own.compare(2 * D[:2], 0))
    assert leading_sums(np.arange(8.0), 3).tolist() == [0, 1, 2, 4, 5, 6]


def test_small_moves_leave_the_output_as_it_is(kind: str) -> None:
    """Of a relative size within a limit of each node's own; a limit of 0 is none."""
    one = np.ones((N, 1))
    table = Recurrence(np.arange(N), one, one, np.zeros(N))
    own = made(kind, table, np.zeros((N, 33)), np.full(33, 2.0))
    own.fill(1, WIDTH, [np.full(33, 2.0)], [np.zeros(33)], [(0.0, np.zeros(33))])  # states of 2, outputs of 0
    D = np.full((WIDTH, 33), 0.1)  # moves by 0, 0.1, and then more
    move = own.move(D, np.full(WIDTH, 10.0), 0, np.array([0.0, 0.051, 0.0, 0.104]))
    np.testing.assert_allclose(move, [0.0, 0.1, 0.2, 1.3 + 1.0])
    outputs = own.M[own.rows(0, WIDTH), 0]
    np.testing.assert_allclose(outputs, [0.1, 0.1, 0.1 + 2.0, 0.1 + 23.0])
    again = made(kind, table, np.zeros((N, 33)), np.full(33, 2.0))
    again.fill(1, WIDTH, [np.full(33, 2.0)], [np.zeros(33)], [(0.0, np.zeros(33))])
    again.move(D, np.full(WIDTH, 10.0), 0, np.array([0.0, 0.049, 0.0, 0.0]))
    assert again.M[again.rows(1, 2), 0] == pytest.approx(0.1 + 1.0)


def test_moves_below_the_range_of_their_squares_are_moves(kind: str) -> None:
    one = np.ones((N, 1), dtype=np.float64)
    table = Recurrence(np.arange(N), one, one, np.zeros(N))
    own = made(kind, table, np.zeros((N, 33)), np.zeros(33, dtype=np.float32))
    nothing = np.zeros(33, dtype=np.float32)
    own.fill(1, 3, [nothing], [nothing], [(0.0, nothing)])
    move = own.move(np.full((3, 33), 1e-30, dtype=np.float32), np.zeros(3), 0)
    np.testing.assert_allclose(move, [0.0, 1e-30, 2e-30], rtol=1e-5)
    np.testing.assert_allclose(own.read(np.zeros(6), 0).size, [0.0, 1e-60, 4e-60], rtol=1e-5)


@pytest.mark.parametrize("element", [0, 4, 32])
@pytest.mark.parametrize("node", [0, 1, 3])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e200])
def test_what_is_not_finite_makes_a_move_that_is_not(kind: str, node: int, element: int, value: float) -> None:
    table, start = any_table(N), normal((33,))
    own = made(kind, table, np.zeros((N, 33)), start)
    fill(own, Plain(table, np.zeros((N, 33)), start), 1, WIDTH)
    D = normal((WIDTH, 33))
    assert np.isfinite(own.move(D, np.ones(WIDTH), 0)).all()
    D[node, element] = value
    with np.errstate(all="ignore"):
        move = own.move(D, np.ones(WIDTH), 0)
    assert np.isfinite(move[: node + 1 - (node == 3)]).all()
    assert not np.isfinite(move[node:]).all()


def test_large_states_are_measured_again_where_they_moved_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """By more than a hundredth of their size."""
    blocks(monkeypatch)
    one = np.ones((N, 1))
    table = Recurrence(np.arange(N), one, one, np.zeros(N))
    own = made("blocks", table, np.zeros((N, 33)), np.ones(33))
    own.fill(1, 3, [np.ones(33)], [np.zeros(33)], [(0.0, np.zeros(33))])
    D = np.zeros((3, 33))
    D[0], D[1] = 0.0099, 0.0003
    own.move(D, np.zeros(3), 0)
    np.testing.assert_allclose(own.read(np.zeros(6), 0).size, [1.0, 1.0, 1.0102**2])
    monkeypatch.setattr(sweep, "_WHOLE", 33)
    small = made("whole", table, np.zeros((N, 33)), np.ones(33))
    small.fill(1, 3, [np.ones(33)], [np.zeros(33)], [(0.0, np.zeros(33))])
    small.move(D, np.zeros(3), 0)
    np.testing.assert_allclose(small.read(np.zeros(6), 0).size, [1.0, 1.0099**2, 1.0102**2])


def test_rows_written_one_by_one() -> None:
    own = made("whole", any_table(N), np.zeros((N, 33)), np.ones(33))
    own.write("X", 2, np.full(33, 3.0))
    own.write("M", 2, np.full(33, 5.0))
    own.write("X", 0, np.full(33, 7.0))
    assert (own.X[:3, 4].tolist(), own.M[:3, 4].tolist()) == ([7, 0, 3], [0, 0, 5])
    assert own.read(np.zeros(6), 0).size.tolist() == [1.0, 1.0, 9.0]
    own.write("X", 1, np.full(33, 2.0))
    assert own.read(np.zeros(6), 0).size.tolist() == [1.0, 4.0, 9.0]
    own.base = 2
    own.write("M", 3, np.full(33, 8.0))
    assert own.M[:3, 4].tolist() == [0, 8, 5]


@pytest.mark.parametrize(("width", "memory", "least", "most"), [(16, 1, 18, 24), (16, 3, 20, 26), (40, 3, 42, 42)])
def test_room_is_for_a_few_nodes_to_come(width: int, memory: int, least: int, most: int) -> None:
    """And those before the window that a step reads; never for more than there are."""
    own = made("whole", any_table(40, memory, 1), np.zeros((40, 33)), np.ones(33), width)
    assert least <= len(own.X) <= most
    assert len(own.M) == len(own.X)
    assert len(own._dX) == width
    assert len(made("whole", any_table(N), np.zeros((N, 33)), np.ones(33), 100)._dX) == N
    own.make_room(3, 5, len(own.X))
    assert own.base == 0  # there was room
    own.write("X", 5, np.full(33, 3.0))
    own.make_room(5, 7, len(own.X) + 1)
    assert (own.base, own.X[0, 0]) == (5, 3.0)


def test_stripes_stand_for_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks(monkeypatch)
    own = made("blocks", any_table(N), np.zeros((N, 33)), np.ones(33))
    assert own._sampled(np.arange(33.0)).ravel().tolist() == SAMPLED
    large = SweepCorrection(any_table(N), lambda i: None, 2, np.ones(33, dtype=np.float32), True)
    assert large._sampled(np.arange(33.0)).tolist() == [list(range(33))]


def test_a_sixteenth_of_a_large_state_is_sampled_and_all_of_a_small_one() -> None:
    table = any_table(N)
    for size, share in ((2**12, 1.0), (2**16, 1 / 16)):
        own = SweepCorrection(table, lambda i: None, WIDTH, np.ones(size, dtype=np.float32))
        assert own._sampled(own.X[0]).size == pytest.approx(share * size, rel=0.1)
