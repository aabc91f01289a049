"""Networks for samplers that are functions."""

from typing import Any

import pytest

pytest.importorskip("torch")
import torch
from torch import Tensor

from benchmarks import published

TWO_CALLS = {"heun", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde"}


def k_diffusion() -> Any:
    sampling = published.k_diffusion()
    if sampling is None:
        pytest.skip("k-diffusion is not installed: pip install --no-deps k-diffusion")
    return sampling


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = normal(12, 12) / 4


def model(x: Tensor, sigma: Tensor, cond: Tensor, scale: float = 1.0) -> Tensor:
    """A clean sample of each row, with a condition of each row, that is not linear in x."""
    s = sigma.reshape(-1, 1).to(x.dtype)
    hidden = torch.tanh((x.flatten(1) / (1 + s**2).sqrt()) @ WEIGHTS.to(x.dtype) + cond.to(x.dtype))
    return scale * (0.6 * hidden + 0.3 * x.flatten(1) / (1 + s**2)).reshape(x.shape)


class Network:
    """The same with what EDM's sampler wants: attributes, and levels without axes."""

    sigma_min, sigma_max = 0.0, float("inf")

    def round_sigma(self, sigma: Any) -> Tensor:
        return torch.as_tensor(sigma)

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        return model(x.float(), sigma.float(), labels)


def levels(n: int, end: bool = True) -> Tensor:
    sigmas = k_diffusion().get_sigmas_karras(n, 0.03, 14.6)
    return sigmas if end else sigmas[n // 4 : -1]


CALL: dict[str, Any] = {"extra_args": {"cond": normal(2, 12, seed=1), "scale": 0.9}, "disable": True}
