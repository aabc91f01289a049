"""What the array API leaves open, on each library; and what is asked of libraries that are not here."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import array_api_compat
import array_api_strict
import numpy as np
import pytest
import torch
from array_api_compat import torch as torch_xp

from parasolver_core import arrays
from parasolver_core.rounds.squares import at_least, at_most, lowest, sums_of_squares
from tests.arrays import from_numpy, to_numpy
from tests.core.problems import normal

ELSEWHERE = array_api_strict.Device("device1")


class OnCard:
    """An array as CuPy's: NumPy cannot look into it."""

    def __init__(self, values: Any) -> None:
        self.values, self.dtype = np.asarray(values), np.asarray(values).dtype

    def get(self) -> np.ndarray:
        return self.values


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("cupy")
    module.ndarray = OnCard  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_arrays_on_the_host(xp: ModuleType) -> None:
    values = normal((2, 3))
    host = arrays.to_host(from_numpy(values, xp))
    assert isinstance(host, np.ndarray)
    np.testing.assert_array_equal(host, values)
    assert arrays.is_array(from_numpy(values, xp)) is True
    assert arrays.is_array([1.0]) is False


def test_arrays_that_are_not_on_the_host(cupy: ModuleType) -> None:
    np.testing.assert_array_equal(arrays.to_host(OnCard([1.0, 2.0])), [1.0, 2.0])
    away = array_api_strict.asarray([1.0, 2.0], device=ELSEWHERE)
    np.testing.assert_array_equal(arrays.to_host(away), [1.0, 2.0])
    np.testing.assert_array_equal(arrays.to_host(torch.ones(2, requires_grad=True)), [1.0, 1.0])


@pytest.mark.parametrize("copy", [arrays.own_copy, arrays.copied])
def test_a_copy_is_in_new_memory(xp: ModuleType, copy: Any) -> None:
    original = from_numpy(normal((2, 3)), xp)
    got = copy(xp, original)
    assert type(got) is type(original)
    np.testing.assert_array_equal(to_numpy(got), to_numpy(original))
    assert not np.shares_memory(arrays.to_host(got), arrays.to_host(original))


def test_a_copy_stays_on_its_device() -> None:
    away = array_api_strict.asarray([1.0, 2.0], device=ELSEWHERE)
    assert arrays.own_copy(array_api_strict, away).device == arrays.copied(array_api_strict, away).device == ELSEWHERE
    half = torch.ones(3, dtype=torch.bfloat16)
    got = arrays.own_copy(torch_xp, half)
    assert (got.dtype, got.tolist()) == (torch.bfloat16, [1.0] * 3)
    assert got.data_ptr() != half.data_ptr()


def test_what_is_worked_on_as_numpy_is_given_back_in_the_same_memory() -> None:
    view = np.zeros(3)
    assert arrays.given_back(np, view) is view
    tensor = arrays.given_back(torch_xp, view)
    view[1] = 2.0
    assert tensor.tolist() == [0.0, 2.0, 0.0]
    half = torch.ones(3, dtype=torch.bfloat16)
    assert arrays.given_back(torch_xp, half).data_ptr() == half.data_ptr()
    away = array_api_strict.asarray([1.0], device=ELSEWHERE)
    assert arrays.given_back(array_api_strict, away).device == ELSEWHERE


def test_rows_that_are_finite(xp: ModuleType) -> None:
    rows = np.zeros((4, 2, 3))
    rows[1, 1, 2], rows[2, 0, 0] = np.nan, -np.inf
    got = arrays.finite_rows(xp, from_numpy(rows, xp))
    assert got.tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("row", "dtype", "single"),
    [
        ([0.1, 1.0, -0.5], "float64", False),  # one is of no float32
        ([float(np.float32(0.1)), 1.0, -0.5], "float64", True),
        ([float(np.float32(0.1)), 1.0, -0.5], "float32", False),  # that is their own dtype's
        ([1.0, -1.0, 0.0, 0.75], "float64", False),  # so few bits are anyone's
        ([1.0 + 2.0**-11], "float64", False),
        ([1.0 + 2.0**-12], "float64", True),
    ],
)
def test_numbers_that_come_from_float32(xp: ModuleType, row: list[float], dtype: str, single: bool) -> None:
    got = arrays.coarse(xp, xp.asarray(row, dtype=getattr(xp, dtype)))
    assert to_numpy(got).tolist() == [2.0**-23 if single else 0.0]


def test_numbers_of_twelve_bits_are_told_from_those_of_thirteen() -> None:
    twelve, thirteen = np.arange(2049.0, 4096.0, 2), np.arange(4097.0, 8192.0, 32)
    assert not arrays.coarse(np, twelve).any()
    assert all(arrays.coarse(np, thirteen[k : k + 1]).all() for k in range(len(thirteen)))


def test_products_and_lengths(xp: ModuleType) -> None:
    a, b = normal((2, 3, 4)), normal((2, 3, 4), seed=1)
    left, right = from_numpy(a, xp), from_numpy(b, xp)
    transposed = from_numpy(np.ascontiguousarray(b.transpose(0, 2, 1)), xp)
    np.testing.assert_allclose(to_numpy(arrays.matmul(xp, left, transposed)), a @ b.transpose(0, 2, 1), rtol=1e-13)
    inner = arrays.vecdot(xp, left, right)
    assert type(inner) is type(left)
    np.testing.assert_allclose(to_numpy(inner), (a * b).sum(axis=2), rtol=1e-12)
    long = arrays.lengths(xp, left)
    assert type(long) is type(left)
    np.testing.assert_allclose(to_numpy(long), np.sqrt((a**2).sum(axis=2)), rtol=1e-13)
    np.testing.assert_allclose(to_numpy(arrays.plus_product(from_numpy(a, xp), left, right)), a + a * b, rtol=1e-13)


@pytest.mark.parametrize("kind", [np.asarray, torch.asarray])
def test_a_product_is_added_in_place(kind: Any) -> None:
    total, factor = kind(np.full(3, 1.0)), kind(np.full(3, 2.0))
    assert arrays.plus_product(total, factor, factor) is total
    assert total.tolist() == [5.0] * 3


@pytest.mark.parametrize(("bits", "count"), [(11, 2), (8, 3)])
def test_parts_of_few_bits_are_the_whole(bits: int, count: int) -> None:
    whole = torch.from_numpy(normal((200,), dtype="float32"))
    parts = arrays._parts(torch_xp, whole, bits, count)
    assert len(parts) == count
    for part in parts:
        mantissa = torch.frexp(part)[0].double() * 2**bits
        assert torch.equal(mantissa, mantissa.round())
    left = (whole.double() - sum(part.double() for part in parts)) / whole.double()
    assert float(left.abs().max()) <= 2.0 ** -(bits * count)  # each is rounded to nearest
    one = torch.tensor([1.0 + 2.0 ** (1 - bits) * 0.625])  # is nearer to the number above than to 1
    assert arrays._parts(torch_xp, one, bits, 1)[0].tolist() == [1.0 + 2.0 ** (1 - bits)]


@pytest.mark.parametrize(
    ("precision", "newer", "expected"),
    [
        ("highest", "none", 24),
        ("high", "none", 11),
        ("medium", "none", 8),
        ("highest", "tf32", 11),
        ("highest", "bf16", 8),
        (RuntimeError("mixed"), "none", 11),
    ],
)
@pytest.mark.parametrize("place", ["everywhere", "products"])
def test_to_how_many_bits_torch_may_round(precision: Any, newer: str, expected: int, place: str) -> None:
    def said() -> str:
        if isinstance(precision, Exception):
            raise precision
        return precision

    everywhere = newer if place == "everywhere" else "none"
    own = newer if place == "products" else "none"
    cuda = SimpleNamespace(matmul=SimpleNamespace(fp32_precision=own))
    there = SimpleNamespace(
        get_float32_matmul_precision=said, backends=SimpleNamespace(fp32_precision=everywhere, cuda=cuda)
    )
    assert arrays._torch_bits(there) == expected


def test_to_how_many_bits_others_may_round(cupy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPY_TF32", "1")
    namespace = np  # of the dtypes alone
    assert arrays._product_bits(namespace, OnCard(np.ones(2, dtype=np.float32))) == 11
    assert arrays._product_bits(namespace, OnCard(np.ones(2))) == 24
    monkeypatch.setenv("CUPY_TF32", "0")
    assert arrays._product_bits(namespace, OnCard(np.ones(2, dtype=np.float32))) == 24
    assert arrays._product_bits(np, np.ones(2, dtype=np.float32)) == 24
    assert arrays._product_bits(torch_xp, torch.ones(2, dtype=torch.float64)) == 24


def test_rows_by_index(xp: ModuleType) -> None:
    values, index = normal((4, 3)), np.array([2, 0, 2])
    rows = from_numpy(values, xp)
    np.testing.assert_array_equal(to_numpy(arrays.take_rows(rows, index)), values[index])
    there = arrays.put_index(rows, index)
    np.testing.assert_array_equal(to_numpy(arrays.take_at(rows, there)), values[index])
    assert np.asarray(to_numpy(there)).dtype.kind == "i"
    assert arrays.integers(xp) == xp.int64
    got = arrays.assign(rows, (slice(1, 3), 0), xp.asarray([7.0, 8.0], dtype=xp.float64))
    values[1:3, 0] = 7.0, 8.0
    np.testing.assert_array_equal(to_numpy(got), values)


def test_host_numbers_on_a_device(xp: ModuleType) -> None:
    values = np.array([0.1, 0.2])
    where = ELSEWHERE if xp.__name__ == "array_api_strict" else array_api_compat.device(from_numpy(values, xp))
    got = arrays.uploaded(xp, values, where, xp.float32)
    assert (got.dtype, array_api_compat.device(got)) == (xp.float32, where)
    np.testing.assert_array_equal(arrays.to_host(got), values.astype(np.float32))
    plain = arrays.uploaded(xp, values, where)
    assert plain.dtype == xp.float64
    assert (plain is values) == (xp.__name__ == "array_api_compat.numpy")
    assert arrays.uploaded(np, values, where, np.float64) is values


def test_tables_are_brought_to_a_device_together(xp: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = [np.arange(6.0).reshape(2, 3), np.zeros((0, 4)), np.array([[[7.0]], [[8.0]]])]
    where = ELSEWHERE if xp.__name__ == "array_api_strict" else array_api_compat.device(from_numpy(tables[0], xp))
    asked: list[Any] = []
    upload = arrays.uploaded
    monkeypatch.setattr(arrays, "uploaded", lambda *given: asked.append(given) or upload(*given))
    got = arrays.uploaded_together(xp, tables, where)
    numpys = xp.__name__ == "array_api_compat.numpy"
    assert len(asked) == (not numpys)
    for one, table in zip(got, tables, strict=True):
        assert one is table if numpys else array_api_compat.device(one) == where
        np.testing.assert_array_equal(arrays.to_host(one), table)


def test_numbers_for_a_card_are_pinned_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Any] = []
    moved: list[Any] = []
    monkeypatch.setattr(arrays, "_is_card", lambda device: device == "card")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.device.type) or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, where, **how: moved.append((where, how)) or tensor)
    got = arrays.uploaded(torch_xp, np.array([1.5]), "card", torch.float32)
    assert (got.dtype, got.tolist(), pinned) == (torch.float32, [1.5], ["cpu"])
    assert moved == [("card", {"non_blocking": True})]
    arrays.uploaded(torch_xp, np.array([1.5]), torch.device("cpu"))
    assert len(moved) == len(pinned) == 1
    monkeypatch.undo()
    assert arrays._is_card(torch.device("cuda", 1))
    assert not arrays._is_card(torch.device("cpu"))


def test_a_table_is_brought_to_a_device_once(xp: ModuleType) -> None:
    values = np.array([0.25, 4.0, 1.0])
    table, x = arrays.DeviceTable(values), from_numpy(normal((2,), dtype="float32"), xp)
    there = table.like(x)
    assert (there.dtype, len(table)) == (xp.float32, 3)
    np.testing.assert_array_equal(arrays.to_host(there), values)
    assert table.like(xp.asarray(x)) is there
    other = table.like(x, xp.float64)
    assert (other.dtype, table.like(x, xp.float64) is other) == (xp.float64, True)
    values[0] = 9.0  # its own by now
    assert arrays.to_host(table.like(x, xp.float64))[0] == 0.25


def test_a_table_is_where_the_array_is() -> None:
    table, away = arrays.DeviceTable(np.ones(2)), array_api_strict.asarray([1.0], device=ELSEWHERE)
    assert table.like(array_api_strict.asarray([1.0])).device != ELSEWHERE
    assert table.like(away).device == ELSEWHERE


def test_numbers_beyond_the_range_of_a_dtype_become_its_largest() -> None:
    values = torch.tensor([1e6, -1e6, 2.0, float("nan")], dtype=torch.float64)
    got = arrays.narrow(torch_xp, values, torch.float16)
    assert got.dtype == torch.float16
    assert got[:3].tolist() == [65504.0, -65504.0, 2.0]
    assert bool(got[3].isnan())
    assert arrays.narrow(torch_xp, got, torch.float16) is got


def test_states_are_of_float32_at_least() -> None:
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32)):
        assert arrays.working_dtype(torch_xp, dtype) == expected
    for dtype in (torch.float32, torch.float64):
        assert arrays.working_dtype(torch_xp, dtype) == dtype


def test_no_history_of_gradients_is_kept() -> None:
    tensor = torch.ones(2, requires_grad=True)
    assert not arrays.detach(tensor).requires_grad
    values = np.ones(2)
    assert arrays.detach(values) is values
    with arrays.no_grad(torch_xp):
        assert not (tensor * 2).requires_grad
    with arrays.no_grad(np):
        assert (tensor * 2).requires_grad


def test_all_sums_come_to_the_host_in_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers: list[int] = []
    to_host = arrays.to_host
    monkeypatch.setattr(arrays, "to_host", lambda array: transfers.append(len(array)) or to_host(array))
    near, single = np.array([1.0, 2.0], dtype=np.float32), torch.tensor([3.0])
    got = arrays.fetch(torch_xp, [near, single, torch.tensor([4.0, 5.0]), near, torch.tensor([6.0])])
    assert [one.tolist() for one in got] == [[1.0, 2.0], [3.0], [4.0, 5.0], [1.0, 2.0], [6.0]]
    assert all(one.dtype == np.float64 for one in got)
    assert transfers == [4]
    assert [one.tolist() for one in arrays.fetch(torch_xp, [near, single])] == [[1.0, 2.0], [3.0]]
    assert transfers == [4, 1]
    assert [one.tolist() for one in arrays.fetch(np, [near])] == [[1.0, 2.0]]
    assert len(transfers) == 2


def test_a_function_is_left_out_of_graphs_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    left_out: list[str] = []

    def disable(function: Any) -> Any:
        left_out.append(function.__name__)
        return function

    @arrays.outside_graphs
    def twice(value: int, *, more: int = 0) -> int:
        return 2 * value + more

    assert (twice.__name__, twice._torchdynamo_disable) == ("twice", True)  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    assert twice(3, more=1) == 7
    monkeypatch.setitem(sys.modules, "torch._dynamo", SimpleNamespace(disable=disable))  # type: ignore[arg-type]
    assert twice(3, more=1) == 7
    assert left_out == ["twice"]


@pytest.mark.parametrize(("dtype", "tiny", "eps"), [("f4", 2.0**-126, 2.0**-23), ("f8", 2.0**-1022, 2.0**-52)])
def test_from_where_on_a_sum_of_squares_may_have_lost_some(dtype: str, tiny: float, eps: float) -> None:
    assert lowest(10, np.dtype(dtype)) == 10 * tiny / eps


def test_only_sums_that_may_have_lost_something_are_summed_again() -> None:
    least = lowest(2, np.dtype(np.float32)) ** 0.5
    rows = np.array([[0.8 * least, 0], [2 * least, 3 * least], [1e-30, 2e-30]], dtype=np.float32)
    got = sums_of_squares(rows)
    assert got.dtype == np.float64
    wide = rows.astype(np.float64)
    assert got[1] == np.float32(rows[1] @ rows[1])  # as float32 sums it
    np.testing.assert_allclose(got[[0, 2]], (wide**2).sum(axis=1)[[0, 2]], rtol=1e-15)
    np.testing.assert_allclose(sums_of_squares(rows[None]), got[None], rtol=0)


def test_bounds_of_sums_that_may_have_lost_something(xp: ModuleType) -> None:
    """What a sum can be at most, and a length is at least; others stay what they are."""
    values = np.zeros((2, 2, 5), dtype=np.float32)
    values[0, 0, :2], values[1, 0, :2], values[1, 1, 3] = (3e-30, -4e-30), (3.0, 4.0), 1e-25
    rows = from_numpy(values, xp)
    sums, some = np.array([[0.0, 0.0], [25.0, 0.0]]), np.array([[0.0, 0.0], [5.5, 2e-25]])
    np.testing.assert_allclose(at_most(sums, xp, rows), [[80e-60, 0.0], [25.0, 5e-50]], rtol=1e-6)
    np.testing.assert_allclose(at_least(some, xp, rows), [[4e-30, 0.0], [5.5, 2e-25]], rtol=1e-6)
    fine = np.array([[1e-12, 2.0], [3.0, 4.0]])
    assert at_most(fine, xp, rows) is fine
    assert at_least(fine, xp, rows) is fine
    least = lowest(5, np.dtype(np.float32))  # of sums of five squares
    near = np.array([[1.01 * least, 1.0], [1.0, 1.0]])
    assert at_most(near, xp, rows) is near
    assert at_most(0.99 * near, xp, rows)[0, 0] == pytest.approx(80e-60, rel=1e-6, abs=0.0)
    deep = from_numpy(np.array([[1e-200, 0.0]]), xp)
    assert at_most(np.zeros(1), xp, deep)[0] == np.finfo(np.float64).tiny  # not 0
