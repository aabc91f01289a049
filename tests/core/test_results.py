"""The promises of arguments and results."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import array_api_compat
import numpy as np
import pytest
import torch
from hypothesis import given

from parasolver_core import (
    DDIM,
    DPMSolver,
    Euler,
    Recurrence,
    SequentialSolver,
    Status,
    StepRule,
    solve,
    solve_sequential,
)
from tests.arrays import to_numpy
from tests.core.any_runs import FEW, FLOW, SAMPLERS, TABLE, Run, exactness, runs, same_bits, tolerances
from tests.core.problems import Rational, TanhNetwork, normal, relative


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_continuous_times_keep_at_least_float32(dtype: torch.dtype) -> None:
    """Of half precision in eight bits neighbouring times would be one."""
    seen, grid = [], FLOW.timesteps(600)[:5]

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(t)
        return x

    solve(network, torch.zeros(1, 3, dtype=dtype), grid, Euler(FLOW), 5, check=False)
    assert {t.dtype for t in seen} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert len(set(torch.cat(seen).tolist())) == 5


def test_processes_tell_tables_apart_by_what_is_held_alone() -> None:
    own = Euler(FLOW).recurrence(FLOW.timesteps(6))
    plans = []
    for held in (own.held, own.held * 2):

        class Other(StepRule):
            def recurrence(self, timesteps: np.ndarray) -> Recurrence:
                return replace(own, held=held)  # noqa: B023

        state = SequentialSolver(Other()).init(Rational(), normal((1, 3)), own.timesteps)
        plans.append(state.fingerprint()["timesteps and step rule"])
    assert plans[0] != plans[1]


@given(run=runs(), tolerance=tolerances)
def test_start_is_never_changed(run: Run, tolerance: float) -> None:
    x_T = normal((run.batch, 2, 3), None, run.dtype, run.seed)
    before = x_T.copy()
    x_T.flags.writeable = False

    def careless(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        out = run.network(x, t)
        if x.flags.writeable:  # a network may work in place on what it is given
            x[...] = np.nan
        t[...] = 0
        return out

    options = {"seed": run.seed, "save": "trajectory"}
    got = solve(careless, x_T, run.grid, run.rule, run.window, tolerance=tolerance, **options)
    assert same_bits(x_T, before)
    assert np.all(np.isfinite(got.trajectory))
    got.sample[...] = 0
    got.states[...] = 0
    got.trajectory[...] = 0
    assert same_bits(x_T, before)


def test_a_denoiser_may_work_in_place_sequentially() -> None:
    network = TanhNetwork()

    def in_place(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        x[...] = network(x, t)
        return x

    expected = solve_sequential(network, normal((2, 6)), TABLE.timesteps(8), DDIM(TABLE))
    got = solve_sequential(in_place, normal((2, 6)), TABLE.timesteps(8), DDIM(TABLE))
    assert same_bits(got.sample, expected.sample)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("options", [{"window": 1}, {"window": 4}, {"window": 4, "max_rows": 3}])
def test_a_denoiser_may_work_in_place_in_parallel(options: dict[str, int], check: bool) -> None:
    network = Rational()

    def in_place(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        x[...] = network(x, t)
        return x

    for batch in (1, 2):
        expected = solve(network, normal((batch, 6)), TABLE.timesteps(8), DDIM(TABLE), **options)
        got = solve(in_place, normal((batch, 6)), TABLE.timesteps(8), DDIM(TABLE), check=check, **options)
        assert same_bits(got.sample, expected.sample)


class StaticOutput:
    """A network that writes its output into the same memory at every call, as captured graphs do."""

    def __init__(self, network: Any) -> None:
        self.network, self.output = network, np.empty((64, 6))

    def __call__(self, x: np.ndarray, t: np.ndarray) -> np.ndarray:
        self.output[: len(x)] = self.network(x, t)
        return self.output[: len(x)]


@pytest.mark.parametrize(
    "options", [{"method": "sequential"}, {"window": 4}, {"window": 4, "check": False, "max_rows": 3}]
)
def test_a_denoiser_may_reuse_its_output_memory(options: dict[str, Any]) -> None:
    arguments = (normal((2, 6)), TABLE.timesteps(8), DPMSolver(TABLE))
    expected = solve(Rational(), *arguments, **options)
    got = solve(StaticOutput(Rational()), *arguments, **options)
    assert same_bits(got.sample, expected.sample)


@given(run=runs(steps=FEW), tolerance=tolerances)
def test_results_are_like_the_start(xp: ModuleType, run: Run, tolerance: float) -> None:
    x_T = run.start(xp)
    before = to_numpy(x_T).copy()
    for options in ({"window": run.window, "tolerance": tolerance}, {"method": "sequential"}):
        got = solve(run.network, x_T, run.grid, run.rule, seed=run.seed, save="trajectory", **options)
        for array in (got.sample, got.states, got.trajectory):
            assert type(array) is type(x_T)
            assert array.dtype == x_T.dtype
            assert array_api_compat.device(array) == array_api_compat.device(x_T)
        assert got.sample.shape == got.states.shape == x_T.shape
        assert got.trajectory.shape == (run.steps + 1, *x_T.shape)
        assert got.error_estimate.shape == (run.batch,)
        assert np.all(np.isfinite(got.error_estimate))
        assert same_bits(x_T, before)
        assert got.statuses == (Status.CONVERGED,) * run.batch


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_half_precision_networks(sampler: str, dtype: torch.dtype) -> None:
    """States are kept in float32; the network sees its own dtype."""
    rule, schedule = SAMPLERS[sampler]
    grid = schedule.timesteps(12)
    seen = set()

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.add(x.dtype)
        return TanhNetwork()(x, t)

    x_T = torch.asarray(normal((2, 6))).to(dtype)
    got = solve(network, x_T, grid, rule, 6, tolerance=1e-2)
    assert got.success
    assert got.sample.dtype == dtype
    assert seen == {dtype}
    expected = solve_sequential(network, x_T, grid, rule).sample
    # rounding of every input and output of the network, amplified as in exactness()
    bound = 12 * 15 * float(torch.finfo(dtype).eps) / 2
    assert relative(got.sample.float(), expected.float()) < bound


@pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 2, 2, 2), (2, 1, 1, 1, 4)])
def test_events_of_any_shape(xp: ModuleType, shape: tuple[int, ...]) -> None:
    x_T = normal(shape, xp)
    rule = DPMSolver(TABLE, prediction_type="v_prediction", stochastic=True)
    got = solve(Rational(), x_T, TABLE.timesteps(10), rule, 4, tolerance=0, seed=3)
    expected = solve_sequential(Rational(), x_T, TABLE.timesteps(10), rule, seed=3)
    assert got.sample.shape == shape
    assert relative(got.sample, expected.sample) < exactness("float64")


@pytest.mark.parametrize("sampler", ["ddim, epsilon", "euler, flow", "euler, karras"])
def test_the_network_is_given_the_timesteps_as_they_are(xp: ModuleType, sampler: str) -> None:
    rule, schedule = SAMPLERS[sampler]
    grid = schedule.timesteps(9)
    seen: list[np.ndarray] = []

    def network(x: Any, t: Any) -> Any:
        assert t.shape == (x.shape[0],)
        seen.append(to_numpy(t))
        return Rational()(x, t)

    solve(network, normal((2, 3), xp), xp.asarray(grid), rule, 4)
    every = np.concatenate(seen)
    assert every.dtype == grid.dtype
    assert set(every.tolist()) == set(grid.tolist())
