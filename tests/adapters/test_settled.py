"""When corrections of a differential equation's trajectory are taken to be over."""

import math

import pytest

from parasolver_adapters.vector_field.newton import settled


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
