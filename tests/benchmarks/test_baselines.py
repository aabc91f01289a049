"""Parareal: what it computes and what it is counted for."""

import pytest

pytest.importorskip("torch")
import torch
from torch import Tensor

from benchmarks.baselines import parareal
from parasolver_core import DDIM, DDPM, NoiseSchedule, solve_sequential

SCHEDULE = NoiseSchedule.scaled_linear()
RULE = DDIM(SCHEDULE)


def denoiser(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x + 1e-3 * t[:, None])


def start() -> Tensor:
    return torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("steps", [9, 25, 50, 52])  # 50 and 52 make blocks of different length
def test_every_iteration_finishes_a_block_and_the_last_is_exact(steps: int) -> None:
    timesteps = SCHEDULE.timesteps(steps)
    truth = solve_sequential(denoiser, start(), timesteps, RULE).sample
    iterates = list(parareal(denoiser, start(), timesteps, RULE))
    assert len(iterates) == round(steps**0.5) + 1
    torch.testing.assert_close(iterates[-1].sample, truth, rtol=1e-12, atol=1e-12)
    assert (iterates[0].sample - truth).abs().max() > 1e-6
    assert iterates[-1].rounds == steps


def test_rounds_are_those_of_a_pipeline() -> None:
    iterates = list(parareal(denoiser, start(), SCHEDULE.timesteps(9), RULE))
    # three blocks of three: a sweep of three calls, then two rounds more for each iteration
    assert [one.rounds for one in iterates] == [3, 5, 7, 9]
    assert [one.evaluations for one in iterates] == [3, 11, 16, 18]


def test_a_block_for_each_step_is_the_sequential_sampler() -> None:
    timesteps = SCHEDULE.timesteps(5)
    first = next(parareal(denoiser, start(), timesteps, RULE, blocks=5))
    assert torch.equal(first.sample, solve_sequential(denoiser, start(), timesteps, RULE).sample)
    assert (first.rounds, first.evaluations) == (5, 5)


def test_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="deterministic"):
        next(parareal(denoiser, start(), SCHEDULE.timesteps(4), DDPM(SCHEDULE)))
