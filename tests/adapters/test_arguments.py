"""What a network is called with besides x, dealt out to rows of any steps and samples."""

from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from parasolver_adapters.arguments import StepArguments, by_name, parameters_of
from parasolver_core import Rows

STEPS, SAMPLES = np.array([2, 0, 1, 2]), np.array([1, 0, 2, 0])
NOTHING: Any = None
ROWS = Rows(STEPS, SAMPLES, NOTHING, NOTHING, 4)


def dealt(calls: list[Any], batch: int = 3) -> Any:
    return StepArguments(calls, batch, "arguments")(ROWS, torch.device("cpu"))


def each(make: Any) -> list[Any]:
    """Of three steps."""
    return [make(step) for step in range(3)]


def same(found: Any, expected: Any) -> None:
    assert torch.equal(found, torch.as_tensor(expected)), found


def test_what_is_the_same_in_all_steps() -> None:
    per_sample = torch.tensor([[1, 10], [2, 20], [3, 30]])
    same(dealt([per_sample] * 3), [[2, 20], [1, 10], [3, 30], [1, 10]])
    same(dealt(each(lambda step: per_sample.clone())), [[2, 20], [1, 10], [3, 30], [1, 10]])
    same(dealt([torch.tensor([[4, 5]])] * 3), [[4, 5]] * 4)
    same(dealt([torch.arange(5)] * 3), torch.arange(5))
    same(dealt([torch.arange(2)] * 3), torch.arange(2))
    same(dealt([torch.tensor(7.5)] * 3), 7.5)
    number = torch.tensor(7.5)
    assert dealt([number] * 3) is number  # where the network's caller left it
    same(dealt([torch.tensor([6.0])] * 3, batch=1), [6.0] * 4)
    word = "euler"
    assert dealt([word] * 3) is word
    assert dealt([None] * 3) is None
    assert dealt([5] * 3) == 5


def test_what_changes_from_step_to_step() -> None:
    same(dealt([0.5, 0.25, 2.0]), [2.0, 0.5, 0.25, 2.0])
    same(dealt([1, 2, 4]), [4, 1, 2, 4])
    same(dealt(each(lambda step: torch.tensor(10.0 * step))), [20.0, 0.0, 10.0, 20.0])
    same(dealt(each(lambda step: torch.tensor([[step, -step]]))), [[2, -2], [0, 0], [1, -1], [2, -2]])
    same(dealt(each(lambda step: 10 * step + torch.arange(3))), [21, 0, 12, 20])
    early = [torch.tensor([0.0, 1.0, 0.0]), torch.zeros(3), torch.zeros(3)]  # in the first step alone
    same(dealt(early), [0.0, 0.0, 0.0, 0.0])
    same(dealt([early[0].flip(0), *early[1:]]), [0.0, 0.0, 0.0, 0.0])
    same(dealt([torch.ones(3), *early[1:]]), [0.0, 1.0, 0.0, 0.0])
    same(dealt([1, 0, 0]), [0, 1, 0, 0])
    late = [torch.zeros(3), torch.zeros(3), torch.tensor([0.0, 1.0, 0.0])]  # in the last step alone
    same(dealt(late), [1.0, 0.0, 0.0, 0.0])


class Pair(NamedTuple):
    left: Any
    right: Any


def test_structures_stay_what_they_are() -> None:
    calls = each(lambda step: {"a": [step, torch.arange(3)], "b": Pair(torch.tensor(float(step)), "x"), "c": (1,)})
    found = dealt(calls)
    assert list(found) == ["a", "b", "c"]
    assert type(found["a"]) is list
    same(found["a"][0], [2, 0, 1, 2])
    same(found["a"][1], [1, 0, 2, 0])
    assert type(found["b"]) is Pair
    same(found["b"].left, [2.0, 0.0, 1.0, 2.0])
    assert found["b"].right == "x"
    assert found["c"] == (1,)
    assert dealt([[]] * 3) == []
    assert dealt([{}] * 3) == {}


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([1, 1, "a"], "arguments: expected the same kind of value in every call, got int, str"),
        ([1, 1, True], "got bool, int"),
        ([{"a": 1}, {"a": 1}, {"b": 1}], "arguments: expected the same keys"),
        ([[1], [1], [1, 2]], "arguments: expected the same length"),
        (["a", "a", "b"], "arguments: it changes from call to call, so steps cannot share a call: got str"),
        ([{"a": [1, "a"]}, {"a": [1, "a"]}, {"a": [1, "b"]}], r"arguments\['a'\]\[1\]: it changes"),
        ([torch.ones(3), torch.ones(3), torch.ones(2)], r"arguments: expected one shape in every call, got \(3,\)"),
        ([torch.ones(2), torch.ones(2), torch.zeros(2)], r"first axis must be the batch of 3, got shape \(2,\)"),
        ([np.zeros(2), np.zeros(2), np.ones(2)], "arguments: it changes from call to call.*got ndarray"),
    ],
)
def test_what_steps_cannot_share_is_refused(calls: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dealt(calls)


def test_what_cannot_be_compared_is_the_same_where_it_is_one_object() -> None:
    table = np.zeros(2)
    assert dealt([table] * 3) is table


class Named:
    def called(self, a: int, b: int = 2, d: int = 9, *, c: int = 3, **more: int) -> None: ...


class Handing(Named):
    def called(self, a: int, *rest: int, e: int = 5, **more: int) -> None: ...  # type: ignore[override]


class Further(Handing):
    def called(self, *args: int, **kwargs: int) -> None: ...  # type: ignore[override]


def test_all_arguments_by_name() -> None:
    assert by_name(Named(), "called", (1,), {"f": 4}) == {"a": 1, "b": 2, "d": 9, "c": 3, "f": 4}
    assert by_name(Handing(), "called", (1, 6, 7), {"c": 8}) == {"a": 1, "b": 6, "d": 7, "e": 5, "c": 8}
    assert by_name(Handing(), "called", (1,), {"b": 8}) == {"a": 1, "e": 5, "b": 8}
    assert by_name(Further(), "called", (1, 6), {"e": 7}) == {"a": 1, "b": 6, "e": 7}
    assert parameters_of(Further(), "called") == {"args", "kwargs", "a", "rest", "e", "more", "b", "d", "c"}
    assert parameters_of(Named(), "called") == {"a", "b", "d", "c", "more"}
    with pytest.raises(TypeError, match=r"called: argument 1 has no name in .*\*rest.*; give it by name"):
        by_name(Handing(), "called", (1, 2, 3, 4), {})
    with pytest.raises(TypeError, match="missing a required argument: 'a'"):
        by_name(Named(), "called", (), {})
