"""When corrections of a differential equation's trajectory are taken to be over."""

import math

import pytest

from parasolver_adapters.vector_field.newton import settled, slowest


@pytest.mark.parametrize(
    ("size", "before", "tolerance", "expected"),
    [
        (0.08, 0.2, 0.0534, True),  # 0.08 (0.4 + 0.4^2 + ..) = 0.0533 is to come
        (0.08, 0.2, 0.0532, False),
        (0.08, 0.1, 0.33, True),  # 0.8 / 0.2 = 4 times 0.08
        (0.08, 0.1, 0.31, False),
        (0.08, 0.085, 10.0, False),  # hardly smaller than the last one: no series
        (0.08, math.inf, 0.081, True),  # the first one: each is taken to be half of the one before
        (0.08, math.inf, 0.079, False),
        (0.2, 1.0, 0.06, False),  # beyond the basin a ratio says nothing
        (0.0, 0.0, 0.0, True),
        (math.nan, 1.0, 1.0, False),
    ],
)
def test_what_is_to_come_is_a_geometric_series(size: float, before: float, tolerance: float, expected: bool) -> None:
    assert settled(size, before, tolerance, basin=0.1) is expected


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([0.3], math.inf),  # nothing known
        ([0.4, 0.2], 0.4),
        ([0.4, 0.2, 0.05], 0.05 / 0.35355),  # (0.05 / 0.4)^(1/2) a round, which is more than 0.05 / 0.2
        ([0.8, 0.1, 0.05], 0.1),  # the last is the slowest
        ([0.2, 0.5, 0.5, 0.1], 0.1 / 0.79370),  # half of what it was three before
        ([1.0, 0.0, 0.25], 0.5),
        ([0.5, 0.0], math.inf),
    ],
)
def test_all_ratios_so_far_say_how_fast_corrections_fall(sizes: list[float], expected: float) -> None:
    assert slowest(sizes) == pytest.approx(expected, rel=1e-4)
