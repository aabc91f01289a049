"""Sweeps over spread nodes: which nodes a round takes, what ends a level, and when a window takes over.

The numbers are those of the theory page, "Few nodes first". Here a step changes nothing, so all nodes weigh alike.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from parasolver_core.methods.expected import sliding_rounds
from parasolver_core.methods.levels import Level, Levels, interpolation
from parasolver_core.methods.refinement import Aims, Refinement, Verdict
from parasolver_core.samplers.recurrence import Recurrence

TOLERANCE = 0.01


def plain(steps: int, noisy: bool = False, stages: int = 1) -> Recurrence:
    once, noise = np.ones((steps, 1)), np.full(steps, float(noisy))
    return Recurrence(np.arange(steps), once, 0.1 * once, noise, stages=stages)


def aims_of(steps: int, width: int, wanted: float = TOLERANCE, **options: Any) -> Aims:
    return Aims(plain(steps, **options), width, wanted, TOLERANCE, rounding=1e-7)


def sweep(sample: Refinement, change: float, midpoints: float = 0.0) -> Verdict:
    """All nodes are evaluated, in one round, and all have moved since."""
    sample.picked = np.arange(len(sample.level.nodes))
    return sample.after(np.ones(len(sample.picked)), change, midpoints)


def refine(sample: Refinement, level: Level) -> Verdict:
    known = np.isin(level.nodes, sample.level.nodes)
    return sample.refine(level, interpolation(level.nodes, sample.level.nodes), known)


def at_level(aims: Aims, finer: int = 0) -> Refinement:
    """A sample whose first level, or the one so many times finer, has not been evaluated yet."""
    levels = Levels(aims.recurrence)
    sample, level = Refinement(aims, levels.opening(aims.first)), levels.first(aims.first)
    assert sweep(sample, 9.0) is Verdict.REFINE  # whatever changed: nothing of the sample was known
    assert refine(sample, level) is Verdict.GO_ON
    for _ in range(finer):
        sweep(sample, 0.0)
        level = levels.finer(level)
        assert refine(sample, level) is Verdict.GO_ON
    return sample


def whole(aims: Aims) -> Refinement:
    """A sample at the level of all steps, which has no interpolation error."""
    sample, count = Refinement(aims, Levels(aims.recurrence).opening(aims.first)), len(aims.recurrence)
    sweep(sample, 9.0)
    refine(sample, Levels(aims.recurrence)(np.arange(count)))
    return sample


@pytest.mark.parametrize(
    ("steps", "width", "options", "first", "fewest"),
    [
        (400, 100, {}, 13, 19.5),
        (400, 5, {}, 5, 19.5),
        (30, 100, {}, 13, 15.0),
        (400, 100, {"stages": 2}, 26, 39.0),
        (400, 100, {"noisy": True}, 50, 75.0),
        (100, 30, {"noisy": True}, 30, 50.0),
    ],
)
def test_nodes_of_the_first_level_and_at_the_end(
    steps: int, width: int, options: dict[str, Any], first: int, fewest: float
) -> None:
    aims = aims_of(steps, width, **options)
    assert (aims.first, aims.fewest) == (first, fewest)
    assert aims.patience == sliding_rounds(aims.recurrence, width, TOLERANCE)


def test_nothing_is_known_at_first() -> None:
    aims = aims_of(100, 40)
    sample = Refinement(aims, Levels(aims.recurrence)(np.arange(3)))
    assert sample.picked.tolist() == [0, 1, 2]
    assert (sample.error, sample.rounds) == (np.inf, 0)
    assert (sample.opening, sample.worthless, sample.exhausted) == (True, False, False)
    assert sample.moved.tolist() == [np.inf] * 3
    assert sample.scale.tolist() == [1.0] * 3
    assert sample.smallness.tolist() == [1.0] * 100


def test_a_sample_whose_numbers_are_out_of_range_gives_way_with_nothing() -> None:
    sample = at_level(aims_of(100, 40))
    assert (sample.rounds, sample.opening) == (1, False)
    assert sample.abandon() is Verdict.GIVE_WAY
    assert (sample.rounds, sample.worthless) == (2, True)


def test_outputs_that_are_not_finite_are_dropped_unless_the_first_node_gave_them() -> None:
    sample = at_level(aims_of(100, 40))
    sample.picked = np.array([0, 3, 5])
    assert not sample.drop(np.array([False, False, False]))
    assert not sample.drop(np.array([False, True, True]))
    assert sample.drop(np.array([True, False, True]))
    assert sample.picked.tolist() == [0, 5]
    sample.picked = np.array([3, 5])
    assert sample.drop(np.array([True, False]))  # of the first node nothing was asked
    assert sample.picked.tolist() == [3]
    assert not sample.drop(np.array([False]))


@pytest.mark.parametrize(("drops", "verdict"), [(3, Verdict.GO_ON), (4, Verdict.GIVE_WAY)])
def test_three_rounds_with_outputs_that_are_not_finite_are_borne(drops: int, verdict: Verdict) -> None:
    sample = at_level(aims_of(100, 40))
    for _ in range(drops):
        sample.picked = np.arange(1, 4)
        assert sample.drop(np.array([True, True, False]))
    assert sample.after(np.zeros(13), 0.0, 0.0) is verdict


def test_a_finer_level_evaluates_what_is_new_and_knows_the_rest() -> None:
    sample = at_level(aims_of(121, 40))
    first = sample.level.nodes
    assert sample.picked.tolist() == [*range(13)]  # the first node has moved since
    sample.scale = np.where(first < 60, 1.0, 3.0)
    sample.after(np.zeros(13), 0.0, 0.0)
    sample.moved = np.full(13, 0.5 * TOLERANCE * 0.1)
    sample.moved[2] = 0.02
    finer = Levels(sample.aims.recurrence).finer(sample.level)
    refine(sample, finer)
    new = np.flatnonzero(~np.isin(finer.nodes, first))
    old = np.flatnonzero(finer.nodes == first[2])
    assert sample.picked.tolist() == sorted([*new, *old])
    assert np.isinf(sample.moved[new]).all()
    np.testing.assert_allclose(sample.scale[new], np.where(finer.nodes[new] < 55, 1.0, 3.0) - (finer.nodes[new] == 55))
    assert sample.level is finer


def test_nodes_are_due_that_moved_by_more_than_a_tenth_of_the_tolerance() -> None:
    sample = at_level(aims_of(121, 40))
    moved = np.zeros(13)
    moved[[1, 4, 6, 8]] = [0.1 * TOLERANCE, 0.1001 * TOLERANCE, np.nan, 5.0]
    sample.after(moved, 1.0, 0.0)
    assert sample.picked.tolist() == [4, 6, 8]
    sample.after(np.full(13, 0.06 * TOLERANCE), 1.0, 0.0)
    assert sample.picked.tolist() == [1]  # moves add up until the node is evaluated


def test_a_node_counts_as_much_as_it_weighs_for_the_sample() -> None:
    signal = np.where(np.arange(121) < 60, 0.1, 1.0)
    aims = Aims(replace(plain(121), signal=signal), 40, TOLERANCE, TOLERANCE, 1e-7)
    sample = Refinement(aims, Levels(aims.recurrence)(np.arange(0, 121, 10)))
    sample.after(np.full(13, 0.05 * TOLERANCE), 9.0, 0.0)
    refine(sample, sample.level)
    assert sample.picked.tolist() == [0, 1, 2, 3, 4, 5]  # ten times as much


def test_with_more_nodes_due_than_the_window_holds_those_of_small_moves_wait() -> None:
    moved = np.full(13, 2.0)
    moved[[2, 5]] = 0.06, 0.0602
    for width, picked in ((12, [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]), (13, [*range(13)])):
        sample = at_level(aims_of(121, 40))
        sample.aims = aims_of(121, width)
        sample.after(moved, 1.0, 0.0)
        assert sample.picked.tolist() == picked
    sample = at_level(aims_of(121, 40))
    sample.aims = aims_of(121, 12)
    moved[7] = np.inf  # the largest that is known counts
    sample.after(moved, 1.0, 0.0)
    assert sample.picked.tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]


def test_a_sweep_of_several_rounds_takes_its_nodes_in_order_and_then_those_that_moved_again() -> None:
    sample = at_level(aims_of(121, 5), finer=1)
    assert len(sample.level.nodes) == 9
    sample.picked = np.array([0, 1, 2, 3, 4])
    sample.after(np.where(np.isin(np.arange(9), [1, 3]), 1.0, 0.0), 0.003, 0.0)
    assert sample.picked.tolist() == [1, 5, 6, 7, 8]
    assert sample.after(np.zeros(9), 0.004, 0.0) is Verdict.GO_ON
    assert sample.error == pytest.approx(5 * np.hypot(0.003, 0.004))  # of the sweep, which has ended
    assert sample.picked.tolist() == [3]


def test_the_midpoints_of_all_rounds_of_a_sweep_count() -> None:
    sample = at_level(aims_of(1000, 5), finer=1)
    sample.picked = np.array([0, 1, 2, 3, 4])
    sample.after(np.zeros(9), 0.0, 0.03)
    sample.picked = np.array([5, 6, 7, 8])
    sample.after(np.zeros(9), 0.0, 0.04)
    assert sample.error == pytest.approx(2 * 0.05 / 2)


@pytest.mark.parametrize(("change", "verdict"), [(0.40, Verdict.REFINE), (0.41, Verdict.GO_ON)])
def test_midpoints_join_at_so_many_interpolation_errors(change: float, verdict: Verdict) -> None:
    """7.5 times what the first level is thought to leave, 0.067, and less where 25 nodes do not fit into 20."""
    sample = at_level(aims_of(400, 20))
    assert sweep(sample, change) is verdict
    assert sample.error == pytest.approx(5 * change)


@pytest.mark.parametrize(("change", "verdict"), [(7.5 * 0.067, Verdict.REFINE), (0.503, Verdict.GO_ON)])
@pytest.mark.parametrize("width", [25, 60])
def test_midpoints_that_fit_into_the_window(width: int, change: float, verdict: Verdict) -> None:
    assert sweep(at_level(aims_of(400, width)), change) is verdict


def test_the_error_of_the_first_level_is_a_guess() -> None:
    sample = at_level(aims_of(400, 40, wanted=0.5 * TOLERANCE))
    assert sweep(sample, 0.0) is Verdict.REFINE
    assert sample.error == pytest.approx(0.5 * 2 * 0.067)
    noisy = at_level(aims_of(1000, 100, noisy=True))
    sweep(noisy, 0.0)
    assert noisy.error == pytest.approx(0.067)


def test_changes_do_not_grow_what_is_only_guessed() -> None:
    sample = at_level(aims_of(400, 40))
    sweep(sample, 0.6)
    sweep(sample, 9.0)
    sweep(sample, 0.001)
    assert sample.error == pytest.approx(2 * 0.067)


@pytest.mark.parametrize(("steps", "verdict"), [(34, Verdict.CONVERGED), (36, Verdict.REFINE)])
def test_so_many_nodes_at_least(steps: int, verdict: Verdict) -> None:
    """17 nodes are half of the steps, or fewer."""
    sample = at_level(aims_of(steps, 5), finer=2)
    assert len(sample.level.nodes) == 17
    assert sweep(sample, 0.001, midpoints=0.001) is verdict


@pytest.mark.parametrize(("steps", "verdict"), [(100, Verdict.REFINE), (84, Verdict.GIVE_WAY)])
def test_more_nodes_than_a_third_of_the_steps_and_the_window_are_not_worth_it(steps: int, verdict: Verdict) -> None:
    """What is left is three times the tolerance, and twice as many nodes leave a third: 50 are needed."""
    sample = at_level(aims_of(steps, 20), finer=1)
    assert len(sample.level.nodes) == 25
    assert sweep(sample, 0.001, midpoints=2 * 3 * TOLERANCE) is verdict


def test_just_as_many_nodes_are_worth_it() -> None:
    sample = at_level(aims_of(33, 14), finer=1)
    assert len(sample.level.nodes) == 25  # a third of the steps, and the window
    assert sweep(sample, 0.001, midpoints=2 * TOLERANCE) is Verdict.REFINE


@pytest.mark.parametrize(("midpoints", "verdict"), [(1.0, Verdict.CONVERGED), (1.01, Verdict.REFINE)])
def test_twice_what_is_left_must_be_within_the_tolerance(midpoints: float, verdict: Verdict) -> None:
    sample = at_level(aims_of(400, 40), finer=1)
    assert sweep(sample, 0.001, midpoints * TOLERANCE) is verdict


@pytest.mark.parametrize(("change", "verdict"), [(0.2, Verdict.CONVERGED), (0.2001, Verdict.GO_ON)])
def test_all_steps_are_final_when_a_sweep_changes_little(change: float, verdict: Verdict) -> None:
    sample = whole(aims_of(40, 40))
    assert sweep(sample, change * TOLERANCE) is verdict
    assert sample.error == pytest.approx(5 * change * TOLERANCE)


def test_a_level_whose_nodes_have_not_moved_needs_no_other_sweep() -> None:
    sample = whole(aims_of(40, 40))
    sample.picked = np.arange(40)
    assert sample.after(np.zeros(40), 0.5, 0.0) is Verdict.CONVERGED
    assert sample.error == 1e-7  # rounding is always left


def test_a_window_goes_on_after_seven_sweeps_over_a_level() -> None:
    sample = whole(aims_of(400, 400))
    sample.aims = aims_of(400, 8)  # patience of more rounds than these
    for _ in range(7):
        sweep(sample, 0.7)
    assert not sample.exhausted
    sweep(sample, 0.7)
    assert sample.exhausted
    assert not sample.worthless


def test_a_window_goes_on_when_it_would_be_done_by_now() -> None:
    sample = whole(aims_of(12, 2, wanted=1e-6))
    assert sample.aims.patience == 12  # one a step
    sample.rounds = 10
    sweep(sample, 0.7)
    assert not sample.exhausted
    sweep(sample, 0.7)
    assert sample.exhausted


@pytest.mark.parametrize(("width", "worthless"), [(12, True), (13, False)])
@pytest.mark.parametrize("change", [0.8, 0.81])
def test_a_sample_goes_astray_that_the_third_sweep_changes_by_most_of_its_size(
    change: float, width: int, worthless: bool
) -> None:
    sample = whole(aims_of(160, width))
    for _ in range(2):
        sweep(sample, 2.0)
    assert not sample.exhausted
    sweep(sample, change)
    assert sample.exhausted == (change > 0.8)
    assert sample.worthless == (worthless and change > 0.8)


def test_where_a_window_would_slide_for_long_more_sweeps_are_waited_for() -> None:
    """100 windows of 2: the square of 100 / 2 / 20 is 6.25."""
    sample = whole(aims_of(100, 2))
    for _ in range(6):
        sweep(sample, 2.0)
    assert not sample.exhausted
    sweep(sample, 2.0)
    assert sample.exhausted


def test_nodes_that_need_no_prediction_do_not_go_astray() -> None:
    sample = Refinement(aims_of(160, 12), Levels(plain(160))(np.arange(3)))
    for _ in range(4):
        sweep(sample, 2.0)
    assert sample.opening
    assert not sample.exhausted


def test_what_is_left_grows_as_the_effect_of_the_midpoints_does() -> None:
    sample = at_level(aims_of(400, 5), finer=3)
    assert sweep(sample, 0.003, midpoints=0.008) is Verdict.GO_ON
    assert sweep(sample, 0.03) is Verdict.GO_ON
    sweep(sample, 0.0001)
    assert sample.error == pytest.approx(0.008 * 0.0301 / 0.003)


def test_midpoints_that_come_later_are_not_measured_again() -> None:
    sample = at_level(aims_of(400, 40), finer=1)
    assert sweep(sample, 0.03, midpoints=0.008) is Verdict.GO_ON
    sweep(sample, 0.001, midpoints=0.007)
    assert sample.error == pytest.approx(0.008)


def test_the_opening_is_judged_as_a_first_level() -> None:
    aims = aims_of(100, 40)
    sample = Refinement(aims, Levels(aims.recurrence).opening(aims.first))
    assert sweep(sample, 0.5) is Verdict.REFINE
    assert sample.error == pytest.approx(5 * 0.5)


def test_an_effect_that_was_nothing_at_first_does_not_grow() -> None:
    sample = at_level(aims_of(400, 40), finer=1)
    sweep(sample, 0.0, midpoints=3 * TOLERANCE)
    assert sample.error == pytest.approx(3 * TOLERANCE)
    shrinking = at_level(aims_of(400, 40), finer=1)
    assert sweep(shrinking, 0.5, midpoints=3 * TOLERANCE) is Verdict.GO_ON
    sweep(shrinking, 0.001)
    assert shrinking.error == pytest.approx(3 * TOLERANCE)
