"""The noise of single steps: when it is drawn, kept and let go, and what is refused."""

import hashlib

import numpy as np
import pytest

from parasolver_core.samplers.noise import NoiseSource
from tests.core.problems import normal


def test_a_function_is_asked_once_for_each_draw_and_for_the_first_again() -> None:
    asked: list[tuple[int, int]] = []

    def own(step: int, sample: int) -> np.ndarray:
        asked.append((step, sample))
        return np.full(3, 10.0 * step + sample)

    source = NoiseSource(np.zeros((2, 3)), np.float64, 4, None, own)
    for at in ((1, 0), (1, 0), (0, 1), (2, 1), (1, 0), (0, 1)):
        np.testing.assert_array_equal(source(*at), 10.0 * at[0] + at[1])
    assert asked == [(1, 0), (0, 1), (1, 0), (2, 1)]
    assert not source.slow
    source.release(1, 0)  # what a function gave cannot be had again
    assert source.held == [(1, 0), (0, 1), (2, 1)]
    np.testing.assert_array_equal(source.block([(2, 1), None]), [[21.0] * 3, [0.0] * 3])
    source.forget_before(np.array([1, 2]))
    assert source.held == [(1, 0), (2, 1)]
    source.forget(1, 0)
    assert source.held == [(2, 1)]


def test_a_draw_of_a_table_is_let_go_where_it_can_be_had_again() -> None:
    z = normal((4, 2, 3))
    source = NoiseSource(np.zeros((2, 3), dtype=np.float32), np.float32, 4, None, z)
    np.testing.assert_array_equal(source(3, 1), z[3, 1].astype(np.float32))
    assert source(3, 1).dtype == np.float32
    source.release(3, 1)
    assert source.held == []
    whole = NoiseSource(np.zeros((2, 3)), np.float64, 4, None, np.arange(24).reshape(4, 2, 3))
    np.testing.assert_array_equal(whole(3, 1), [21.0, 22.0, 23.0])


def test_draws_of_large_states_are_worth_to_be_made_ahead() -> None:
    for size, noise, slow in (
        (2**13, None, True),
        (2**13 - 1, None, False),
        (2**13, lambda i, k: np.zeros(2**13), False),
    ):
        assert NoiseSource(np.zeros((1, size)), np.float64, 4, None, noise).slow == slow


@pytest.mark.parametrize("kind", ["array", "function"])
def test_noise_in_another_byte_order_is_read_and_one_bad_number_is_not(kind: str) -> None:
    z, like = normal((4, 2, 3)), np.zeros((2, 3))

    def given(z: np.ndarray) -> NoiseSource:
        return NoiseSource(like, np.float64, 4, None, z if kind == "array" else lambda step, sample: z[step, sample])

    np.testing.assert_array_equal(given(z.astype(z.dtype.newbyteorder()))(2, 1), z[2, 1])
    z[2, 1, 0] = np.nan
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        given(z)(2, 1)


def test_a_function_of_which_one_number_changes_is_refused() -> None:
    asked: list[int] = []

    def own(step: int, sample: int) -> np.ndarray:
        asked.append(step)
        return np.array([1.0, 2.0, float(len(asked))])

    source = NoiseSource(np.zeros((2, 3)), np.float64, 4, None, own)
    source(0, 0)
    with pytest.raises(ValueError, match=r"noise\(0, 0\) gave other numbers when it was called again"):
        source(1, 0)


def test_seeds_may_be_an_array() -> None:
    like = np.zeros((2, 3))
    listed, array = (NoiseSource(like, np.float64, 4, seeds, None) for seeds in ([7, 9], np.array([7, 9])))
    np.testing.assert_array_equal(array.block([(2, 1)]), listed.block([(2, 1)]))
    table = NoiseSource(like, np.float64, 4, None, normal((4, 2, 3)))
    np.testing.assert_array_equal(table.block([(2, 1)]), normal((4, 2, 3))[2:3, 1])


def test_what_tells_two_sources_apart() -> None:
    like = np.zeros((2, 3))
    assert NoiseSource(like, np.float64, 4, 7, None).fingerprint([0]) == "seeds 7/0, 7/1"
    assert NoiseSource(like, np.float64, 4, [7, 9], None).fingerprint([0]) == "seeds 7/0, 9/0"
    assert NoiseSource(like, np.float64, 4, None, None).fingerprint([0]) == "seeds 0/0, 0/1"
    for seeds, short in (([10, *[1] * 19], True), ([10, 10, *[1] * 18], False)):
        told = NoiseSource(np.zeros((20, 3)), np.float64, 4, seeds, None).fingerprint([0])
        assert told.startswith("seeds ") if short else len(told) == 16
    z = normal((4, 2, 3))
    hashed = hashlib.sha256(z.tobytes()).hexdigest()[:16]
    assert NoiseSource(like, np.float64, 4, None, z).fingerprint([0]) == hashed
    some = hashlib.sha256(b"".join(z[step, sample].tobytes() for step in (1, 3) for sample in (0, 1))).hexdigest()[:16]

    def own(step: int, sample: int) -> np.ndarray:
        return z[step, sample]

    told = NoiseSource(like, np.float64, 4, None, own).fingerprint([1, 3])
    assert told == f"function {own.__qualname__} {some}"
