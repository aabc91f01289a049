"""Step rules read from diffusers schedulers, against the schedulers' own sequential loops."""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)

from parasolver_adapters.diffusers import SchedulerRule, UnsupportedSchedulerError, step_rule_from_scheduler
from parasolver_adapters.diffusers.schedulers.rule import UNSUPPORTED
from parasolver_adapters.diffusers.schedulers.stepping import ENDS_WITH_ZERO
from parasolver_adapters.draws import Listener
from parasolver_core import DDIM, NoiseSchedule, solve, solve_sequential
from tests.adapters.scheduler_survey import (
    NEED_TORCHSDE,
    PAGE,
    Case,
    classes,
    refusals,
    row,
    survey,
)

SHAPE = (2, 3, 4, 4)
SIGMAS = (1 / NoiseSchedule.linear().alphas_cumprod - 1) ** 0.5
LOOSER = {
    "SASolverScheduler(use_beta_sigmas=True)": 1e-7,  # its steps extrapolate so far that states reach 1e4
    "UnCLIPScheduler(clip_sample=True)": 1e-7,  # alpha begins at 5e-5, where state and output nearly cancel
}

NOT_LINEAR = (  # refused although their own loops run
    "clip_sample of DDIMInverseScheduler",
    "thresholding of HeliosScheduler",
    "needs original_image",
    "emit_mask",
)


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Nonlinear, different at every pixel and timestep, and row by row."""
    t = t.to(x.dtype).reshape(-1, 1, 1, 1)
    shift = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).reshape(x[:1].shape)
    return 0.9 * torch.tanh(0.7 * x + shift) + 0.3 * torch.cos(0.01 * t + 2 * shift)


def start(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=dtype)


def sequential(scheduler: Any, x: torch.Tensor, seed: int = 5, **options: Any) -> torch.Tensor:
    """The loop of a pipeline, from the scheduler's documentation."""
    scheduler, name = copy.deepcopy(scheduler), type(scheduler).__name__
    timesteps = scheduler.timesteps[:-1] if name in ENDS_WITH_ZERO else scheduler.timesteps
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = torch.Generator().manual_seed(seed)
    old = None
    for i, t in enumerate(timesteps):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        m = network(scaled, t.expand(len(x)))
        if name == "CogVideoXDPMScheduler":
            back = timesteps[i - 1] if i else None
            x, old = scheduler.step(m, old, t, back, x, return_dict=False, **options)
        elif name == "UnCLIPScheduler":
            following = timesteps[i + 1] if i + 1 < len(timesteps) else None
            x = scheduler.step(m, t, x, prev_timestep=following, **options).prev_sample
        elif name == "DDPMWuerstchenScheduler":
            x = scheduler.step(m, t.expand(len(x)), x, **options).prev_sample
        else:
            x = scheduler.step(m, t, x, **options).prev_sample
    return x


def both(scheduler: Any, x: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The loop as it is, and with the same draws of noise but without its casts to float32."""
    torch.manual_seed(5)
    with Listener() as listener:
        plain = sequential(scheduler, x, **options)
    torch.manual_seed(5)
    with listener.playback():
        return plain, sequential(scheduler, x, **options)


def noise_of(rule: SchedulerRule, dtype: torch.dtype = torch.float64) -> torch.Tensor | None:
    """The noise of :func:`sequential`."""
    return rule.noise(torch.Generator().manual_seed(5), SHAPE, dtype) if rule.table.stochastic else None


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def replay(case: Case, rule: SchedulerRule) -> None:
    """The rule, sequentially, equals the scheduler's loop: to rounding where that stays in float64."""
    scheduler, x = case.scheduler(), start()
    x = x * rule.init_noise_sigma
    denoiser = rule.wrap_denoiser(network)
    got = solve_sequential(denoiser, x, rule.timesteps, rule, noise=noise_of(rule)).sample
    plain, precise = both(scheduler, x, **case.step_options)
    limit = LOOSER.get(str(case), 1e-10)
    assert distance(got, precise) < limit, f"{case}: {distance(got, precise)}"
    assert distance(got, plain) < 2e-4, f"{case}, as it is: {distance(got, plain)}"


def fails_by_itself(case: Case) -> bool:
    try:
        return not bool(torch.all(torch.isfinite(sequential(case.scheduler(), start(), **case.step_options))))
    except Exception:
        return True


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # options that diffusers is giving up
@pytest.mark.parametrize("name", [name for name in classes() if name not in NEED_TORCHSDE])
def test_every_configuration_replays_or_is_refused_for_a_reason(name: str) -> None:
    results = list(survey(classes()[name]))
    for case, rule in results:
        if isinstance(rule, SchedulerRule):
            replay(case, rule)
        else:
            justified = name in UNSUPPORTED or any(reason in str(rule) for reason in NOT_LINEAR)
            assert justified or fails_by_itself(case), f"{case}: {rule}"
    if f"every scheduler of diffusers {diffusers.__version__} " in PAGE.read_text():
        written = PAGE.read_text().splitlines()
        for line in [row(name, results), *refusals(results)]:
            assert line in written, f"{line}\npython -m tests.adapters.scheduler_survey --write"


def test_the_page_of_the_documentation_lists_every_scheduler() -> None:
    if f"every scheduler of diffusers {diffusers.__version__} " not in PAGE.read_text():
        pytest.skip("the page was written for another version of diffusers")
    listed = re.findall(r"^\| (\w+Scheduler) \|", PAGE.read_text(), re.MULTILINE)
    assert listed == sorted({*classes(), *NEED_TORCHSDE})


@pytest.mark.filterwarnings("ignore:Should have")  # torchsde, of times that differ in the last digit
@pytest.mark.parametrize("name", NEED_TORCHSDE)
def test_correlated_noise(name: str) -> None:
    pytest.importorskip("torchsde")
    case = Case(classes()[name], {})
    with pytest.warns(UserWarning, match="correlated between steps"):
        rule = case.rule()
    x = start() * rule.init_noise_sigma
    if name == "DPMSolverSDEScheduler":
        with pytest.raises(ValueError, match=f"generator: {name} ignores it"):
            rule.noise(torch.Generator(), SHAPE)
        torch.manual_seed(5)
        noise = rule.noise(None, SHAPE, torch.float64)
    else:
        noise = rule.noise(torch.Generator().manual_seed(5), SHAPE, torch.float64)
    got = solve_sequential(network, x, rule.timesteps, rule, noise=noise).sample
    _, want = both(case.scheduler(), x)
    assert distance(got, want) < 1e-9


REPRESENTATIVE: list[tuple[Any, dict[str, Any]]] = [
    (DDIMScheduler(clip_sample=False), {}),
    (DDIMScheduler(clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"), {"eta": 1.0}),
    (DDIMScheduler(clip_sample=True), {}),
    (DDPMScheduler(clip_sample=True, prediction_type="v_prediction"), {}),
    (DPMSolverMultistepScheduler(use_karras_sigmas=True), {}),
    (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), {}),
    (DPMSolverSinglestepScheduler(), {}),
    (DEISMultistepScheduler(solver_order=3), {}),
    (UniPCMultistepScheduler(solver_order=3), {}),
    (SASolverScheduler(), {}),
    (EulerDiscreteScheduler(), {}),
    (EulerAncestralDiscreteScheduler(), {}),
    (EDMEulerScheduler(), {}),
    (HeunDiscreteScheduler(), {}),
    (KDPM2AncestralDiscreteScheduler(), {}),
    (LMSDiscreteScheduler(), {}),
    (PNDMScheduler(), {}),
    (IPNDMScheduler(), {}),
    (FlowMatchEulerDiscreteScheduler(shift=3.0), {}),
    (FlowMatchHeunDiscreteScheduler(), {}),
    (LCMScheduler(), {}),
    (TCDScheduler(), {"eta": 0.3}),
    (CogVideoXDPMScheduler(clip_sample=False), {}),
]


@pytest.mark.parametrize(("scheduler", "options"), REPRESENTATIVE, ids=lambda value: type(value).__name__)
def test_parallel_sampling_equals_the_loop(scheduler: Any, options: dict[str, Any]) -> None:
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(12)
    rule = step_rule_from_scheduler(scheduler, clipping="denoiser", **options)
    x = start() * rule.init_noise_sigma
    denoiser = rule.wrap_denoiser(network)
    solution = solve(denoiser, x, rule.timesteps, rule, window=6, tolerance=0, noise=noise_of(rule))
    _, want = both(scheduler, x, **options)
    assert distance(solution.sample, want) < 1e-9


@pytest.mark.parametrize("scheduler", [DDPMScheduler(clip_sample=False), EulerAncestralDiscreteScheduler()])
def test_float32_draws_are_those_of_the_loop(scheduler: Any) -> None:
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(12)
    rule = step_rule_from_scheduler(scheduler)
    x = start(torch.float32) * rule.init_noise_sigma
    noise = noise_of(rule, torch.float32)
    got = solve(network, x, rule.timesteps, rule, window=4, tolerance=0, noise=noise).sample
    assert got.dtype == torch.float32
    assert distance(got, sequential(scheduler, x)) < 2e-5


@pytest.mark.parametrize("kind", [HeunDiscreteScheduler, KDPM2DiscreteScheduler], ids=lambda kind: kind.__name__)
def test_nodes_are_spread_over_whole_steps_of_two_stages(kind: Any) -> None:
    """Some levels held one stage alone and could not see the error of the other: a quarter of samples missed."""
    rule = step_rule_from_scheduler(kind(timestep_spacing="trailing"), 100)
    assert rule.table.stages == 2
    random = torch.Generator().manual_seed(1)
    first, second = (torch.randn(shape, generator=random).double() for shape in ((48, 64), (64, 48)))
    x = torch.randn((16, 48), generator=random).double() * rule.init_noise_sigma

    def untrained(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        sigma = torch.from_numpy(np.interp(t.numpy(), np.arange(1000), SIGMAS))[:, None]
        hidden = torch.tanh(x @ first * 0.22 + sigma.log() * torch.linspace(-1, 1, 64))
        return (x * (1 + sigma**2).sqrt() - torch.tanh(hidden @ second / 4)) / sigma

    want = solve_sequential(untrained, x, rule.timesteps, rule).sample
    solution = solve(untrained, x, rule.timesteps, rule, window=6, tolerance=0.05)
    errors = (solution.sample - want).norm(dim=1) / want.norm(dim=1)
    assert errors.max() <= 0.05


def test_one_generator_for_each_sample() -> None:
    rule = step_rule_from_scheduler(DDPMScheduler(clip_sample=False), 5)
    both = rule.noise([torch.Generator().manual_seed(seed) for seed in (1, 2)], SHAPE)
    second = rule.noise([torch.Generator().manual_seed(2)], (1, *SHAPE[1:]))
    torch.testing.assert_close(both[:, 1:], second)
    assert both[0].std() > 0.8
    assert torch.all(both[-1] == 0)  # the last step of DDPM adds no noise


def test_the_table_of_ddim_is_that_of_the_core() -> None:
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    rule = step_rule_from_scheduler(scheduler, 10)
    core = DDIM(NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod.double().numpy())).recurrence(rule.timesteps)
    for name in ("a", "b", "c", "held", "slope", "identity_slope"):
        np.testing.assert_allclose(getattr(rule.table, name), getattr(core, name), rtol=2e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "scheduler",
    [
        UniPCMultistepScheduler(),
        DPMSolverMultistepScheduler(),
        EulerDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(),
        DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_the_held_quantity_is_the_predicted_clean_sample(scheduler: Any) -> None:
    """With a network that knows the clean sample, every rule starts from it and ends at it."""
    rule = step_rule_from_scheduler(scheduler, 12)
    p, q = rule.table.held.T
    assert np.all(q != 0)
    clean, x = 0.3, [1.7 * rule.init_noise_sigma]
    m: list[float] = []
    for i in range(len(rule.timesteps)):
        m.insert(0, (clean - p[i] * x[0]) / q[i])
        x.insert(0, rule.table.advance(i, x, m))
    assert abs(x[0] - clean) < 0.02 * (1 + abs(x[-1]) * 0.01)


def test_the_scheduler_and_the_global_stream_are_left_alone() -> None:
    scheduler = PNDMScheduler()
    scheduler.set_timesteps(6)
    before, stream = copy.deepcopy(scheduler.__dict__), torch.get_rng_state()
    rule = step_rule_from_scheduler(scheduler)
    step_rule_from_scheduler(scheduler, 9)
    rule.noise(torch.Generator().manual_seed(0), SHAPE)
    assert torch.equal(torch.get_rng_state(), stream)
    for name, value in before.items():
        same = np.array_equal if isinstance(value, (torch.Tensor, np.ndarray)) else lambda a, b: a == b
        assert same(value, scheduler.__dict__[name]), name


def test_image_to_image_starts_in_the_middle() -> None:
    schedulers: tuple[Any, ...] = (EulerDiscreteScheduler(), DDIMScheduler(clip_sample=False))
    for scheduler in schedulers:
        scheduler.set_timesteps(12)
        rule = step_rule_from_scheduler(scheduler, begin_index=5)
        assert np.array_equal(rule.timesteps, scheduler.timesteps[5:].numpy())
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(5)
        x = start()
        got = solve_sequential(network, x, rule.timesteps, rule).sample
        with Listener().playback():
            for t in scheduler.timesteps[5:]:
                m = network(scheduler.scale_model_input(x, t), t.expand(len(x)))
                x = scheduler.step(m, t, x).prev_sample
        assert distance(got, x) < 1e-10


def test_errors_name_the_argument_and_what_to_do() -> None:
    ddim = DDIMScheduler(clip_sample=False)
    with pytest.raises(TypeError, match="scheduler: expected a diffusers scheduler, got str"):
        step_rule_from_scheduler("ddim", 10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_inference_steps: expected a number"):
        step_rule_from_scheduler(ddim)
    with pytest.raises(ValueError, match="num_inference_steps: expected an integer of at least 1, got 0"):
        step_rule_from_scheduler(ddim, 0)
    with pytest.raises(UnsupportedSchedulerError, match=r"set_timesteps\(2000\) fails"):
        step_rule_from_scheduler(ddim, 2000)
    with pytest.raises(ValueError, match=r"begin_index: expected 0\.\.9, got 10"):
        step_rule_from_scheduler(ddim, 10, begin_index=10)
    with pytest.raises(ValueError, match="clipping: expected"):
        step_rule_from_scheduler(ddim, 10, clipping="yes")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"s_churn: DDIMScheduler\.step takes no such argument"):
        step_rule_from_scheduler(ddim, 10, s_churn=1.0)
    with pytest.raises(ValueError, match="variance_noise: it differs from step to step"):
        step_rule_from_scheduler(ddim, 10, variance_noise=None)
    with pytest.raises(ValueError, match="sigma_data: expected a finite number > 0"):
        step_rule_from_scheduler(ddim, 10, sigma_data=0.0)
    with pytest.raises(UnsupportedSchedulerError, match="clip_sample of DDIMScheduler is not linear"):
        step_rule_from_scheduler(DDIMScheduler(), 10)
    with pytest.raises(UnsupportedSchedulerError, match="variance_type='learned_range'"):
        step_rule_from_scheduler(DDPMScheduler(clip_sample=False, variance_type="learned_range"), 10)
    zero_snr = DDIMScheduler(clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(UnsupportedSchedulerError, match="use prediction_type='v_prediction'"):
        step_rule_from_scheduler(zero_snr, 10)


def test_a_rule_refuses_other_timesteps() -> None:
    rule = step_rule_from_scheduler(DDIMScheduler(clip_sample=False), 10)
    with pytest.raises(ValueError, match=r"timesteps: this rule holds .* pass rule\.timesteps"):
        solve(network, start(), rule.timesteps[1:], rule)


def test_a_scheduler_in_use_is_refused() -> None:
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    scheduler.step(start(), scheduler.timesteps[0], start())
    with pytest.raises(ValueError, match="in the middle of a run"):
        step_rule_from_scheduler(scheduler)


def test_clipping_is_known_also_where_nothing_was_clipped_before() -> None:
    """The late steps of a run need not clip, so what clipping does there has to be found on purpose."""
    scheduler = diffusers.DDIMScheduler(clip_sample=True, timestep_spacing="trailing")
    rule = step_rule_from_scheduler(scheduler, 25, clipping="denoiser")
    assert rule.clip is not None
    scheduler.set_timesteps(25)
    for node in range(len(rule.timesteps) - 1):  # the last step ends at the predicted sample, whatever its weight
        x, m = start(), 3 * start().flip(-1)
        got = rule.table.advance(node, [x], [rule.clip.correct(node, x, m)])
        assert distance(got, scheduler.step(m, scheduler.timesteps[node], x).prev_sample) < 1e-6


@pytest.mark.parametrize(
    ("scheduler", "predicts"),
    [
        (DDPMScheduler(prediction_type="v_prediction", clip_sample=False), "v_prediction"),
        (DPMSolverMultistepScheduler(), "epsilon"),
    ],
    ids=["v", "epsilon"],
)
def test_a_rule_knows_what_its_scheduler_is_given(scheduler: Any, predicts: str) -> None:
    rule = step_rule_from_scheduler(scheduler, 8)
    assert rule.predicts == predicts

    class Sample:
        prediction_type = "sample"

        def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(ValueError, match=rf"^step_rule: it reads .*'{predicts}'.* predicts 'sample'"):
        solve(Sample(), torch.zeros(1, 3, 8, 8), rule.timesteps, rule)
