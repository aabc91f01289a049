"""Several recorded steps run as one, row by row against each by itself; and which steps are of one kind."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

pytest.importorskip("diffusers")
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from parasolver_adapters.diffusers.recording import together
from parasolver_adapters.diffusers.recording.capture import Recorder
from parasolver_adapters.diffusers.recording.programs import Call, Operation, Program, Ref
from parasolver_adapters.diffusers.recording.together import Segment, Together, _segments
from parasolver_adapters.diffusers.recording.together import Step as Flat
from tests.adapters.recorded_steps import Net, Step, normal, recorded

MUL, ADD = torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor


def answered(steps: Together, numbers: list[int], states: torch.Tensor, net: Net) -> tuple[Any, torch.Tensor, int]:
    """``(x, m, how often networks were asked for)``."""
    run, sent, asked = steps.run(numbers, states), None, 0
    while True:
        try:
            requests = run.send(sent)  # type: ignore[arg-type]
        except StopIteration as end:
            return *end.value, asked
        asked += 1
        assert len(requests) == len(numbers)
        sent = []
        for call, leaves in requests:
            args, kwargs = tree_unflatten(leaves, call.spec)
            sent.append(tree_flatten(net(*args, **kwargs))[0])


def steps_of(step_of: Any, net: Net, count: int = 3) -> tuple[Together, list[Step]]:
    recorder, steps = Recorder(), [step_of(0.3 + number) for number in range(count)]
    return Together([recorded(step, net, normal(2, 3), recorder) for step in steps]), steps


def twice_called(number: float) -> Step:
    scale = torch.tensor([number])

    def step(x: torch.Tensor, call: Any) -> Any:
        first = call(x * scale, torch.tensor(number))[0]
        largest, places = (x - first).max(dim=1, keepdim=True)
        second = call(first - largest)[0]
        return x, second * scale + first + places

    return step


def changed(number: float) -> Step:
    scale = torch.tensor([number])

    def step(x: torch.Tensor, call: Any) -> Any:
        x = x + scale
        return x, call(x)[0]

    return step


def first_is_a_call(number: float) -> Step:
    time = torch.tensor(number)
    return lambda x, call: (x, call(x, time)[0])


def in_place(number: float) -> Step:
    scale = torch.tensor([number])

    def step(x: torch.Tensor, call: Any) -> Any:
        x = x.mul_(scale)
        return x, call(x)[0].add_(1)

    return step


@pytest.mark.parametrize(("step_of", "asked"), [(twice_called, 2), (changed, 1), (first_is_a_call, 1), (in_place, 1)])
@pytest.mark.parametrize("numbers", [[0, 1, 2], [2, 0], [1], [1, 1]])
def test_steps_give_what_each_gives_by_itself(step_of: Any, asked: int, numbers: list[int]) -> None:
    net = Net()
    together, steps = steps_of(step_of, net)
    states = normal(len(numbers), 2, 3, seed=8)
    before = states.clone()
    if step_of is in_place:  # each step is of a kind of its own
        numbers = [numbers[0]] * len(numbers)
    for _ in range(2):
        x, m, calls = answered(together, numbers, states, net)
        want = [steps[number](state.clone(), net) for number, state in zip(numbers, states, strict=True)]
        torch.testing.assert_close(m, torch.stack([m for _, m in want]), rtol=0, atol=1e-6)
        assert calls == asked
        assert (x is not None) is (step_of in (changed, in_place))
        assert x is None or torch.equal(x, torch.stack([x for x, _ in want]))
    assert torch.equal(states, before)


def counted(monkeypatch: pytest.MonkeyPatch, wrong: Any = None) -> dict[str, int]:
    """How often rows are run alone, and all at once (which ``wrong`` spoils)."""
    seen, at_once, alone = {"at once": 0, "alone": 0}, together._run_at_once, together._run_alone

    def at_once_counted(*given: Any) -> Any:
        seen["at once"] += 1
        values = at_once(*given)
        return values if wrong is None else wrong(values)

    def alone_counted(*given: Any) -> Any:
        seen["alone"] += 1
        return alone(*given)

    monkeypatch.setattr(together, "_run_at_once", at_once_counted)
    monkeypatch.setattr(together, "_run_alone", alone_counted)
    return seen


def test_what_has_gone_well_is_not_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, _ = steps_of(changed, Net())
    seen = counted(monkeypatch)
    for rows in (3, 2, 3):
        answered(steps, [*range(rows)], normal(rows, 2, 3), Net())
    assert seen == {"at once": 3, "alone": 2}  # the first and the last row of the first
    steps, _ = steps_of(twice_called, Net())  # one of whose values is a whole number
    answered(steps, [0, 1, 2], normal(3, 2, 3), Net())
    assert list(steps._at_once.values()) == [True] * 3


def off(row: int, value: int, by: float = 1e-3) -> Any:
    def wrong(values: list[torch.Tensor]) -> list[torch.Tensor]:
        values = [one.clone() for one in values]
        values[value][row] *= 1 + by
        return values

    return wrong


def warned(values: Any) -> Any:
    warnings.warn("there is no batching rule", stacklevel=1)
    return values


def fails(values: Any) -> Any:
    raise RuntimeError("no batching rule")


@pytest.mark.parametrize("wrong", [off(0, 0), off(2, 0), off(0, 1), off(2, 1), warned, fails])
def test_what_has_not_gone_well_is_run_row_by_row(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def step_of(number: float) -> Step:
        def step(x: torch.Tensor, call: Any) -> Any:
            x = x * number
            return x, x + 1

        return step

    both, steps = steps_of(step_of, Net(), 1)
    states = normal(3, 2, 3)
    seen = counted(monkeypatch, wrong)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x, m, _ = answered(both, [0, 0, 0], states, Net())
        assert torch.equal(x, torch.stack([steps[0](state, Net())[0] for state in states]))
        assert torch.equal(m, x + 1)
    assert seen["at once"] == 1


def test_rounding_is_no_reason_to_run_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, _ = steps_of(changed, Net())
    seen = counted(monkeypatch, off(0, 0, by=1e-6))
    for _ in range(2):
        answered(steps, [0, 1, 2], normal(3, 2, 3), Net())
    assert seen == {"at once": 2, "alone": 2}


def test_memory_that_runs_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller round will do, and then all at once."""
    steps, _ = steps_of(changed, Net())

    def full(values: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patched:
        counted(patched, full)
        with pytest.raises(torch.OutOfMemoryError):
            answered(steps, [0, 1, 2], normal(3, 2, 3), Net())
    seen = counted(monkeypatch)
    answered(steps, [0, 1], normal(2, 2, 3), Net())
    answered(steps, [0, 1], normal(2, 2, 3), Net())
    assert seen == {"at once": 2, "alone": 2}


def program(number: Any, dtype: torch.dtype = torch.float32) -> Program:
    return Program([Operation(MUL, (Ref(0), number), {}, (0,), 1)], dtype, size=2, m=1)


def programs(*numbers: Any, dtype: torch.dtype = torch.float32) -> Together:
    return Together([program(number, dtype) for number in numbers])


def test_numbers_that_some_of_the_steps_share() -> None:
    one, other = torch.tensor([2.0]), torch.tensor([3.0])
    states = normal(4, 5)
    for numbers in ([one, one, one, other], [other, one, one, one], [one, other, other, one], [one] * 4):
        _, m, _ = answered(programs(*numbers), [0, 1, 2, 3], states, Net())
        assert torch.equal(m, states * torch.stack(numbers))
    shared = [program(number) for number in (one, one, one.clone())]
    segment = Segment(range(1), (0,), (1,))
    assert together._differing(segment, [Flat.of(made) for made in shared[:2]], torch.device("cpu")) == {}
    found = together._differing(segment, [Flat.of(made) for made in shared], torch.device("cpu"))
    assert found[0, 1].tolist() == [[2.0]] * 3


def test_a_number_in_front_of_the_state_is_read_as_by_one_step() -> None:
    """In single precision, to which a double one of the host is no reason to widen."""
    numbers = [torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)]
    made = [Operation(MUL, (number, Ref(0)), {}, (0,), 1) for number in numbers]
    steps = Together([Program([one], torch.float32, size=2, m=1) for one in made])
    states = normal(2, 5)
    _, m, _ = answered(steps, [0, 1], states, Net())
    assert m.dtype == torch.float32
    assert list(steps._at_once.values()) == [True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensors_of_numbers_widen_half_precision_as_in_one_step(dtype: torch.dtype) -> None:
    """Other than a single number, whatever else is single precision beside them."""
    numbers = [torch.tensor([0.3, 0.7]), torch.tensor([1.1, 0.4])]
    states = normal(2, 3, 2).to(dtype)
    steps = programs(*numbers, dtype=dtype)
    _, m, _ = answered(steps, [0, 1], states, Net())
    assert m.dtype == torch.float32
    assert torch.equal(m, states * torch.stack(numbers)[:, None])
    assert list(steps._at_once.values()) == [True]


def test_segments_lie_between_network_calls() -> None:
    def op(at: int, *reads: int, results: Any = None) -> Operation:
        return Operation(ADD, tuple(map(Ref, reads)), {}, reads, at if results is None else results)

    spec = tree_flatten(((0,), {}))[1]
    call = Call(Net(), [Ref(2)], spec, 2, (True,), ("a",), (2,), [3, 4])
    again = Call(Net(), [Ref(4)], spec, 2, (True,), ("a",), (4,), [7])
    operations = [op(1, 0), op(2, 1, 0), call, op(5, 3, 1), op(0, 0, results=[6, None]), again]
    program = Program(operations, size=8, x=6, m=7)
    assert _segments(program) == [
        Segment(range(2), (0,), (1, 2)),
        Segment(range(3, 5), (0, 1, 3), (6,)),
        Segment(range(6, 6), (), ()),
    ]
    program.x, program.m = 0, 5
    assert [segment.keeps for segment in _segments(program)] == [(1, 2), (5,), ()]


def test_steps_of_one_kind_differ_in_numbers_only() -> None:
    net, other = Net(), Net()

    def made(**changes: Any) -> Program:
        given = {"rows": (2, 3), "number": 1.0, "function": MUL, "net": net, "more": 2, "flag": True} | changes

        def step(x: torch.Tensor, call: Any) -> Any:
            x = given["function"](x, torch.tensor([given["number"]]).to(given.get("of", torch.float32)))
            return given.get("given", x), call(x * given["more"], flag=given["flag"])[0]

        return recorded(step, given["net"], normal(*given["rows"]).to(given.get("dtype", torch.float32)))

    base = made()
    others = [
        made(rows=(3, 3)),
        made(function=ADD),
        made(net=other),
        made(more=3),
        made(more=2.0),
        made(flag=False),
        made(dtype=torch.float64),
        made(of=torch.float64),
    ]
    kinds = Together([base, made(number=7.0), *others]).kind
    assert kinds(0) == kinds(1)
    assert len({kinds(number) for number in range(1, 2 + len(others))}) == 1 + len(others)
    for name, value in (("x", 0), ("m", 1)):
        changed = made()
        setattr(changed, name, value)
        kinds = Together([base, changed]).kind
        assert kinds(0) != kinds(1)
    written = [recorded(in_place(1.0), net, normal(2, 3)) for _ in range(2)]
    kinds = Together([*written, written[0]]).kind
    assert kinds(0) == kinds(2) != kinds(1)
