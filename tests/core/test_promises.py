"""The promises of the solver, over schedules, samplers, windows, tolerances, batches, dtypes and array libraries."""

import itertools
import threading
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import array_api_compat
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parasolver_core import (
    DDIM,
    DDPM,
    DPMSolver,
    Euler,
    NoiseSchedule,
    ParallelIntegralSolver,
    Recurrence,
    SequentialSolver,
    Status,
    StepRule,
    solve,
    solve_sequential,
)
from parasolver_core.samplers.noise import draw
from tests.arrays import to_numpy
from tests.core.problems import Counted, Gaussian, Mixture, Rational, TanhNetwork, normal, relative

TABLE = NoiseSchedule.scaled_linear()
COSINE = NoiseSchedule.squared_cosine()
KARRAS = NoiseSchedule.karras(0.05, 10.0)
FLOW = NoiseSchedule.flow_matching(2.0)

SAMPLERS: dict[str, tuple[StepRule, NoiseSchedule]] = {
    "ddim, epsilon": (DDIM(TABLE), TABLE),
    "ddim, v": (DDIM(COSINE, prediction_type="v_prediction"), COSINE),
    "ddim, sample, eta": (DDIM(TABLE, prediction_type="sample", eta=0.7), TABLE),
    "ddpm": (DDPM(TABLE), TABLE),
    "ddpm, large": (DDPM(TABLE, prediction_type="v_prediction", variance_type="fixed_large"), TABLE),
    "dpm 2": (DPMSolver(TABLE), TABLE),
    "dpm 3": (DPMSolver(COSINE, prediction_type="v_prediction", order=3), COSINE),
    "dpm 3, karras": (DPMSolver(KARRAS, order=3, lower_order_final=False), KARRAS),
    "dpm 2, sde": (DPMSolver(TABLE, prediction_type="sample", stochastic=True), TABLE),
    "euler, karras": (Euler(KARRAS, prediction_type="epsilon"), KARRAS),
    "euler, flow": (Euler(FLOW), FLOW),
}
STOCHASTIC = [name for name in SAMPLERS if name in ("ddim, sample, eta", "ddpm", "ddpm, large", "dpm 2, sde")]

MAX_STEPS = 16
FEW = 7  # for tests on every array library, one of which is slow: still three times the longest memory


def exactness(dtype: str) -> float:
    """How far apart two exact runs may be: batching error of the network and moves called rounding, 8 ulp at each of
    the steps, amplified by at most 1 / alpha_T = 15 (epsilon prediction) and as much again by the network."""
    return MAX_STEPS * 8 * 15 * 2 * float(np.finfo(dtype).eps)


@dataclass(frozen=True)
class Run:
    """One drawn sampling problem."""

    sampler: str
    steps: int
    window: int
    batch: int
    dtype: str
    seed: int

    @property
    def rule(self) -> StepRule:
        return SAMPLERS[self.sampler][0]

    @property
    def grid(self) -> np.ndarray:
        return SAMPLERS[self.sampler][1].timesteps(self.steps)

    @property
    def network(self) -> TanhNetwork:
        discrete = SAMPLERS[self.sampler][1] in (TABLE, COSINE)
        return TanhNetwork(size=6, gain=1.2, time_scale=1e-3 if discrete else 0.1, seed=self.seed)

    def start(self, xp: ModuleType) -> Any:
        return normal((self.batch, 2, 3), xp, self.dtype, self.seed)


def runs(
    samplers: list[str] | None = None, dtypes: tuple[str, ...] = ("float64", "float32"), steps: int = MAX_STEPS
) -> Any:
    return st.builds(
        Run,
        sampler=st.sampled_from(samplers or list(SAMPLERS)),
        steps=st.integers(1, steps),
        window=st.integers(1, steps + 4),
        batch=st.integers(1, 3 if steps > FEW else 2),
        dtype=st.sampled_from(dtypes),
        seed=st.integers(0, 2**32),
    )


tolerances = st.one_of(st.just(0.0), st.floats(1e-6, 0.9))


def same_bits(a: Any, b: Any) -> bool:
    a, b = to_numpy(a), to_numpy(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_stochastic_names_are_right() -> None:
    for name, (rule, schedule) in SAMPLERS.items():
        assert rule.recurrence(schedule.timesteps(5)).stochastic == (name in STOCHASTIC)


# 1. window = 1


@given(run=runs(steps=FEW), tolerance=tolerances)
def test_window_one_is_the_sequential_sampler_to_the_last_bit(xp: ModuleType, run: Run, tolerance: float) -> None:
    options = {"seed": run.seed, "save": "trajectory"}
    x_T = run.start(xp)
    one = solve(run.network, x_T, run.grid, run.rule, 1, tolerance=tolerance, **options)
    sequential = solve_sequential(run.network, x_T, run.grid, run.rule, **options)
    assert same_bits(one.sample, sequential.sample)
    assert same_bits(one.trajectory, sequential.trajectory)
    assert one.stats.rounds == one.stats.evaluations // run.batch == run.steps
    assert same_bits(one.trajectory[0, ...], x_T)
    assert same_bits(one.trajectory[-1, ...], one.sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_window_one_in_half_precision(sampler: str, dtype: torch.dtype) -> None:
    rule, schedule = SAMPLERS[sampler]
    x_T = torch.asarray(normal((2, 6))).to(dtype)
    results = [
        solve(TanhNetwork(), x_T, schedule.timesteps(7), rule, **options).sample
        for options in ({"window": 1}, {"method": "sequential"})
    ]
    assert results[0].dtype == dtype
    assert torch.equal(*results)


# 2. Finite termination


@given(run=runs(dtypes=("float64",), steps=FEW), method=st.sampled_from(["secant", "identity"]))
def test_after_k_rounds_the_first_k_states_are_exact(xp: ModuleType, run: Run, method: str) -> None:
    x_T = run.start(xp)
    exact = solve_sequential(run.network, x_T, run.grid, run.rule, seed=run.seed, save="trajectory").trajectory
    solver = ParallelIntegralSolver(run.rule, run.window, tolerance=0, method=method)
    state = solver.init(run.network, x_T, run.grid, seed=run.seed, save="trajectory")
    assert state.steps == (0,) * run.batch
    for k in range(1, run.steps + 1):
        if solver.done(state):
            break
        solver.step(state)
        states = state.trajectory()
        for sample, final in enumerate(state.steps):
            assert final >= k
            done = (slice(0, final + 1), sample, ...)
            assert relative(states[done], exact[done]) < exactness("float64")
            assert np.all(np.isnan(to_numpy(states)[final + 1 :, sample]))
    assert solver.done(state)
    assert solver.result(state).success


@given(run=runs(), tolerance=tolerances, method=st.sampled_from(["secant", "identity"]))
def test_never_more_rounds_than_steps_and_counts_are_true(run: Run, tolerance: float, method: str) -> None:
    network = Counted(run.network)
    got = solve(
        network, normal((run.batch, 2, 3), None, run.dtype), run.grid, run.rule, run.window,
        tolerance=tolerance, method=method, seed=run.seed, check=False,
    )  # fmt: skip
    stats = got.stats
    assert got.success
    assert got.steps == (run.steps,) * run.batch
    assert stats.rounds <= run.steps
    assert stats.calls == len(network.rows) == stats.rounds == len(stats.history)
    assert stats.evaluations == sum(network.rows)
    assert [record.evaluations for record in stats.history] == network.rows
    assert sum(record.accepted for record in stats.history) == run.steps * run.batch
    assert all(record.window <= run.window for record in stats.history)
    assert all(one.accepted >= 1 for record in stats.history for one in record.samples)


@given(run=runs(dtypes=("float64",)), max_rows=st.integers(1, 30))
def test_max_rows_bounds_every_call_and_changes_nothing(run: Run, max_rows: int) -> None:
    network = Counted(Rational(time_scale=1e-3))
    arguments = (normal((run.batch, 4), seed=run.seed), run.grid, run.rule)
    options = {"window": run.window, "tolerance": 1e-3, "seed": run.seed}
    got = solve(network, *arguments, max_rows=max_rows, **options)
    assert max(network.rows) <= max_rows
    assert got.stats.calls == len(network.rows)
    assert got.stats.evaluations == sum(network.rows)
    whole = solve(Rational(time_scale=1e-3), *arguments, **options)
    assert same_bits(got.sample, whole.sample)
    assert (got.stats.rounds, got.stats.evaluations) == (whole.stats.rounds, whole.stats.evaluations)


@pytest.mark.parametrize("max_rows", [1, 3, 4])
def test_max_rows_of_the_sequential_sampler(max_rows: int) -> None:
    network = Counted(Rational())
    x_T = normal((5, 4))
    got = solve_sequential(network, x_T, TABLE.timesteps(6), DPMSolver(TABLE), max_rows=max_rows)
    assert max(network.rows) <= max_rows
    assert got.stats.calls == len(network.rows) == 6 * -(-5 // max_rows)
    assert got.stats.evaluations == sum(network.rows) == 30
    assert same_bits(got.sample, solve_sequential(Rational(), x_T, TABLE.timesteps(6), DPMSolver(TABLE)).sample)


# 3. What the solver should find quickly


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_denoiser_that_is_its_surrogate_is_found_at_once(sampler: str) -> None:
    """Gaussian data of the standard deviation that the schedule was told: the first slopes are exact."""
    rule, schedule = SAMPLERS[sampler]
    kind = rule.prediction_type or schedule.default_prediction_type
    denoiser = Gaussian(schedule, kind, mean=0.3, std=schedule.sigma_data)
    grid = schedule.timesteps(40)
    x_T = schedule.levels(grid)[1][0] * normal((1, 8))
    got = solve(denoiser, x_T, grid, rule, 40, tolerance=1e-8)
    assert got.stats.rounds <= 4  # first call, window opened, corrected exactly, confirmed
    assert relative(got.sample, solve_sequential(denoiser, x_T, grid, rule).sample) < 1e-8


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_secant_learns_a_scalar_slope(sampler: str) -> None:
    """The same with a standard deviation that the schedule was not told."""
    rule, schedule = SAMPLERS[sampler]
    kind = rule.prediction_type or schedule.default_prediction_type
    denoiser = Gaussian(schedule, kind, mean=0.3, std=2.5 * schedule.sigma_data)
    grid = schedule.timesteps(40)
    x_T = schedule.levels(grid)[1][0] * normal((1, 8))
    got = solve(denoiser, x_T, grid, rule, 40, tolerance=1e-6)
    assert got.stats.rounds <= 7
    assert relative(got.sample, solve_sequential(denoiser, x_T, grid, rule).sample) < 1e-6


def test_fewer_rounds_than_steps() -> None:
    """The point of it all, on a denoiser that is not linear."""
    x_T, grid = normal((4, 32)), TABLE.timesteps(50)
    got = solve(Mixture(TABLE, "epsilon"), x_T, grid, DDIM(TABLE), 50, tolerance=1e-2)
    assert got.stats.rounds <= 20


# 4. tolerance


@given(run=runs(steps=FEW))
def test_tolerance_zero_is_the_sequential_sample(xp: ModuleType, run: Run) -> None:
    x_T = run.start(xp)
    got = solve(run.network, x_T, run.grid, run.rule, run.window, tolerance=0, seed=run.seed)
    expected = solve_sequential(run.network, x_T, run.grid, run.rule, seed=run.seed)
    assert relative(got.sample, expected.sample) < exactness(run.dtype)


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_tolerance_holds_for_95_of_100_samples(sampler: str, tolerance: float) -> None:
    rule, schedule = SAMPLERS[sampler]
    kind = rule.prediction_type or schedule.default_prediction_type
    grid = schedule.timesteps(30)
    x_T = schedule.levels(grid)[1][0] * normal((40, 16), seed=4)
    for denoiser in (Mixture(schedule, kind), Gaussian(schedule, kind, 0.3, 0.2)):
        got = solve(denoiser, x_T, grid, rule, 12, tolerance=tolerance).sample
        expected = solve_sequential(denoiser, x_T, grid, rule).sample
        errors = [relative(a, b) for a, b in zip(got, expected, strict=True)]
        assert np.mean(np.array(errors) <= tolerance) >= 0.95, (type(denoiser).__name__, sorted(errors)[-4:])


def test_the_error_falls_with_the_tolerance() -> None:
    x_T, grid = normal((8, 32)), TABLE.timesteps(50)
    denoiser = Mixture(TABLE, "epsilon")
    expected = solve_sequential(denoiser, x_T, grid, DDIM(TABLE)).sample
    runs = [solve(denoiser, x_T, grid, DDIM(TABLE), 25, tolerance=10.0**-k) for k in range(1, 9, 2)]
    errors = [relative(run.sample, expected) for run in runs]
    assert all(after < before / 3 for before, after in itertools.pairwise(errors)), errors
    assert all(a.stats.rounds <= b.stats.rounds for a, b in itertools.pairwise(runs))


# 5. Noise and seeds


seeds = st.integers(0, 2**63 - 1)


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


# 6. Arguments and results


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_continuous_times_keep_at_least_float32(dtype: torch.dtype) -> None:
    """Of half precision in eight bits neighbouring times would be one."""
    seen, grid = [], FLOW.timesteps(600)[:5]

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(t)
        return x

    solve(network, torch.zeros(1, 3, dtype=dtype), grid, Euler(FLOW), 5, check=False)
    assert {t.dtype for t in seen} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert len(set(torch.cat(seen).tolist())) == 5


def test_processes_tell_tables_apart_by_what_is_held_alone() -> None:
    own = Euler(FLOW).recurrence(FLOW.timesteps(6))
    plans = []
    for held in (own.held, own.held * 2):

        class Other(StepRule):
            def recurrence(self, timesteps: np.ndarray) -> Recurrence:
                return replace(own, held=held)  # noqa: B023

        state = SequentialSolver(Other()).init(Rational(), normal((1, 3)), own.timesteps)
        plans.append(state.fingerprint()["timesteps and step rule"])
    assert plans[0] != plans[1]


@given(run=runs(), tolerance=tolerances)
def test_start_is_never_changed(run: Run, tolerance: float) -> None:
    x_T = normal((run.batch, 2, 3), None, run.dtype, run.seed)
    before = x_T.copy()
    x_T.flags.writeable = False

    def careless(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        out = run.network(x, t)
        if x.flags.writeable:  # a network may work in place on what it is given
            x[...] = np.nan
        t[...] = 0
        return out

    options = {"seed": run.seed, "save": "trajectory"}
    got = solve(careless, x_T, run.grid, run.rule, run.window, tolerance=tolerance, **options)
    assert same_bits(x_T, before)
    assert np.all(np.isfinite(got.trajectory))
    got.sample[...] = 0
    got.states[...] = 0
    got.trajectory[...] = 0
    assert same_bits(x_T, before)


def test_a_denoiser_may_work_in_place_sequentially() -> None:
    network = TanhNetwork()

    def in_place(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        x[...] = network(x, t)
        return x

    expected = solve_sequential(network, normal((2, 6)), TABLE.timesteps(8), DDIM(TABLE))
    got = solve_sequential(in_place, normal((2, 6)), TABLE.timesteps(8), DDIM(TABLE))
    assert same_bits(got.sample, expected.sample)


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 4}, {"window": 4, "max_rows": 3}])
def test_a_denoiser_may_work_in_place_in_parallel(options: dict[str, int]) -> None:
    network = Rational()

    def in_place(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        x[...] = network(x, t)
        return x

    for batch in (1, 2):
        expected = solve(network, normal((batch, 6)), TABLE.timesteps(8), DDIM(TABLE), **options)
        got = solve(in_place, normal((batch, 6)), TABLE.timesteps(8), DDIM(TABLE), **options)
        assert same_bits(got.sample, expected.sample)


class StaticOutput:
    """A network that writes its output into the same memory at every call, as captured graphs do."""

    def __init__(self, network: Any) -> None:
        self.network, self.output = network, np.empty((64, 6))

    def __call__(self, x: np.ndarray, t: np.ndarray) -> np.ndarray:
        self.output[: len(x)] = self.network(x, t)
        return self.output[: len(x)]


@pytest.mark.parametrize(
    "options", [{"method": "sequential"}, {"window": 4}, {"window": 4, "check": False, "max_rows": 3}]
)
def test_a_denoiser_may_reuse_its_output_memory(options: dict[str, Any]) -> None:
    arguments = (normal((2, 6)), TABLE.timesteps(8), DPMSolver(TABLE))
    expected = solve(Rational(), *arguments, **options)
    got = solve(StaticOutput(Rational()), *arguments, **options)
    assert same_bits(got.sample, expected.sample)


@given(run=runs(steps=FEW), tolerance=tolerances)
def test_results_are_like_the_start(xp: ModuleType, run: Run, tolerance: float) -> None:
    x_T = run.start(xp)
    before = to_numpy(x_T).copy()
    for options in ({"window": run.window, "tolerance": tolerance}, {"method": "sequential"}):
        got = solve(run.network, x_T, run.grid, run.rule, seed=run.seed, save="trajectory", **options)
        for array in (got.sample, got.states, got.trajectory):
            assert type(array) is type(x_T)
            assert array.dtype == x_T.dtype
            assert array_api_compat.device(array) == array_api_compat.device(x_T)
        assert got.sample.shape == got.states.shape == x_T.shape
        assert got.trajectory.shape == (run.steps + 1, *x_T.shape)
        assert got.error_estimate.shape == (run.batch,)
        assert np.all(np.isfinite(got.error_estimate))
        assert same_bits(x_T, before)
        assert got.statuses == (Status.CONVERGED,) * run.batch


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_half_precision_networks(sampler: str, dtype: torch.dtype) -> None:
    """States are kept in float32; the network sees its own dtype."""
    rule, schedule = SAMPLERS[sampler]
    grid = schedule.timesteps(12)
    seen = set()

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.add(x.dtype)
        return TanhNetwork()(x, t)

    x_T = torch.asarray(normal((2, 6))).to(dtype)
    got = solve(network, x_T, grid, rule, 6, tolerance=1e-2)
    assert got.success
    assert got.sample.dtype == dtype
    assert seen == {dtype}
    expected = solve_sequential(network, x_T, grid, rule).sample
    # rounding of every input and output of the network, amplified as in exactness()
    bound = 12 * 15 * float(torch.finfo(dtype).eps) / 2
    assert relative(got.sample.float(), expected.float()) < bound


@pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 2, 2, 2), (2, 1, 1, 1, 4)])
def test_events_of_any_shape(xp: ModuleType, shape: tuple[int, ...]) -> None:
    x_T = normal(shape, xp)
    rule = DPMSolver(TABLE, prediction_type="v_prediction", stochastic=True)
    got = solve(Rational(), x_T, TABLE.timesteps(10), rule, 4, tolerance=0, seed=3)
    expected = solve_sequential(Rational(), x_T, TABLE.timesteps(10), rule, seed=3)
    assert got.sample.shape == shape
    assert relative(got.sample, expected.sample) < exactness("float64")


@pytest.mark.parametrize("sampler", ["ddim, epsilon", "euler, flow", "euler, karras"])
def test_the_network_is_given_the_timesteps_as_they_are(xp: ModuleType, sampler: str) -> None:
    rule, schedule = SAMPLERS[sampler]
    grid = schedule.timesteps(9)
    seen: list[np.ndarray] = []

    def network(x: Any, t: Any) -> Any:
        assert t.shape == (x.shape[0],)
        seen.append(to_numpy(t))
        return Rational()(x, t)

    solve(network, normal((2, 3), xp), xp.asarray(grid), rule, 4)
    every = np.concatenate(seen)
    assert every.dtype == grid.dtype
    assert set(every.tolist()) == set(grid.tolist())


# 7. Samples and runs do not disturb one another


@pytest.mark.filterwarnings("ignore:x_T. has an RMS")  # the samples are of all sizes
@given(run=runs(dtypes=("float64",)), tolerance=tolerances)
def test_a_sample_does_not_depend_on_its_neighbours(run: Run, tolerance: float) -> None:
    """Bit for bit at tolerance 0, and in what it costs: an easy sample is not evaluated longer next to a hard one."""
    x_T = normal((3, 6), seed=run.seed) * np.array([[0.01], [1.0], [3.0]])
    seeds = [run.seed, run.seed + 1, run.seed + 2]
    network = Rational(gain=2.0)
    options = {"window": run.window, "tolerance": tolerance}
    together = solve(network, x_T, run.grid, run.rule, seed=seeds, **options)
    for sample in range(3):
        alone = solve(network, x_T[sample : sample + 1], run.grid, run.rule, seed=seeds[sample : sample + 1], **options)
        mine = together.sample[sample : sample + 1]
        assert same_bits(mine, alone.sample) if tolerance == 0 else relative(mine, alone.sample) < 1e-13
        own = [one for record in together.stats.history for one in record.samples if one.sample == sample]
        by_itself = [one for record in alone.stats.history for one in record.samples]
        assert [(one.first, one.window, one.accepted) for one in own] == [
            (one.first, one.window, one.accepted) for one in by_itself
        ]


def test_an_easy_sample_ends_before_a_hard_one() -> None:
    x_T = np.concatenate([np.full((1, 6), 1e-3), normal((1, 6))])
    network = lambda x, t: np.sin(3 * x)  # noqa: E731  # linear for the first
    got = solve(network, x_T, TABLE.timesteps(40), DDIM(TABLE, prediction_type="sample"), 20, tolerance=1e-6)
    taking_part = [{one.sample for one in record.samples} for record in got.stats.history]
    assert {0} not in taking_part
    assert {1} in taking_part


def test_a_solver_serves_many_runs() -> None:
    solver = ParallelIntegralSolver(DPMSolver(TABLE), 6, tolerance=1e-4)
    grids = [TABLE.timesteps(n) for n in (5, 12, 30)]
    first = [solver.solve(TanhNetwork(), normal((2, 6), seed=k), grid).sample for k, grid in enumerate(grids)]
    again = [solver.solve(TanhNetwork(), normal((2, 6), seed=k), grid).sample for k, grid in enumerate(grids)]
    assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))


def test_runs_stepped_in_turns_do_not_disturb_one_another() -> None:
    solver = ParallelIntegralSolver(DDPM(TABLE), 6, tolerance=1e-4)
    grid = TABLE.timesteps(15)
    expected = [solver.solve(Rational(), normal((2, 6), seed=k), grid, seed=k).sample for k in range(3)]
    states = [solver.init(Rational(), normal((2, 6), seed=k), grid, seed=k) for k in range(3)]
    while not all(solver.done(state) for state in states):
        for state in states:
            if not solver.done(state):
                solver.step(state)
    got = [solver.result(state).sample for state in states]
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    "solver", [ParallelIntegralSolver(DDPM(TABLE), 6, tolerance=1e-4), SequentialSolver(DDPM(TABLE))]
)
def test_threads_share_a_solver(solver: Any) -> None:
    grid = TABLE.timesteps(20)
    expected = [solver.solve(Rational(), normal((2, 6), seed=k), grid, seed=k).sample for k in range(2)]
    got: list[list[Any]] = [[], []]
    both = threading.Barrier(2, timeout=30)

    def work(k: int) -> None:
        both.wait()
        for _ in range(10):
            got[k].append(solver.solve(Rational(), normal((2, 6), seed=k), grid, seed=k).sample)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for k in range(2):
        assert len(got[k]) == 10
        assert all(same_bits(sample, expected[k]) for sample in got[k])


@given(run=runs(dtypes=("float64",)), warmup=st.integers(0, MAX_STEPS + 2))
def test_warmup_steps_are_sequential_calls_after_the_first(run: Run, warmup: int) -> None:
    x_T = normal((1, 2, 3), seed=run.seed)
    got = solve(run.network, x_T, run.grid, run.rule, run.window, tolerance=0, seed=run.seed, warmup_steps=warmup)
    widths = [record.window for record in got.stats.history]
    # without warm-up, nodes whose states hardly depend on the sample are evaluated in the first call
    opening = 1 if warmup else min(run.window, run.rule.recurrence(run.grid).blind)
    assert widths[: warmup + 1] == [opening] * min(warmup + 1, run.steps)
    final = sum(record.samples[0].accepted for record in got.stats.history[: warmup + 1])
    if run.window > 1 and run.steps > final + 1:
        assert widths[warmup + 1] == min(run.window, run.steps - final)
    expected = solve_sequential(run.network, x_T, run.grid, run.rule, seed=run.seed)
    assert relative(got.sample, expected.sample) < exactness("float64")


def test_callback_sees_every_round_and_a_preview() -> None:
    rounds, previews = [], []

    def callback(state: Any) -> None:
        rounds.append(state.stats.history[-1].round)
        preview = state.estimate()
        previews.append(preview.copy())
        preview[...] = np.nan  # what the caller does with it is nobody's business

    x_T, grid = normal((2, 6)), TABLE.timesteps(20)
    arguments = (Mixture(TABLE, "epsilon"), x_T, grid, DDIM(TABLE), 8)
    got = solve(*arguments, tolerance=1e-4, callback=callback)
    assert rounds == list(range(1, got.stats.rounds + 1))
    assert same_bits(previews[-1], got.sample)
    errors = [relative(preview, got.sample) for preview in previews]
    assert errors[-2] < errors[0] / 10  # previews close in on the sample
    assert same_bits(got.sample, solve(*arguments, tolerance=1e-4).sample)


def test_changing_a_preview_does_not_change_a_sequential_run() -> None:
    def callback(state: Any) -> None:
        state.estimate()[...] = 0

    arguments = (TanhNetwork(), normal((2, 6)), TABLE.timesteps(6), DDIM(TABLE))
    assert same_bits(solve_sequential(*arguments, callback=callback).sample, solve_sequential(*arguments).sample)


def test_the_state_by_hand_is_the_solution() -> None:
    solver = ParallelIntegralSolver(DDIM(TABLE), 5, tolerance=1e-3, check=False)
    arguments = (TanhNetwork(), normal((2, 6)), TABLE.timesteps(12))
    state = solver.init(*arguments)
    assert state.stats.calls == 0
    unfinished = solver.result(state)
    assert unfinished.status is Status.RUNNING
    assert same_bits(unfinished.sample, arguments[1])  # nothing is known yet
    while not solver.done(state):
        solver.step(state)
    got, whole = solver.result(state), solver.solve(*arguments)
    assert same_bits(got.sample, whole.sample)
    assert (got.status, got.message) == (whole.status, whole.message)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step(sampler: str) -> None:
    rule, schedule = SAMPLERS[sampler]
    got = solve(TanhNetwork(), normal((2, 6)), schedule.timesteps(1), rule, 8)
    assert same_bits(got.sample, solve_sequential(TanhNetwork(), normal((2, 6)), schedule.timesteps(1), rule).sample)
    assert (got.stats.rounds, got.stats.evaluations) == (1, 2)


@pytest.mark.parametrize("value", [0.0, 1e-200])
def test_states_without_size(value: float) -> None:
    """Nothing is divided by the size of a state that is 0, or whose square is."""
    x_T = np.full((2, 4), value)
    got = solve(lambda x, t: x * 0, x_T, TABLE.timesteps(10), DDIM(TABLE), 4, tolerance=1e-3, throw=False)
    assert got.success
    expected = solve_sequential(lambda x, t: x * 0, x_T, TABLE.timesteps(10), DDIM(TABLE))
    np.testing.assert_allclose(got.sample, expected.sample, rtol=1e-12)
    assert np.all(np.isfinite(got.error_estimate))
