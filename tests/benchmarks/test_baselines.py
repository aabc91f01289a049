"""Parareal: what it computes and what it is counted for."""

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from benchmarks.baselines import parareal
from parasolver_core import DDIM, DDPM, NoiseSchedule, solve_sequential

SCHEDULE = NoiseSchedule.scaled_linear()


def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) * (1 + t[:, None] / 1000)


def test_parareal_ends_at_the_sequential_sample_and_counts_a_pipeline() -> None:
    x_T = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    timesteps, rule = SCHEDULE.timesteps(9), DDIM(SCHEDULE)
    truth = solve_sequential(denoiser, x_T, timesteps, rule).sample
    found = list(parareal(denoiser, x_T, timesteps, rule))
    # three blocks of three: a sweep, then two rounds more an iteration, and never more than the steps
    assert [one.rounds for one in found] == [3, 5, 7, 9]
    assert [one.evaluations for one in found] == [3, 11, 16, 18]
    errors = [float((one.sample - truth).norm() / truth.norm()) for one in found]
    assert errors[-1] < 1e-14 < errors[-2] < errors[0]


def test_one_block_a_step_is_the_sequential_sampler() -> None:
    x_T = torch.ones(1, 3, dtype=torch.float64)
    timesteps, rule = SCHEDULE.timesteps(5), DDIM(SCHEDULE)
    first = next(parareal(denoiser, x_T, timesteps, rule, blocks=5))
    np.testing.assert_array_equal(first.sample, solve_sequential(denoiser, x_T, timesteps, rule).sample)
    assert (first.rounds, first.evaluations) == (5, 5)


def test_parareal_refuses_noise() -> None:
    with pytest.raises(ValueError, match="deterministic"):
        next(parareal(denoiser, torch.ones(1, 3), SCHEDULE.timesteps(4), DDPM(SCHEDULE)))
