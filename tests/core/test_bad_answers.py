"""What noise functions and networks return is looked at."""

from typing import Any

import array_api_strict
import numpy as np
import pytest
import torch

from parasolver_core import (
    DDPM,
    Status,
    solve,
)
from tests.core.problems import normal
from tests.core.wrong_runs import BOTH, GRID, NETWORK, RULE, TABLE


class InOrder:
    """Noise that depends on how often it was asked for."""

    def __init__(self, numbers: int) -> None:
        self.draws = iter(np.random.default_rng(0).standard_normal((numbers, 3)))

    def __call__(self, step: int, sample: int) -> np.ndarray:
        return next(self.draws)


@pytest.mark.parametrize("method", ["secant", "parataa", "paradigms", "sequential"])
def test_noise_that_depends_on_the_order_of_calls_is_told(method: str) -> None:
    with pytest.raises(ValueError, match=r"^noise: noise\(\d+, 0\) gave other numbers when it was called again"):
        solve(NETWORK, normal((2, 3)), GRID, DDPM(TABLE), 6, method=method, noise=InOrder(1000))


@pytest.mark.parametrize("numbers", [0, 1, 2])
@pytest.mark.parametrize("method", ["secant", "identity", "parataa", "paradigms", "sequential"])
def test_noise_that_runs_out_is_told(method: str, numbers: int) -> None:
    with pytest.raises((RuntimeError, ValueError), match=r"^noise: noise\(\d+, \d\) (raised StopIteration|gave other)"):
        solve(NETWORK, normal((2, 3)), GRID, DDPM(TABLE), 6, method=method, noise=InOrder(numbers))


def test_noise_written_into_the_same_memory_is_read_in_time() -> None:
    z, buffer = normal((20, 2, 3), seed=4), np.empty(3)

    def noise(step: int, sample: int) -> np.ndarray:
        buffer[:] = z[step, sample]
        return buffer

    got, expected = (solve(NETWORK, normal((2, 3)), GRID, DDPM(TABLE), 6, noise=one) for one in (noise, z))
    np.testing.assert_array_equal(got.sample, expected.sample)


@pytest.mark.parametrize("returned", [np.ma.zeros(3), np.zeros(3, dtype=object)], ids=["masked", "object"])
def test_noise_function_of_no_plain_numbers(returned: Any) -> None:
    with pytest.raises(TypeError, match=r"^noise: noise\(\d+, \d\)"):
        solve(NETWORK, normal((2, 3)), GRID, DDPM(TABLE), noise=lambda step, sample: returned)


@pytest.mark.parametrize("returned", [np.zeros(4), None, 1.0, np.zeros(3, dtype=complex)], ids=str)
def test_noise_function_of_the_wrong_shape_or_type(returned: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^noise: "):
        solve(NETWORK, normal((1, 3)), GRID, DDPM(TABLE), noise=lambda step, sample: returned)


@BOTH
def test_noise_function_that_raises(options: dict[str, Any]) -> None:
    """As when the network raises: the state reached is there."""

    def noise(step: int, sample: int) -> np.ndarray:
        if step == 7:
            raise RuntimeError("no more noise")
        return np.zeros(3)

    with pytest.raises(RuntimeError, match="no more noise") as caught:
        solve(NETWORK, normal((1, 3)), GRID, DDPM(TABLE), noise=noise, **options)
    assert caught.value.solution.status is Status.FAILED
    assert caught.value.solution.steps[0] <= 7


# What the network returns


@pytest.mark.parametrize(
    ("error", "wrong"),
    [
        (TypeError, lambda y: None),
        (TypeError, lambda y: (y,)),
        (TypeError, lambda y: [y]),
        (TypeError, lambda y: {"sample": y}),
        (TypeError, lambda y: 0.5),
        (TypeError, lambda y: torch.asarray(y)),
        (TypeError, lambda y: array_api_strict.asarray(y)),
        (ValueError, lambda y: y[:, 0]),
        (ValueError, lambda y: y[:1]),
        (ValueError, lambda y: y.T),
        (ValueError, lambda y: y[:, :, None]),
        (ValueError, lambda y: np.concatenate([y, y], axis=1)),
        (ValueError, lambda y: y.astype(np.float32)),
        (ValueError, lambda y: y.astype(complex)),
        (ValueError, lambda y: y > 0),
    ],
)
@BOTH
def test_wrong_predictions_are_refused(error: type[Exception], wrong: Any, options: dict[str, Any]) -> None:
    x_T = normal((2, 3))
    with pytest.raises(error, match=r"^denoiser: expected .*got") as caught:
        solve(lambda x, t: wrong(NETWORK(x, t)), x_T, GRID, RULE, **options)
    assert caught.value.solution.status is Status.FAILED
    assert caught.value.solution.steps == (0, 0)
    np.testing.assert_array_equal(caught.value.solution.sample, x_T)


@BOTH
def test_a_torch_network_that_answers_in_another_dtype(options: dict[str, Any]) -> None:
    x_T = torch.asarray(normal((2, 3))).to(torch.float16)
    with pytest.raises(ValueError, match=r"^denoiser: .*torch.float16.*got .*torch.float32"):
        solve(lambda x, t: x.float(), x_T, GRID, RULE, **options)
