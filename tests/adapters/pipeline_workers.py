"""Pipelines in several processes, for ``launch``: each scenario runs in every rank and returns what the rank saw."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from parasolver_adapters.diffusers import parallel_sampling
from parasolver_adapters.distributed import WorkerError
from tests.adapters.pipeline_families import FAMILIES
from tests.adapters.pipeline_survey import REFUSALS
from tests.adapters.tiny_pipelines import distance, generator, randn, stable_diffusion, text, watch
from tests.adapters.workers import FOREVER


def shared(pipe: Any, **options: Any) -> Any:
    """A block whose rounds all processes share."""
    return parallel_sampling(pipe, **{"group": dist.group.WORLD, "timeout": 20.0, "tolerance": 0.0} | options)


def sample(pipe: Any, **changes: Any) -> torch.Tensor:
    given = {"num_inference_steps": 10, "generator": generator(), "output_type": "latent"} | text() | changes
    return pipe(**given).images


def bits(latents: torch.Tensor) -> list[int]:
    return latents.contiguous().flatten().view(torch.uint8).tolist()


def families(rank: int, titles: list[str]) -> dict[str, Any]:
    """Each pipeline alone and shared, with a tolerance."""
    diffusers.logging.set_verbosity_error()
    seen = {}
    for family in (one for one in FAMILIES if one.title in titles):
        pipe = family.build()
        with parallel_sampling(pipe, tolerance=1e-2) as alone:
            want = family.call(pipe)
        with shared(pipe, tolerance=1e-2) as run:
            got = family.call(pipe)
        seen[family.title] = {
            "bits": bits(got),
            "difference": distance(got, want) / family.limit,
            "rounds": (run.stats.rounds, alone.stats.rounds),
            "evaluations": (run.stats.evaluations, alone.stats.evaluations),
        }
    return seen


def shares(rank: int) -> dict[str, Any]:
    """The rows of each call that a process makes, with a limit; over a mesh."""
    pipe = stable_diffusion()
    rows = watch(pipe.unet, lambda latents, *args, **kwargs: latents.shape[0])
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("solver",))
    with shared(pipe, window=8, max_rows=2, group=mesh["solver"]) as run:
        got = sample(pipe)
    return {"rows": rows, "evaluations": run.stats.evaluations, "difference": distance(got, sample(pipe))}


def disagree(rank: int) -> dict[str, Any]:
    """Rank 1 is called with something else, in several ways; then both with the same."""
    others: dict[str, dict[str, Any]] = {
        "seed": {"generator": generator(1)},
        "prompt": {"prompt_embeds": 2 * text()["prompt_embeds"]},
        "guidance": {"guidance_scale": 3.0},
        "steps": {"num_inference_steps": 9},
        "window": {},
        "network": {},
        "noise": {"generator": generator(1), "latents": randn(1, 4, 16, 16)},
    }
    seen = {}
    for name, given in others.items():
        pipe = stable_diffusion(scheduler=diffusers.DDPMScheduler()) if name == "noise" else stable_diffusion()
        if rank == 1 and name == "network":
            pipe.unet.conv_in.weight.data *= 1.01
        window = 4 if rank == 1 and name == "window" else 5
        common = {"latents": given["latents"]} if "latents" in given else {}
        options = {"window": window}
        seen[name] = _error(lambda: _call(pipe, options, given if rank == 1 else common))  # noqa: B023
    return seen | {"nothing": _error(lambda: _call(stable_diffusion(), {}, {}))}


def fails(rank: int, fault: str, call: int) -> dict[str, Any]:
    """The network of rank 1 raises, or its process dies, in one of its calls."""
    pipe, calls = stable_diffusion(), []
    own: Callable[..., Any] = pipe.unet.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if rank == 1 and len(calls) == call:
            if fault == "die":
                os._exit(3)
            raise ValueError("boom")
        return own(*args, **kwargs)

    pipe.unet.forward = forward
    return _error(lambda: _call(pipe, {"timeout": FOREVER}, {}), Exception)


def leaves(rank: int, how: str) -> dict[str, Any]:
    """Rank 1 leaves a run alone; then both make one more."""
    pipe = stable_diffusion()

    def callback(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if rank == 1 and step == 3:
            if how == "callback":
                raise KeyError("mine")
            if how == "latents":
                return {"latents": given["latents"] * 1.5}
        return given

    def preview(rounds: int, latents: torch.Tensor) -> None:
        if rank == 1 and how == "preview" and rounds == 3:
            raise OSError("no room for the preview")

    warnings.simplefilter("ignore")  # the rest is sampled sequentially
    given = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents"]}
    seen = _error(lambda: _call(pipe, {"preview": preview}, given), Exception)
    with shared(pipe):
        return seen | {"after": bits(sample(pipe))}


def refused(rank: int) -> dict[str, Any]:
    """Pipelines that cannot be sampled in parallel are left to themselves, in every process alike."""
    diffusers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    seen = {}
    for refusal in (one for one in REFUSALS if one.repeats):
        with shared(pipe := refusal.build(), fallback="sequential") as run:
            seen[refusal.what] = bits(refusal.call(pipe))
        assert run.reason is not None
    return seen


def _call(pipe: Any, options: dict[str, Any], given: dict[str, Any]) -> None:
    with shared(pipe, **options):
        sample(pipe, **given)


def _error(call: Callable[[], Any], kind: type[Exception] = WorkerError) -> dict[str, Any]:
    try:
        call()
    except kind as error:
        return {"type": type(error).__name__, "text": str(error)}
    return {"type": None}
