"""How a network is called: in batches that fit, with rows of its own, and told what it was given when it fails."""

from types import ModuleType
from typing import Any

import array_api_strict
import numpy as np
import pytest
import torch

from parasolver_core import DDIM, DDPM, Euler, NoiseSchedule, Recurrence, Rows
from parasolver_core.denoiser.calls import BatchedCall, check_prediction, out_of_memory
from parasolver_core.denoiser.contract import SharedDenoiser, Telling, check_agreement, predicted_by, takes_rows
from parasolver_core.denoiser.evaluator import Evaluator
from tests.arrays import to_numpy
from tests.core.problems import Counted, normal

LINEAR, KARRAS = NoiseSchedule.linear(), NoiseSchedule.karras()


class Limited:
    """``x + t`` on a device with memory for so many rows; takes rows, and spoils its input."""

    takes_rows = True

    def __init__(self, room: int = 100) -> None:
        self.room = room
        self.given: list[list[float]] = []
        self.rows: list[tuple[list[int], list[int]]] = []

    def __call__(self, x: Any, t: Any, rows: Rows | None = None) -> Any:
        self.given.append(t.tolist())
        if rows is not None:
            self.rows.append((rows.steps.tolist(), rows.samples.tolist()))
        prediction = x + t[:, None]
        x[...] = np.nan
        if len(x) > self.room:
            raise MemoryError("no room")
        return prediction


def rows_of(count: int) -> Rows:
    table = Euler(KARRAS).recurrence(KARRAS.timesteps(count))
    return Rows(np.arange(count), 10 + np.arange(count), table, lambda step, sample: np.zeros(2), 10 + count)


@pytest.mark.parametrize(
    ("rows", "max_rows", "buckets", "sizes"),
    [
        (5, None, (), [5]),
        (5, 5, (), [5]),
        (5, 4, (), [4, 1]),
        (9, 4, (), [4, 4, 1]),
        (5, 5, (1, 8), [1, 1, 1, 1, 1]),  # no larger one fits
        (5, 3, (4, 8), [3, 3]),  # none fits: as many as do
        (7, 4, (8, 4), [4, 4]),
        (3, None, (2, 4), [4]),
        (4, None, (2, 4, 8), [4]),
        (9, None, (2, 4), [4, 4, 2]),
    ],
)
def test_calls_are_as_large_as_they_may_be(rows: int, max_rows: int | None, buckets: Any, sizes: list[int]) -> None:
    network = Counted(lambda x, t: x + t[:, None])
    call = BatchedCall(network, max_rows, buckets)
    x, t = normal((rows, 2)), np.arange(rows)
    np.testing.assert_array_equal(call(x, t), x + t[:, None])
    assert network.rows == sizes
    assert (call.calls, call.max_rows, call.memory_ran_out) == (len(sizes), max_rows, False)


def test_a_call_is_filled_up_with_its_last_row() -> None:
    network = Limited()
    x, t = normal((5, 2)), np.arange(5.0)
    got = BatchedCall(network, None, (3,))(x, t, rows_of(5))
    np.testing.assert_array_equal(got, x + t[:, None])
    assert network.given == [[0.0, 1.0, 2.0], [3.0, 4.0, 4.0]]
    assert network.rows == [([0, 1, 2], [10, 11, 12]), ([3, 4, 4], [13, 14, 14])]


def test_an_empty_part_behind_the_last_row_fills_nothing_up() -> None:
    network, x = Limited(), normal((3, 2))
    got = BatchedCall(network, None, (4,))([x, x[:0]], np.arange(3.0))
    np.testing.assert_array_equal(got, x + np.arange(3.0)[:, None])
    assert network.given == [[0.0, 1.0, 2.0, 2.0]]


@pytest.mark.parametrize("parts", [[5], [2, 3], [1, 0, 1, 3], [0, 5]])
@pytest.mark.parametrize("max_rows", [2, 5])
def test_rows_in_parts_are_put_together_and_stay_as_they_are(xp: ModuleType, parts: list[int], max_rows: int) -> None:
    x, t = normal((5, 2)), np.arange(5.0)
    ends = np.cumsum(parts)[:-1]
    given = [xp.asarray(part, copy=True) for part in np.split(x, ends)]
    before = [xp.asarray(part, copy=True) for part in given]
    network = Counted(lambda x, t: x + xp.reshape(t, (-1, 1)))
    got = BatchedCall(network, max_rows)(given, xp.asarray(t))
    np.testing.assert_array_equal(to_numpy(got), x + t[:, None])
    assert network.rows == [max_rows] * (5 // max_rows) + ([5 % max_rows] if 5 % max_rows else [])
    for after, part in zip(given, before, strict=True):
        np.testing.assert_array_equal(to_numpy(after), to_numpy(part))


def test_a_network_that_works_in_place_gets_a_copy_unless_rows_can_be_made_anew() -> None:
    x, t = normal((3, 2)), np.arange(3.0)
    own = x.copy()
    np.testing.assert_array_equal(BatchedCall(Limited())(own, t), x + t[:, None])
    np.testing.assert_array_equal(own, x)
    np.testing.assert_array_equal(BatchedCall(Limited())(own, t, remake=lambda: [x]), x + t[:, None])
    assert np.isnan(own).all()


def test_where_memory_runs_out_the_calls_are_halved_for_good() -> None:
    network, x, t = Limited(room=2), normal((7, 2)), np.arange(7.0)
    call, made = BatchedCall(network), []

    def remake() -> list[np.ndarray]:
        made.append(1)
        return [x.copy()]

    np.testing.assert_array_equal(call(x.copy(), t, remake=remake), x + t[:, None])
    assert [len(one) for one in network.given] == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert (call.max_rows, call.memory_ran_out, call.calls, len(made)) == (1, True, 9, 2)
    call(x.copy(), t)
    assert len(network.given[-1]) == 1


def test_a_network_that_fails_is_told_which_rows_it_was_given() -> None:
    def network(x: Any, t: Any) -> Any:
        if 3 in t:
            raise ValueError("no")
        return x

    with pytest.raises(ValueError, match="no") as caught:
        BatchedCall(network, 2)(normal((5, 2)), np.arange(5), describe=lambda part: f"{part.start} to {part.stop}")
    assert caught.value.__notes__ == ["2 to 4"]


def test_memory_that_runs_out_with_one_row_is_the_users() -> None:
    with pytest.raises(MemoryError) as caught:
        BatchedCall(Limited(room=0))(normal((2, 2)), np.arange(2.0), describe=lambda part: str(part.stop))
    assert caught.value.__notes__[0] == "1"
    assert caught.value.__notes__[1].startswith("memory ran out with a single row in the call")


@pytest.mark.parametrize("count", [2, 6])
def test_rows_of_another_device_go_there_and_back(count: int) -> None:
    xp, main, other = array_api_strict, array_api_strict.Device("device1"), array_api_strict.Device("CPU_DEVICE")
    seen = []

    def network(x: Any, t: Any) -> Any:
        seen.append((x.device, t.device))
        return x + xp.reshape(t, (-1, 1))

    x, t = normal((count, 2)), np.arange(float(count))
    got = BatchedCall(network, 4, device=main)(xp.asarray(x, device=other), xp.asarray(t, device=main))
    assert got.device == other
    assert seen == [(main, main)] * (1 if count == 2 else 2)
    np.testing.assert_array_equal(to_numpy(got), x + t[:, None])


@pytest.mark.parametrize(
    ("x", "prediction", "error", "hint"),
    [
        (np.ones((2, 3)), (np.ones((2, 3)),), TypeError, r"unet\(x, t\)\.sample or out\[0\]$"),
        (np.ones((2, 3)), np.ones((2, 3), dtype="f4"), ValueError, r"cast it, or the tables .* to x\.dtype$"),
        (np.ones((2, 3)), np.ones((2, 4), dtype="f4"), ValueError, "one prediction a row, in the dtype"),
        (np.ones((2, 3)), np.ones((2, 4)), ValueError, "one prediction a row, in the dtype"),
        (np.ones(2), np.ones(3), ValueError, r"give x_T\[None\]$"),
        (np.ones(2), np.ones(2, dtype="f4"), ValueError, r"cast it"),
        (torch.ones(2, 3), torch.ones(2, 3, device="meta"), ValueError, "on the device of x$"),
    ],
)
def test_what_is_wrong_with_a_prediction(x: Any, prediction: Any, error: type[Exception], hint: str) -> None:
    with pytest.raises(error, match=hint):
        check_prediction(prediction, x)


def test_a_prediction_like_its_rows_passes() -> None:
    check_prediction(np.zeros((2, 3)), np.ones((2, 3)))


class MuteError(RuntimeError):
    def __str__(self) -> str:
        raise ValueError("says nothing")


class NoRoomError(MemoryError):
    pass


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (NoRoomError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("out of luck"), False),
        (KeyError("out of memory"), False),
        (MuteError(), False),
    ],
)
def test_what_says_that_memory_ran_out(error: Exception, memory: bool) -> None:
    assert out_of_memory(error) is memory


# An evaluator: rows at nodes of a sampler.


def table(**changes: Any) -> Recurrence:
    n = 4
    return Recurrence(np.array([9.0, 7.0, 4.0, 2.0]), np.ones((n, 1)), np.ones((n, 1)), np.zeros(n), **changes)


def evaluator(network: Any, x_T: Any, recurrence: Recurrence, max_rows: int | None = None) -> Evaluator:
    return Evaluator(network, x_T, recurrence, lambda step, sample: step + sample, max_rows)


def test_rows_come_scaled_at_their_own_times_in_the_networks_dtype(xp: ModuleType) -> None:
    seen: list[Any] = []

    def network(x: Any, t: Any) -> Any:
        seen.append((to_numpy(x), to_numpy(t)))
        return x

    x, scale = normal((5, 2, 1), dtype="float32"), np.array([1.0, 0.5, 0.25, 2.0])
    nodes, samples = np.array([3, 0, 1, 2, 1]), np.array([0, 0, 1, 1, 1])
    parts = [xp.asarray(x[:1].astype(np.float64)), xp.asarray(x[1:4]), xp.asarray(x[4:])]
    evaluate = evaluator(network, xp.asarray(x[:1]), table(input_scale=scale))
    evaluate(parts, nodes, samples)
    (rows, times), expected = seen[0], x * scale[nodes, None, None]
    np.testing.assert_array_equal(rows, expected.astype(np.float32))
    assert rows.dtype == times.dtype == np.float32
    np.testing.assert_array_equal(times, [2, 9, 7, 4, 7])
    assert 0 < evaluate.seconds < 60


def test_parts_of_two_dtypes_come_in_the_networks() -> None:
    seen: list[Any] = []

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        seen.append(x.dtype)
        return x

    parts = [np.ones((1, 2), dtype=np.float32), np.ones((2, 2))]
    evaluator(network, np.ones((1, 2), dtype=np.float32), table())(parts, np.arange(3), np.zeros(3, dtype=int))
    assert seen == [np.float32]


def test_times_are_integers_where_the_samplers_are_and_never_half_precise() -> None:
    seen: list[torch.dtype] = []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(t.dtype)
        return x

    whole = DDIM(LINEAR).recurrence(LINEAR.timesteps(4))
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for recurrence in (whole, table()):
            x = torch.ones(1, 2, dtype=dtype)
            evaluator(network, x, recurrence)(x, np.array([1]), np.array([0]))
    assert seen[::2] == [torch.int64] * 3
    assert seen[1::2] == [torch.float32, torch.float32, torch.float64]


def test_a_guess_beyond_half_precision_is_no_warning() -> None:
    x = np.full((1, 2), 1e6, dtype=np.float32)
    got = evaluator(lambda x, t: x, np.ones((1, 2), dtype=np.float16), table())(x, np.array([0]), np.array([0]))
    assert np.isinf(got).all()


def test_rows_may_be_made_anew_only_where_the_network_gets_their_memory() -> None:
    """Rows that are cast are new each time; others are copied, unless the caller can make them."""
    x, at = np.ones((2, 2)), (np.array([0, 1]), np.array([0, 0]))

    def spoils(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        x[...] = 5.0
        return x.copy()

    evaluator(spoils, x, table())(x, *at)
    assert x[0, 0] == 1
    evaluator(spoils, x, table(input_scale=np.full(4, 2.0)))(x, *at)
    assert x[0, 0] == 1
    evaluator(spoils, x, table())(x, *at, again=lambda: [np.ones((2, 2))])
    assert x[0, 0] == 5


@pytest.mark.parametrize("given", ["as they are", "cast", "made anew"])
def test_after_memory_ran_out_the_rows_are_those_that_were_given(given: str) -> None:
    x = normal((4, 2), dtype="float64" if given != "cast" else "float32")
    again = (lambda: [x.copy()]) if given == "made anew" else None
    evaluate = evaluator(Limited(room=3), np.ones((1, 2)), table())
    got = evaluate([x.copy()] if again else [x], np.arange(4), np.zeros(4, dtype=int), again)
    np.testing.assert_array_equal(got, x.astype(np.float64) + np.array([9.0, 7.0, 4.0, 2.0])[:, None])
    assert (evaluate.max_rows, evaluate.calls) == (2, 3)


def test_what_an_evaluator_says_of_itself() -> None:
    evaluate = evaluator(lambda x, t: x, np.ones((1, 2)), table(), max_rows=3)
    assert evaluate.max_rows is None  # of the user, and not because memory ran out
    assert evaluate.devices == 1
    assert evaluate.turns(np.arange(4)) == 1
    assert evaluate.rows(np.arange(4)) == 4
    assert evaluate.agree([1.0, 2.0]) == [1.0, 2.0]
    assert evaluate.seconds == 0
    evaluate.begin(lambda: {"never": "asked"})
    evaluate.end()


def test_where_a_network_failed() -> None:
    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no") as caught:
        evaluator(network, np.ones((1, 2)), table())(np.ones((3, 2)), np.array([2, 1, 2]), np.array([0, 1, 1]))
    assert caught.value.__notes__ == [
        "raised by the denoiser in call 1, given 3 rows of event shape (2,) at steps 1..2, timesteps 7.0..4.0"
    ]


class Shared(SharedDenoiser):
    devices, max_rows = 3, 5

    def __init__(self) -> None:
        self.told: list[Any] = []

    def __call__(self, x: Any, t: Any, rows: Rows | None = None, /) -> Any:
        return x

    def begin(self, plan: Any) -> None:
        self.told.append(plan)

    def agree(self, values: Any) -> list[float]:
        return [value + 1 for value in values]

    def end(self, error: BaseException | None = None) -> None:
        self.told.append(error)


def test_processes_that_share_the_rows_are_asked_and_told() -> None:
    shared = Shared()
    evaluate = evaluator(shared, np.ones((1, 2)), table())
    assert (evaluate.devices, evaluate.max_rows, evaluate.agree([1.0])) == (3, 5, [2.0])
    evaluate.begin(lambda: {"window": "8"})
    evaluate.end()
    error = KeyError("gone")
    with Telling(shared):
        pass
    with pytest.raises(KeyError), Telling(shared):
        raise error
    assert shared.told == [{"window": "8"}, None, error]
    with pytest.raises(KeyError), Telling(lambda x, t: x):
        raise error


# What a denoiser says of itself.


def test_rows_are_cut_with_what_they_are() -> None:
    rows = rows_of(5)[1:3]
    assert (len(rows), rows.steps.tolist(), rows.samples.tolist()) == (2, [1, 2], [11, 12])
    assert rows[np.array([1, 1])].samples.tolist() == [12, 12]


def test_attributes_of_a_denoiser_count_where_they_are_what_they_should_be() -> None:
    class Told:
        takes_rows: Any = True
        prediction_type: Any = "sample"

    told, other = Told(), Told()
    other.takes_rows, other.prediction_type = 1, 7
    assert takes_rows(told) is True
    assert takes_rows(other) is takes_rows(len) is False
    assert predicted_by(told) == "sample"
    assert predicted_by(other) is predicted_by(len) is None
    check_agreement(told, DDPM(LINEAR, prediction_type="sample"))
    check_agreement(len, DDPM(LINEAR))
    with pytest.raises(ValueError, match="reads the network's output as 'epsilon', and the denoiser predicts 'sample'"):
        check_agreement(told, DDPM(LINEAR))
