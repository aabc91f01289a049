"""The look whether recorded steps are what a loop does: which steps, against what, and for which calls it holds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers")
import torch

from parasolver_adapters.diffusers import PipelineNotParallelError
from parasolver_adapters.diffusers.passes import checking
from parasolver_adapters.diffusers.passes.checking import (
    Check,
    _are_alike,
    causes,
    keep_checked,
    kind_of_call,
    other_state,
    steps_to_check,
    was_checked,
)
from parasolver_adapters.diffusers.passes.first_pass import CaptureDone
from parasolver_adapters.diffusers.recording.capture import Recorder
from parasolver_adapters.diffusers.recording.programs import Operation, Program, Ref
from tests.adapters.recorded_steps import Net, Step, normal, recorded

MUL, ADD = torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor


def program(function: Any = MUL, number: Any = 2.0, x: int = 0, m: int = 1) -> Program:
    return Program([Operation(function, (Ref(0), number), {}, (0,), 1)], size=2, x=x, m=m)


def test_the_first_and_last_step_of_each_structure_are_looked_at() -> None:
    def chosen(*kinds: Any) -> set[int]:
        return steps_to_check([program(*kind) if isinstance(kind, tuple) else program(kind) for kind in kinds])

    assert chosen(MUL) == {1}
    assert chosen(MUL, (MUL, 3.0), (MUL, 4.0)) == {1, 3}  # numbers are no structure
    assert chosen(MUL, ADD, MUL, MUL, ADD) == {1, 2, 4, 5}
    lengths = [Program([*program().operations] * count, size=2, m=1) for count in (1, 2, 3, 4, 5)]
    assert len(steps_to_check(lengths * 2)) == checking.MOST_STEPS == 8
    assert steps_to_check([*lengths, lengths[4], lengths[4]]) >= {5, 7}  # the most common first
    assert steps_to_check([program(), program(m=0), program(x=1)]) == {1, 2, 3}


def test_another_state_has_no_value_where_it_was() -> None:
    state = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    torch.testing.assert_close(other_state(state), torch.tensor([[3.6, 0.9], [1.8, 2.7]]))


class Loop:
    """A loop of one network, as a pipeline would drive it, and its capture."""

    def __init__(self, steps: list[Step], state: torch.Tensor, net: Any = None) -> None:
        self.net, self.steps = net or Net(), steps
        self.recorder = Recorder()
        programs = [recorded(step, self.net, state, self.recorder) for step in steps]
        self.capture: Any = SimpleNamespace(
            programs=programs, prelude=[], forwards={id(self.net): self.net.forward}, recorder=self.recorder,
            start=normal(2, 3, seed=4), first=normal(2, 3, seed=5), scheduler=SimpleNamespace(), options={},
        )  # fmt: skip
        self.pipe = SimpleNamespace(components={"unet": self.net})

    def checked(self, really: list[Step] | None = None) -> tuple[Check, list[int], list[Any]]:
        """A pass over the loop: which steps the scheduler made, and the outputs that it was given."""
        check, made, given = Check(self.pipe, self.capture), list[int](), list[Any]()
        assert not check.begun
        state = self.capture.start

        def scheduled(**options: Any) -> Any:
            made.append(len(made))
            given.append(options["model_output"])
            return (options["sample"] * 0.5 + options["model_output"],)

        def call(*args: Any, **kwargs: Any) -> Any:
            return check.network(self.net, self.net.forward, args, kwargs)

        (state,) = check.step(None, scheduled, {"sample": state, "model_output": normal(2, 3, seed=6)})
        assert check.begun
        try:
            for step in really or self.steps:
                x, m = step(state, call)
                (state,) = check.step(None, scheduled, {"sample": x, "model_output": m})
        except CaptureDone:
            made.append(-1)
        return check, made, given


def plain(factor: float = 2.0) -> Step:
    return lambda x, call: (x, call(x * factor)[0] - 0.1 * x)


def inpainting(x: torch.Tensor, call: Any) -> Any:
    x = x * torch.tensor([0.0, 1.0, 1.0])
    return x, call(x)[0]


@pytest.mark.parametrize("steps", [[plain()] * 3, [plain(), inpainting, plain(3.0)], [inpainting] * 2])
def test_a_loop_that_does_what_was_recorded(steps: list[Step]) -> None:
    loop = Loop(steps, normal(2, 3))
    loop.net.seen.clear()
    _, made, given = loop.checked()
    assert made[-1] == -1
    assert made[:-1] == list(range(len(steps)))  # the last is left before the scheduler's step
    assert all(torch.equal(m, loop.capture.first) for m in given)


def test_between_the_steps_that_are_looked_at_networks_are_not_called() -> None:
    loop = Loop([plain()] * 4, normal(2, 3))
    loop.net.seen.clear()
    loop.checked()
    assert [len(x) for x, *_ in loop.net.seen] == [2, 2, 4, 2]  # in the first and in the last, alone, and again


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda x, call: (x, call(x * 2)[0] - 0.1001 * x),
            "step 2 as it was recorded gives scheduler.step a model_output",
        ),
        (
            lambda x, call: (x * 1.01, call(x * 2)[0] - 0.1 * x),
            "step 2 as it was recorded gives scheduler.step a sample",
        ),
        (lambda x, call: (x, call(x * 2.01)[0] - 0.1 * x), "step 2 as it was recorded calls Net with arguments"),
        (lambda x, call: (x, call(x * 2)[0] * torch.nan), "is off by"),
    ],
)
def test_a_loop_that_does_something_else(wrong: Step, message: str) -> None:
    loop = Loop([plain()] * 2, normal(2, 3))
    with pytest.raises(PipelineNotParallelError, match=message):
        loop.checked([plain(), wrong])
    loop.checked([plain(), lambda x, call: (x, call(x * 2)[0] - (0.1 + 1e-8) * x)])  # but for rounding


class ByRows(Net):
    def forward(self, x: torch.Tensor, t: Any = 0.0, cond: Any = None, flag: Any = None) -> Any:
        out, flag = super().forward(x, t)
        return (out if cond is None else out + cond), flag


def test_a_call_is_known_by_all_of_its_arguments() -> None:
    def step(x: torch.Tensor, call: Any) -> Any:
        return x, call(x, cond=2 * x)[0]

    loop = Loop([step], normal(2, 3), ByRows())
    loop.checked()
    with pytest.raises(PipelineNotParallelError, match="with arguments that the real loop does not give it"):
        loop.checked([lambda x, call: (x, call(x, cond=3 * x)[0])])


def test_a_kind_of_call_that_the_first_round_does_not_compare_is_looked_at_in_a_batch() -> None:
    class Mixing(torch.nn.Module):
        def forward(self, x: torch.Tensor, more: Any = None) -> Any:
            return (x - x.mean(0) if len(x) > 2 and more is not None else x, None)

    def two(x: torch.Tensor, call: Any) -> Any:
        return x, call(x)[0] + call(2 * x, more=1.0)[0]

    rows = Loop([plain(), lambda x, call: (x, call(x)[0] + call(2 * x, cond=x)[0])], normal(2, 3), ByRows())
    rows.net.seen.clear()
    rows.checked()
    assert [len(x) for x, *_ in rows.net.seen] == [
        2,
        2,
        2,
        6,
        4,
        2,
        2,
    ]  # with it two known calls; all again
    loop = Loop([plain(), two], normal(2, 3), Mixing())
    with pytest.raises(PipelineNotParallelError, match="Mixing gives other values in a batch of several steps"):
        loop.checked()


def test_calls_before_the_loop_are_answered_as_before() -> None:
    loop = Loop([plain()], normal(2, 3))
    check = Check(loop.pipe, loop.capture)
    check._prelude = SimpleNamespace(answer=lambda *given: given)  # type: ignore[assignment]
    assert check.network(loop.net, "forward", 1, 2) == (loop.net, "forward", 1, 2)  # type: ignore[arg-type]


def kind_of(pipe: Any = None, given: Any = None, loop: Loop | None = None, **changes: Any) -> str:
    loop = loop or Loop([plain()], normal(2, 3), NET)
    vars(loop.capture).update(changes)
    return kind_of_call(pipe or SimpleNamespace(components={"unet": NET}, setting=1.5), loop.capture, given or {})


NET = Net()


def test_calls_are_of_one_kind_where_their_loops_do_the_same() -> None:
    base = kind_of()
    assert kind_of() == base
    assert kind_of(given={"callback": 1, "callback_on_step_end": print}) == base
    with_prompt = kind_of(given={"prompt": "a", "n": 1, "x": torch.ones(2), "y": np.ones(2)})
    assert with_prompt == kind_of(given={"prompt": "b", "n": 1, "x": torch.zeros(2), "y": np.zeros(2)})
    generators = [kind_of(given={"generator": torch.Generator().manual_seed(seed)}) for seed in (1, 2)]
    assert generators[0] == generators[1]
    others = [
        with_prompt,
        generators[0],
        kind_of(given={"prompt": None, "n": 1, "x": torch.ones(2), "y": np.ones(2)}),
        kind_of(given={"prompt": "a", "n": 2, "x": torch.ones(2), "y": np.ones(2)}),
        kind_of(given={"prompt": "a", "n": 1, "x": torch.ones(3), "y": np.ones(2)}),
        kind_of(given={"prompt": "a", "n": 1, "x": torch.ones(2), "y": np.ones(3)}),
        kind_of(given={"prompt": "a", "n": 1, "x": torch.ones(2).double(), "y": np.ones(2)}),
        kind_of(SimpleNamespace(components={"unet": NET}, setting=2.5)),
        kind_of(SimpleNamespace(components={"unet": NET, "other": NET}, setting=1.5)),
        kind_of(loop=Loop([plain(3.0)], normal(2, 3), NET)),
        kind_of(loop=Loop([plain(), plain()], normal(2, 3), NET)),
        kind_of(scheduler=1),
        kind_of(options={"eta": 1.0}),
        kind_of(start=normal(3, 3)),
    ]
    pipe = SimpleNamespace(components={"unet": NET}, setting=1.5)
    hook = NET.register_forward_hook(lambda *given: None)
    others.append(kind_of())
    hook.remove()
    NET.eval()
    others.append(kind_of())
    NET.train()
    with torch.no_grad():
        others.append(kind_of())
    with torch.inference_mode():
        others.append(kind_of())
    with torch.autocast("cpu"):
        others.append(kind_of())
    assert kind_of(pipe) == base
    pipe.scheduler = 3  # what it is made of is in the capture
    assert kind_of(pipe) == base
    assert len({base, *others}) == 1 + len(others)


def test_what_is_told_of_a_value() -> None:
    one, other = Net(), Net()
    assert checking._described(Ref(3)) == 3
    assert checking._described(one) == checking._described(one) != checking._described(other)
    assert checking._described(torch.Generator()) == "Generator"
    assert [checking._described(value) for value in (True, 2.5, "a", None)] == [True, 2.5, "a", None]
    assert checking._described(torch.ones(2, 3)) == ((2, 3), torch.float32)
    assert (checking._wiring(Ref(3)), checking._wiring(3)) == (3, None)


def test_what_was_checked_is_kept_for_its_pipeline() -> None:
    class Pipe:
        pass

    pipe, other = Pipe(), Pipe()
    assert not was_checked(pipe, "a")
    keep_checked(pipe, "a")
    keep_checked(pipe, "b")
    assert was_checked(pipe, "a")
    assert was_checked(pipe, "b")
    assert not was_checked(pipe, "c")
    assert not was_checked(other, "a")
    keep_checked([], "a")  # which cannot be a key
    assert was_checked([], "a") is False


def test_what_a_recording_may_not_show_is_told_with_the_likely_cause() -> None:
    class Own:
        pass

    class AttnProcessor:
        __module__ = "diffusers.models.attention_processor"

    net: Any = Net()
    pipe = SimpleNamespace(components={"unet": net})
    assert "network, by a hook or an attention processor, a gradient" in causes(pipe)
    net.attn_processors = {"a": AttnProcessor()}
    assert "network, by a hook or an attention processor, a gradient" in causes(pipe)
    net.attn_processors = {"a": AttnProcessor(), "b": Own()}
    assert "network (attention processors Own), a gradient" in causes(pipe)
    net.register_forward_hook(lambda *given: None)
    assert "network (hooks on Net; attention processors Own), a gradient" in causes(pipe)
    several = torch.nn.Sequential(*[torch.nn.ReLU() for _ in range(6)])
    for part in several:
        part.register_forward_hook(lambda *given: None)
    assert "(hooks on 0, 1, 2, 3)" in causes(SimpleNamespace(components={"unet": several}))


def test_arguments_are_alike_but_for_rounding() -> None:
    x = torch.tensor([1.0, 2.0])
    assert _are_alike(x, x + 1e-7)
    assert not _are_alike(x, x * 1.001)
    assert _are_alike(torch.tensor([1]), torch.tensor([1]))
    assert not _are_alike(torch.tensor([1]), torch.tensor([2]))
    assert _are_alike(2.5, 2.5)
    assert not _are_alike(2.5, 3.5)
    assert _are_alike(object(), object())
    assert not _are_alike("a", "b")
