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


def test_steps_that_a_callback_changes_a_little_are_refused() -> None:
    scale = [1.0]

    def scaled(model: Any, x: Tensor, sigmas: Tensor, callback: Any = None) -> Tensor:
        for here, after in pairwise(sigmas):
            x = scale[0] * (x + (x - model(x, here.expand(len(x)))) / here * (after - here))
            if callback is not None:
                callback(x)
        return x

    with pytest.raises(UnsupportedSamplerError, match=r"step 1 is off its own table by 0\.0005;"):
        parallel(scaled, 8)(network, X, SIGMAS, callback=lambda x: scale.__setitem__(0, 1.0005))


def writes_into_its_own(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    """DPM-Solver++(2M) of outputs that are scaled where they are, in one state."""
    x, last = x.clone(), None
    for here, after in pairwise(sigmas):
        denoised = model(x, here.expand(len(x))).mul_(0.95)
        mixed = denoised if last is None or after == 0 else 1.5 * denoised - 0.5 * last
        x.add_((x - mixed) / here * (after - here))
        last = denoised
    return x


@pytest.mark.parametrize(("tolerance", "limit"), [(0.0, 3e-6), (1e-2, 1e-2)])
def test_a_sampler_may_write_into_its_states_and_outputs(tolerance: float, limit: float) -> None:
    got = parallel(writes_into_its_own, 8, tolerance=tolerance)(network, X, SIGMAS)
    assert relative(got, writes_into_its_own(network, X, SIGMAS)) < limit


def as_k_diffusion(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    """Times are in the dtype of the first state; later states are in that of the levels."""
    ones = x.new_ones([len(x)])
    for here, after in pairwise(sigmas):
        x = x + (x - model(x, here * ones)) / here.reshape(1, 1, 1) * (after - here)
    return x


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tolerance", "limit"), [(0.0, 1e-6), (1e-2, 1e-2)])
def test_noise_in_half_precision_and_levels_in_float32(kind: torch.dtype, tolerance: float, limit: float) -> None:
    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return network(x.float(), sigma.float())

    want = as_k_diffusion(model, X.to(kind), SIGMAS)
    got = parallel(as_k_diffusion, 8, tolerance=tolerance)(model, X.to(kind), SIGMAS)
    assert got.dtype == want.dtype == torch.float32
    assert relative(got, want) < limit


def conditioned(model: Any, x: Tensor, sigmas: Tensor, callback: Any = None) -> Tensor:
    """Gives the network a part of its last answer, and adds noise."""
    shift = torch.zeros(len(x), 1, 1)
    for i, (here, after) in enumerate(pairwise(sigmas)):
        denoised = model(x, here.expand(len(x)), shift=shift)
        if callback is not None:
            callback({"i": i})
        shift = denoised[:, :1, :1]
        x = x + (x - denoised) / here * (after - here) + 0.1 * after * torch.randn_like(x)
    return x


def test_a_sampler_that_is_found_out_while_it_runs_falls_back_from_the_beginning() -> None:
    """With the random numbers that it was given; not when the callback was told of steps."""
    sample = parallel(conditioned, 8, fallback="sequential")
    torch.manual_seed(4)
    want, after = conditioned(network, X, SIGMAS), torch.randn(2)
    torch.manual_seed(4)
    with pytest.warns(UserWarning, match="sampled sequentially: sampler: call 1 gives the network other arguments"):
        got = sample(network, X, SIGMAS)
    assert torch.equal(got, want)
    assert torch.equal(torch.randn(2), after)
    assert sample.solution is None
    told: list[int] = []
    with pytest.raises(UnsupportedSamplerError, match="call 1 gives the network other arguments"):
        sample(network, X, SIGMAS, callback=lambda step: told.append(step["i"]))
    assert told == [0]
