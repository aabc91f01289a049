"""The sampler in terms of what is held: steps of many windows, what rounds move, what noise alone makes."""

from typing import Any

import numpy as np
import pytest

from parasolver_core.samplers import free_states, held_form
from parasolver_core.samplers.free_states import states_of_noise
from parasolver_core.samplers.held_form import HeldForm
from parasolver_core.samplers.noise import NoiseSource, draw
from tests.core.any_tables import any_table, step
from tests.core.problems import normal

READS = pytest.mark.parametrize(("states", "outputs"), [(1, 1), (1, 3), (3, 1), (2, 3)])


@READS
def test_how_much_a_step_reads(states: int, outputs: int) -> None:
    """The state enters what is held, so that a step reads as many states as outputs at least."""
    form = HeldForm(any_table(9, states, outputs))
    reads = (max(states, outputs), outputs)
    assert (form.steps, form.reads, form.past, form.base) == (9, reads, reads[0] - 1, sum(reads))
    assert form.noisy
    assert not HeldForm(any_table(9, noisy=False)).noisy
    expected = [*range(reads[0]), *range(outputs)]
    assert form.behind.tolist() == expected


def test_outputs_that_are_held_do_not_make_more_states_be_read() -> None:
    form = HeldForm(any_table(9, 1, 3, held=np.tile([0.0, 1.0], (9, 1))))
    assert (form.reads, form.past) == ((1, 3), 2)  # what is past is of the one that reads more


@READS
def test_a_step_of_each_sample_at_its_own_node(states: int, outputs: int) -> None:
    table, (x, m) = any_table(9, states, outputs), normal((2, 9, 5))
    form = HeldForm(table)
    h = table.held[:, :1] * x + table.held[:, 1:] * m
    nodes = np.array([8, 3, 5])
    xs, hs = (list(np.stack([part[nodes - k] for k in range(3)])) for part in (x, h))
    got = form.after(nodes, xs, hs)
    np.testing.assert_allclose(got, [step(table, i, x, m) for i in nodes], rtol=1e-12)
    shared = form.after(np.array([4, 4]), [x[4 - k] for k in range(3)], [h[4 - k] for k in range(3)])
    np.testing.assert_allclose(shared, [step(table, 4, x, m)] * 2, rtol=1e-12)


@READS
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("held", [any_table(9).held, np.tile([0.0, 1.0], (9, 1))], ids=["mixed", "outputs"])
def test_states_onwards_are_linear_in_what_is_known(states: int, outputs: int, noisy: bool, held: np.ndarray) -> None:
    table, (x, m), z = any_table(9, states, outputs, noisy, held=held), normal((2, 9, 5)), normal((9, 5), seed=1)
    form, lo, count = HeldForm(table), np.array([3, 5]), 4
    h = table.held[:, :1] * x + table.held[:, 1:] * m
    got = form.onwards(lo, count)
    assert got.shape == (2, count, form.base - 1 + count * (2 if noisy else 1))
    for row, first in enumerate(lo.tolist()):
        known = [x[first - k] for k in range(form.reads[0])] + [h[first - 1 - k] for k in range(form.reads[1] - 1)]
        known += list(h[first : first + count]) + (list(z[first : first + count]) if noisy else [])
        X = dict(enumerate(x[: first + 1]))
        for i in range(first, first + count):
            outputs_then = {j: (h[j] - table.held[j, 0] * X[j]) / table.held[j, 1] for j in range(i - 2, i + 1)}
            X[i + 1] = step(table, i, X, outputs_then, z[i])
        np.testing.assert_allclose(got[row] @ np.stack(known), [X[first + 1 + k] for k in range(count)], rtol=1e-11)


def test_states_onwards_end_at_the_last_step() -> None:
    form = HeldForm(any_table(9, 2, 2))
    np.testing.assert_allclose(form.onwards(np.array([7]), 4)[0, :2, :5], form.onwards(np.array([7]), 2)[0][:, :5])


@READS
@pytest.mark.parametrize("long", [1, 5, 64])
def test_moves_solve_the_equations_of_each_window(
    states: int, outputs: int, long: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``dX_{j+1} = sum a dX + sum b (r + g dX)``, beginning with a state that does not move."""
    monkeypatch.setattr(held_form, "_LONG", long)
    table, lo, n = any_table(9, states, outputs), np.array([2, 0, 4]), 5
    form, slope, defects = HeldForm(table), normal((3, n), seed=1), normal((3, n, 4), seed=2)
    T, squares = form.propagation(lo[:, None] + np.arange(n), slope, defects @ defects.swapaxes(1, 2))
    assert T.flags.c_contiguous
    for row, first in enumerate(lo.tolist()):
        moves = [np.zeros(n)]
        beliefs = []
        for j in range(n - 1):
            beliefs.append(np.eye(n)[j] + slope[row, j] * moves[j])
            past = range(j + 1)
            moves.append(
                sum((form.a[first + j, k] * moves[j - k] for k in past if k < form.reads[0]), np.zeros(n))
                + sum((form.b[first + j, k] * beliefs[j - k] for k in past if k < form.reads[1]), np.zeros(n))
            )
        np.testing.assert_allclose(T[row], moves, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(squares[row], ((np.stack(moves) @ defects[row]) ** 2).sum(axis=1), rtol=1e-9)


@pytest.mark.parametrize("long", [0, 64])
def test_the_state_of_a_single_node_does_not_move(long: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_form, "_LONG", long)
    T, squares = HeldForm(any_table(9, 2, 3)).propagation(np.array([[3], [8]]), np.ones((2, 1)), np.ones((2, 1, 1)))
    assert (T.tolist(), squares.tolist()) == ([[[0.0]], [[0.0]]], [[0.0], [0.0]])


def test_sums_of_squares_of_moves_are_not_below_0_by_rounding() -> None:
    form = HeldForm(any_table(9, 1, 1, held=np.tile([0.0, 1.0], (9, 1))))
    below = np.array([[[-1e-20, 0.0], [0.0, 0.0]]])
    assert form.propagation(np.array([[0, 1]]), np.zeros((1, 2)), below)[1].tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("long", [1, 64])
def test_a_window_that_ends_with_the_sampler(long: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_form, "_LONG", long)
    form, slope = HeldForm(any_table(9, 2, 3)), normal((1, 6))
    nodes = np.array([[6, 7, 8, 8, 8, 8]])  # beyond the end the last one
    whole = form.propagation(nodes, slope, np.eye(6)[None])
    part = form.propagation(nodes[:, :3], slope[:, :3], np.eye(3)[None])
    np.testing.assert_allclose(whole[0][0, :3, :3], part[0][0], rtol=1e-14)
    np.testing.assert_allclose(whole[1][0, :3], part[1][0], rtol=1e-14)


@READS
@pytest.mark.parametrize("drawn", [1, 25, 2**24])
def test_states_that_the_noise_alone_makes(
    xp: Any, states: int, outputs: int, drawn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(free_states, "_DRAWN", drawn)
    table, samples = any_table(9, states, outputs), np.array([2, 0])
    form, like = HeldForm(table), xp.asarray(normal((2, 4), dtype="float32"))
    noise = NoiseSource(xp.asarray(normal((3, 4), dtype="float32")), like.dtype, 9, 7, None)
    got = [np.asarray(one) for one in states_of_noise(form, noise, samples, like)]
    assert {one.dtype for one in got} == {np.dtype(np.float32)}
    for row, sample in enumerate(samples.tolist()):
        x, h = [np.zeros(4)], np.zeros(4)
        for i in range(9):
            outputs_then = {j: (h - table.held[j, 0] * x[j]) / table.held[j, 1] for j in range(i + 1)}
            x.append(step(table, i, x, outputs_then, draw(7, sample, i, (4,))))
        np.testing.assert_allclose([one[row] for one in got], x, rtol=1e-4, atol=1e-5)
    assert not noise.held


@pytest.mark.parametrize(("drawn", "calls"), [(1, [2] * 6), (16, [4, 2, 2, 4]), (24, [4, 4, 4]), (2**24, [12])])
def test_noise_is_drawn_for_many_steps_at_once(drawn: int, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two samples of four numbers; no step is asked for that adds none."""
    monkeypatch.setattr(free_states, "_DRAWN", drawn)
    like, asked = normal((2, 4)), []
    noise = NoiseSource(like, like.dtype, 9, 7, None)
    block = noise.block
    monkeypatch.setattr(noise, "block", lambda wanted: (asked.append(len(wanted)), block(wanted))[1])
    assert len(list(states_of_noise(HeldForm(any_table(9)), noise, np.arange(2), like))) == 10
    assert asked == calls


def test_noise_of_large_states_is_drawn_for_few_steps_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    like, asked = np.zeros((1, 2**20), dtype=np.float32), []
    noise = NoiseSource(like, like.dtype, 40, 7, None)
    monkeypatch.setattr(noise, "block", lambda wanted: (asked.append(len(wanted)), np.zeros((len(wanted), 1)))[1])
    for _ in states_of_noise(HeldForm(any_table(40, 1, 1)), noise, np.zeros(1, dtype=np.int64), like):
        pass
    assert 2 <= max(asked) <= 20


def test_without_noise_it_makes_nothing() -> None:
    like = normal((2, 4))
    form, noise = HeldForm(any_table(9, noisy=False)), NoiseSource(like, like.dtype, 9, None, None)
    assert not np.any(list(states_of_noise(form, noise, np.arange(2), like)))
