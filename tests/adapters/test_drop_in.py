"""Copies of objects with some methods in parallel: what they are and what they leave alone."""

import copy
import inspect
import pickle
from dataclasses import dataclass
from types import MethodType
from typing import Any

import pytest

pytest.importorskip("torch")
import torch

from parasolver_adapters.drop_in import as_it_is_now, with_methods


class Sampler:
    """Counts with a factor."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def sample(self, count: int, *, twice: bool = False) -> Any:
        """A sample."""
        return "own", self.factor * count * (1 + twice)

    def other(self) -> Any:
        return self.sample(1)


def faster(drop_in: Any, *args: Any, **kwargs: Any) -> Any:
    return "fast", as_it_is_now(drop_in).sample(*args, **kwargs)[1]


def test_the_methods_stand_in_the_place_of_its_own() -> None:
    given = Sampler(3)
    made = with_methods("sampler", given, {"sample": faster})
    assert made.sample(2, twice=True) == ("fast", 12)
    assert made.other() == ("fast", 3)  # its own method calls the new one
    assert made.solution is None
    assert isinstance(made, Sampler)
    assert (type(made).__name__, type(made).__qualname__, type(made).__module__) == ("Sampler", "Sampler", __name__)
    assert inspect.signature(made.sample) == inspect.signature(given.sample)
    assert (made.sample.__name__, made.sample.__doc__) == ("sample", "A sample.")
    assert given.sample(2) == ("own", 6)
    assert vars(given) == {"factor": 3}
    assert as_it_is_now(made).other() == ("own", 3)
    assert with_methods("sampler", given, {}).sample(2) == ("own", 6)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_calls_them_on_itself(copied: Any) -> None:
    """Averages of weights are kept in a deep copy."""
    made = with_methods("sampler", Sampler(3), {"sample": faster})
    second = copied(made)
    second.factor = 5
    assert second.sample(2) == ("fast", 10)
    assert made.sample(2) == ("fast", 6)


def test_a_method_that_was_set_on_the_object_is_its_own() -> None:
    given = Sampler(3)
    given.sample = lambda count: ("set", count)  # type: ignore[method-assign]
    made = with_methods("sampler", given, {"sample": faster})
    assert made.sample(2) == ("fast", 2)
    assert as_it_is_now(made).other() == ("set", 1)
    assert given.other() == ("set", 1)
    assert list(inspect.signature(made.sample).parameters) == ["count"]


def test_modules_of_the_copy_are_set_on_the_copy_alone() -> None:
    class Module(torch.nn.Module, Sampler):
        def __init__(self) -> None:
            super().__init__()
            self.factor, self.net = 3, torch.nn.Linear(2, 2)
            self.weight = torch.nn.Parameter(torch.zeros(2))
            self.register_buffer("betas", torch.ones(2))

    given = Module()
    made, net, weight, betas = with_methods("sampler", given, {"sample": faster}), given.net, given.weight, given.betas
    assert made.net is net
    assert made.weight is weight
    made.net, made.weight = torch.nn.Linear(2, 2), torch.nn.Parameter(torch.ones(2))
    made.betas = torch.zeros(2)
    assert given.net is net
    assert given.weight is weight
    assert given.betas is betas
    plain = as_it_is_now(made)
    assert plain.net is made.net
    plain.net = net
    assert made.net is not net


def test_a_copy_that_is_made_once_more_is_made_of_the_object() -> None:
    """As when a cell of a notebook runs twice; the methods in parallel were taken for the object's own."""
    given = Sampler(3)
    first = with_methods("sampler", given, {"sample": faster})
    first.factor = 5
    again = {"sample": lambda drop_in, count: ("again", as_it_is_now(drop_in).sample(count))}
    second = with_methods("sampler", first, again)
    assert second.sample(1) == ("again", ("own", 5))
    assert second.solution is None
    assert first.sample(1) == ("fast", 5)
    assert with_methods("sampler", first, {}).sample(1) == ("own", 5)
    assert given.sample(1) == ("own", 3)


def test_methods_that_were_bound_and_set_are_those_of_the_copy() -> None:
    """They were the given object's still, so its methods were called, and what was set on the copy was not seen."""

    def patched(self: Any, count: int) -> Any:
        return "patched", self.factor * count

    given = Sampler(3)
    given.sample = MethodType(patched, given)  # type: ignore[method-assign]
    given.other = MethodType(lambda self: ("more", self.sample(1)), given)  # type: ignore[method-assign]
    for made in (first := with_methods("sampler", given, {"sample": faster}), copy.deepcopy(first)):
        made.factor = 5
        assert made.sample(2) == ("fast", 10)
        assert made.other() == ("more", ("fast", 5))
        assert as_it_is_now(made).other() == ("more", ("patched", 5))
    assert given.other() == ("more", ("patched", 3))


class Around:
    """Hands everything on, as compiled modules do."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["inner"], name)


class Slots:
    __slots__ = ("factor",)
    sample = Sampler.sample


class Reading(Sampler):
    @property
    def solution(self) -> str:
        return "own"


@dataclass(frozen=True)
class Frozen:
    factor: int
    sample = Sampler.sample


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Around(Sampler(3)), "sample of this Around is a method of the Sampler in it; give that"),
        (Slots(), "expected an object that can be copied and have attributes, .* set on it, got Slots"),
        (Frozen(3), "expected an object that can be copied .* got Frozen .cannot assign to field"),
        (Reading(3), "expected an object that can be copied .* got Reading .*solution"),
    ],
)
def test_objects_that_cannot_be_copied_so_are_refused(given: Any, said: str) -> None:
    with pytest.raises(TypeError, match=f"^sampler: {said}"):
        with_methods("sampler", given, {"sample": faster})


def test_what_was_made_is_not_pickled() -> None:
    """The message was of a class that is not the same object as itself."""
    made = with_methods("sampler", Sampler(3), {"sample": faster})
    for one in (made, copy.deepcopy(made)):
        with pytest.raises(
            pickle.PicklingError, match=r"^Sampler: an object that was made parallel cannot be pickled; "
        ):
            pickle.dumps(one)
    assert pickle.loads(pickle.dumps(as_it_is_now(made))).sample(2) == ("own", 6)
    assert type(copy.deepcopy(made)) is type(made)
