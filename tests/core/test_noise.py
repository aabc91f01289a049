"""The promises of noise and seeds."""

import itertools
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parasolver_core import (
    DDPM,
    Recurrence,
    StepRule,
    solve,
)
from parasolver_core.samplers.noise import draw
from tests.arrays import to_numpy
from tests.core.any_runs import FEW, MAX_STEPS, SAMPLERS, STOCHASTIC, TABLE, Run, exactness, runs, same_bits, seeds
from tests.core.problems import Rational, TanhNetwork, normal, relative


class NoiseOnly(StepRule):
    """``x_{i+1} = z_i``: the trajectory is the noise."""

    def recurrence(self, timesteps: np.ndarray) -> Recurrence:
        n = len(timesteps)
        nothing = np.zeros((n, 1))
        return Recurrence(timesteps=timesteps, a=nothing, b=nothing, c=np.ones(n))


def noise_of(
    xp: ModuleType | None, batch: int, seed: Any, steps: int = 4, dtype: str = "float64", **options: Any
) -> np.ndarray:
    x_T = normal((batch, 3), xp, dtype)
    run = solve(lambda x, t: x, x_T, np.arange(steps), NoiseOnly(), seed=seed, save="trajectory", **options)
    return to_numpy(run.trajectory)[1:]


@given(seed=seeds, window=st.integers(1, 5))
def test_noise_is_the_same_in_every_library_and_window(xp: ModuleType, seed: int, window: int) -> None:
    expected = noise_of(None, 2, seed, method="sequential")
    assert same_bits(noise_of(xp, 2, seed, window=window), expected)
    assert same_bits(noise_of(xp, 2, seed, window=window, max_rows=1), expected)
    assert same_bits(noise_of(xp, 2, seed, window=window, dtype="float32"), expected.astype(np.float32))


@given(seeds=st.lists(seeds, min_size=1, max_size=4, unique=True), data=st.data())
def test_a_list_of_seeds_gives_each_sample_its_own_noise(seeds: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(seeds))))
    whole = noise_of(None, len(seeds), seeds)
    for place, sample in enumerate(order):
        assert same_bits(noise_of(None, 1, [seeds[sample]])[:, 0], whole[:, sample])
        assert same_bits(noise_of(None, len(seeds), [seeds[k] for k in order])[:, place], whole[:, sample])
    assert len(np.unique(whole)) == whole.size


@given(seed=seeds, batch=st.integers(1, 4), more=st.integers(1, 3))
def test_one_seed_numbers_the_samples_and_steps(seed: int, batch: int, more: int) -> None:
    few, many = noise_of(None, batch, seed, steps=3), noise_of(None, batch + more, seed, steps=5)
    assert same_bits(few, np.ascontiguousarray(many[:3, :batch]))
    assert len(np.unique(many)) == many.size  # no stream is used twice


def test_noise_of_a_seed_stays_what_it_is() -> None:
    """Numbers of an earlier version: a seed in a paper goes on to mean the same."""
    np.testing.assert_allclose(draw(7, 1, 3, (3,)), [0.29294578, -0.22240107, 0.76862469], atol=1e-8)


@pytest.mark.parametrize("seed", [2**63, 2**64 - 2])
def test_large_seeds_are_told_apart(seed: int) -> None:
    assert not np.any(noise_of(None, 1, seed) == noise_of(None, 1, seed + 1))


def test_neighbouring_seeds_are_unrelated_and_normal() -> None:
    z = np.stack([noise_of(None, 4, seed, steps=200).ravel() for seed in range(4)])  # 2400 numbers a seed
    five_sigma = 5 / np.sqrt(z.shape[1])
    np.testing.assert_allclose(np.corrcoef(z), np.eye(4), rtol=0, atol=five_sigma)
    np.testing.assert_allclose(z.mean(axis=1), 0, atol=five_sigma)
    np.testing.assert_allclose(z.var(axis=1), 1, atol=five_sigma * np.sqrt(2))


def test_a_list_of_one_seed_is_that_seed() -> None:
    arguments = (Rational(), normal((1, 4)), TABLE.timesteps(12), DDPM(TABLE))
    assert same_bits(solve(*arguments, seed=[7]).sample, solve(*arguments, seed=7).sample)
    assert not same_bits(solve(*arguments, seed=[8]).sample, solve(*arguments, seed=7).sample)


def test_no_seed_is_seed_zero_and_global_random_state_is_left_alone() -> None:
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    before = np.random.get_state()[1].copy(), torch.get_rng_state().clone()  # noqa: NPY002
    assert same_bits(noise_of(None, 2, None), noise_of(None, 2, 0))
    assert np.array_equal(np.random.get_state()[1], before[0])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])


@given(run=runs(STOCHASTIC, ("float64",)), other=st.integers(1, MAX_STEPS), max_rows=st.integers(1, 20))
def test_same_seed_same_sample_for_every_window_and_chunk(run: Run, other: int, max_rows: int) -> None:
    x_T = normal((run.batch, 2, 3), seed=run.seed)
    samples = [
        solve(run.network, x_T, run.grid, run.rule, tolerance=0, seed=run.seed, **options).sample
        for options in ({"window": run.window}, {"window": other}, {"window": other, "max_rows": max_rows})
    ]
    assert relative(samples[1], samples[0]) < 2 * exactness("float64")
    assert relative(samples[2], samples[0]) < 2 * exactness("float64")


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_other_seed_other_sample(sampler: str) -> None:
    rule, schedule = SAMPLERS[sampler]
    a, b = (solve(TanhNetwork(), normal((1, 6)), schedule.timesteps(8), rule, seed=seed).sample for seed in (1, 2))
    assert relative(a, b) > 1e-2


@given(run=runs(STOCHASTIC, ("float64",), steps=FEW))
def test_noise_as_array_and_as_function_are_the_same(xp: ModuleType, run: Run) -> None:
    z = normal((run.steps, run.batch, 2, 3), xp, seed=8)
    arguments = (run.network, run.start(xp), run.grid, run.rule, run.window)
    as_array = solve(*arguments, tolerance=0, noise=z)
    as_function = solve(*arguments, tolerance=0, noise=lambda step, sample: z[step, sample, ...])
    from_numpy = solve(*arguments, tolerance=0, noise=to_numpy(z))
    assert same_bits(as_array.sample, as_function.sample)
    assert same_bits(as_array.sample, from_numpy.sample)


@pytest.mark.parametrize("method", ["secant", "parataa", "sequential"])
@pytest.mark.parametrize(("x_library", "z_library"), [*itertools.product(["numpy", "torch"], repeat=2)])
def test_a_noise_function_may_reuse_its_memory(x_library: str, z_library: str, method: str) -> None:
    """Between NumPy and torch an array of equal dtype changes hands in the same memory."""
    z = normal((30, 2, 6), None, "float32", seed=8)
    buffer = np.empty(6, dtype=np.float32) if z_library == "numpy" else torch.empty(6)

    def refilled(step: int, sample: int) -> Any:
        buffer[...] = z[step, sample] if z_library == "numpy" else torch.from_numpy(z[step, sample])
        return buffer

    x_T = normal((2, 6), None, "float32")
    arguments = (TABLE.timesteps(30), DDPM(TABLE), 8)
    expected = solve(Rational(), x_T, *arguments, method=method, noise=z)
    got = solve(
        Rational(), x_T if x_library == "numpy" else torch.from_numpy(x_T), *arguments, method=method, noise=refilled
    )
    assert relative(to_numpy(got.sample), expected.sample) < 1e-5


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("options", [{"window": 8}, {"window": 30}, {"method": "sequential"}], ids=str)
def test_a_noise_function_of_numpy_may_reuse_one_buffer_for_torch(options: dict[str, Any], dtype: Any) -> None:
    z, buffer = normal((30, 2, 6), seed=8), np.empty(6, dtype=dtype)

    def refilled(step: int, sample: int) -> np.ndarray:
        buffer[...] = z[step, sample]
        return buffer

    arguments = (torch.asarray(normal((2, 6))), TABLE.timesteps(30), DDPM(TABLE))
    got = solve(Rational(), *arguments, noise=refilled, tolerance=0, **options)
    assert same_bits(got.sample, solve(Rational(), *arguments, noise=z.astype(dtype), tolerance=0, **options).sample)
