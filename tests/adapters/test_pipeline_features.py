"""Features from inside a network, and what an earlier step left."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from tests.adapters.looping_pipelines import STEPS, hook, is_right, looping, predict, refused, with_feature
from tests.adapters.tiny_pipelines import randn, stable_diffusion, text

pytestmark = pytest.mark.usefixtures("quiet_diffusers")


# ---------------------------------------------------------------- features from inside


HOOKS = ("forward hook", "hook in an attention", "forward pre-hook", "hook of every module")


@pytest.mark.parametrize("kind", HOOKS)
def test_features_that_a_hook_takes_from_inside_the_network(kind: str) -> None:
    pipe, store = looping(), {}
    with hook(pipe, kind, store):
        refused(pipe, lambda pipe, i, t, x: with_feature(pipe, t, x, store), "features from inside a network .hooks on")


@pytest.mark.parametrize("kind", HOOKS)
def test_features_of_a_hook_that_the_loop_sets_and_of_a_store_that_it_empties(kind: str) -> None:
    """Where the networks are not really called the loop fails, in code of its own."""

    def change(pipe: Any, i: int, t: Any, x: torch.Tensor) -> torch.Tensor:
        store: dict[str, Any] = {}
        with hook(pipe, kind, store):
            return with_feature(pipe, t, x, store)

    refused(looping(), change, "the loop fails where the networks' outputs are not known yet .KeyError")


def test_features_that_are_used_late_only() -> None:
    pipe, store = looping(), {}

    def change(pipe: Any, i: int, t: Any, x: torch.Tensor) -> torch.Tensor:
        return with_feature(pipe, t, x, store) if i > STEPS - 3 else predict(pipe, t, x)

    with hook(pipe, "forward hook", store):
        refused(pipe, change, "step [67] as it was recorded")


def test_features_that_only_look_are_no_matter() -> None:
    pipe, store = looping(), {}
    with hook(pipe, "forward hook", store):
        is_right(pipe, lambda pipe, i, t, x: predict(pipe, t, x))


class Storing(diffusers.models.attention_processor.AttnProcessor):
    """Keeps what it returned."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.kept = super().__call__(*args, **kwargs)
        return self.kept


class Attending(diffusers.StableDiffusionPipeline):
    """Uses what an attention processor keeps."""

    @torch.no_grad()
    def __call__(self, change: Any = None) -> Any:
        self.scheduler.set_timesteps(STEPS)
        x, prompt = randn(1, 4, 16, 16), text()["prompt_embeds"]
        processor = next(one for one in self.unet.attn_processors.values() if isinstance(one, Storing))
        for t in self.scheduler.timesteps:
            m = self.unet(x, t, encoder_hidden_states=prompt).sample
            x = self.scheduler.step(m * (1 + processor.kept.mean()), t, x).prev_sample
        return (x,)


def test_features_that_an_attention_processor_stores() -> None:
    pipe = Attending(**stable_diffusion().components, requires_safety_checker=False)
    processors = dict(pipe.unet.attn_processors)
    pipe.unet.set_attn_processor(processors | {next(iter(processors)): Storing()})
    refused(pipe, lambda: None, "attention processors Storing")


# ---------------------------------------------------------------- what an earlier step left


def carried(pipe: Any, m: torch.Tensor, kept: Any) -> torch.Tensor:
    own, pipe.kept = pipe.kept, kept
    return m + 0.1 * own


def test_the_first_frame_of_the_state_before() -> None:
    """As in image-to-video of LTX and Sana, and in inpainting of IF."""

    def change(pipe: Any, i: int, t: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.cat([pipe.kept[:, :, :1], x[:, :, 1:]], dim=2)
        pipe.kept = x
        return predict(pipe, t, x), x

    refused(looping(), change, "carries a part of the previous state over, as image-to-video of LTX")


def test_momentum() -> None:
    refused(looping(), lambda pipe, i, t, x: carried(pipe, m := predict(pipe, t, x), m), "momentum")


def test_an_output_that_is_used_for_two_steps() -> None:
    """As caches of every other step have it; the reason was that it did not depend on the state."""

    def change(pipe: Any, i: int, t: Any, x: torch.Tensor) -> torch.Tensor:
        if i % 2 == 1 or i == 0:
            pipe.kept = predict(pipe, t, x)
        return pipe.kept

    refused(looping(), change, "a cache of what a network gave")


def test_momentum_that_recording_does_not_see() -> None:
    def change(pipe: Any, i: int, t: Any, x: torch.Tensor) -> torch.Tensor:
        m = predict(pipe, t, x)
        return carried(pipe, m, torch.from_dlpack(torch.utils.dlpack.to_dlpack(m.clone())))

    refused(looping(), change, "as it was recorded gives scheduler.step a model_output that is off")
