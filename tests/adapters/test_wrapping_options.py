"""Options of a wrapped network that are of no use, and would have been taken without a word."""

from typing import Any

import pytest

pytest.importorskip("torch")
import torch

from parasolver_adapters.wrapping import ModelDenoiser
from tests.adapters.test_wrapping import LINEAR, normal, recorded


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"conditions": [1]}, "conditions: expected a dictionary .* got list"),
        ({"conditions": None}, "conditions: expected a dictionary .* got NoneType"),
        (
            {"null_conditions": torch.zeros(2), "guidance_scale": 2.0},
            "null_conditions: expected a dictionary .* Tensor",
        ),
        ({"null_conditions": {}, "guidance_scale": "2"}, "guidance_scale: expected one finite number, got '2'"),
        ({"null_conditions": {}, "guidance_scale": torch.ones(2)}, "guidance_scale: expected one finite number"),
        ({"dtype": "float16"}, r"dtype: expected one such as torch.float16, got 'float16'"),
    ],
)
def test_options_of_the_wrong_kind_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=f"^{said}"):
        ModelDenoiser(lambda x, t: x, LINEAR, "epsilon", **options)


def test_null_conditions_that_stand_for_nothing_are_refused() -> None:
    """A name that the condition does not have left it as it was: guidance then did nothing, without a word."""
    pair: dict[str, Any] = {"conditions": {"y": {"text": torch.ones(1)}}, "null_conditions": {"y": {"txt": None}}}
    denoiser, _ = recorded(**pair, guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"^null_conditions\['y'\]: expected keys of the condition, 'text'; got 'txt'"):
        denoiser(normal(2, 2), torch.arange(2))
