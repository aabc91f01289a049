"""Pipelines with every kind of scheduler: what it keeps from its last run, and what it is given in this one."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch

from parasolver_adapters.diffusers import PipelineNotParallelError, parallel_sampling
from parasolver_adapters.diffusers.passes import first_pass
from tests.adapters.scheduler_survey import classes
from tests.adapters.tiny_pipelines import ddim, distance, generator, picture, sd3, stable_diffusion, text

pytestmark = pytest.mark.usefixtures("quiet_diffusers")


def pipeline(name: str, dtype: Any = torch.float64, **options: Any) -> Any:
    """A tiny pipeline with the scheduler of that name."""
    flows = name.startswith("FlowMatch")
    pipe, kind = sd3() if flows else stable_diffusion(), classes()[f"{name}Scheduler"]
    pipe.scheduler = kind(**options) if flows else kind.from_config(ddim().config, **options)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(dtype)
    return pipe


def sample(pipe: Any, dtype: Any = torch.float64, **changes: Any) -> torch.Tensor:
    flows = hasattr(pipe, "transformer")
    size = {"height": 16, "width": 16} if flows else {}
    pooled = {"pooled_prompt_embeds": 16, "negative_pooled_prompt_embeds": 16} if flows else {}
    embeds = {key: value.to(dtype) for key, value in text(**pooled).items()}
    given = {"num_inference_steps": 6, "generator": generator(), "output_type": "latent"}
    return pipe(**given | embeds | size | changes).images


LEAVING = ["HeunDiscrete", "PNDM", "SASolver", "KDPM2AncestralDiscrete", "FlowMatchHeunDiscrete"]


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.bfloat16) for name in LEAVING), ("HeunDiscrete", torch.float32)]
)
def test_states_that_a_scheduler_keeps_of_its_last_run(name: str, dtype: Any, monkeypatch: Any) -> None:
    """NumPy has no bfloat16; and the scheduler's steps are read once, whatever a run has left behind."""
    pipe, read, own = pipeline(name, dtype), [], first_pass.read_scheduler
    want = sample(pipe, dtype)
    monkeypatch.setattr(first_pass, "_RULES", {})
    monkeypatch.setattr(first_pass, "read_scheduler", lambda *a, **k: read.append(a) or own(*a, **k))
    for _ in range(2):
        with parallel_sampling(pipe, tolerance=0.0, fallback="sequential") as run:
            got = sample(pipe, dtype)
        assert run.reason is None
        assert distance(got, want) < 20 * torch.finfo(dtype).eps
    assert len(read) == 1


def changing(at: int, seen: list[int]) -> Any:
    def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return {"latents": given["latents"] * 1.01} if step == at else {}

    return callback


SPREAD: dict[str, Any] = {"PNDM": {"skip_prk_steps": True}, "UniPCMultistep": {}}


@pytest.mark.parametrize("name", SPREAD)
def test_a_scheduler_is_given_what_the_network_is_expected_to_say_between_spread_nodes(name: str) -> None:
    """It would keep the blank network's output, and later steps would be made of that."""
    pipe = pipeline(name, **SPREAD[name])
    pipe.unet.conv_out.weight.data *= 6
    seen: list[int] = []
    given = {"num_inference_steps": 50, "guidance_scale": 7.5}
    want = sample(pipe, **given)
    with parallel_sampling(pipe, window=16, tolerance=0.05) as run:
        got = sample(pipe, **given, callback_on_step_end=changing(-1, seen))
    assert run.stats.rounds < 16
    assert run.reason is None
    assert distance(got, want) < 0.02
    assert seen == sorted(set(seen))


@pytest.mark.parametrize("fallback", ["error", "sequential"])
def test_a_change_of_the_latents_between_spread_nodes(fallback: Any) -> None:
    """The remaining steps read what the scheduler was given before."""
    pipe, given = pipeline("UniPCMultistep"), {"num_inference_steps": 50, "guidance_scale": 7.5}
    pipe.unet.conv_out.weight.data *= 6
    expected: list[int] = []
    seen: list[int] = []
    want = sample(pipe, **given, callback_on_step_end=changing(26, expected))
    with (
        pytest.warns(UserWarning, match="callback_on_step_end changed"),
        parallel_sampling(pipe, window=16, tolerance=0.05, fallback=fallback),
    ):
        got = sample(pipe, **given, callback_on_step_end=changing(26, seen))
    assert distance(got, want) < 3e-3  # it was 1.3e-2
    assert seen == expected == list(range(50))


class LateDeceiver(diffusers.DDIMScheduler):
    """Is another one from its fifth step on, with a state of four channels."""

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
        if sample.shape[1] == 4 and timestep <= self.timesteps[5]:  # the probes have one channel
            model_output = model_output * 1.5
        return super().step(model_output, timestep, sample, return_dict=return_dict)


@pytest.mark.parametrize("fallback", ["error", "sequential"])
def test_what_is_found_after_the_first_callback_is_no_refusal(fallback: Any) -> None:
    pipe, seen = stable_diffusion(scheduler=LateDeceiver.from_config(ddim().config)), []
    given = {"num_inference_steps": 12}
    want = sample(pipe, **given)
    with (
        pytest.warns(UserWarning, match=r"sampled sequentially: step 5 of LateDeceiver is off its own table"),
        parallel_sampling(pipe, tolerance=0.0, fallback=fallback) as run,
    ):
        got = sample(pipe, **given, callback_on_step_end=changing(-1, seen))
    assert distance(got, want) < 1e-12
    assert seen == list(range(12))
    assert "step 5" in str(run.reason)


def test_a_strength_that_leaves_no_steps_says_so() -> None:
    pipe = stable_diffusion("StableDiffusionImg2ImgPipeline")
    given = {"image": picture(), "strength": 0.05}
    with (
        pytest.raises(PipelineNotParallelError, match=r"strength=0\.05 leaves no steps of the loop; pass a larger one"),
        parallel_sampling(pipe),
    ):
        sample(pipe, **given)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_blocks_may_be_left_in_any_order(order: tuple[int, ...]) -> None:
    pipe = stable_diffusion()
    own, want = type(pipe), sample(pipe)
    blocks = [parallel_sampling(pipe, window=window, tolerance=0.0) for window in (2, 3, 4)]
    runs = [block.__enter__() for block in blocks]
    copied = copy.copy(pipe)
    with parallel_sampling(copied, window=5, tolerance=0.0):
        left = {0, 1, 2}
        for number in order:
            blocks[number].__exit__(None, None, None)
            left.remove(number)
            for run in runs:
                run.status = None
            assert distance(sample(pipe), want) < 1e-12
            assert [run.status is not None for run in runs] == [bool(left) and one == max(left) for one in range(3)]
        assert type(pipe) is own
    assert torch.equal(sample(copied), want)


@pytest.mark.filterwarnings("ignore:Should have")  # torchsde, of times that differ in the last digit
def test_noise_that_is_correlated_is_drawn_without_a_word() -> None:
    """The warning is for who calls ``solve``; warnings are errors here."""
    pytest.importorskip("torchsde")
    pipe = pipeline("DPMSolverSDE")
    torch.manual_seed(3)
    want = sample(pipe)
    torch.manual_seed(3)
    with parallel_sampling(pipe, tolerance=0.0) as run:
        got = sample(pipe)
    assert run.reason is None
    assert distance(got, want) < 1e-5


def test_a_loop_that_leaves_out_what_a_step_needs_raises_what_it_did() -> None:
    pipe = pipeline("CogVideoXDPM")
    with pytest.raises(TypeError, match="missing 2 required positional arguments") as plain:
        sample(pipe)
    with pytest.raises(TypeError) as told, parallel_sampling(pipe):
        sample(pipe)
    assert str(told.value) == str(plain.value)
