"""The recorded steps of several rows, run as one.

The steps of a round are mostly the same operations on other numbers. ``torch.vmap`` does each operation once, on values
that have one more axis in front, the rows; numbers in which the steps differ are stacked. So a round launches as many
operations as one step, whatever its rows. Where that fails, or gives other values than a step by itself, the rows are
run one after another.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from parasolver_adapters.diffusers.recording.agreement import apart, rounding
from parasolver_adapters.diffusers.recording.programs import Call, Operation, Program, Ref, indices_of, keep, perform
from parasolver_adapters.diffusers.recording.standins import dense
from parasolver_core.arrays import uploaded

Requests = list[tuple[Call, list[Any]]]
Outputs = Sequence[list[Any]]
_HALF = (torch.float16, torch.bfloat16)
_Stacked = dict[tuple[int, int], torch.Tensor]  # stacked numbers, by the operation and by their place in its arguments


@dataclass(frozen=True)
class Segment:
    """The operations between two network calls.

    Args:
        places: theirs, in the program.
        reads: values from before them.
        keeps: those of their results that are read after them.
    """

    places: range
    reads: tuple[int, ...]
    keeps: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Step:
    """A program with the arguments of its operations flattened; nothing for network calls."""

    program: Program
    leaves: list[list[Any]]
    specs: list[TreeSpec | None]

    @staticmethod
    def of(program: Program) -> Step:
        flat = [
            ([], None) if isinstance(operation, Call) else tree_flatten((operation.args, operation.kwargs))
            for operation in program.operations
        ]
        return Step(program, [leaves for leaves, _ in flat], [spec for _, spec in flat])


class Together:
    """Recorded steps, run one by one or several at once.

    Args:
        programs: the steps.
    """

    def __init__(self, programs: Sequence[Program]) -> None:
        self._steps = [Step.of(program) for program in programs]
        self._segments: dict[Any, list[Segment]] = {}
        self._kinds = [_kind(step) for step in self._steps]
        self._at_once: dict[tuple[Any, int], bool] = {}  # by kind and segment, once it has been tried

    def kind(self, number: int) -> Any:
        """Equal for steps that can be run at once."""
        return self._kinds[number]

    def run(
        self, numbers: Sequence[int], states: torch.Tensor
    ) -> Generator[Requests, Outputs, tuple[torch.Tensor | None, torch.Tensor]]:
        """Repeat steps of one kind from the states ``(rows, *state)``.

        Yields the network calls with their arguments, one of each row, and is sent their outputs. Returns ``(x, m)`` as
        :meth:`Program.run` does, with rows.
        """
        kind, steps = self._kinds[numbers[0]], [self._steps[number] for number in numbers]
        program = steps[0].program
        if program.mutates or len(steps) == 1:
            return (yield from _row_by_row([step.program for step in steps], states))
        if kind not in self._segments:
            self._segments[kind] = _segments(program)
        values: list[Any] = [None] * program.size
        values[0] = dense(states.to(program.dtype))
        for index, segment in enumerate(self._segments[kind]):
            if segment.places:
                for number, kept in zip(segment.keeps, self._done((kind, index), segment, steps, values), strict=True):
                    values[number] = kept
            if segment.places.stop == len(program.operations):
                break
            outputs = yield [
                (call, [values[leaf.index][row] if isinstance(leaf, Ref) else leaf for leaf in call.leaves])
                for row, call in enumerate(step.program.operations[segment.places.stop] for step in steps)
                if isinstance(call, Call)
            ]
            call = program.operations[segment.places.stop]
            assert isinstance(call, Call)
            for number, parts in zip(call.results, zip(*outputs, strict=True), strict=True):
                values[number] = torch.stack(parts) if isinstance(parts[0], torch.Tensor) else None
        return values[program.x] if program.x else None, values[program.m]

    def _done(self, key: Any, segment: Segment, steps: list[Step], values: list[Any]) -> list[torch.Tensor]:
        """What the segment gives, at once if that is right; looked at in the first and last row when it is tried."""
        known = self._at_once.get(key)
        kept: list[torch.Tensor] = []
        if known is not False:
            try:
                with nullcontext() if known else _warnings_raised():
                    kept = _run_at_once(segment, steps, values)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # an operation that cannot be batched; alone it may do, or says what is wrong with it
                self._at_once[key] = known = False
        if known is None:
            self._at_once[key] = known = all(
                apart(together[row], alone) <= rounding(alone.dtype)
                for row in (0, len(steps) - 1)
                for together, alone in zip(kept, _run_alone(segment, steps[row], values, row), strict=True)
            )
        if not known:
            rows = [_run_alone(segment, step, values, row) for row, step in enumerate(steps)]
            kept = [torch.stack(parts) for parts in zip(*rows, strict=True)]
        return kept


def _row_by_row(
    programs: list[Program], states: torch.Tensor
) -> Generator[Requests, Outputs, tuple[torch.Tensor | None, torch.Tensor]]:
    runs, sent = [program.run(state) for program, state in zip(programs, states, strict=True)], [None] * len(programs)
    ended: list[tuple[Any, Any]] = []
    while True:
        requests: Requests = []
        for run, outputs in zip(runs, sent, strict=True):
            try:
                requests.append(run.send(outputs))  # type: ignore[arg-type]
            except StopIteration as end:
                ended.append(end.value)
        if ended:
            xs, ms = zip(*ended, strict=True)
            return None if xs[0] is None else torch.stack(xs), torch.stack(ms)
        sent = yield requests


def _run_at_once(segment: Segment, steps: list[Step], values: list[Any]) -> list[torch.Tensor]:
    first = steps[0]

    def run(inputs: list[torch.Tensor], stacked: _Stacked) -> list[torch.Tensor]:
        local = dict(zip(segment.reads, inputs, strict=True))
        for place in segment.places:
            leaves = [local[leaf.index] if isinstance(leaf, Ref) else leaf for leaf in first.leaves[place]]
            scalar = False
            for at, leaf in enumerate(leaves):
                if (place, at) in stacked:
                    scalar |= leaf.ndim == 0 and leaf.device.type == "cpu"
                    leaves[at] = stacked[place, at]
            operation = first.program.operations[place]
            assert isinstance(operation, Operation)
            keep(operation, _applied(operation, leaves, first.specs[place], scalar), local)
        return [local[number] for number in segment.keeps]

    inputs = [values[number] for number in segment.reads]
    return torch.vmap(run)(inputs, _differing(segment, steps, inputs[0].device))


def _applied(operation: Operation, leaves: list[Any], spec: Any, scalar: bool) -> Any:
    """The result; numbers of the host are read in full where one step would read them so beside half precision."""
    half = next((leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dtype in _HALF), None)
    if not scalar or half is None:
        args, kwargs = tree_unflatten(leaves, spec)
        return operation.function(*args, **kwargs)
    wide = tree_map_only(torch.Tensor, lambda leaf: leaf.float() if leaf.dtype in _HALF else leaf, leaves)
    args, kwargs = tree_unflatten(wide, spec)
    result = operation.function(*args, **kwargs)
    return tree_map_only(torch.Tensor, lambda leaf: leaf.to(half) if leaf.dtype == torch.float32 else leaf, result)


def _differing(segment: Segment, steps: list[Step], device: torch.device) -> _Stacked:
    """The numbers in which the steps differ, ``(rows, ...)``, on the device."""
    found: _Stacked = {}
    for place in segment.places:
        for at, leaf in enumerate(steps[0].leaves[place]):
            if isinstance(leaf, torch.Tensor):
                parts = [step.leaves[place][at] for step in steps]
                if any(part is not leaf for part in parts):
                    found[place, at] = uploaded(torch, torch.stack(parts), device)  # type: ignore[arg-type]
    return found


def _run_alone(segment: Segment, step: Step, values: list[Any], row: int) -> list[torch.Tensor]:
    of_row: list[Any] = [None] * len(values)
    for number in segment.reads:
        of_row[number] = values[number][row]
    for place in segment.places:
        perform(step.program.operations[place], of_row)
    return [of_row[number] for number in segment.keeps]


@contextmanager
def _warnings_raised() -> Iterator[None]:
    """torch warns where it has no rule and takes the rows one by one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def _segments(program: Program) -> list[Segment]:
    operations = program.operations
    ends = [*(at for at, operation in enumerate(operations) if isinstance(operation, Call)), len(operations)]
    found, start = [], 0
    for end in ends:
        places = range(start, end)
        made = {number for at in places for number in indices_of(operations[at].results)}
        read = {number for at in places for number in operations[at].reads} - made
        later = {program.x, program.m, *(number for operation in operations[end:] for number in operation.reads)}
        found.append(Segment(places, tuple(sorted(read)), tuple(sorted(made & later))))
        start = end + 1
    return found


def _kind(step: Step) -> Any:
    """What is equal for steps that differ in numbers of tensors only; those that work in place have their own."""
    program = step.program
    parts: list[Any] = [program.x, program.m, program.dtype, id(program) if program.mutates else None]
    for operation, leaves in zip(program.operations, step.leaves, strict=True):
        if isinstance(operation, Call):
            parts.append((operation.signature[0], operation.spec, [_form(leaf) for leaf in operation.leaves]))
        else:
            parts.append(
                (str(operation.function), len(operation.args), [*operation.kwargs], [_form(leaf) for leaf in leaves])
            )
    return repr(parts)


def _form(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.device
    return leaf if isinstance(leaf, (Ref, bool, int, float, str, type(None), torch.dtype, torch.device)) else id(leaf)
