"""Networks of diffusers as denoisers, against the pipelines that they are part of."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from parasolver_adapters.diffusers import TransformerDenoiser, UNetDenoiser, step_rule_from_scheduler
from parasolver_adapters.embedded import NO_CLASS, EmbeddedDenoiser, load_embedded_model
from parasolver_core import solve
from tests.adapters.pipeline_families import FAMILIES
from tests.adapters.tiny_pipelines import (
    DTYPE,
    ddpm_pipeline,
    distance,
    dit,
    flux,
    generator,
    randn,
    sdxl,
    stable_diffusion,
    text,
    unconditional_unet,
    watch,
)

pytestmark = pytest.mark.usefixtures("quiet_diffusers")

STEPS = 12


def prompts(given: dict[str, Any], name: str = "encoder_hidden_states") -> tuple[dict[str, Any], dict[str, Any]]:
    return {name: given["prompt_embeds"]}, {name: given["negative_prompt_embeds"]}


def sampled(denoiser: Any, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """By ``solve`` alone, with the pipeline's scheduler."""
    rule = step_rule_from_scheduler(pipe.scheduler, STEPS)
    with torch.no_grad():
        return solve(denoiser, latents, rule.timesteps, rule, 5, tolerance=0.0).sample


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_stable_diffusion(batched: bool, rescale: float) -> None:
    pipe, given, latents = stable_diffusion(), text(), randn(1, 4, 16, 16, seed=3)
    want = pipe(**given, latents=latents, num_inference_steps=STEPS, output_type="latent", guidance_rescale=rescale)[0]
    positive, negative = prompts(given)
    denoiser = UNetDenoiser(
        pipe.unet, positive, negative=negative, guidance_scale=7.5, guidance_rescale=rescale, batched=batched
    )
    assert distance(sampled(denoiser, pipe, latents), want) < 1e-12


def test_a_batch_of_prompts_is_one_state() -> None:
    pipe, given, latents = stable_diffusion(), text(2), randn(2, 4, 16, 16, seed=3)
    given["negative_prompt_embeds"] = given["negative_prompt_embeds"][:1].repeat(2, 1, 1)
    want = pipe(**given, latents=latents, num_inference_steps=STEPS, output_type="latent")[0]
    positive = {"encoder_hidden_states": given["prompt_embeds"]}
    empty = {"encoder_hidden_states": given["negative_prompt_embeds"][:1]}  # one for all
    denoiser = UNetDenoiser(pipe.unet, positive, negative=empty, guidance_scale=7.5)
    assert distance(sampled(denoiser, pipe, latents[None])[0], want) < 1e-12
    with pytest.raises(ValueError, match=r"x_T\[None\]"):
        denoiser(torch.cat([latents, latents[:1]]), torch.zeros(3))


def test_added_conditions() -> None:
    pipe, latents = sdxl(), randn(1, 4, 16, 16, seed=3)
    given = text(1, pooled_prompt_embeds=32, negative_pooled_prompt_embeds=32)
    want = pipe(**given, latents=latents, num_inference_steps=STEPS, output_type="latent")[0]
    times = torch.tensor([[32.0, 32, 0, 0, 32, 32]], dtype=DTYPE)
    positive, negative = (
        embeds | {"added_cond_kwargs": {"text_embeds": given[f"{kind}pooled_prompt_embeds"], "time_ids": times}}
        for kind, embeds in zip(("", "negative_"), prompts(given), strict=True)
    )
    denoiser = UNetDenoiser(pipe.unet, positive, negative=negative, guidance_scale=5.0)
    assert distance(sampled(denoiser, pipe, latents), want) < 1e-12


def test_a_learned_variance_is_dropped() -> None:
    """DiT predicts twice the channels; its pipeline guides by the empty class, number 1000."""
    pipe = dit()
    want = pipe([7], num_inference_steps=STEPS, generator=generator(), output_type="np", guidance_scale=4.0).images
    latents = torch.randn(1, 4, 8, 8, generator=generator(), dtype=DTYPE)
    label, empty = ({"class_labels": torch.tensor([one])} for one in (7, 1000))
    denoiser = TransformerDenoiser(pipe.transformer, label, negative=empty, guidance_scale=4.0)
    rule = step_rule_from_scheduler(pipe.scheduler, STEPS, clipping="denoiser")
    with torch.no_grad():
        got = solve(rule.wrap_denoiser(denoiser), latents, rule.timesteps, rule, 5, tolerance=0.0).sample
        picture = pipe.vae.decode(got / pipe.vae.config.scaling_factor).sample / 2 + 0.5
    assert abs(picture.clamp(0, 1).permute(0, 2, 3, 1).numpy() - want).max() < 1e-5  # pictures are float32


def test_embedded_guidance_of_packed_latents() -> None:
    pipe = flux()
    given = next(one for one in FAMILIES if one.title == "FluxPipeline").given() | {"guidance_scale": 3.5}
    latents = randn(1, 16, 16, seed=3)
    want = pipe(**given, latents=latents, num_inference_steps=STEPS)[0]
    denoiser = TransformerDenoiser(
        pipe.transformer,
        {"encoder_hidden_states": given["prompt_embeds"], "pooled_projections": given["pooled_prompt_embeds"]},
        timestep_scale=1e-3,
        embedded_guidance=3.5,
        constants={
            "txt_ids": torch.zeros(5, 3, dtype=DTYPE),
            "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)).to(DTYPE),
        },
    )
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS))  # as the pipeline does
    rule = step_rule_from_scheduler(pipe.scheduler)
    with torch.no_grad():
        got = solve(denoiser, latents, rule.timesteps, rule, 5, tolerance=0.0).sample
    assert distance(got, want) < 1e-6  # the scheduler's tables are float32


def test_no_condition_and_a_stochastic_sampler() -> None:
    pipe, draws = ddpm_pipeline(), generator()
    pipe.scheduler.register_to_config(clip_sample=False)
    latents = torch.randn(1, 3, 8, 8, generator=draws, dtype=DTYPE)
    rule = step_rule_from_scheduler(pipe.scheduler, STEPS)
    noise = rule.noise(draws, latents.shape, DTYPE)
    denoiser = UNetDenoiser(pipe.unet)
    with torch.no_grad():
        got = solve(denoiser, latents, rule.timesteps, rule, 5, tolerance=0.0, noise=noise).sample
    want = pipe(generator=generator(), num_inference_steps=STEPS, output_type="np").images
    assert abs((got / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() - want).max() < 1e-6


def test_the_embedded_model_guides_as_written() -> None:
    x, t = randn(3, 1, 28, 28), torch.tensor([999, 500, 3])
    guided = EmbeddedDenoiser(labels=4, guidance_scale=2.5, model=load_embedded_model(DTYPE))
    with torch.no_grad():
        with_class, without = (guided.model(x, t, class_labels=torch.full((3,), one)).sample for one in (4, NO_CLASS))
        got = guided(x, t)
    torch.testing.assert_close(got, without + 2.5 * (with_class - without), rtol=0, atol=1e-12)


@pytest.mark.parametrize("batched", [True, False])
def test_conditions_are_expanded_once(batched: bool) -> None:
    pipe, given = stable_diffusion(), text()
    places = watch(pipe.unet, lambda *args, encoder_hidden_states, **kwargs: encoder_hidden_states.data_ptr())
    positive, negative = prompts(given)
    denoiser = UNetDenoiser(pipe.unet, positive, negative=negative, guidance_scale=7.5, batched=batched)
    x = randn(6, 4, 16, 16)
    with torch.no_grad():
        for rows in (6, 2, 5, 6):
            denoiser(x[:rows], torch.full((rows,), 500))
    assert len(places) == (4 if batched else 8)
    assert len(set(places)) == (1 if batched else 2)


def test_two_threads_share_a_denoiser() -> None:
    pipe, given = stable_diffusion(), text()
    denoiser = UNetDenoiser(pipe.unet, prompts(given)[0])
    x, t = randn(4, 4, 16, 16), torch.tensor([900, 600, 300, 0])
    failed: list[Any] = []

    def work(rows: int) -> None:
        with torch.no_grad():
            want = torch.cat([denoiser(x[i : i + 1], t[i : i + 1]) for i in range(rows)])
            if not torch.allclose(denoiser(x[:rows], t[:rows]), want, rtol=0, atol=1e-12):
                failed.append(rows)

    threads = [threading.Thread(target=work, args=(rows,)) for rows in (4, 2, 3, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"guidance_scale": 2.0}, ValueError, "guidance_scale: needs negative"),
        ({"negative": {"class_labels": torch.tensor([1])}}, ValueError, "negative: without guidance_scale"),
        ({"guidance_rescale": 2.0}, ValueError, "guidance_rescale"),
        ({"conditions": {"class_labels": 3}}, TypeError, "constants"),
        ({"conditions": {"a": torch.zeros(2), "b": torch.zeros(3)}}, ValueError, r"\[2, 3\]"),
        (
            {"conditions": {"a": torch.zeros(1, 2)}, "negative": {"a": torch.zeros(1, 3)}, "guidance_scale": 2.0},
            ValueError,
            "batched=False",
        ),
        ({"model": 3}, TypeError, "model: expected a network"),
    ],
)
def test_bad_arguments(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        UNetDenoiser(**{"model": unconditional_unet()} | given)
