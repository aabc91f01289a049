"""What cannot be parallel is refused, or left to the pipeline."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.hooks import HookRegistry, ModelHook

from parasolver_adapters.diffusers import PipelineNotParallelError, parallel_sampling, step_rule_from_scheduler
from parasolver_adapters.embedded import EmbeddedDenoiser, load_embedded_model
from parasolver_core import ConvergenceError, NonFiniteError, Status, solve
from tests.adapters.pipeline_calls import sample
from tests.adapters.pipeline_survey import PAGE, REFUSALS, Odd, Refusal, page
from tests.adapters.tiny_pipelines import (
    ddim,
    ddim_pipeline,
    distance,
    generator,
    stable_diffusion,
)

pytestmark = pytest.mark.usefixtures("quiet_diffusers")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.what)
def test_what_cannot_be_parallel_is_refused_or_left_alone(refusal: Refusal) -> None:
    pipe = refusal.build()
    with pytest.raises(PipelineNotParallelError, match=r"\w+") as refused, parallel_sampling(pipe):
        refusal.call(pipe)
    pipe = refusal.build()
    with (
        pytest.warns(UserWarning, match="sampled sequentially"),
        parallel_sampling(pipe, fallback="sequential") as run,
    ):
        got = refusal.call(pipe)
    assert run.reason == str(refused.value)
    assert run.status is Status.CONVERGED
    if refusal.repeats:
        assert torch.equal(got, refusal.call(refusal.build()))


def test_nothing_is_begun_again_after_a_callback() -> None:
    """A network that drops a row of its batches, at late steps."""
    pipe, seen = stable_diffusion(), []
    own = pipe.unet.forward

    @functools.wraps(own)
    def forward(x: torch.Tensor, t: Any, *args: Any, **kwargs: Any) -> Any:
        output = own(x, t, *args, **kwargs)
        return (output[0][:-1],) if len(x) > 2 and torch.as_tensor(t).min() < 300 else output

    def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return given

    pipe.unet.forward = forward
    with (
        pytest.raises(PipelineNotParallelError, match="returns a tensor of shape"),
        parallel_sampling(pipe, fallback="sequential"),
    ):
        sample(pipe, callback_on_step_end=callback)
    assert seen == list(range(len(seen)))
    assert seen


def test_the_page_on_pipelines_is_up_to_date() -> None:
    """``python -m tests.adapters.pipeline_survey --write`` writes it."""
    assert PAGE.read_text() == page({one.what: one.reason() for one in REFUSALS})


def test_a_scheduler_that_deceives_its_probing_is_found_out() -> None:
    class Deceiver(DDIMScheduler):
        def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
            if sample.shape[1] == 4:  # the probes have one channel
                model_output = model_output * 1.5
            return super().step(model_output, timestep, sample, return_dict=return_dict)

    pipe = stable_diffusion(scheduler=Deceiver.from_config(ddim().config))
    with pytest.raises(PipelineNotParallelError, match="Deceiver is off its own table"), parallel_sampling(pipe):
        sample(pipe)


def test_a_pipeline_that_copies_its_scheduler() -> None:
    tiny = ddim_pipeline()
    pipe = Odd(tiny.unet, tiny.scheduler)
    want = pipe("copied scheduler", generator=generator())[0]
    with parallel_sampling(pipe, tolerance=0.0) as run:
        got = pipe("copied scheduler", generator=generator())[0]
    assert distance(got, want) < 1e-12
    assert run.stats.rounds > 0


class Scale(ModelHook):
    """Counts its calls, and changes what the network gives."""

    calls = 0

    def post_forward(self, module: Any, output: Any) -> Any:
        self.calls += 1
        return (output[0] * 0.9,)


def test_hooks_of_diffusers_stay_in_place() -> None:
    pipe, hook = stable_diffusion(), Scale()
    HookRegistry.check_if_exists_or_initialize(pipe.unet).register_hook(hook, "scale")
    own, want = pipe.unet.forward, sample(pipe)
    calls = hook.calls
    with parallel_sampling(pipe, tolerance=0.0) as run:
        assert distance(sample(pipe), want) < 1e-12
    assert pipe.unet.forward is own
    assert calls < hook.calls <= calls + run.stats.calls + 4  # two that are compared, and these once more


@pytest.mark.slow
def test_a_compiled_network() -> None:
    pipe = stable_diffusion()
    want = sample(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with parallel_sampling(pipe, tolerance=0.0):
        assert distance(sample(pipe), want) < 1e-12


def test_hooks_of_a_network_act_on_each_step_by_itself() -> None:
    pipe = stable_diffusion()
    pipe.unet.register_forward_hook(lambda module, args, output: (output[0] - output[0].mean(),))
    want = sample(pipe)
    with parallel_sampling(pipe, tolerance=0.0):
        assert distance(sample(pipe), want) < 1e-12


def test_nan_is_an_error_and_not_a_picture() -> None:
    pipe = stable_diffusion()
    handle = pipe.unet.register_forward_hook(
        lambda module, args, output: (torch.where(args[1].reshape(-1, 1, 1, 1) < 500, torch.nan, 1.0) * output[0],)
    )
    with pytest.raises(NonFiniteError, match="NaN"), parallel_sampling(pipe) as run:
        sample(pipe)
    handle.remove()
    assert run.status is Status.NONFINITE_MODEL


EMBEDDED = {
    "DDIM": (diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing"), 50),
    "DPM-Solver++": (diffusers.DPMSolverMultistepScheduler(timestep_spacing="trailing"), 25),
    "DDPM": (diffusers.DDPMScheduler(clip_sample=False, timestep_spacing="trailing"), 50),
    "DDPM, clipped": (diffusers.DDPMScheduler(clip_sample=True, timestep_spacing="trailing"), 50),
}


@pytest.mark.parametrize("name", EMBEDDED)
def test_rounds_of_the_embedded_model_are_those_of_solve(name: str) -> None:
    scheduler, steps = EMBEDDED[name]
    pipe = diffusers.DDPMPipeline(load_embedded_model(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    seen: list[torch.Tensor] = []
    with parallel_sampling(pipe, window=16, preview=lambda round_, latents: seen.append(latents)) as run:
        pipe(num_inference_steps=steps, generator=generator(42))
    draws = generator(42)
    x_T = torch.randn(1, 1, 28, 28, generator=draws)
    rule = step_rule_from_scheduler(scheduler, steps, clipping="denoiser")
    noise = rule.noise(draws, x_T.shape, x_T.dtype) if rule.table.stochastic else None
    solution = solve(rule.wrap_denoiser(EmbeddedDenoiser()), x_T, rule.timesteps, rule, 16, noise=noise, check=False)
    assert run.stats.rounds == solution.stats.rounds < steps
    assert run.stats.evaluations == solution.stats.evaluations
    assert [one.accepted for one in run.stats.history] == [one.accepted for one in solution.stats.history]
    assert distance(seen[-1], solution.sample) < 1e-5


def test_max_rounds() -> None:
    pipe = stable_diffusion()
    with pytest.raises(ConvergenceError, match="max_rounds=3") as caught, parallel_sampling(pipe, max_rounds=3) as run:
        sample(pipe)
    assert run.status is Status.MAX_ROUNDS
    assert caught.value.solution is not None
    assert caught.value.solution.states.shape == (1, 4, 16, 16)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 0}, ValueError, "window"),
        ({"tolerance": -1.0}, ValueError, "tolerance"),
        ({"method": "no"}, ValueError, "method"),
        ({"fallback": "no"}, ValueError, "fallback"),
        ({"preview": 3}, TypeError, "preview"),
        ({"max_rows": 0}, ValueError, "max_rows"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), parallel_sampling(stable_diffusion(), **options):
        pass


def test_what_is_not_a_pipeline() -> None:
    with pytest.raises(TypeError, match="pipe: expected a diffusers pipeline"), parallel_sampling(object()):
        pass
