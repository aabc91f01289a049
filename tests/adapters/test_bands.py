"""Coefficients read from runs on random numbers: what is found, how exactly, and what is refused."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from parasolver_adapters.bands import (
    NotLinearError,
    Path,
    Trace,
    _widths,
    as_rows,
    correlated_scale,
    fit,
    fit_band,
    noise_terms,
    replay,
    tabulated,
)
from parasolver_core import Recurrence
from tests.core.problems import normal

AXES = np.eye(128)
A = np.array([[0.9, 0.0], [0.7, 0.2], [0.5, 0.0], [0.4, -0.3]])
B = np.array([[0.1, 0.0, 0.0], [0.2, 0.3, 0.0], [0.4, 0.0, -0.2], [0.5, 0.0, 0.0]])


def run(a: np.ndarray, b: np.ndarray, draws: list[np.ndarray], scales: np.ndarray) -> Trace:
    """A run of these coefficients on random states and outputs."""
    m, x = normal((len(b), 128), seed=1), [normal((128,), seed=2)]
    for i in range(len(b)):
        after = sum(a[i, k] * x[i - k] for k in range(a.shape[1]) if k <= i)
        after = after + sum(b[i, k] * m[i - k] for k in range(b.shape[1]) if k <= i)
        x.append(after + sum(scale * draw for scale, draw in zip(scales[i], draws[i], strict=True)))
    return Trace(np.array(x), m, draws)


def test_coefficients_of_what_is_a_combination() -> None:
    columns = np.stack([3 * AXES[0], 0.01 * (AXES[0] + AXES[1]), np.zeros(128), AXES[2]])
    found = fit(columns, 2 * AXES[0] - 5 * AXES[1])
    assert found is not None
    np.testing.assert_allclose(found[:2], [7 / 3, -500.0], rtol=1e-12)
    np.testing.assert_array_equal(found[2:], 0.0)  # to the last bit: of a column of zeros, and of one that is not used
    np.testing.assert_array_equal(fit(AXES[:2], 1e6 * AXES[0] + 0.9e-8 * AXES[1]), [1e6, 0.0])  # or hardly is


def test_a_fit_does_not_depend_on_the_size_of_its_columns() -> None:
    for size in (1e-3, 1e3):
        assert fit(size * AXES[:1], AXES[0] + 0.9e-11 * AXES[1]) is not None
        assert fit(size * AXES[:1], AXES[0] + 1.1e-11 * AXES[1]) is None


@pytest.mark.parametrize(("off", "fits"), [(0.9e-10, True), (1.1e-10, False)])
def test_a_fit_is_exact_beside_the_size_of_the_target(off: float, fits: bool) -> None:
    """A hundred terms of size 1, whose sum has the size 10."""
    assert (fit(AXES[:100], AXES[:100].sum(0) + off * AXES[110]) is not None) == fits


@pytest.mark.parametrize(("off", "fits"), [(0.9e-11, True), (1.1e-11, False)])
def test_a_fit_is_exact_beside_its_largest_term(off: float, fits: bool) -> None:
    """Two terms of size 1, which nearly cancel."""
    near = (AXES[0] + 0.01 * AXES[1]) / np.hypot(1, 0.01)
    assert (fit(np.stack([AXES[0], near, AXES[3]]), AXES[0] - near + off * AXES[5]) is not None) == fits


def test_the_shortest_memory_is_tried_first() -> None:
    assert list(_widths(0)) == [(1, 1)]
    assert list(_widths(1)) == [(1, 1), (1, 2), (2, 2), (2, 1)]
    assert list(_widths(2))[4:] == [(1, 3), (2, 3), (3, 3), (3, 1), (3, 2)]
    assert list(_widths(4))[9:-4] == [(1, 4), (2, 4), (3, 4), (4, 4), (4, 1), (4, 2), (4, 3)]
    assert list(_widths(4))[-4:] == [(1, 5), (2, 5), (3, 5), (4, 5)]
    assert list(_widths(40))[-4:] == [(1, 16), (2, 16), (3, 16), (4, 16)]


def test_a_band_is_found_with_its_noise() -> None:
    draws = [normal((2, 128), seed=10 + i) for i in range(4)]
    scales = np.array([[0.3, 0.4], [0.0, 0.0], [0.6, -0.8], [1.0, 0.0]])
    a, b, c = fit_band(run(A, B, draws, scales))
    np.testing.assert_allclose(a, A, rtol=0, atol=1e-13)
    np.testing.assert_allclose(b, B, rtol=0, atol=1e-13)
    np.testing.assert_allclose(c, [0.5, 0.0, 1.0, 1.0], rtol=0, atol=1e-13)


def test_a_step_that_draws_nothing_has_no_noise() -> None:
    none = [np.empty((0, 128))] * 4
    a, b, c = fit_band(run(A[:, :1], B[:, :1], none, np.empty((4, 0))))
    assert (a.shape, b.shape) == ((4, 1), (4, 1))
    np.testing.assert_array_equal(c, 0.0)


def test_a_step_that_is_not_linear_is_named() -> None:
    traced = run(A, B, [np.empty((0, 128))] * 4, np.empty((4, 0)))
    traced.x[3] = np.tanh(traced.x[2])
    with pytest.raises(NotLinearError, match="step 2 is not a linear combination of the last 4 states") as caught:
        fit_band(traced)
    assert caught.value.step == 2
    assert caught.value.reason.startswith("is not")


def test_noise_that_steps_share_is_what_the_states_do_not_explain() -> None:
    z = np.stack([np.full(128, 2.0), np.zeros(128), np.full(128, -3.0), np.full(128, 1e-13)])
    x = [normal((128,))]
    for i in range(4):
        x.append(sum(A[i, k] * x[i - k] for k in range(2) if k <= i) + z[i])
    states = np.array(x)
    np.testing.assert_allclose(list(noise_terms(states, A)), z, rtol=0, atol=1e-15)
    np.testing.assert_allclose(correlated_scale(states, A), [2, 0, 3, 0], rtol=1e-12, atol=0)
    steady = np.array([[1e6, 1e6], [1e6, 1e6], [1e6 + 2e-5, 1e6 + 2e-5]])  # beside states of a million that is nothing
    assert correlated_scale(steady, np.ones((2, 1)))[1] == pytest.approx(2e-5, rel=1e-4)
    steady[2] = 1e6 + 5e-6
    np.testing.assert_array_equal(correlated_scale(steady, np.ones((2, 1))), 0.0)


def test_what_is_known_of_the_path_is_written_down() -> None:
    """Where p or q is unknown, or q is 0, the output itself is held and nothing is guessed of its slope."""
    alpha, sigma = np.array([0.6, 0.8, np.nan, 0.6, 0.6]), np.array([0.8, 0.6, np.nan, 0.8, 0.8])
    p, q = np.array([2.0, 0.0, 1.0, np.nan, 1.0]), np.array([-4.0, 1.0, 1.0, 1.0, 0.0])
    one, scale = np.ones((5, 1)), np.arange(1.0, 6.0)
    band = one, 0.5 * one, np.array([0.0, 0.1, 0.0, 0.0, 0.0])
    table = tabulated(np.arange(5), band, Path(alpha, sigma, p, q), 0.5, scale, 2)
    np.testing.assert_array_equal(table.held, [[2, -4], [0, 1], [1, 1], [0, 1], [0, 1]])
    means = 0.25 * alpha[:2] / (0.25 * alpha[:2] ** 2 + sigma[:2] ** 2)
    np.testing.assert_allclose(table.slope, [(means[0] - 2) / -4, means[1], 0, 0, 0], rtol=1e-12)
    np.testing.assert_allclose(table.signal, [0.6, 0.8, 1.0, 0.6, 0.6], rtol=1e-12)
    np.testing.assert_array_equal(table.input_scale, scale)
    assert table.stages == 2
    assert tabulated(np.arange(5), band, Path(alpha, sigma, p, q), 0.5).stages == 1


def steps(off: float, first: float = 1.0) -> Any:
    """Two steps of ``x' = x / 2 + m``, the second off by so much."""
    x, m = torch.tensor([[first, -first]]).double(), torch.tensor([[1.0, 2.0]]).double()
    middle = x / 2 + m
    return [(x, m, middle), (middle, m, middle / 2 + m + off * torch.tensor([[0.0, 1.0]]))]


HALVING = Recurrence(np.array([1, 0]), np.full((2, 1), 0.5), np.ones((2, 1)), np.zeros(2))


@pytest.mark.parametrize(("first", "size"), [(1.0, 2.75), (-100.0, 52.0)])
def test_a_run_is_followed_to_rounding_of_its_states(first: float, size: float) -> None:
    """Of the larger of the states before and after the step."""
    replay(HALVING, steps(0.9e-8 * size, first))
    with pytest.raises(NotLinearError, match=r"step 1 is off its own fit by 1\.1e-08 on another network"):
        replay(HALVING, steps(1.1e-8 * size, first))
    replay(HALVING, steps(0.9e-3 * size, first), tolerance=1e-3)


def test_a_run_is_followed_with_earlier_states_and_outputs() -> None:
    a, b = np.array([[1.0, 0.0], [0.5, 0.25], [0.5, 0.25]]), np.array([[1.0, 0.0], [2.0, -1.0], [2.0, -1.0]])
    xs, ms = [torch.tensor([[1.0]]).double()], [torch.tensor([[float(k)]]).double() for k in (1, 3, 7)]
    xs.append(xs[0] + ms[0])
    for i in (1, 2):
        xs.append(0.5 * xs[i] + 0.25 * xs[i - 1] + 2 * ms[i] - ms[i - 1])
    replay(Recurrence(np.arange(3), a, b, np.zeros(3)), zip(xs[:-1], ms, xs[1:], strict=True))


def test_a_run_is_followed_with_outputs_that_are_corrected() -> None:
    seen: list[int] = []

    def doubled(i: int, x: Any, m: Any) -> Any:
        seen.append(i)
        return 2 * m

    halved = [(x, m / 2, after) for x, m, after in steps(0.0)]
    replay(HALVING, halved, doubled)
    assert seen == [0, 1]
    with pytest.raises(NotLinearError, match="step 0"):
        replay(HALVING, halved)


def test_tensors_as_rows() -> None:
    probes = torch.arange(64.0).view(1, 1, 8, 8)
    np.testing.assert_array_equal(as_rows([probes, 2 * probes]), np.outer([1, 2], np.arange(64)))
    assert as_rows([]).shape == (0, 64)
