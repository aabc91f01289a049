"""Whether the recorded steps are what the loop really does: one more pass, once for a pipeline and a kind of call.

In the first pass the networks answer with zeros, so whatever the loop knows of them other than by their outputs
(features from inside, gradients, values that left torch, what an earlier step left behind) is wrong in the recorded
steps. In this pass the state of each step and all that came before it are others than in the first, and at some steps
the networks are really called, alone. What the loop then gives ``scheduler.step`` is compared with what the recorded
step makes of the same state and the same outputs. At the end these calls are made once more, as a round makes them: a
network that the loop changes between them (a hook, weights, a number that it reads) gives something else. It takes
place before the user's first callback.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from parasolver_adapters.diffusers.passes.changes import hooks_of, serial_of
from parasolver_adapters.diffusers.passes.first_pass import Capture, CaptureDone, Prelude
from parasolver_adapters.diffusers.passes.listening import Listener, networks_of, processors_of, with_state
from parasolver_adapters.diffusers.recording.agreement import apart, rounding
from parasolver_adapters.diffusers.recording.batching import Networks, compare_rows
from parasolver_adapters.diffusers.recording.capture import form_of_call
from parasolver_adapters.diffusers.recording.programs import Call, Program, Ref
from parasolver_adapters.diffusers.recording.standins import copies
from parasolver_adapters.diffusers.refusal import PipelineNotParallelError

MOST_STEPS = 8  # that are checked
_CHECKED: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()  # kinds of calls, by pipeline


class Check(Listener):
    """The pass that looks whether the recorded steps are right.

    Raises:
        PipelineNotParallelError: from the pipeline's call, if they are not.
    """

    def __init__(self, pipe: Any, capture: Capture) -> None:
        self._pipe, self._capture = pipe, capture
        self._steps = steps_to_check(capture.programs)
        self._prelude = Prelude(capture.prelude)
        self._networks = Networks(capture.forwards, capture.recorder.references)
        first = (operation for operation in capture.programs[0].operations if isinstance(operation, Call))
        self._batched = {call.signature for call in first if self._networks.reference(call) is not None}
        self._calls: list[tuple[Any, list[Any], list[Any]]] = []
        self._compared: list[list[tuple[Call, list[Any], list[Any]]]] = []  # of each step: arguments and outputs
        self._step, self._state, self._over = 0, capture.start, False

    @property
    def begun(self) -> bool:
        """Whether the loop has begun, and is not over."""
        return self._step > 0 and not self._over

    def network(self, module: torch.nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._step == 0:
            return self._prelude.answer(module, forward, args, kwargs)
        leaves = tree_leaves((args, kwargs))
        key = form_of_call(module, kwargs, leaves)
        if self._step not in self._steps:
            known = self._capture.recorder.references.get(key)
            return forward(*args, **kwargs) if known is None else tree_unflatten(copies(known.outputs), known.spec)
        arguments = copies(leaves)
        output = forward(*args, **kwargs)
        self._calls.append((key, arguments, copies(tree_leaves(output))))
        return output

    def step(self, scheduler: Any, step: Callable[..., Any], given: dict[str, Any]) -> Any:
        i = self._step
        if i in self._steps:
            self._compare(i, given["sample"], given["model_output"])
        if i == max(self._steps):
            self._over = True
            self._call_again()
            raise CaptureDone
        self._step, self._calls = i + 1, []
        given["model_output"] = self._capture.first
        output = step(**given)
        self._state = other_state(tree_leaves(output)[0].detach())
        return with_state(output, self._state.clone())

    @torch.no_grad()
    def _compare(self, i: int, x: torch.Tensor, m: torch.Tensor) -> None:
        """What the loop gives the scheduler, and what the recorded step does with the same network outputs."""
        program = self._capture.programs[i - 1]
        run, other, sent = program.run(self._state), program.run(other_state(self._state)), None
        self._compared.append([])
        while True:
            try:
                call, leaves = run.send(sent)  # type: ignore[arg-type]
            except StopIteration as end:
                repeated_x, repeated_m = end.value
                break
            outputs = self._made(i, call, leaves)
            arguments = [
                copies([leaf])[0] if isinstance(ref, Ref) else leaf
                for ref, leaf in zip(call.leaves, leaves, strict=True)
            ]
            self._compared[-1].append((call, arguments, copies(outputs)))
            others = other.send(sent and copies(sent))[1]  # type: ignore[arg-type]
            self._look_at_a_batch(call, leaves, others, outputs)
            sent = outputs
        pairs = {"sample": (self._state if repeated_x is None else repeated_x, x), "model_output": (repeated_m, m)}
        for name, (repeated, real) in pairs.items():
            off = apart(repeated, real)
            if not off <= rounding(real.dtype):
                raise self._failure(i, f"gives scheduler.step a {name} that is off by {off:.2g} of its size")

    def _made(self, i: int, call: Call, leaves: list[Any]) -> list[Any]:
        """The outputs of the loop's own call that this one stands for."""
        for at, (key, arguments, outputs) in enumerate(self._calls):
            if key == call.signature[0] and all(map(_are_alike, leaves, arguments)):
                del self._calls[at]
                return outputs
        raise self._failure(i, f"calls {type(call.module).__name__} with arguments that the real loop does not give it")

    @torch.no_grad()
    def _call_again(self) -> None:
        """The networks give what they gave in the loop, and at its first step."""
        for made in self._compared:
            again = self._networks.together([(call, arguments) for call, arguments, _ in made])
            for (call, _, outputs), rows in zip(made, again, strict=True):
                compare_rows(call, rows, outputs)

    def _look_at_a_batch(self, call: Call, leaves: list[Any], others: list[Any], outputs: list[Any]) -> None:
        """A kind of network call that the first round does not compare has to give the same in a batch as alone."""
        if call.signature in self._batched:
            return
        self._batched.add(call.signature)
        rows = self._networks.together([(call, leaves), (call, others)])[0]
        compare_rows(call, rows, outputs)

    def _failure(self, i: int, what: str) -> PipelineNotParallelError:
        return PipelineNotParallelError(
            f"step {i} as it was recorded {what}; {causes(self._pipe)}. Compute it from the networks' outputs and the "
            'state by operations of torch, or pass fallback="sequential"'
        )


def causes(pipe: Any) -> str:
    """What a loop may do that a recording does not show, the likely one first."""
    hooked = {name for network in networks_of(pipe).values() for name in hooks_of(network).values()}
    kinds = {type(processor) for _, processors in processors_of(pipe) for processor in processors.values()}
    foreign = {kind.__name__ for kind in kinds if not kind.__module__.startswith("diffusers.models.")}
    named = (("hooks on", hooked), ("attention processors", foreign))
    found = "; ".join(f"{what} {', '.join(sorted(names)[:4])}" for what, names in named if names)
    inside = f" ({found})" if found else ", by a hook or an attention processor"
    return (
        f"the loop may take features from inside a network{inside}, a gradient through it, values of the state out of "
        "torch, or something that an earlier step or call left behind"
    )


def was_checked(pipe: Any, kind: str) -> bool:
    try:
        return kind in _CHECKED.get(pipe, ())
    except TypeError:  # it cannot be a key
        return False


def keep_checked(pipe: Any, kind: str) -> None:
    try:
        _CHECKED.setdefault(pipe, set()).add(kind)
    except TypeError:
        return


def steps_to_check(programs: list[Program]) -> set[int]:
    """The first and the last step of each structure: what is switched on for a part of the steps has one of its own."""
    by_structure: dict[Any, list[int]] = {}
    for i, program in enumerate(programs, start=1):
        by_structure.setdefault(_structure(program), []).append(i)
    largest = sorted(by_structure.values(), key=len, reverse=True)
    return set([end for steps in largest for end in (steps[0], steps[-1])][:MOST_STEPS])


def other_state(state: torch.Tensor) -> torch.Tensor:
    """Another state of the same kind: no value at its place, and no extent as it was."""
    return torch.roll(state, 1) * 0.9


def kind_of_call(pipe: Any, capture: Capture, given: Mapping[str, Any]) -> str:
    """A name that is equal for calls whose loops do the same.

    In it: what was recorded of every step with the numbers in it, the scheduler, the arguments and the pipeline's own
    settings (numbers, words and switches; the forms of tensors; which objects), but for prompts and callbacks; the
    networks, their hooks and attention processors; and how torch is to compute. What is kept elsewhere is not.
    """
    networks = networks_of(pipe)
    arguments = {name: value for name, value in given.items() if not name.startswith("callback")}
    settings = {name: value for name, value in vars(pipe).items() if name != "scheduler"}
    parts = [
        [_structure(program, _described) for program in capture.programs],
        (_described(capture.start), type(capture.scheduler).__qualname__, _all(capture.options)),
        _all({name: value is None if "prompt" in name else value for name, value in arguments.items()}),
        _all(settings),
        [(name, serial_of(network), network.training, sorted(hooks_of(network))) for name, network in networks.items()],
        [[serial_of(processor) for processor in processors.values()] for _, processors in processors_of(pipe)],
        (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        [torch.is_autocast_enabled(device) for device in ("cuda", "cpu")],
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _all(values: Any) -> Any:
    leaves, form = tree_flatten(values)
    return [_described(leaf) for leaf in leaves], repr(form)


def _described(value: Any) -> Any:
    if isinstance(value, Ref):
        return value.index
    if isinstance(value, (bool, int, float, complex, str, type(None), torch.dtype, torch.device)):
        return value
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return tuple(value.shape), value.dtype
    if isinstance(value, torch.Generator) or type(value).__module__.startswith("PIL."):
        return type(value).__qualname__
    return serial_of(value)


def _wiring(value: Any) -> int | None:
    return value.index if isinstance(value, Ref) else None


def _structure(program: Program, described: Callable[[Any], Any] = _wiring) -> tuple[Any, ...]:
    """Which operations and network calls a step is made of."""
    parts: list[Any] = [program.x, program.m]
    for operation in program.operations:
        name, leaves = (
            (operation.signature[0], operation.leaves)
            if isinstance(operation, Call)
            else (str(operation.function), tree_leaves((operation.args, operation.kwargs)))
        )
        parts.append((name, tuple(map(described, leaves))))
    return tuple(parts)


def _are_alike(leaf: Any, known: Any) -> bool:
    """Whether two arguments of a network are the same, but for rounding."""
    if isinstance(leaf, torch.Tensor) and isinstance(known, torch.Tensor):
        return apart(leaf, known) <= rounding(known.dtype)
    return leaf == known if isinstance(leaf, (bool, int, float, str)) else True
