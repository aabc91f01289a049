"""What a block leaves behind: of the pipeline, of copies and threads, and of memory."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import operator
import threading
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler

from parasolver_adapters.diffusers import PipelineNotParallelError, parallel_sampling
from parasolver_core import Status
from tests.adapters.pipeline_calls import sample
from tests.adapters.pipeline_survey import Odd, pag
from tests.adapters.tiny_pipelines import (
    ddim,
    ddim_pipeline,
    distance,
    generator,
    stable_diffusion,
    text,
    watch,
)

pytestmark = pytest.mark.usefixtures("quiet_diffusers")


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


# ---------------------------------------------------------------- cost


def test_conditioning_is_repeated_once() -> None:
    pipe = stable_diffusion()
    places = watch(pipe.unet, lambda *args, encoder_hidden_states, **kwargs: encoder_hidden_states.data_ptr())
    with parallel_sampling(pipe, window=4, tolerance=0.0) as run:
        sample(pipe, num_inference_steps=40)
    assert run.stats.rounds > 20
    # The pipeline's own of two passes, the copy that was recorded, the pair that the look calls again,
    # and the first rounds' until the window is full.
    assert len(set(places)) <= 6


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
