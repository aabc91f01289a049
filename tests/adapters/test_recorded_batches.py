"""The network calls of several recorded steps, made as one: what the network is given, and who gets what it gives."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("diffusers")
import torch
from torch.utils._pytree import tree_flatten

from parasolver_adapters.diffusers import PipelineNotParallelError
from parasolver_adapters.diffusers.recording.batching import Networks, RecordedDenoiser, _split, compare_rows
from parasolver_adapters.diffusers.recording.capture import Recorder, Reference
from parasolver_adapters.diffusers.recording.programs import Call
from parasolver_core import Rows
from tests.adapters.recorded_steps import Net, normal, recorded


def call_of(module: torch.nn.Module, rows: int, batched: tuple[bool, ...], name: Any, leaves: list[Any]) -> Call:
    spec = tree_flatten((tuple(leaves), {}))[1]
    return Call(module, leaves, spec, rows, batched, (name,), (), [])


def networks_of(*modules: torch.nn.Module, references: Any = None) -> Networks:
    return Networks({id(module): module.forward for module in modules}, references or {})


def test_calls_of_one_signature_are_made_as_one_and_all_get_their_own() -> None:
    one, other = Net(0.5), Net(2.0)
    xs = [normal(2, 3, seed=seed) for seed in range(4)]
    calls = [call_of(net, 2, (True,), name, []) for net, name in ((one, "a"), (other, "b"), (one, "a"), (one, "c"))]
    networks = networks_of(one, other)
    calls = [Call(one.module, [], tree_flatten(((0,), {}))[1], 2, (True,), one.signature, (), []) for one in calls]
    got = networks.together([(call, [x]) for call, x in zip(calls, xs, strict=True)])
    for outputs, x, net in zip(got, xs, (one, other, one, one), strict=True):
        assert torch.equal(outputs[0], torch.tanh(x) * net.gain)
    assert networks.calls == 3
    assert [len(x) for x, *_ in one.seen] == [4, 2]
    assert [len(x) for x, *_ in other.seen] == [2]


def given(call: Call, nodes: list[list[Any]]) -> tuple[Any, ...]:
    """What the network is called with for these nodes."""
    networks_of(call.module).together([(call, node) for node in nodes])
    return call.module.seen[-1]  # type: ignore[union-attr, return-value]


@pytest.mark.parametrize(
    ("rows", "values", "expected"),
    [
        (2, [torch.tensor(3.0), torch.tensor(5.0)], [3.0, 3.0, 5.0, 5.0]),  # one number for all rows of a node
        (2, [torch.tensor([3.0]), torch.tensor([5.0])], [3.0, 3.0, 5.0, 5.0]),
        (1, [torch.tensor([3.0]), torch.tensor([5.0])], [3.0, 5.0]),
        (1, [torch.tensor(3.0), torch.tensor(5.0)], [3.0, 5.0]),
        (1, [torch.tensor([[3.0]]), torch.tensor([[5.0]])], [[3.0], [5.0]]),  # a row of one number keeps its form
        (2, [torch.tensor([3.0, 4.0]), torch.tensor([5.0, 6.0])], [3.0, 4.0, 5.0, 6.0]),
        (2, [torch.tensor([[3.0], [4.0]]), torch.tensor([[5.0], [6.0]])], [[3.0], [4.0], [5.0], [6.0]]),
    ],
)
def test_arguments_have_a_row_for_each_row_of_each_node(rows: int, values: list[Any], expected: Any) -> None:
    net = Net()
    call = call_of(net, rows, (True, True), "a", [normal(rows, 2), values[0]])
    seen = given(call, [[normal(rows, 2), value] for value in values])
    assert seen[1].tolist() == expected


def test_several_rows_for_each_row_and_what_is_no_batch() -> None:
    """Frames of a video have rows of their own; an argument that is no batch is given once."""
    net, frames = Net(), [normal(4, 3, 2, seed=seed) for seed in (1, 2)]
    call = call_of(net, 2, (True, True, True), "a", [normal(2, 1), torch.tensor(1.0), frames[0]])
    seen = given(call, [[normal(2, 1), torch.tensor(1.0), frame] for frame in frames])
    assert torch.equal(seen[2], torch.cat(frames))
    table = normal(2, 5)
    call = call_of(net, 2, (True, True, False), "b", [normal(2, 1), torch.tensor(1.0), table])
    assert given(call, [[normal(2, 1), torch.tensor(1.0), table]] * 2)[2] is table


def test_conditions_are_repeated_once_for_the_largest_batch() -> None:
    net, cond, other = Net(), normal(2, 4), normal(2, 4, seed=1)
    networks = networks_of(net)
    call = call_of(net, 2, (True, True, True), "a", [normal(2, 3), torch.tensor(1.0), cond])

    def seen(*conditions: torch.Tensor) -> torch.Tensor:
        networks.together([(call, [normal(2, 3), torch.tensor(1.0), one]) for one in conditions])
        return net.seen[-1][2]

    three = seen(cond, cond, cond)
    assert torch.equal(three, cond.repeat(3, 1))
    assert seen(cond, cond, cond).data_ptr() == seen(cond, cond).data_ptr() == three.data_ptr()
    assert torch.equal(seen(cond, cond), cond.repeat(2, 1))
    four = seen(cond, cond, cond, cond)
    assert torch.equal(four, cond.repeat(4, 1))
    assert seen(cond, cond, cond).data_ptr() == four.data_ptr()
    assert torch.equal(seen(cond, other), torch.cat([cond, other]))


def test_numbers_of_each_step_are_not_held() -> None:
    net = Net()
    networks = networks_of(net)
    times = torch.tensor([1.0, 2.0])
    call = call_of(net, 2, (True, True), "a", [normal(2, 3), times])
    networks.together([(call, [normal(2, 3), times])] * 2)
    assert net.seen[-1][1].tolist() == [1.0, 2.0, 1.0, 2.0]
    held = weakref.ref(times)
    del times, call
    net.seen.clear()
    assert held() is None


def test_a_node_by_itself_is_called_as_the_pipeline_does() -> None:
    class Turned(Net):
        def forward(self, x: torch.Tensor, t: Any = 0.0, cond: Any = None, flag: Any = None) -> Any:
            return super().forward(x, t, cond)[0].T.contiguous().T, "flag"

    net = Turned()
    x, t = normal(2, 3), torch.tensor(1.0)
    call = call_of(net, 2, (True, True), "a", [x, t])
    networks = networks_of(net)
    ((out, flag),) = networks.together([(call, [x, t])])
    assert net.seen[0][0] is x
    assert net.seen[0][1] is t
    assert flag == "flag"
    assert out.is_contiguous()  # as its stand-in was
    both = networks.together([(call, [x, t])] * 2)
    for rows, flag in both:
        assert torch.equal(rows, out)
        assert rows.is_contiguous()
        assert flag == "flag"


class Mixing(torch.nn.Module):
    """Subtracts the mean over the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0) if len(x) > 2 else x


def with_reference(net: torch.nn.Module, x: torch.Tensor, *rest: Any) -> tuple[Call, Networks]:
    """A call, and networks that know the pipeline's own one of it."""
    batched = (True, *[False] * len(rest))
    call = call_of(net, len(x), batched, "a", [x, *rest])
    outputs = tree_flatten(net(x, *rest))[0]
    reference = Reference([x, *rest], outputs, tree_flatten(outputs)[1])
    return call, networks_of(net, references={"a": reference})


def test_the_first_batch_holds_the_pipelines_own_call_and_is_compared_with_it() -> None:
    net, xs = Net(), [normal(2, 3, seed=seed) for seed in range(3)]
    call, networks = with_reference(net, xs[0], 0.0)
    net.seen.clear()
    for _ in range(2):
        got = networks.together([(call, [x, 0.0]) for x in xs[1:]])
        assert len(got) == 2
        assert all(torch.equal(out[0], torch.tanh(x) * 0.5) for out, x in zip(got, xs[1:], strict=True))
    assert [len(x) for x, *_ in net.seen] == [6, 4]
    mixing = Mixing()
    call, networks = with_reference(mixing, xs[0])
    for _ in range(2):  # it is not taken for right at the second time
        with pytest.raises(PipelineNotParallelError, match="Mixing gives other values in a batch of several steps"):
            networks.together([(call, [x]) for x in xs[1:]])


@pytest.mark.parametrize(
    ("known", "own", "same"),
    [
        (2.0, float("2"), True),  # another object
        (2.0, 3.0, False),
        (torch.ones(2), torch.ones(2), True),
        (torch.ones(2), torch.zeros(2), False),
        ("a", "a", True),
        (object, object, True),
        (object, list, False),
    ],
)
def test_a_known_call_with_other_arguments_is_no_reference(known: Any, own: Any, same: bool) -> None:
    net = Net()
    reference = Reference([normal(2, 3), known], [], tree_flatten([])[1])
    networks = networks_of(net, references={"a": reference})
    call = call_of(net, 2, (True, False), "a", [normal(2, 3, seed=1), own])
    assert networks.reference(call) is (reference if same else None)
    networks._references.clear()
    assert networks.reference(call) is (reference if same else None)  # looked for once
    assert networks_of(net).reference(call) is None


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_rows_of_a_batch_may_differ_from_a_call_alone_by_rounding(size: float) -> None:
    """By the root of the dtype's rounding, of the largest number; what is no floating point is not compared."""
    call: Any = SimpleNamespace(module=torch.nn.Identity())
    for dtype in (torch.float32, torch.float64):
        want, off = size * torch.tensor([0.1, -1.0], dtype=dtype), torch.finfo(dtype).eps ** 0.5
        compare_rows(call, [want * (1 + 0.99 * off)], [want])
        with pytest.raises(PipelineNotParallelError, match="Identity gives other values"):
            compare_rows(call, [want], [want * (1 - 1.01 * off)])
    compare_rows(call, [torch.tensor([1]), "a"], [torch.tensor([2]), "b"])
    compare_rows(call, [torch.zeros(2)], [torch.zeros(2)])
    with pytest.raises(PipelineNotParallelError, match=r"\(by 0\.5 of their size\)"):
        compare_rows(call, [torch.zeros(1), torch.tensor([1.0])], [torch.zeros(1), torch.tensor([2.0])])
    with pytest.raises(PipelineNotParallelError, match=r"\(by 3 of their size\)"):
        compare_rows(call, [torch.tensor([3.0])], [torch.zeros(1)])
    with pytest.raises(PipelineNotParallelError):
        compare_rows(call, [torch.tensor([torch.nan])], [torch.ones(1)])


def test_an_output_without_rows_is_no_batch() -> None:
    call: Any = SimpleNamespace(module=torch.nn.Identity())
    with pytest.raises(PipelineNotParallelError, match=r"shape \(\) for a batch of 2"):
        _split(call, torch.tensor(1.0), 2)


def test_an_error_of_one_node_alone_is_the_networks_own() -> None:
    class Fails(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("boom")

    net = Fails()
    with pytest.raises(ValueError, match=r"^boom$"):
        networks_of(net).together([(call_of(net, 2, (True,), "a", [0]), [normal(2, 3)])])


def recorded_denoiser(net: Net, seen: list[Any]) -> tuple[RecordedDenoiser, list[Any]]:
    """Steps 1 and 3 are alike, 2 is another and changes x, as inpainting does."""

    def plain(scale: float) -> Any:
        return lambda x, call: (x, call(x * torch.tensor(scale))[0] - x)

    def changes(x: torch.Tensor, call: Any) -> Any:
        changed = x + 1
        return changed, call(changed)[0] * 3

    steps = [plain(2.0), changes, plain(4.0)]
    recorder = Recorder()
    programs = [recorded(step, net, normal(2, 3), recorder) for step in steps]

    def correct(nodes: list[int], states: torch.Tensor, x: Any, m: torch.Tensor) -> torch.Tensor:
        seen.append((nodes, states, x, m))
        return m + 100.0 * torch.tensor(nodes).view(-1, 1, 1)

    first = normal(2, 3, seed=9).double()
    return RecordedDenoiser(programs, first, networks_of(net), correct), [first, *steps]


@pytest.mark.parametrize("rows", [True, False])
def test_each_row_gets_what_its_step_gives_and_is_corrected(rows: bool) -> None:
    net, seen = Net(), list[Any]()
    denoiser, (first, *steps) = recorded_denoiser(net, seen)
    assert denoiser.takes_rows
    nodes, states = [3, 0, 2, 1, 0], normal(5, 2, 3, seed=5)
    net.seen.clear()
    told = Rows(torch.tensor(nodes).numpy(), None, None, None, 1) if rows else None  # type: ignore[arg-type]
    given = torch.full((5,), 7) if rows else torch.tensor(nodes)  # numbers of the device are not waited for
    got = denoiser(states, given, told)
    assert len(net.seen) == 1  # the calls of both kinds are alike, and made as one
    assert got.dtype == torch.float32
    expected = {}
    for row, node in enumerate(nodes):
        m = first if node == 0 else steps[node - 1](states[row], net)[1]
        torch.testing.assert_close(got[row], (m + 100 * node).float(), rtol=0, atol=1e-5)
        expected[node] = m
    assert denoiser.outputs.keys() == expected.keys()
    for node, m in expected.items():
        torch.testing.assert_close(denoiser.outputs[node], m, rtol=0, atol=1e-6)
    assert denoiser.outputs[0].dtype == torch.float64  # as the pipeline would give it
    by_nodes = {tuple(nodes): (group, x, m) for nodes, group, x, m in seen}
    assert by_nodes.keys() == {(3, 1), (0, 0), (2,)}
    assert torch.equal(by_nodes[3, 1][0], states[[0, 3]])
    assert torch.equal(by_nodes[0, 0][0], states[[1, 4]])
    assert by_nodes[3, 1][1] is by_nodes[0, 0][1] is None
    torch.testing.assert_close(by_nodes[2,][1], states[[2]] + 1)
    assert all(m.dtype == torch.float32 for _, _, m in by_nodes.values())


def test_rows_of_one_step_alone_or_of_none_but_the_first() -> None:
    net, seen = Net(), list[Any]()
    denoiser, (first, plain, *_) = recorded_denoiser(net, seen)
    states = normal(1, 2, 3, seed=5)
    torch.testing.assert_close(
        denoiser(states, torch.tensor([1]))[0], plain(states[0], net)[1] + 100, rtol=0, atol=1e-5
    )
    net.seen.clear()
    assert torch.equal(
        denoiser(states.repeat(2, 1, 1), torch.zeros(2, dtype=torch.int64)), first.float().repeat(2, 1, 1)
    )
    assert net.seen == []
