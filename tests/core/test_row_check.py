"""Which rows of a run are looked at: in its first rounds, of each later one, and at its end."""

from typing import Any

import numpy as np
import pytest

from parasolver_core import CoupledRowsError, Recurrence
from parasolver_core.denoiser import checking
from parasolver_core.denoiser.checking import RowCheck, remember, remembered
from parasolver_core.solution import SampleRecord
from tests.core.problems import normal


class Doubling:
    """An evaluator of ``2 x``, which remembers at which nodes it was asked."""

    def __init__(self) -> None:
        self.nodes: list[list[int]] = []

    def rows(self, nodes: np.ndarray) -> int:
        return len(nodes)

    def __call__(self, x: Any, nodes: np.ndarray, samples: np.ndarray) -> Any:
        self.nodes.append(nodes.tolist())
        return 2 * x


class Rounds:
    """A run of so many samples in two dimensions, round by round."""

    def __init__(self, batch: int = 1, steps: int = 12) -> None:
        held = np.tile([0.0, 1.0], (steps, 1))
        held[3, 1] = -4.0
        one, nothing = np.ones((steps, 1)), np.zeros(steps)
        self.network: Any = Doubling()
        self.denoiser = lambda x, t: x
        table = Recurrence(np.arange(steps), one, one, nothing, held)
        self.check = RowCheck(self.denoiser, self.network, normal((batch, 2)), np.float64, table, 1e-3)

    def round(self, nodes: dict[int, range], accepted: int = 0, defect: float = 0.0, again: float = 1.0) -> Any:
        """The nodes that were looked at alone after a round with these nodes of each sample."""
        at = [np.array(one) for one in nodes.values()]
        owners = [np.full(len(one), sample) for sample, one in nodes.items()]
        x = [(i + 100.0 * k)[:, None] * np.ones(2) for i, k in zip(at, owners, strict=True)]
        x[0][(at[0] == 0) & (owners[0] == 0)] = normal((1, 2))
        inputs, steps, samples = self.check.with_extra(x, at, owners)
        D = 2 * np.concatenate(inputs)
        if len(inputs) > len(x):
            D[-1] *= again
        self.check.note(inputs, steps, samples, D)
        records = [
            SampleRecord(sample, np.array(one), accepted, np.zeros(len(one)), defect + np.arange(len(one)), 0.0)
            for sample, one in nodes.items()
        ]
        before = len(self.network.nodes)
        count = self.check.look(records)
        seen = self.network.nodes[before:]
        assert count == sum(map(len, seen))
        return seen

    def finish(self) -> Any:
        before = len(self.network.nodes)
        count = self.check.finish()
        seen = self.network.nodes[before:]
        assert count == sum(map(len, seen))
        return seen


@pytest.mark.parametrize(
    ("batch", "nodes", "accepted", "node"),
    [
        (1, {0: range(4)}, 1, 1),  # not the first row of the call; places 1 and 3 are not tiled
        (1, {0: range(4)}, 0, 3),
        (1, {0: range(6)}, 0, 3),  # spread nodes: amid them
        (1, {0: range(2)}, 1, 1),
        (2, {0: range(3), 1: range(3)}, 1, 0),  # the last sample's, in places 3 and 5
        (2, {0: range(3), 1: range(3)}, 0, 2),
        (3, {0: range(2), 1: range(2), 2: range(2)}, 1, 0),  # in places 4 and 5
        (3, {0: range(2), 1: range(2), 2: range(5, 7)}, 0, 6),
        (2, {0: range(3), 1: range(1)}, 1, 1),  # the last sample with several nodes
    ],
)
def test_which_row_is_looked_at_first(batch: int, nodes: dict[int, range], accepted: int, node: int) -> None:
    run = Rounds(batch)
    assert run.round(nodes, accepted) == [[node]]
    assert run.round(nodes, accepted) == []  # once only


def test_rounds_with_one_node_of_a_sample_show_nothing() -> None:
    run = Rounds(2)
    for node in range(3):
        assert run.round({0: range(node, node + 1), 1: range(node, node + 1)}, 1) == []
    assert run.finish() == []
    assert not remembered(run.denoiser, 2)


def test_the_first_row_of_all_is_evaluated_once_more_in_the_next_round_of_several() -> None:
    run = Rounds(2)
    x, several, one = np.ones((4, 2)), np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    nodes = np.arange(4)
    assert len(run.check.with_extra([x], [nodes], [several])[0]) == 1  # it was not evaluated yet
    run.round({0: range(3), 1: range(3)}, 1)
    assert len(run.check.with_extra([x], [nodes], [one])[0]) == 1  # no several of the first sample
    inputs, steps, owners = run.check.with_extra([x], [nodes], [several])
    assert [part.tolist() for part in (steps[1], owners[1])] == [[0], [0]]
    np.testing.assert_array_equal(inputs[1], normal((1, 2)))
    run.round({0: range(1, 4), 1: range(1, 4)}, 1)
    assert len(run.check.with_extra([x], [nodes], [several])[0]) == 1


def test_a_first_row_that_is_another_one_the_second_time_is_looked_at_alone() -> None:
    run = Rounds(1)
    run.round({0: range(4)}, 1)
    with pytest.raises(CoupledRowsError, match="sample 0, timestep 0"):
        run.round({0: range(1, 5)}, 1, again=2.0)
    assert run.network.nodes[1:] == [[0], [0], [0], [0] * 5]


def test_at_the_end_those_farthest_from_rows_that_were_first_are_looked_at_alone() -> None:
    """First were 0, 3 and 5. Accepted behind a first row were 1, 2, 4, 6, 7 and 8, of which 2 and 4 were surprises."""
    run = Rounds(1)
    run.round({0: range(6)}, 3)
    run.round({0: range(3, 9)}, 2, defect=1.0)  # after 2; its prediction counts four times
    run.round({0: range(5, 9)}, 4, defect=2.0)  # after 4
    assert [(row.node, row.score) for row in run.check._kept] == [(1, 0), (6, 0), (8, 0), (4, 2), (2, 4)]
    assert run.finish() == [[8], [1], [6], [4], [2], [7]]
    assert remembered(run.denoiser, 1)


@pytest.mark.parametrize(("batch", "width", "together"), [(1, 3, 6), (1, 9, 9), (2, 9, 18), (1, 40, 32)])
def test_as_many_are_looked_at_together_as_a_round_has(batch: int, width: int, together: int) -> None:
    run = Rounds(batch, steps=60)
    for first in range(0, 60 - width + 1, width):
        run.round({sample: range(first, first + width) for sample in range(batch)}, width)
    *alone, last = run.finish()
    assert [len(one) for one in alone] == [1] * 5
    assert len(last) == together
    assert last == sorted(last, reverse=True)


def test_of_large_states_one_row_a_round_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "_SMALL", 0)
    run, seen = Rounds(1, steps=80), []
    rounds = [(0, 5), (5, 0), (5, 1), (6, 0), (6, 7), (13, 6), (19, 0), (19, 2)]  # the first node, how many accepted
    for first, accepted in rounds:
        run.round({0: range(first, first + 6)}, accepted)
        (row,) = run.check._now
        seen.append(row.node - first)
    # amid 5, 1 and 6, but not the first row of all; else by the golden ratio: at 0.24, 0.47, 0.09 and 0.33 of 6 nodes
    assert seen == [1, 2, 1, 1, 2, 1, 3, 1]
    for first in range(21, 70, 2):
        run.round({0: range(first, first + 6)}, 2)
    assert len(run.check._kept) == 11
    assert [len(one) for one in run.finish()] == [1] * 5 + [6]


@pytest.mark.parametrize(("most", "count"), [(24, 3), (23, 1)])
def test_states_are_small_up_to_so_many_numbers(most: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "_SMALL", most)
    run = Rounds(3, steps=12)
    run.round({sample: range(3) for sample in range(3)}, 1)
    assert len(run.check._now) == count


def test_rows_in_parts_are_told_apart_by_their_samples() -> None:
    parts = [np.arange(3.0)[:, None], np.arange(3.0, 5.0)[:, None]]
    rows, nodes, samples = checking._by_sample(
        parts, [np.array([7, 8, 7]), np.array([9, 7])], [np.array([0, 0, 1]), np.array([1, 2])]
    )
    assert [row[:, 0].tolist() for row in rows] == [[0.0, 1.0], [2.0], [3.0], [4.0]]
    assert [one.tolist() for one in nodes] == [[7, 8], [7], [9], [7]]
    assert samples == [0, 1, 1, 2]


def test_of_rows_that_are_not_accepted_one_in_turns_is_kept_at_once() -> None:
    run = Rounds(2)
    run.round({0: range(3), 1: range(3)}, 0)
    assert [(row.sample, row.node) for row in run.check._kept] == [(1, 1)]
    assert run.check._before is None


def test_what_is_accepted_waits_for_what_the_next_round_says_of_it() -> None:
    run = Rounds(2)
    run.round({0: range(3), 1: range(3)}, 1)
    assert run.check._kept == []
    assert run.check._before is not None
    assert (run.check._before.sample, run.check._before.node) == (1, 0)


def test_with_one_sample_and_with_several_are_remembered_apart() -> None:
    network = Rounds().denoiser
    for batch in (1, 2):
        remember(network, batch)
        assert remembered(network, batch)
    assert remembered(network, 1)


def test_what_cannot_be_referred_to_weakly_is_not_remembered() -> None:
    remember((1, 2).count, 2)
    assert not remembered((1, 2).count, 2)
