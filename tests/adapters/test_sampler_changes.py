"""What changes while a sampler runs: what it gives its network, and who writes into its tensors."""

from itertools import pairwise
from typing import Any

import pytest

pytest.importorskip("torch")
import torch
from torch import Tensor

from parasolver_adapters.samplers import UnsupportedSamplerError, parallel
from tests.adapters.weights import relative

SIGMAS = torch.cat([torch.linspace(14.6**0.2, 0.03**0.2, 20) ** 5, torch.zeros(1)])
X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)) * SIGMAS[0]


def network(x: Tensor, sigma: Tensor, shift: Any = 0.0) -> Tensor:
    return torch.tanh(1.5 * x / (1 + sigma.reshape(-1, 1, 1) ** 2) + 0.2) + 0.3 * shift


def euler(model: Any, x: Tensor, sigmas: Tensor, callback: Any = None) -> Tensor:
    for i, (here, after) in enumerate(pairwise(sigmas)):
        denoised = model(x, here.expand(len(x)))
        if callback is not None:
            callback({"x": x, "i": i, "denoised": denoised})
        x = x + (x - denoised) / here * (after - here)
    return x


def one_buffer(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    """Writes each step's time, and an entry of a dictionary, where the last one was."""
    time, shift = torch.ones(len(x)), {"shift": torch.zeros(len(x), 1, 1)}
    for here, after in pairwise(sigmas):
        time.fill_(here)
        shift["shift"] = torch.full_like(shift["shift"], float(here) / 15)
        x = x + (x - model(x, time, given=[shift])) / here * (after - here)
    return x


def self_conditioning(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    clean = torch.zeros_like(x)
    for here, after in pairwise(sigmas):
        clean = model(x, here.expand(len(x)), shift=clean)
        x = x + (x - clean) / here * (after - here)
    return x


@pytest.mark.parametrize(("tolerance", "limit"), [(0.0, 3e-6), (1e-2, 1e-2)])
def test_what_a_sampler_writes_anew_in_place_is_each_calls_own(tolerance: float, limit: float) -> None:
    def model(x: Tensor, sigma: Tensor, given: list[dict[str, Tensor]]) -> Tensor:
        return network(x, sigma, given[0]["shift"])

    got = parallel(one_buffer, 8, tolerance=tolerance)(model, X, SIGMAS)
    assert relative(got, one_buffer(model, X, SIGMAS)) < limit


def test_arguments_that_depend_on_outputs_are_refused() -> None:
    with pytest.raises(UnsupportedSamplerError, match=r"call 1 gives the network other arguments .*self-conditioning"):
        parallel(self_conditioning, 8)(network, X, SIGMAS)


@pytest.mark.parametrize("name", ["x", "denoised"])
@pytest.mark.parametrize("change", [1.1, 1 + 1e-4])
@pytest.mark.parametrize("inference", [False, True])
def test_callbacks_that_write_into_the_run_are_refused(name: str, change: float, inference: bool) -> None:
    with (
        torch.inference_mode(inference),
        pytest.raises(UnsupportedSamplerError, match="callback: it writes into the tensors that it is told"),
    ):
        parallel(euler, 8)(network, X.clone(), SIGMAS, callback=lambda told: told[name].mul_(change))


def test_networks_that_write_into_the_samplers_state_are_refused() -> None:
    with pytest.raises(UnsupportedSamplerError, match="the network writes into the state that it is given"):
        parallel(euler, 8)(lambda x, sigma: network(x.mul_(0.98), sigma), X.clone(), SIGMAS)
