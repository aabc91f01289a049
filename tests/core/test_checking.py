"""Rows of a run looked at alone, once for a denoiser: what the check finds, what it lets pass and what it costs."""

import gc
from collections.abc import Callable
from types import ModuleType
from typing import Any

import array_api_compat
import numpy as np
import pytest
import torch

from parasolver_core import (
    DDIM,
    DDPM,
    CoupledRowsError,
    Euler,
    NoiseSchedule,
    NondeterministicDenoiserError,
    Status,
    solve,
    solve_sequential,
)
from parasolver_core.denoiser.checking import remembered
from tests.core.problems import Counted, Rational, normal

LINEAR, KARRAS = NoiseSchedule.linear(), NoiseSchedule.karras(0.03, 14.6)
Network = Callable[[Any, Any], Any]


def start(batch: int, schedule: NoiseSchedule, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    size = 14.6 if schedule is KARRAS else 1.0
    return (size * torch.asarray(normal((batch, 8), seed=batch))).to(dtype)


def base(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.tanh(1.3 * x) / (1 + t.to(x.dtype)[:, None] / 100)


def tiled(conditions: torch.Tensor) -> Network:
    return lambda x, t: base(x, t) * conditions.repeat(len(x))[: len(x), None]


def interleaved(conditions: torch.Tensor) -> Network:
    """Right as long as every sample has as many rows."""
    count = len(conditions)
    return lambda x, t: base(x, t) * conditions[torch.arange(len(x)) * count // max(len(x), count), None]


COUPLED: dict[str, Network] = {
    "the first row's time": lambda x, t: base(x, t) * (1 + float(t[0]) / 10),
    "the last row's time": lambda x, t: base(x, t) * (1 + float(t[-1]) / 10),
    "the mean time": lambda x, t: base(x, t) + t.double().mean() / 10,
    "a norm over the batch": lambda x, t: 3 * x / x.norm(),
    "a deviation over the batch": lambda x, t: base(x, t) / x.std(),
    "a mean over the batch": lambda x, t: base(x, t) - 0.1 * x.mean(0),
    "attention over the batch": lambda x, t: base(x, t) + 0.1 * torch.softmax(x @ x.T, 1) @ x,
    "the number of rows": lambda x, t: base(x, t) * (1 + 0.5 / len(x)),
}


@pytest.mark.parametrize("schedule", [LINEAR, KARRAS], ids=["ddim", "euler"])
@pytest.mark.parametrize(("batch", "steps", "window"), [(1, 30, 4), (2, 30, 16), (3, 200, 16)])
@pytest.mark.parametrize("kind", COUPLED)
def test_rows_that_depend_on_other_rows_are_found(
    kind: str, batch: int, steps: int, window: int, schedule: NoiseSchedule
) -> None:
    rule = DDIM(schedule) if schedule is LINEAR else Euler(schedule)
    with pytest.raises(CoupledRowsError, match=r"(?s)sample by sample.*takes_rows.*check_denoiser.*check=False"):
        solve(COUPLED[kind], start(batch, schedule), schedule.timesteps(steps), rule, window)


@pytest.mark.parametrize("method", ["secant", "identity", "paradigms", "parasolver", "parataa"])
@pytest.mark.parametrize("make", [tiled, interleaved])
@pytest.mark.parametrize(("batch", "steps", "window"), [(2, 30, 4), (2, 30, 8), (3, 30, 7), (2, 200, 16)])
def test_conditions_in_another_order_are_found(
    make: Callable[[torch.Tensor], Network], batch: int, steps: int, window: int, method: str
) -> None:
    network = make(torch.linspace(0.2, 2.0, batch, dtype=torch.float64))
    with pytest.raises(CoupledRowsError, match="conditions"):
        solve(network, start(batch, LINEAR), LINEAR.timesteps(steps), DDIM(LINEAR), window, method=method)


@pytest.mark.parametrize("window", [4, 8, 16])
def test_a_branch_on_the_first_rows_time_is_found_where_it_does_harm(window: int) -> None:
    """Away from the first rounds: those after which the network's outputs surprise are looked at."""

    def network(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return (0.9 * x + (0.5 if 1 <= float(s[0]) <= 5 else 0)) / (1 + s[:, None] ** 2)

    x_T, grid = start(1, KARRAS), KARRAS.timesteps(30)
    with pytest.raises(CoupledRowsError, match="depends on the other rows"):
        solve(network, x_T, grid, Euler(KARRAS), window)


@pytest.mark.parametrize(
    ("steps", "first", "window", "gain", "added"),
    [(50, 6, 16, 0.0, 0.1), (50, 15, 8, 0.9, 0.0), (100, 12, 32, 0.0, 0.1), (100, 15, 32, 0.9, 0.0)],
)
def test_two_networks_between_which_the_first_rows_time_decides_are_found(
    steps: int, first: int, window: int, gain: float, added: float
) -> None:
    """One for the first steps and one for the rest: rows behind the change that were evaluated among those before."""
    grid = LINEAR.timesteps(steps)

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        early = float(t[0]) >= float(grid[first - 1])
        return base(x, t) * (1 + gain * early) + added * early

    with pytest.raises(CoupledRowsError, match="depends on the other rows"):
        solve(network, start(2, LINEAR), grid, DDIM(LINEAR), window, tolerance=1e-3)


def branching(grid: np.ndarray, first: int, count: int) -> Network:
    """Takes another way where the first row's time is one of these steps."""

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        inside = float(grid[first + count - 1]) <= float(t[0]) <= float(grid[first])
        return base(x, t) * (1 + 0.9 * inside)

    return network


@pytest.mark.parametrize(
    ("steps", "window", "first", "count"),
    [(20, 8, 2, 2), (20, 16, 5, 4), (30, 32, 5, 4), (30, 16, 8, 8), (50, 16, 8, 4), (50, 32, 11, 8)],
)
def test_a_branch_at_steps_that_are_never_first_in_a_round_is_found(
    steps: int, window: int, first: int, count: int
) -> None:
    """The window slides past them, so that no round shows the other way; looked at alone they do."""
    grid = LINEAR.timesteps(steps)
    network = branching(grid, first, count)
    got = solve(network, start(2, LINEAR), grid, DDIM(LINEAR), window, tolerance=1e-2, check=False).sample
    assert float((got - solve_sequential(network, start(2, LINEAR), grid, DDIM(LINEAR)).sample).norm()) > 0.01
    with pytest.raises(CoupledRowsError, match="depends on the other rows"):
        solve(network, start(2, LINEAR), grid, DDIM(LINEAR), window, tolerance=1e-2)


@pytest.mark.parametrize(("steps", "window", "first", "count"), [(20, 16, 2, 1), (20, 8, 11, 8), (30, 8, 20, 4)])
def test_a_branch_that_does_no_harm_is_found_too(steps: int, window: int, first: int, count: int) -> None:
    """It would be remembered as one that passed, and another window may bring it out."""
    grid = LINEAR.timesteps(steps)
    network = branching(grid, first, count)
    got = solve(network, start(2, LINEAR), grid, DDIM(LINEAR), window, tolerance=1e-2, check=False).sample
    expected = solve_sequential(network, start(2, LINEAR), grid, DDIM(LINEAR)).sample
    assert float((got - expected).norm() / expected.norm()) < 1e-2
    with pytest.raises(CoupledRowsError, match="depends on the other rows"):
        solve(network, start(2, LINEAR), grid, DDIM(LINEAR), window, tolerance=1e-2)


def test_a_network_that_fails_for_a_single_row() -> None:
    conditions = torch.linspace(0.2, 2.0, 2, dtype=torch.float64)
    network = lambda x, t: base(x, t) * conditions.repeat_interleave(len(x) // 2)[:, None]  # noqa: E731
    with pytest.raises(CoupledRowsError, match=r"works for \d+ rows and fails for one \(ValueError"):
        solve(network, start(2, LINEAR), LINEAR.timesteps(30), DDIM(LINEAR), 8)


def test_an_exception_that_has_nothing_to_do_with_the_rows_passes() -> None:
    calls = 0

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls >= 3:
            raise KeyError("weights")
        return x / (1 + x * x)

    with pytest.raises(KeyError, match="weights"):
        solve(network, normal((2, 6)), LINEAR.timesteps(30), DDIM(LINEAR), 8)


def test_chance_is_not_taken_for_coupled_rows() -> None:
    rng = np.random.default_rng(0)
    noisy = lambda x, t: np.tanh(x) + 0.1 * rng.normal(size=x.shape)  # noqa: E731
    with pytest.raises(NondeterministicDenoiserError, match="from call to call") as caught:
        solve(noisy, normal((2, 8)), LINEAR.timesteps(30), DDIM(LINEAR), 8)
    assert not isinstance(caught.value, CoupledRowsError)
    assert caught.value.solution.status is Status.FAILED


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """To so many bits behind the leading one, in float32."""
    scale = 2.0 ** (bits - torch.floor(torch.log2(x.abs().clamp(min=1e-30))))
    return torch.round(x * scale) / scale


def layers(multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Network:
    """A deep network whose sums are taken in an order that depends on the number of rows, as kernels do."""
    generator = torch.Generator().manual_seed(0)
    weights = [1.2 * torch.randn(64, 64, generator=generator) / 8 for _ in range(8)]

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = x
        for weight in weights:
            order = torch.arange(64).roll(7 * len(x))
            h = torch.nn.functional.silu(multiply(h[:, order], weight[order]))
        return h

    return network


ROUGH: dict[str, Network] = {
    "float32": layers(torch.matmul),
    "TF32": layers(lambda a, b: rounded(a, 10) @ rounded(b, 10)),
    "bfloat16": layers(lambda a, b: (rounded(a, 7) @ rounded(b, 7)).bfloat16().float()),
    "float16": layers(lambda a, b: (a @ b).half().float()),
    "guided bfloat16": lambda x, t: 8 * ROUGH["bfloat16"](x, t) - 7 * ROUGH["bfloat16"](0.9 * x, t),
    "nearly nothing": lambda x, t: (x + 10 * x * len(x)) - 10 * x * len(x) - x,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ROUGH)
def test_what_batching_does_to_rounding_is_let_pass(kind: str, dtype: torch.dtype) -> None:
    network = lambda x, t: ROUGH[kind](x.float(), t).to(x.dtype)  # noqa: E731
    x_T = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    for rule in (DDIM(LINEAR), DDPM(LINEAR)):
        assert solve(network, x_T, LINEAR.timesteps(30), rule, 8, tolerance=1e-3).success


def test_a_float64_network_may_compute_in_float32() -> None:
    network = lambda x, t: 0.7 * ROUGH["TF32"](x.float(), t).double()  # noqa: E731
    x_T = torch.randn(2, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert solve(network, x_T, LINEAR.timesteps(30), DDIM(LINEAR), 8).success


@pytest.mark.parametrize(("steps", "most"), [(30, 7), (200, 7)])
def test_a_denoiser_is_checked_once(xp: ModuleType, steps: int, most: int) -> None:
    """A few calls in the first run, one of them as large as a round; none in the next, with the same rounds, sample."""
    network = Counted(Rational())
    arguments = (network, normal((2, 6), xp), LINEAR.timesteps(steps), DDIM(LINEAR), 12)
    first = solve(*arguments, tolerance=0.05)
    calls, rows = len(network.rows), sum(network.rows)
    network.rows.clear()
    second = solve(*arguments, tolerance=0.05)
    assert (first.stats.calls, first.stats.evaluations) == (calls, rows)
    assert (second.stats.calls, second.stats.evaluations) == (len(network.rows), sum(network.rows))
    assert first.stats.rounds == second.stats.rounds == second.stats.calls
    assert 2 <= calls - len(network.rows) <= most
    assert rows - sum(network.rows) <= most + max(network.rows)
    assert bool(array_api_compat.array_namespace(first.sample).all(first.sample == second.sample))


def test_denoisers_are_remembered_weakly_and_one_by_one() -> None:
    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        return x / (1 + x * x)

    class Model:
        def predict(self, x: np.ndarray, t: np.ndarray) -> np.ndarray:
            return x / (1 + x * x)

    model = Model()
    for denoiser in (network, model.predict):
        solve(denoiser, normal((2, 6)), LINEAR.timesteps(30), DDIM(LINEAR), 8)
    assert remembered(network, 2)
    assert remembered(model.predict, 3)
    assert not remembered(network, 1)  # what several samples share, one does not show
    assert not remembered(Model().predict, 2)
    del denoiser
    number = id(model)
    del model
    gc.collect()
    from parasolver_core.denoiser.checking import _PASSED

    assert number not in _PASSED


def test_a_run_that_was_ended_is_not_remembered() -> None:
    network = Counted(Rational())
    arguments = (network, normal((2, 6)), LINEAR.timesteps(30), DDIM(LINEAR), 8)
    solve(*arguments, max_rounds=3, throw=False)
    assert not remembered(network, 2)
    solve(*arguments, check=False)
    assert not remembered(network, 2)
