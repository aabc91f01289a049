"""Network calls that several processes share, with a stand-in for the processes: what each makes, and what all get."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("diffusers")
import torch
from torch.utils._pytree import tree_flatten

from parasolver_adapters.diffusers.recording import sharing
from parasolver_adapters.diffusers.recording.capture import Recorder, Reference
from parasolver_adapters.diffusers.recording.programs import Call, Operation, Program, Ref
from parasolver_adapters.diffusers.recording.sharing import (
    SharedNetworks,
    SharedSteps,
    _described,
    _packed,
    _unpacked,
    modules_of,
)
from tests.adapters.recorded_steps import Net, normal, recorded


class Processes:
    """Two of them, one after the other."""

    def __init__(self, some: Any, group: Any, *, timeout: float) -> None:
        self.some, self.given, self.told = some, (group, timeout), list[Any]()
        self.devices, self.max_rows = 2, 5

    def __call__(self, blank: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
        assert nodes.device == torch.device("cpu")
        self.blank = blank
        parts = [(blank[:1], nodes[:1]), (blank[1:], nodes[1:])]
        return torch.cat([self.some(*part) for part in parts if len(part[0])])

    def begin(self, plan: Any) -> None:
        self.told.append(dict(plan))

    def agree(self, values: Any) -> Any:
        return [2 * value for value in values]

    def end(self, error: Any = None) -> None:
        self.told.append(error)


OUTPUTS = [torch.arange(6.0).reshape(2, 3), "flag", torch.tensor([1, 2, 3]), None, torch.ones(2, 1).bfloat16()]


def test_outputs_are_packed_into_bytes_and_back() -> None:
    row = _packed([OUTPUTS[0].T.contiguous().T, *OUTPUTS[1:]])
    assert row.dtype == torch.uint8
    assert row.numel() == 6 * 4 + 3 * 8 + 2 * 2
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), row])[1:]  # which lies at no whole number
    form = [2 * one if isinstance(one, torch.Tensor) else one for one in OUTPUTS]
    for got, want in zip(_unpacked(shifted, form), OUTPUTS, strict=True):
        if isinstance(want, torch.Tensor):
            assert got.dtype == want.dtype
            assert torch.equal(got, want)
        else:
            assert got is want


class Several(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        self.seen = [*getattr(self, "seen", []), len(x)]
        return x * 2, "flag", (10 * x[:, :1]).long()


def test_all_get_what_each_has_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "DistributedDenoiser", Processes)
    net, xs = Several(), [normal(2, 3, seed=seed) for seed in range(3)]
    call = Call(net, [Ref(0)], tree_flatten(((0,), {}))[1], 2, (True,), ("a",), (), [])
    outputs = tree_flatten(net(xs[0]))[0]
    reference = Reference([xs[0]], outputs, tree_flatten(outputs)[1])
    networks = SharedNetworks({id(net): net.forward}, {"a": reference}, [net], "group", 7.0)  # type: ignore[arg-type, dict-item]
    assert networks.processes.given == ("group", 7.0)  # type: ignore[attr-defined]
    assert networks.modules == [net]
    net.seen = []
    for _ in range(2):
        got = networks.together([(call, [x]) for x in xs])
        for (double, flag, whole), x in zip(got, xs, strict=True):
            assert torch.equal(double, 2 * x)
            assert flag == "flag"
            assert torch.equal(whole, (10 * x[:, :1]).long())
    blank: Any = networks.processes.blank  # type: ignore[attr-defined]
    assert blank.shape == (3, 6 * 4 + 2 * 8)
    assert blank.dtype == torch.uint8
    assert net.seen == [2, 6, 2, 4]  # the first batch holds the pipeline's own call


def test_shared_steps_speak_for_their_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "DistributedDenoiser", Processes)
    net = Net()
    programs = [recorded(lambda x, call: (x, call(x)[0]), net, normal(2, 3))]
    networks = SharedNetworks({}, {}, [net], "group", 7.0)  # type: ignore[arg-type]
    steps = SharedSteps(programs, normal(2, 3), networks, None)
    assert (steps.devices, steps.max_rows) == (2, 5)
    assert steps.agree([1.0, 2.0]) == [2.0, 4.0]
    steps.begin({"window": "3"})
    error = ValueError("boom")
    steps.end(error)
    steps.end()
    plan = {"window": "3", "steps and conditions": _described(programs)}
    assert networks.processes.told == [plan, error, None]  # type: ignore[attr-defined]


def test_each_network_is_named_once() -> None:
    one, other, recorder = Net(), Net(), Recorder()
    programs = [recorded(lambda x, call: (x, call(2 * x)[0]), net, normal(2, 3), recorder) for net in (one, other, one)]
    assert modules_of(programs) == [one, other]


def described(number: Any = 2.0, table: Any = None, function: Any = torch.ops.aten.mul.Tensor, **more: Any) -> str:
    table = torch.arange(6.0).reshape(2, 3) if table is None else table
    operations: list[Any] = [
        Operation(function, (Ref(0), number), dict(more), (0,), 1),
        Operation(torch.ops.aten.add.Tensor, (Ref(1), table), {}, (1,), 2),
    ]
    return _described([Program(operations, size=3, m=2)])


def test_what_steps_do_is_told_in_a_word_of_its_own() -> None:
    base = described()
    assert len(base) == 16
    assert described(float("2"), torch.arange(6.0).reshape(2, 3)) == base
    others = [
        described(3.0),
        described(2),
        described("2.0"),
        described(True),
        described(function=torch.ops.aten.div.Tensor),
        described(alpha=2),
        described(table=torch.arange(6.0).reshape(3, 2)),
        described(table=torch.arange(6.0).reshape(2, 3).double()),
        described(table=torch.arange(1.0, 7.0).reshape(2, 3)),
    ]
    assert len({base, *others}) == 1 + len(others)
    # numbers of a step's own, as timesteps are, are not compared: the plan names them
    assert described(table=torch.tensor([1.0])) == described(table=torch.tensor([2.0]))
    same = torch.ones(2, 3)
    assert described(same, same) != described(same, same.clone())  # what all share is one object


def test_calls_are_told_by_their_networks_and_arguments() -> None:
    class Other(Net):
        pass

    def told(net: Net, cond: torch.Tensor) -> str:
        return _described([recorded(lambda x, call: (x, call(x, cond=cond)[0]), net, normal(2, 3))])

    cond = normal(2, 4)
    assert told(Net(), cond) == told(Net(), cond.clone())
    assert len({told(Net(), cond), told(Other(), cond), told(Net(), 2 * cond)}) == 3
