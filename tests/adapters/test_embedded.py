"""The models that ship with the project."""

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks.policy import load_policy as trained_policy
from parasolver_adapters.embedded import CLASS_NAMES, NO_CLASS, SCHEDULE, EmbeddedDenoiser, load_embedded_model
from parasolver_adapters.embedded.policy import Policy, load_policy
from parasolver_core import DDIM, solve, solve_sequential


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return load_embedded_model(torch.float64)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("guidance_scale", [None, 2.0])
def test_each_sample_has_the_class_given_for_it(model: torch.nn.Module, guidance_scale: float | None) -> None:
    x_T, timesteps, rule = noise(2, 1, 28, 28), SCHEDULE.timesteps(4), DDIM(SCHEDULE)
    both = EmbeddedDenoiser([3, "bag"], guidance_scale, model)
    assert both.labels == (3, CLASS_NAMES.index("bag"))
    got = solve(both, x_T, timesteps, rule, 2, tolerance=0.0).sample
    for place, label in enumerate((3, 8)):
        alone = EmbeddedDenoiser(label, guidance_scale, model)
        want = solve_sequential(alone, x_T[place : place + 1], timesteps, rule).sample
        torch.testing.assert_close(got[place : place + 1], want, rtol=0, atol=1e-10)
    assert not torch.allclose(got[0], got[1], atol=0.1)


def test_classes_by_name_and_number(model: torch.nn.Module) -> None:
    given = {"Sneaker": 7, "boot": 9, "ankle boot": 9, "t-shirt": 0, "shirt": 6, "4": 4, "none": NO_CLASS, 2: 2}
    for name, number in given.items():
        assert EmbeddedDenoiser(name, model=model).labels == number
    assert EmbeddedDenoiser(np.int64(3), model=model).labels == 3


@pytest.mark.parametrize("labels", [11, -1, "cat", [3, 44]])
def test_no_such_class(model: torch.nn.Module, labels: object) -> None:
    with pytest.raises(ValueError, match=r"labels: expected classes of 0 T-shirt/top, 1 trouser.*10 none; got"):
        EmbeddedDenoiser(labels, model=model)  # type: ignore[arg-type]


@pytest.mark.parametrize("labels", [3.5, [], [1.5]])
def test_labels_of_another_kind(model: torch.nn.Module, labels: object) -> None:
    with pytest.raises(TypeError, match="labels: expected a class, or one for each sample, got"):
        EmbeddedDenoiser(labels, model=model)  # type: ignore[arg-type]


def test_as_many_labels_as_samples(model: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="labels: expected one for each sample, got 2 for a batch of at least 3"):
        solve(EmbeddedDenoiser([3, 4], model=model), noise(3, 1, 28, 28), SCHEDULE.timesteps(3), DDIM(SCHEDULE), 2)


def test_arrays_of_numpy_are_refused(model: torch.nn.Module) -> None:
    with pytest.raises(TypeError, match=r"x: this network takes torch tensors, got one of numpy; use torch.as_tensor"):
        EmbeddedDenoiser(model=model)(noise(1, 1, 28, 28).numpy(), torch.tensor([3]))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="t: this network takes torch tensors"):
        EmbeddedDenoiser(model=model)(noise(1, 1, 28, 28), np.array([3]))  # type: ignore[arg-type]


def test_the_policy_that_ships_is_the_trained_one_rounded() -> None:
    shipped, trained = load_policy().state_dict(), trained_policy().state_dict()
    assert shipped.keys() == trained.keys()
    for key, value in trained.items():
        assert torch.equal(shipped[key], value.half().float())
    assert isinstance(load_policy(), Policy)
