"""Parallel sampling of diffusers pipelines, against the untouched pipelines."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from parasolver_adapters.diffusers import parallel_sampling
from parasolver_core import Status
from tests.adapters.pipeline_calls import STEPS, sample
from tests.adapters.pipeline_families import FAMILIES, Family
from tests.adapters.pipeline_survey import Odd
from tests.adapters.tiny_pipelines import (
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

pytestmark = pytest.mark.usefixtures("quiet_diffusers")


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


@pytest.mark.parametrize("scheduler", [diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler])
def test_subintervals(scheduler: Any) -> None:
    """Callbacks see every step, also those between the borders."""
    pipe = stable_diffusion()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    seen: list[list[torch.Tensor]] = [[], []]

    def watch_steps(way: int) -> Any:
        def callback(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
            seen[way].append(given["latents"].clone())
            return given

        return callback

    want = sample(pipe, callback_on_step_end=watch_steps(0))
    with parallel_sampling(pipe, window=3, tolerance=0.0, subintervals=5) as run:
        got = sample(pipe, callback_on_step_end=watch_steps(1))
    assert distance(got, want) < 1e-5
    assert len(seen[1]) == len(seen[0]) == STEPS
    assert max(map(distance, seen[1], seen[0])) < 1e-5
    assert run.stats.rounds == sum(record.turns for record in run.stats.history)
    assert max(record.turns for record in run.stats.history) == 3


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler])
def test_autocast_around_the_pipeline(kind: Any, dtype: torch.dtype) -> None:
    """Steps of single precision read outputs of half precision; they seemed to be off their table, and were refused."""
    pipe = stable_diffusion(scheduler=kind.from_config(ddim().config)).to(torch.float32)
    pipe.unet.conv_out.weight.data *= 4
    given = {name: value.float() for name, value in text().items()}
    with torch.autocast("cpu", dtype):
        want = sample(pipe, **given)
        with parallel_sampling(pipe, tolerance=0.0) as run:
            got = sample(pipe, **given)
    assert run.reason is None
    assert got.dtype == want.dtype == torch.float32
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
    looked = 4  # calls of the loop itself, the first time, to compare them with what was recorded, and again
    assert run.stats.calls == run.stats.rounds == len(history) == len(rows) - looked
    compared = 8  # rows of the pipeline's own call, to compare a batch of the look and one of the first round with
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


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler"])
def test_the_global_generator_may_be_given_by_name(name: str) -> None:
    """As ``torch.manual_seed`` returns it; schedulers seemed to ignore it."""
    pipe = stable_diffusion(scheduler=getattr(diffusers, name).from_config(ddim().config))
    want = sample(pipe, generator=torch.manual_seed(0))
    with parallel_sampling(pipe, tolerance=0.0) as run:
        got = sample(pipe, generator=torch.manual_seed(0))
    assert distance(got, want) < 1e-6
    assert run.stats.rounds > 1


class Around(diffusers.StableDiffusionPipeline):
    """As one has it who adds something before the call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().__call__(*args, **kwargs)


def test_a_pipeline_that_passes_its_arguments_on() -> None:
    """Those given by position were lost, or ended in an error about the length of a tuple."""
    pipe = stable_diffusion()
    pipe.__class__ = Around
    given: dict[str, Any] = {"output_type": "latent", **text()}
    want = pipe(None, 32, 32, STEPS, generator=generator(), **given).images
    with parallel_sampling(pipe, tolerance=0.0) as run:
        got = pipe(None, 32, 32, STEPS, generator=generator(), **given).images
    assert got.shape == want.shape == (1, 4, 16, 16)
    assert distance(got, want) < 1e-12
    assert run.steps == STEPS
