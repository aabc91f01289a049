"""Numbers of NumPy and tensors without axes are numbers: what they are given for is as with Python's."""

import time
from typing import Any

import numpy as np
import pytest
import torch

from parasolver_core import DDIM, Euler, NoiseSchedule, ParallelIntegralSolver, calibrate, solve
from parasolver_core.solver.deadline import Deadline
from tests.core.any_runs import same_bits
from tests.core.problems import normal, relative

TABLE = NoiseSchedule.linear()
LONG = TABLE.timesteps(300)
COUNTS = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.uint64]


def network(x: Any, t: Any) -> Any:
    return np.tanh(2 * x)


@pytest.mark.parametrize("kind", COUNTS)
def test_counts_of_few_bits_or_without_a_sign(kind: Any) -> None:
    """100 nodes of each sample are more than 127, 3 times 100 more than 255, and uint64 plus int64 is no integer."""
    problem = network, normal((3, 4)), LONG, DDIM(TABLE)
    want = solve(*problem, 100, max_rows=100, max_rounds=100, buckets=(100, 120), check=False)
    options: dict[str, Any] = {
        "check": False,
        "max_rows": kind(100),
        "max_rounds": kind(100),
        "buckets": np.array([100, 120], kind),
    }
    got = solve(*problem, kind(100), **options)
    assert same_bits(got.sample, want.sample)
    assert (got.stats.rounds, got.stats.evaluations) == (want.stats.rounds, want.stats.evaluations)


def test_a_solver_keeps_python_numbers() -> None:
    numbers: dict[str, Any] = {"warmup_steps": np.uint8(3), "subintervals": np.uint64(7), "max_rows": np.int8(5)}
    rule = DDIM(TABLE)
    solver = ParallelIntegralSolver(rule, np.uint64(9), tolerance=np.float16(0.25), buckets=[4, np.int8(2)], **numbers)
    plain = ParallelIntegralSolver(rule, 9, tolerance=0.25, buckets=(4, 2), warmup_steps=3, subintervals=7, max_rows=5)
    assert solver == plain
    assert hash(solver) == hash(plain)
    assert repr(solver) == repr(plain)


@pytest.mark.filterwarnings("error")
def test_a_tolerance_in_half_precision() -> None:
    problem = network, normal((3, 4)), LONG, DDIM(TABLE), 16
    got, want = (solve(*problem, tolerance=one) for one in (np.float16(0.0625), 0.0625))
    assert same_bits(got.sample, want.sample)


def test_a_deadline_in_single_precision_is_no_coarser(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has been up for months counts so many seconds that float32 has no tenths of them left."""
    monkeypatch.setattr(time, "perf_counter", lambda: 2e7 + 0.5)
    assert Deadline(np.float32(0.125))._end == 2e7 + 0.625


def test_a_calibration_keeps_python_numbers() -> None:
    problem = network, normal((8, 4)), TABLE.timesteps(12), DDIM(TABLE)
    found = calibrate(*problem, np.uint64(4), tolerance=np.float32(0.25))
    assert (type(found.window), type(found.tolerance)) == (int, float)


def test_schedules_of_numbers_in_half_precision() -> None:
    first, last = np.float16(2.0**-12), np.float16(2.0**-6)
    for make in (NoiseSchedule.linear, NoiseSchedule.scaled_linear):
        got, want = make(first, last), make(float(first), float(last))
        np.testing.assert_array_equal(got.alphas_cumprod, want.alphas_cumprod)
    np.testing.assert_array_equal(
        NoiseSchedule.squared_cosine(max_beta=np.float16(0.5)).alphas_cumprod,
        NoiseSchedule.squared_cosine(max_beta=0.5).alphas_cumprod,
    )
    assert DDIM(TABLE, eta=np.float16(0.5)) == DDIM(TABLE, eta=0.5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.array, torch.tensor])
def test_continuous_schedules_of_any_numbers(kind: Any) -> None:
    """As of a tensor, a rho of 1/64 once gave times that were not finite."""
    got = NoiseSchedule.karras(kind(0.125), kind(8.0), rho=kind(0.015625), sigma_data=kind(0.5), final_sigma=kind(0.0))
    np.testing.assert_array_equal(got.timesteps(9), NoiseSchedule.karras(0.125, 8.0, rho=0.015625).timesteps(9))
    assert hash(got) == hash(NoiseSchedule.karras(0.125, 8.0, rho=0.015625))
    flow = NoiseSchedule.flow_matching(kind(3.0), final_sigma=kind(0.25))
    np.testing.assert_array_equal(flow.timesteps(9), NoiseSchedule.flow_matching(3.0, final_sigma=0.25).timesteps(9))


@pytest.mark.parametrize("wrong", ["x", None, [1.0, 2.0], 1j, True, np.ones(2), torch.ones(2)], ids=repr)
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("final_alpha_cumprod", NoiseSchedule.linear),
        ("sigma_data", NoiseSchedule.linear),
        ("max_beta", NoiseSchedule.squared_cosine),
        ("sigma_min", NoiseSchedule.karras),
        ("sigma_max", NoiseSchedule.karras),
        ("rho", NoiseSchedule.karras),
        ("final_sigma", NoiseSchedule.karras),
        ("shift", NoiseSchedule.flow_matching),
        ("final_sigma", NoiseSchedule.flow_matching),
        ("eta", lambda **options: DDIM(TABLE, **options)),
    ],
)
def test_what_is_no_number_is_named(name: str, make: Any, wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name}: expected a number"):
        make(**{name: wrong})


def test_a_prediction_in_the_place_of_eta_is_told_to_be_named() -> None:
    with pytest.raises(
        TypeError, match=r"^eta: expected a number in \[0, 1\], got 'epsilon'; name the other arguments"
    ):
        DDIM(TABLE, "epsilon")  # type: ignore[arg-type]


def test_a_start_wider_than_double_precision_is_refused() -> None:
    if np.finfo(np.longdouble).bits == 64:
        pytest.skip("this machine has nothing wider")
    with pytest.raises(TypeError, match=r"^x_T: expected at most 64 bits, got dtype .*; convert it to float64 first"):
        solve(network, normal((2, 4)).astype(np.longdouble), TABLE.timesteps(5), DDIM(TABLE))


def negative(x: torch.Tensor) -> torch.Tensor:
    """The same numbers as PyTorch has them of the imaginary part of a conjugate: the negative of other memory."""
    view = torch.view_as_complex(torch.stack([torch.zeros_like(x), -x], dim=-1)).conj().imag
    assert view.is_neg()
    return view


@pytest.mark.parametrize("options", [{}, {"method": "parataa"}, {"method": "sequential"}, {"max_rows": 3}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tensors_that_are_negatives_of_other_memory(options: dict[str, Any], dtype: torch.dtype) -> None:
    x, noise = normal((3, 4), torch).to(dtype), normal((12, 3, 4), torch, seed=1).to(dtype)
    grid, rule, options = TABLE.timesteps(12), DDIM(TABLE, eta=1.0), {"window": 5, "save": "trajectory", **options}
    want = solve(lambda x, t: torch.tanh(x), x, grid, rule, noise=noise, **options)
    got = solve(lambda x, t: negative(torch.tanh(x)), negative(x), grid, rule, noise=negative(noise), **options)
    assert same_bits(got.sample, want.sample)
    assert same_bits(got.trajectory, want.trajectory)
    host = solve(lambda x, t: np.tanh(x), x.numpy(), grid, rule, noise=negative(noise), **options)
    assert relative(host.sample, want.sample) < 1e-2


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda x: x.view(np.recarray), r"the subclass recarray.*; give np.asarray\(array\)"),
        (lambda x: np.ma.array(x), r"a masked one.*; give masked.filled\(value\)"),
    ],
    ids=["recarray", "masked"],
)
def test_predictions_with_an_arithmetic_of_their_own(wrong: Any, told: str) -> None:
    with pytest.raises(TypeError, match="^denoiser: its prediction: expected a plain array, got " + told):
        solve(lambda x, t: wrong(x), normal((2, 4)), TABLE.timesteps(5), DDIM(TABLE))


def test_sparse_predictions() -> None:
    with pytest.raises(TypeError, match=r"^denoiser: its prediction: .*the layout torch.sparse_coo; give tensor.to_de"):
        solve(lambda x, t: x.to_sparse(), normal((2, 4), torch), TABLE.timesteps(5), DDIM(TABLE))


@pytest.mark.parametrize("wrong", [[[1.0]], 0, np.random.default_rng(0)], ids=["list", "int", "generator"])
def test_noise_of_another_type_is_told_what_to_give(wrong: Any) -> None:
    told = f"got {type(wrong).__name__}; for random numbers give a seed, or a function"
    with pytest.raises(ValueError, match=f"^noise: expected an array .*{told}"):
        solve(network, normal((2, 4)), TABLE.timesteps(5), DDIM(TABLE, eta=1.0), noise=wrong)


def test_a_calibration_in_the_place_of_its_method() -> None:
    found = calibrate(network, normal((8, 4)), TABLE.timesteps(12), DDIM(TABLE), 4)
    with pytest.raises(ValueError, match=r"^method: got a Calibration; give its attribute method"):
        solve(network, normal((2, 4)), TABLE.timesteps(12), DDIM(TABLE), method=found)  # type: ignore[arg-type]


def test_flow_rules_take_their_schedules_numbers() -> None:
    schedule = NoiseSchedule.flow_matching(np.float32(1.5))
    assert Euler(schedule) == Euler(NoiseSchedule.flow_matching(1.5))
