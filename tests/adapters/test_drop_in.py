"""Copies of objects with some methods in parallel: what they are and what they leave alone."""

import copy
import inspect
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
    made = with_methods(given, {"sample": faster})
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
    assert with_methods(given, {}).sample(2) == ("own", 6)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_calls_them_on_itself(copied: Any) -> None:
    """Averages of weights are kept in a deep copy."""
    made = with_methods(Sampler(3), {"sample": faster})
    second = copied(made)
    second.factor = 5
    assert second.sample(2) == ("fast", 10)
    assert made.sample(2) == ("fast", 6)


def test_a_method_that_was_set_on_the_object_is_its_own() -> None:
    given = Sampler(3)
    given.sample = lambda count: ("set", count)  # type: ignore[method-assign]
    made = with_methods(given, {"sample": faster})
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
    made, net, weight, betas = with_methods(given, {"sample": faster}), given.net, given.weight, given.betas
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
