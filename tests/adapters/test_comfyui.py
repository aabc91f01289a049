"""The node for ComfyUI, beside stand-ins for its modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
import torch
from torch import Tensor

from comfyui_parasolver import NODE_CLASS_MAPPINGS
from comfyui_parasolver.nodes import Options, ParaSolverSampler, in_parallel
from comfyui_parasolver.replicas import replica
from parasolver_adapters.samplers import UnsupportedSamplerError
from tests.adapters.comfy_standins import (
    CONST,
    KSAMPLER,
    CancelledError,
    Cond,
    Control,
    Guider,
    Inpaint,
    ListCond,
    Model,
    comfy,
    sample_heun,
)
from tests.adapters.weights import relative

__all__ = ["comfy"]

SIGMAS = torch.cat([torch.linspace(14.6**0.2, 0.03**0.2, 24) ** 5, torch.zeros(1)])
FOLDER = Path(__file__).parents[2] / "adapters/comfyui_parasolver"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompt(seed: int, samples: int = 1, **more: Any) -> dict[str, Any]:
    return {"model_conds": {"c": Cond(normal(samples, 6, seed=seed))}, **more}


def sampler(name: str = "euler", window: int = 8, tolerance: float = 0.0, **more: Any) -> KSAMPLER:
    return ParaSolverSampler().get_sampler(name, window, tolerance, **more)[0]


def late(one: dict[str, Any]) -> Tensor:
    return one["denoised"] * (0.8 if one["sigma"][0] > 2 else 1.0)


HALVES = [prompt(1, timestep_end=2.0), prompt(2, timestep_start=2.0)]
MASK = (normal(3, 6, seed=8) > 0).float()
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]] = {
    "plain": ([prompt(1)], {}, {}),
    "a prompt for each sample": ([prompt(1, 3)], {}, {}),
    "a prompt for two of three": ([prompt(1, 2)], {}, {}),
    "time ranges": (HALVES, {}, {}),
    "time ranges that overlap": ([prompt(1, 3, timestep_end=0.7), prompt(2, timestep_start=4.0), prompt(3)], {}, {}),
    "a ControlNet in a range": ([prompt(1, control=Control(normal(3, 6), (9.0, 1.0)))], {}, {}),
    "two ControlNets": (
        [prompt(1, control=Control(normal(1, 6), (9.0, 1.0), Control(normal(3, 6, seed=4), (3.0, 0.1))))],
        {},
        {},
    ),
    "a mask": ([prompt(1)], {}, {"mask": MASK, "latent": normal(3, 6, seed=9)}),
    "a mask for all": (HALVES, {}, {"mask": MASK[:1], "latent": normal(3, 6, seed=9)}),
    "a patch that looks at the first row": ([prompt(1)], {}, {"model_options": {"sampler_post_cfg_function": [late]}}),
    "replicas": ([prompt(1, 3, timestep_end=0.7), prompt(2)], {"devices": "cpu, cpu"}, {"mask": MASK}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("s_noise", [0.0, 0.5])
def test_sample_is_the_sequential_one(comfy: ModuleType, case: str, s_noise: float) -> None:
    conds, chosen, run = CASES[case]
    own, ours = KSAMPLER(sampler().sampler_function.__wrapped__), sampler(**chosen)
    own.extra_options = ours.extra_options = {"s_noise": s_noise} if s_noise else {}
    want = own.sample(Guider({"positive": conds}), SIGMAS, normal(3, 6, seed=7), **run)
    got = ours.sample(Guider({"positive": conds}), SIGMAS, normal(3, 6, seed=7), **run)
    assert relative(got, want) < 3e-6


@pytest.mark.parametrize("prompts", [2, 3, 4, 5])
@pytest.mark.parametrize("tolerance", [0.0, 0.01])
def test_two_calls_at_one_sigma_meet_the_prompts_of_their_samples(
    comfy: ModuleType, prompts: int, tolerance: float
) -> None:
    """However many prompts there are for the three samples of the batch."""
    guider, noise = Guider({"positive": [prompt(1, prompts)]}), normal(3, 6, seed=7)
    want = KSAMPLER(sample_heun).sample(guider, SIGMAS, noise)
    got = in_parallel(KSAMPLER(sample_heun), Options(tolerance=tolerance)).sample(guider, SIGMAS, noise)
    assert relative(got, want) < max(3e-6, tolerance)


@pytest.mark.parametrize("samples", [2, 3, 4])
def test_pictures_in_a_list_meet_their_own_sample(comfy: ModuleType, samples: int) -> None:
    pictures = ListCond([normal(1, 6, seed=1), normal(samples, 6, seed=2)])
    guider, noise = Guider({"positive": [{"model_conds": {"ref_latents": pictures, "c": pictures}}]}), normal(3, 6)
    want = sampler(window=1).sample(guider, SIGMAS, noise)
    assert relative(sampler().sample(guider, SIGMAS, noise), want) < 3e-6


@pytest.mark.parametrize(("conds", "most"), [([prompt(1)], 15), (HALVES, 22)])
def test_steps_share_calls_as_far_as_conditions_allow(comfy: ModuleType, conds: Any, most: int) -> None:
    guider = Guider({"positive": conds})
    sampler(tolerance=0.01).sample(guider, SIGMAS, normal(1, 6))
    assert guider.inner_model.calls <= most


def test_a_patch_is_batched_where_the_user_says_so(comfy: ModuleType) -> None:
    calls = []
    for batched in (False, True):
        guider = Guider({"positive": [prompt(1)]})
        chosen = sampler(tolerance=0.01, batch_patches=batched)
        chosen.sample(guider, SIGMAS, normal(1, 6), model_options={"sampler_cfg_function": lambda one: one})
        calls.append(guider.inner_model.calls)
    assert calls[1] <= 15 < 40 < calls[0]


def test_flow_models_are_told_apart(comfy: ModuleType) -> None:
    guider = Guider({"positive": [prompt(1)]}, Model(CONST()))
    sigmas = torch.linspace(1, 0, 25)
    want = sampler(window=1).sample(guider, sigmas, normal(2, 6))
    assert relative(sampler().sample(guider, sigmas, normal(2, 6)), want) < 3e-6


def test_window_of_one_is_the_sampler_itself(comfy: ModuleType) -> None:
    own = KSAMPLER(sampler().sampler_function.__wrapped__)
    guider, noise = Guider({"positive": HALVES}), normal(3, 6)
    assert torch.equal(sampler(window=1).sample(guider, SIGMAS, noise), own.sample(guider, SIGMAS, noise))


def test_previews_come_once_a_step_and_in_order(comfy: ModuleType) -> None:
    seen: list[tuple[int, int]] = []
    guider = Guider({"positive": [prompt(1)]})
    sampler().sample(guider, SIGMAS, normal(1, 6), callback=lambda i, denoised, x, total: seen.append((i, total)))
    assert seen == [(i, 24) for i in range(24)]


@pytest.mark.parametrize("devices", ["", "cpu"])
def test_cancel_ends_the_run_in_the_next_round(comfy: ModuleType, devices: str) -> None:
    def cancel(i: int, *told: Any) -> None:
        comfy.interrupted = i == 0  # type: ignore[attr-defined]

    guider = Guider({"positive": [prompt(1)]})
    with pytest.raises(CancelledError) as raised:
        sampler(devices=devices).sample(guider, SIGMAS, normal(1, 6), callback=cancel)
    assert raised.value.solution.trajectory is not None  # type: ignore[attr-defined]


KEYFRAMES = SimpleNamespace(hooks=[SimpleNamespace(hook_keyframe=SimpleNamespace(keyframes=[0.5]))])


@pytest.mark.parametrize(
    ("conds", "run", "chosen", "message"),
    [
        ([prompt(1, hooks=KEYFRAMES)], {}, {}, "conditioning: hooks with keyframes .* remember where they are"),
        (
            [{"model_conds": {"c": Cond(normal(1, 6)), "num_video_frames": SimpleNamespace(cond=3)}}],
            {},
            {},
            "model: it takes the pictures of a batch for the frames of one video",
        ),
        ([prompt(1)], {"context_handler": 1}, {}, "model: context windows join the rows"),
        ([prompt(1)], {"transformer_options": {"easycache": 1}}, {}, "model: easycache keeps the last step's output"),
        (
            [prompt(1, control=Control(normal(1, 6), vae=object()))],
            {},
            {"devices": "cpu"},
            "devices: a ControlNet with a VAE",
        ),
        ([prompt(1)], {}, {"name": "euler_cfg_pp"}, "sampler: it changes model_options on the way to the model"),
    ],
)
def test_what_remembers_or_joins_steps_is_refused(
    comfy: ModuleType, conds: Any, run: Any, chosen: Any, message: str
) -> None:
    guider, noise = Guider({"positive": conds}), normal(3, 6)
    with pytest.raises(UnsupportedSamplerError, match=message):
        sampler(**chosen).sample(guider, SIGMAS, noise, model_options=run)
    own = KSAMPLER(sampler(chosen.get("name", "euler")).sampler_function.__wrapped__)
    with pytest.warns(UserWarning, match="sampled sequentially: " + message):
        got = sampler(**chosen, fallback="sequential").sample(guider, SIGMAS, noise, model_options=run)
    assert torch.equal(got, own.sample(guider, SIGMAS, noise, model_options=run))


def test_a_sampler_of_another_node_takes_the_place_of_the_name(comfy: ModuleType) -> None:
    given = KSAMPLER(sampler().sampler_function.__wrapped__, {"s_noise": 0.3})
    made = sampler(sampler=given)
    assert type(made) is KSAMPLER
    assert made.extra_options == {"s_noise": 0.3}
    assert given.sampler_function is not made.sampler_function
    with pytest.raises(ValueError, match="sampler: expected a SAMPLER that holds a sampler function"):
        in_parallel(object(), Options())
    with pytest.raises(ValueError, match="devices: expected names such as cuda:1"):
        sampler(devices="first, second")


def test_replica_is_on_its_device_and_leaves_weights_on_the_host_alone() -> None:
    guider = Guider({"positive": [prompt(1, control=Control(normal(1, 6)))]})
    made, extra_args = replica(Inpaint(guider), {"denoise_mask": MASK}, torch.device("meta"))
    (cond,) = made.inner_model.conds["positive"]
    assert made.inner_model.inner_model.weight.is_meta
    assert made.inner_model.model_patcher.model is made.inner_model.inner_model
    assert cond["model_conds"]["c"].cond.is_meta
    assert cond["control"].cond_hint_original.is_meta
    assert extra_args["denoise_mask"].is_meta
    assert made.inner_model.model_patcher.load_device.type == "meta"
    assert made.inner_model.model_patcher.patches is guider.model_patcher.patches
    assert not guider.inner_model.weight.is_meta


def test_folder_loads_as_comfyui_loads_it(comfy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("custom_nodes_x_parasolver", FOLDER / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    node = module.NODE_CLASS_MAPPINGS["ParaSolverSampler"]
    assert module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys() == NODE_CLASS_MAPPINGS.keys()
    inputs = node.INPUT_TYPES()
    assert node.RETURN_TYPES == ("SAMPLER",)
    assert inputs["required"]["sampler_name"][0] == ["euler", "euler_cfg_pp"]
    defaults = {name: one[1].get("default", one[0][0]) for name, one in inputs["required"].items()}
    (made,) = getattr(node(), node.FUNCTION)(**defaults)
    assert callable(made.sampler_function)
