"""Schedules against diffusers' tables and grids, against their formulas, and what they refuse."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from parasolver_core import DDIM, Euler, NoiseSchedule, solve, solve_sequential
from parasolver_core.samplers.schedules import DiscreteSchedule, FlowSchedule, KarrasSchedule

# diffusers computes betas and their product in float32: 1000 factors of relative error 6e-8 / sqrt(3) each, and the
# squared cosine's betas near 1 cancel in 1 - beta, which is why the error is taken relative to 1.
FLOAT32_TABLE = 1e-6

NUMBERS_OF_STEPS = [*range(1, 65), 99, 100, 250, 333, 499, 500, 501, 666, 750, 998, 999, 1000]

TABLES = {
    "linear": (NoiseSchedule.linear(), {"beta_schedule": "linear"}),
    "linear, other ends": (
        NoiseSchedule.linear(5e-4, 0.03),
        {"beta_schedule": "linear", "beta_start": 5e-4, "beta_end": 0.03},
    ),
    "scaled_linear": (
        NoiseSchedule.scaled_linear(),
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    "squared_cosine": (NoiseSchedule.squared_cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
    "100 steps": (NoiseSchedule.linear(train_steps=100), {"num_train_timesteps": 100}),
}


@pytest.mark.parametrize("name", TABLES)
def test_alphas_cumprod_is_that_of_diffusers(name: str) -> None:
    schedule, options = TABLES[name]
    theirs = DDIMScheduler(**options).alphas_cumprod.double().numpy()
    assert schedule.alphas_cumprod.dtype == np.float64
    assert schedule.alphas_cumprod.shape == theirs.shape
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs, rtol=0, atol=FLOAT32_TABLE)


def test_squared_cosine_caps_beta() -> None:
    bar = NoiseSchedule.squared_cosine().alphas_cumprod
    assert 1 - bar[-1] / bar[-2] == pytest.approx(0.999, rel=1e-9)
    squared = np.cos((np.array([0.0, 0.501]) + 0.008) / 1.008 * np.pi / 2) ** 2
    assert bar[500] == pytest.approx(squared[1] / squared[0], rel=1e-12)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("train_steps", [1000, 10])
def test_every_grid_is_that_of_diffusers_ddim(spacing: str, offset: int, train_steps: int) -> None:
    scheduler = DDIMScheduler(num_train_timesteps=train_steps, timestep_spacing=spacing, steps_offset=offset)
    schedule = NoiseSchedule.linear(train_steps=train_steps)
    for n in (n for n in NUMBERS_OF_STEPS if n <= train_steps):
        scheduler.set_timesteps(n)
        grid = schedule.timesteps(n, spacing=spacing, steps_offset=offset)
        # diffusers lets rounding add a step to the trailing grid of some n; ours has n steps, always
        np.testing.assert_array_equal(grid, scheduler.timesteps.numpy()[:n], err_msg=f"n={n}")
        assert grid.dtype == np.int64
        assert len(grid) == n


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_every_grid_can_be_sampled(spacing: str) -> None:
    schedule = NoiseSchedule.linear()
    for n in NUMBERS_OF_STEPS:
        assert len(DDIM(schedule).recurrence(schedule.timesteps(n, spacing=spacing))) == n


def test_levels_of_a_table() -> None:
    schedule = NoiseSchedule.from_alphas_cumprod([0.9, 0.5, 0.1])
    alpha, sigma = schedule.levels(np.array([2, 0]))
    np.testing.assert_allclose(alpha**2, [0.1, 0.9, 1.0], rtol=1e-15)
    np.testing.assert_allclose(sigma**2, [0.9, 0.1, 0.0], rtol=1e-15)
    alpha, _ = NoiseSchedule.from_alphas_cumprod([0.9, 0.5, 0.1], final_alpha_cumprod=0.95).levels(np.array([2, 0]))
    assert alpha[-1] ** 2 == pytest.approx(0.95, rel=1e-15)


def test_karras_grid_is_its_formula() -> None:
    n, low, high, rho = 18, 0.002, 80.0, 7.0
    grid = NoiseSchedule.karras().timesteps(n)
    by_hand = [(high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(n)]
    np.testing.assert_allclose(grid, by_hand, rtol=1e-13)
    # the power rho multiplies the rounding of the root: 7 ulp, and as many again from the root itself
    np.testing.assert_allclose(grid[[0, -1]], [high, low], rtol=16 * np.finfo(float).eps)
    assert np.all(np.diff(grid) < 0)


def test_karras_grid_is_that_of_diffusers() -> None:
    scheduler = EulerDiscreteScheduler(use_karras_sigmas=True, sigma_min=0.03, sigma_max=14.0)
    scheduler.set_timesteps(12)
    grid = NoiseSchedule.karras(0.03, 14.0).timesteps(12)
    np.testing.assert_allclose(grid, scheduler.sigmas[:-1].double().numpy(), rtol=1e-6)  # float32 in diffusers


def test_one_karras_step_starts_at_the_noisiest_level() -> None:
    np.testing.assert_allclose(NoiseSchedule.karras().timesteps(1), [80.0], rtol=1e-14)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_flow_grid_is_uniform_then_shifted(shift: float) -> None:
    grid = NoiseSchedule.flow_matching(shift).timesteps(4)
    by_hand = [shift * t / (1 + (shift - 1) * t) for t in (1.0, 0.75, 0.5, 0.25)]
    np.testing.assert_allclose(grid, by_hand, rtol=1e-15)
    assert grid[0] == 1.0


def test_flow_shift_is_that_of_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    theirs = scheduler.sigmas[:-1].double().numpy()
    np.testing.assert_allclose(NoiseSchedule.flow_matching(3.0).timesteps(4), theirs, rtol=1e-6)  # float32


def test_flow_and_karras_paths() -> None:
    alpha, sigma = NoiseSchedule.flow_matching().levels(np.array([1.0, 0.25]))
    np.testing.assert_array_equal(alpha, [0.0, 0.75, 1.0])
    np.testing.assert_array_equal(sigma, [1.0, 0.25, 0.0])
    alpha, sigma = NoiseSchedule.karras().levels(np.array([80.0, 2.0]))
    np.testing.assert_array_equal(alpha, [1.0, 1.0, 1.0])
    np.testing.assert_array_equal(sigma, [80.0, 2.0, 0.0])


REFUSED = {
    "table empty": ("alphas_cumprod", lambda: NoiseSchedule.from_alphas_cumprod([])),
    "table 2-D": ("alphas_cumprod", lambda: NoiseSchedule.from_alphas_cumprod([[0.9, 0.5]])),
    "table increasing": ("alphas_cumprod", lambda: NoiseSchedule.from_alphas_cumprod([0.1, 0.5, 0.9])),
    "table with a repeat": ("alphas_cumprod", lambda: NoiseSchedule.from_alphas_cumprod([0.9, 0.5, 0.5])),
    "table with NaN": ("alphas_cumprod", lambda: NoiseSchedule.from_alphas_cumprod([0.9, np.nan, 0.1])),
    "table with inf": ("alphas_cumprod", lambda: NoiseSchedule.from_alphas_cumprod([0.9, 0.5, -np.inf])),
    "table from 1": ("alphas_cumprod", lambda: NoiseSchedule.from_alphas_cumprod([1.0, 0.5])),
    "table above 1": ("alphas_cumprod", lambda: NoiseSchedule.from_alphas_cumprod([1.5, 0.5])),
    "table below 0": ("alphas_cumprod", lambda: NoiseSchedule.from_alphas_cumprod([0.5, -0.1])),
    "betas negative": ("beta_start", lambda: NoiseSchedule.linear(-1e-4, 0.02)),
    "betas above 1": ("beta_end", lambda: NoiseSchedule.linear(1e-4, 1.5)),
    "final below the table": (
        "final_alpha_cumprod",
        lambda: NoiseSchedule.from_alphas_cumprod([0.9, 0.5], final_alpha_cumprod=0.7),
    ),
    "final above 1": ("final_alpha_cumprod", lambda: NoiseSchedule.linear(final_alpha_cumprod=1.1)),
    "final NaN": ("final_alpha_cumprod", lambda: NoiseSchedule.linear(final_alpha_cumprod=float("nan"))),
    "sigma_data 0": ("sigma_data", lambda: NoiseSchedule.linear(sigma_data=0.0)),
    "sigma_data NaN": ("sigma_data", lambda: NoiseSchedule.flow_matching(sigma_data=float("nan"))),
    "sigma_min 0": ("sigma_min", lambda: NoiseSchedule.karras(sigma_min=0.0)),
    "sigma_min above sigma_max": ("sigma_min", lambda: NoiseSchedule.karras(sigma_min=3.0, sigma_max=2.0)),
    "sigma_min is sigma_max": ("sigma_min", lambda: NoiseSchedule.karras(sigma_min=2.0, sigma_max=2.0)),
    "sigma_max inf": ("sigma_max", lambda: NoiseSchedule.karras(sigma_max=float("inf"))),
    "rho negative": ("rho", lambda: NoiseSchedule.karras(rho=-7.0)),
    "shift 0": ("shift", lambda: NoiseSchedule.flow_matching(0.0)),
    "shift NaN": ("shift", lambda: NoiseSchedule.flow_matching(float("nan"))),
    "no steps": ("num_inference_steps", lambda: NoiseSchedule.linear().timesteps(0)),
    "negative steps": ("num_inference_steps", lambda: NoiseSchedule.karras().timesteps(-3)),
    "half a step": ("num_inference_steps", lambda: NoiseSchedule.flow_matching().timesteps(2.5)),
    "more steps than the table": ("num_inference_steps", lambda: NoiseSchedule.linear().timesteps(1001)),
    "spacing": ("spacing", lambda: NoiseSchedule.linear().timesteps(10, spacing="even")),
    "level of a half timestep": ("timesteps", lambda: NoiseSchedule.linear().levels(np.array([10.5, 3.0]))),
    "level beyond the table": ("timesteps", lambda: NoiseSchedule.linear().levels(np.array([1000, 3]))),
    "level below the table": ("timesteps", lambda: NoiseSchedule.linear().levels(np.array([3, -1]))),
    "level of noise 0": ("timesteps", lambda: NoiseSchedule.karras().levels(np.array([3.0, 0.0]))),
    "flow time 0": ("timesteps", lambda: NoiseSchedule.flow_matching().levels(np.array([0.5, 0.0]))),
    "final_sigma above sigma_min": ("final_sigma", lambda: NoiseSchedule.karras(0.1, final_sigma=0.2)),
    "final_sigma below 0": ("final_sigma", lambda: NoiseSchedule.karras(final_sigma=-0.1)),
    "final_sigma NaN": ("final_sigma", lambda: NoiseSchedule.flow_matching(final_sigma=float("nan"))),
    "final_sigma 1": ("final_sigma", lambda: NoiseSchedule.flow_matching(final_sigma=1.0)),
    "steps in the place of a beta": ("beta_start", lambda: NoiseSchedule.linear(1000)),
    "no schedule at all": ("NoiseSchedule", lambda: NoiseSchedule()),
    "half a training step": ("train_steps", lambda: NoiseSchedule.squared_cosine(10.5)),
    "prediction type of a schedule": ("prediction_type", lambda: NoiseSchedule.linear(prediction_type="epsilon")),
    "unknown default": ("default_prediction_type", lambda: NoiseSchedule.karras(default_prediction_type="x0")),
    "masked table": ("alphas_cumprod", lambda: NoiseSchedule.from_alphas_cumprod(np.ma.array([0.9, 0.5]))),
    "beta 0": ("beta_start", lambda: NoiseSchedule.linear(0.0)),
    "beta 1": ("beta_end", lambda: NoiseSchedule.linear(1e-4, 1.0)),
    "no beta": ("beta_end", lambda: NoiseSchedule.linear(1e-4, None)),
    "flow time 1.01": ("timesteps", lambda: NoiseSchedule.flow_matching().levels(np.array([1.01, 0.5]))),
    "flow time 999": ("timesteps", lambda: NoiseSchedule.flow_matching().levels(np.array([999.0, 500.0]))),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    argument, make = REFUSED[case]
    with pytest.raises((TypeError, ValueError), match=f"^{argument}: "):
        make()


@pytest.mark.parametrize("n", ["50", float("nan"), float("inf"), None, True])
def test_number_of_steps_that_is_no_number(n: object) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^num_inference_steps: "):
        NoiseSchedule.linear().timesteps(n)


def test_leading_offset_beyond_the_table_is_refused_when_used() -> None:
    schedule = NoiseSchedule.linear()
    grid = schedule.timesteps(1000, spacing="leading", steps_offset=1)
    with pytest.raises(ValueError, match=r"^timesteps: .*got 1000 at index 0"):
        schedule.levels(grid)


def test_a_schedule_and_what_holds_it_are_printed_in_a_line() -> None:
    schedule = NoiseSchedule.linear()
    assert repr(schedule).startswith("DiscreteSchedule(1000 alphas_cumprod from 0.9999 to 4.03583e-05, final 1")
    assert repr(schedule) in repr(DDIM(schedule))
    solution = solve(lambda x, t: 0.5 * x, np.ones((1, 3)), schedule.timesteps(20), DDIM(schedule), save="trajectory")
    assert len(repr(solution)) < 500


def test_a_schedule_keeps_its_own_table() -> None:
    table = np.array([0.9, 0.5, 0.1])
    schedules = [NoiseSchedule.from_alphas_cumprod(table), DiscreteSchedule(table)]
    table[:] = 0.2
    for schedule in schedules:
        np.testing.assert_array_equal(schedule.alphas_cumprod, [0.9, 0.5, 0.1])
        with pytest.raises(ValueError, match="read-only"):
            schedule.alphas_cumprod[0] = 0.3


def test_a_table_of_torch() -> None:
    schedule = NoiseSchedule.from_alphas_cumprod(torch.tensor([0.9, 0.5], dtype=torch.float64))
    np.testing.assert_array_equal(schedule.alphas_cumprod, [0.9, 0.5])


def test_what_just_passes() -> None:
    last = NoiseSchedule.from_alphas_cumprod([0.5, 0.0], final_alpha_cumprod=0.5)
    np.testing.assert_allclose(last.levels(np.array([1, 0]))[0], [0.0, 0.5**0.5, 0.5**0.5], rtol=1e-15)
    assert NoiseSchedule.flow_matching(final_sigma=0.0).levels(np.array([1.0]))[1].tolist() == [1.0, 0.0]
    assert NoiseSchedule.karras(0.1, 1.0, final_sigma=0.1).final_sigma == 0.1
    assert NoiseSchedule.linear(train_steps=1).timesteps(1).tolist() == [0]


def test_what_a_schedule_is_unless_told() -> None:
    karras, flow, table = KarrasSchedule(), FlowSchedule(), DiscreteSchedule(np.array([0.9, 0.5]))
    assert (karras.sigma_min, karras.sigma_max, karras.rho, karras.final_sigma) == (0.002, 80.0, 7.0, 0.0)
    assert NoiseSchedule.karras() == karras
    assert (flow.shift, flow.final_sigma) == (1.0, 0.0)
    assert NoiseSchedule.flow_matching() == flow
    assert (karras.sigma_data, flow.sigma_data, table.sigma_data, table.final_alpha_cumprod) == (0.5, 1.0, 0.5, 1.0)
    kinds = [one.default_prediction_type for one in (karras, flow, table)]
    assert kinds == ["sample", "flow", "epsilon"]


def test_a_wrong_time_is_named_by_its_place() -> None:
    table, flow = NoiseSchedule.linear(), NoiseSchedule.flow_matching()
    for schedule, times, said in (
        (table, [3.0, 10.5], "got 10.5 at index 1"),
        (table, [3, 1000, -1], "got 1000 at index 1"),
        (NoiseSchedule.karras(), [3.0, 1.0, -1.0], "got -1.0 at index 2"),
        (flow, [1.0, 0.5, 0.0], "got 0.0 at index 2"),
    ):
        with pytest.raises(ValueError, match=said):
            schedule.levels(np.array(times))


def test_a_beta_of_1_is_not_taken_for_a_count() -> None:
    for beta in (1, 0, 1.5):
        with pytest.raises(ValueError, match=r"beta_start: expected a number in \(0, 1\), got [\d.]+$"):
            NoiseSchedule.linear(beta)


def test_a_count_in_the_place_of_a_beta_is_understood() -> None:
    with pytest.raises(ValueError, match=r"did you mean train_steps=1000\?"):
        NoiseSchedule.linear(1000)


def test_what_noise_is_multiplied_with() -> None:
    assert NoiseSchedule.karras(0.03, 14.6).init_noise_sigma == 14.6
    assert NoiseSchedule.linear().init_noise_sigma == NoiseSchedule.flow_matching().init_noise_sigma == 1.0


def denoised(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    return np.tanh(x / (1 + t[:, None]))


@pytest.mark.parametrize("options", [{"method": "sequential"}, {"window": 6, "tolerance": 1e-9}], ids=str)
def test_noise_levels_that_end_above_0_are_those_of_the_plain_loop(options: dict[str, Any]) -> None:
    """Algorithm 1 of EDM without its second stage, over levels whose last one is not 0."""
    schedule = NoiseSchedule.karras(0.4, 10.0, final_sigma=0.3)
    x = x_T = 10.0 * np.random.default_rng(0).standard_normal((2, 5))
    grid = schedule.timesteps(12)
    for sigma, after in itertools.pairwise([*grid, 0.3]):
        x = x + (after - sigma) * (x - denoised(x, np.full(2, sigma))) / sigma
    got = solve(denoised, x_T, grid, Euler(schedule), **options)
    np.testing.assert_allclose(got.sample, x, rtol=1e-9)
    to_zero = solve(denoised, x_T, grid, Euler(NoiseSchedule.karras(0.4, 10.0)), **options)
    assert np.linalg.norm(to_zero.sample - x) > 1e-2 * np.linalg.norm(x)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_that_ends_above_0_is_that_of_the_plain_loop(shift: float) -> None:
    schedule = NoiseSchedule.flow_matching(shift, final_sigma=0.02)
    grid = schedule.timesteps(10)
    unshifted = np.append(grid, 0.02) / (shift - (shift - 1) * np.append(grid, 0.02))
    np.testing.assert_allclose(np.diff(unshifted), np.full(10, -(1 - unshifted[-1]) / 10), rtol=1e-12)
    x = x_T = np.random.default_rng(0).standard_normal((2, 5))
    for t, after in itertools.pairwise([*grid, 0.02]):
        x = x + (after - t) * denoised(x, np.full(2, t))
    got = solve(denoised, x_T, grid, Euler(schedule), 6, tolerance=1e-9)
    np.testing.assert_allclose(got.sample, x, rtol=1e-9)


def test_a_last_level_that_the_grid_has_reached_is_a_step_of_length_0() -> None:
    schedule = NoiseSchedule.karras(0.4, 10.0, final_sigma=0.4)
    x_T = 10.0 * np.random.default_rng(0).standard_normal((1, 5))
    got = solve_sequential(denoised, x_T, schedule.timesteps(12), Euler(schedule), save="trajectory")
    np.testing.assert_allclose(got.trajectory[-1], got.trajectory[-2], rtol=1e-15)


def test_a_final_level_above_the_last_timestep_is_refused() -> None:
    schedule = NoiseSchedule.flow_matching(final_sigma=0.3)
    with pytest.raises(ValueError, match=r"^timesteps: .*the noise level must fall"):
        solve(denoised, np.ones((1, 5)), [1.0, 0.5, 0.2], Euler(schedule))


@pytest.mark.parametrize("timesteps", [[0.0, 0.25, 0.5, 0.75], [0.25, 0.5, 0.75, 1.0]])
def test_flow_timesteps_of_the_other_convention_are_told_how_to_convert(timesteps: list[float]) -> None:
    with pytest.raises(ValueError, match=r"data is at t = 0 here.* take 1 - t for the timesteps and -v\(x, 1 - t\)"):
        solve(lambda x, t: x, np.ones((1, 2)), timesteps, Euler(NoiseSchedule.flow_matching()))
