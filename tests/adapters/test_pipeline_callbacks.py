"""Progress, callbacks and interrupts of a pipeline that samples in parallel."""

from __future__ import annotations

import contextlib
from typing import Any

import diffusers
import pytest
import torch
from diffusers.callbacks import IPAdapterScaleCutoffCallback
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

from parasolver_adapters.diffusers import PipelineNotParallelError, parallel_sampling
from parasolver_core import Status
from tests.adapters.pipeline_calls import STEPS, sample
from tests.adapters.tiny_pipelines import (
    SINGLE,
    ddim,
    ddim_pipeline,
    distance,
    generator,
    stable_diffusion,
    text,
)

pytestmark = pytest.mark.usefixtures("quiet_diffusers")


# ---------------------------------------------------------------- progress, callbacks, interrupts


def test_callbacks_see_every_step_once_and_in_order() -> None:
    def collect(into: list[Any]) -> Any:
        def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            into.append((step, int(timestep), given["latents"].clone()))
            return given

        return callback

    pipe, want, got = stable_diffusion(), [], []
    sample(pipe, callback_on_step_end=collect(want))
    with parallel_sampling(pipe, tolerance=0.0) as run:
        sample(pipe, callback_on_step_end=collect(got))
    assert [one[:2] for one in got] == [one[:2] for one in want]
    assert max(distance(one[2], other[2]) for one, other in zip(got, want, strict=True)) < 1e-12
    assert run.reason is None


def test_progress_is_shown_once_by_the_pipelines_own_bar(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = stable_diffusion()
    pipe.set_progress_bar_config(disable=False, desc="mine", mininterval=0)
    with parallel_sampling(pipe):
        sample(pipe)
    shown = capsys.readouterr().err
    assert f"{STEPS}/{STEPS}" in shown
    assert shown.count(f"mine:   0%|          | 0/{STEPS}") == 1
    assert pipe._progress_bar_config == {"disable": False, "desc": "mine", "mininterval": 0}


class Combined(diffusers.DDIMPipeline):
    """Hands its calls and settings to a pipeline inside, and has no setting of its own, as Kandinsky 2.2 does."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__(unet, scheduler)
        self.inner = diffusers.DDIMPipeline(unet, scheduler)
        self.inner.scheduler = self.scheduler

    def set_progress_bar_config(self, **config: Any) -> None:
        self.inner.set_progress_bar_config(**config)

    def __call__(self, **given: Any) -> Any:
        return self.inner(**given)


def test_the_bars_of_a_combined_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    tiny, given = ddim_pipeline(), {"num_inference_steps": STEPS, "output_type": "np"}
    pipe = Combined(tiny.unet, tiny.scheduler)
    pipe.set_progress_bar_config(desc="mine", mininterval=0)
    want = pipe(**given, generator=generator()).images
    capsys.readouterr()
    with parallel_sampling(pipe, tolerance=0.0):
        got = pipe(**given, generator=generator()).images
    assert distance(torch.as_tensor(got), torch.as_tensor(want)) < 1e-12
    assert capsys.readouterr().err.count(f"mine:   0%|          | 0/{STEPS}") == 1
    assert pipe.inner._progress_bar_config == {"desc": "mine", "mininterval": 0}
    assert "_progress_bar_config" not in vars(pipe)


@pytest.mark.parametrize("at", [0, 4])
def test_interrupt_stops_as_in_a_sequential_run(at: int) -> None:
    def interrupt(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == at
        return given

    pipe = stable_diffusion()
    want = sample(pipe, callback_on_step_end=interrupt)
    with parallel_sampling(pipe, window=3, tolerance=0.0) as run:
        got = sample(pipe, callback_on_step_end=interrupt)
    assert distance(got, want) < 1e-12
    assert run.status is Status.STOPPED
    assert run.stats.rounds <= at + 2


def test_a_callback_that_changes_the_latents_is_obeyed() -> None:
    def paint(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        return {"latents": given["latents"] + 0.1} if step == 5 else given

    pipe = stable_diffusion(scheduler=diffusers.UniPCMultistepScheduler.from_config(ddim().config))
    want = sample(pipe, callback_on_step_end=paint)
    with pytest.warns(UserWarning, match="callback"), parallel_sampling(pipe, tolerance=0.0) as run:
        got = sample(pipe, callback_on_step_end=paint)
    assert distance(got, want) < 1e-12
    assert "callback" in str(run.reason)


@pytest.mark.parametrize("how", ["in place", "setting"])
def test_a_callback_that_changes_anything_is_noticed(how: str) -> None:
    def change(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 3 and how == "in place":
            given["latents"].mul_(1.01)
        elif step == 3:
            pipe._guidance_scale = 2.0
        return given

    pipe = stable_diffusion()
    want = sample(pipe, callback_on_step_end=change)
    with pytest.warns(UserWarning, match="callback"), parallel_sampling(pipe, tolerance=0.0):
        got = sample(pipe, callback_on_step_end=change)
    assert distance(got, want) < 1e-12


SCHEDULES: dict[str, Any] = {
    "in place": lambda scheduler: scheduler.sigmas[-4:].mul_(0.9),
    "another tensor": lambda scheduler: setattr(scheduler, "sigmas", scheduler.sigmas * 0.98),
    "an option": lambda scheduler: scheduler.register_to_config(solver_order=1),
    "a list": lambda scheduler: scheduler.model_outputs.__setitem__(-1, 0.5 * scheduler.model_outputs[-1]),
}


@pytest.mark.parametrize("how", SCHEDULES)
def test_a_callback_that_changes_the_scheduler_is_noticed(how: str) -> None:
    def change(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 5:
            SCHEDULES[how](pipe.scheduler)
        return given

    kind = diffusers.DPMSolverMultistepScheduler
    want = sample(stable_diffusion(scheduler=kind.from_config(ddim().config)), callback_on_step_end=change)
    pipe = stable_diffusion(scheduler=kind.from_config(ddim().config))
    assert distance(sample(pipe), want) > 1e-5
    with pytest.warns(UserWarning, match="callback_on_step_end changed"), parallel_sampling(pipe, tolerance=0.0):
        got = sample(pipe, callback_on_step_end=change)
    assert distance(got, want) < SINGLE


@pytest.mark.filterwarnings("ignore:.*Passing `callback:FutureWarning")
def test_a_callback_of_the_older_kind_that_writes_into_the_latents_is_noticed() -> None:
    def paint(step: int, timestep: Any, latents: torch.Tensor) -> None:
        if step == 3:
            latents.mul_(1.1)

    pipe = stable_diffusion()
    want = sample(pipe, callback=paint, callback_steps=1)
    with pytest.warns(UserWarning, match="callback changed"), parallel_sampling(pipe, tolerance=0.0):
        got = sample(pipe, callback=paint, callback_steps=1)
    assert distance(got, want) < 1e-12


WEIGHTS: dict[str, Any] = {
    "data": lambda conv: conv.weight.data.mul_(0.5),
    "in place": lambda conv: conv.weight.detach().mul_(0.5),
    "one entry": lambda conv: conv.bias.detach()[0].add_(1.0),
    "load_state_dict": lambda conv: conv.load_state_dict({n: 0.5 * one for n, one in conv.state_dict().items()}),
    "another parameter": lambda conv: setattr(conv, "weight", torch.nn.Parameter(0.5 * conv.weight.detach())),
    "other data": lambda conv: setattr(conv.weight, "data", 0.5 * conv.weight.data),
    "another module": lambda conv: conv.register_module("extra", torch.nn.Identity()),
    "a hook": lambda conv: conv.register_forward_hook(lambda module, args, output: 0.5 * output),
    "a parametrisation": lambda conv: torch.nn.utils.parametrizations.weight_norm(conv),
    "a setting": lambda conv: setattr(conv, "padding_mode", "circular"),
}


@pytest.mark.parametrize("how", WEIGHTS)
def test_a_callback_that_changes_weights_is_noticed(how: str) -> None:
    def change(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            WEIGHTS[how](pipe.unet.conv_out)
        return given

    want = sample(stable_diffusion(), callback_on_step_end=change)
    pipe = stable_diffusion()
    with pytest.warns(UserWarning, match="callback_on_step_end changed"), parallel_sampling(pipe, tolerance=0.0):
        got = sample(pipe, callback_on_step_end=change)
    assert distance(got, want) < 1e-12


def test_a_callback_may_call_the_network() -> None:
    def callback(into: list[torch.Tensor]) -> Any:
        def look(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            prompt = text()["prompt_embeds"]
            into.append(pipe.unet(given["latents"], timestep, encoder_hidden_states=prompt).sample)
            return given

        return look

    pipe, want, got = stable_diffusion(), [], []
    sample(pipe, callback_on_step_end=callback(want))
    with parallel_sampling(pipe, tolerance=0.0) as run:
        sample(pipe, callback_on_step_end=callback(got))
    assert max(map(distance, got, want)) < 1e-12
    assert run.reason is None


@pytest.mark.parametrize("window", [1, 5])
def test_an_interrupt_leaves_the_last_latents(window: int) -> None:
    """An interrupt in a callback, by the user's keyboard."""
    seen: list[torch.Tensor] = []

    def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(given["latents"].clone())
        if step == 3:
            raise KeyboardInterrupt
        return given

    pipe = stable_diffusion()
    with (
        pytest.raises(KeyboardInterrupt) as caught,
        parallel_sampling(pipe, window=window, tolerance=0.0) as run,
    ):
        sample(pipe, **text(2), callback_on_step_end=callback)
    solution = caught.value.solution  # type: ignore[attr-defined]
    assert run.status is solution.status is Status.INTERRUPTED
    assert run.steps == 4
    assert torch.equal(run.latents, seen[-1])
    steps = solution.steps[0]
    assert solution.steps == (steps, steps)
    assert solution.states.shape == solution.sample.shape == (2, 4, 16, 16)
    if window > 1:
        assert torch.equal(solution.trajectory[4], seen[-1])
        assert torch.equal(solution.trajectory[steps], solution.states)
        assert steps >= 4
    else:
        assert torch.equal(solution.states, seen[-1])
        assert steps == 4


class ClosedError(Exception):
    """Takes no attributes."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("__"):
            raise AttributeError(name)


@pytest.mark.parametrize("window", [1, 5])
def test_an_exception_that_takes_no_attributes_passes_unchanged(window: int) -> None:
    raised = ClosedError("mine")

    def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        raise raised

    pipe = stable_diffusion()
    with pytest.raises(ClosedError, match="mine") as caught, parallel_sampling(pipe, window=window) as run:
        sample(pipe, callback_on_step_end=callback)
    assert caught.value is raised
    assert (run.status, run.steps) == (Status.FAILED, 1)


@pytest.mark.parametrize("paints", [False, True])
def test_callbacks_in_inference_mode(paints: bool) -> None:
    """Tensors do not count there how often they were written to."""

    def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if paints and step == 3:
            given["latents"].mul_(1.1)
        return given

    pipe = stable_diffusion()
    with torch.inference_mode():
        want = sample(pipe, callback_on_step_end=callback)
        warned = pytest.warns(UserWarning, match="callback") if paints else contextlib.nullcontext()
        with warned, parallel_sampling(pipe, tolerance=0.0) as run:
            got = sample(pipe, callback_on_step_end=callback)
    assert distance(got, want) < 1e-12
    assert bool(run.reason) == paints


def with_ip_adapter() -> Any:
    """As ``load_ip_adapter`` leaves a pipeline."""
    pipe = stable_diffusion()
    torch.manual_seed(5)
    processors = dict(pipe.unet.attn_processors)
    for name in processors:
        if "attn2" in name:
            processors[name] = IPAdapterAttnProcessor2_0(16, cross_attention_dim=16, num_tokens=(4,)).to(torch.float64)
    pipe.unet.set_attn_processor(processors)
    projection = ImageProjection(image_embed_dim=8, cross_attention_dim=16, num_image_text_embeds=4)
    pipe.unet.encoder_hid_proj = MultiIPAdapterImageProjection([projection.to(torch.float64)])
    pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    return pipe


def test_a_callback_that_switches_something_in_a_network_is_noticed() -> None:
    pipe, given = with_ip_adapter(), {"ip_adapter_image_embeds": [torch.ones(2, 1, 8, dtype=torch.float64)]}
    callback = IPAdapterScaleCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=3)
    given["callback_on_step_end"] = callback
    want = sample(pipe, **given)
    pipe.set_ip_adapter_scale(1.0)
    with pytest.warns(UserWarning, match="callback_on_step_end changed"), parallel_sampling(pipe, tolerance=1e-4):
        got = sample(pipe, **given)
    assert distance(got, want) < 1e-4


def test_a_loop_that_switches_something_in_a_network_is_refused() -> None:
    """As GLIGEN does after part of its steps."""
    pipe = with_ip_adapter()
    given = {"ip_adapter_image_embeds": [torch.ones(2, 1, 8, dtype=torch.float64)]}
    own = pipe.scheduler.scale_model_input

    def scale_model_input(latents: torch.Tensor, timestep: Any) -> torch.Tensor:
        pipe.set_ip_adapter_scale(1.0 if timestep > 500 else 0.0)
        return own(latents, timestep)

    pipe.scheduler.scale_model_input = scale_model_input
    with pytest.raises(PipelineNotParallelError, match="changes the networks"), parallel_sampling(pipe):
        sample(pipe, **given)


def test_preview_after_every_step_of_a_pipeline_that_is_left_to_itself() -> None:
    pipe, seen = stable_diffusion(), []
    with parallel_sampling(pipe, window=1, preview=lambda step, latents: seen.append((step, latents))) as run:
        got = sample(pipe)
    assert [step for step, _ in seen] == list(range(1, STEPS + 1))
    assert torch.equal(seen[-1][1], got)
    assert torch.equal(run.latents, got)


def test_preview_after_every_round_comes_nearer_to_the_sample() -> None:
    pipe, seen = stable_diffusion(), []
    with parallel_sampling(pipe, preview=lambda round_, latents: seen.append((round_, latents.clone()))) as run:
        got = sample(pipe)
    assert [one for one, _ in seen] == list(range(1, run.stats.rounds + 1))
    errors = [distance(latents, got) for _, latents in seen]
    assert errors[-1] < 1e-12 < errors[0]
    assert torch.equal(run.latents, got)
    assert errors[len(errors) // 2] < errors[0]
