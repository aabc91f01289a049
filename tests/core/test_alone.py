"""One row beside the same row alone: from which difference on, and of which kind, it is an error."""

from typing import Any

import numpy as np
import pytest
import torch

from parasolver_core import CoupledRowsError, NondeterministicDenoiserError, Recurrence
from parasolver_core.denoiser.alone import Row, RowAlone, distance

SINGLE = float(np.finfo(np.float32).eps)
FINE = np.array([0.3, -1.7, 0.9, 1.1])  # float64's own numbers
B = np.array([[0.5, 0.0], [1.0, -2.0], [0.3, 0.1], [0.2, 0.0]])
TABLE = Recurrence(np.array([40, 30, 20, 10]), np.ones((4, 1)), B, np.zeros(4))


class Answers:
    """An evaluator that gives prepared predictions, one call after another; an exception is raised."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.nodes: list[list[int]] = []

    def rows(self, nodes: np.ndarray) -> int:
        return len(nodes)

    def __call__(self, x: Any, nodes: np.ndarray, samples: np.ndarray) -> Any:
        self.nodes.append(nodes.tolist())
        assert x.shape[0] == len(nodes) == len(samples)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return np.broadcast_to(np.asarray(answer, dtype=float), x.shape).copy()


def row(prediction: Any, x: Any = 1.0, count: int = 3, place: int = 2, node: int = 1) -> Row:
    prediction = np.asarray(prediction, dtype=float)
    return Row(np.broadcast_to(np.asarray(x), prediction.shape).copy(), prediction, node, 0, place, count)


def looking(*answers: Any, size: int = 4, tolerance: float = 1e-3) -> tuple[RowAlone, Answers]:
    given: Any = Answers(*answers)
    return RowAlone(given, np.zeros((2, size)), TABLE, tolerance), given


@pytest.mark.parametrize(
    ("got", "expected", "apart"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([2.0, 2.0], [1.0, 1.0], 0.5),  # over the larger of the two
        ([1.0, 1.0], [2.0, 2.0], 0.5),
        ([0.0, 0.0], [3.0, 4.0], 1.0),
        ([[1.0, 0.0], [2.0, 2.0], [5.0, 5.0]], [[1.0, 0.0], [1.0, 1.0], [5.0, 5.0]], 0.5),  # the worst row
        ([np.nan, 1.0], [1.0, 1.0], np.inf),
        ([np.inf, 1.0], [np.inf, 1.0], np.inf),
        ([1e200, 1.0], [2e200, 1.0], np.inf),
    ],
)
def test_how_far_apart_two_predictions_are(got: Any, expected: Any, apart: float) -> None:
    assert distance(np.array(got), np.array(expected)) == apart


@pytest.mark.parametrize(
    ("values", "unit"),
    [
        (FINE, np.finfo(np.float64).eps),
        ([1e300], np.finfo(np.float64).eps),
        ([0.5, 1 + 2.0**-23], SINGLE),
        ([100001.0], SINGLE),  # beyond float16
        ([0.5, 1 + 2.0**-10], 2.0**-10),
    ],
)
def test_predictions_are_as_close_as_their_numbers_are_fine(values: Any, unit: float) -> None:
    assert looking()[0].close(np.array(values)) == min(np.sqrt(unit), 1e-2)


def test_a_row_that_is_the_same_alone_is_evaluated_once() -> None:
    looks, network = looking(FINE)
    looks.compare(row(FINE))
    assert network.nodes == [[1]]
    assert looks.evaluated == 1


def test_a_guess_that_is_not_finite_is_not_looked_at() -> None:
    looks, network = looking()
    looks.compare(row([np.nan, 1.0, 1.0, 1.0]))
    looks.compare(row([1.0, 1.0, np.inf, 1.0]))
    assert network.nodes == []


def test_a_difference_of_just_the_limit_is_none() -> None:
    """Half-precision numbers that are 1 % apart."""
    looks, network = looking([100.0], size=1)
    looks.compare(row([99.0]))
    assert len(network.nodes) == 1


@pytest.mark.parametrize(
    ("alone", "repeated", "apart"),
    [
        (FINE, 0.999 * FINE, "0.001"),
        (FINE, 0.9996 * FINE, "0.0004"),
        ([1 + 2.0**-23], [0.999], "0.001"),  # of a network in float32
        ([100.0], [97.9], "0.021"),
    ],
)
def test_a_row_alone_that_is_another_each_time_is_chance(alone: Any, repeated: Any, apart: str) -> None:
    looks, _ = looking(alone, repeated, size=len(alone))
    with pytest.raises(NondeterministicDenoiserError, match=rf"sample 0, timestep 30.* by {apart} of their size"):
        looks.compare(row(np.zeros(len(alone))))


def test_half_precision_may_repeat_itself_to_two_per_cent() -> None:
    looks, network = looking([100.0], [98.0], [96.0], size=1)
    looks.compare(row([96.0]))
    assert network.nodes == [[1], [1], [1, 1, 1]]
    assert looks.evaluated == 5


def test_a_row_that_was_alone_before_differs_by_chance() -> None:
    looks, network = looking(FINE, FINE)
    with pytest.raises(NondeterministicDenoiserError, match=r"differ by 0\.1 of their size"):
        looks.compare(row(0.9 * FINE, count=1, place=0))
    assert network.nodes == [[1], [1]]


def coupled(difference: float, of_others: float, x: float = 1.0, tolerance: float = 1e-3, scale: Any = FINE) -> str:
    """What is said of a row that differs so much from itself alone, and so much from copies of it in its place."""
    copies = np.zeros((3, len(scale)))
    copies[2] = (1 - difference) * np.asarray(scale) * (1 - of_others)
    looks, network = looking(scale, scale, copies, tolerance=tolerance, size=len(scale))
    found = ""
    try:
        looks.compare(row((1 - difference) * np.asarray(scale), x))
    except CoupledRowsError as error:
        found = str(error)
    assert network.nodes == [[1], [1], [1, 1, 1]]
    assert not found or f"in a batch of 3 gave predictions that differ by {difference:.2g} of their size" in found
    return found and ("rows" if "depends on the other rows" in found else "place")


def test_a_row_depends_on_other_rows_where_copies_in_its_place_differ_by_half_as_much() -> None:
    assert coupled(0.3, 0.16) == "rows"
    assert coupled(0.3, 0.14) == "place"


def test_what_depends_on_other_rows_may_differ_by_a_tenth_of_the_tolerance() -> None:
    assert coupled(0.0107, 0.0107, tolerance=0.1) == "rows"
    assert coupled(0.0095, 0.0095, tolerance=0.1) == ""
    assert coupled(0.3, 0.3, x=1e9) == "rows"  # harmless or not


def test_what_comes_of_the_number_of_rows_may_differ_by_a_tenth() -> None:
    assert coupled(0.101, 0.0) == "place"
    assert coupled(0.099, 0.0) == ""


def test_what_the_number_of_rows_does_to_bfloat16_is_more() -> None:
    """Twice the root of 2**-7, which is 0.177."""
    assert coupled(0.18, 0.0, scale=[1.0, 1 + 2.0**-7]) == "place"
    assert coupled(0.17, 0.0, scale=[1.0, 1 + 2.0**-7]) == ""


def test_float16_is_finer() -> None:
    """Twice the root of 2**-10 is 0.06, less than the tenth that any network may differ by."""
    assert coupled(0.11, 0.0, scale=[1.0, 1 + 2.0**-10]) == "place"


def test_an_error_of_an_output_near_0_is_harmless_beside_the_state() -> None:
    """Four steps, each of which reads twice as much of the output, move the state by 2e-4 of its size."""
    moved = 4 * 2 * 0.3 * float(np.sqrt(np.mean(FINE**2)))
    assert coupled(0.3, 0.0, x=1.001 * moved / np.sqrt(SINGLE)) == ""
    assert coupled(0.3, 0.0, x=0.999 * moved / np.sqrt(SINGLE)) == "place"


@pytest.mark.parametrize(("of_others", "said"), [(0.044, ""), (0.046, "rows")])
def test_chance_explains_three_times_what_it_does(of_others: float, said: str) -> None:
    """A half-precision network that repeats itself to 1.5 %."""
    batched, copies = 960.0, np.zeros((3, 1))
    copies[2] = batched * (1 - of_others)
    looks, _ = looking([1000.0], [985.0], copies, size=1)
    if not said:
        looks.compare(row([batched]))
        return
    with pytest.raises(CoupledRowsError, match="depends on the other rows"):
        looks.compare(row([batched]))


def test_rows_are_looked_at_together_behind_the_last_of_them() -> None:
    looks, network = looking([FINE, 2 * FINE, 3 * FINE])
    looks.compare_together([row(3 * FINE, node=0), row(FINE, node=3), row(2 * FINE, node=1)])
    assert network.nodes == [[3, 1, 0]]
    assert looks.evaluated == 3


def test_no_rows_are_not_looked_at() -> None:
    looks, network = looking()
    looks.compare_together([])
    assert network.nodes == []


def test_together_a_difference_of_just_the_limit_is_none() -> None:
    looks, network = looking([[100.0], [50.0]], size=1)
    looks.compare_together([row([99.0], node=3), row([50.0], node=2)])
    assert len(network.nodes) == 1


def test_a_row_that_differs_together_is_looked_at_alone() -> None:
    """As it was, and as it is together: here the latter depends on the other rows."""
    wrong = 0.5 * FINE
    looks, network = looking([FINE, wrong], FINE, FINE, FINE, np.tile(FINE, (2, 1)))
    with pytest.raises(CoupledRowsError, match=r"batch of 2.*depends on the other rows"):
        looks.compare_together([row(FINE, node=3), row(FINE, node=0)])
    assert network.nodes == [[3, 0], [0], [0], [0], [0, 0]]
    assert looks.evaluated == 7


def test_a_network_that_fails_for_one_row_is_tried_with_as_many_as_before() -> None:
    looks, network = looking(ValueError("one row"), np.tile(FINE, (3, 1)), ValueError("one row"))
    with pytest.raises(CoupledRowsError, match=r"works for 3 rows and fails for one \(ValueError: one row\)"):
        looks.compare(row(FINE))
    assert network.nodes == [[1], [1, 1, 1], [1]]


@pytest.mark.parametrize(
    "answers",
    [
        (ValueError("once"), ValueError("for three rows too")),
        (ValueError("once"), FINE, FINE),
        (MemoryError("once"),),
    ],
    ids=["it fails for any number", "it failed once", "memory ran out"],
)
def test_what_does_not_come_of_the_number_of_rows_is_raised_as_it_is(answers: tuple[Any, ...]) -> None:
    looks, network = looking(*answers)
    with pytest.raises(type(answers[0]), match="once"):
        looks.compare(row(FINE))
    assert len(network.nodes) == len(answers)


def test_bfloat16_is_read_in_float64() -> None:
    looks = RowAlone(Answers(), torch.zeros(2, 4, dtype=torch.bfloat16), TABLE, 1e-3)  # type: ignore[arg-type]
    got = looks.host(torch.tensor([1 + 2.0**-7, -3.0], dtype=torch.bfloat16))
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, [1 + 2.0**-7, -3.0])


def test_a_row_has_surprised_nobody_yet() -> None:
    assert row(FINE).score == 0
