"""Several steps as one: the tables of the shorter sampler and its noise, beside sums by hand."""

from dataclasses import replace

import numpy as np
import pytest

from parasolver_core import DPMSolver, NoiseSchedule, Recurrence
from parasolver_core.samplers.noise import NoiseSource
from parasolver_core.samplers.subintervals import SubintervalNoise, Subintervals
from tests.core.problems import normal

LINEAR = NoiseSchedule.linear()
SHORT = Recurrence(
    timesteps=np.array([40, 30, 20, 10]),
    a=np.array([[0.5], [0.5], [2.0], [1.0]]),
    b=np.array([[1.0], [2.0], [3.0], [4.0]]),
    c=np.array([3.0, 4.0, 4.0, 0.0]),
    slope=np.array([0.1, 0.2, 0.3, 0.4]),
    signal=np.array([0.1, 0.3, 0.5, 0.7]),
    noise_share=0.4,
)


def test_two_steps_as_one() -> None:
    """``x_2 = 0.25 x_0 + 0.5 h_0 + 2 h_1 + 1.5 z_0 + 4 z_1`` and ``x_4 = 2 x_2 + 3 h_2 + 4 h_3 + 4 z_2``."""
    made, length = Subintervals(SHORT, 2), np.hypot(1.5, 4)
    np.testing.assert_array_equal(made.ends, [0, 2, 4])
    np.testing.assert_array_equal(made.lengths, [2, 2])
    np.testing.assert_allclose(made.a, [0.25, 2.0])
    np.testing.assert_allclose(made.b, [2.5, 7.0])
    np.testing.assert_allclose(made.weights, [[0.2, 0.8, 0, 0], [0, 0, 3 / 7, 4 / 7]])
    np.testing.assert_allclose(made.noise, [[1.5 / length, 4 / length, 0, 0], [0, 0, 1, 0]])
    np.testing.assert_allclose(made.scale, [1.0, 2.5, 12.0])
    assert made.rows == 1
    short = made.recurrence
    np.testing.assert_allclose(short.a[:, 0], made.a)
    np.testing.assert_allclose(short.b[:, 0], made.b)
    np.testing.assert_allclose(short.c, [length, 4.0])
    np.testing.assert_array_equal(short.timesteps, [40, 20])
    np.testing.assert_array_equal(short.held, [[0, 1], [0, 1]])
    np.testing.assert_allclose(short.slope, [0.1, 0.3])
    np.testing.assert_allclose(short.identity_slope, [0.75 / 2.5, -1 / 7])
    np.testing.assert_allclose(short.signal, [0.1, 0.5])
    assert short.noise_share == 0.4


def test_slopes_are_of_what_is_held() -> None:
    held = replace(SHORT, held=np.tile([2.0, -3.0], (4, 1)))
    np.testing.assert_allclose(Subintervals(held, 2).recurrence.slope, [2 - 3 * 0.1, 2 - 3 * 0.3])
    assert Subintervals(replace(SHORT, signal=None), 2).recurrence.signal is None


def test_steps_that_do_not_ask_the_network_and_add_no_noise() -> None:
    still = replace(SHORT, b=np.array([[0.0], [0.0], [3.0], [4.0]]), c=np.array([0.0, 0.0, 0.4, 0.0]))
    made = Subintervals(still, 2)
    np.testing.assert_allclose(made.b, [1.0, 7.0])  # any but 0 will do
    np.testing.assert_allclose(made.weights[0], 0.0)
    np.testing.assert_array_equal(made.noise[0], 0.0)
    np.testing.assert_array_equal(made.noise[1], [0, 0, 1, 0])
    np.testing.assert_allclose(made.recurrence.c, [0.0, 0.4])


def test_a_step_of_several_nodes_is_not_divided() -> None:
    five = Recurrence(np.arange(5), np.ones((5, 1)), np.ones((5, 1)), np.zeros(5), stages=2)
    np.testing.assert_array_equal(Subintervals(five, 3).ends, [0, 2, 4, 5])
    with pytest.raises(ValueError, match="subintervals: expected at most as many as the sampler has steps, 3, got 4"):
        Subintervals(five, 4)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_what_crosses_a_border_is_counted(count: int) -> None:
    """A sampler that reads three states and two outputs, followed with outputs at random."""
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(7, 3)), generator.normal(size=(7, 2))
    for i in range(2):
        a[i, i + 1 :] = 0.0
        b[i, i + 1 :] = 0.0
    held = np.stack([generator.normal(size=7), 1 + generator.random(7)], 1)
    fine = Recurrence(np.arange(7), a, b, np.zeros(7), held)
    made, m, x = Subintervals(fine, count), generator.normal(size=7), [generator.normal()]
    for i in range(7):
        new = sum(a[i, k] * x[i - k] for k in range(3) if k <= i) + sum(b[i, k] * m[i - k] for k in range(2) if k <= i)
        x.append(new)
    h = held[:, 0] * x[:7] + held[:, 1] * m
    for j, (first, end) in enumerate(zip(made.ends[:-1], made.ends[1:], strict=True)):
        mean = made.weights[j] @ h
        mean += sum(s * (x[first - 1 - k] - x[first]) for k, s in enumerate(made.states[j]) if first - 1 - k >= 0)
        mean += sum(s * h[first - 1 - k] for k, s in enumerate(made.predictions[j]) if first - 1 - k >= 0)
        assert made.a[j] * x[first] + made.b[j] * mean == pytest.approx(x[end], rel=1e-9)
        assert made.weights[j].sum() + made.predictions[j].sum() == pytest.approx(1.0, rel=1e-12)
        np.testing.assert_array_equal(made.weights[j, :first], 0.0)
        np.testing.assert_array_equal(made.weights[j, end:], 0.0)


def multistep() -> Subintervals:
    return Subintervals(DPMSolver(LINEAR, order=2, prediction_type="sample").recurrence(LINEAR.timesteps(10)), 3)


def test_what_travels_beside_a_state_is_nothing_at_the_start() -> None:
    made, x_T = multistep(), normal((2, 4))
    assert made.rows == 2
    travelling = made.begin(x_T)
    assert travelling.shape == (2, 2, 4)
    np.testing.assert_array_equal(made.state(travelling), x_T)
    np.testing.assert_array_equal(travelling[:, 1], 0.0)
    np.testing.assert_array_equal(made.flat_state(travelling[1].reshape(-1)), x_T[1])
    single = Subintervals(SHORT, 2)
    assert single.begin(x_T) is x_T
    assert single.state(x_T) is x_T
    np.testing.assert_array_equal(single.flat_state(x_T[0]), x_T[0])


def test_longer_subintervals_take_part_longer() -> None:
    made = multistep()  # of 3, 4 and 3 steps
    nodes = np.array([1, 0, 2, 1])
    assert [made.taking_part(nodes, ahead).tolist() for ahead in (2, 3, 4)] == [[0, 1, 2, 3], [0, 3], []]


def test_the_noise_of_subintervals_is_that_of_their_steps() -> None:
    made, x_T, z = Subintervals(SHORT, 2), normal((2, 3)), normal((4, 2, 3), seed=1)
    fine = NoiseSource(x_T, np.float64, 4, None, lambda step, sample: z[step, sample])
    noise = SubintervalNoise(x_T, np.float64, fine, made)
    for sample in range(2):
        np.testing.assert_allclose(noise(0, sample), (1.5 * z[0, sample] + 4 * z[1, sample]) / np.hypot(1.5, 4))
        np.testing.assert_allclose(noise(1, sample), z[2, sample])
    assert set(fine.held) == {(step, sample) for step in range(4) for sample in range(2)}
    noise.forget(0, 1)
    assert {at for at in fine.held if at[1] == 1} == {(2, 1), (3, 1)}
    noise.forget_before(np.array([1, 2]))
    assert fine.held == [(2, 0), (3, 0)]
    assert noise.held == [(1, 0)]
    assert noise.fingerprint([0]) == fine.fingerprint([0, 2])  # the first and the last step that adds noise
    assert noise.fingerprint([]) == fine.fingerprint([])


def test_no_noise_is_added_to_what_travels_beside_a_state() -> None:
    made = Subintervals(DPMSolver(LINEAR, stochastic=True, prediction_type="sample").recurrence(LINEAR.timesteps(6)), 3)
    x_T = normal((1, 4))
    fine = NoiseSource(x_T, np.float64, 6, 3, None)
    z = SubintervalNoise(made.begin(x_T), np.float64, fine, made)(1, 0)
    assert z.shape == (2, 4)
    np.testing.assert_allclose(z[0], made.noise[1, 2] * fine(2, 0) + made.noise[1, 3] * fine(3, 0))
    np.testing.assert_array_equal(z[1], 0.0)
