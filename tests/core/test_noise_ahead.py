"""Noise that the window reads next is drawn while the network runs: the same numbers, and no thread that stays."""

import threading
import time
from typing import Any

import numpy as np
import pytest

from parasolver_core import DDPM, Method, NoiseSchedule, solve
from parasolver_core.samplers import seeded
from parasolver_core.samplers.noise import NoiseSource, draw

SCHEDULE = NoiseSchedule.linear()
NAME = "parasolver-noise-ahead"


def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    return 0.3 * np.sin(x)


def sampled(batch: int, **options: Any) -> Any:
    x_T = np.random.default_rng(0).standard_normal((batch, 6)).astype(np.float32)
    problem = options.pop("denoiser", network), x_T, SCHEDULE.timesteps(30), DDPM(SCHEDULE)
    return solve(*problem, 8, method=Method(spread=False), check=False, **options)


@pytest.mark.parametrize("batch", [1, 3])
def test_what_is_drawn_ahead_is_what_would_be_drawn(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    without = sampled(batch, seed=4, save="trajectory")
    monkeypatch.setattr(seeded, "_LARGE", 1)
    asked = []
    ahead = NoiseSource.ahead
    monkeypatch.setattr(NoiseSource, "ahead", lambda self, wanted: (asked.extend(wanted), ahead(self, wanted))[1])
    with_thread = sampled(batch, seed=4, save="trajectory")
    np.testing.assert_array_equal(with_thread.trajectory, without.trajectory)
    assert with_thread.stats.rounds == without.stats.rounds
    assert {sample for _, sample in asked} == set(range(batch))
    assert len({step for step, _ in asked}) > 15  # of the 22 that enter after the first round


def test_as_far_as_it_gets() -> None:
    source = NoiseSource(np.zeros((2, 5), dtype=np.float32), np.float32, 10, 7, None)
    wanted = [(step, 1) for step in range(4)]
    with source.ahead(wanted):
        while any(one.name == NAME for one in threading.enumerate()):
            time.sleep(1e-3)
    assert list(source._seeded.drawn) == wanted
    got = source.block([(2, 1), None, (5, 0)])
    np.testing.assert_array_equal(got[0], draw(7, 1, 2, (5,)).astype(np.float32))
    np.testing.assert_array_equal(got[2], draw(7, 0, 5, (5,)).astype(np.float32))
    assert not got[1].any()
    assert (2, 1) not in source._seeded.drawn  # read once
    source.forget_before(np.array([10, 2]))
    assert list(source._seeded.drawn) == [(3, 1)]


def test_a_function_is_called_where_it_is_asked_for_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeded, "_LARGE", 1)
    threads = set()

    def own(step: int, sample: int) -> np.ndarray:
        threads.add(threading.current_thread())
        if step == 20:
            raise ValueError("no noise for step 20")
        return draw(0, sample, step, (6,))

    with pytest.raises(ValueError, match="no noise for step 20"):
        sampled(2, noise=own)
    assert threads == {threading.main_thread()}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_no_thread_stays(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeded, "_LARGE", 1)
    seen = []

    def fails(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        seen.append(1)
        if len(seen) == 3:
            raise error("here")
        return network(x, t)

    with pytest.raises(error):
        sampled(2, seed=0, denoiser=fails)
    assert not [one for one in threading.enumerate() if one.name == NAME]
