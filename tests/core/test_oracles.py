"""Samplers on Gaussian data, where the denoiser, the ODE's solution and every step are known in closed form."""

from typing import Any

import numpy as np
import pytest

from parasolver_core import (
    DDIM,
    DDPM,
    DPMSolver,
    Euler,
    NoiseSchedule,
    Recurrence,
    StepRule,
    solve,
    solve_sequential,
)
from tests.core.problems import EPS, VP_PREDICTIONS, Gaussian, normal, relative

TABLE = NoiseSchedule.scaled_linear()
KARRAS = NoiseSchedule.karras()
FLOW = NoiseSchedule.flow_matching(3.0)

PATHS = {
    **{f"table, {kind}": (TABLE, TABLE.timesteps(20), kind) for kind in VP_PREDICTIONS},
    **{f"karras, {kind}": (KARRAS, KARRAS.timesteps(20), kind) for kind in (*VP_PREDICTIONS, "flow")},
    "flow, flow": (FLOW, FLOW.timesteps(20), "flow"),
    "flow, sample": (FLOW, FLOW.timesteps(20), "sample"),
    "flow, v_prediction": (FLOW, FLOW.timesteps(20), "v_prediction"),
}


@pytest.mark.parametrize("name", PATHS)
def test_each_ddim_step_on_gaussian_data(name: str) -> None:
    """``x' = alpha' x_0 + sigma' eps`` with ``x_0 = E[x_0 | x]`` of Gaussian data, at every step of the trajectory."""
    schedule, grid, kind = PATHS[name]
    denoiser = Gaussian(schedule, kind)
    alpha, sigma = schedule.levels(grid)
    x = sigma[0] * normal((3, 4))
    run = solve_sequential(denoiser, x, grid, DDIM(schedule, prediction_type=kind), save="trajectory")
    for i in range(len(grid)):
        x_0 = denoiser.clean(x, alpha[i], sigma[i])
        x = alpha[i + 1] * x_0 + sigma[i + 1] * (x - alpha[i] * x_0) / sigma[i]
        # a few operations a step; predicting eps or v loses 1 / alpha (at most 15 here) of the digits
        np.testing.assert_allclose(run.trajectory[i + 1], x, rtol=0, atol=400 * EPS * (i + 1) * np.abs(x).max())
    np.testing.assert_array_equal(run.sample, run.trajectory[-1])


@pytest.mark.parametrize("name", PATHS)
def test_the_first_guess_of_the_slope_is_that_of_gaussian_data(name: str) -> None:
    schedule, grid, kind = PATHS[name]
    denoiser = Gaussian(schedule, kind, std=schedule.sigma_data)
    ends = [denoiser(np.full((len(grid), 1), x), grid)[:, 0] for x in (0.0, 1.0)]
    table = DDIM(schedule, prediction_type=kind).recurrence(grid)
    np.testing.assert_allclose(table.slope, ends[1] - ends[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PATHS)
def test_picard_slopes_make_every_step_the_identity(name: str) -> None:
    """``dx' / dx = a + b g = 1`` of steps that read one output."""
    schedule, grid, kind = PATHS[name]
    table = DDIM(schedule, prediction_type=kind).recurrence(grid)
    np.testing.assert_allclose(table.a[:, 0] + table.b[:, 0] * table.identity_slope, 1.0, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", PATHS)
def test_euler_is_ddim(name: str) -> None:
    schedule, grid, kind = PATHS[name]
    ddim, euler = (rule(schedule, prediction_type=kind).recurrence(grid) for rule in (DDIM, Euler))
    for part in ("a", "b", "c"):
        np.testing.assert_array_equal(getattr(ddim, part), getattr(euler, part))


def test_euler_on_the_linear_path_is_euler() -> None:
    """``x + (t' - t) v``: the textbook method, from the coefficients."""
    grid = FLOW.timesteps(7)
    table = Euler(FLOW).recurrence(grid)
    np.testing.assert_allclose(table.a[:, 0], 1.0, rtol=4 * EPS)
    np.testing.assert_allclose(table.b[:, 0], np.diff(np.append(grid, 0.0)), rtol=8 * EPS)


def test_euler_over_noise_levels_is_algorithm_one_of_edm() -> None:
    """``x + (sigma' - sigma) (x - x_0) / sigma``."""
    grid = KARRAS.timesteps(7)
    table = Euler(KARRAS).recurrence(grid)
    ratio = np.append(grid[1:], 0.0) / grid
    np.testing.assert_allclose(table.a[:, 0], ratio, rtol=4 * EPS)
    np.testing.assert_allclose(table.b[:, 0], 1 - ratio, rtol=8 * EPS)


@pytest.mark.parametrize("kind", VP_PREDICTIONS)
def test_ddim_with_eta_one_is_ddpm(kind: str) -> None:
    grid = TABLE.timesteps(20)
    ddim = DDIM(TABLE, prediction_type=kind, eta=1.0).recurrence(grid)
    ddpm = DDPM(TABLE, prediction_type=kind).recurrence(grid)
    for part in ("a", "b", "c"):
        np.testing.assert_allclose(getattr(ddim, part), getattr(ddpm, part), rtol=1e-13)


def test_ddpm_is_equation_seven() -> None:
    grid = TABLE.timesteps(20)
    bar, after = (TABLE.alphas_cumprod[grid], np.append(TABLE.alphas_cumprod[grid[1:]], 1.0))
    beta = 1 - bar / after
    table = DDPM(TABLE, prediction_type="sample").recurrence(grid)
    np.testing.assert_allclose(table.a[:, 0], np.sqrt(1 - beta) * (1 - after) / (1 - bar), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(table.b[:, 0], np.sqrt(after) * beta / (1 - bar), rtol=1e-12)
    np.testing.assert_allclose(table.c**2, (1 - after) / (1 - bar) * beta, rtol=1e-12)
    large = DDPM(TABLE, prediction_type="sample", variance_type="fixed_large").recurrence(grid)
    np.testing.assert_allclose(large.c[:-1] ** 2, beta[:-1], rtol=1e-12)
    assert large.c[-1] == 0


@pytest.mark.parametrize("window", [1, 7])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_ddpm_mean_and_variance(variance_type: str, window: int) -> None:
    """The sample is affine in x_T and the noises: its mean and variance are read off unit inputs, without statistics.

    Row 0 has no noise at all, row 1 a unit x_T, and row 2 + i a unit noise in step i.
    """
    n, (mean, std) = 25, (0.3, 0.5)
    grid = TABLE.timesteps(n)
    rule = DDPM(TABLE, variance_type=variance_type)
    x_T, noise = np.zeros((n + 2, 1)), np.zeros((n, n + 2, 1))
    x_T[1] = 1.0
    noise[np.arange(n), np.arange(n) + 2] = 1.0
    run = solve(Gaussian(TABLE, "epsilon", mean, std), x_T, grid, rule, window, tolerance=0, noise=noise)
    base = run.sample[0, 0]
    got_mean, got_variance = base, np.sum((run.sample[1:, 0] - base) ** 2)

    m, v = 0.0, 1.0  # of x_T
    bar, after = (TABLE.alphas_cumprod[grid], np.append(TABLE.alphas_cumprod[grid[1:]], 1.0))
    for i in range(n):
        beta = 1 - bar[i] / after[i]
        slope = np.sqrt(bar[i]) * std**2 / (bar[i] * std**2 + 1 - bar[i])  # of E[x_0 | x]
        weight = np.sqrt(after[i]) * beta / (1 - bar[i])
        growth = np.sqrt(1 - beta) * (1 - after[i]) / (1 - bar[i]) + weight * slope
        added = beta if variance_type == "fixed_large" and i < n - 1 else (1 - after[i]) / (1 - bar[i]) * beta
        m = growth * m + weight * mean * (1 - slope * np.sqrt(bar[i]))
        v = growth**2 * v + added
    assert got_mean == pytest.approx(m, rel=1e-10)
    assert got_variance == pytest.approx(v, rel=1e-10)


def test_ddpm_statistics_with_seeded_noise() -> None:
    """4096 scalar samples: the seeded noise gives the data's mean and variance, to 5 standard errors."""
    x_T = normal((1, 4096), seed=5)
    run = solve_sequential(Gaussian(TABLE, "epsilon"), x_T, TABLE.timesteps(100), DDPM(TABLE), seed=7)
    assert np.mean(run.sample) == pytest.approx(0.3, abs=5 * 0.5 / 64)
    assert np.var(run.sample) == pytest.approx(0.25, rel=0.04 + 5 * np.sqrt(2 / 4096))  # 0.04: of 100 steps


@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("n", [6, 14, 15, 20])
@pytest.mark.parametrize("order", [2, 3])
def test_a_last_step_of_length_zero(order: int, n: int, lower_order_final: bool) -> None:
    """Where the clean end is a node itself, as with diffusers' ``set_alpha_to_one=False``: the state stays."""
    schedule = NoiseSchedule.linear(final_alpha_cumprod=float(NoiseSchedule.linear().alphas_cumprod[0]))
    grid = schedule.timesteps(n, "leading")
    assert grid[-1] == 0
    rule = DPMSolver(schedule, order=order, lower_order_final=lower_order_final)
    table = rule.recurrence(grid)
    assert table.a[-1, 0] == pytest.approx(1, abs=8 * EPS)
    assert np.abs(np.append(table.a[-1, 1:], table.b[-1])).max() <= 8 * EPS
    run = solve_sequential(Gaussian(schedule, "epsilon"), normal((1, 4)), grid, rule, save="trajectory")
    np.testing.assert_allclose(run.trajectory[-1], run.trajectory[-2], rtol=1e-12)


@pytest.mark.parametrize(("n", "lowered"), [(13, True), (14, True), (15, False)])
@pytest.mark.parametrize("order", [2, 3])
def test_few_steps_end_in_lower_order(order: int, n: int, lowered: bool) -> None:
    """Fewer than 15: the last step but one reads two predictions at most, and the last one."""
    schedule = NoiseSchedule.linear(final_alpha_cumprod=0.99995)  # of a noiseless end the last is of order 1
    table = DPMSolver(schedule, order=order).recurrence(schedule.timesteps(n))
    read = [int(np.count_nonzero(row)) for row in table.b]
    assert read[-2:] == ([min(order, 2), 1] if lowered else [order, order])
    assert read[:3] == [1, 2, order]


# Orders. The last step goes to zero noise and is of first order by design, so the error is taken one state before it.


def error_before_the_last_step(rule: StepRule, schedule: NoiseSchedule, grid: np.ndarray, kind: str) -> float:
    denoiser = Gaussian(schedule, kind)
    alpha, sigma = schedule.levels(grid)
    x = sigma[0] * normal((1, 5), seed=3)
    run = solve_sequential(denoiser, x, grid, rule, save="trajectory")
    exact = denoiser.flow(x, (alpha[0], sigma[0]), (alpha[-2], sigma[-2]))
    return relative(run.trajectory[-2], exact)


def karras_grid(n: int) -> np.ndarray:
    """Even in lambda from so much noise that the data hardly show: the lower order of the first steps costs nothing."""
    return np.geomspace(80.0, 0.1, n + 1)


def flow_grid(n: int) -> np.ndarray:
    """Even in lambda = log((1 - t) / t)."""
    lam = np.linspace(-5.0, 2.5, n + 1)
    return 1 / (1 + np.exp(lam))


def slope(rule: StepRule, schedule: NoiseSchedule, grid: Any, kind: str) -> float:
    errors = [error_before_the_last_step(rule, schedule, grid(n), kind) for n in (200, 400)]
    assert errors[1] > 1e3 * EPS  # rounding does not show
    return float(np.log2(errors[0] / errors[1]))


ORDER_PATHS = {
    "karras, sample": (KARRAS, karras_grid, "sample"),
    "karras, epsilon": (KARRAS, karras_grid, "epsilon"),
    "flow, flow": (NoiseSchedule.flow_matching(), flow_grid, "flow"),
}


@pytest.mark.parametrize("path", ORDER_PATHS)
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2])
def test_order_of_dpm_solver(order: int, solver_type: str, path: str) -> None:
    schedule, grid, kind = ORDER_PATHS[path]
    rule = DPMSolver(schedule, prediction_type=kind, order=order, solver_type=solver_type, lower_order_final=False)
    assert slope(rule, schedule, grid, kind) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("path", ORDER_PATHS)
def test_order_of_ddim(path: str) -> None:
    schedule, grid, kind = ORDER_PATHS[path]
    assert slope(DDIM(schedule, prediction_type=kind), schedule, grid, kind) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("path", ORDER_PATHS)
def test_dpm_solver_3m_as_published_is_of_second_order(path: str) -> None:
    """The published 3M formula weighs ``D2``, half a second derivative, as if it were a whole one.

    So the order is 2, in every implementation that follows it; with the weight doubled it is 3, see below. Our rule
    follows the published formula, as diffusers does.
    """
    schedule, grid, kind = ORDER_PATHS[path]
    rule = DPMSolver(schedule, prediction_type=kind, order=3, lower_order_final=False)
    assert slope(rule, schedule, grid, kind) == pytest.approx(2, abs=0.15)


class QuadraticMultistep(StepRule):
    """Exact integration of the parabola through the last three predicted samples, over noise levels (``alpha = 1``)."""

    def recurrence(self, timesteps: np.ndarray) -> Recurrence:
        n, lam = len(timesteps), -np.log(timesteps)
        table = DPMSolver(KARRAS, order=2, solver_type="heun", lower_order_final=False).recurrence(timesteps)
        b = np.hstack([table.b, np.zeros((n, 1))])
        for i in range(2, n - 1):
            h = lam[i + 1] - lam[i]
            s = (lam[[i, i - 1, i - 2]] - lam[i]) / h
            moments = [-np.expm1(-h)]  # h int_0^1 e^{-h (1 - s)} s^k ds, by parts
            moments += [1 - moments[0] / h]
            moments += [1 - 2 * moments[1] / h]
            b[i] = np.linalg.solve(np.vander(s, 3, increasing=True).T, moments)
        return Recurrence(
            timesteps=timesteps,
            a=table.a,
            b=b,
            c=table.c,
            held=table.held,
            slope=table.slope,
            identity_slope=table.identity_slope,
        )


def test_a_third_order_rule_measures_as_third_order() -> None:
    """So the measurement above can tell 2 from 3, and it is the formula, not the start, that is of second order."""
    assert slope(QuadraticMultistep(), KARRAS, karras_grid, "sample") == pytest.approx(3, abs=0.15)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("path", PATHS)
def test_dpm_solver_converges_to_the_flow(path: str, order: int) -> None:
    """On every path the sampler with many steps has the distribution's own map, up to the step to zero noise."""
    schedule, _, kind = PATHS[path]
    grid = schedule.timesteps(400)
    rule = DPMSolver(schedule, prediction_type=kind, order=order)
    if schedule is FLOW:
        grid = grid[1:]  # at t = 1 nothing is left of the data
    # 400 steps of h = 0.03 on average, of h = 0.1 near the clean end: about h / 2 and h^2 / 6
    assert error_before_the_last_step(rule, schedule, grid, kind) < (2e-2 if order == 1 else 2e-3)
