"""A call of a tiny pipeline, as the tests make it."""

from __future__ import annotations

from typing import Any

import torch

from tests.adapters.tiny_pipelines import (
    generator,
    text,
)

STEPS = 12


def sample(pipe: Any, **changes: Any) -> torch.Tensor:
    given = {"num_inference_steps": STEPS, "generator": generator(), "output_type": "latent"} | text() | changes
    return pipe(**given).images
