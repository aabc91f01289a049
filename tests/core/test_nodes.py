"""The rows of many windows on a device: which are inputs, what is compared, what is out of range."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from array_api_compat import torch as torch_xp

from parasolver_core.guesses.fill import Entering
from parasolver_core.rounds.decisions import Decision, Windows
from parasolver_core.rounds.matrix import compare, unpack, write
from parasolver_core.rounds.next_rows import NextRows
from parasolver_core.rounds.nodes import Nodes, rectangular
from parasolver_core.rounds.passed import moved, passed_by
from parasolver_core.rounds.remade import made_again
from parasolver_core.rounds.salvage import drop, well, where_known
from parasolver_core.samplers.held_form import HeldForm
from parasolver_core.samplers.noise import NoiseSource, draw
from tests.arrays import from_numpy, to_numpy
from tests.core.any_tables import any_table
from tests.core.problems import normal
from tests.core.test_decisions import Said, shared, windows

SIZE, N = 4, 9
FORM = HeldForm(any_table(N, 2, 2, noisy=False))


def nodes(xp: ModuleType, states: np.ndarray, beliefs: np.ndarray, form: HeldForm = FORM) -> Nodes:
    """Windows of these states and beliefs, (B, R, size), the first row of which is before the window."""
    own = Nodes(form, from_numpy(states[:, 0], xp), from_numpy(beliefs[:, 0], xp))
    zero = np.zeros_like(states[:, :1])
    own.S = from_numpy(np.concatenate([states, beliefs, zero], axis=1), xp)
    own.dX = from_numpy(np.arange(states.size).reshape(states.shape).astype(states.dtype), xp)
    return own


def test_where_a_run_begins(xp: ModuleType) -> None:
    x, h = normal((3, SIZE), seed=1), normal((3, SIZE), seed=2)
    own = Nodes(FORM, from_numpy(x, xp), from_numpy(h, xp))
    assert (FORM.past, own.size, own.dtype) == (1, SIZE, np.float64)
    np.testing.assert_array_equal(to_numpy(own.first), x)
    xs, hs = own.history(1, 0)
    for rows, expected in ((xs, x), (hs, h)):
        np.testing.assert_array_equal([to_numpy(row) for row in rows], [expected[1], np.zeros(SIZE)])
    copy = own.first_copy()
    own.S = from_numpy(np.zeros((3, 5, SIZE)), xp)
    np.testing.assert_array_equal(to_numpy(copy), x)
    single = Nodes(HeldForm(any_table(N, 1, 1)), from_numpy(x.astype(np.float32), xp), from_numpy(h, xp))
    assert (single.dtype, tuple(single.S.shape)) == (np.float32, (3, 3, SIZE))


def test_the_inputs_are_those_of_nodes(xp: ModuleType) -> None:
    """Windows of 4 and 3 nodes: of the second the last row of the buffer is none."""
    states, beliefs = normal((2, 5, SIZE), seed=1), normal((2, 5, SIZE), seed=2)
    own, both = nodes(xp, states, beliefs), windows(shared(Said(1)))
    expected = np.concatenate([states[0, 1:], states[1, 1:4]])
    np.testing.assert_array_equal(to_numpy(own.inputs(both)), expected)
    assert not own.inputs_are_a_view(both)
    both.slide(np.array([0, 3]), np.array([4, 7]), np.array([0, 3]))
    np.testing.assert_array_equal(to_numpy(own.inputs(both)), states[:, 1:].reshape(-1, SIZE))
    assert not own.inputs_are_a_view(both)  # rows before each window are between
    both.slide(np.array([0, 3]), np.array([1, 4]), np.array([0, 3]))
    assert own.inputs_are_a_view(both)
    one = windows(shared(Said(1)), 1)
    assert own.inputs_are_a_view(one)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_of_a_round(xp: ModuleType, dtype: Any) -> None:
    """The unit is that of the states, or of outputs that are coarser."""
    states, beliefs = (normal((2, 5, SIZE), seed=seed).astype(dtype) for seed in (1, 2))
    own, both = nodes(xp, states, beliefs), windows(shared(Said(1)), eps=2.0**-30)
    D = normal((7, SIZE), seed=3).astype(np.float32).astype(dtype)
    sums = np.array(to_numpy(compare(own, from_numpy(D, xp), both)), dtype=np.float64)
    assert own.dX is None
    assert not unpack(own, np.where(np.arange(len(sums)) == 5, np.nan, sums), both).finite
    found = unpack(own, sums, both)
    assert found.unit == (2.0**-23 if dtype == np.float64 else 2.0**-30)
    assert found.finite
    moves = np.arange(40.0).reshape(2, 5, SIZE)
    for row, (lo, n, said) in enumerate(((0, 4, D[:4]), (3, 3, D[4:]))):
        p, q = both._form.held[lo : lo + n].T[..., None]
        h = p * states[row, 1 : n + 1] + q * said
        r = h - beliefs[row, 1 : n + 1]
        close: dict[str, Any] = {
            "rtol": 1e-5 if dtype == np.float32 else 1e-11,
            "atol": 1e-5 if dtype == np.float32 else 1e-11,
        }
        np.testing.assert_allclose(found.gram[row, :n, :n], r @ r.T, **close)
        np.testing.assert_allclose(found.cross[row, :n], (moves[row, 1 : n + 1] * r).sum(axis=1), **close)
        np.testing.assert_allclose(found.length[row, :n], np.linalg.norm(states[row, 1 : n + 1], axis=1), **close)
        np.testing.assert_allclose(found.held[row, :n], np.linalg.norm(h, axis=1), **close)
        _, hs = own.history(row, n - 1)
        np.testing.assert_allclose(to_numpy(hs[0]), h[-1], **close)  # beliefs are then what was said


def test_sums_that_lose_something_are_not_too_small(xp: ModuleType) -> None:
    states, beliefs = (1e-30 * normal((2, 5, SIZE), seed=seed).astype(np.float32) for seed in (1, 2))
    own, both = nodes(xp, states, beliefs), windows(shared(Said(1)))
    sums = np.asarray(to_numpy(compare(own, from_numpy(np.zeros((7, SIZE), dtype=np.float32), xp), both)))
    found = unpack(own, sums.astype(np.float64), both)
    assert np.all(found.defects > 0)
    assert np.all(found.length > 1e-32)
    assert np.all(found.length < 1e-29)


def test_whose_fault_numbers_are_that_are_not_finite(xp: ModuleType) -> None:
    """Of the first node of each window: its state and its defect, and what the network said."""
    states, beliefs = normal((4, 5, SIZE), seed=1), normal((4, 5, SIZE), seed=2)
    states[1, 1, 2], states[2, 2, 0] = np.inf, np.nan  # the first node of one sample, the second of another
    own = nodes(xp, states, beliefs)
    r = np.zeros((4, 4, SIZE))
    r[1, 0], r[3, 0, 1], r[2, 1] = np.nan, np.nan, np.nan
    own.r = from_numpy(r, xp)
    D = np.zeros((14, SIZE))
    four, first = Windows(shared(Said(1)), 4, SIZE, 2.0**-52, None), np.zeros(4, dtype=np.int64)
    four.slide(first, np.array([4, 3, 4, 3]), first)
    D[12, 3], D[8, 0] = np.inf, np.nan  # the second node of the last sample, and of the third
    ok, said = well(own, from_numpy(D, xp), four)
    assert (ok.tolist(), said.tolist()) == ([True, False, True, False], [True, True, True, True])
    D[11, 3] = np.inf  # now the defect comes from what the network said
    ok, said = well(own, from_numpy(D, xp), four)
    assert (ok.tolist(), said.tolist()) == ([True, False, True, True], [True, True, True, False])


def test_nothing_is_known_of_nodes_that_are_dropped(xp: ModuleType) -> None:
    states, beliefs = normal((2, 5, SIZE), seed=1), normal((2, 5, SIZE), seed=2)
    beliefs[1, 3], states[1, 4] = np.nan, np.inf
    own = nodes(xp, states, beliefs)
    r = normal((2, 4, SIZE), seed=3)
    r[1, 2:] = np.inf
    own.r = from_numpy(r, xp)
    inside = np.array([[True] * 4, [True, True, False, False]])
    drop(own, inside)
    np.testing.assert_array_equal(to_numpy(own.r), np.where(inside[..., None], r, 0.0))
    left = to_numpy(own.S)
    np.testing.assert_array_equal(left[:, [0, 5]], np.stack([states[:, 0], beliefs[:, 0]], axis=1))
    np.testing.assert_array_equal(left[:, 1:5], np.where(inside[..., None], states[:, 1:], 0.0))
    np.testing.assert_array_equal(left[:, 6:10], np.where(inside[..., None], beliefs[:, 1:], 0.0))
    np.testing.assert_array_equal(left[:, 10], 0.0)
    known = to_numpy(where_known(from_numpy(r, xp), inside))
    np.testing.assert_array_equal(known, np.where(inside[..., None], r, 0.0))


def test_rows_of_lists_that_are_shorter_repeat_their_last(xp: ModuleType) -> None:
    rows = np.arange(12.0).reshape(6, 2)
    got = to_numpy(rectangular(from_numpy(rows, xp), np.array([1, 3, 2]), 3))
    np.testing.assert_array_equal(got, rows[[0, 0, 0, 1, 2, 3, 4, 5, 5]])
    whole = from_numpy(rows, xp)
    assert rectangular(whole, np.array([3, 3]), 3) is whole


def decision(T: np.ndarray, slope: np.ndarray, accepted: Any, sound: Any, grown: bool = False) -> Decision:
    return Decision(T, slope, slope, slope, np.array(accepted), np.array(sound), grown)


def test_single_nodes_as_the_round_moves_them(xp: ModuleType) -> None:
    states, beliefs = normal((2, 5, SIZE), seed=1), normal((2, 5, SIZE), seed=2)
    own, T, slope = nodes(xp, states, beliefs), normal((2, 4, 4), seed=3), normal((2, 4), seed=4)
    r = normal((2, 4, SIZE), seed=5)
    own.r = from_numpy(r, xp)
    x, h = moved(own, decision(T, slope, [1, 1], [4, 4]), np.array([3, 1]))
    for row, at in enumerate((3, 1)):
        move = T[row, at] @ r[row]
        np.testing.assert_allclose(to_numpy(x)[row], states[row, 1 + at] + move, rtol=1e-12)
        np.testing.assert_allclose(to_numpy(h)[row], beliefs[row, 1 + at] + slope[row, at] * move, rtol=1e-12)
    found = to_numpy(passed_by(own, decision(T, slope, [3, 2], [4, 4]), None))
    assert found.shape == (2, 2, SIZE)
    for row, last in enumerate((2, 1)):  # of the second sample no state behind its last accepted node is wanted
        for k in range(2):
            at = min(k + 1, last)
            np.testing.assert_allclose(found[row, k], states[row, 1 + at] + T[row, at] @ r[row], rtol=1e-12)


@pytest.mark.parametrize("noisy", [False, True])
def test_states_are_made_again_as_the_sampler_makes_them(noisy: bool, xp: ModuleType) -> None:
    """Node by node, and what is believed follows: ``h_i = h_i(said) + g_i (x_i - x_i(asked))``."""
    form = HeldForm(any_table(N, 2, 2, noisy=noisy))
    states, beliefs, T = normal((2, 5, SIZE), seed=1), normal((2, 5, SIZE), seed=2), normal((2, 4, 4), seed=5)
    T[:, 0] = 0.0  # the first state is final
    own, slope, z = nodes(xp, states, beliefs, form), normal((2, 4), seed=3), normal((2, 4, SIZE), seed=4)
    own.r = from_numpy(normal((2, 4, SIZE), seed=6), xp)
    lo, drawn = np.array([2, 3]), []

    def noise(first: np.ndarray, end: np.ndarray, count: int) -> Any:
        drawn.append((first.tolist(), end.tolist(), count))
        return from_numpy(z[:, :count], xp)

    assert made_again(own, decision(T, slope, [1, 1], [4, 4]), lo, noise) is None  # none was much larger
    assert made_again(own, decision(T, slope, [0, 0], [1, 1], grown=True), lo, noise) is None
    for accepted, sound, most in (([1, 1], [3, 2], 2), ([4, 1], [4, 4], 4)):
        again = made_again(own, decision(T, slope, accepted, sound, grown=True), lo, noise)
        found, inner = to_numpy(again), min(most, 3)
        assert found.shape == (2, most + inner, SIZE)
        for row in range(2):
            xs, hs = [states[row, 1], states[row, 0]], [beliefs[row, 1], beliefs[row, 0]]
            for j in range(most):
                i = lo[row] + j
                x = form.a[i] @ xs[:2] + form.b[i] @ hs[:2] + form.c[i] * z[row, j] * noisy
                np.testing.assert_allclose(found[row, j], x, rtol=1e-9, atol=1e-12)
                if j < inner:
                    h = beliefs[row, j + 2] + slope[row, j + 1] * (x - states[row, j + 2])
                    np.testing.assert_allclose(found[row, most + j], h, rtol=1e-9, atol=1e-12)
                    xs, hs = [x, *xs], [h, *hs]
    assert drawn == ([([2, 3], [4, 4], 2), ([2, 3], [6, 6], 4)] if noisy else [])


@pytest.mark.parametrize("grown", [False, True])
def test_the_tables_of_a_sample_are_those_that_it_has_alone(grown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever others there are: only the last one has nodes that enter, from the first on."""
    monkeypatch.setattr(np, "empty", lambda shape, dtype=np.float64: np.full(shape, np.nan, dtype))
    T, slope = normal((3, 4, 4), seed=3), normal((3, 4), seed=4)
    told = decision(T, slope, [1, 2, 1], [4, 4, 1], grown)
    place = np.array([[0, 1, 2, 3], [1, 2, 3, 3], [0, 1, 2, 3]])
    x, h = normal((3, 4, 6), seed=5), normal((3, 4, 6), seed=6)
    x[:, 0] = h[:, 0] = 0.0
    both = NextRows.of(FORM, told, place, False, Entering(np.stack([x, h]), np.arange(3), 6, 0), np.float64)
    assert np.isfinite(both.C).all()
    for row in range(3):
        one = slice(row, row + 1)
        own = decision(T[one], slope[one], told.accepted[one], told.sound[one], grown)
        alone = NextRows.of(FORM, own, place[one], False, Entering(np.stack([x, h]), np.array([row]), 6, 0), np.float64)
        np.testing.assert_array_equal(both.source[one], alone.source)
        np.testing.assert_array_equal(both.base[one], alone.base)
        np.testing.assert_allclose(both.C[one], alone.C, rtol=1e-12)
    if not grown:
        assert both.again is None
        return
    assert both.again is not None
    # states behind the first, as far as they are known: up to node 3, 3 and 1, and from 3 on beliefs of those kept; the
    # base reads the last kept and the one before
    of_rows = [[-1, 0, 1, 2, -1, 3, 4, 5, -1], [0, 1, 2, 2, 3, 4, 5, 5, -1], [-1, 0, -1, -1, -1, -1, -1, -1, -1]]
    assert both.again[0].tolist() == of_rows
    assert both.again[1].tolist() == [[2, 1, 5, 4], [2, 1, 5, 4], [-1, -1, -1, -1]]


@pytest.mark.parametrize("some_again", [False, True])
def test_the_rows_of_the_next_windows(xp: ModuleType, some_again: bool) -> None:
    """``S[source] + C [r; S[base]; further rows]``; some states, and what new nodes are made of, are made again."""
    states, beliefs, r = (normal((2, 5, SIZE), seed=seed) for seed in (1, 2, 3))
    own, again, further = nodes(xp, states, beliefs), normal((2, 3, SIZE), seed=4), normal((2, 2, SIZE), seed=5)
    own.r = from_numpy(r[:, :4], xp)
    S = to_numpy(own.S).copy()
    source, base = np.array([[1, 4, 10, 7, 8, 9, 10], [2, 3, 4, 6, 7, 10, 10]]), np.array([[4, 9, 10], [3, 8, 0]])
    C = normal((2, 7, 4 + 3 + 2), seed=6)
    of_rows = np.array([[-1, 0, 2, -1, 1, -1, -1], [1, -1, -1, 0, -1, 2, -1]])
    places = of_rows, np.array([[2, -1, -1], [-1, -1, 0]])
    held = normal((2, 2, 4), seed=7)
    write(
        own,
        NextRows(source, C, base, places if some_again else None),
        held,
        [from_numpy(further, xp)],
        from_numpy(again, xp) if some_again else None,
    )
    for row in range(2):
        bases = S[row, base[row]]
        if some_again:
            bases = np.where(places[1][row][:, None] >= 0, again[row, places[1][row]], bases)
        moves = C[row] @ np.concatenate([r[row, :4], bases, further[row]])
        expected = S[row, source[row]] + moves
        if some_again:
            expected = np.where(of_rows[row][:, None] >= 0, again[row, of_rows[row]], expected)
        np.testing.assert_allclose(to_numpy(own.S)[row], expected, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(to_numpy(own.dX)[row], moves[:3], rtol=1e-11, atol=1e-13)
    np.testing.assert_array_equal(to_numpy(own.held), held[..., None])
    own.stay(np.array([1]))
    assert own.held is None


def test_what_samples_share() -> None:
    noise = NoiseSource(torch.zeros(2, SIZE), torch.float32, N, 7, None)
    table = any_table(N)
    common = replace(shared(Said(1), table=table), xp=torch_xp, dtype=torch.float32, noise=noise)
    outputs = torch.ones(2, dtype=torch.float64)
    taken = common.taken(outputs)
    assert isinstance(taken, np.ndarray)
    assert taken.dtype == np.float32
    single = torch.ones(2)
    view = common.taken(single)
    view[0] = 3.0
    assert single.tolist() == [3.0, 1.0]  # no copy where none is needed
    assert isinstance(common.given(view), torch.Tensor)
    assert common.given(view).data_ptr() == single.data_ptr()
    z = common.noise_of(1)
    for i in range(N):
        if table.c[i] == 0:
            assert z(i) is None
        else:
            np.testing.assert_array_equal(np.asarray(z(i)), draw(7, 1, i, (SIZE,)).astype(np.float32))


def test_samples_that_go_on_keep_their_rows(xp: ModuleType) -> None:
    states, beliefs = normal((3, 5, SIZE), seed=1), normal((3, 5, SIZE), seed=2)
    own = nodes(xp, states, beliefs)
    moves = to_numpy(own.dX).copy()
    own.stay(np.array([2, 0]))
    np.testing.assert_array_equal(to_numpy(own.first), states[[2, 0], 1])
    np.testing.assert_array_equal(to_numpy(own.dX), moves[[2, 0]])
