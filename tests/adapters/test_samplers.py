"""Samplers that are functions: read as step rules, and run in parallel with their own signature."""

import inspect
import itertools
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from torch import Tensor

from benchmarks.published import edm_sampler
from parasolver_adapters.samplers import UnsupportedSamplerError, parallel, step_rule_from_sampler
from parasolver_core import DDIM, DPMSolver, Euler, NoiseSchedule, NonFiniteError, solve, solve_sequential
from tests.adapters.sampled_networks import CALL, TWO_CALLS, Network, k_diffusion, levels, model, normal
from tests.adapters.weights import relative

FIXED = [
    ("euler", {}),
    ("euler", {"s_churn": 20.0}),
    ("euler_ancestral", {}),
    ("euler_ancestral", {"eta": 0.5, "s_noise": 1.003}),
    ("heun", {}),
    ("heun", {"s_churn": 20.0, "s_tmin": 0.1, "s_tmax": 5.0, "s_noise": 1.003}),
    ("dpm_2", {}),
    ("dpm_2_ancestral", {}),
    ("lms", {}),
    ("lms", {"order": 2}),
    ("dpmpp_2s_ancestral", {}),
    ("dpmpp_sde", {}),
    ("dpmpp_2m", {}),
    ("dpmpp_2m_sde", {"solver_type": "heun"}),
    ("dpmpp_3m_sde", {}),
]


@pytest.mark.filterwarnings("ignore:Should have t")  # torchsde's, of rounding in k-diffusion's own levels
@pytest.mark.parametrize("end", [True, False], ids=["to zero", "partial"])
@pytest.mark.parametrize(("name", "options"), FIXED)
def test_every_fixed_step_sampler_of_k_diffusion(name: str, options: dict[str, Any], end: bool) -> None:
    fn, sigmas = getattr(k_diffusion(), f"sample_{name}"), levels(16, end)
    x = normal(2, 3, 2, 2) * sigmas[0]
    steps: list[list[dict[str, Any]]] = [[], []]
    torch.manual_seed(5)
    want = fn(model, x, sigmas, callback=steps[0].append, **CALL, **options)
    follows = torch.rand(1)
    torch.manual_seed(5)
    sampler = parallel(fn, 8, tolerance=0)
    got = sampler(model, x, sigmas, callback=steps[1].append, **CALL, **options)
    assert torch.equal(torch.rand(1), follows), "the global stream is where the sampler would have left it"
    assert relative(got, want) < 3e-6
    assert sampler.solution is not None
    calls = (len(sigmas) - 1) * (2 if name in TWO_CALLS else 1)
    assert sampler.solution.stats.rounds <= calls
    assert [one["i"] for one in steps[1]] == list(range(len(sigmas) - 1))
    for own, other in zip(steps[1], steps[0], strict=True):
        assert set(own) == {"x", "i", "sigma", "sigma_hat", "denoised"}
        assert relative(own["x"], other["x"]) < 3e-5
        assert relative(own["denoised"], other["denoised"]) < 1e-3
        assert own["sigma_hat"] == other["sigma_hat"]


@pytest.mark.parametrize(("name", "options"), [("heun", {}), ("heun", {"s_churn": 20.0}), ("dpmpp_2m", {})])
def test_within_the_tolerance_in_fewer_rounds(name: str, options: dict[str, Any]) -> None:
    fn, sigmas = getattr(k_diffusion(), f"sample_{name}"), levels(40)
    x = normal(2, 3, 2, 2) * sigmas[0]
    torch.manual_seed(5)
    want = fn(model, x, sigmas, **CALL, **options)
    torch.manual_seed(5)
    sampler = parallel(fn, 16, tolerance=1e-2)
    assert relative(sampler(model, x, sigmas, **CALL, **options), want) < 1e-2
    assert sampler.solution is not None
    assert sampler.solution.stats.rounds <= 18  # of 40 or 79 calls


@pytest.mark.parametrize("churn", [0.0, 40.0])
def test_sampler_of_edm(churn: float) -> None:
    """Its network has attributes, its draws come from an argument, and it scales its first state."""
    network, options = Network(), {"num_steps": 18, "S_churn": churn, "S_noise": 1.003}
    cond, x = normal(2, 12, seed=1), normal(2, 3, 2, 2)

    def draws(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return lambda like: torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.dtype)

    want = edm_sampler(network, x, cond, randn_like=draws(1), **options)
    sampler = parallel(edm_sampler, 16, tolerance=0)
    assert relative(sampler(network, x, cond, randn_like=draws(1), **options), want) < 1e-6  # the network's
    assert relative(sampler(network, x, cond, randn_like=draws(2), **options), want) > (1e-3 if churn else -1)
    rule = step_rule_from_sampler(edm_sampler, model=network, **options)
    assert rule.init_noise_sigma == pytest.approx(80.0)
    assert rule.noisy_start == (churn > 0)
    assert rule.table.stages == 2
    assert len(rule.timesteps) == 35
    short = step_rule_from_sampler(edm_sampler, model=network, **(options | {"num_steps": 6}))
    assert (short.table.stages, len(short.timesteps)) == (2, 11)


def test_names_that_people_know_are_these_rules() -> None:
    """Tables of k-diffusion's functions and of step rules of this library, on one grid."""
    schedule = NoiseSchedule.karras(0.03, 14.6)
    grid = schedule.timesteps(12)
    sigmas = torch.from_numpy(np.append(grid, 0.0))
    same = {
        "euler": Euler(schedule),
        "euler_ancestral": DDIM(schedule, eta=1.0),
        "dpmpp_2m": DPMSolver(schedule, order=2, lower_order_final=False),
        "dpmpp_2m_sde": DPMSolver(schedule, order=2, stochastic=True, lower_order_final=False),
        "dpmpp_3m_sde": DPMSolver(schedule, order=3, solver_type="heun", stochastic=True, lower_order_final=False),
    }
    for name, rule in same.items():
        read, own = (
            step_rule_from_sampler(getattr(k_diffusion(), f"sample_{name}"), sigmas).table,
            rule.recurrence(grid),
        )
        np.testing.assert_allclose(read.timesteps, grid)
        np.testing.assert_allclose(read.c[:-1], own.c[:-1], rtol=1e-9, atol=1e-12, err_msg=name)
        for table in ("a", "b"):
            wide = max(getattr(read, table).shape[1], getattr(own, table).shape[1])
            padded = [
                np.pad(getattr(one, table), ((0, 0), (0, wide - getattr(one, table).shape[1]))) for one in (read, own)
            ]
            np.testing.assert_allclose(padded[0], padded[1], rtol=1e-7, atol=1e-9, err_msg=f"{name}, {table}")


def test_a_rule_with_its_own_seed_and_with_the_samplers_noise() -> None:
    fn, sigmas = k_diffusion().sample_heun, levels(12)
    rule = step_rule_from_sampler(fn, sigmas, s_churn=10.0)
    x, cond = normal(2, 3, 2, 2).double() * 14.6, CALL["extra_args"]["cond"]
    torch.manual_seed(5)
    want = fn(model, x, sigmas, extra_args={"cond": cond}, disable=True, s_churn=10.0)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t, cond.repeat(len(x) // 2, 1))

    torch.manual_seed(5)
    x_T, noise = rule.prepare(x)
    got = solve_sequential(denoiser, x_T, rule.timesteps, rule, noise=noise).sample
    assert relative(got, want) < 1e-12
    assert relative(solve_sequential(denoiser, x_T, rule.timesteps, rule, seed=1).sample, want) > 1e-3
    with pytest.raises(ValueError, match=r"timesteps: this rule holds a table .* pass rule\.timesteps"):
        solve(denoiser, x_T, rule.timesteps[1:], rule)


@pytest.mark.filterwarnings("ignore:Should have t")
def test_a_noise_sampler_of_the_user_is_called_once_a_draw() -> None:
    fn, sigmas = k_diffusion().sample_euler_ancestral, levels(10)
    x = normal(2, 3, 2, 2) * 14.6

    def source() -> Any:
        numbers = iter(range(100))
        return lambda sigma, following: normal(2, 3, 2, 2, seed=next(numbers))

    want = fn(model, x, sigmas, noise_sampler=source(), **CALL)
    got = parallel(fn, 4, tolerance=0)(model, x, sigmas, noise_sampler=source(), **CALL)
    assert relative(got, want) < 1e-6
    positional = (CALL["extra_args"], None, True, 1.0, 1.0)
    got = parallel(fn, 4, tolerance=0)(model, x, sigmas, *positional, source())
    assert relative(got, want) < 1e-6
    tree = k_diffusion().BrownianTreeNoiseSampler(x, sigmas[-2], sigmas[0], seed=[3, 4])
    fn = k_diffusion().sample_dpmpp_2m_sde
    want = fn(model, x, sigmas, noise_sampler=tree, **CALL)
    assert relative(parallel(fn, 4, tolerance=0)(model, x, sigmas, noise_sampler=tree, **CALL), want) < 1e-6


def clipped(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    return k_diffusion().sample_euler(lambda x, s: model(x, s).clamp(-1, 1), x, sigmas, disable=True)


def doubled(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    return model(torch.cat([x, x]), sigmas[:1])[: len(x)]


@pytest.mark.parametrize(
    ("fn", "arguments", "message"),
    [
        ("sample_dpm_adaptive", (5.0, 14.6), "sample_dpm_adaptive chooses its steps by what the network says"),
        (clipped, (torch.tensor([3.0, 2.0, 1.0, 0.0]),), r"step 0 of clipped \(time 3\) is not a linear combination"),
        (doubled, (torch.tensor([3.0, 0.0]),), r"doubled gives its network \(2, 1, 8, 8\) in call 0"),
        (lambda model, x: x, (), "did not call its network"),
        (lambda model, x: model(x, 1.0) / 0.0, (), "own run gives NaN or infinity at step 0"),
        (lambda model, x: model.missing, (), "own run fails after 0 calls of the network, AttributeError"),
        (lambda model, x: {"x": model(x, 1.0)}, (), "returns something else than its last state"),
    ],
)
def test_what_is_not_linear_is_refused_with_step_and_reason(fn: Any, arguments: Any, message: str) -> None:
    if isinstance(fn, str):
        fn = getattr(k_diffusion(), fn)
    with pytest.raises(UnsupportedSamplerError, match=message):
        step_rule_from_sampler(fn, *arguments)


def test_fallback_is_the_sampler_itself() -> None:
    x, network = normal(2, 12), lambda x, s: model(x, s, CALL["extra_args"]["cond"])
    sigmas = torch.tensor([3.0, 2.0, 1.0, 0.0])
    sampler = parallel(clipped, 4, fallback="sequential")
    with pytest.warns(UserWarning, match="sampled sequentially: sampler: step 0 of clipped"):
        got = sampler(network, x, sigmas)
    assert torch.equal(got, clipped(network, x, sigmas))
    with pytest.raises(ValueError, match='fallback: expected "error" or "sequential"'):
        parallel(clipped, fallback="never")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="window: expected an integer"):
        parallel(clipped, 1.5)  # type: ignore[arg-type]


def test_what_comes_after_the_last_output_may_be_anything() -> None:
    """A sampler that clips its sample and returns a dictionary; only what happens between calls has to be linear."""

    def pictures(model: Any, x: Tensor, sigmas: Tensor) -> dict[str, Tensor]:
        return {"pictures": k_diffusion().sample_heun(model, x, sigmas, disable=True).clamp(-0.5, 0.5)}

    cond, sigmas = CALL["extra_args"]["cond"], levels(12)
    x = normal(2, 3, 2, 2) * 14.6

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        return model(x, sigma, cond[:1])

    want = pictures(network, x, sigmas)["pictures"]
    assert float(want.abs().max()) == 0.5
    assert relative(parallel(pictures, 8, tolerance=0)(network, x, sigmas)["pictures"], want) < 3e-6


def test_signature_and_methods_stay() -> None:
    fn = k_diffusion().sample_heun
    sampler = parallel(fn)
    assert inspect.signature(sampler) == inspect.signature(fn)
    assert sampler.__name__ == "sample_heun"
    x, sigmas = normal(2, 12), levels(6)
    for sequential in (parallel(fn, 1), parallel(fn, method="sequential")):
        assert torch.equal(sequential(model, x, sigmas, **CALL), fn(model, x, sigmas, **CALL))

    class Sampler:
        scale = 2.0

        def sample(self, model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
            return fn(model, self.scale * x, sigmas, disable=True)

    own = Sampler()
    network = lambda x, s: model(x, s, CALL["extra_args"]["cond"][:1])  # noqa: E731
    got = parallel(own.sample, 4, tolerance=0)(network, x, sigmas)
    assert relative(got, own.sample(network, x, sigmas)) < 3e-6


def test_the_window_may_choose_itself() -> None:
    fn, sigmas = k_diffusion().sample_euler, levels(20)
    x = normal(2, 3, 2, 2) * 14.6
    got = parallel(fn, "auto", tolerance=1e-3)(model, x, sigmas, **CALL)
    assert relative(got, fn(model, x, sigmas, **CALL)) < 1e-3
    with pytest.raises(ValueError, match='window: expected an integer of at least 1 or "auto"'):
        parallel(fn, "all")  # type: ignore[arg-type]


def test_errors_of_the_network_and_of_callbacks_come_out_with_what_was_reached() -> None:
    fn, sigmas = k_diffusion().sample_euler, levels(20)
    x = normal(2, 3, 2, 2) * 14.6

    def breaks(x: Tensor, sigma: Tensor, **conditions: Any) -> Tensor:
        return model(x, sigma, **conditions) * torch.where(sigma < 1, torch.nan, 1.0)[:, None, None, None]

    with pytest.raises(NonFiniteError, match="gave NaN or infinity for sample 0 at step") as caught:
        parallel(fn, 8)(breaks, x, sigmas, **CALL)
    assert caught.value.solution is not None
    assert 0 < min(caught.value.solution.steps) < 12  # the 12th is the first below 1

    def fails(x: Tensor, sigma: Tensor, **conditions: Any) -> Tensor:
        raise RuntimeError("no such network")

    with pytest.raises(RuntimeError, match="no such network"):
        parallel(fn, 8)(fails, x, sigmas, **CALL)

    seen: list[int] = []

    def stop(told: dict[str, Any]) -> None:
        seen.append(told["i"])
        if told["i"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        parallel(fn, 8)(model, x, sigmas, callback=stop, **CALL)
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("levels_times", "state_times", "message"),
    [(1.01, 1.0, "call 0 is at time 14.746, and was at 14.6"), (1.0, 1.01, "step 3 is off its own table by 0.0")],
)
def test_a_sampler_that_is_not_what_it_was_when_read_is_found_out(
    levels_times: float, state_times: float, message: str
) -> None:
    """Its first three runs, by which it is read, show nothing of it."""
    runs: list[int] = []

    def restless(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
        runs.append(len(runs))
        changed = len(runs) > 3
        sigmas = sigmas * levels_times if changed else sigmas
        for i in range(len(sigmas) - 1):
            x = k_diffusion().sample_euler(model, x, sigmas[i : i + 2], disable=True)
            x = x * state_times if changed and i == 3 else x
        return x

    network = lambda x, s: model(x, s, CALL["extra_args"]["cond"][:1])  # noqa: E731
    with pytest.raises(UnsupportedSamplerError, match=message):
        parallel(restless, 4)(network, normal(2, 12), levels(10))


def test_products_of_a_samplers_own_single_precision_tables_are_read() -> None:
    """Predictor-corrector samplers weigh earlier outputs by ``einsum``, which wants one dtype."""

    def sample_two_outputs(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
        earlier = torch.zeros_like(x)
        for here, after in itertools.pairwise(sigmas):
            denoised = model(x, here.expand(len(x)))
            weights = torch.linalg.solve(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([2.0, 0.5]))
            mean = torch.einsum("k,k...->...", weights, torch.stack([denoised, earlier]))
            x, earlier = mean + after / here * (x - mean), denoised
        return x

    sigmas = torch.linspace(5.0, 0.1, 20)
    rule = step_rule_from_sampler(sample_two_outputs, sigmas)
    gain = float(1 - sigmas[4] / sigmas[3])
    np.testing.assert_allclose(rule.table.b[3, :2], [0.75 * gain, 0.5 * gain], rtol=1e-6)


@pytest.mark.parametrize("later", [False, True])
def test_an_output_that_its_own_step_does_not_read(later: bool) -> None:
    """It may go unread, but not be read by the step after it alone."""

    def sample_late(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
        earlier = torch.zeros_like(x)
        for i, (here, after) in enumerate(itertools.pairwise(sigmas)):
            denoised = model(x, here.expand(len(x)))
            mean = earlier if i == 3 else 0.7 * denoised + 0.3 * earlier if i != 4 or later else denoised
            x, earlier = mean + after / here * (x - mean), denoised
        return x

    network = lambda x, sigma: torch.tanh(x / sigma[:, None])  # noqa: E731
    x, sigmas = normal(2, 6), torch.linspace(1, 0.1, 11)
    if later:
        with pytest.raises(UnsupportedSamplerError, match=r"step 3 of sample_late does not read .* at its own state"):
            parallel(sample_late, 4)(network, x, sigmas)
    else:
        got = parallel(sample_late, 4, tolerance=0)(network, x, sigmas)
        assert relative(got, sample_late(network, x, sigmas)) < 1e-6


def test_times_that_a_sampler_works_out_in_the_states_dtype_are_the_same_times() -> None:
    def sample_middle(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
        for here, after in itertools.pairwise(sigmas.to(x.dtype)):
            denoised = model(x, (here**0.3).log().exp().expand(len(x)))
            x = denoised + after / here * (x - denoised)
        return x

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.tanh(x / sigma[:, None])

    x, sigmas = normal(2, 6), torch.linspace(1, 0.1, 20)
    want = sample_middle(network, x, sigmas)
    assert relative(parallel(sample_middle, 8, tolerance=0)(network, x, sigmas), want) < 1e-6
