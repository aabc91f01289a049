"""A pipeline whose loop does what a test says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from parasolver_adapters.diffusers import PipelineNotParallelError, parallel_sampling
from parasolver_core import Status
from tests.adapters.tiny_pipelines import ddim_pipeline, distance, randn

STEPS = 8


Change = Callable[..., Any]


class Loop(diffusers.DDIMPipeline):
    """A loop that gives the scheduler what ``change(pipe, i, t, x)`` returns."""

    @torch.no_grad()
    def __call__(self, change: Change, n: int = STEPS, setting: float = 1.0) -> Any:
        self.scheduler.set_timesteps(n)
        self.setting, self.kept = setting, torch.zeros(1, 3, 8, 8, dtype=torch.float64)
        x = randn(1, 3, 8, 8)
        for i, t in enumerate(self.scheduler.timesteps):
            m = change(self, i, t, x)
            m, x = m if isinstance(m, tuple) else (m, x)
            x = self.scheduler.step(m, t, x).prev_sample
        return (x,)


def looping(unet: Any = None) -> Any:
    tiny = ddim_pipeline()
    pipe = Loop(tiny.unet if unet is None else unet, tiny.scheduler)
    pipe.unet.conv_out.weight.data *= 4  # outputs of about unit size
    return pipe


def predict(pipe: Any, t: Any, x: torch.Tensor) -> torch.Tensor:
    return pipe.unet(x, t).sample


def refused(pipe: Any, change: Change, match: str, given: dict[str, Any] | None = None) -> None:
    """Refused with this reason, and the untouched sample where that was asked for."""
    given = given or {}
    want = pipe(change, **given)[0]
    with pytest.raises(PipelineNotParallelError, match=match), parallel_sampling(pipe):
        pipe(change, **given)
    with (
        pytest.warns(UserWarning, match="sampled sequentially"),
        parallel_sampling(pipe, fallback="sequential") as run,
    ):
        got = pipe(change, **given)[0]
    assert torch.equal(got, want)
    assert run.status is Status.CONVERGED


def is_right(pipe: Any, change: Change) -> None:
    want = pipe(change)[0]
    with parallel_sampling(pipe, tolerance=0.0) as run:
        got = pipe(change)[0]
    assert distance(got, want) < 1e-12
    assert run.reason is None
    assert run.stats.rounds > 1


@contextmanager
def hook(pipe: Any, kind: str, store: dict[str, Any]) -> Iterator[None]:
    block = pipe.unet.mid_block
    layer = block.attentions[0].to_out[0]
    if kind == "forward hook":
        handle = block.register_forward_hook(lambda module, args, output: store.update(f=output))
    elif kind == "hook in an attention":
        handle = layer.register_forward_hook(lambda module, args, output: store.update(f=output.mean().reshape(1, 1)))
    elif kind == "forward pre-hook":
        handle = block.register_forward_pre_hook(lambda module, args: store.update(f=args[0]))
    else:
        seen = lambda module, args, output: store.update(f=output) if module is block else None  # noqa: E731
        handle = register_module_forward_hook(seen)
    try:
        yield
    finally:
        handle.remove()


def with_feature(pipe: Any, t: Any, x: torch.Tensor, store: dict[str, Any]) -> torch.Tensor:
    m = predict(pipe, t, x)
    return m * (1 + store["f"].mean())
