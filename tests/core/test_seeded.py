"""Noise of seeds: the same numbers, whoever draws them, and when."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Event
from typing import Any

import numpy as np
import pytest

from parasolver_core.samplers import seeded
from parasolver_core.samplers.noise import draw
from parasolver_core.samplers.seeded import Ahead, SeededNoise

KEYS = [(7, 0), (7, 1), (9, 0)]


def source(size: int = 5, dtype: Any = np.float32) -> SeededNoise:
    return SeededNoise(KEYS, size, dtype)


def expected(step: int, sample: int, size: int = 5) -> np.ndarray:
    seed, stream = KEYS[sample]
    return draw(seed, stream, step, (size,))


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many threads were asked to draw, each time that several were."""
    asked: list[int] = []

    def pool(threads: int, **options: Any) -> ThreadPoolExecutor:
        asked.append(threads)
        return ThreadPoolExecutor(threads, **options)

    monkeypatch.setattr(seeded, "ThreadPoolExecutor", pool)
    monkeypatch.setattr(seeded, "_MANY", 20)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    return asked


def filled(own: SeededNoise, steps: list[int]) -> np.ndarray:
    rows = np.zeros((len(steps) + 1, own._size))
    own.fill(rows, [(row + 1, step, row % 3) for row, step in enumerate(steps)])
    assert not rows[0].any()
    for row, step in enumerate(steps):
        np.testing.assert_array_equal(rows[row + 1], expected(step, row % 3))
    return rows


@pytest.mark.parametrize(("rows", "threads"), [(2, []), (3, []), (4, [3]), (9, [3])])
def test_several_threads_draw_where_it_is_much(rows: int, threads: list[int], pools: list[int]) -> None:
    filled(source(), list(range(rows)))
    assert pools == threads


def test_no_more_threads_than_draws_or_than_sixteen(pools: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    filled(source(), [3, 1, 4, 1])
    filled(source(), list(range(40)))
    assert pools == [4, 16]
    for few in (1, None):
        monkeypatch.setattr(os, "cpu_count", lambda few=few: few)
        filled(source(), list(range(40)))
    assert len(pools) == 2
    monkeypatch.setattr(seeded, "_MANY", 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    filled(source(), [5])
    assert len(pools) == 2
    filled(source(), [5, 6])
    assert pools[2:] == [2]


def test_a_million_numbers_are_much_and_a_thousand_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    asked: list[int] = []
    monkeypatch.setattr(seeded, "ThreadPoolExecutor", lambda n, **_: (asked.append(n), ThreadPoolExecutor(n))[1])
    for size in (500, 2**19):
        source(size).fill(np.zeros((2, size), dtype=np.float32), [(0, 0, 0), (1, 1, 0)])
    assert asked == [2]
    assert [source(size).slow for size in (4096, 65536)] == [False, True]


def test_from_its_size_on_a_state_is_drawn_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeded, "_LARGE", 5)
    assert [source(size).slow for size in (4, 5, 6)] == [False, True, True]


def test_what_was_drawn_ahead_is_read_once_and_then_drawn_anew() -> None:
    own, over = source(), Event()
    own._draw_ahead([(2, 1), (3, 2), (2, 1)], over)
    assert list(own.drawn) == [(2, 1), (3, 2)]
    single = expected(2, 1).astype(np.float32)
    for first, dtype in ((single, np.float32), (expected(2, 1), np.float64)):
        got = own(2, 1)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, first)
    rows = np.zeros((2, 5))
    own.fill(rows, [(1, 3, 2), (0, 4, 0)])
    np.testing.assert_array_equal(rows[1], expected(3, 2).astype(np.float32))
    np.testing.assert_array_equal(rows[0], expected(4, 0))
    assert not own.drawn
    own._draw_ahead([(5, 0), (6, 0)], over)
    own.forget(5, 0)
    own.forget(9, 9)  # was never drawn
    assert list(own.drawn) == [(6, 0)]
    kept = own.drawn[6, 0]
    own._draw_ahead([(6, 0)], over)
    assert own.drawn[6, 0] is kept


def test_no_more_is_drawn_ahead_once_the_block_is_over() -> None:
    own, over = source(), Event()
    over.set()
    own._draw_ahead([(2, 1)], over)
    assert not own.drawn
    assert isinstance(own.ahead([]), nullcontext)
    assert isinstance(own.ahead([(2, 1)]), Ahead)


def test_the_end_of_a_block_is_told_and_waited_for() -> None:
    told: list[bool] = []

    def work(over: Event) -> None:
        told.append(over.is_set())
        over.wait(20)
        told.append(over.is_set())

    with Ahead(work):
        pass
    assert told[-1] is True
