"""Recorded steps of a loop, and how they are run again."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import TreeSpec

from parasolver_adapters.diffusers.recording.standins import dense
from parasolver_adapters.diffusers.refusal import PipelineNotParallelError


@dataclass(frozen=True)
class Ref:
    """Stands for a value that a program computes."""

    index: int


@dataclass(frozen=True, eq=False)
class Operation:
    """``results = function(*args, **kwargs)``, with :class:`Ref` for values that depend on the state."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[int, ...]
    results: int | list[int | None] | None


@dataclass(frozen=True)
class Autocast:
    """Whether a network is called with autocast, on the device of its arguments."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, leaves: Iterable[Any]) -> Autocast | None:
        """As it is for a call with these arguments; None on a device without it."""
        device = next((leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)), "cpu")
        if not torch.amp.is_autocast_available(device):
            return None
        return cls(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))

    def again(self) -> Any:
        """A context in which it is so."""
        return torch.autocast(self.device, self.dtype, self.enabled)


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a network.

    Args:
        module: the network.
        leaves: its arguments, flattened, with :class:`Ref` for values that depend on the state.
        spec: how to put them together again.
        rows: the number of rows of the batch that it was given.
        batched: which of the leaves hold one row for each of those.
        signature: equal for calls that can be made as one.
        reads: the values among the arguments.
        results: numbers of the tensors in its output.
        autocast: under which it is made.
    """

    module: torch.nn.Module
    leaves: list[Any]
    spec: TreeSpec
    rows: int
    batched: tuple[bool, ...]
    signature: tuple[Any, ...]
    reads: tuple[int, ...]
    results: list[int]
    autocast: Autocast | None = None


@dataclass(eq=False)
class Program:
    """One step of a loop: from the state to ``(x, m)``, the ``sample`` and ``model_output`` of ``scheduler.step``.

    ``x`` is the state itself (number 0) unless the loop changes it between two steps, as inpainting does. ``dtype`` is
    that of the state, which need not be that of the first: some schedulers return their network's.
    """

    operations: list[Operation | Call] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    size: int = 1
    x: int = 0
    m: int = -1
    mutates: bool = False

    def new(self) -> int:
        """A number for one more value; 0 is the state."""
        self.size += 1
        return self.size - 1

    def run(self, state: torch.Tensor) -> Generator[tuple[Call, list[Any]], list[Any], tuple[Any, Any]]:
        """Repeat the step from another state: yields each network call with its arguments, and is sent the output.

        Returns ``(x, m)``; None for x where it is the state.
        """
        values: list[Any] = [None] * self.size
        values[0] = dense(state.to(self.dtype, copy=self.mutates))
        for operation in self.operations:
            if isinstance(operation, Call):
                leaves = [values[leaf.index] if isinstance(leaf, Ref) else leaf for leaf in operation.leaves]
                outputs = yield operation, leaves
                for index, output in zip(operation.results, outputs, strict=True):
                    values[index] = output
                continue
            perform(operation, values)
        return values[self.x] if self.x else None, values[self.m]

    def calls(self, form: Any) -> bool:
        """Whether the step calls a network in this form."""
        return any(isinstance(operation, Call) and operation.signature[0] == form for operation in self.operations)

    def sample(self, state: torch.Tensor) -> torch.Tensor | None:
        """The ``x`` that the step makes of a state without its networks; None if it depends on what they say."""
        values: list[Any] = [None] * self.size
        values[0] = dense(state.to(self.dtype, copy=self.mutates))
        for operation in self.operations:
            if not isinstance(operation, Call) and all(values[number] is not None for number in operation.reads):
                perform(operation, values)
        return values[self.x]

    def prune(self) -> None:
        """Forget operations whose results nobody reads, unless some are done in place."""
        if self.mutates:
            return
        needed, kept = {self.x, self.m}, []
        for operation in reversed(self.operations):
            if needed.isdisjoint(indices_of(operation.results)):
                continue
            kept.append(operation)
            needed.update(operation.reads)
        self.operations = kept[::-1]


def perform(operation: Any, values: list[Any]) -> None:
    """Repeat a recorded operation on these values, which its results join."""
    try:
        result = operation.function(*_resolve(operation.args, values), **_resolve(operation.kwargs, values))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise PipelineNotParallelError(
            f"an operation of the loop cannot be repeated with other values ({operation.function}): {error}"
        ) from error
    keep(operation, result, values)


def keep(operation: Operation, result: Any, values: Any) -> None:
    """Put what an operation gave under its numbers."""
    if isinstance(operation.results, int):
        values[operation.results] = result
    elif operation.results is not None:
        for index, part in zip(operation.results, result, strict=True):
            if index is not None:
                values[index] = part


_NESTED = (Ref, tuple, list, dict)


def _resolve(value: Any, values: Sequence[Any]) -> Any:
    kind = type(value)
    if kind is Ref:
        return values[value.index]
    if kind is tuple or kind is list:
        return kind([_resolve(item, values) if type(item) in _NESTED else item for item in value])
    if kind is dict:
        return {key: _resolve(item, values) for key, item in value.items()}
    return value


def indices_of(results: Any) -> set[int]:
    return {results} if isinstance(results, int) else {number for number in results or () if number is not None}
