"""Parareal ends at the sequential sample, whatever the number of steps."""

import pytest

pytest.importorskip("torch")
import torch
from torch import Tensor

from benchmarks.baselines import parareal
from parasolver_core import DDIM, NoiseSchedule, solve_sequential

SCHEDULE = NoiseSchedule.scaled_linear()


def denoiser(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x + 1e-3 * t[:, None])


@pytest.mark.parametrize("steps", [9, 25, 50, 52])  # 50 and 52 make blocks of different length
def test_every_iteration_finishes_a_block_and_the_last_is_exact(steps: int) -> None:
    x_T = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    timesteps, rule = SCHEDULE.timesteps(steps), DDIM(SCHEDULE)
    truth = solve_sequential(denoiser, x_T, timesteps, rule).sample
    iterates = list(parareal(denoiser, x_T, timesteps, rule))
    assert len(iterates) == round(steps**0.5) + 1
    torch.testing.assert_close(iterates[-1].sample, truth, rtol=1e-12, atol=1e-12)
    assert (iterates[0].sample - truth).abs().max() > 1e-6
