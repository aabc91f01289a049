"""How a field's way with many times at once is found, and what trying it costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from parasolver_adapters.vector_field.field import Field, own_memory
from parasolver_adapters.vector_field.grid import Grid
from tests.arrays import load

T = 2.0 + 0.1 * np.arange(21) ** 1.2


def probed(f: Any, y0: Any, batching: Any = "auto", few: bool = False) -> tuple[Field, str]:
    field = Field(f, y0, "ty", batching)
    return field, field.probe(Grid(T, y0, y0.ndim), y0, few)


def test_calls_and_rows_are_counted() -> None:
    field = Field(lambda t, y: -y, np.zeros(2), "ty", "column")
    assert (field.calls, field.evaluations, field.spent) == (0, 0, 0.0)
    field(np.zeros(1), np.ones((1, 2)))
    np.testing.assert_array_equal(field(np.zeros(3), np.ones((3, 2))), -np.ones((3, 2)))
    assert (field.calls, field.evaluations) == (2, 4)
    field.row_cost = 0.5
    assert field.cost(3, 10) == 8.0
    assert field.spent == 4.0
    assert field.parallel
    assert not Field(lambda t, y: -y, np.zeros(2), "ty", "loop").parallel


@pytest.mark.parametrize(
    ("shape", "few", "rows"),
    [((2,), False, 5), ((2,), True, 3), ((3, 2), True, 5), ((5, 3), True, 7), ((5,), False, 7), ((7, 5), False, 11)],
)
def test_a_field_is_tried_with_a_number_of_rows_that_is_no_axis(shape: tuple[int, ...], few: bool, rows: int) -> None:
    """Rows one by one, all of them, and one of them so many times; over all times of the grid, near its first state."""
    seen: list[tuple[Any, Any]] = []

    def f(t: Any, y: Any) -> Any:
        seen.append((t, y))
        return np.cos(t) * y - 3

    y0 = 1 + np.random.default_rng(0).random(shape)
    field, reason = probed(f, y0, few=few)
    assert (reason, field.batching) == ("", "column")
    assert (field.calls, field.evaluations) == (rows + 2, 3 * rows)
    assert len(seen) == rows + 2
    assert [np.shape(t) for t, _ in seen] == [()] * rows + [(rows, *(1,) * len(shape))] * 2
    nodes = np.linspace(0, 20, rows).astype(int)
    np.testing.assert_array_equal([t for t, _ in seen[:rows]], T[nodes])
    np.testing.assert_array_equal(seen[0][1], y0)
    first = np.cos(2.0) * y0 - 3
    for k in range(rows):
        own = y0 + first * 0.1 * k / (rows - 1)
        np.testing.assert_array_less(np.abs(seen[k][1] / own - 1), 0.01)
        assert (np.max(np.abs(seen[k][1] / own - 1)) > 1e-3) == (k > 0)
        np.testing.assert_array_equal(seen[rows][1][k], seen[k][1])
    np.testing.assert_array_equal(seen[rows][0].ravel(), T[nodes])
    np.testing.assert_array_equal(seen[-1][0].ravel(), T[nodes[rows // 2]])
    np.testing.assert_array_equal(seen[-1][1], np.broadcast_to(seen[rows // 2][1], (rows, *shape)))


def of_shape(wanted: Any) -> Any:
    """A field that takes only what has these shapes of t and y, beside single calls."""

    def f(t: Any, y: Any) -> Any:
        if t.ndim and (tuple(t.shape), tuple(y.shape)) != wanted:
            raise TypeError("another shape")
        return -y

    return f


@pytest.mark.parametrize(
    ("batching", "shapes"),
    [
        ("column", ((5, 1, 1), (5, 2, 3))),
        ("merged", ((10, 1), (10, 3))),
        ("trailing", ((5,), (2, 3, 5))),
        ("rows", ((5,), (5, 2, 3))),
    ],
)
@pytest.mark.parametrize("declared", [True, False])
def test_every_way_has_its_shapes(xp: Any, batching: Any, shapes: Any, declared: bool) -> None:
    y0 = xp.asarray(np.linspace(1, 2, 6).reshape(2, 3), dtype=xp.float64)
    if batching == "rows":  # also single rows are then called so
        shapes_of_one: Any = ((1,), (1, 2, 3))
        seen: list[Any] = []
        Field(lambda t, y: seen.append((t.shape, y.shape)) or -y, y0, "ty", "rows")(xp.zeros(1), y0[None, ...])
        assert seen == [shapes_of_one]
        return
    field, reason = probed(of_shape(shapes), y0, batching if declared else "auto")
    assert (reason, field.batching) == ("", batching)
    rows = xp.stack([y0, 2 * y0, 3 * y0])
    found = Field(lambda t, y: t * y, y0, "ty", batching)
    given = found(xp.asarray([1.0, 10.0, 100.0], dtype=xp.float64), rows)
    np.testing.assert_allclose(
        np.from_dlpack(given), np.linspace(1, 2, 6).reshape(2, 3) * np.array([1.0, 20.0, 300.0])[:, None, None]
    )


def test_rows_are_tried_as_they_will_be_called() -> None:
    shapes: list[Any] = []

    def f(t: Any, y: Any) -> Any:
        shapes.append((t.shape, y.shape))
        return -y

    field, reason = probed(f, np.ones((2, 3)), "rows")
    assert (reason, field.batching) == ("", "rows")
    assert shapes == [((1,), (1, 2, 3))] * 5 + [((5,), (5, 2, 3))] * 2


def test_what_is_tried_and_in_which_order() -> None:
    def f(t: Any, y: Any) -> Any:
        if t.ndim:
            raise RuntimeError(f"{tuple(t.shape)} is too much\nsecond line")
        return -y

    field, reason = probed(f, np.ones((2, 3)))
    assert reason == (
        "column: RuntimeError: (5, 1, 1) is too much; merged: RuntimeError: (10, 1) is too much; "
        "trailing: RuntimeError: (5,) is too much"
    )
    assert (field.batching, field.calls, field.evaluations) == ("loop", 5 + 3, 5 + 15)
    field, reason = probed(f, np.ones(2))
    assert [part.split(":")[0] for part in reason.split("; ")] == ["column", "trailing"]

    def silent(t: Any, y: Any) -> Any:
        if t.ndim:
            raise RuntimeError
        return -y

    assert probed(silent, np.ones(2))[1] == "column: RuntimeError: ; trailing: RuntimeError: "
    branching = lambda t, y: y if float(t.sum()) > 0 and y[0] > 0 else -y  # noqa: E731
    _, reason = probed(branching, torch.ones(2, dtype=torch.float64))
    assert [part.split(":")[0] for part in reason.split("; ")] == ["column", "trailing", "vmap"]


def test_what_is_declared_and_is_not_so_is_told_with_the_reason() -> None:
    def f(t: Any, y: Any) -> Any:
        return -y + (0.25 if np.ndim(t) else 0.0)

    with pytest.raises(
        ValueError,
        match=r"f: called with 5 times at once as batching='column' .*differs .* by up to 0.25",
    ):
        probed(f, np.ones(2), "column")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_may_differ_from_single_calls_as_other_shapes_round(dtype: Any) -> None:
    """By the root of a rounding, of the largest value; but not change with what else is in the batch."""
    limit = float(np.sqrt(np.finfo(dtype).eps)) * 1000

    def f(t: Any, y: Any, share: float, moved: float) -> Any:
        out = 0 * y + dtype(1000 + (share * limit if np.ndim(t) else 0.0))
        if np.ndim(t):
            out[..., 0] += dtype(moved * float(y[-1].ravel()[0] != y[0].ravel()[0]))
        return out

    few, rounding = np.ones(2, dtype), 1000 * float(np.finfo(dtype).eps)
    for share, moved, reason in [
        (0.9, 0.0, ""),
        (1.1, 0.0, "differs from single calls"),
        (-0.9, 0.0, ""),
        (-1.1, 0.0, "differs from single calls"),
        (0.0, 3 * rounding, ""),
        (0.0, 6 * rounding, "rows change each other by"),
    ]:
        field = lambda t, y, a=share, b=moved: f(t, y, a, b)  # noqa: E731
        if reason:
            with pytest.raises(ValueError, match=reason):
                probed(field, few, "column")
        else:
            assert probed(field, few, "column")[1] == ""


def test_small_values_are_held_against_themselves() -> None:
    field, told = probed(lambda t, y: 1e-9 * (y + (1e-3 if np.ndim(t) else 0.0)), np.ones(2))
    assert told.startswith("column: differs from single calls")
    assert field.batching == "loop"


def test_of_two_samples_either_may_act_on_the_other() -> None:
    y0 = np.ones((2, 3))
    for source in (0, 1):
        acts = np.zeros((2, 1))
        acts[1 - source] = 1.0
        field = Field(lambda t, y, s=source, a=acts: a * y[..., s : s + 1, :] - y, y0, "ty", "column")
        assert field.independent_axes(Grid(T, y0, 2), y0) == 0


def test_a_field_that_is_no_number_everywhere_is_the_same_everywhere() -> None:
    field, _ = probed(lambda t, y: y * np.nan, np.ones(2))
    assert field.batching == "column"


def mixing(axes: int, share: float) -> Any:
    """The mean over all axes behind the first ``axes`` of a state (2, 3, 4), beside what an element does for itself."""

    def f(t: Any, y: Any) -> Any:
        return -np.sin(y) + (share * y.mean(axis=tuple(range(axes - 3, 0)), keepdims=True) if axes < 3 else 0.0)

    return f


@pytest.mark.parametrize("axes", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1.0, 1e-4, 0.0, 1e4])
def test_leading_axes_that_count_samples_are_found(axes: int, size: float) -> None:
    y0 = size * np.random.default_rng(0).random((2, 3, 4))
    field = Field(mixing(axes, 1.0), y0, "ty", "column")
    assert field.independent_axes(Grid(T, y0, 3), y0) == axes
    assert field.calls == (4 - axes if axes else 3)
    assert field.evaluations == 5 * field.calls
    weak = Field(mixing(axes, 1e-8), y0, "ty", "column")  # costs rounds at most
    assert weak.independent_axes(Grid(T, y0, 3), y0) == 3


def test_a_state_without_axes_and_one_that_never_moves() -> None:
    y0 = np.array(1.0)
    assert Field(lambda t, y: -y, y0, "ty", "column").independent_axes(Grid(T, y0, 0), y0) == 0
    y0 = np.ones((2, 3))
    assert Field(lambda t, y: 0 * y, y0, "ty", "column").independent_axes(Grid(T, y0, 2), y0) == 2


@pytest.mark.parametrize(
    ("seconds", "row_cost"),
    [
        ({1: [3.0, 2.0, 4.0], 5: [6.0, 5.0, 4.0]}, 1 / 3),  # a quarter of a call of one row
        ({1: [1.0] * 3, 5: [3.0] * 3}, 1.0),
        ({1: [1.0] * 3, 5: [0.5] * 3}, 0.0),
        ({1: [1.0] * 3, 5: [50.0] * 3}, 99.0),
    ],
)
def test_the_cost_of_a_row_is_measured_for_large_states(
    monkeypatch: pytest.MonkeyPatch, seconds: Any, row_cost: float
) -> None:
    left = {rows: list(values) for rows, values in seconds.items()}
    monkeypatch.setattr(Field, "_seconds", lambda self, t, y: (len(t) == len(y)) and left[len(y)].pop(0))
    field, _ = probed(lambda t, y: -y, np.ones((257,)))
    assert field.row_cost == pytest.approx(row_cost)
    assert left == {1: [], 5: []}
    small, _ = probed(lambda t, y: -y, np.ones((256,)))
    few, _ = probed(lambda t, y: -y, np.ones((257,)), few=True)
    assert small.row_cost == few.row_cost == pytest.approx(1 / 500)


def test_seconds_are_those_of_a_call() -> None:
    import time

    y0 = np.ones(2)
    field = Field(lambda t, y: time.sleep(0.02) or -y, y0, "ty", "column")
    assert 0.02 <= field._seconds(np.zeros(1), y0[None]) < 10
    assert (field.calls, field.evaluations) == (1, 1)


def test_what_a_numpy_field_may_give_instead_of_an_array() -> None:
    field = Field(lambda t, y: [1, 2.5], np.zeros(2, np.float32), "ty", "loop")
    found = field(np.zeros(2, np.float32), np.zeros((2, 2), np.float32))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[1, 2.5], [1, 2.5]])
    number = Field(lambda t, y: np.float64(3.0), np.array(0.0), "ty", "loop")
    np.testing.assert_array_equal(number(np.zeros(1), np.zeros(1)), [3.0])
    for f, kind, y0 in [
        (lambda t, y: [1.0, 2.0], "Tensor of shape (2,), got list", torch.zeros(2)),
        (lambda t, y: 1.0, "Tensor of shape (), got float", torch.tensor(0.0)),
        (lambda t, y: None, "ndarray of shape (2,), got NoneType", np.zeros(2)),
    ]:
        with pytest.raises(TypeError) as told:
            Field(f, y0, "ty", "loop")(y0[None][:1], y0[None])
        assert kind in str(told.value)
    for out in (np.zeros(2, np.float32), np.zeros(3)):
        with pytest.raises(ValueError, match="f: expected the derivative as shape"):
            Field(lambda t, y, out=out: out, np.zeros(2), "ty", "loop")(np.zeros(1), np.zeros((1, 2)))


def test_ways_that_do_not_fit_the_state_are_refused() -> None:
    with pytest.raises(ValueError, match='batching: "vmap" is for torch'):
        Field(lambda t, y: y, np.zeros((2, 3)), "ty", "vmap")
    with pytest.raises(ValueError, match=r'batching: "merged" needs a state .* got shape \(2,\)'):
        Field(lambda t, y: y, np.zeros(2), "ty", "merged")
    assert Field(lambda t, y: y, torch.zeros(2), "ty", "vmap").batching == "vmap"
    assert Field(lambda t, y: y, np.zeros((2, 3)), "ty", "merged").batching == "merged"


@pytest.mark.parametrize("library", ["numpy", "torch", "array_api_strict"])
def test_copies_are_in_memory_of_their_own(library: str) -> None:
    xp = load(library)
    values = xp.asarray([1.0, 2.0])
    copy = own_memory(values)
    assert type(copy) is type(values)
    copy[0] = 5.0
    assert (float(values[0]), float(copy[0]), float(copy[1])) == (1.0, 5.0, 2.0)
    word = "no array"
    assert own_memory(word) is word
