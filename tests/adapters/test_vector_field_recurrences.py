"""Defects carried along a trajectory: what a plain loop over its steps gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from parasolver_adapters.vector_field.surrogate import (
    IdentitySurrogate,
    Propagator,
    SecantSurrogate,
    apply,
    doubled,
    product,
    scan,
    step_increment,
)
from tests.arrays import from_numpy, to_numpy

SAMPLES, SIZE = 2, 3


def times(A: Any, v: Any) -> Any:
    """A matrix or a diagonal, times a vector, of each sample."""
    return np.einsum("sij,sj->si", A, v) if A.ndim == 3 else A * v


def carried(A: list[Any], r: Any) -> Any:
    d, found = np.zeros_like(r[0]), []
    for step, defect in zip(A, r, strict=True):
        d = times(step, d) + defect
        found.append(d)
    return np.array(found)


def carried_back(A: list[Any], g: Any) -> Any:
    d, found = np.zeros_like(g[0]), []
    for step, own in zip(A[::-1], g[::-1], strict=True):
        d = times(np.swapaxes(step, -1, -2) if step.ndim == 3 else step, d) + own
        found.append(d)
    return np.array(found[::-1])


def numbers(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("uneven", [True, False])
@pytest.mark.parametrize(
    ("blocks", "length", "steps"), [(1, 1, 1), (1, 4, 3), (2, 1, 2), (3, 2, 6), (5, 3, 13), (4, 4, 16)]
)
def test_blocks_of_steps_give_what_single_steps_give(
    xp: Any, dense: bool, uneven: bool, blocks: int, length: int, steps: int
) -> None:
    increment = 0.4 * numbers(blocks, SAMPLES, *((SIZE, SIZE) if dense else (SIZE,)))
    ratio = np.random.default_rng(1).uniform(0.5, 1.5, (blocks, length)) if uneven else np.ones((blocks, length))
    one = np.eye(SIZE) if dense else 1.0
    A = [one + ratio[k, j] * increment[k] for k in range(blocks) for j in range(length)]
    block = []
    for k in range(blocks):
        whole = np.broadcast_to(one, increment[k].shape)
        for step in A[k * length : (k + 1) * length]:
            whole = step @ whole if dense else step * whole
        block.append(whole)
    column = from_numpy(ratio.reshape(blocks, length, 1, 1), xp) if uneven else None
    own = [from_numpy(one, xp) for one in (increment, np.array(block))]
    propagator = Propagator(xp, *own, steps, column, length, dense)
    r = numbers(steps, SAMPLES, SIZE, seed=2)
    found = to_numpy(propagator.propagate(from_numpy(r, xp)))
    np.testing.assert_allclose(found, carried(A[:steps], r), rtol=1e-12, atol=1e-12)
    back = to_numpy(propagator.propagate_back(from_numpy(r, xp)))
    np.testing.assert_allclose(back, carried_back(A[:steps], r), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("n", range(10))
def test_combining_neighbours_gives_what_a_loop_gives(n: int, dense: bool) -> None:
    P, r = numbers(n, SAMPLES, *((SIZE, SIZE) if dense else (SIZE,))), numbers(n, SAMPLES, SIZE, seed=1)
    expected = carried(list(P), r) if n else r
    np.testing.assert_allclose(scan(np, P, r, dense), expected, rtol=1e-12, atol=1e-12)


def test_products_of_matrices_and_of_diagonals() -> None:
    a, b, v = np.array([[[1.0, 2.0], [0.0, 3.0]]]), np.array([[[0.0, 1.0], [5.0, 0.0]]]), np.array([[7.0, 1.0]])
    np.testing.assert_array_equal(product(np, a, b, True), [[[10, 1], [15, 0]]])
    np.testing.assert_array_equal(product(np, a, b, False), [[[0, 2], [0, 0]]])
    np.testing.assert_array_equal(apply(np, a, v, True), [[9, 3]])
    np.testing.assert_array_equal(apply(np, v, v, False), [[49, 1]])
    np.testing.assert_array_equal(doubled(np, np.array([3.0, -0.5]), False), [15.0, -0.75])  # 4^2 - 1, 0.5^2 - 1
    np.testing.assert_array_equal(doubled(np, a, True), [[[3, 12], [0, 15]]])  # (1 + a)^2 - 1


@pytest.mark.parametrize(
    ("order", "expected"),
    [(1, 0.5), (2, 0.5 + 1 / 8), (3, 0.5 + 1 / 8 + 1 / 48), (4, 0.5 + 1 / 8 + 1 / 48 + 1 / 384)],
)
def test_increment_of_a_step_is_taylors_series(order: int, expected: float) -> None:
    half = np.array([0.5])
    np.testing.assert_allclose(step_increment(np, half, order, 0, False), expected, rtol=1e-15)
    turn = np.array([[[0.0, -0.5], [0.5, 0.0]]])  # 0.5 i as a matrix
    powers = [np.linalg.matrix_power(turn[0], k) / [1, 1, 2, 6, 24][k] for k in range(1, order + 1)]
    np.testing.assert_allclose(step_increment(np, turn, order, 0, True)[0], sum(powers), rtol=1e-14, atol=1e-17)
    # of a step three times as long in eight parts, by the same series in each
    eighth = sum(1.5**k / 8**k / [1, 1, 2, 6, 24][k] for k in range(1, order + 1))
    np.testing.assert_allclose(step_increment(np, 3 * half, order, 3, False), (1 + eighth) ** 8 - 1, rtol=1e-14)


def test_picards_iteration_adds_defects_up(xp: Any) -> None:
    r = from_numpy(np.array([1.0, 20.0, 300.0]).reshape(3, 1, 1), xp)
    surrogate = IdentitySurrogate(xp)
    np.testing.assert_array_equal(to_numpy(surrogate.propagate(r, None)).ravel(), [1, 21, 321])
    np.testing.assert_array_equal(to_numpy(surrogate.propagate_back(r, None)).ravel(), [321, 320, 300])


@pytest.mark.parametrize("back", [False, True])
def test_the_secant_learns_each_steps_factor_in_two_rounds(xp: Any, back: bool) -> None:
    """Steps that multiply a sample's state by a number: the second correction is exact, and a third is none."""
    factors = np.array([[0.5, 2.0], [1.5, -1.0], [0.25, 3.0], [2.0, 0.75]])
    A = [np.broadcast_to(row[:, None], (SAMPLES, SIZE)) for row in factors]
    defect = numbers(4, SAMPLES, SIZE)
    loop, surrogate = carried_back if back else carried, SecantSurrogate(xp)
    carry, found = surrogate.propagate_back if back else surrogate.propagate, np.zeros_like(defect)
    for k in range(3):
        none = np.zeros_like(found[:1])
        beginnings = np.concatenate([found[1:], none] if back else [none, found[:-1]])
        left = np.array(A) * beginnings + defect - found
        found = found + to_numpy(carry(from_numpy(left, xp), None))
        if k == 0:  # nothing is known: as if each step's factor were 1
            np.testing.assert_allclose(found, loop([np.ones_like(A[0])] * 4, defect), rtol=1e-13, atol=1e-13)
        else:
            np.testing.assert_allclose(found, loop(A, defect), rtol=1e-12, atol=1e-12)


def test_a_secants_slope_is_the_one_that_explains_all_elements_best() -> None:
    surrogate = SecantSurrogate(np)
    surrogate.propagate(np.array([[[3.0, 4.0]], [[0.0, 0.0]]]), None)  # moves the second step's beginning by (3, 4)
    defects = np.array([[[0.0, 0.0]], [[5.0, 2.5]]])  # (15 + 10) / (9 + 16) = 1 more than 1
    np.testing.assert_allclose(surrogate.propagate(defects, None), [[[0, 0]], [[5, 2.5]]])
    np.testing.assert_allclose(surrogate.propagate(np.ones((2, 1, 2)), None), [[[1, 1]], [[3, 3]]])
