"""What ``check_denoiser`` says about networks that fit, and about each way of not fitting."""

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from parasolver_core import DDPM, NoiseSchedule, Rows, check_denoiser
from parasolver_core.denoiser.conformance import DenoiserReport
from tests.core.problems import Rational, TanhNetwork, normal

TIMESTEPS = NoiseSchedule.linear().timesteps(50)


def problems(denoiser: Any, batch: int = 3, dtype: torch.dtype = torch.float32) -> str:
    x_T = torch.randn(batch, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    report = check_denoiser(denoiser, x_T, TIMESTEPS)
    assert report.ok == (not report.problems)
    return " ".join(report.problems)


def test_a_fitting_denoiser_has_no_problems(xp: ModuleType) -> None:
    report = check_denoiser(TanhNetwork(), normal((3, 6), xp), TIMESTEPS)
    assert report.ok
    assert report.repeat_error == 0
    assert report.batching_error < 1e-14
    assert report.rows == 8 + 12  # and twelve steps between
    assert str(report).startswith("The denoiser fits parallel sampling")


def test_element_by_element_arithmetic_has_no_batching_error(xp: ModuleType) -> None:
    assert check_denoiser(Rational(), normal((1, 6), xp), TIMESTEPS).batching_error == 0


def test_the_batching_error_is_measured() -> None:
    """A network whose rows move by 1e-5 with the size of the batch; float32 allows sqrt(eps) = 3e-4."""
    report = check_denoiser(lambda x, t: x * (1 + 1e-5 * (len(x) > 1)), torch.ones(2, 6), TIMESTEPS)
    assert report.ok
    assert report.batching_error == pytest.approx(1e-5, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_torch_dtype(dtype: torch.dtype) -> None:
    assert problems(lambda x, t: x * (1 - t[:, None] / 2000).to(x.dtype), dtype=dtype) == ""


def test_one_timestep_and_one_sample_are_enough() -> None:
    assert check_denoiser(TanhNetwork(), normal((1, 6)), [10]).ok


def batch_norm() -> Callable[[Any, Any], Any]:
    layer = torch.nn.BatchNorm1d(6)
    return lambda x, t: layer(x) if len(x) > 1 else x  # torch refuses a single row


def torch_batch_norm() -> Callable[[Any, Any], Any]:
    layer = torch.nn.BatchNorm1d(6)
    return lambda x, t: layer(x)


@pytest.mark.parametrize(
    ("denoiser", "said"),
    [
        (lambda x, t: torch.nn.functional.dropout(x), r"random numbers.*\.eval\(\)"),
        (lambda x, t: x + torch.randn_like(x), "random numbers"),
        (lambda x, t: x - x.mean(0, keepdim=True) * 0.1, "mixes its rows.*batch normalisation"),
        (batch_norm(), "depends on the number of rows|mixes its rows"),
        (lambda x, t: x * len(x), "depends on the number of rows"),
        (lambda x, t: x * (1 + t[0] / 1000), r"t\[0\].*each row's own t"),
        (lambda x, t: x + t.float().mean() / 100, r"t\[0\]"),
        (lambda x, t: x * torch.tensor(float("nan")), "NaN or infinity for sample 0 at timestep 999"),
        (lambda x, t: torch.where(t[:, None] < 100, torch.inf, x), "infinity for sample 0 at timestep 19"),
        (lambda x, t: x.double(), "single row.*float32.*float64"),
        (lambda x, t: x[:, :3], "single row.*shape"),
        (lambda x, t: (x,), r"single row.*unet\(x, t\)\.sample"),
        (lambda x, t: x.numpy(), "single row.*ndarray"),
        (lambda x, t: x.to("meta"), "single row.*meta"),
        (lambda x, t: x * t.view(1, 1), "works for one row and fails for 8.*any number of rows"),
        (lambda x, t: 1 / 0, "single row: ZeroDivisionError: division by zero$"),
        (torch_batch_norm(), r"single row.*training.*works for 2 rows.*\.eval\(\)"),
        (lambda x, t: x + torch.ones(2, 1), r"single row.*works for 2 rows.*repeat conditions to x\.shape\[0\]"),
    ],
)
def test_problem(denoiser: Any, said: str) -> None:
    assert re.search(said, problems(denoiser), flags=re.DOTALL), problems(denoiser)


@pytest.mark.parametrize(("first", "last"), [(100, 400), (450, 550), (700, 980)])
def test_a_branch_on_the_first_rows_time_is_found_between_the_four_steps(first: int, last: int) -> None:
    network = lambda x, t: x * (1.5 if first <= int(t[0]) <= last else 1.0)  # noqa: E731
    assert re.search(r"t\[0\].*each row's own t", problems(network))


def test_a_repeated_call_that_is_not_finite_is_told() -> None:
    calls: list[int] = []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return x * (float("nan") if calls.count(8) == 2 else 1.0)

    assert "NaN or infinity" in problems(network)


def test_a_broken_denoiser_is_described() -> None:
    report = check_denoiser(lambda x, t: 1 / 0, normal((1, 6)), TIMESTEPS)
    assert np.isnan(report.batching_error)
    assert "does not fit" in str(report)
    assert "- It fails for a single row" in str(report)


def test_the_input_is_not_changed_by_a_network_that_works_in_place() -> None:
    x_T = torch.ones(2, 6)
    assert check_denoiser(lambda x, t: x.mul_(0.5), x_T, TIMESTEPS).ok
    assert bool((x_T == 1).all())


def test_a_denoiser_that_takes_rows_gets_its_samples_and_sampler() -> None:
    class PerSample:
        takes_rows = True

        def __call__(self, x: Any, t: Any, rows: Rows) -> Any:
            assert rows.recurrence.stochastic
            noise = np.stack([rows.noise(i, k) for i, k in zip(rows.steps, rows.samples, strict=True)])
            return x * (1.0 + rows.samples[:, None]) + noise

    schedule = NoiseSchedule.linear()
    assert check_denoiser(PerSample(), normal((3, 6)), TIMESTEPS, step_rule=DDPM(schedule)).ok


@pytest.mark.parametrize(("x_T", "timesteps"), [(np.zeros((0, 3)), [1]), (np.zeros((1, 3)), []), ("x", [1])])
def test_bad_arguments(x_T: Any, timesteps: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"x_T|timesteps"):
        check_denoiser(TanhNetwork(), x_T, timesteps)


def test_what_is_not_callable_is_refused() -> None:
    with pytest.raises(TypeError, match="denoiser: expected a callable"):
        check_denoiser(None, normal((1, 6)), TIMESTEPS)  # type: ignore[arg-type]


def test_what_is_no_step_rule_is_refused() -> None:
    with pytest.raises(TypeError, match="step_rule: expected a StepRule"):
        check_denoiser(lambda x, t: x, np.ones((1, 3)), [2, 1], step_rule="ddim")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("steps", "batch", "rows"), [(1, 1, 1), (1, 2, 2), (3, 2, 6), (5, 1, 5), (50, 1, 16), (50, 9, 20)]
)
def test_how_many_rows_are_tried(steps: int, batch: int, rows: int) -> None:
    """Four steps of two samples, and twelve between of one."""
    report = check_denoiser(Rational(), normal((batch, 6)), NoiseSchedule.linear().timesteps(steps))
    assert report.ok
    assert report.rows == rows


def test_the_batching_error_is_the_largest_of_all_steps() -> None:
    """Here at steps between the four, which are exact."""
    main = TIMESTEPS[[0, 16, 33, 49]]

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        return x * (1 + 1e-9 * (len(x) > 1) * ~np.isin(t, main)[:, None])

    report = check_denoiser(network, normal((1, 6)), TIMESTEPS)
    assert report.ok
    assert report.batching_error == pytest.approx(1e-9, rel=1e-3)


def test_a_network_need_not_like_the_start_at_every_step() -> None:
    network = lambda x, t: np.where((t[:, None] < 600) & (t[:, None] > 400), np.nan, x)  # noqa: E731
    assert check_denoiser(network, normal((1, 6)), TIMESTEPS).ok


def test_a_single_number_that_is_not_finite_counts() -> None:
    """At the four steps; at those between, the row tells nothing."""
    one, main = np.eye(6)[2] > 0, TIMESTEPS[[0, 16, 33, 49]]
    assert not check_denoiser(lambda x, t: np.where(one, np.nan, x), normal((2, 6)), TIMESTEPS).ok
    between = lambda x, t: np.where(one & ~np.isin(t, main)[:, None], np.nan, x)  # noqa: E731
    assert check_denoiser(between, normal((1, 6)), TIMESTEPS).ok


def test_one_problem_is_told_where_every_call_has_it() -> None:
    report = check_denoiser(lambda x, t: x * np.nan, normal((2, 6)), TIMESTEPS)
    assert [problem.split(" for ")[0] for problem in report.problems] == ["It gives NaN or infinity"]
    assert np.isnan(report.batching_error)
    assert np.isnan(report.repeat_error)


def test_a_report_tells_its_numbers() -> None:
    fine = DenoiserReport((), 1.25e-7, 0.0, 20)
    assert str(fine) == ("The denoiser fits parallel sampling (batching error 1.2e-07, repeat error 0.0e+00, 20 rows).")
    assert str(DenoiserReport(("One.", "Two."), 0.5, 0.0, 8)).splitlines()[1:] == ["- One.", "- Two."]
