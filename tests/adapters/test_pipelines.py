"""Parallel sampling of diffusers pipelines, against the untouched pipelines."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import inspect
import operator
import threading
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.callbacks import IPAdapterScaleCutoffCallback
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

from parasolver_adapters.diffusers import PipelineNotParallelError, parallel_sampling, step_rule_from_scheduler
from parasolver_adapters.embedded import EmbeddedDenoiser, load_embedded_model
from parasolver_core import ConvergenceError, NonFiniteError, Status, solve
from tests.adapters.pipeline_survey import PAGE, REFUSALS, Odd, Refusal, pag, page
from tests.adapters.tiny_pipelines import (
    FAMILIES,
    Family,
    ddim,
    ddim_pipeline,
    distance,
    generator,
    half_mask,
    picture,
    sdxl,
    stable_diffusion,
    text,
    watch,
)

STEPS = 12


pytestmark = pytest.mark.usefixtures("quiet_diffusers")


def sample(pipe: Any, **changes: Any) -> torch.Tensor:
    given = {"num_inference_steps": STEPS, "generator": generator(), "output_type": "latent"} | text() | changes
    return pipe(**given).images


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.title)
def test_the_sample_is_that_of_the_untouched_pipeline(family: Family) -> None:
    pipe = family.build()
    want = family.call(pipe)
    with parallel_sampling(pipe, window=5, tolerance=0.0) as run:
        exact = family.call(pipe)
    assert distance(exact, want) < family.limit
    assert run.status is Status.CONVERGED
    with parallel_sampling(pipe, window=5, tolerance=1e-2) as run:
        near = family.call(pipe)
    assert distance(near, want) < 1e-2
    assert run.stats.rounds < len(pipe.scheduler.timesteps)
    assert near.dtype == want.dtype
    assert torch.equal(family.call(pipe), want)


@pytest.mark.parametrize("method", ["identity", "paradigms", "parasolver", "parataa"])
def test_other_methods(method: str) -> None:
    pipe = ddim_pipeline()
    pipe.scheduler = diffusers.DDPMScheduler(clip_sample=True)  # the published stop rules are no distances
    pipe = diffusers.DDPMPipeline(pipe.unet, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 30, "output_type": "np"}
    want = pipe(**given, generator=generator()).images
    warmup = 0 if method == "parataa" else 2  # that opens its window at once
    with parallel_sampling(pipe, window=8, tolerance=0.1, method=method, warmup_steps=warmup) as run:
        got = pipe(**given, generator=generator()).images
    assert run.status is Status.CONVERGED
    assert distance(torch.as_tensor(got), torch.as_tensor(want)) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(dtype: torch.dtype) -> None:
    """A batch differs from its rows by rounding, and the sampler amplifies that."""
    pipe = stable_diffusion()
    pipe.unet.to(dtype)
    pipe.vae.to(dtype)
    given = {name: value.to(dtype) for name, value in text().items()}
    want = sample(pipe, **given)
    with parallel_sampling(pipe, tolerance=0.0):
        got = sample(pipe, **given)
    assert got.dtype == want.dtype
    assert distance(got, want) < 10 * torch.finfo(dtype).eps


def test_a_decoded_picture() -> None:
    pipe = stable_diffusion()
    want = sample(pipe, output_type="np")
    with parallel_sampling(pipe, tolerance=0.0):
        got = sample(pipe, output_type="np")
    assert abs(got - want).max() < 1e-6  # the pipeline turns pictures into float32


def test_the_global_stream_of_random_numbers_serves_without_a_generator() -> None:
    pipe = stable_diffusion()
    torch.manual_seed(3)
    want, after = sample(pipe, generator=None, eta=1.0), torch.rand(1)
    torch.manual_seed(3)
    with parallel_sampling(pipe, tolerance=0.0):
        got = sample(pipe, generator=None, eta=1.0)
    assert distance(got, want) < 1e-12
    assert torch.equal(torch.rand(1), after)


def test_a_generator_ends_where_the_pipeline_leaves_it() -> None:
    pipe, untouched, watched = stable_diffusion(), generator(), generator()
    sample(pipe, generator=untouched, eta=1.0)
    with parallel_sampling(pipe):
        sample(pipe, generator=watched, eta=1.0)
    assert torch.equal(untouched.get_state(), watched.get_state())


def test_several_calls_in_one_block_and_another_scheduler_between_them() -> None:
    pipe = stable_diffusion()
    with parallel_sampling(pipe, tolerance=0.0) as run:
        sample(pipe)
        assert len(pipe.scheduler.timesteps) == STEPS
        pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
        got = sample(pipe, num_inference_steps=9)
    assert distance(got, sample(pipe, num_inference_steps=9)) < 1e-12
    assert run.stats.evaluations >= 9


def test_one_scalar_window_leaves_the_pipeline_to_itself() -> None:
    pipe = stable_diffusion()
    with parallel_sampling(pipe, window=1) as run:
        got = sample(pipe)
    assert torch.equal(got, sample(pipe))
    assert (run.stats.rounds, run.stats.evaluations, run.reason) == (STEPS, STEPS, None)


def test_stats_count_every_sample_and_every_call() -> None:
    pipe = stable_diffusion()
    rows = watch(pipe.unet, lambda sample, *args, **kwargs: sample.shape[0])
    with parallel_sampling(pipe, window=4, tolerance=0.0) as run:
        sample(pipe, **text(2))
    history = run.stats.history
    assert run.stats.evaluations == sum(record.evaluations for record in history)
    looked = 2  # calls of the loop itself, the first time, to compare them with what was recorded
    assert run.stats.calls == run.stats.rounds == len(history) == len(rows) - looked
    compared = 4  # rows that are evaluated twice, to compare a batch with the pipeline's own call
    assert sum(rows) == 2 * run.stats.evaluations + compared + looked * 4


def test_max_rows_bounds_the_rows_of_latents_in_a_call() -> None:
    pipe = stable_diffusion()
    rows = watch(pipe.unet, lambda sample, *args, **kwargs: sample.shape[0])
    with parallel_sampling(pipe, window=6, tolerance=0.0, max_rows=4) as run:
        got = sample(pipe, **text(2))
    assert max(rows) <= 2 * (4 + 2)  # guidance doubles; once with the row that is compared
    assert run.stats.calls > run.stats.rounds
    assert distance(got, sample(pipe, **text(2))) < 1e-12


@pytest.mark.parametrize("name", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"])
def test_a_loop_that_begins_at_the_second_of_two_equal_timesteps(name: str) -> None:
    """PNDM visits its second timestep twice, and has no ``set_begin_index`` that would tell which of them it is."""
    scheduler = diffusers.PNDMScheduler.from_config(ddim().config, skip_prk_steps=True)
    pipe, given = stable_diffusion(name, scheduler=scheduler), {"image": picture(), "strength": 0.9}
    if "Inpaint" in name:
        given |= {"mask_image": half_mask(), "height": 32, "width": 32}
    want = sample(pipe, **given)
    with parallel_sampling(pipe, tolerance=0.0):
        got = sample(pipe, **given)
    assert distance(got, want) < 1e-12


def test_decoding_after_a_loop_that_leaves_out_the_last_steps() -> None:
    pipe, given = sdxl(), text(1, pooled_prompt_embeds=32, negative_pooled_prompt_embeds=32)
    want = sample(pipe, **given, denoising_end=0.6, output_type="np")
    with parallel_sampling(pipe, tolerance=0.0) as run:
        got = sample(pipe, **given, denoising_end=0.6, output_type="np")
    assert abs(got - want).max() < 1e-6
    assert 0 < run.stats.rounds < STEPS


class FromPicture(diffusers.DDIMPipeline):
    """A loop that begins with what a network makes of a picture, and returns that, too."""

    def __init__(self, unet: Any, scheduler: Any, image_encoder: Any) -> None:
        super().__init__(unet, scheduler)
        self.register_modules(image_encoder=image_encoder)

    @torch.no_grad()
    def __call__(self, image: torch.Tensor, steps: int, generator: Any = None) -> Any:
        self.scheduler.set_timesteps(steps)
        seen, other = self.image_encoder(image), self.image_encoder(-image)
        x = seen + other**2 + torch.randn(image.shape, generator=generator, dtype=image.dtype)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(x, t).sample, t, x).prev_sample
        return x, seen, other, self.image_encoder(x)


def test_networks_before_and_after_the_loop_give_what_they_should() -> None:
    tiny = ddim_pipeline()
    encoder = torch.nn.Conv2d(3, 3, 3, padding=1).double()
    pipe = FromPicture(tiny.unet, tiny.scheduler, encoder)
    given = {"image": picture()[..., :8, :8], "steps": STEPS}
    want = pipe(**given, generator=generator())
    calls = watch(encoder, lambda image: None)
    with parallel_sampling(pipe, tolerance=0.0):
        got = pipe(**given, generator=generator())
    assert max(map(distance, got, want)) < 1e-12
    assert len(calls) == 3


def test_a_second_loop_is_left_to_the_pipeline() -> None:
    """As of MarigoldPipeline with several predictions, and of FreeInit."""
    tiny = ddim_pipeline()
    pipe = Odd(tiny.unet, tiny.scheduler)
    want = pipe("two loops", generator=generator())[0]
    with pytest.warns(UserWarning, match="more than one loop"), parallel_sampling(pipe, tolerance=0.0) as run:
        got = pipe("two loops", generator=generator())[0]
    assert distance(got, want) < 1e-12
    assert run.status is Status.CONVERGED
    assert "more than one loop" in str(run.reason)


# ---------------------------------------------------------------- the pipeline afterwards


def state_of(pipe: Any) -> dict[str, Any]:
    """Everything about a pipeline that a block could leave changed."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {
        "class": type(pipe),
        "attributes": {name: id(value) for name, value in vars(pipe).items() if name != "scheduler"},
        "scheduler class": type(pipe.scheduler),
        "modules": {name: sorted(vars(part)) for name, part in modules.items()},
        "forwards": {name: getattr(part.forward, "__func__", part.forward) for name, part in modules.items()},
        "weights": {name: [value.clone() for value in part.state_dict().values()] for name, part in modules.items()},
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def test_the_pipeline_is_unchanged_after_the_block() -> None:
    pipe = stable_diffusion()
    sample(pipe)
    before, scheduler = state_of(pipe), copy.deepcopy(vars(pipe.scheduler))
    with parallel_sampling(pipe):
        sample(pipe)
    after = state_of(pipe)
    assert same(before, after)
    assert same(scheduler, vars(pipe.scheduler))


@pytest.mark.parametrize("where", ["network", "callback", "preview", "arguments"])
def test_the_pipeline_is_unchanged_after_an_exception(where: str) -> None:
    pipe = stable_diffusion()
    want, before = sample(pipe), state_of(pipe)
    calls = []

    def fail(*args: Any) -> Any:
        calls.append(args)
        raise KeyError("boom")

    options = {"preview": fail} if where == "preview" else {}
    changes = {"callback_on_step_end": fail} if where == "callback" else {}
    if where == "arguments":
        changes = {"prompt": "given twice"}
    if where == "network":
        own = pipe.unet.forward
        watch(pipe.unet, lambda sample, *args, **kwargs: fail() if len(sample) > 2 else None)
        before = state_of(pipe)
    kind, told = (ValueError, "`prompt`") if where == "arguments" else (KeyError, "^'boom'(\n|$)")
    with pytest.raises(kind, match=told), parallel_sampling(pipe, **options) as run:
        sample(pipe, **changes)
    assert same(before, state_of(pipe))
    assert run.status is Status.FAILED
    if where == "network":
        pipe.unet.forward = own
    assert torch.equal(sample(pipe), want)


def test_attention_processors_that_a_pipeline_sets_for_its_loop_are_taken_back() -> None:
    """Perturbed-attention guidance takes its own back after the loop, which the first pass does not reach."""
    pipe = pag()
    want = sample(pipe, pag_scale=3.0)
    before = dict(pipe.unet.attn_processors)
    with pytest.raises(PipelineNotParallelError, match="pass pag_scale=0"), parallel_sampling(pipe):
        sample(pipe, pag_scale=3.0)
    assert pipe.unet.attn_processors == before
    with pytest.warns(UserWarning, match="pag_scale=0"), parallel_sampling(pipe, fallback="sequential"):
        assert torch.equal(sample(pipe, pag_scale=3.0), want)
    assert pipe.unet.attn_processors == before
    want = sample(pipe, pag_scale=0.0)
    with parallel_sampling(pipe, tolerance=0.0):
        assert distance(sample(pipe, pag_scale=0.0), want) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_that_splits_its_batch_is_refused_in_half_precision(dtype: torch.dtype) -> None:
    """There the rounding of a batch is as large as what perturbed attention changes."""
    pipe = pag()
    for part in (pipe.unet, pipe.vae):
        part.to(dtype)
    given = {name: value.to(dtype) for name, value in text().items()}
    with pytest.raises(PipelineNotParallelError, match="perturbed-attention"), parallel_sampling(pipe):
        sample(pipe, **given, pag_scale=3.0)


def test_signatures_are_kept() -> None:
    """Pipelines look at them, and drop ``generator`` and ``eta`` where step does not name them."""
    pipe, seen = stable_diffusion(), {}

    def look(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen["step"] = inspect.signature(pipe.scheduler.step)
        seen["forward"] = inspect.signature(pipe.unet.forward)
        seen["call"] = inspect.signature(type(pipe).__call__)
        seen["name"], seen["class"] = type(pipe).__name__, type(pipe.scheduler).__name__
        seen["equal"] = not operator.ne(type(pipe.scheduler), DDIMScheduler)
        return given

    own = type(pipe), type(pipe.scheduler), type(pipe.unet)
    with parallel_sampling(pipe):
        sample(pipe, callback_on_step_end=look)
    assert seen["call"] == inspect.signature(own[0].__call__)
    assert seen["step"] == inspect.signature(own[1](**{}).step)
    assert seen["forward"] == inspect.signature(pipe.unet.forward)
    assert (seen["name"], seen["class"]) == (own[0].__name__, own[1].__name__)
    assert seen["equal"]


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


# ---------------------------------------------------------------- blocks, copies and threads


def test_of_nested_blocks_the_inner_one_counts() -> None:
    pipe = stable_diffusion()
    want, own = sample(pipe), type(pipe)
    with parallel_sampling(pipe, window=1) as outer, parallel_sampling(pipe, tolerance=0.0) as inner:
        got = sample(pipe)
    assert distance(got, want) < 1e-12
    assert outer.status is None
    assert inner.stats.rounds > 0
    assert type(pipe) is own


def test_a_copy_of_the_pipeline_may_outlive_the_block() -> None:
    pipe = stable_diffusion()
    with parallel_sampling(pipe):
        copied = copy.copy(pipe)
    assert torch.equal(sample(copied), sample(pipe))


@pytest.mark.parametrize("both", [False, True])
def test_pipelines_in_two_threads_may_share_a_network(both: bool) -> None:
    one = stable_diffusion()
    other = diffusers.StableDiffusionPipeline(**one.components | {"scheduler": ddim()}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    wanted, results = [sample(one), sample(other, **text(2))], [[], []]
    ready = threading.Barrier(2)

    def work(number: int, pipe: Any, parallel: bool, given: dict[str, Any]) -> None:
        ready.wait()
        for _ in range(4):
            with parallel_sampling(pipe, tolerance=0.0) if parallel else contextlib.nullcontext():
                results[number].append(sample(pipe, **given))

    threads = [
        threading.Thread(target=work, args=(0, one, True, {})),
        threading.Thread(target=work, args=(1, other, both, text(2))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(results, wanted, strict=True):
        assert len(got) == 4
        assert max(distance(tensor, want) for tensor in got) < 1e-12
    assert "forward" not in vars(one.unet)


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
    assert calls < hook.calls <= calls + run.stats.calls + 2


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


# ---------------------------------------------------------------- cost


def test_conditioning_is_repeated_once() -> None:
    pipe = stable_diffusion()
    places = watch(pipe.unet, lambda *args, encoder_hidden_states, **kwargs: encoder_hidden_states.data_ptr())
    with parallel_sampling(pipe, window=4, tolerance=0.0) as run:
        sample(pipe, num_inference_steps=40)
    assert run.stats.rounds > 20
    assert len(set(places)) <= 4  # the pipeline's own of two passes, and the first rounds' until the window is full


def test_nothing_of_a_run_outlives_it() -> None:
    """Not until garbage is collected either, as it may hold much of a GPU's memory."""
    pipe, given = stable_diffusion(), text()

    def tensors() -> int:
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    def call() -> None:
        with parallel_sampling(pipe):
            sample(pipe, **given)

    call()
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        call()
        assert tensors() == before
    finally:
        gc.enable()


def test_a_copy_of_the_scheduler_may_outlive_the_block() -> None:
    tiny = ddim_pipeline()
    pipe = Odd(tiny.unet, tiny.scheduler)
    with parallel_sampling(pipe):
        pipe("copied scheduler", generator=generator())
    copied = pipe.kept
    x = torch.ones(1, 3, 8, 8, dtype=torch.float64)
    t = pipe.scheduler.timesteps[0]
    assert torch.equal(copied.step(x, t, x).prev_sample, pipe.scheduler.step(x, t, x).prev_sample)
