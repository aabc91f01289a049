"""A table's own arithmetic, number by number: steps, what is held, shares, slopes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from parasolver_core import Recurrence
from parasolver_core.samplers.implied import implied_outputs
from parasolver_core.samplers.sample_form import (
    added_noise_share,
    from_sample_form,
    posterior_slope,
    predicted_sample_coefficients,
    signal_share,
)
from parasolver_core.samplers.tables import identity_slope, in_held, trim
from parasolver_core.samplers.terms import Terms, combine
from tests.core.any_tables import any_table, small_data, step
from tests.core.problems import normal

READS = pytest.mark.parametrize(("states", "outputs"), [(1, 1), (1, 3), (3, 1), (2, 3)])
ALPHA, SIGMA = np.array([0.5, 0.8, 2.0]), np.array([3.0, 2.0, 1.0])


@READS
def test_a_step_is_the_sum_of_its_terms(states: int, outputs: int) -> None:
    table, (x, m, z) = any_table(7, states, outputs), normal((3, 7, 5))
    assert (table.memory, table.stages) == (max(states, outputs), 1)
    for i in range(7):
        back = [i - k for k in range(min(table.memory, i + 1))]
        got = table.advance(i, [x[j] for j in back], [m[j] for j in back], z[i])
        np.testing.assert_allclose(got, step(table, i, x, m, z[i]), rtol=1e-13)
        without = table.advance(i, [x[j] for j in back], [m[j] for j in back])
        np.testing.assert_allclose(without, step(table, i, x, m), rtol=1e-13)


def test_terms_are_those_that_are_not_0_and_the_first_state() -> None:
    a, b = np.array([[0.0, 0.0, 2.0], [3.0, 0.0, 0.5]]), np.array([[0.0, 1.0], [4.0, 5.0]])
    terms = Terms(a, b, np.array([0.0, 7.0]), np.array([[3.0, 2.0], [0.0, 1.0]]))
    x, m, z = ["x0", "x1", "x2"], ["m0", "m1"], "z"
    assert terms.of_step(0, x, m, z) == [(0.0, "x0"), (2.0, "x2"), (1.0, "m1")]
    assert terms.of_step(1, x, m, z) == [(3.0, "x0"), (0.5, "x2"), (4.0, "m0"), (5.0, "m1"), (7.0, "z")]
    assert terms.of_step(1, x, m) == [(3.0, "x0"), (0.5, "x2"), (4.0, "m0"), (5.0, "m1")]
    assert terms.of_belief(0, "h", "x") == [(0.5, "h"), (-1.5, "x")]
    assert all(type(coefficient) is float for coefficient, _ in terms.of_step(1, x, m, z))
    with pytest.raises(ValueError, match="zip"):
        Terms(a, b, np.zeros(1), np.ones((2, 2)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_terms_of_arrays_have_coefficients_of_their_dtype(dtype: Any) -> None:
    table = any_table()
    terms = table.terms(np.dtype(dtype))
    assert terms is table.terms(np.dtype(dtype))
    for coefficient, _ in [*terms.of_step(4, "xyz", "mno", "z"), *terms.of_belief(4, "h", "x")]:
        assert isinstance(coefficient, np.ndarray)
        assert coefficient.shape == ()
        assert coefficient.dtype == dtype
    plain = [float(coefficient) for coefficient, _ in table.terms().of_step(4, "xyz", "mno", "z")]
    np.testing.assert_allclose([float(one) for one, _ in terms.of_step(4, "xyz", "mno", "z")], plain, rtol=1e-7)


def test_a_sum_may_be_put_where_its_first_term_is() -> None:
    arrays, work = normal((3, 5)), np.empty(5)
    expected = 2 * arrays[0] - arrays[1] + 0.5 * arrays[2]
    got = combine([(2.0, arrays[0]), (-1.0, arrays[1]), (0.5, arrays[2])], arrays[0], work)
    assert got is not None
    assert np.shares_memory(got, arrays[0])
    np.testing.assert_allclose(arrays[0], expected, rtol=1e-14)


@READS
@pytest.mark.parametrize("last", [0, 1, 4])
def test_a_march_is_one_step_after_another(states: int, outputs: int, last: int) -> None:
    table, z = any_table(7, states, outputs), normal((7, 5), seed=1)
    x, m = list(normal((last + 1, 5), seed=2)), list(normal((last + 1, 5), seed=3))
    back = range(last, max(last - table.memory, -1), -1)
    asked = []

    def believe(i: int, state: Any) -> Any:
        asked.append(i)
        return 0.3 * state + i

    got = list(table.march(last, [x[i] for i in back], [m[i] for i in back], believe, lambda i: z[i]))
    for i in range(last, 7):
        x.append(step(table, i, x, m, z[i]))
        m.append(0.3 * x[-1] + i + 1)
    assert asked == list(range(last + 1, 7))
    np.testing.assert_allclose([state for state, _ in got], x[last + 1 :], rtol=1e-12)
    np.testing.assert_allclose([one for _, one in got[:-1]], m[last + 1 : 7], rtol=1e-12)
    assert got[-1][1] is None


@READS
def test_implied_outputs_are_those_that_made_the_states(states: int, outputs: int) -> None:
    b = np.tril(np.random.default_rng(4).uniform(0.5, 1.5, (7, outputs)))
    b[3, 0] = 0.0  # this step reads no output of its own
    table, m, z = any_table(7, states, outputs, b=b), normal((7, 5)), normal((7, 5), seed=1)
    m[3] = 0.0  # so none is implied
    x = [normal((5,), seed=2)]
    for i in range(7):
        x.append(step(table, i, x, m, z[i]))
    np.testing.assert_allclose(implied_outputs(table, np, x, lambda i: z[i]), m, rtol=1e-10, atol=1e-12)


@READS
def test_the_held_form_is_the_same_sampler(states: int, outputs: int) -> None:
    table, (x, m) = any_table(7, states, outputs), normal((2, 7, 5))
    a, b = in_held(table.a, table.b, table.held)
    assert (a.shape, b.shape) == ((7, table.memory), (7, outputs))
    h = [p * one + q * other for one, other, (p, q) in zip(x, m, table.held, strict=True)]
    for i in range(7):
        got = sum(a[i, k] * x[i - k] for k in range(min(table.memory, i + 1)))
        got = got + sum(b[i, k] * h[i - k] for k in range(min(outputs, i + 1)))
        np.testing.assert_allclose(got, step(table, i, x, m), rtol=1e-12)


@pytest.mark.parametrize(
    ("signal", "blind"),
    [
        (None, 1),
        ([0.5, 0.6, 0.7, 0.8], 1),
        ([0.05, 0.1, 0.05, 0.8], 1),  # a tenth is enough
        ([0.05, 0.09, 0.2, 0.05], 2),
        ([0.05, 0.06, 0.07, 0.08], 4),
    ],
)
def test_how_many_leading_states_hardly_depend_on_the_sample(signal: list[float] | None, blind: int) -> None:
    table = any_table(4, signal=None if signal is None else np.array(signal))
    assert table.blind == blind


def test_influence_is_a_power_of_what_a_state_holds_of_the_sample() -> None:
    signal = np.array([0.001, 0.01, 0.25, 1.0])
    for share, expected in ((0.0, [100, 100, 4, 1]), (1.0, [1, 1, 1, 1]), (0.5, [10, 10, 2, 1])):
        np.testing.assert_allclose(any_table(4, signal=signal, noise_share=share).influence, expected, rtol=1e-12)
    np.testing.assert_allclose(any_table(4, signal=signal).influence, 1 / np.maximum(signal, 0.01), rtol=1e-12)
    np.testing.assert_array_equal(any_table(4).influence, np.ones(4))


def test_the_size_of_the_sample_is_told_by_late_nodes_and_the_last() -> None:
    told = small_data(any_table(4, signal=np.array([0.1, 0.9, 0.96, 0.5])))
    assert [told.is_told(i) for i in range(4)] == [False, False, True, True]
    assert told.is_told(np.array([0, 2]))
    assert not told.is_told(np.array([0, 1]))
    assert not small_data(any_table(4)).is_told(np.array([0, 3]))


def test_smallness_is_of_each_sample_by_itself() -> None:
    """Moves are measured by ``s sqrt(alpha^2 + sigma^2)`` in the place of ``sqrt(alpha^2 s^2 + sigma^2)``."""
    signal = np.array([0.1, 0.9, 0.96, 0.98])
    parts = {
        "a": np.tril(np.full((4, 2), 0.5)),
        "c": np.array([0.3, 0.2, 0.1, 0.05]),
        "held": np.tile([0.25, 2.0], (4, 1)),
    }
    table = any_table(4, signal=signal, **parts)
    b, c, told = table.b, table.c, small_data(table)

    def expected(s: float) -> np.ndarray:
        return s / np.sqrt(signal**2 * s**2 + 1 - signal**2)

    # of the last node: what its step takes of the state, of the prediction (the output is twice that) and of noise
    at_end = (b[-1].sum() / 2) ** 2 * 0.01 + (1.0 - b[-1].sum() * 0.25 / 2) ** 2 * 0.02 + c[-1] ** 2
    assert 0 < at_end < 0.06
    nodes, squares, states = np.array([0, 2, 2, 3]), np.array([0.01, 0.01, 0.09, 0.01]), np.array([0.5, 0.5, 0.5, 0.02])
    got = told.smallness(nodes, squares, states)
    assert got.shape == (4, 4)
    np.testing.assert_array_equal(got[0], np.ones(4))  # node 0 tells nothing
    np.testing.assert_allclose(got[1], expected(0.1), rtol=1e-12)
    np.testing.assert_array_equal(got[2], np.ones(4))  # not small
    np.testing.assert_allclose(got[3], expected(at_end**0.5), rtol=1e-12)
    np.testing.assert_array_equal(told.smallness(nodes[:1], squares[:1], states[:1]), np.ones(4))
    np.testing.assert_array_equal(told.smallness(nodes[2:3], squares[2:3], states[2:3]), np.ones(4))
    np.testing.assert_allclose(told.smallness(2, 0.01), expected(0.1), rtol=1e-12)
    np.testing.assert_allclose(told.smallness(2, 0.0), expected(1e-12), rtol=1e-9)  # data of size 0
    without = ((b[-1].sum() / 2) ** 2 * 0.01 + c[-1] ** 2) ** 0.5  # of a state of size 0
    np.testing.assert_allclose(told.smallness(3, 0.01), expected(without), rtol=1e-12)
    np.testing.assert_array_equal(told.smallness(2, 0.0625), np.ones(4))
    np.testing.assert_array_equal(small_data(any_table(4)).smallness(3, 0.0), np.ones(4))


@pytest.mark.parametrize("kind", ["sample", "epsilon", "v_prediction", "flow"])
def test_a_table_for_the_predicted_sample_becomes_one_for_what_is_predicted(kind: str) -> None:
    """The same states, whatever the network predicts."""
    n, rng = 5, np.random.default_rng(3)
    a, b, c = np.tril(rng.uniform(0.1, 1, (n, 2))), np.tril(rng.uniform(0.1, 1, (n, 2))), rng.uniform(0, 0.1, n)
    alpha, sigma = np.linspace(0.2, 0.95, n + 1), np.linspace(0.9, 0.1, n + 1)
    table = from_sample_form(np.arange(n), a, b, c, (alpha, sigma), kind, 0.5)
    clean, eps = normal((2, n, 4))
    x = alpha[:n, None] * clean + sigma[:n, None] * eps
    norm = np.hypot(alpha, sigma)[:n, None]
    m = {
        "sample": clean,
        "epsilon": eps,
        "v_prediction": (alpha[:n, None] * eps - sigma[:n, None] * clean) / norm,
        "flow": eps - clean,
    }[kind]
    np.testing.assert_allclose(table.held[:, :1] * x + table.held[:, 1:] * m, clean, rtol=1e-12)
    for i in range(n):
        expected = a[i, 0] * x[i] + b[i, 0] * clean[i] + (i > 0) * (a[i, 1] * x[i - 1] + b[i, 1] * clean[i - 1])
        np.testing.assert_allclose(step(table, i, x, m), expected, rtol=1e-12)
    p, q = table.held.T
    gaussian = alpha[:n] * 0.25 / (alpha[:n] ** 2 * 0.25 + sigma[:n] ** 2)
    np.testing.assert_allclose(p + q * table.slope, gaussian, rtol=1e-12)
    assert table.signal is not None
    np.testing.assert_allclose(table.signal, alpha[:n] / norm[:, 0], rtol=1e-12)
    np.testing.assert_allclose(a.sum(axis=1) + b.sum(axis=1) * (p + q * table.identity_slope), 1.0, rtol=1e-12)
    assert table.noise_share == added_noise_share(alpha[:n], sigma[:n], c)
    np.testing.assert_array_equal(table.c, c)


def test_no_columns_of_zeros_are_kept() -> None:
    levels = np.full(4, 0.6), np.full(4, 0.8)
    blank = from_sample_form(
        np.arange(3), np.eye(3)[:1] + np.zeros((3, 3)), np.zeros((3, 3)), np.zeros(3), levels, "epsilon", 1.0
    )
    assert (blank.a.shape, blank.b.shape) == ((3, 1), (3, 1))
    held_slope = blank.held[:, 0] + blank.held[:, 1] * blank.identity_slope
    np.testing.assert_allclose(held_slope, 0.0, atol=1e-15)  # no slope makes such a step the identity
    table = np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]])
    np.testing.assert_array_equal(trim(table), table[:, :3])
    np.testing.assert_array_equal(trim(0 * table), np.zeros((2, 1)))


def test_slopes_that_make_a_step_the_identity() -> None:
    """``sum_k a + sum_k b (g - p) / q = 1`` with one g for all nodes that a step reads; the held quantity's slope."""
    a, b = np.tril(np.full((4, 2), 0.3)), np.tril(np.random.default_rng(1).uniform(0.2, 1, (4, 3)))
    p, q = np.array([0.1, -0.2, 0.3, 0.5]), np.array([1.0, 2.0, -0.5, -4.0])
    slope = identity_slope(a, b, p, q)
    for i in range(4):
        g = p[i] + q[i] * slope[i]
        read = range(min(3, i + 1))
        jacobian = a[i].sum() + sum(b[i, k] * (g - p[i - k]) / q[i - k] for k in read)
        assert jacobian == pytest.approx(1.0, rel=1e-12)
    table = any_table(4, a=a, b=b, held=np.stack([p, q], axis=1))
    np.testing.assert_array_equal(table.identity_slope, slope)
    left = np.array([[1.0, 0.0], [1.0, -0.98], [1.0, -0.981]])  # 0.02 of 1.98 is left: just enough; 0.019 is not
    found = identity_slope(np.full((3, 1), 0.9), left, np.zeros(3), np.ones(3))
    np.testing.assert_allclose(found, [0.1, 5.0, np.nan], rtol=1e-9)


def test_the_share_of_the_signal_and_the_slope_of_gaussian_data() -> None:
    np.testing.assert_allclose(signal_share(np.array([3.0, 0.0]), np.array([4.0, 1.0])), [0.6, 1e-12])
    np.testing.assert_allclose(posterior_slope(np.array([0.5]), np.array([2.0]), 3.0), [4.5 / 6.25])


@pytest.mark.parametrize(
    ("kind", "p", "q"),
    [
        ("sample", 0.0, 1.0),
        ("epsilon", 2.0, -6.0),
        ("v_prediction", 0.5 / 9.25, -3.0 / 9.25**0.5),
        ("flow", 2 / 7, -6 / 7),
    ],
)
def test_what_is_predicted_gives_the_sample(kind: str, p: float, q: float) -> None:
    got = predicted_sample_coefficients(kind, ALPHA[:1], SIGMA[:1])
    np.testing.assert_allclose(np.concatenate(got), [p, q], rtol=1e-14)


def test_the_share_of_noise_is_within_0_and_1() -> None:
    assert added_noise_share(ALPHA, SIGMA, np.array([9.0, 9.0, 0.0])) == 1.0
    assert added_noise_share(ALPHA, SIGMA, np.zeros(3)) == 0.0
    still = np.ones(3)  # no step of a diffusion at all
    assert added_noise_share(still, still, still) == 0.0
    # a step that grows noise adds none in reverse: it counts with what is added, and nothing of the whole
    rising = added_noise_share(np.array([0.8, 0.6, 0.9]), np.array([0.6, 0.8, 0.3]), np.array([0.1, 0.2]))
    whole = (0.09 - (0.6 * 0.09 / (0.9 * 0.8)) ** 2) / 0.9
    assert rising == pytest.approx((0.01 / 1.0 + 0.04 / 0.9) / whole, rel=1e-12)
    # one whose share is not finite does not count
    gone = added_noise_share(np.array([0.0, 0.6, 0.9]), np.array([0.0, 0.8, 0.3]), np.array([0.1, 0.2]))
    assert gone == pytest.approx(0.04 / 0.9 / whole, rel=1e-12)


def test_a_table_names_the_first_row_that_is_not_finite() -> None:
    a = np.ones((4, 2)) * (np.arange(2) <= np.arange(4)[:, None])
    a[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"^a: .*step 2 \(timestep 1\)"):
        any_table(4, a=a)
    for name, shape in (("signal", (3,)), ("input_scale", (4, 1))):
        with pytest.raises(ValueError, match=f"^{name}: expected shape"):
            replace(any_table(4), **{name: np.ones(shape)})
    held = np.ones((4, 2))
    held[3, 0] = np.inf
    with pytest.raises(ValueError, match=r"^held: .*step 3"):
        any_table(4, held=held)


def test_a_table_may_be_wider_than_it_is_long() -> None:
    short = Recurrence(np.arange(2), np.array([[1.0, 0, 0], [0.5, 0.5, 0]]), np.ones((2, 1)), np.zeros(2))
    assert short.memory == 3
    with pytest.raises(ValueError, match=r"^a: step i may use"):
        Recurrence(np.arange(2), np.array([[1.0, 0, 0], [0.5, 0.5, 1]]), np.ones((2, 1)), np.zeros(2))
