"""Pipelines with every kind of scheduler: what it keeps from its last run, and what it is given in this one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from parasolver_adapters.diffusers import first_pass, parallel_sampling
from tests.adapters.scheduler_survey import classes
from tests.adapters.tiny_pipelines import ddim, distance, generator, sd3, stable_diffusion, text

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
    pipe, read, own = pipeline(name, dtype), [], first_pass.step_rule_from_scheduler
    want = sample(pipe, dtype)
    monkeypatch.setattr(first_pass, "_RULES", {})
    monkeypatch.setattr(first_pass, "step_rule_from_scheduler", lambda *a, **k: read.append(a) or own(*a, **k))
    for _ in range(2):
        with parallel_sampling(pipe, tolerance=0.0, fallback="sequential") as run:
            got = sample(pipe, dtype)
        assert run.reason is None
        assert distance(got, want) < 20 * torch.finfo(dtype).eps
    assert len(read) == 1
