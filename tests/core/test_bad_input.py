"""Bad arguments are refused at the front door; bad networks end the run with everything reached so far."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parasolver_core import (
    DDIM,
    DDPM,
    DPMSolver,
    Euler,
    NoiseSchedule,
    ParallelIntegralSolver,
    SequentialSolver,
    Status,
    clip_sample,
    solve,
)
from parasolver_core.solver.loop import Solver
from tests.core.problems import normal
from tests.core.wrong_runs import GRID, INF, NAN, NETWORK, RULE, TABLE, never


def bad(error: type[Exception], name: str, **arguments: Any) -> Any:
    shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    shown = re.sub(r" at 0x\w+|[\n\x00]", "", shown)[:60]  # the same in every worker process
    return pytest.param(error, name, arguments, id=shown)


class Doubled(np.ndarray):
    """With an arithmetic of its own."""

    def __mul__(self, other: Any) -> Any:
        return 2 * super().__mul__(other)


class Wrapped(torch.Tensor):
    """A subclass, as libraries of pictures have it."""


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        bad(TypeError, "x_T", x_T=[[0.1, 0.2]]),
        bad(TypeError, "x_T", x_T=None),
        bad(TypeError, "x_T", x_T=0.5),
        bad(TypeError, "x_T", x_T=np.ones((2, 3), dtype=np.int64)),
        bad(TypeError, "x_T", x_T=np.ones((2, 3), dtype=bool)),
        bad(TypeError, "x_T", x_T=np.ones((2, 3), dtype=complex)),
        bad(TypeError, "x_T", x_T=torch.ones((2, 3), dtype=torch.int32)),
        bad(ValueError, "x_T", x_T=np.array(1.0)),
        bad(ValueError, "x_T", x_T=np.ones((0, 3))),
        bad(ValueError, "x_T", x_T=np.ones((2, 0))),
        bad(ValueError, "x_T", x_T=np.array([[1.0, NAN]])),
        bad(ValueError, "x_T", x_T=torch.tensor([[1.0, INF]])),
        bad(TypeError, "x_T", x_T=np.ma.array(np.ones((2, 3)), mask=[[1, 0, 0], [0, 0, 0]])),
        bad(TypeError, "x_T", x_T=np.ma.array(np.ones((2, 3)))),
        bad(TypeError, "x_T", x_T=np.ones((2, 3)).view(Doubled)),
        bad(TypeError, "x_T", x_T=np.ones((2, 3), dtype=">f8" if sys.byteorder == "little" else "<f8")),
        bad(TypeError, "x_T", x_T=np.ones((2, 3), dtype=object)),
        bad(TypeError, "x_T", x_T=torch.ones((2, 3)).to_sparse()),
        bad(TypeError, "x_T", x_T=torch.ones((2, 3), device="meta")),
        bad(TypeError, "x_T", x_T=torch.ones((2, 3)).to(torch.float8_e4m3fn)),
        bad(TypeError, "x_T", x_T=torch.ones((2, 3)).to(torch.float8_e5m2)),
        bad(TypeError, "x_T", x_T=torch.ones((2, 3)).as_subclass(Wrapped)),
        bad(TypeError, "start", start=np.ma.array(np.ones((21, 2, 3)))),
        bad(TypeError, "timesteps", timesteps=np.ma.array([9, 5, 1], mask=[0, 1, 0])),
        bad(TypeError, "timesteps", timesteps=torch.tensor([9, 5, 1], device="meta")),
        bad(ValueError, "timesteps", timesteps=[]),
        bad(ValueError, "timesteps", timesteps=None),
        bad(ValueError, "timesteps", timesteps=50),
        bad(ValueError, "timesteps", timesteps=[[9, 5, 1]]),
        bad(ValueError, "timesteps", timesteps=[9, 5, 5, 1]),
        bad(ValueError, "timesteps", timesteps=[9, 1, 5]),
        bad(ValueError, "timesteps", timesteps=[1, 5, 9]),
        bad(ValueError, "timesteps", timesteps=[9.0, NAN, 1.0]),
        bad(ValueError, "timesteps", timesteps=[INF, 1.0]),
        bad(ValueError, "timesteps", timesteps=[9.5, 5.0, 1.0]),
        bad(ValueError, "timesteps", timesteps=[1000, 5, 1]),
        bad(ValueError, "timesteps", timesteps=[9, 5, -1]),
        bad(TypeError, "timesteps", timesteps=["9", "5"]),
        bad(TypeError, "timesteps", timesteps=[True, False]),
        bad(TypeError, "timesteps", timesteps=[9 + 0j, 5 + 0j]),
        bad(TypeError, "timesteps", timesteps=[object(), object()]),
        bad(
            TypeError,
            "timesteps",
            timesteps=torch.tensor([9, 5], dtype=torch.bfloat16),
        ),
        bad(TypeError, "step_rule", step_rule=None),
        bad(TypeError, "step_rule", step_rule=TABLE),
        bad(TypeError, "step_rule", step_rule=DDIM),
        bad(TypeError, "denoiser", denoiser=None),
        bad(TypeError, "denoiser", denoiser=np.ones(3)),
        bad(ValueError, "window", window=0),
        bad(ValueError, "window", window=-1),
        bad(TypeError, "window", window=2.5),
        bad(TypeError, "window", window=2.0),
        bad(TypeError, "window", window=True),
        bad(ValueError, "window", window="3"),
        bad(TypeError, "window", window=None),
        bad(ValueError, "tolerance", tolerance=-1e-9),
        bad(ValueError, "tolerance", tolerance=NAN),
        bad(ValueError, "tolerance", tolerance=INF),
        bad(ValueError, "tolerance", tolerance=1.0),
        bad(ValueError, "tolerance", tolerance=5),
        bad(TypeError, "tolerance", tolerance="1e-2"),
        bad(TypeError, "tolerance", tolerance=None),
        bad(TypeError, "tolerance", tolerance=True),
        bad(TypeError, "tolerance", tolerance=1e-2 + 0j),
        bad(ValueError, "max_rounds", max_rounds=0),
        bad(TypeError, "max_rounds", max_rounds=1.0),
        bad(TypeError, "max_rounds", max_rounds="all"),
        bad(ValueError, "max_rows", max_rows=0),
        bad(ValueError, "max_rows", max_rows=-4),
        bad(TypeError, "max_rows", max_rows=True),
        bad(TypeError, "max_rows", max_rows=1.5),
        bad(ValueError, "warmup_steps", warmup_steps=-1),
        bad(TypeError, "warmup_steps", warmup_steps=0.5),
        bad(TypeError, "warmup_steps", warmup_steps=None),
        bad(ValueError, "method", method="fastest"),
        bad(ValueError, "method", method=None),
        bad(ValueError, "method", method=3),
        bad(ValueError, "method", method=["secant"]),
        bad(ValueError, "save", save="all"),
        bad(ValueError, "save", save=None),
        bad(ValueError, "noise", seed=1, noise=np.zeros((20, 2, 3))),
        bad(ValueError, "noise", noise=np.zeros((20, 3, 2))),
        bad(ValueError, "noise", noise=np.zeros((19, 2, 3))),
        bad(ValueError, "noise", noise=np.zeros((2, 3))),
        bad(ValueError, "noise", noise=0.0),
        bad(ValueError, "seed", seed=-1),
        bad(ValueError, "seed", seed=2**64),
        bad(ValueError, "seed", seed=[1]),
        bad(ValueError, "seed", seed=[1, 2, 3]),
        bad(ValueError, "seed", seed=[]),
        bad(ValueError, "seed", seed=[1, -2]),
        bad(TypeError, "seed", seed=1.5),
        bad(TypeError, "seed", seed=[1.5, 2.5]),
        bad(TypeError, "seed", seed="12"),
        bad(TypeError, "seed", seed=True),
        bad(TypeError, "seed", seed=[None, 1]),
        bad(TypeError, "seed", seed=torch.Generator()),
        bad(TypeError, "seed", seed=np.array(3)),
        bad(TypeError, "seed", seed=[1, [2, 3]]),
        bad(TypeError, "noise", noise=np.zeros((20, 2, 3), dtype=complex)),
        bad(TypeError, "noise", noise=np.zeros((20, 2, 3), dtype=object)),
        bad(TypeError, "noise", noise=np.full((20, 2, 3), "a")),
        bad(TypeError, "noise", noise=np.ma.array(np.zeros((20, 2, 3)))),
        bad(TypeError, "noise", noise=torch.zeros((20, 2, 3)).to_sparse()),
        bad(TypeError, "noise", noise=torch.zeros((20, 2, 3)).to(torch.float8_e5m2)),
    ],
)
def test_refused_before_the_network_is_called(error: type[Exception], name: str, arguments: dict[str, Any]) -> None:
    call: dict[str, Any] = {"denoiser": never, "x_T": normal((2, 3)), "timesteps": GRID, "step_rule": DDPM(TABLE)}
    with pytest.raises(error, match=f"^{name}: "):
        solve(**(call | arguments))


@pytest.mark.parametrize(
    ("error", "name", "make"),
    [
        (TypeError, "schedule", lambda: DDIM(None)),
        (TypeError, "schedule", lambda: DDPM([0.9, 0.5])),
        (ValueError, "eta", lambda: DDIM(TABLE, eta=-0.1)),
        (ValueError, "eta", lambda: DDIM(TABLE, eta=1.1)),
        (ValueError, "eta", lambda: DDIM(TABLE, eta=NAN)),
        (ValueError, "variance_type", lambda: DDPM(TABLE, variance_type="learned")),
        (ValueError, "order", lambda: DPMSolver(TABLE, order=4)),
        (ValueError, "order", lambda: DPMSolver(TABLE, order=0)),
        (ValueError, "solver_type", lambda: DPMSolver(TABLE, solver_type="bh2")),
        (ValueError, "clip_range", lambda: clip_sample(NETWORK, TABLE, clip_range=0)),
        (ValueError, "clip_range", lambda: clip_sample(NETWORK, TABLE, clip_range=NAN)),
        (TypeError, "clip_range", lambda: clip_sample(NETWORK, TABLE, clip_range="x")),
        (TypeError, "schedule", lambda: clip_sample(NETWORK, 3)),
        (ValueError, "prediction_type", lambda: clip_sample(NETWORK, TABLE, 0)),
        (ValueError, "prediction_type", lambda: clip_sample(NETWORK, TABLE, "")),
        (TypeError, "max_rounds", lambda: ParallelIntegralSolver(RULE, max_rounds="3")),
    ],
)
def test_refused_when_made(error: type[Exception], name: str, make: Any) -> None:
    with pytest.raises(error, match=f"^{name}: "):
        make()


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_a_start_whose_product_is_another() -> None:
    with pytest.raises(TypeError, match=r"^x_T: .*subclass matrix.*np\.asarray"):
        solve(never, np.matrix(np.ones((2, 3))), GRID, RULE)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_start() -> None:
    nested = torch.nested.nested_tensor([torch.ones(3), torch.ones(2)])
    with pytest.raises(TypeError, match=r"^x_T: .*nested.*to_padded_tensor"):
        solve(never, nested, GRID, RULE)


def test_a_masked_start_is_told_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"masked\.filled"):
        solve(never, np.ma.array(np.ones((2, 3))), GRID, RULE)


def test_a_memory_map_is_a_plain_array(tmp_path: Path) -> None:
    x_T = np.memmap(tmp_path / "x", dtype=np.float64, mode="w+", shape=(2, 3))
    x_T[:] = normal((2, 3))
    np.testing.assert_array_equal(
        solve(NETWORK, x_T, GRID, RULE).sample, solve(NETWORK, normal((2, 3)), GRID, RULE).sample
    )


def test_a_tolerance_in_percent_is_understood() -> None:
    with pytest.raises(ValueError, match=r"for 5 % give 0\.05"):
        solve(never, normal((1, 3)), GRID, RULE, tolerance=5)


@pytest.mark.parametrize("rule", [DDIM, DDPM, DPMSolver, Euler])
def test_unknown_prediction_type(rule: Any) -> None:
    with pytest.raises(ValueError, match=r"^prediction_type: .*'eps'; did you mean 'epsilon'\?"):
        rule(TABLE, prediction_type="eps")


def test_an_order_that_is_no_integer() -> None:
    with pytest.raises((TypeError, ValueError), match=r"^order: "):
        solve(never, normal((1, 3)), GRID, DPMSolver(TABLE, order=2.0))


@pytest.mark.parametrize("arguments", [{"window": 0}, {"tolerance": NAN}, {"warmup_steps": -1}], ids=str)
def test_refused_also_where_not_used(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(arguments))}: "):
        solve(NETWORK, normal((1, 3)), GRID, RULE, method="sequential", **arguments)


@pytest.mark.parametrize("kind", [ParallelIntegralSolver, SequentialSolver])
def test_a_run_that_has_ended_is_not_stepped_on(kind: type[Solver]) -> None:
    solver = kind(RULE)
    state = solver.init(NETWORK, normal((2, 3)), GRID)
    while not solver.done(state):
        solver.step(state)
    rounds = state.stats.rounds
    with pytest.raises(RuntimeError, match="the run has ended"):
        solver.step(state)
    assert state.stats.rounds == rounds
    assert solver.result(state).status is Status.CONVERGED


def test_a_callback_that_is_not_callable() -> None:
    with pytest.raises(TypeError, match=r"^callback: "):
        solve(never, normal((1, 3)), GRID, RULE, callback=3)


def test_epsilon_of_a_sample_without_signal_names_the_step() -> None:
    schedule = NoiseSchedule.from_alphas_cumprod([0.9, 0.5, 0.0])
    with pytest.raises(ValueError, match=r"step 0 \(timestep 2\) is not finite"):
        solve(never, normal((1, 3)), [2, 1, 0], DDIM(schedule))
    for kind in ("sample", "v_prediction"):
        assert solve(NETWORK, normal((1, 3)), [2, 1, 0], DDIM(schedule, prediction_type=kind)).success
    for order in (1, 2, 3):
        for stochastic in (False, True):
            rule = DPMSolver(schedule, prediction_type="sample", order=order, stochastic=stochastic)
            assert solve(NETWORK, normal((1, 3)), [2, 1, 0], rule).success
