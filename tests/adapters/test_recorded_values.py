"""Values of recorded steps: their forms, stand-ins for them, where they lie, and whether two are the same."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("diffusers")
import torch
from torch.utils._pytree import tree_flatten

from parasolver_adapters.diffusers import PipelineNotParallelError
from parasolver_adapters.diffusers.recording.agreement import apart, rounding
from parasolver_adapters.diffusers.recording.capture import _is_batched, _names, form_of_call
from parasolver_adapters.diffusers.recording.programs import Operation, Program, Ref, keep, perform
from parasolver_adapters.diffusers.recording.standins import copies, dense, place_of, stand_in, zeros
from tests.adapters.recorded_steps import Net, normal


@pytest.mark.parametrize(
    ("leaf", "rows", "name", "batched"),
    [
        (torch.zeros(2, 3), 2, "x", True),
        (torch.zeros(3, 2), 2, "x", False),
        (torch.zeros(2), 2, "", True),
        (torch.tensor(1.0), 2, "t", True),
        (torch.zeros(1), 2, "t", True),
        (torch.zeros(1, 1), 2, "t", True),
        (torch.zeros(1, 3), 2, "x", False),
        (3.0, 2, "t", False),
        (torch.zeros(4, 3), 4, "img_ids", False),  # a row a token
        (torch.zeros(4, 3), 4, "image_rotary_emb", False),
        (torch.zeros(4, 3, 5), 2, "encoder_hidden_states", True),  # a row a frame
        (torch.zeros(4, 3, 5), 2, "mid_block_additional_residual", True),
        (torch.zeros(4, 3), 2, "encoder_hidden_states", False),
        (torch.zeros(5, 3, 5), 2, "encoder_hidden_states", False),
        (torch.zeros(4, 3, 5), 2, "pooled", False),
    ],
)
def test_which_arguments_hold_a_row_for_each(leaf: Any, rows: int, name: str, batched: bool) -> None:
    assert _is_batched(leaf, rows, name) is batched


def test_arguments_have_the_names_that_they_were_given_by() -> None:
    kwargs = {"added": {"b": 1, "a": [2, 3]}, "txt_ids": 4}
    leaves, spec = tree_flatten(((5, 6), kwargs))
    assert _names(leaves, spec, kwargs) == ["", "", "added", "added", "added", "txt_ids"]


def test_calls_whose_outputs_are_of_one_form() -> None:
    net, other = Net(), Net()

    def form(*leaves: Any, module: Any = net, **kwargs: Any) -> Any:
        return form_of_call(module, kwargs, [*leaves, *kwargs.values()])

    base = form(torch.zeros(2, 3), 1.0, flag=True)
    assert base == form(torch.ones(2, 3), 2.0, flag=True)
    others = [
        form(torch.zeros(3, 2), 1.0, flag=True),
        form(torch.zeros(2, 3).double(), 1.0, flag=True),
        form(torch.zeros(2, 3), 1, flag=True),
        form(torch.zeros(2, 3), 1.0, flag=False),
        form(torch.zeros(2, 3), 1.0, other=True),
        form(torch.zeros(2, 3), 1.0, flag=True, module=other),
        form(torch.zeros(2, 3), "a", flag=True),
        form(torch.zeros(2, 3), "b", flag=True),
    ]
    assert len({base, *others}) == 9


@pytest.mark.parametrize(
    ("got", "want", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.5, 4.0], [1.0, 4.0], 0.125),  # of the largest number
        ([1.0, -4.0], [1.0, 4.0], 2.0),
        ([torch.nan, 2.0], [torch.nan, 2.0], 0.0),
        ([torch.nan, 3.0], [torch.nan, 2.0], 0.5),
        ([torch.inf, 2.0], [torch.inf, 2.0], 0.0),
        ([-torch.inf, 2.0], [-torch.inf, 1.0], 1.0),
        ([torch.inf, 0.25], [torch.inf, 0.5], 0.5),
        ([0.0, 0.0], [0.0, -0.0], 0.0),
        ([1e-9], [0.0], torch.inf),
        ([torch.nan], [torch.nan], 0.0),
        ([torch.inf, 1.0], [-torch.inf, 1.0], torch.inf),
    ],
)
def test_how_far_two_results_are_apart(got: list[float], want: list[float], expected: float) -> None:
    assert apart(torch.tensor(got), torch.tensor(want)) == expected


def test_results_of_other_forms_are_infinitely_apart() -> None:
    assert apart(torch.ones(2), torch.ones(1, 2)) == torch.inf
    assert apart(1.0, torch.tensor(1.0)) == torch.inf
    assert apart(torch.tensor([1, 3]), torch.tensor([1, 4])) == 0.25
    assert apart(torch.ones(2, dtype=torch.float64) + 1e-12, torch.ones(2)) == pytest.approx(1e-12, rel=1e-3)
    assert apart(torch.tensor([torch.nan, 1.0]), torch.ones(2)) != 0.0  # no number is near to it
    assert rounding(torch.float32) == pytest.approx((2.0**-23) ** 0.75)
    assert rounding(torch.int64) == 0.0


def test_copies_of_values_stay_as_they_are() -> None:
    turned = normal(3, 2).T.requires_grad_()
    kept, word = copies([turned, "word"])
    assert (word, kept.is_contiguous(), kept.requires_grad) == ("word", True, False)
    before = kept.clone()
    with torch.no_grad():
        turned.zero_()
    assert torch.equal(kept, before)
    sparse = torch.eye(2).to_sparse()
    assert dense(sparse) is sparse
    assert dense("word") == "word"


def test_a_stand_in_is_zeros_through_which_no_gradient_goes() -> None:
    like, given = normal(3, 2).T + torch.nan, normal(2, 3).requires_grad_()
    assert zeros("word") == "word"
    assert torch.equal(zeros(like), torch.zeros(2, 3))
    assert zeros(like).is_contiguous()
    plain = [
        stand_in(like, [normal(2, 3), "word"]),
        stand_in(torch.ones(2, dtype=torch.int64), [given]),
        stand_in("word", [given]),
    ]
    with torch.no_grad():
        plain.append(stand_in(like, [given]))
    assert [getattr(one, "requires_grad", False) for one in plain] == [False] * 4
    followed = stand_in(like, ["word", given])
    assert torch.equal(followed, torch.zeros(2, 3))
    with pytest.raises(PipelineNotParallelError, match="takes a gradient through a network"):
        followed.sum().backward()


def test_where_the_values_of_a_tensor_lie() -> None:
    x = normal(2, 3)
    assert place_of(x) == place_of(x.data) == place_of(torch.nn.Parameter(x))
    assert place_of(x) != place_of(x.clone())
    assert len({place_of(one) for one in (x, x[:1], x.T, x.view(torch.int32), x.view(3, 2))}) == 5
    assert place_of(torch.zeros(0)) is None
    assert place_of(torch.eye(2).to_sparse()) is None
    assert place_of("word") is None


def test_results_of_an_operation_go_to_their_numbers() -> None:
    def made(results: Any, function: Any = None, args: Any = (), kwargs: Any = None) -> Operation:
        return Operation(function, args, kwargs or {}, (), results)

    values: list[Any] = ["state", None, None, None]
    keep(made([3, None, 1]), ("a", "b", "c"), values)
    keep(made(None), ("d",), values)
    keep(made(2), ("e", "f"), values)
    assert values == ["state", "c", ("e", "f"), "a"]
    perform(made(1, lambda *args, **kwargs: (args, kwargs), ([Ref(0), 1], (Ref(3),), 2), {"k": {"l": Ref(2)}}), values)
    assert values[1] == ((["state", 1], ("a",), 2), {"k": {"l": ("e", "f")}})


@pytest.mark.parametrize(
    ("error", "seen"), [(ValueError, PipelineNotParallelError), (torch.OutOfMemoryError, torch.OutOfMemoryError)]
)
def test_an_operation_that_cannot_be_repeated(error: type[Exception], seen: type[Exception]) -> None:
    def fails() -> Any:
        raise error("boom")

    with pytest.raises(seen, match="boom"):
        perform(Operation(fails, (), {}, (), 1), [None, None])


def test_numbers_of_a_program() -> None:
    program = Program()
    assert [program.new(), program.new(), program.size] == [1, 2, 3]
    assert (program.x, program.m, program.mutates, program.dtype) == (0, -1, False, torch.float32)
    assert program.operations == []
