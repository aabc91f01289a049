"""What a pipeline's loop does between two steps of its scheduler, recorded once and run again at will.

A pipeline's loop turns the state ``x_i`` into inputs of the network (scaling, doubling for guidance, masks, packing),
and the network's outputs into the ``m_i`` that it gives to ``scheduler.step`` (guidance, rescaling, dropping the
learned variance). None of that is written down here. One pass of the loop is watched: every tensor operation that
depends on the state is kept with its arguments, and calls of the pipeline's networks become calls to be made later. A
recorded step is a :class:`Program`; running it repeats the pipeline's own operations, whatever they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

MOST_OPERATIONS = 2000  # of one step outside the networks; more means that a network is being recorded
UNBATCHED = ("img_ids", "txt_ids", "rotary")  # arguments of these names hold one row a token, never one a sample
FRAMED = ("encoder_hidden_states", "residual")  # those may hold a row for each frame of each sample, as AnimateDiff's


class PipelineNotParallelError(RuntimeError):
    """The pipeline cannot be sampled in parallel as it is called; the message says why."""


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
    """

    module: torch.nn.Module
    leaves: list[Any]
    spec: TreeSpec
    rows: int
    batched: tuple[bool, ...]
    signature: tuple[Any, ...]
    reads: tuple[int, ...]
    results: list[int]


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
        values[0] = state.to(self.dtype, copy=self.mutates)
        for operation in self.operations:
            if isinstance(operation, Call):
                leaves = [values[leaf.index] if isinstance(leaf, Ref) else leaf for leaf in operation.leaves]
                outputs = yield operation, leaves
                for index, output in zip(operation.results, outputs, strict=True):
                    values[index] = output
                continue
            result = operation.function(*_resolve(operation.args, values), **_resolve(operation.kwargs, values))
            if isinstance(operation.results, int):
                values[operation.results] = result
            elif operation.results is not None:
                for index, one in zip(operation.results, result, strict=True):
                    if index is not None:
                        values[index] = one
        return values[self.x] if self.x else None, values[self.m]

    def prune(self) -> None:
        """Forget operations whose results nobody reads, unless some are done in place."""
        if self.mutates:
            return
        needed, kept = {self.x, self.m}, []
        for operation in reversed(self.operations):
            if needed.isdisjoint(_indices(operation.results)):
                continue
            kept.append(operation)
            needed.update(operation.reads)
        self.operations = kept[::-1]


@dataclass(frozen=True, eq=False)
class Reference:
    """A call that was really made, to learn the form of a network's output; batches are compared with it."""

    leaves: list[Any]
    outputs: list[Any]
    spec: TreeSpec


class Recorder(TorchDispatchMode):
    """Records what is done with the state between :meth:`begin` and :meth:`finish`, one :class:`Program` a step.

    Networks are really called before the first :meth:`begin`, and after it only where the form of their output is not
    known yet.
    """

    def __init__(self) -> None:
        super().__init__()
        self.program: Program | None = None
        self.references: dict[tuple[Any, ...], Reference] = {}
        self.extra_calls = 0
        self._own: dict[int, tuple[torch.Tensor, int]] = {}  # this step's values by their id, with their numbers
        self._earlier: Any = WeakTensorKeyDictionary()  # those of earlier steps that the loop still holds
        self._constants: dict[tuple[Any, ...], Any] = {}

    def begin(self, state: torch.Tensor, others: Iterable[torch.Tensor]) -> None:
        """Record from here: a step has returned ``state``, and ``others`` that only the next step may use."""
        self.program = Program(dtype=state.dtype)
        self._own = {id(state): (state, 0)}
        for other in others:
            if other is not state:
                self._earlier[other] = True
        self.__enter__()

    def finish(self, x: torch.Tensor, m: torch.Tensor) -> Program:
        """Stop: the loop calls the next step with these. What was recorded since :meth:`begin`."""
        program = self.program
        assert program is not None
        for name, value in (("sample", x), ("model_output", m)):
            if id(value) not in self._own:
                raise PipelineNotParallelError(
                    f"the {name} given to scheduler.step is not computed from the state by tensor operations"
                )
        program.x, program.m = self._own[id(x)][1], self._own[id(m)][1]
        self.close()
        program.prune()
        return program

    def close(self) -> None:
        """Stop recording."""
        if self.program is None:
            return
        self.program = None
        self.__exit__(None, None, None)
        values = [weakref.ref(tensor) for tensor, _ in self._own.values()]
        self._own = {}  # held until here, as an id is another tensor's as soon as it is free
        self._earlier.update((tensor, True) for value in values if (tensor := value()) is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.program is None:
            return func(*args, **kwargs)
        reads: list[int] = []
        own_args, own_kwargs = self._refs(args, reads), self._refs(kwargs, reads)
        if not reads:
            return func(*args, **kwargs)
        mutates = self._check(func, args, kwargs)
        result = func(*args, **kwargs)
        program = self.program
        if len(program.operations) >= MOST_OPERATIONS:
            raise PipelineNotParallelError(
                f"more than {MOST_OPERATIONS} operations between two steps; the network has to be a component of the "
                "pipeline, called by its forward"
            )
        program.mutates |= mutates
        results: int | list[int | None] | None = None
        if isinstance(result, torch.Tensor):
            results = self._number(result)
        elif isinstance(result, (tuple, list)):
            results = [self._number(one) if isinstance(one, torch.Tensor) else None for one in result]
        program.operations.append(Operation(func, own_args, own_kwargs, tuple(reads), results))
        return result

    def call(self, module: torch.nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """In the place of a network's forward."""
        leaves, spec = tree_flatten((args, kwargs))
        reads: list[int] = []
        refs = self._refs(leaves, reads) if self.program is not None else leaves
        if self.program is not None and not reads:
            return forward(*args, **kwargs)
        key = form_of_call(module, kwargs, leaves)
        if key not in self.references:
            self.extra_calls += self.program is not None
            with self._outside():
                output = forward(*args, **kwargs)
            self.references[key] = Reference(leaves, *tree_flatten(output))
            if not reads:
                return output
        elif not reads:
            return forward(*args, **kwargs)
        return self._record_call(module, refs, spec, leaves, kwargs, key, tuple(reads))

    @contextmanager
    def _outside(self) -> Iterator[None]:
        """While active: nothing is seen."""
        if self.program is None:
            yield
            return
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def _record_call(
        self,
        module: torch.nn.Module,
        refs: list[Any],
        spec: TreeSpec,
        leaves: list[Any],
        kwargs: Any,
        key: tuple[Any, ...],
        reads: tuple[int, ...],
    ) -> Any:
        program, reference = self.program, self.references[key]
        assert program is not None
        rows = next(leaf.shape[0] for leaf, ref in zip(leaves, refs, strict=True) if isinstance(ref, Ref) and leaf.ndim)
        names = _names(leaves, spec, kwargs)
        batched = tuple(_is_batched(leaf, rows, name) for leaf, name in zip(leaves, names, strict=True))
        own, rest = [], []
        for at, (ref, leaf, by_rows) in enumerate(zip(refs, leaves, batched, strict=True)):
            constant = ref if isinstance(ref, Ref) else self._intern((key, at), leaf)
            own.append(constant)
            if isinstance(leaf, torch.Tensor):
                rest.append(None if by_rows else id(constant))
            else:
                rest.append(leaf if _hashable(leaf) else id(leaf))
        outputs = [_zeros(leaf) for leaf in reference.outputs]
        results = [self._number(one) if isinstance(one, torch.Tensor) else program.new() for one in outputs]
        program.operations.append(Call(module, own, spec, rows, batched, (key, *rest), reads, results))
        return tree_unflatten(outputs, reference.spec)

    def _intern(self, key: tuple[Any, ...], leaf: Any) -> Any:
        """The same object as in earlier steps for an equal tensor, so that conditioning is kept once."""
        if not isinstance(leaf, torch.Tensor) or leaf.ndim <= 1:
            return leaf
        known = self._constants.get(key)
        if known is not None and (known is leaf or torch.equal(known, leaf)):
            return known
        self._constants[key] = leaf
        return leaf

    def _number(self, tensor: torch.Tensor) -> int:
        assert self.program is not None
        index = self.program.new()
        self._own[id(tensor)] = tensor, index
        return index

    def _refs(self, value: Any, reads: list[int]) -> Any:
        """The argument with :class:`Ref` in place of values that depend on the state, whose numbers join ``reads``."""
        if isinstance(value, torch.Tensor):
            own = self._own.get(id(value))
            if own is not None:
                reads.append(own[1])
                return Ref(own[1])
            if value in self._earlier:
                raise PipelineNotParallelError(
                    "a step of the loop uses what an earlier step computed, besides the state (momentum, a cache, or "
                    "the predicted clean sample)"
                )
        elif type(value) is tuple or type(value) is list:
            return type(value)([self._refs(one, reads) for one in value])
        elif type(value) is dict:
            return {key: self._refs(one, reads) for key, one in value.items()}
        return value

    def _check(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Refuse what cannot be repeated; whether the operation works in place on values that depend on the state."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise PipelineNotParallelError(f"the loop draws random numbers outside scheduler.step ({func})")
        if torch.Tag.data_dependent_output in func.tags:
            raise PipelineNotParallelError(f"the loop decides by the values of the state ({func})")
        mutates = False
        for at, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            target = args[at] if at < len(args) else kwargs.get(argument.name)
            if isinstance(target, torch.Tensor) and id(target) not in self._own:
                raise PipelineNotParallelError(f"the loop writes the state into a tensor made before ({func})")
            mutates = True
        return mutates


_NESTED = (Ref, tuple, list, dict)


def _resolve(value: Any, values: Sequence[Any]) -> Any:
    kind = type(value)
    if kind is Ref:
        return values[value.index]
    if kind is tuple or kind is list:
        return kind([_resolve(one, values) if type(one) in _NESTED else one for one in value])
    if kind is dict:
        return {key: _resolve(one, values) for key, one in value.items()}
    return value


def _indices(results: Any) -> set[int]:
    return {results} if isinstance(results, int) else {one for one in results or () if one is not None}


def form_of_call(module: torch.nn.Module, kwargs: dict[str, Any], leaves: Iterable[Any]) -> tuple[Any, ...]:
    """Equal for calls whose outputs are of one form."""
    return (id(module), *kwargs, *map(_form, leaves))


def _form(leaf: Any) -> Any:
    """What decides about the form of a network's output."""
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.dtype
    return leaf if isinstance(leaf, (bool, str)) else type(leaf)


def _zeros(leaf: Any) -> Any:
    return torch.zeros_like(leaf) if isinstance(leaf, torch.Tensor) else leaf


def _hashable(leaf: Any) -> bool:
    return isinstance(leaf, (bool, int, float, str, type(None), torch.dtype))


def _names(leaves: list[Any], spec: TreeSpec, kwargs: dict[str, Any]) -> list[str]:
    """The keyword under which each leaf was given, or nothing."""
    keyed = [name for name, value in kwargs.items() for _ in tree_leaves(value)]
    return [""] * (len(leaves) - len(keyed)) + keyed


def _is_batched(leaf: Any, rows: int, name: str) -> bool:
    """Whether an argument holds a row for each of the batch, or several, or is one number for all of them."""
    if not isinstance(leaf, torch.Tensor) or any(word in name for word in UNBATCHED):
        return False
    framed = leaf.ndim > 2 and leaf.shape[0] % rows == 0 and any(word in name for word in FRAMED)
    return framed or leaf.numel() == 1 or (leaf.ndim > 0 and leaf.shape[0] == rows)
