"""Noise that seeds give: drawn by several threads where it is much, and ahead of being asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from threading import Event, Thread
from typing import Any

import numpy as np

_MANY, _MOST_THREADS = 2**18, 16  # numbers from which on several threads draw, and how many
_LARGE = 2**13  # numbers of a state from which on they are drawn ahead: a draw then takes twice as long as a thread
_STREAM = 0x5041524153  # separates this use of a seed from others, for example the user's own draw of x_T


class Ahead:
    """A thread that works while a block runs, and is told when it is over.

    It is no generator: those write to an exception that passes through, which some refuse.

    Args:
        work: is given an event that is set at the end of the block.
    """

    def __init__(self, work: Callable[[Event], None]) -> None:
        self._over = Event()
        self._thread = Thread(target=work, args=(self._over,), name="parasolver-noise-ahead")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        self._thread.join()


class SeededNoise:
    """The draws of (step, sample).

    Args:
        keys: of each sample, see :func:`draw`.
        size: numbers of a draw.
        dtype: of what is drawn ahead, as it is read.
    """

    def __init__(self, keys: Sequence[tuple[int, int]], size: int, dtype: Any) -> None:
        self._keys, self._size, self._dtype = keys, size, dtype
        self._streams: dict[int, _Stream] = {}
        self.drawn: dict[tuple[int, int], np.ndarray] = {}  # ahead of being asked for

    def __call__(self, step: int, sample: int) -> np.ndarray:
        """One draw, (size,), float64; or what was drawn ahead."""
        z = self.drawn.pop((step, sample), None)
        return self._draw(step, sample, self._streams) if z is None else z

    def fill(self, rows: np.ndarray, wanted: Sequence[tuple[int, int, int]]) -> None:
        """Draws of the (row, step, sample), by several threads where they are many: NumPy lets others run meanwhile."""
        left: list[tuple[int, int, int]] = []
        for row, step, sample in wanted:
            if (step, sample) in self.drawn:
                rows[row] = self.drawn.pop((step, sample))
            else:
                left.append((row, step, sample))
        threads = min(os.cpu_count() or 1, len(left), _MOST_THREADS)

        def draw(places: list[tuple[int, int, int]], streams: dict[int, _Stream]) -> None:
            for row, step, sample in places:
                rows[row] = self._draw(step, sample, streams)

        if threads <= 1 or len(left) * self._size < _MANY:
            draw(left, self._streams)
            return
        with ThreadPoolExecutor(threads, thread_name_prefix="parasolver-noise") as pool:
            list(pool.map(lambda first: draw(left[first::threads], {}), range(threads)))

    @property
    def slow(self) -> bool:
        """Whether draws are worth to be made :meth:`ahead`."""
        return self._size >= _LARGE

    def ahead(self, wanted: Sequence[tuple[int, int]]) -> AbstractContextManager[None]:
        """While the block waits for something else, a thread makes these draws, as far as it gets."""
        return Ahead(lambda over: self._draw_ahead(wanted, over)) if wanted else nullcontext()

    def _draw_ahead(self, wanted: Sequence[tuple[int, int]], over: Event) -> None:
        streams: dict[int, _Stream] = {}
        for at in wanted:
            if over.is_set():
                return
            if at not in self.drawn:
                self.drawn[at] = self._draw(*at, streams).astype(self._dtype)

    def forget(self, step: int, sample: int) -> None:
        """Free what was drawn ahead and is not wanted any more."""
        self.drawn.pop((step, sample), None)

    def _draw(self, step: int, sample: int, streams: dict[int, _Stream]) -> np.ndarray:
        seed, stream = self._keys[sample]
        if seed not in streams:
            streams[seed] = _Stream(seed)
        return streams[seed].draw(stream, step, (self._size,))


class _Stream:
    """The draws of one seed; see :func:`draw`. Not to be shared by threads.

    The generator is set back and not made anew for each draw, which would take longer than to draw a small state.
    """

    def __init__(self, seed: int) -> None:
        self._philox = np.random.Philox(key=np.array([seed, _STREAM], dtype=np.uint64))
        self._generator, self._start = np.random.Generator(self._philox), self._philox.state

    def draw(self, sample: int, step: int, event: tuple[int, ...]) -> np.ndarray:
        self._start["state"]["counter"][:] = 0, 0, sample, step
        self._philox.state = self._start
        return self._generator.standard_normal(event)


def draw(seed: int, sample: int, step: int, event: tuple[int, ...]) -> np.ndarray:
    """Standard normal noise keyed by (seed, sample, step), float64, shape ``event``; the same on every machine.

    Each key starts its own stream of the counter-based generator Philox, so no draw depends on how many came
    before it (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
    """
    return _Stream(seed).draw(sample, step, event)
