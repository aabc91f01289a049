"""Which nodes are spread, and the sampler as seen from them: by hand, and by the plain loop."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from parasolver_core.methods.levels import Level, Levels, interpolation, placement
from parasolver_core.samplers.recurrence import UNDECIDED, Recurrence


def plain(steps: int, **options: Any) -> Recurrence:
    """Each step adds a tenth of the output to the state."""
    once = np.ones((steps, 1))
    return Recurrence(np.arange(steps), once, 0.1 * once, np.zeros(steps), **options)


def shares(log_snr: Any) -> np.ndarray:
    """alpha of states of unit size with these logarithms of alpha / sigma."""
    return 1 / np.sqrt(1 + np.exp(-2 * np.array(log_snr)))


def any_recurrence(steps: int, stages: int = 1) -> Recurrence:
    """It reads two states and three outputs."""
    rng = np.random.default_rng(steps)
    a, b = (np.tril(rng.uniform(0.2, 0.6, (steps, steps)))[:, :width] for width in (2, 3))
    return Recurrence(np.arange(steps), a, b, np.zeros(steps), held=rng.uniform(0.5, 2, (steps, 2)), stages=stages)


def test_half_of_the_nodes_follow_the_steps_and_half_the_signal_to_noise_ratio() -> None:
    found = placement(plain(4, signal=shares([-3.0, -1.0, 0.0, 4.0])))
    np.testing.assert_allclose(found, (np.arange(4) / 3 + np.array([0, 2, 3, 7]) / 7) / 2, atol=1e-12)


def test_levels_that_are_close_together_count_as_much() -> None:
    found = placement(plain(3, signal=shares([0.0, 0.1, 0.5])))
    np.testing.assert_allclose(found, [0, (0.5 + 0.2) / 2, 1], atol=1e-12)


def test_a_signal_that_falls_keeps_its_place() -> None:
    found = placement(plain(4, signal=shares([-3.0, 1.0, 0.0, 4.0])))
    np.testing.assert_allclose(found, (np.arange(4) / 3 + np.array([0, 4, 4, 7]) / 7) / 2, atol=1e-12)


def test_signals_of_next_to_nothing_and_of_all_are_taken_for_little_and_nearly_all() -> None:
    found = placement(plain(3, signal=np.array([1e-9, shares(0.0), 1.0])))
    least, most = np.log(UNDECIDED / np.sqrt(1 - UNDECIDED**2)), np.log(1e4)
    np.testing.assert_allclose(found, [0, (0.5 - least / (most - least)) / 2, 1], atol=1e-7)


@pytest.mark.parametrize("signal", [None, np.full(5, 0.3)], ids=["no levels", "one level"])
def test_without_levels_steps_are_equally_far_apart(signal: Any) -> None:
    np.testing.assert_allclose(placement(plain(5, signal=signal)), [0, 0.25, 0.5, 0.75, 1])


def test_a_single_step_is_at_the_beginning() -> None:
    assert placement(plain(1)).tolist() == placement(plain(1, signal=np.array([0.5]))).tolist() == [0.0]


@pytest.mark.parametrize(
    ("steps", "stages", "count", "nodes"),
    [
        (97, 1, 5, [0, 24, 48, 72, 96]),
        (97, 1, 1, [0, 96]),
        (3, 1, 9, [0, 1, 2]),
        (1, 1, 5, [0]),
        (10, 2, 4, [0, 1, 8, 9]),
        (11, 2, 4, [0, 1, 8, 9, 10]),  # the last step has one node: the one before it is the last of its stage
        (10, 2, 7, [0, 1, 4, 5, 8, 9]),
        (9, 3, 6, [0, 1, 2, 6, 7, 8]),
    ],
)
def test_the_first_nodes(steps: int, stages: int, count: int, nodes: list[int]) -> None:
    levels = Levels(plain(steps, stages=stages))
    assert levels.first(count).nodes.tolist() == nodes


def test_the_opening_has_the_first_nodes_that_are_nearly_noise() -> None:
    signal = np.array([0.01, 0.02, 0.0999, 0.1, *np.linspace(0.2, 0.9, 9)])
    levels = Levels(plain(13, signal=signal))
    assert levels.opening(13).nodes.tolist() == [0, 1, 2]
    assert levels.opening(2).nodes.tolist() == [0]
    assert Levels(plain(13)).opening(13).nodes.tolist() == [0]


def test_a_finer_level_adds_the_nodes_half_way() -> None:
    levels = Levels(plain(97))
    level = levels.first(5)
    assert levels.finer(level).nodes.tolist() == [0, 12, 24, 36, 48, 60, 72, 84, 96]
    assert levels.finer(levels(np.array([0, 1, 2, 8]))).nodes.tolist() == [0, 1, 2, 5, 8]
    assert levels(level.nodes) is level  # made once
    uneven = Levels(plain(5, signal=shares([0.0, 90.0, 92.0, 96.0, 100.0])))
    assert uneven.finer(uneven(np.array([0, 4]))).nodes.tolist() == [0, 1, 4]


@pytest.mark.parametrize("log_snr", [[0, 90, 92, 94, 96, 100], [0, 1, 2, 3, 90, 100]], ids=["early", "late"])
def test_a_finer_level_of_whole_steps_adds_a_step_that_was_not_there(log_snr: list[float]) -> None:
    """The node nearest to the middle belongs to the step before it, or is the last of the one between."""
    signal = shares(np.array(log_snr) / 20 - 4)
    levels = Levels(plain(6, stages=2, signal=signal))
    assert levels.finer(levels(np.array([0, 1, 4, 5]))).nodes.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("recurrence", "nodes"),
    [
        (any_recurrence(9), [0, 3, 8]),
        (any_recurrence(9), [0, 8]),
        (any_recurrence(9), [0]),
        (any_recurrence(9), [*range(9)]),
        (any_recurrence(8, stages=2), [0, 1, 6, 7]),
        (plain(7), [0, 2, 6]),
    ],
)
def test_a_level_is_what_the_plain_loop_makes_of_interpolated_predictions(
    recurrence: Recurrence, nodes: list[int]
) -> None:
    level = Level.of(recurrence, np.array(nodes))
    rng = np.random.default_rng(0)
    held, start = rng.standard_normal(len(nodes)), rng.standard_normal()
    between = interpolation(np.arange(len(recurrence)), level.nodes, recurrence.stages) @ held
    x, m = [start], []
    for i, (p, q) in enumerate(recurrence.held):
        m.insert(0, (between[i] - p * x[0]) / q)
        x.insert(0, recurrence.advance(i, x, m))
    states = np.array(x[::-1])
    np.testing.assert_allclose(level.free * start + level.response @ held, states[nodes], rtol=1e-12)
    np.testing.assert_allclose(level.end_free * start + level.end @ held, states[-1], rtol=1e-12)
    assert level.free[0] == 1
    assert not level.response[0].any()


def test_levels_are_kept_of_the_samplers_used_last() -> None:
    samplers = [plain(steps) for steps in range(60, 65)]
    first, second, *_ = [Levels.of(one) for one in samplers[:4]]
    assert Levels.of(samplers[0]) is first  # used again: now the second is the oldest
    Levels.of(samplers[4])
    assert Levels.of(samplers[0]) is first
    assert Levels.of(samplers[1]) is not second
    assert len(Levels._known) < 10


@pytest.mark.parametrize(
    "change",
    [{"stages": 2}, {"signal": np.full(20, 0.5)}, {"held": np.full((20, 2), 2.0)}, {"a": np.ones((20, 2)) / 2}],
)
def test_samplers_that_differ_in_one_table_have_levels_of_their_own(change: dict[str, Any]) -> None:
    own = plain(20)
    if "a" in change:
        change = {"a": np.tril(np.ones((20, 20)))[:, :2] / 2}
    assert Levels.of(replace(own, **change)) is not Levels.of(own)
