"""States on another device than the library's default, and on one without float64."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from parasolver_core import DDIM, DDPM, DPMSolver, NoiseSchedule, check_denoiser, clip_sample, solve, solve_sequential
from tests.away import AWAY, Away, away

SCHEDULE = NoiseSchedule.linear()
NOISE = np.random.default_rng(0).standard_normal((20, 3, 5))
CASES: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "DDIM": (DDIM, 20, {"tolerance": 0}),
    "DDPM": (DDPM, 20, {"seed": 3, "save": "trajectory"}),
    "noise": (DDPM, 20, {"noise": NOISE}),
    "noise of a function": (DDPM, 20, {"noise": lambda step, sample: NOISE[step, sample]}),
    "spread nodes": (DDIM, 200, {"window": 16, "tolerance": 0.05}),
    "spread nodes and noise": (DDPM, 150, {"window": 50, "tolerance": 0.1, "seed": 1}),
    "memory": (lambda schedule: DPMSolver(schedule, order=3), 20, {}),
    "parataa": (DDIM, 20, {"method": "parataa"}),
    "paradigms": (DDIM, 20, {"method": "paradigms", "tolerance": 1e-3}),
    "sequential": (DDIM, 20, {"method": "sequential"}),
    "few rows": (DDIM, 20, {"max_rows": 3, "buckets": (1, 2)}),
    "states on the CPU": (DDIM, 20, {"state_device": "cpu"}),
    "auto": (DDIM, 20, {"window": "auto"}),
}


def network(x: Any, t: Any) -> Any:
    return torch.tanh(x) * 0.7 + 0.1 * torch.cos(0.01 * t.to(x.dtype))[:, None]


def start(dtype: Any = torch.float32) -> Any:
    return torch.randn(3, 5, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(dtype)


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """Tensors that are made without a device hold no numbers."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def both(name: str, x_T: Any) -> tuple[Any, Any, float]:
    """A parallel run, the sequential sample, and how far they may be apart."""
    rule, steps, options = CASES[name]
    arguments = network, x_T, SCHEDULE.timesteps(steps), rule(SCHEDULE)
    noise = {key: value for key, value in options.items() if key in ("seed", "noise")}
    solution = solve(*arguments, **{"window": 4} | options)
    limit = max(options.get("tolerance", 1e-2), 10 * torch.finfo(x_T.dtype).eps)
    return solution, solve_sequential(*arguments, **noise).sample, limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_the_default_device_is_of_no_concern(name: str, dtype: Any, elsewhere: None) -> None:
    x_T = start(dtype)
    solution, want, limit = both(name, x_T)
    assert solution.sample.device == x_T.device
    assert solution.sample.dtype == dtype
    assert float((solution.sample - want).norm() / want.norm()) < limit
    if solution.trajectory is not None:
        assert solution.trajectory.device == x_T.device


@pytest.mark.parametrize("name", CASES)
def test_a_device_without_float64(name: str) -> None:
    with away() as device:
        solution, want, limit = both(name, start().to(device))
        assert type(solution.sample) is Away
        assert float((solution.sample - want).norm() / want.norm()) < limit


def test_checking_and_clipping_elsewhere(elsewhere: None) -> None:
    denoiser, timesteps = clip_sample(network, SCHEDULE), SCHEDULE.timesteps(20)
    assert check_denoiser(denoiser, start(), timesteps).ok
    with away() as device:
        assert check_denoiser(denoiser, start().to(device), timesteps).ok


def test_the_emulated_device_has_no_float64_and_does_not_mix_with_the_cpu() -> None:
    with away() as device:
        there = start().to(device)
        for make in (
            there.double,
            lambda: torch.zeros(2, dtype=torch.float64, device=AWAY),
            lambda: start().to(AWAY).to(torch.float64),
        ):
            with pytest.raises(TypeError, match="no float64"):
                make()
        with pytest.raises(RuntimeError, match="same device"):
            there + start()
        assert torch.equal((there + there).cpu(), 2 * start())
