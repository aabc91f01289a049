"""The solver's own products are whole float32, whatever a user has allowed for a network's."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from array_api_compat import torch as xp
from torch.overrides import TorchFunctionMode

from parasolver_core import DDIM, DDPM, NoiseSchedule, solve, solve_sequential
from parasolver_core.arrays import matmul
from parasolver_core.methods import sliding, spread
from parasolver_core.methods import window_batch as batch
from parasolver_core.rounds import shared
from parasolver_core.samplers import noise
from tests.core.problems import Rational, normal, relative

SCHEDULE = NoiseSchedule.scaled_linear()
PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "einsum", "tensordot", "linear", "addmm", "mv", "dot"}


class Rounded(TorchFunctionMode):
    """Products as a card makes them that rounds float32 factors to so many bits, where that is allowed."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits, self.products = bits, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in PRODUCTS and torch.get_float32_matmul_precision() != "highest":
            self.products += 1
            args = tuple(self.rounded(one) if isinstance(one, torch.Tensor) else one for one in args)
        return func(*args, **(kwargs or {}))

    def rounded(self, array: torch.Tensor) -> torch.Tensor:
        if array.dtype != torch.float32:
            return array
        mantissa, exponent = torch.frexp(array)
        return torch.ldexp(torch.round(mantissa * 2.0**self.bits) / 2.0**self.bits, exponent)


@pytest.fixture(params=["high", "medium"])
def card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rounded]:
    """Arrays that NumPy does not work in, and products of 11 or 8 significant bits."""
    for module in (batch, sliding, spread, noise, shared):
        monkeypatch.setattr(module, "host_view", lambda array: array)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    with Rounded(11 if request.param == "high" else 8) as mode:
        yield mode
    assert torch.get_float32_matmul_precision() == request.param
    torch.set_float32_matmul_precision(before)


def test_products_are_whole(card: Rounded) -> None:
    a, b = (torch.as_tensor(normal(shape, dtype="float32", seed=3)) for shape in ((16, 16), (16, 300)))
    exact = a.double() @ b.double()
    size = a.abs().double() @ b.abs().double()
    before = card.products
    assert float(((matmul(xp, a, b) - exact).abs() / size).max()) < 2.0**-21
    assert card.products - before == (3 if card.bits == 11 else 6)  # of two parts each, or three, but for the smallest
    assert float(((a @ b - exact).abs() / size).max()) > 2.0**-13  # the card does round


def test_other_dtypes_are_multiplied_at_once(card: Rounded) -> None:
    a = torch.as_tensor(normal((4, 4)))
    assert torch.equal(matmul(xp, a, a), a @ a)
    assert card.products == 2


@pytest.mark.parametrize("rule", [DDIM(SCHEDULE), DDPM(SCHEDULE)], ids=["ddim", "ddpm"])
@pytest.mark.parametrize(("steps", "width", "tolerance"), [(60, 12, 1e-3), (24, 8, 0.0), (200, 16, 1e-2)])
def test_a_run_is_the_same_where_products_may_be_rounded(
    card: Rounded, rule: Any, steps: int, width: int, tolerance: float
) -> None:
    x_T, grid = torch.as_tensor(normal((1, 16), dtype="float32")), SCHEDULE.timesteps(steps)
    options: dict[str, Any] = {"tolerance": tolerance, "check": False}
    got = solve(Rational(gain=2.0), x_T, grid, rule, width, **options)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    whole = solve(Rational(gain=2.0), x_T, grid, rule, width, **options)
    expected = solve_sequential(Rational(gain=2.0), x_T, grid, rule)
    torch.set_float32_matmul_precision(precision)
    assert abs(got.stats.rounds - whole.stats.rounds) <= (1 if tolerance else 2)
    assert relative(got.sample, expected.sample) <= max(tolerance, 1e-5)
    assert np.isclose(relative(got.sample, whole.sample), 0.0, atol=max(tolerance / 10, 1e-5))


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="a setting of later versions of PyTorch"
)
def test_the_newer_way_of_allowing_tf32_is_seen() -> None:
    from parasolver_core.arrays import _product_bits

    a = torch.ones(2, 2)
    assert _product_bits(xp, a) == 24
    place = torch.backends.cuda.matmul
    before = place.fp32_precision
    try:
        place.fp32_precision = "tf32"
        assert _product_bits(xp, a) == 11
    finally:
        place.fp32_precision = before
    assert _product_bits(xp, a) == 24


@pytest.mark.parametrize("method", ["secant", "identity", "paradigms", "parasolver", "parataa", "sequential"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_rounded_to_0_is_no_error_where_numpy_raises(method: str, dtype: str) -> None:
    """A user may ask NumPy to raise for all; the network is his, states that are 0 in half precision are not."""
    x_T = normal((3, 8), dtype=dtype, seed=1)
    x_T[0] = 0.0
    tiny = np.asarray(2.0**-12, dtype)

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return tiny * np.tanh(x)

    problem = network, x_T, SCHEDULE.timesteps(40), DDIM(SCHEDULE, eta=1.0 if method != "parataa" else 0.0)
    want = solve(*problem, 8, method=method)
    with np.errstate(all="raise"):
        got = solve(*problem, 8, method=method, check=True)
    np.testing.assert_array_equal(got.sample, want.sample)
