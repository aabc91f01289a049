"""What a user's own sampler or acceptance returns: taken from any library, or refused by name."""

from typing import Any

import numpy as np
import pytest
import torch

from parasolver_core import DDIM, Acceptance, DiffusionRule, Method, NoiseSchedule, Recurrence, StepRule, solve
from tests.core.any_runs import same_bits
from tests.core.problems import normal

SCHEDULE = NoiseSchedule.linear()
GRID = SCHEDULE.timesteps(12)
N = len(GRID)


def network(x: Any, t: Any) -> Any:
    return np.tanh(x)


def run(rule: StepRule, grid: Any = GRID, **options: Any) -> Any:
    return solve(network, normal((2, 3)), grid, rule, 5, tolerance=1e-6, **options)


class Gives(StepRule):
    """A rule that returns what it was given."""

    def __init__(self, told: Any) -> None:
        self.told = told

    def recurrence(self, timesteps: np.ndarray) -> Any:
        return self.told


class Form(DiffusionRule):
    """DDIM, as ``change`` changes what its form returns."""

    change: Any = staticmethod(lambda a, b, c: (a, b, c))

    def sample_form(self, alpha: np.ndarray, sigma: np.ndarray) -> Any:
        a = sigma[1:] / sigma[:-1]
        return type(self).change(a[:, None], (alpha[1:] - alpha[:-1] * a)[:, None], np.zeros(len(a)))


def form(change: Any) -> Form:
    return type("Changed", (Form,), {"change": staticmethod(change)})(SCHEDULE)


def plain(**changes: Any) -> dict[str, Any]:
    tables = {"timesteps": GRID, "a": np.full((N, 1), 0.75), "b": np.full((N, 1), 0.25), "c": np.zeros(N)}
    return (
        tables | {"held": np.tile([1.0, -0.5], (N, 1)), "slope": np.full(N, 0.5), "signal": np.full(N, 0.5)} | changes
    )


@pytest.mark.parametrize(
    "kind", [np.ndarray.tolist, torch.from_numpy, lambda table: table.astype(table.dtype.str[:2] + "4")]
)
def test_tables_of_lists_and_of_other_libraries(kind: Any) -> None:
    """Their numbers are float32's, too."""
    got = Recurrence(**{name: kind(np.asarray(table)) for name, table in plain().items()})
    want = Recurrence(**plain())
    for name in ("a", "b", "c", "held", "slope", "signal", "identity_slope"):
        assert getattr(got, name).dtype == np.float64
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    assert same_bits(run(Gives(got)).sample, run(Gives(want)).sample)


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"a": np.full(N, 0.75)}, ValueError, r"a: expected a column for .*, shape \(12, P\), got \(12,\)"),
        ({"b": np.ones((N, 1, 1))}, ValueError, r"b: expected a column for .*, shape \(12, P\), got \(12, 1, 1\)"),
        ({"a": np.ones((N - 1, 1))}, ValueError, r"a: expected shape \(12, 1\) for 12 timesteps, got \(11, 1\)"),
        ({"a": np.ones((N, 1), complex)}, TypeError, "a: expected real numbers, got dtype complex128"),
        ({"c": [None] * N}, TypeError, "c: expected real numbers, got dtype object"),
        ({"timesteps": ["noise"] * N}, TypeError, "timesteps: expected real numbers, got dtype <U5"),
    ],
)
def test_tables_that_are_none(changes: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match="^" + told):
        Recurrence(**plain(**changes))


@pytest.mark.parametrize("told", [None, 5, (np.ones((N, 1)),)])
def test_a_rule_that_returns_no_recurrence(told: Any) -> None:
    with pytest.raises(TypeError, match=r"^step_rule: its recurrence\(timesteps\) must return a Recurrence, got"):
        run(Gives(told))


def test_a_form_of_lists() -> None:
    want = run(DDIM(SCHEDULE))
    assert same_bits(run(form(lambda *tables: [table.tolist() for table in tables])).sample, want.sample)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (lambda a, b, c: None, TypeError, r"three tables \(a, b, c\), got NoneType"),
        (lambda a, b, c: (a, b), TypeError, r"three tables \(a, b, c\), got tuple"),
        (lambda a, b, c: (a[:, 0], b[:, 0], c), ValueError, r"got \(12,\), \(12,\) and \(12,\)"),
        (
            lambda a, b, c: (a[:-1], b[:-1], c),
            ValueError,
            r"of one shape \(12, K\).*got \(11, 1\), \(11, 1\) and \(12,",
        ),
        (lambda a, b, c: (a, np.tile(b, 2), c), ValueError, r"got \(12, 1\), \(12, 2\) and \(12,\)"),
        (lambda a, b, c: (a, b, c[:, None]), ValueError, r"c of shape \(12,\), got .* and \(12, 1\)"),
        (lambda a, b, c: (a, b, c[1:]), ValueError, r"c of shape \(12,\), got .* and \(11,\)"),
    ],
)
def test_forms_that_are_none(change: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match="^step_rule: its sample_form must return .*" + told):
        run(form(change))


class Bounded(Acceptance):
    """An acceptance that says what it was given of the nodes."""

    def __init__(self, told: Any) -> None:
        self.told = told

    def bounds(self, recurrence: Recurrence) -> Any:
        return self.told

    def accept(self, view: Any, tolerance: float) -> Any:
        return view.leading(view.move / view.bound, tolerance)


def test_bounds_may_be_a_list() -> None:
    got, want = (run(DDIM(SCHEDULE), method=Method(acceptance=Bounded(one))) for one in ([2.0] * N, np.full(N, 2.0)))
    assert same_bits(got.sample, want.sample)


@pytest.mark.parametrize("told", [None, 1.0, np.ones(N + 1), np.ones((N, 1)), ["x"] * N], ids=repr)
def test_bounds_that_are_none(told: Any) -> None:
    with pytest.raises(ValueError, match=r"^acceptance: its bounds\(recurrence\) must return a number for each of 12"):
        run(DDIM(SCHEDULE), method=Method(acceptance=Bounded(told)))


class Saying(Acceptance):
    """An acceptance that returns what it was given."""

    def __init__(self, told: Any) -> None:
        self.told = told

    def accept(self, view: Any, tolerance: float) -> Any:
        return self.told


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("told", [None, 1, (1,), (1, 0.0, 0.0)], ids=repr)
def test_acceptances_that_return_no_pair(told: Any, batch: int) -> None:
    method, x_T = Method(spread=False, acceptance=Saying(told)), normal((batch, 3))
    with pytest.raises(TypeError, match=r"^acceptance: Saying\.accept must return a pair \(count, error\), got "):
        solve(network, x_T, GRID, DDIM(SCHEDULE), 5, tolerance=1e-6, method=method)


@pytest.mark.parametrize("batch", [1, 2])
def test_acceptances_may_return_a_list(batch: int) -> None:
    got = [
        solve(
            network, normal((batch, 3)), GRID, DDIM(SCHEDULE), 5, method=Method(spread=False, acceptance=Saying(told))
        )
        for told in ([1, 0.25], (1, 0.25))
    ]
    assert same_bits(got[0].sample, got[1].sample)
    assert got[0].error_estimate.tolist() == [0.25] * batch
    assert got[0].stats.rounds == N
