"""Which defects are taken for rounding, and what rounding may grow into before it is told."""

import warnings
from typing import Any

import numpy as np
import pytest

from parasolver_adapters.vector_field import SequentialFallbackWarning, integrate
from parasolver_adapters.vector_field.rounding import is_rounding, local_scale, reach, relative, scatter
from tests.arrays import from_numpy, to_numpy

EPS = {dtype: float(np.finfo(dtype).eps) for dtype in (np.float32, np.float64)}


def refuse(factors: Any) -> Any:
    raise AssertionError("nothing is to be measured where each element explains its defect")


@pytest.mark.parametrize("dtype", EPS)
def test_small_defects_of_one_direction_are_not_rounding(dtype: Any) -> None:
    size = np.ones((1000, 1, 1), dtype=dtype)
    roundings = {np.float32: 16, np.float64: 1000}[dtype]
    signs = np.random.default_rng(0).choice([-1, 1], size=size.shape)
    telescoping = np.diff(signs, axis=0, prepend=0)  # what one rounding in each node comes to
    wave = np.sin(np.linspace(0, np.pi, 1000)).reshape(-1, 1, 1)
    assert is_rounding(np, dtype(roundings * EPS[dtype] / 2.5) * telescoping.astype(dtype), size, refuse)
    for drift in (wave, -wave, np.cos(np.linspace(0, np.pi, 1000)).reshape(-1, 1, 1)):
        assert not is_rounding(np, (roundings * EPS[dtype] / 2 * drift).astype(dtype), size, refuse)
    assert not is_rounding(np, np.where(np.arange(1000)[:, None, None] == 500, 17 * size, 0) * roundings, size, refuse)


def test_defects_scatter_up_to_a_quarter_of_a_random_walk() -> None:
    allowed = np.full((400, 2), 2.0)
    assert scatter(np, np.tile([[2.0, -2.0], [-2.0, 2.0]], (200, 1)), allowed)
    assert not scatter(np, np.tile([[2.0, -2.1], [-2.0, 2.0]], (200, 1)), allowed)  # one is too large
    slope = np.zeros((400, 2))
    slope[100:110, 1] = -0.99  # a sum of 9.9 where 0.25 * sqrt(400) * 2 = 10 is allowed
    assert scatter(np, slope, allowed)
    slope[120, 1] = -0.2
    assert not scatter(np, slope, allowed)
    slope[110:120, 1] = 0.99  # comes back later: what a sum was on its way counts
    slope[100:112, 1] = -0.99
    assert not scatter(np, slope, allowed)


@pytest.mark.parametrize("before", range(7))
def test_the_local_scale_is_the_largest_of_a_node_and_those_before_it(xp: Any, before: int) -> None:
    states = np.random.default_rng(0).standard_normal((6, 2, 3))
    states[:, 1, 1] = 0
    expected = np.array([np.abs(states[max(n - before, 0) : n + 1]).max(axis=0) for n in range(6)])
    expected[:, 1, 1] = np.finfo(np.float64).smallest_normal
    np.testing.assert_array_equal(to_numpy(local_scale(xp, from_numpy(states, xp), before)), expected)


def test_a_fiftieth_of_the_grid_is_near() -> None:
    assert [reach(steps) for steps in (0, 49, 99, 100, 149, 150)] == [1, 1, 1, 2, 2, 3]


def alternating(defect: Any, dtype: Any) -> Any:
    """Defects (64, 1, elements) that add up to nothing."""
    return (np.array(defect) * np.where(np.arange(64) % 2, 1, -1)[:, None, None]).astype(dtype)


@pytest.mark.parametrize(("dtype", "roundings"), [(np.float32, 16), (np.float64, 1000)])
@pytest.mark.parametrize(
    ("element", "gain", "expected"),
    [
        (1.0, None, True),  # of its own size: a thousandth of the largest
        (9.9, 0.01, True),
        (10.1, 0.01, False),  # a step makes no more of rounding in the others
        (1.1, 0.0001, False),
        (999.0, 1e3, True),
        (1001.0, None, False),  # more than rounding of the largest
        (np.nan, None, False),
    ],
)
def test_small_elements_may_miss_by_what_a_step_makes_of_rounding(
    xp: Any, dtype: Any, roundings: int, element: float, gain: float | None, expected: bool
) -> None:
    """Defects in thousandths of what is rounding of the largest element."""
    size = np.broadcast_to(np.array([[[1.0, 1e-3]]], dtype=dtype), (64, 1, 2))
    unit = roundings * EPS[dtype] / 1000
    defects = alternating([[[0.5 * unit, 0.999 * element * unit if element == 1.0 else element * unit]]], dtype)

    def shaken(factors: Any) -> Any:
        if gain is None:
            return refuse(factors)
        own = to_numpy(factors)
        assert (own.shape, own.dtype) == ((64, 1, 2), dtype)
        np.testing.assert_array_equal(np.abs(own), 4 * EPS[dtype])
        assert abs(np.sign(own).mean()) < 0.3
        return factors * gain

    assert is_rounding(xp, from_numpy(defects, xp), from_numpy(size, xp), shaken) is expected


def test_a_jump_of_one_sample_is_not_excused_by_the_size_of_another() -> None:
    size = np.array([[1.0, 1e-3, 1.0], [1e6, 1e6, 1e6]])[None] * np.ones((64, 1, 1))
    defects = np.zeros((64, 2, 3))
    defects[:, 0, 1] = alternating([[[2.0 * EPS[np.float64]]]], np.float64)[:, 0, 0]
    assert is_rounding(np, defects, size, lambda factors: factors)
    defects[10, 0, 1] = 1001 * EPS[np.float64]
    assert not is_rounding(np, defects, size, refuse)


def test_elements_count_as_a_part_of_their_samples_largest() -> None:
    scale = np.array([[[1.0, 1e-2], [5.0, 1e-6]]])
    assert relative(np, np.array([[[0.0, -1e-5], [0.0, 0.0]]]), scale) == pytest.approx(1e-3)
    assert relative(np, np.array([[[0.0, 0.0], [0.0, 1e-5]]]), scale) == pytest.approx(1e-5 / 5e-3)
    single = scale.astype(np.float32)
    assert relative(np, np.array([[[0.0, 0.0], [0.0, 1e-5]]], dtype=np.float32), single) == pytest.approx(2e-6)


def network(seed: int, width: int) -> Any:
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((width, 32)) * (2 / width**0.5)
    B = rng.standard_normal((32, width)) * (6 / 32**0.5)
    A, B = A.astype(np.float32), B.astype(np.float32)
    return lambda t, y: np.tanh(y @ A + np.sin(t)) @ B


def linear(seed: int, width: int) -> Any:
    A = (np.random.default_rng(seed).standard_normal((width, width)) * (1.0 / width**0.5)).astype(np.float32)
    return lambda t, y: y @ A + np.sin(3 * t)


@pytest.mark.parametrize(
    ("field", "width", "end", "options"),
    [
        (network(5, 40), 40, 1.9, {"method": "etdrk2", "linear": -9.7}),
        (linear(2, 40), 40, 8.9, {"method": "ab4"}),
        (linear(6, 2), 2, 4.0, {"method": "midpoint", "linearization": "secant"}),
    ],
)
def test_single_precision_is_right_to_what_is_promised(
    field: Any, width: int, end: float, options: dict[str, Any]
) -> None:
    """Steps that missed by ten roundings each, all in one direction, passed for rounding: off by 5e-5 to 1e-4."""
    y0 = np.random.default_rng(1).standard_normal(width).astype(np.float32)
    t = np.linspace(0, end, 901)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SequentialFallbackWarning)
        got = integrate(field, y0, t, **options)
    plain = {key: options[key] for key in ("method", "linear") if key in options}
    want = integrate(field, y0, t, linearization="sequential", **plain).states
    assert got.windows == 1
    assert got.sequential_steps == 0
    assert np.max(np.abs(got.states - want) / np.max(np.abs(want), axis=1, keepdims=True)) < 1e-5


@pytest.mark.parametrize(
    ("rate", "frequency", "start", "window"),
    [(-5.865, 4.188, 1.322, 582), (-5.681, 6.27, 1.802, 589), (-6.5, 7.467, -0.476, 507), (-6.151, 9.972, -0.922, 561)],
)
def test_a_correction_by_wrong_slopes_is_not_the_last(rate: float, frequency: float, start: float, window: int) -> None:
    """Backwards in time, where all grows: slopes of the secant are wrong for rounds on end. Defects that were rounding
    ended the search, and the correction that slopes made of them was kept: 0.2 to 13 % of the state."""

    def field(t: Any, y: Any) -> Any:
        return rate * y + np.sin(frequency * t).astype(np.float32)

    y0, t = np.array([start], dtype=np.float32), np.linspace(0, -8, 651)
    options: dict[str, Any] = {"method": "ab3", "linearization": "secant", "coarse_steps": 10, "window": window}
    got = integrate(field, y0, t, **options)
    want = integrate(field, y0, t, method="ab3", linearization="sequential").states
    assert got.windows >= 1
    assert got.sequential_steps < 100
    assert np.max(np.abs(got.states - want) / np.maximum.accumulate(np.abs(want))) < 3e-5


def test_single_precision_that_grows_is_announced_with_the_tolerance_that_allows_it() -> None:
    """Shrinks along a line from which rounding leads away: two ways to the end differ by 1e-4 of it."""
    turn = np.array([[np.cos(0.4), -np.sin(0.4)], [np.sin(0.4), np.cos(0.4)]])
    A = (turn @ np.diag([8.0, -8.0]) @ turn.T).astype(np.float32)

    def saddle(t: Any, y: Any) -> Any:
        return (y @ A) * np.cos(2 * t)

    y0 = turn[:, 1].astype(np.float32)
    t = np.linspace(0, 0.7, 301)
    with pytest.warns(SequentialFallbackWarning, match=r"rounding may grow to (\S+) of .*; tolerance=\1 allows it"):
        got = integrate(saddle, y0, t)
    np.testing.assert_array_equal(got.states, integrate(saddle, y0, t, linearization="sequential").states)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SequentialFallbackWarning)
        assert integrate(saddle, y0, t, tolerance=1e-2).sequential_steps == 0
