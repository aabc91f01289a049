"""What a call is given, as it was before a pass that was only watched: its arguments, and where random numbers are."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves


def version_of(value: Any) -> Any:
    """For :func:`was_written`; tensors of inference mode keep no count."""
    if not isinstance(value, torch.Tensor):
        return None
    return value.clone() if value.is_inference() else value._version


def was_written(value: Any, version: Any) -> bool:
    """Whether something was written into a tensor since it had this version."""
    return not torch.equal(value, version) if isinstance(version, torch.Tensor) else version_of(value) != version


def write_back(value: torch.Tensor, values: torch.Tensor) -> None:
    """A tensor has these values again, whoever wrote into it; one that repeats its values has those of its base."""
    repeats = any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True))
    if not repeats:
        with torch.inference_mode(value.is_inference()), torch.no_grad():
            value.copy_(values)


class Streams:
    """The state of all random generators among the arguments, and of the global ones."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        leaves = tree_leaves(dict(arguments))
        self._generators = [(leaf, leaf.get_state()) for leaf in leaves if isinstance(leaf, torch.Generator)]
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        outside = [(np.random.set_state, np.random.get_state()), (random.setstate, random.getstate())]  # noqa: NPY002
        self._outside = [*outside, *(found for leaf in leaves if (found := _outside_torch(leaf)) is not None)]

    def same_as(self, other: Streams) -> bool:
        """Whether all those of torch were in the same state."""
        pairs = [(self._cpu, other._cpu), *zip(self._cuda or [], other._cuda or [], strict=True)]
        pairs += [(mine[1], their[1]) for mine, their in zip(self._generators, other._generators, strict=True)]
        return all(torch.equal(mine, their) for mine, their in pairs)

    def restore(self) -> None:
        for generator, state in self._generators:
            generator.set_state(state)
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        for set_state, state in self._outside:
            set_state(state)


@contextmanager
def streams_left_alone() -> Iterator[None]:
    """The global streams are afterwards where they were."""
    streams = Streams({})
    try:
        yield
    finally:
        streams.restore()


def _outside_torch(generator: Any) -> tuple[Callable[[Any], Any], Any] | None:
    """How a generator of NumPy or Python is set to the state that it has."""
    if isinstance(generator, np.random.Generator):
        stream = generator.bit_generator
        return lambda state: setattr(stream, "state", state), stream.state
    if isinstance(generator, np.random.RandomState):
        return generator.set_state, generator.get_state()
    if isinstance(generator, random.Random):
        return generator.setstate, generator.getstate()
    return None


class Given:
    """The arguments of a call: tensors, arrays, lists and dictionaries that it may write into, and its streams."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._streams = Streams(arguments)
        leaves = tree_leaves(dict(arguments))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self._tensors = [(tensor, version_of(tensor), tensor.detach().clone()) for tensor in tensors]
        self._arrays = [(leaf, leaf.copy()) for leaf in leaves if isinstance(leaf, np.ndarray) and leaf.flags.writeable]
        self._filled = [(value, value.copy()) for value in _containers(tuple(arguments.values()))]

    def restore(self) -> None:
        """Everything is as it was, in the same objects."""
        for value, kept in self._filled:
            if isinstance(value, list):
                value[:] = kept
            else:
                value.clear()
                value.update(kept)
        for tensor, version, values in self._tensors:
            if was_written(tensor, version):
                write_back(tensor, values)
        for array, values in self._arrays:
            np.copyto(array, values)
        self._streams.restore()


def _containers(value: Any) -> Iterator[Any]:
    """The lists and dictionaries in a value."""
    if type(value) is list or type(value) is dict:
        yield value
    if isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _containers(part)
