"""What noise functions and networks return is looked at."""

from typing import Any

import array_api_strict
import numpy as np
import pytest
import torch

from parasolver_core import DDIM, DDPM, DPMSolver, NoiseSchedule, SolverError, Status, solve, solve_sequential
from tests.core.problems import TanhNetwork, normal
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


@pytest.mark.parametrize("sequential", [True, False])
def test_a_network_may_answer_in_the_same_memory_every_time(sequential: bool) -> None:
    """A multistep rule reads earlier answers, which must not have become the last one."""
    schedule = NoiseSchedule.linear()
    network, memory = TanhNetwork(4, 2.0), np.empty((64, 4))

    def reusing(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        answer = memory[: len(x)]
        answer[...] = network(x, t)
        return answer

    x_T, timesteps, rule = normal((2, 4)), schedule.timesteps(20), DPMSolver(schedule, 2)
    expected = solve_sequential(network, x_T, timesteps, rule).sample
    method = "sequential" if sequential else "secant"
    found = solve(reusing, x_T, timesteps, rule, 6, tolerance=0.0, method=method)
    np.testing.assert_allclose(found.sample, expected, rtol=1e-12, atol=1e-14)


def test_the_trajectory_of_a_run_that_fails_at_once_is_its_start() -> None:
    schedule, x_T = NoiseSchedule.linear(), normal((2, 4))
    with pytest.raises(SolverError) as caught:
        solve(lambda x, t: x * np.nan, x_T, schedule.timesteps(10), DDIM(schedule), 4, save="trajectory")
    assert caught.value.solution is not None
    found = caught.value.solution.trajectory
    assert found is not None
    np.testing.assert_array_equal(found[0], x_T)
    assert found.shape == (11, 2, 4)
    assert np.isnan(found[1:]).all()
