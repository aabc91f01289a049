"""Parallel denoising inside modular pipelines, against the same blocks without it."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance, SkipLayerGuidance
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxCoreDenoiseStep
from diffusers.modular_pipelines.modular_pipeline import SequentialPipelineBlocks
from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import (
    StableDiffusion3T2ICoreDenoiseStep,
)
from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import (
    StableDiffusionXLCoreDenoiseStep,
)

from parasolver_adapters.diffusers import PipelineNotParallelError, parallel_sampling
from parasolver_adapters.diffusers.modular import ParallelDenoiseStep
from parasolver_core import Status
from tests.adapters.tiny_pipelines import distance, flux, generator, sd3, sdxl, text

pytestmark = pytest.mark.usefixtures("quiet_diffusers")

STEPS = 12


def modular(core: Any, source: Any, options: dict[str, Any] | None, **components: Any) -> Any:
    """A modular pipeline of the one block, with the components of an ordinary pipeline."""
    block = core() if options is None else ParallelDenoiseStep(core(), **options)
    pipe = SequentialPipelineBlocks.from_blocks_dict({"denoise": block}).init_pipeline()
    own = {name: part for name, part in source.components.items() if name in pipe._component_specs}
    pipe.update_components(**own, **components)
    return pipe


def sdxl_text() -> dict[str, Any]:
    return text(1, pooled_prompt_embeds=32, negative_pooled_prompt_embeds=32) | {"height": 32, "width": 32}


def sd3_text() -> dict[str, Any]:
    return text(1, pooled_prompt_embeds=16, negative_pooled_prompt_embeds=16) | {"height": 16, "width": 16}


def flux_text() -> dict[str, Any]:
    return {name: value for name, value in sd3_text().items() if "negative" not in name}


@pytest.mark.parametrize(
    ("core", "build", "given", "limit"),
    [
        (StableDiffusionXLCoreDenoiseStep, sdxl, sdxl_text, 1e-12),
        (StableDiffusionXLCoreDenoiseStep, sdxl, lambda: sdxl_text() | {"eta": 1.0}, 1e-12),
        (StableDiffusion3T2ICoreDenoiseStep, sd3, sd3_text, 1e-6),  # parts of these are in float32
        (FluxCoreDenoiseStep, flux, flux_text, 1e-6),
    ],
    ids=["SDXL", "SDXL eta=1", "SD3", "Flux"],
)
def test_the_latents_are_those_of_the_same_blocks(core: Any, build: Any, given: Any, limit: float) -> None:
    source = build()

    def sample(options: dict[str, Any] | None) -> Any:
        return modular(core, source, options)(**given(), num_inference_steps=STEPS, generator=generator())

    want, exact, near = (sample(options) for options in (None, {"tolerance": 0.0}, {"window": 8}))
    assert distance(exact.latents, want.latents) < limit
    assert distance(near.latents, want.latents) < 1e-2
    run = near.parallel_run
    assert run.status is Status.CONVERGED
    assert run.stats.rounds < STEPS
    assert set(exact.values) == {*want.values, "parallel_run"}


def test_a_guider_that_changes_the_network_is_refused_or_left_alone() -> None:
    source = sd3()

    def sample(options: dict[str, Any] | None) -> Any:
        guider = SkipLayerGuidance(skip_layer_guidance_layers=[0], skip_layer_guidance_start=0.0)
        pipe = modular(StableDiffusion3T2ICoreDenoiseStep, source, options, guider=guider)
        return pipe(**sd3_text(), num_inference_steps=6, generator=generator())

    with pytest.raises(PipelineNotParallelError, match="SkipLayerGuidance changes the network"):
        sample({})
    with pytest.warns(UserWarning, match="sampled sequentially"):
        left = sample({"fallback": "sequential"})
    assert torch.equal(left.latents, sample(None).latents)
    assert "SkipLayerGuidance" in left.parallel_run.reason


def test_a_guider_with_momentum_is_refused() -> None:
    guider = AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=0.5)
    pipe = modular(StableDiffusionXLCoreDenoiseStep, sdxl(), {}, guider=guider)
    with pytest.raises(PipelineNotParallelError, match="an earlier step"):
        pipe(**sdxl_text(), num_inference_steps=6, generator=generator())


def test_the_bar_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = modular(StableDiffusionXLCoreDenoiseStep, sdxl(), {})
    pipe.set_progress_bar_config(desc="mine", mininterval=0)
    pipe(**sdxl_text(), num_inference_steps=6, generator=generator())
    shown = capsys.readouterr().err
    assert shown.count("mine:   0%|          | 0/6") == 1
    assert "6/6" in shown


def test_the_block_says_what_the_other_says() -> None:
    inner = StableDiffusionXLCoreDenoiseStep()
    step = ParallelDenoiseStep(inner, window=3)
    for name in ("inputs", "required_inputs", "expected_components", "expected_configs", "model_name"):
        assert getattr(step, name) == getattr(inner, name)
    assert [one.name for one in step.intermediate_outputs][-1] == "parallel_run"
    assert "StableDiffusionXLCoreDenoiseStep" in step.description


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="step: expected a block"):
        ParallelDenoiseStep(StableDiffusionXLCoreDenoiseStep)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="window"):
        ParallelDenoiseStep(StableDiffusionXLCoreDenoiseStep(), window=0)
    pipe = modular(StableDiffusionXLCoreDenoiseStep, sdxl(), None)
    assert isinstance(pipe, diffusers.ModularPipeline)
    with pytest.raises(TypeError, match="ParallelDenoiseStep"), parallel_sampling(pipe):
        pass
