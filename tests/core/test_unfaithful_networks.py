"""Networks that do not keep their contract, and those that no surrogate follows."""

import numpy as np
import pytest
import torch

from parasolver_core import (
    DDIM,
    NondeterministicDenoiserError,
    Status,
    solve,
    solve_sequential,
)
from tests.core.problems import EPS, normal, relative
from tests.core.wrong_runs import GRID, RULE, TABLE


def test_dropout_is_found() -> None:
    generator = torch.Generator().manual_seed(0)

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) * (torch.rand(x.shape, generator=generator) > 0.1)

    with pytest.raises(NondeterministicDenoiserError, match=r"(?s)timestep 999.*\.eval\(\).*check=False") as caught:
        solve(network, torch.randn(2, 32, generator=generator), GRID, RULE)
    assert caught.value.solution.status is Status.FAILED
    assert caught.value.solution.stats.calls <= 2


def test_check_can_be_switched_off() -> None:
    rng = np.random.default_rng(0)
    noisy = lambda x, t: np.tanh(x) + 1e-3 * rng.normal(size=x.shape)  # noqa: E731
    got = solve(noisy, normal((1, 8)), GRID, RULE, 6, check=False, tolerance=1e-1)
    assert got.success
    assert got.stats.rounds <= 20


def test_batch_normalisation_is_found() -> None:
    torch.manual_seed(0)
    network = torch.nn.BatchNorm1d(8)  # in training mode
    with pytest.raises(NondeterministicDenoiserError, match="batch"):
        solve(lambda x, t: network(x), torch.randn(3, 8), GRID, RULE, 6)
    network.eval()
    assert solve(lambda x, t: network(x), torch.randn(3, 8), GRID, RULE, 6).success


def test_a_network_that_counts_its_calls_is_found() -> None:
    calls = 0

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        return np.tanh(x) / calls

    with pytest.raises(
        NondeterministicDenoiserError, match=r"^denoiser: the same input \(sample 0, .* differ by 0\.\d+ of"
    ):
        solve(network, normal((1, 8)), GRID, RULE)


def test_a_network_that_is_zero_once_is_found() -> None:
    calls = 0

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        return np.zeros_like(x) if calls == 1 else np.ones_like(x)

    with pytest.raises(NondeterministicDenoiserError, match=r"^denoiser: .* differ by 1 of their size"):
        solve(network, normal((1, 8)), GRID, RULE)


def test_float32_batching_is_not_taken_for_randomness() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.SiLU(), torch.nn.Linear(256, 256))
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad():
            got = solve(lambda x, t: network.to(x.dtype)(x), torch.randn(2, 256).to(dtype), GRID, RULE, 8)
        assert got.success


# Networks that no surrogate follows


@pytest.mark.parametrize("window", [2, 5, 20])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("slope", [5.0, 50.0, -50.0])
@pytest.mark.parametrize("shape", ["tanh", "sin", "linear"])
def test_expansive_networks_end_and_are_right(shape: str, slope: float, kind: str, window: int) -> None:
    """At tolerance 0 they are the sequential sample, however the surrogate fares, while that is finite."""
    network = {
        "tanh": lambda x, t: np.tanh(slope * x),
        "sin": lambda x, t: slope * np.sin(x),
        "linear": lambda x, t: slope * x,
    }[shape]
    arguments = (network, normal((2, 6)), GRID, DDIM(TABLE, prediction_type=kind))
    expected = solve_sequential(*arguments, save="trajectory").trajectory
    assert np.all(np.isfinite(expected))
    got = solve(*arguments, window, tolerance=0, save="trajectory")
    assert got.stats.rounds <= 20
    # element by element the network has no batching error, so the only difference is moves of 8 ulp taken as settled,
    # and these only where they stay so small
    first = expected[:2]
    np.testing.assert_array_equal(got.trajectory[:2], first)
    assert relative(got.sample, expected[-1]) < 1e-9
    loose = solve(*arguments, window, tolerance=1e-2)
    assert np.all(np.isfinite(loose.sample))
    assert loose.stats.rounds <= 20


@pytest.mark.parametrize("window", [1, 3, 20])
def test_growth_beyond_the_range_of_floats_is_reported(window: int) -> None:
    network = lambda x, t: -1e30 * x  # noqa: E731
    x_T = normal((2, 4))
    with np.errstate(all="ignore"):
        sequential = solve_sequential(network, x_T, GRID, DDIM(TABLE), throw=False)
        got = solve(network, x_T, GRID, DDIM(TABLE), window, throw=False)
    assert not sequential.success
    assert not got.success
    assert got.stats.rounds <= 20
    assert np.all(np.isfinite(got.states))
    assert np.all(np.isfinite(got.sample))


def test_a_discontinuous_network() -> None:
    network = lambda x, t: np.sign(x) * 0.5  # noqa: E731
    arguments = (network, normal((2, 64)), GRID, DDIM(TABLE, prediction_type="sample"))
    got = solve(*arguments, 20, tolerance=0)
    assert relative(got.sample, solve_sequential(*arguments).sample) < 20 * 8 * 10 * EPS
