"""Steps of a loop, recorded once: that they repeat what the loop does from any state, and what cannot be recorded."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("diffusers")
import torch

from parasolver_adapters.diffusers import PipelineNotParallelError
from parasolver_adapters.diffusers.recording import capture
from parasolver_adapters.diffusers.recording.capture import Recorder
from parasolver_adapters.diffusers.recording.programs import Call, Operation, Ref
from tests.adapters.recorded_steps import Net, normal, recorded, repeated

OTHER = normal(2, 3, seed=7)
MASK = torch.tensor([0.0, 1.0, 1.0])


def guided(x: torch.Tensor, call: Any) -> Any:
    both = torch.cat([x, 2 * x])
    null, given = call(both, torch.tensor(3.0))[0].chunk(2)
    return x, null + 1.5 * (given - null)


def inpainted(x: torch.Tensor, call: Any) -> Any:
    x = x * MASK + (1 - MASK)
    return x, call(x)[0]


def in_place(x: torch.Tensor, call: Any) -> Any:
    x = x.mul_(2)
    out = call(x)[0] + 0.0
    out += x
    torch.neg(out, out=out)
    return x, out


def several(x: torch.Tensor, call: Any) -> Any:
    largest, places = x.max(dim=1, keepdim=True)
    _, lowest = torch.aminmax(x, dim=1, keepdim=True)
    first = call(x - largest)[0]
    return x, call(torch.stack([first, x * lowest]).sum(0), cond=x)[0] + places


def aside(x: torch.Tensor, call: Any) -> Any:
    """What autograd and ``.data`` make of a value is the value."""
    return x, call((x * 2).data)[0].detach() + x.data


def sloped(x: torch.Tensor, call: Any) -> Any:
    """Autograd gives the values that it has saved as other tensors."""
    own = x.detach().requires_grad_()
    slope = torch.autograd.grad((0.3 * own).exp().sum().sqrt(), own)[0]
    return x, call(x)[0] + slope


@pytest.mark.parametrize("step", [guided, inpainted, in_place, several, aside, sloped])
def test_a_recorded_step_does_what_the_loop_does_from_another_state(step: Any) -> None:
    net = Net()
    program = recorded(step, net, normal(2, 3))
    state = OTHER.clone()
    x, m = repeated(program, state)
    want_x, want_m = step(OTHER.clone(), net)
    assert torch.equal(m, want_m)
    assert torch.equal(state, OTHER)  # it is the solver's
    changes = step in (inpainted, in_place)
    assert (x is None) is not changes
    assert x is None or torch.equal(x, want_x)
    assert program.mutates is (step is in_place)


def test_only_what_leads_to_the_result_is_kept() -> None:
    def step(x: torch.Tensor, call: Any) -> Any:
        _ = (x * 3).sum()
        call(x, cond=x)
        out = call(2 * x)[0]
        _ = out - 1
        return x, out

    program = recorded(step, Net(), normal(2, 3))
    assert [type(one) for one in program.operations] == [Operation, Call]
    assert program.m == program.operations[1].results[0]  # type: ignore[index, call-overload]

    def written(x: torch.Tensor, call: Any) -> Any:
        part = x[:1]
        part.zero_()  # nobody reads its result, and everybody what it did
        return x, call(x)[0]

    program = recorded(written, Net(), normal(2, 3))
    _, m = repeated(program, OTHER)
    assert torch.equal(m, Net()(torch.cat([torch.zeros(1, 3), OTHER[1:]]))[0])


def test_a_program_runs_in_the_dtype_of_its_own_state() -> None:
    program = recorded(guided, Net(), normal(2, 3).double())
    assert program.dtype == torch.float64
    _, m = repeated(program, OTHER)
    assert m.dtype == torch.float64
    state = normal(3, 2, seed=3).T
    assert not state.is_contiguous()

    def strides(x: torch.Tensor, call: Any) -> Any:
        return x, call(x.as_strided((3, 2), (2, 1)))[0]  # which looks at how the state lies in memory

    _, m = repeated(recorded(strides, Net(), normal(2, 3)), state)
    assert torch.equal(m, Net()(state.contiguous().as_strided((3, 2), (2, 1)))[0])


def test_a_call_has_a_form_of_its_own_and_equal_conditions_are_one_object() -> None:
    net, recorder = Net(), Recorder()
    conditions = [normal(2, 4), normal(2, 4), normal(2, 4, seed=1)]  # equal, and another

    def step(cond: Any, t: Any, flag: Any = None) -> Any:
        return lambda x, call: (x, call(x, t, cond=cond, flag=flag)[0])

    def call_of(cond: Any, t: Any, flag: Any = None) -> Call:
        (call,) = recorded(step(cond, t, flag), net, normal(2, 3), recorder).operations
        assert isinstance(call, Call)
        return call

    one, same, other = [call_of(cond, torch.tensor(1.0)) for cond in conditions]
    assert (one.rows, one.batched) == (2, (True, True, True, False))
    assert isinstance(one.leaves[0], Ref)
    assert torch.equal(one.leaves[2], conditions[0])
    assert one.leaves[2] is not conditions[0]  # which the loop may write into
    assert same.leaves[2] is one.leaves[2]
    assert torch.equal(other.leaves[2], conditions[2])
    assert one.signature == same.signature == other.signature  # numbers of a batch may differ
    assert len(net.seen) == 1  # one real call tells the form of the output
    named = [call_of(conditions[0], 2.5), call_of(conditions[0], 3.5), call_of(conditions[0], 2.5, "flag")]
    assert len({call.signature for call in (one, *named)}) == 4
    assert named[0].signature == call_of(conditions[1], float("2.5")).signature
    assert len(net.seen) == 3  # a number is of the form, its value is not
    tables = [torch.ones(5, 2), torch.ones(5, 2), torch.zeros(5, 2)]  # no batch
    first, again, another = [call_of(table, 1.0) for table in tables]
    assert first.batched[2] is False
    assert first.signature == again.signature != another.signature
    objects = [object(), object()]
    assert call_of(None, 1.0, objects[0]).signature != call_of(None, 1.0, objects[1]).signature
    assert call_of(None, 1.0, objects[0]).signature == call_of(None, 1.0, objects[0]).signature


def test_the_rows_are_those_of_what_depends_on_the_state() -> None:
    class Tabled(torch.nn.Module):
        def forward(self, table: torch.Tensor, scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return x * scale + table.sum()

    table = torch.ones(5, 2)
    program = recorded(lambda x, call: (x, call(table, x.sum(), x)), Tabled(), normal(2, 3))
    call = program.operations[-1]
    assert isinstance(call, Call)
    assert (call.rows, call.batched) == (2, (False, True, True))


def test_numbers_of_one_step_are_kept_as_they_were() -> None:
    """The loop may write the next step's into the same tensor."""
    net, recorder = Net(), Recorder()
    calls = []
    time = torch.tensor([1.0, 2.0])
    for _ in range(2):
        program = recorded(lambda x, call, time=time: (x, call(x, time)[0]), net, normal(2, 3), recorder)
        calls += program.operations
        time += 1
    assert [call.leaves[1].tolist() for call in calls] == [[1, 2], [2, 3]]


def test_the_known_call_is_kept_as_it_was() -> None:
    """Whatever is written into its arguments and outputs later; and a call that does not read the state is made."""
    net, recorder = Net(), Recorder()
    cond, outputs = normal(2, 4), list[torch.Tensor]()
    before = cond.clone()

    def step(x: torch.Tensor, call: Any) -> Any:
        out = call(x, cond=cond)[0]
        outputs.append(out)
        aside, _ = call(torch.ones(2, 3), cond=cond)
        assert torch.equal(aside, net(torch.ones(2, 3), cond=cond)[0])
        other, _ = call(torch.ones(1, 3))
        assert torch.equal(other, net(torch.ones(1, 3))[0])
        return x, out + aside

    program = recorded(step, net, normal(2, 3), recorder)
    cond.zero_()
    assert torch.equal(outputs[0], torch.zeros(2, 3))  # a stand-in
    (reference,) = recorder.references.values()
    assert torch.equal(reference.leaves[0], normal(2, 3))
    assert torch.equal(reference.leaves[1], before)
    assert torch.equal(reference.outputs[0], torch.tanh(normal(2, 3)) * 0.5 + before.mean())
    assert sum(isinstance(one, Call) for one in program.operations) == 1


def test_calls_before_the_first_step_are_made_and_tell_the_form() -> None:
    net, recorder = Net(), Recorder()
    for x in (normal(2, 3), OTHER):
        got, _ = recorder.call(net, net.forward, (x,), {})
        assert torch.equal(got, torch.tanh(x) * 0.5)
    program = recorded(lambda x, call: (x, call(x)[0]), net, normal(2, 3), recorder)
    assert len(net.seen) == 2
    (reference,) = recorder.references.values()
    assert torch.equal(reference.leaves[0], normal(2, 3))  # of the first
    assert len(program.operations) == 1


def test_a_network_may_do_anything_inside() -> None:
    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand(()) + float(x.numpy().max()) + (1 if x.sum().item() > 0 else 0)

    for _ in range(2):
        program = recorded(lambda x, call: (x, call(2 * x)), Odd(), normal(2, 3))
        assert len(program.operations) == 2


KEPT: dict[str, Any] = {}


def keeps(name: str) -> Any:
    def step(x: torch.Tensor, call: Any) -> Any:
        out = call(x)[0]
        KEPT.update(value=2 * x, output=out, made=(out + 1).max(dim=0).values)
        return x, out

    def uses(x: torch.Tensor, call: Any) -> Any:
        return x, call(x)[0] + KEPT[name]

    return step, uses


@pytest.mark.parametrize(
    ("name", "message"), [("value", capture.KEPT), ("output", capture.PREDICTED), ("made", capture.PREDICTED)]
)
def test_what_an_earlier_step_computed_is_told_from_what_a_network_gave(name: str, message: str) -> None:
    net, recorder = Net(), Recorder()
    step, uses = keeps(name)
    recorded(step, net, normal(2, 3), recorder)
    with pytest.raises(PipelineNotParallelError) as told:
        recorded(uses, net, normal(2, 3), recorder)
    assert str(told.value) == message
    KEPT.clear()
    assert float(normal(2, 3).sum()) == float(normal(2, 3).sum().numpy())  # nothing is listened to any more


def test_what_the_scheduler_returns_besides_the_state() -> None:
    net, recorder = Net(), Recorder()
    state, clean = normal(2, 3), normal(2, 3, seed=1)
    recorder.begin(state, [clean, state])
    x, m = state, recorder.call(net, net.forward, (state,), {})[0]
    assert (recorder.finish(x, m).x, recorder.program) == (0, None)  # the state itself may be among them
    recorder.begin(normal(2, 3), [])
    with pytest.raises(PipelineNotParallelError) as told:
        recorder.call(net, net.forward, (clean,), {})
    recorder.close()
    assert str(told.value) == capture.SCHEDULED


def deciding(x: torch.Tensor, call: Any) -> Any:
    return x, call(x if float(x.sum()) > 0 else -x)[0]


def drawing(x: torch.Tensor, call: Any) -> Any:
    return x, call(torch.rand_like(x) + x)[0]


def dropping(x: torch.Tensor, call: Any) -> Any:
    return x, call(torch.nn.functional.dropout(x))[0]


def writing(x: torch.Tensor, call: Any) -> Any:
    return x, call(torch.zeros(2, 3).add_(x))[0]


def writing_out(x: torch.Tensor, call: Any) -> Any:
    torch.neg(x, out=MADE_BEFORE)
    return x, call(MADE_BEFORE)[0]


def leaving(x: torch.Tensor, call: Any) -> Any:
    return x, call(torch.from_numpy((2 * x).numpy()))[0]


def listed(x: torch.Tensor, call: Any) -> Any:
    return x, call(torch.tensor(x.tolist()))[0]


MADE_BEFORE = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (deciding, "decides by the values of the state"),
        (dropping, "draws random numbers outside scheduler.step"),
        (writing, "writes the state into a tensor made before"),
        (writing_out, "writes the state into a tensor made before"),
        (leaving, r"takes values of the state out of torch \(numpy\)"),
        (listed, r"takes values of the state out of torch \(tolist\)"),
        (lambda x, call: (x, torch.ones(2, 3)), "the model_output given to scheduler.step is not computed from"),
        (lambda x, call: (torch.ones(2, 3), call(x)[0]), "the sample given to scheduler.step is not computed from"),
    ],
)
def test_what_cannot_be_recorded(step: Any, message: str) -> None:
    with pytest.raises(PipelineNotParallelError, match=message):
        recorded(step, Net(), normal(2, 3))
    normal(2, 3).numpy().tolist()


@pytest.mark.parametrize(("count", "refused"), [(3, False), (4, True)])
def test_a_step_of_too_many_operations(count: int, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "MOST_OPERATIONS", 3)

    def step(x: torch.Tensor, call: Any) -> Any:
        for _ in range(count):
            x = x + 1
        return x, x

    if refused:
        with pytest.raises(PipelineNotParallelError, match="more than 3 operations between two steps"):
            recorded(step, Net(), normal(2, 3))
    else:
        assert len(recorded(step, Net(), normal(2, 3)).operations) == count
