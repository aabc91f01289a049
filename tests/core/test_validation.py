"""What arguments just pass, and what just does not; what an error says of the place."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from parasolver_core.validation import (
    _read,
    check_count,
    check_counts,
    check_monotone,
    check_plain,
    check_scale,
    check_start,
    check_timesteps,
    check_tolerance,
    check_width,
)


@pytest.mark.parametrize(
    ("size", "shape", "scale", "said"),
    [
        (20.0, (4,), 1.0, None),
        (20.1, (4,), 1.0, "far larger than the noise of 1 "),
        (60.0, (4,), 3.0, None),
        (0.5, (4, 4), 4.0, "as standard normal noise"),
        (2.0, (4, 4), 4.0, "as standard normal noise"),
        (0.49, (4, 4), 4.0, None),
        (2.01, (4, 4), 4.0, None),
        (1.0, (4, 4), 3.99, None),  # not so much larger
        (1.0, (3, 5), 4.0, None),  # too few numbers to be sure
        (1.0, (2, 2, 4), 80.0, "as standard normal noise"),
        (1e6, (4, 4), float("nan"), None),
    ],
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_size_of_a_start(size: float, shape: tuple[int, ...], scale: float, said: str | None, dtype: Any) -> None:
    x_T = np.where(np.arange(np.prod(shape)).reshape(shape) % 2, -size, size).astype(dtype)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        check_scale(x_T, scale)
    assert [str(one.message).startswith("x_T: has an RMS of") for one in told] == [True] * (said is not None)
    assert said is None or said in str(told[0].message)


def test_the_size_of_a_start_beyond_the_squares_of_its_dtype() -> None:
    check_scale(np.full(4, 1e25), 1e25)
    check_scale(np.full(4, 300.0, dtype=np.float16), 300.0)


def test_plain_arrays_pass() -> None:
    buffer = getattr(torch.nn, "Buffer", torch.nn.Parameter)  # from PyTorch 2.5 on
    for plain in (np.ones(2), torch.ones(2), torch.nn.Parameter(torch.ones(2)), buffer(torch.ones(2)), "text"):
        check_plain("x", plain)
    other = np.ones(2).astype(np.ones(2).dtype.newbyteorder())
    check_plain("x", other, native=False)
    with pytest.raises(TypeError, match="byte order"):
        check_plain("x", other)
    np.testing.assert_array_equal(check_timesteps(other), [1, 1])
    check_start(torch.nn.Parameter(torch.ones(1)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors:UserWarning")
def test_tensors_with_an_arithmetic_of_their_own_are_refused() -> None:
    """Masked ones, which are dispatched below it as those of other devices, and those that are named as plain ones."""
    masked = torch.masked.masked_tensor(torch.ones(2), torch.tensor([True, False]))
    own = type("Tensor", (torch.Tensor,), {})
    for one in (masked, torch.ones(2).as_subclass(own), torch.nn.UninitializedParameter()):
        with pytest.raises(TypeError, match="own arithmetic"):
            check_plain("x", one)


def test_errors_of_a_device_with_numbers_are_its_own() -> None:
    def fails() -> bool:
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="the device is gone"):
        _read("x_T", np.ones(2), fails)
    with pytest.raises(TypeError, match="x_T: expected numbers, got a tensor on the device meta"):
        _read("x_T", torch.ones(2, device="meta"), fails)


def test_half_precision_is_wide_enough() -> None:
    check_width("x", np.ones(2, dtype=np.float16))
    check_width("x", torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="at least 16 bits"):
        check_width("x", torch.ones(2).to(torch.float8_e5m2))


def test_what_is_wrong_with_timesteps_is_named_by_its_place() -> None:
    with pytest.raises(ValueError, match="got nan at index 2"):
        check_timesteps([9.0, 5.0, np.nan, np.inf])
    for grid, said in (
        ([9, 5, 5, 1], "got 5 at index 1 and 2"),
        ([9, 5, 7, 1], "got 5 then 7 at index 1"),
        ([1, 5, 7, 6], "got 7 then 6 at index 2"),
        ([0.1, 0.5, 0.2], "got 0.5 then 0.2 at index 1"),
        ([0.5, 0.1, 0.4], "got 0.1 then 0.4 at index 1"),
    ):
        with pytest.raises(ValueError, match=said):
            check_monotone(np.array(grid))
    for grid in ([9, 5, 1], [1, 5, 9], [4], [0.1, 0.5], [0.5, 0.1]):
        check_monotone(np.array(grid))
    check_monotone(np.array([0, 2**63], dtype=np.uint64))


def test_counts_that_just_pass() -> None:
    check_count("n", 1)
    check_count("n", np.int64(2))
    check_count("n", 0, minimum=0)
    check_count("n", None, optional=True)
    check_counts("n", ())
    check_counts("n", np.array([1, 4]))
    for wrong, kind in ((0, ValueError), (None, TypeError), (True, TypeError), (1.0, TypeError)):
        with pytest.raises(kind, match="n: expected an integer of at least 1"):
            check_count("n", wrong)
    with pytest.raises(ValueError, match="of at least 3, got 2"):
        check_count("n", 2, minimum=3, optional=True)
    for wrong in ("14", {1, 4}, 4):
        with pytest.raises(TypeError, match="n: expected a sequence"):
            check_counts("n", wrong)


@pytest.mark.parametrize("tolerance", [0, 0.0, np.float32(0.5), np.int64(0), 1 - 1e-9])
def test_tolerances_that_just_pass(tolerance: Any) -> None:
    check_tolerance(tolerance)


def test_a_tolerance_of_1_is_taken_for_a_share_in_per_cent() -> None:
    with pytest.raises(ValueError, match=r"for 1 % give 0\.01"):
        check_tolerance(1.0)
