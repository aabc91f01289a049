"""What a pipeline's loop does between two steps of its scheduler, recorded once and run again at will.

A pipeline's loop turns the state ``x_i`` into inputs of the network (scaling, doubling for guidance, masks, packing),
and the network's outputs into the ``m_i`` that it gives to ``scheduler.step`` (guidance, rescaling, dropping the
learned variance). None of that is written down here. One pass of the loop is watched: every tensor operation that
depends on the state is kept with its arguments, and calls of the pipeline's networks become calls to be made later. A
recorded step is a :class:`Program`; running it repeats the pipeline's own operations, whatever they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from parasolver_adapters.diffusers.recording.leaving import Exits
from parasolver_adapters.diffusers.recording.programs import Autocast, Call, Operation, Program, Ref, indices_of
from parasolver_adapters.diffusers.recording.standins import copies, place_of, stand_in
from parasolver_adapters.diffusers.refusal import PipelineNotParallelError

MOST_OPERATIONS = 2000  # of one step outside the networks; more means that a network is being recorded
UNBATCHED = ("img_ids", "txt_ids", "rotary")  # arguments of these names hold one row a token, never one a sample
FRAMED = ("encoder_hidden_states", "residual")  # those may hold a row for each frame of each sample, as AnimateDiff's
USED_AGAIN = "a step of the loop uses what an earlier step computed, besides the state "
PREDICTED = USED_AGAIN + "(momentum, or a cache of what a network gave)"
SCHEDULED = USED_AGAIN + "(the predicted clean sample, or what else scheduler.step returns)"
KEPT = USED_AGAIN + (
    "(it carries a part of the previous state over, as image-to-video of LTX and Sana does with the first frame and "
    "inpainting of IF with the masked part)"
)


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
        self._numbered: dict[int, tuple[torch.Tensor, int]] = {}  # this step's values by their id, with their numbers
        self._places: dict[Any, int] = {}  # and by where they lie, as autograd and ``.data`` make others of them
        self._predicted: set[int] = set()  # those of them that depend on a network's output
        self._earlier: Any = WeakTensorKeyDictionary()  # those of earlier steps that the loop still holds, and what of
        self._constants: dict[tuple[Any, ...], Any] = {}
        self._exits: Exits | None = None

    def begin(self, state: torch.Tensor, others: Iterable[torch.Tensor]) -> None:
        """Record from here: a step has returned ``state``, and ``others`` that only the next step may use."""
        self.program = Program(dtype=state.dtype)
        self._numbered, self._places, self._predicted = {id(state): (state, 0)}, {place_of(state): 0}, set()
        for other in others:
            if other is not state:
                self._earlier[other] = SCHEDULED
        self._exits = Exits(lambda value: self._number_of(value) is not None)
        self._resume()

    def finish(self, x: torch.Tensor, m: torch.Tensor) -> Program:
        """Stop: the loop calls the next step with these. What was recorded since :meth:`begin`."""
        program = self.program
        assert program is not None
        numbers = [self._number_of(value) for value in (x, m)]
        for name, value, number in zip(("sample", "model_output"), (x, m), numbers, strict=True):
            if number is None:
                kept = self._earlier.get(value)  # given once more, as where every other step has no call of its own
                raise PipelineNotParallelError(
                    kept
                    or f"the {name} given to scheduler.step is not computed from the state by tensor operations; it "
                    "may be one that was kept from before, or come from outside of torch or from another thread"
                )
        program.x, program.m = numbers  # type: ignore[assignment]
        self.close()
        program.prune()
        return program

    def close(self) -> None:
        """Stop recording."""
        if self.program is None:
            return
        self.program = None
        self._pause()
        values = [(weakref.ref(tensor), number in self._predicted) for tensor, number in self._numbered.values()]
        self._numbered, self._places = {}, {}  # held until here, as an id is another tensor's as soon as it is free
        left = [(value(), PREDICTED if predicted else KEPT) for value, predicted in values]
        self._earlier.update((tensor, what) for tensor, what in left if tensor is not None)
        self._exits = None  # which refers to this

    def _resume(self) -> None:
        self.__enter__()
        if self._exits is not None:
            self._exits.start()

    def _pause(self) -> None:
        if self._exits is not None:
            self._exits.stop()
        self.__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.program is None:
            return func(*args, **kwargs)
        reads: list[int] = []
        recorded_args, recorded_kwargs = self._refs(args, reads), self._refs(kwargs, reads)
        if not reads:
            return func(*args, **kwargs)
        mutates = self._check(func, args, kwargs)
        program = self.program
        kept_args, kept_kwargs = self._kept((recorded_args, recorded_kwargs), (len(program.operations),))
        result = func(*args, **kwargs)
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
            results = [self._number(part) if isinstance(part, torch.Tensor) else None for part in result]
        if not self._predicted.isdisjoint(reads):
            self._predicted |= indices_of(results)
        program.operations.append(Operation(func, kept_args, kept_kwargs, tuple(reads), results))
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
            with self._outside():
                arguments = copies(leaves)  # the loop may write into these later
                output = forward(*args, **kwargs)
                outputs, form = tree_flatten(output)
                self.references[key] = Reference(arguments, copies(outputs), form)
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
        self._pause()
        try:
            yield
        finally:
            self._resume()

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
        constants, rest = [], []
        for at, (ref, leaf, by_rows) in enumerate(zip(refs, leaves, batched, strict=True)):
            constant = ref if isinstance(ref, Ref) else self._intern((key, at), leaf)
            constants.append(constant)
            if isinstance(leaf, torch.Tensor):
                rest.append(None if by_rows else id(constant))
            else:
                rest.append(leaf if _hashable(leaf) else id(leaf))
        outputs = [stand_in(leaf, leaves) for leaf in reference.outputs]
        results = [self._number(output) if isinstance(output, torch.Tensor) else program.new() for output in outputs]
        self._predicted.update(results)
        cast = Autocast.now(leaves)
        program.operations.append(Call(module, constants, spec, rows, batched, (key, *rest), reads, results, cast))
        return tree_unflatten(outputs, reference.spec)

    def _kept(self, value: Any, place: tuple[Any, ...]) -> Any:
        """An argument with copies of its tensors, which the loop may write into later."""
        if isinstance(value, torch.Tensor):
            return self._intern(place, value)
        if type(value) is tuple or type(value) is list:
            return type(value)([self._kept(item, (*place, at)) for at, item in enumerate(value)])
        if type(value) is dict:
            return {key: self._kept(item, (*place, key)) for key, item in value.items()}
        return value

    def _intern(self, place: tuple[Any, ...], leaf: Any) -> Any:
        """A copy of a tensor, the same as at this place in earlier steps if it is equal: conditioning is kept once."""
        if place_of(leaf) is None or isinstance(leaf, torch.nn.Parameter):
            return leaf
        known = self._constants.get(place)
        if known is None or known.dtype != leaf.dtype or known.device != leaf.device or not torch.equal(known, leaf):
            known = self._constants[place] = leaf.detach().clone()
        return known

    def _number(self, tensor: torch.Tensor) -> int:
        assert self.program is not None
        index = self.program.new()
        self._numbered[id(tensor)], self._places[place_of(tensor)] = (tensor, index), index
        return index

    def _number_of(self, value: Any) -> int | None:
        """The number of a value that depends on the state."""
        if not isinstance(value, torch.Tensor):
            return None
        numbered = self._numbered.get(id(value))
        return numbered[1] if numbered is not None else self._places.get(place_of(value) or ())

    def _refs(self, value: Any, reads: list[int]) -> Any:
        """The argument with :class:`Ref` in place of values that depend on the state, whose numbers join ``reads``."""
        if isinstance(value, torch.Tensor):
            number = self._number_of(value)
            if number is not None:
                reads.append(number)
                return Ref(number)
            if value in self._earlier:
                raise PipelineNotParallelError(self._earlier[value])
        elif type(value) is tuple or type(value) is list:
            return type(value)([self._refs(item, reads) for item in value])
        elif type(value) is dict:
            return {key: self._refs(item, reads) for key, item in value.items()}
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
            if isinstance(target, torch.Tensor) and self._number_of(target) is None:
                raise PipelineNotParallelError(f"the loop writes the state into a tensor made before ({func})")
            mutates = True
        return mutates


def form_of_call(module: torch.nn.Module, kwargs: dict[str, Any], leaves: Iterable[Any]) -> tuple[Any, ...]:
    """Equal for calls whose outputs are of one form."""
    leaves = list(leaves)
    return (id(module), Autocast.now(leaves), *kwargs, *map(_form, leaves))


def _form(leaf: Any) -> Any:
    """What decides about the form of a network's output."""
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.dtype
    return leaf if isinstance(leaf, (bool, str)) else type(leaf)


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
