"""The models that ship with the project."""

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
from diffusers import UNet2DModel

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
    with pytest.raises(ValueError, match="labels: expected one for each of the 3 samples, got 2"):
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


def test_the_policy_is_its_formula() -> None:
    """Residual blocks over waypoints, obstacle, and 32 frequencies of the time from 1 to exp(6), in NumPy."""
    policy = load_policy(torch.float64)
    weights = {key: value.numpy() for key, value in policy.state_dict().items()}
    generator = np.random.default_rng(0)
    x, obstacle, t = generator.normal(size=(3, 16, 2)), generator.normal(size=(3, 3)), np.array([0, 20, 999])
    phase = (t / 1000)[:, None] * np.exp(np.linspace(0.0, 6.0, 32))
    h = np.concatenate([x.reshape(3, 32), obstacle, np.sin(phase), np.cos(phase)], axis=1)
    h = h @ weights["enter.weight"].T + weights["enter.bias"]
    for k in range(4):
        normed = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5)
        inner = normed * weights[f"blocks.{k}.0.weight"] + weights[f"blocks.{k}.0.bias"]
        inner = inner @ weights[f"blocks.{k}.1.weight"].T + weights[f"blocks.{k}.1.bias"]
        inner = inner / (1 + np.exp(-inner))
        h = h + inner @ weights[f"blocks.{k}.3.weight"].T + weights[f"blocks.{k}.3.bias"]
    expected = (h @ weights["leave.weight"].T + weights["leave.bias"]).reshape(3, 16, 2)
    given = (torch.as_tensor(one) for one in (x, t, obstacle))
    np.testing.assert_allclose(policy(*given), expected, rtol=0, atol=1e-5)  # frequencies are float32's
    assert not policy.training
    assert not any(weight.requires_grad for weight in policy.parameters())


def test_the_noise_is_made_of_the_velocity(model: Any) -> None:
    x, t = noise(2, 1, 28, 28), torch.tensor([10, 900])
    bar = torch.tensor(SCHEDULE.alphas_cumprod)[t][:, None, None, None]
    for labels in (None, torch.tensor([3, 8])):
        known = torch.tensor([NO_CLASS, NO_CLASS]) if labels is None else labels
        v = UNet2DModel.forward(model, x, t, known, return_dict=False)[0]
        (eps,) = model(x, t, labels, return_dict=False)
        torch.testing.assert_close(eps, bar.sqrt() * v + (1 - bar).sqrt() * x, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(x, 900).sample[1:], model(x[1:], t[1:]).sample, rtol=0, atol=1e-12)
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())


def test_without_a_class_and_with_guidance(model: Any) -> None:
    x, t = noise(2, 1, 28, 28), torch.tensor([10, 900])
    plain, dress, bag = (EmbeddedDenoiser(label, model=model) for label in (None, 3, 8))
    assert plain.labels is None
    assert not plain.takes_rows
    assert not dress.takes_rows
    assert EmbeddedDenoiser([3, 8], model=model).takes_rows
    torch.testing.assert_close(plain(x, t), model(x, t).sample)
    torch.testing.assert_close(dress(x, t), model(x, t, torch.tensor([3, 3])).sample)
    guided = EmbeddedDenoiser([3, 8], 2.0, model)(x, t)
    for row, one in enumerate((dress, bag)):
        want = plain(x, t)[row] + 2 * (one(x, t)[row] - plain(x, t)[row])
        torch.testing.assert_close(guided[row], want, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="guidance_scale needs a class"):
        EmbeddedDenoiser(guidance_scale=2.0, model=model)


@pytest.mark.parametrize(("shape", "rows"), [((2, 1, 28, 27), 2), ((2, 28, 28), 2), ((2, 1, 28, 28), 3)])
def test_pictures_of_another_shape_are_refused(model: Any, shape: tuple[int, ...], rows: int) -> None:
    with pytest.raises(ValueError, match=r"x must have shape \(rows, 1, 28, 28\) and t shape \(rows,\)"):
        EmbeddedDenoiser(model=model)(noise(*shape), torch.zeros(rows, dtype=torch.int64))


def test_the_last_class_is_none(model: Any) -> None:
    assert EmbeddedDenoiser("10", model=model).labels == EmbeddedDenoiser(10, model=model).labels == NO_CLASS
