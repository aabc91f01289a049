"""Denoisers that are told which step of which sample each row is."""

from pathlib import Path
from types import ModuleType
from typing import Any

import array_api_compat
import numpy as np
import pytest

from parasolver_core import DDIM, DDPM, NoiseSchedule, Rows, clip_sample, solve, solve_sequential
from parasolver_core.samplers.noise import draw
from tests.arrays import to_numpy
from tests.core.problems import normal, relative

SCHEDULE = NoiseSchedule.linear()
LABELS = np.array([-0.6, 0.1, 0.9])


class Labelled:
    """The exact denoiser of data that sits at a label of each sample; remembers the rows it was given."""

    takes_rows = True

    def __init__(self) -> None:
        self.seen: list[Rows] = []

    def __call__(self, x: Any, t: Any, rows: Rows) -> Any:
        self.seen.append(rows)
        xp = array_api_compat.array_namespace(x)
        alpha, sigma = (level[:-1][:, None] for level in SCHEDULE.levels(to_numpy(t)))
        label = xp.asarray(alpha * LABELS[rows.samples][:, None], dtype=x.dtype)
        return (x - label) / xp.asarray(sigma, dtype=x.dtype)


@pytest.mark.parametrize(
    "limits", [{}, {"max_rows": 2}, {"buckets": (4, 16)}, {"buckets": (8,), "max_rows": 4}], ids=str
)
def test_each_sample_follows_its_own_label(xp: ModuleType, limits: dict[str, Any]) -> None:
    x_T = normal((3, 4), xp)
    for method in ("secant", "parataa", "sequential"):
        options = {"window": 5, "method": method} | limits
        solution = solve(Labelled(), x_T, SCHEDULE.timesteps(12), DDIM(SCHEDULE), **options)
        expected = np.broadcast_to(LABELS[:, None], (3, 4))
        assert relative(solution.sample, expected) < 1e-2


def test_rows_name_the_step_the_sample_and_its_noise() -> None:
    timesteps, rule = SCHEDULE.timesteps(30), DDPM(SCHEDULE)
    denoiser = Labelled()
    solution = solve(denoiser, normal((3, 4)), timesteps, rule, window=4, seed=7)
    assert solution.success
    for rows in denoiser.seen:
        assert len(rows) == len(rows.samples) == len(rows.steps)
        assert rows.recurrence.timesteps.tolist() == timesteps.tolist()
        step, sample = int(rows.steps[-1]), int(rows.samples[-1])
        np.testing.assert_array_equal(rows.noise(step, sample), draw(7, sample, step, (4,)))


def test_a_sample_that_failed_does_not_shift_the_others() -> None:
    class Failing(Labelled):
        def __call__(self, x: Any, t: Any, rows: Rows) -> Any:
            m = super().__call__(x, t, rows)
            m[(rows.samples == 0) & (rows.steps == 3)] = np.nan
            return m

    for method in ("secant", "sequential"):
        arguments = (Failing(), normal((3, 4)), SCHEDULE.timesteps(12), DDIM(SCHEDULE))
        solution = solve(*arguments, window=4, method=method, throw=False)
        assert relative(solution.sample[1:], np.broadcast_to(LABELS[1:, None], (2, 4))) < 1e-2


def test_rows_are_right_after_memory_ran_out() -> None:
    class Small(Labelled):
        def __call__(self, x: Any, t: Any, rows: Rows) -> Any:
            assert len(x) == len(rows)
            if len(x) > 3:
                raise MemoryError
            return super().__call__(x, t, rows)

    solution = solve(Small(), normal((3, 4)), SCHEDULE.timesteps(12), DDIM(SCHEDULE), window=5)
    assert solution.stats.max_rows == 3
    assert relative(solution.sample, np.broadcast_to(LABELS[:, None], (3, 4))) < 1e-2


def test_a_window_is_chosen_for_a_denoiser_that_takes_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    solution = solve(Labelled(), normal((3, 4)), SCHEDULE.timesteps(12), DDIM(SCHEDULE), window="auto")
    assert relative(solution.sample, np.broadcast_to(LABELS[:, None], (3, 4))) < 1e-2


def test_clipping_passes_rows_on() -> None:
    arguments = normal((3, 4)), SCHEDULE.timesteps(12), DDIM(SCHEDULE)
    clipped = solve_sequential(clip_sample(Labelled(), SCHEDULE, clip_range=0.5), *arguments)
    np.testing.assert_allclose(clipped.sample, np.clip(LABELS, -0.5, 0.5)[:, None] * np.ones((3, 4)), atol=1e-12)
