"""Step rules against the step-by-step sampling of diffusers' own schedulers, in float64.

diffusers works in float32 in places: the table ``alphas_cumprod`` (replaced here by its float64 copy, for both sides),
the noise levels of ``set_timesteps`` (recomputed here), and casts written ``torch.float32`` inside ``step``, which the
fixture ``in_float64`` turns into ``torch.float64``. With these three, every comparison holds to ``TIGHT``; nothing else
of the schedulers is touched.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers import (
    scheduling_ddpm,
    scheduling_dpmsolver_multistep,
    scheduling_euler_discrete,
    scheduling_flow_match_euler_discrete,
)
from scipy.integrate import quad

from parasolver_core import DDIM, DDPM, DPMSolver, Euler, NoiseSchedule, StepRule, solve_sequential
from tests.core.problems import VP_PREDICTIONS, TanhNetwork, normal, relative

# 30 steps of a few operations each, amplified by at most 1 / alpha_T = 157: 30 * 10 * 157 * 1.1e-16 = 5e-12.
TIGHT = 1e-10

SHAPE = (3, 2, 3)
NETWORK = TanhNetwork(size=6, gain=1.5)
SPACINGS = ("leading", "trailing", "linspace")


class _Torch64:
    """The module torch, save that ``float32`` is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (
        scheduling_dpmsolver_multistep,
        scheduling_euler_discrete,
        scheduling_flow_match_euler_discrete,
    ):
        monkeypatch.setattr(module, "torch", _Torch64())


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def start(seed: int = 1) -> torch.Tensor:
    return torch.asarray(normal(SHAPE, seed=seed))


def noises(steps: int, seed: int = 2) -> torch.Tensor:
    return torch.asarray(normal((steps, *SHAPE), seed=seed))


def widen(scheduler: Any) -> NoiseSchedule:
    """The scheduler's table in float64, for itself and for us."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    final = 1.0
    if isinstance(scheduler, DDIMScheduler):
        if not scheduler.config.set_alpha_to_one:
            final = float(scheduler.alphas_cumprod[0])
        scheduler.final_alpha_cumprod = torch.tensor(final, dtype=torch.float64)
    if isinstance(scheduler, DDPMScheduler):
        scheduler.one = scheduler.one.double()
    return NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod.numpy(), final_alpha_cumprod=final)


def theirs(
    scheduler: Any, x: torch.Tensor, step_options: Callable[[int], dict[str, Any]] = lambda i: {}
) -> torch.Tensor:
    for i, t in enumerate(scheduler.timesteps):
        prediction = NETWORK(x, t.expand(x.shape[0]))
        x = scheduler.step(prediction, t, x, **step_options(i)).prev_sample
    assert x.dtype == torch.float64
    return x


def ours(rule: StepRule, timesteps: Any, noise: Any = None) -> torch.Tensor:
    return solve_sequential(NETWORK, start(), timesteps, rule, noise=noise).sample


# DDIM. Its steps go by 1000 // n whatever the spacing, so it follows its own schedule only where that is the spacing.

ON_SCHEDULE = [("leading", 10, 1), ("leading", 30, 1), ("leading", 30, 0), ("trailing", 10, 0), ("trailing", 25, 0)]


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("prediction_type", VP_PREDICTIONS)
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize(("spacing", "n", "offset"), ON_SCHEDULE)
def test_ddim(spacing: str, n: int, offset: int, to_one: bool, prediction_type: str, eta: float) -> None:
    scheduler = DDIMScheduler(
        timestep_spacing=spacing,
        steps_offset=offset,
        set_alpha_to_one=to_one,
        prediction_type=prediction_type,
        clip_sample=False,
    )
    schedule = widen(scheduler)
    scheduler.set_timesteps(n)
    z = noises(n)
    expected = theirs(scheduler, start(), lambda i: {"eta": eta, "variance_noise": z[i] if eta else None})
    grid = schedule.timesteps(n, spacing=spacing, steps_offset=offset)
    np.testing.assert_array_equal(grid, scheduler.timesteps.numpy())
    got = ours(DDIM(schedule, prediction_type=prediction_type, eta=eta), grid, z)
    assert relative(got, expected) < TIGHT


@pytest.mark.parametrize(("spacing", "n"), [("linspace", 10), ("trailing", 13), ("trailing", 30)])
def test_known_fault_ddim_leaves_its_own_schedule(spacing: str, n: int) -> None:
    """diffusers' DDIM takes the previous timestep as t - 1000 // n, which is not the next one of these grids."""
    scheduler = DDIMScheduler(timestep_spacing=spacing, prediction_type="v_prediction", clip_sample=False)
    schedule = widen(scheduler)
    scheduler.set_timesteps(n)
    grid = scheduler.timesteps.numpy()
    assert np.any(grid[:-1] - 1000 // n != grid[1:])
    rule = DDIM(schedule, prediction_type="v_prediction")
    assert relative(ours(rule, grid), theirs(scheduler, start())) > 1e-3

    x = start()  # the same steps, each to the timestep that follows on the grid, are ours
    bar = np.append(schedule.alphas_cumprod[grid], 1.0)
    for i, t in enumerate(grid):
        v = NETWORK(x, torch.full((SHAPE[0],), int(t)))
        x_0, eps = bar[i] ** 0.5 * x - (1 - bar[i]) ** 0.5 * v, bar[i] ** 0.5 * v + (1 - bar[i]) ** 0.5 * x
        x = bar[i + 1] ** 0.5 * x_0 + (1 - bar[i + 1]) ** 0.5 * eps
    assert relative(ours(rule, grid), x) < TIGHT


# DDPM


def ddpm(
    monkeypatch: pytest.MonkeyPatch, z: torch.Tensor, **options: Any
) -> tuple[NoiseSchedule, DDPMScheduler, torch.Tensor]:
    """diffusers' DDPM with the noise z; the schedule, the scheduler and its sample."""
    scheduler = DDPMScheduler(clip_sample=False, **options)
    schedule = widen(scheduler)
    scheduler.set_timesteps(len(z))
    draws = iter(z)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: next(draws))
    return schedule, scheduler, theirs(scheduler, start())


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction_type", VP_PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("n", [10, 30])
def test_ddpm(spacing: str, n: int, prediction_type: str, variance_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    z = noises(n)
    z[-1] = 0  # of the last step's noise, see the two known faults below
    options = {"timestep_spacing": spacing, "prediction_type": prediction_type, "variance_type": variance_type}
    schedule, scheduler, expected = ddpm(monkeypatch, z, **options)
    rule = DDPM(schedule, prediction_type=prediction_type, variance_type=variance_type)
    noise = lambda step, sample: z[step, sample].numpy()  # noqa: E731
    assert relative(ours(rule, scheduler.timesteps.numpy(), noise), expected) < TIGHT


def test_ddpm_at_every_training_step(monkeypatch: pytest.MonkeyPatch) -> None:
    z = noises(100)
    schedule, scheduler, expected = ddpm(monkeypatch, z, num_train_timesteps=100)
    assert int(scheduler.timesteps[-1]) == 0  # where diffusers too adds no noise
    assert relative(ours(DDPM(schedule), scheduler.timesteps.numpy(), z), expected) < TIGHT


def test_known_fault_ddpm_adds_noise_of_1e_10_to_the_clean_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variance of 0 is clamped to 1e-20 where the last timestep is not 0."""
    z = noises(10)
    schedule, scheduler, expected = ddpm(monkeypatch, z, timestep_spacing="trailing", prediction_type="sample")
    got = ours(DDPM(schedule, prediction_type="sample"), scheduler.timesteps.numpy(), z)
    # states of size 1 are rounded to 1e-16, which is 1e-6 of this noise; a few steps' worth of it
    np.testing.assert_allclose((expected - got) / z[-1], 1e-10, rtol=1e-3)


def test_known_fault_ddpm_fixed_large_adds_noise_to_the_clean_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fixed_large, diffusers' last sample is noisy where the last timestep is not 0; algorithm 2 has z = 0."""
    z = noises(10)
    options = {"timestep_spacing": "trailing", "variance_type": "fixed_large", "prediction_type": "sample"}
    schedule, scheduler, expected = ddpm(monkeypatch, z, **options)
    rule = DDPM(schedule, variance_type="fixed_large", prediction_type="sample")
    got = ours(rule, scheduler.timesteps.numpy(), z)
    std = (1 - schedule.alphas_cumprod[scheduler.timesteps[-1]]) ** 0.5
    assert std > 0.1
    np.testing.assert_allclose(expected - got, std * z[-1], rtol=0, atol=1e-12)


# DPM-Solver++


def dpm_solver(n: int, **options: Any) -> tuple[NoiseSchedule, DPMSolverMultistepScheduler]:
    scheduler = DPMSolverMultistepScheduler(**options)
    schedule = widen(scheduler)
    scheduler.set_timesteps(n)
    bar = np.append(schedule.alphas_cumprod[scheduler.timesteps], 1.0)
    if options.get("final_sigmas_type") == "sigma_min":
        bar[-1] = schedule.alphas_cumprod[0]
        schedule = NoiseSchedule.from_alphas_cumprod(schedule.alphas_cumprod, final_alpha_cumprod=bar[-1])
    scheduler.sigmas = torch.from_numpy(((1 - bar) / bar) ** 0.5)
    return schedule, scheduler


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("n", [8, 20])  # below and above the 15 steps from which the last steps keep their order
@pytest.mark.parametrize("prediction_type", VP_PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("order", "solver_type", "stochastic"),
    [
        (1, "midpoint", False),
        (2, "midpoint", False),
        (2, "heun", False),
        (3, "midpoint", False),
        (3, "heun", False),
        (1, "midpoint", True),
        (2, "midpoint", True),
        (2, "heun", True),  # order 3 of the SDE solver: see the known fault below
    ],
)
def test_dpm_solver(order: int, solver_type: str, spacing: str, prediction_type: str, n: int, stochastic: bool) -> None:
    schedule, scheduler = dpm_solver(
        n,
        solver_order=order,
        solver_type=solver_type,
        timestep_spacing=spacing,
        prediction_type=prediction_type,
        algorithm_type="sde-dpmsolver++" if stochastic else "dpmsolver++",
    )
    z = noises(n)
    expected = theirs(scheduler, start(), lambda i: {"variance_noise": z[i]} if stochastic else {})
    rule = DPMSolver(
        schedule, prediction_type=prediction_type, order=order, solver_type=solver_type, stochastic=stochastic
    )
    assert relative(ours(rule, scheduler.timesteps.numpy(), z), expected) < TIGHT


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("n", [6, 16])
@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("order", [2, 3])
def test_dpm_solver_at_its_last_steps(order: int, lower_order_final: bool, n: int, final: str) -> None:
    schedule, scheduler = dpm_solver(
        n, solver_order=order, lower_order_final=lower_order_final, final_sigmas_type=final
    )
    rule = DPMSolver(schedule, order=order, lower_order_final=lower_order_final)
    assert relative(ours(rule, scheduler.timesteps.numpy()), theirs(scheduler, start())) < TIGHT


@pytest.mark.usefixtures("in_float64")
def test_known_fault_sde_dpm_solver_of_order_three_has_a_wrong_sign() -> None:
    r"""Its weight of D2 is ``(1 - e^{-2h} - 2h) / (2h)^2 - 1/2``, where the expansion gives ``+ 1/2``.

    The weight has to vanish with h: data constant but for a second difference must hardly move a small step.
    """
    schedule, scheduler = dpm_solver(200, solver_order=3, algorithm_type="sde-dpmsolver++", prediction_type="sample")
    grid = scheduler.timesteps.numpy()
    at = 100
    scheduler._step_index = at
    outputs = [torch.asarray([value], dtype=torch.float64) for value in (2.0, 1.0, 1.0)]  # m_{i-2}, m_{i-1}, m_i
    zero = torch.zeros(1, dtype=torch.float64)
    wrong = scheduler.multistep_dpm_solver_third_order_update(outputs, sample=zero, noise=zero)
    table = DPMSolver(schedule, order=3, stochastic=True, prediction_type="sample").recurrence(grid)
    right = float(np.dot(table.b[at], [1.0, 1.0, 2.0]))

    alpha, sigma = schedule.levels(grid)
    lam = np.log(alpha[at - 2 : at + 2] / sigma[at - 2 : at + 2])
    h = lam[3] - lam[2]
    r0, r1 = (lam[2] - lam[1]) / h, (lam[1] - lam[0]) / h
    second_difference = (0 - (1 - 2) / r1) / (r0 + r1)  # D1 is 0 between m_i and m_{i-1}
    # they differ by the 1/2 + 1/2 of the wrong sign, and by nothing else
    assert float(wrong) - right == pytest.approx(-alpha[at + 1] * second_difference, rel=1e-9)
    # the exact step for data that is 1 throughout has the weight 1 - e^{-2h}; a change of O(1) in m_{i-2} changes a
    # step of size h by O(h), not by O(1)
    constant = alpha[at + 1] * -np.expm1(-2 * h)
    assert abs(right - constant) < h * alpha[at + 1] < 0.05 * alpha[at + 1]
    assert abs(float(wrong) - constant) > 0.4 * alpha[at + 1]


# Euler


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("prediction_type", VP_PREDICTIONS)
@pytest.mark.parametrize(("spacing", "n"), [("leading", 12), ("trailing", 12), ("linspace", 10)])
def test_euler_discrete(spacing: str, n: int, prediction_type: str) -> None:
    """In diffusers the state is ``x / alpha`` and the network is given ``x``: the same sampler in other coordinates."""
    scheduler = EulerDiscreteScheduler(timestep_spacing=spacing, prediction_type=prediction_type)
    schedule = widen(scheduler)
    scheduler.set_timesteps(n)
    grid = scheduler.timesteps.numpy().astype(np.int64)
    np.testing.assert_array_equal(grid, scheduler.timesteps.numpy())  # other n have timesteps between the integers
    bar = np.append(schedule.alphas_cumprod[grid], 1.0)
    scheduler.sigmas = torch.from_numpy(((1 - bar) / bar) ** 0.5)
    x = start() / bar[0] ** 0.5
    for t in scheduler.timesteps:
        v = NETWORK(scheduler.scale_model_input(x, t), t.expand(SHAPE[0]))
        x = scheduler.step(v, t, x).prev_sample
    assert relative(ours(Euler(schedule, prediction_type=prediction_type), grid), x) < TIGHT


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_euler_over_karras_noise_levels(prediction_type: str) -> None:
    """A variance exploding path has no scaling of the network's input: epsilon and sample mean the same there."""
    scheduler = EulerDiscreteScheduler(
        use_karras_sigmas=True, sigma_min=0.03, sigma_max=14.0, prediction_type=prediction_type
    )
    scheduler.set_timesteps(15)
    schedule = NoiseSchedule.karras(0.03, 14.0)
    grid = schedule.timesteps(15)
    scheduler.sigmas = torch.from_numpy(np.append(grid, 0.0))
    scheduler.is_scale_input_called = True  # silences the advice to scale the input
    network = TanhNetwork(size=6, gain=1.5, time_scale=0.1)
    x = 14 * start()
    expected = x
    for sigma, t in zip(grid, scheduler.timesteps, strict=True):
        prediction = network(expected, torch.full((SHAPE[0],), sigma, dtype=torch.float64))
        expected = scheduler.step(prediction, t, expected).prev_sample
    got = solve_sequential(network, x, grid, Euler(schedule, prediction_type=prediction_type)).sample
    assert relative(got, expected) < TIGHT


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_match_euler(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(12)
    schedule = NoiseSchedule.flow_matching(shift)
    grid = scheduler.sigmas[:-1]  # their grid ends at 1 / 1000, ours (schedule.timesteps) at 1 / n
    x = expected = start()
    for t, time in zip(grid, scheduler.timesteps, strict=True):
        expected = scheduler.step(NETWORK(expected, 1000 * t.expand(SHAPE[0])), time, expected).prev_sample
    got = solve_sequential(lambda x, t: NETWORK(x, 1000 * t), x, grid, Euler(schedule)).sample
    assert relative(got, expected) < TIGHT


@pytest.mark.parametrize("n", [8, 20])
def test_float32_as_diffusers_runs_it(n: int) -> None:
    """Nothing patched: what a user of float32 sees."""
    scheduler = DPMSolverMultistepScheduler(prediction_type="v_prediction")
    schedule = NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod.double().numpy())
    scheduler.set_timesteps(n)
    x = expected = start().float()
    for t in scheduler.timesteps:
        expected = scheduler.step(NETWORK(expected, t.expand(SHAPE[0])), t, expected).prev_sample
    got = solve_sequential(NETWORK, x, scheduler.timesteps, DPMSolver(schedule, prediction_type="v_prediction")).sample
    assert got.dtype == torch.float32
    # their coefficients are float32: 1 - exp(-h) loses 1 / h of 6e-8, in each of n steps
    assert relative(got, expected) < 1e-5


def test_weights_of_the_second_order_step_are_exact_integrals() -> None:
    """The heun weights integrate data linear in lambda exactly; a check that needs no scheduler."""
    schedule = NoiseSchedule.karras()
    grid = np.array([3.0, 2.0, 1.1, 0.5])
    for stochastic in (False, True):
        rule = DPMSolver(schedule, order=2, solver_type="heun", stochastic=stochastic, lower_order_final=False)
        table = rule.recurrence(grid)
        lam, twice = -np.log(grid), 2 if stochastic else 1
        for i in (1, 2):
            for power in (0, 1):
                exact, _ = quad(_decaying_power, lam[i], lam[i + 1], args=(twice, lam[i + 1], power))
                assert table.b[i] @ lam[[i, i - 1]] ** power == pytest.approx(exact, rel=1e-12)


def _decaying_power(s: float, rate: float, end: float, power: int) -> float:
    return rate * np.exp(-rate * (end - s)) * s**power
