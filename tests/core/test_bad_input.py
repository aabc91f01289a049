"""Bad arguments are refused at the front door; bad networks end the run with everything reached so far."""

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import array_api_strict
import numpy as np
import pytest
import torch

import parasolver_core
from parasolver_core import (
    DDIM,
    DDPM,
    ConvergenceError,
    DPMSolver,
    Euler,
    NoiseSchedule,
    NondeterministicDenoiserError,
    NonFiniteError,
    ParallelIntegralSolver,
    SequentialSolver,
    Status,
    clip_sample,
    solve,
    solve_sequential,
)
from parasolver_core.solver.loop import Solver
from tests.core.problems import EPS, Mixture, Rational, TanhNetwork, normal, relative

TABLE = NoiseSchedule.linear()
RULE = DDIM(TABLE, prediction_type="v_prediction")
GRID = TABLE.timesteps(20)
NETWORK = Rational()

BOTH = pytest.mark.parametrize("options", [{"method": "sequential"}, {"window": 6}, {"window": 1}], ids=str)


def never(x: Any, t: Any) -> Any:
    raise AssertionError("the network must not be called")


# 1. Arguments


def bad(error: type[Exception], name: str, **arguments: Any) -> Any:
    shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    shown = re.sub(r" at 0x\w+|[\n\x00]", "", shown)[:60]  # the same in every worker process
    return pytest.param(error, name, arguments, id=shown)


NAN = float("nan")
INF = float("inf")


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


# 2. What the network returns


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


# 3. NaN and infinity


def failing(value: float, timestep: int, sample_sign: float) -> Any:
    """NaN or infinity at one timestep, and there for the rows whose first entry has that sign only."""

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        out = NETWORK(x, t)
        out[(t == timestep) & (np.sign(x[:, 0]) == sample_sign), 1] = value
        return out

    return network


def start_of_two_signs() -> np.ndarray:
    """The first entries keep their sign all the way."""
    x_T = normal((3, 4))
    x_T[:, 0] = 5.0, -5.0, 6.0
    return x_T


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # see the test after this one
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("step", [0, 1, 9, 19])
@BOTH
def test_nonfinite_prediction(value: float, step: int, options: dict[str, Any]) -> None:
    network = failing(value, GRID[step], -1.0)
    x_T, rule = start_of_two_signs(), DDIM(TABLE, prediction_type="sample")
    grid_after = {"save": "trajectory", **options}
    with pytest.raises(NonFiniteError, match=rf"sample 1 at step {step} \(timestep {GRID[step]}\)") as caught:
        solve(network, x_T, GRID, rule, tolerance=1e-3, **options)
    returned = solve(network, x_T, GRID, rule, tolerance=1e-3, throw=False, **grid_after)
    for got in (caught.value.solution, returned):
        assert got.status is Status.NONFINITE_MODEL
        assert not got.success
        assert got.statuses == (Status.CONVERGED, Status.NONFINITE_MODEL, Status.CONVERGED)
        assert got.steps[0] == got.steps[2] == 20
        assert got.steps[1] <= step
        assert np.all(np.isfinite(got.sample))
        assert np.all(np.isfinite(got.states))
    np.testing.assert_array_equal(returned.sample, caught.value.solution.sample)
    np.testing.assert_array_equal(returned.states[1], returned.trajectory[returned.steps[1], 1])

    healthy = solve(network, x_T[[0, 2]], GRID, rule, tolerance=1e-3, **options)
    np.testing.assert_array_equal(returned.sample[[0, 2]], healthy.sample)


@BOTH
def test_the_first_of_several_samples_that_fail_is_named(options: dict[str, Any]) -> None:
    """Also where a later one has failed rounds before."""

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        late, early = (x[:, :1] > 50) & (t[:, None] <= GRID[6]), (x[:, :1] < -50) & (t[:, None] <= GRID[2])
        return np.where(late | early, np.nan, 0 * x)

    x_T = np.array([[0.0, 1.0], [99.0, 1.0], [-99.0, 1.0]])
    got = solve(network, x_T, GRID, RULE, throw=False, **options)
    assert [status.name for status in got.statuses] == ["CONVERGED", "NONFINITE_MODEL", "NONFINITE_MODEL"]
    assert got.steps == (20, 6, 2)
    assert got.message.startswith(f"The denoiser gave NaN or infinity for sample 1 at step 6 (timestep {GRID[6]})")


def test_infinity_is_an_error_and_not_a_warning() -> None:
    with pytest.raises(NonFiniteError, match=rf"gave NaN or infinity for sample 1 at step 1 \(timestep {GRID[1]}\)"):
        solve(failing(INF, GRID[1], -1.0), start_of_two_signs(), GRID, DDIM(TABLE, prediction_type="sample"))


@BOTH
def test_after_a_failure_the_trajectory_is_nan(options: dict[str, Any]) -> None:
    rule = DDIM(TABLE, prediction_type="sample")
    got = solve(
        failing(NAN, GRID[9], -1.0), start_of_two_signs(), GRID, rule, save="trajectory", throw=False, **options
    )
    final = got.steps[1]
    assert np.all(np.isfinite(got.trajectory[: final + 1]))
    assert np.all(np.isnan(got.trajectory[final + 1 :, 1]))
    assert np.all(np.isfinite(got.trajectory[:, [0, 2]]))


@BOTH
def test_the_message_names_the_round_of_the_failure(options: dict[str, Any]) -> None:
    calls = 0

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        out = NETWORK(x, t)
        if calls == 2:
            out[x[:, 0] < 0] = NAN
        return out

    with pytest.raises(NonFiniteError, match=r"in round 2\b"):
        solve(network, start_of_two_signs(), GRID, DDIM(TABLE, prediction_type="sample"), check=False, **options)


def test_a_failed_sample_is_not_evaluated_again_sequentially() -> None:
    check_not_evaluated_again({"method": "sequential"})


@pytest.mark.parametrize("window", [1, 6])
def test_a_failed_sample_is_not_evaluated_again(window: int) -> None:
    check_not_evaluated_again({"window": window})


def check_not_evaluated_again(options: dict[str, Any]) -> None:
    failed = False

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        nonlocal failed
        ours = x[:, 0] < 0
        assert not (failed and np.any(ours & (t != GRID[0])))  # the first node again: the test of determinism
        out = NETWORK(x, t)
        out[ours & (t == GRID[5])] = NAN
        failed |= np.any(ours) and t[np.argmax(ours)] == GRID[5]  # at its true input
        return out

    got = solve(network, start_of_two_signs(), GRID, DDIM(TABLE, prediction_type="sample"), throw=False, **options)
    assert got.statuses[1] is Status.NONFINITE_MODEL


@pytest.mark.parametrize("failing_round", [1, 2, 3, 4])
def test_nan_once_in_a_round(failing_round: int) -> None:
    """A network that fails once, everywhere: all samples end, and nothing of the round is accepted."""
    calls = 0

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        return NETWORK(x, t) * (NAN if calls == failing_round else 1.0)

    got = solve(network, normal((2, 3)), GRID, RULE, 6, tolerance=1e-6, check=False, throw=False)
    assert got.status is Status.NONFINITE_MODEL
    assert got.stats.rounds == calls == failing_round
    assert all(one.accepted == 0 for one in got.stats.history[-1].samples)
    assert np.all(np.isfinite(got.sample))


def test_nan_for_every_sample_names_the_first() -> None:
    with pytest.raises(NonFiniteError, match=r"sample 0 at step 0 \(timestep 999\)") as caught:
        solve(lambda x, t: x * NAN, normal((3, 2)), GRID, RULE)
    assert caught.value.solution.steps == (0, 0, 0)
    np.testing.assert_array_equal(caught.value.solution.sample, normal((3, 2)))


@BOTH
def test_a_result_beyond_the_range_of_float16_is_not_a_success(options: dict[str, Any]) -> None:
    karras = NoiseSchedule.karras()
    x_T = torch.full((1, 3), 6e4, dtype=torch.float16)
    got = solve(
        lambda x, t: torch.full_like(x, -3e3), x_T, karras.timesteps(10), Euler(karras, prediction_type="epsilon"),
        throw=False, **options,
    )  # fmt: skip
    assert not got.success
    assert bool(torch.all(torch.isfinite(got.sample)))


@BOTH
def test_float16_states_near_the_end_of_their_range(options: dict[str, Any]) -> None:
    """Squares and sums of such states overflow in float16, and must not be taken there."""
    x_T = torch.full((2, 1000), 6e4, dtype=torch.float16)
    rule = Euler(NoiseSchedule.flow_matching())
    network = lambda x, t: torch.tanh(x / 6e4) * 3e4 * t.to(x.dtype)[:, None]  # noqa: E731
    grid = NoiseSchedule.flow_matching().timesteps(12)
    got = solve(network, x_T, grid, rule, tolerance=1e-3, **options)
    assert got.success
    expected = solve_sequential(lambda x, t: network(x, t), x_T.double(), grid, rule)
    assert relative(got.sample.double(), expected.sample) < 12 * 2**-11 * 2  # each prediction is rounded
    assert bool(torch.all(torch.isfinite(got.sample)))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("window", [1, 6])
def test_float32_whose_squares_overflow(window: int) -> None:
    """window=1 is promised to be the sequential sampler, which never squares a state."""
    x_T = normal((1, 3), dtype="float32")
    rule = DDIM(TABLE, prediction_type="sample")
    network = lambda x, t: np.full_like(x, 1e20)  # noqa: E731
    expected = solve_sequential(network, x_T, GRID, rule)
    assert np.all(np.isfinite(expected.sample))
    got = solve(network, x_T, GRID, rule, window)
    np.testing.assert_allclose(got.sample, expected.sample, rtol=1e-6)


@BOTH
def test_overflow_of_the_solver_is_told_from_that_of_the_network(
    options: dict[str, Any],
) -> None:
    with np.errstate(all="ignore"):
        got = solve(
            lambda x, t: np.full_like(x, 3e38), normal((1, 3), dtype="float32"), GRID, DDIM(TABLE), throw=False,
            **options,
        )  # fmt: skip
    assert got.status is Status.NONFINITE_SOLVER
    assert np.all(np.isfinite(got.sample))
    assert np.all(np.isfinite(got.states))


# 4. Networks that do not keep their contract


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


# 5. Interruptions


@BOTH
@pytest.mark.parametrize("call", [1, 2, 4])
def test_an_error_of_the_network_comes_out_as_it_is(options: dict[str, Any], call: int) -> None:
    class BoomError(Exception):
        pass

    calls = 0

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == call:
            raise BoomError("boom", 42)
        return NETWORK(x, t)

    solver_state: dict[str, Any] = {"seed": 3}
    with pytest.raises(BoomError, match="boom") as caught:
        solve(network, normal((2, 3)), GRID, DDPM(TABLE), check=False, **solver_state, **options)
    error = caught.value
    assert error.args == ("boom", 42)
    (note,) = error.__notes__
    assert f"call {call}" in note
    assert re.search(r"steps \d+\.\.\d+, timesteps \d+\.\.\d+", note)
    if options.get("window") != 6:
        assert f"steps {call - 1}..{call - 1}, timesteps {GRID[call - 1]}..{GRID[call - 1]}" in note
    assert error.solution.status is Status.FAILED
    assert error.solution.stats.rounds == call - 1
    assert error.solution.stats.calls in (call - 1, call)
    assert np.all(np.isfinite(error.solution.sample))
    assert min(error.solution.steps) >= call - 1


@BOTH
@pytest.mark.parametrize("raised", [StopIteration, GeneratorExit, SystemExit, RecursionError, torch.OutOfMemoryError])
def test_unusual_exceptions_of_the_network(options: dict[str, Any], raised: type[BaseException]) -> None:
    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        raise raised("from inside")

    with pytest.raises(raised, match="from inside") as caught:
        solve(network, normal((2, 3)), GRID, RULE, **options)
    assert caught.value.solution.status is Status.FAILED


@BOTH
@pytest.mark.parametrize("where", ["network", "callback"])
def test_keyboard_interrupt(options: dict[str, Any], where: str) -> None:
    interrupted = False

    def interrupt_at(round_: int) -> None:
        nonlocal interrupted
        if round_ == 3 and not interrupted:
            interrupted = True
            raise KeyboardInterrupt

    calls = 0

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        if where == "network":
            interrupt_at(calls)
        return NETWORK(x, t)

    def callback(state: Any) -> None:
        if where == "callback":
            interrupt_at(state.stats.rounds)

    method = options.get("method")
    solver = SequentialSolver(RULE) if method else ParallelIntegralSolver(RULE, options["window"], check=False)
    with pytest.raises(KeyboardInterrupt) as caught:
        solver.solve(network, normal((2, 3)), GRID, callback=callback)
    partial = caught.value.solution
    assert partial.status is Status.INTERRUPTED
    assert partial.stats.rounds == (2 if where == "network" else 3)
    assert np.all(np.isfinite(partial.sample))
    assert "Interrupted" in partial.message

    again = solver.solve(network, normal((2, 3)), GRID, callback=callback)
    fresh = solver.solve(NETWORK, normal((2, 3)), GRID)
    np.testing.assert_array_equal(again.sample, fresh.sample)


@BOTH
def test_stop_iteration_from_the_callback_returns_what_there_is(options: dict[str, Any]) -> None:
    def callback(state: Any) -> None:
        if state.stats.rounds == 2:
            raise StopIteration

    got = solve(NETWORK, normal((2, 3)), GRID, RULE, tolerance=1e-8, callback=callback, **options)
    assert got.status is Status.STOPPED
    assert got.statuses == (Status.STOPPED,) * 2
    assert got.stats.rounds == 2
    assert not got.success
    assert np.all(np.isfinite(got.sample))
    assert "Stopped" in got.message


def test_stop_iteration_after_the_last_round_is_still_a_success() -> None:
    def callback(state: Any) -> None:
        if Status.RUNNING not in state.statuses:
            raise StopIteration

    assert solve(NETWORK, normal((2, 3)), GRID, RULE, callback=callback).success


def test_an_error_of_the_callback() -> None:
    with pytest.raises(KeyError, match="missing") as caught:
        solve(NETWORK, normal((2, 3)), GRID, RULE, callback=lambda state: {}["missing"])
    assert caught.value.solution.status is Status.FAILED
    assert caught.value.solution.stats.rounds == 1


@BOTH
def test_max_rounds(options: dict[str, Any]) -> None:
    arguments = (NETWORK, normal((2, 3)), GRID, RULE)
    with pytest.raises(ConvergenceError, match=r"max_rounds=1: 1 of 20 steps.*20 always suffice") as caught:
        solve(*arguments, max_rounds=1, tolerance=1e-6, **options)
    returned = solve(*arguments, max_rounds=1, tolerance=1e-6, throw=False, **options)
    for got in (caught.value.solution, returned):
        assert got.status is Status.MAX_ROUNDS
        assert got.stats.rounds == 1
        assert got.steps == (1, 1)
        assert np.all(np.isfinite(got.sample))
    assert solve(*arguments, max_rounds=20, tolerance=0, **options).success


def test_the_estimate_after_max_rounds_is_better_than_the_last_state() -> None:
    """What is returned is a guess of the sample, not the noisy state where the rounds ended."""
    denoiser = Mixture(TABLE, "epsilon")
    arguments = (denoiser, normal((4, 16)), GRID, DDIM(TABLE))
    exact = solve_sequential(*arguments).sample
    got = solve(*arguments, 20, tolerance=1e-9, max_rounds=4, throw=False)
    assert got.status is Status.MAX_ROUNDS
    assert relative(got.sample, exact) < 0.5 * relative(got.states, exact)


# 6. Networks that no surrogate follows


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


# 7. torch


@BOTH
def test_no_graph_is_kept(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 3)
    x_T = torch.randn(2, 3, requires_grad=True)
    seen = []

    def callback(state: Any) -> None:
        seen.extend([state.estimate().requires_grad, state.states.requires_grad])

    got = solve(lambda x, t: torch.tanh(network(x)), x_T, GRID, RULE, callback=callback, save="trajectory", **options)
    for array in (got.sample, got.states, got.trajectory):
        assert not array.requires_grad
        assert array.grad_fn is None
    assert x_T.grad is None
    assert x_T.requires_grad
    assert torch.is_grad_enabled()
    assert not any(seen)


@pytest.mark.filterwarnings("ignore:torch.asarray:UserWarning")
@BOTH
def test_results_of_a_start_that_requires_gradients(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 3)
    x_T = torch.randn(1, 3, requires_grad=True)
    recorded = []

    def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        recorded.append((x.requires_grad, torch.is_grad_enabled()))
        return torch.tanh(network(x))

    got = solve(denoiser, x_T, GRID, RULE, save="trajectory", **options)
    assert set(recorded) == {(False, False)}
    assert not any(array.requires_grad for array in (got.sample, got.states, got.trajectory))
    plain = solve(denoiser, x_T.detach(), GRID, RULE, **options)
    assert torch.equal(plain.sample, got.sample)
    assert torch.is_grad_enabled()


def test_a_progress_bar_is_closed_by_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    from tqdm import tqdm

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        if np.any(t == GRID[10]):
            raise ValueError("boom")
        return NETWORK(x, t)

    with pytest.raises(ValueError, match="boom"):
        solve(network, normal((1, 3)), GRID, RULE, progress=True)
    assert not tqdm._instances
    solve(NETWORK, normal((2, 3)), GRID, RULE, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "40/40" in captured.err


class BrokenPipe(io.StringIO):
    """Takes a few words, then nothing more."""

    words = 0

    def write(self, text: str) -> int:
        self.words += 1
        if self.words > 4:
            raise BrokenPipeError("nobody listens")
        return super().write(text)


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("make", [lambda: None, closed, BrokenPipe], ids=["none", "closed", "breaks"])
def test_a_progress_bar_with_nowhere_to_show_it(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", make())
    shown = solve(NETWORK, normal((2, 3)), GRID, RULE, progress=True)
    np.testing.assert_array_equal(shown.sample, solve(NETWORK, normal((2, 3)), GRID, RULE).sample)


def test_a_progress_bar_whose_stream_is_closed_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert solve(NETWORK, normal((2, 3)), GRID, RULE, progress=True, callback=lambda state: stream.close()).success


def test_a_device_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("it is there")
    with pytest.raises(ValueError, match=r"^state_device: .*got 'cuda' \((AssertionError|RuntimeError): "):
        solve(never, torch.ones(2, 3), GRID, RULE, state_device="cuda")


def test_a_start_without_a_batch_is_understood() -> None:
    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        return np.ones((len(x), 8))

    with pytest.raises(ValueError, match=r"x_T of shape \(n,\) is n samples of one number each; .*x_T\[None\]"):
        solve(network, np.ones(8), GRID, RULE, 1)


def test_results_say_what_they_are_in_a_line() -> None:
    got = solve(NETWORK, normal((2, 3), dtype="float32"), GRID, RULE, 6)
    rounds, evaluations = got.stats.rounds, got.stats.evaluations
    assert repr(got) == f"Solution(converged, {rounds} rounds, {evaluations} evaluations, sample float32 (2, 3))"
    record = got.stats.history[1]
    assert repr(record).startswith(
        f"RoundRecord(round=2, evaluations={record.evaluations}, accepted={record.accepted}, "
    )
    assert "array" not in repr(record)
    assert len(repr(record.samples[0])) < 120
    assert got.message == f"Converged in {rounds} rounds instead of 20, with {evaluations / 2:g} evaluations a sample."
    plain = solve_sequential(NETWORK, normal((1, 3)), GRID, RULE)
    assert plain.message == "Converged in 20 rounds, with 20 evaluations."


def test_the_core_prints_and_logs_nothing() -> None:
    code = """
import numpy as np
from parasolver_core import *
schedule = NoiseSchedule.linear()
solve(lambda x, t: np.tanh(x), np.ones((1, 2)), schedule.timesteps(9), DDIM(schedule))
"""
    root = Path(parasolver_core.__file__).parents[1]
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_network_of_tanh_is_what_the_others_are_compared_with() -> None:
    """The shared network itself: of the promised norm, and the same in NumPy and torch."""
    network = TanhNetwork(size=6, gain=1.5)
    assert np.prod([np.linalg.norm(w, 2) for w in network.weights]) == pytest.approx(1.5)
    x, t = normal((4, 6)), np.arange(4)
    np.testing.assert_allclose(network(torch.asarray(x), torch.asarray(t)).numpy(), network(x, t), rtol=1e-13)
