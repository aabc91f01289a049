"""Loops of pipelines that depend on more than the networks' outputs: refused, or right, and never wrong in silence."""

from __future__ import annotations

import copy
import ctypes
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from parasolver_adapters.diffusers import PipelineNotParallelError, parallel_sampling
from tests.adapters.looping_pipelines import STEPS, Change, hook, is_right, looping, predict, refused, with_feature
from tests.adapters.tiny_pipelines import randn, watch

pytestmark = pytest.mark.usefixtures("quiet_diffusers")


def by(number: Callable[[torch.Tensor], Any], of_state: bool = False) -> Change:
    """A loop that scales the prediction by a number that is read from it, or from the state."""

    def change(pipe: Any, i: int, t: Any, x: torch.Tensor) -> torch.Tensor:
        m = predict(pipe, t, x)
        return m / (1 + float(number(x if of_state else m)))

    return change


def saved(x: torch.Tensor) -> float:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file).std().item()


def copied(x: torch.Tensor) -> float:
    return copy.deepcopy(x).numpy().std()


LEAVING = {
    "numpy": by(lambda m: np.percentile(np.abs(m.cpu().numpy()), 90)),
    "detach().cpu().numpy().mean()": by(lambda m: m.detach().abs().cpu().numpy().mean()),
    "tolist": by(lambda m: max(map(abs, m.flatten().tolist()))),
    "np.asarray": by(lambda m: np.asarray(m).std()),
    "np.abs": by(lambda m: np.abs(m.squeeze()).numpy().max()),
    "np.from_dlpack": by(lambda m: np.from_dlpack(m).std()),
    "torch.save": by(saved),
    "copy.deepcopy": by(copied),
    "data_ptr": by(lambda m: ctypes.c_double.from_address(m.data_ptr()).value ** 2),
    "numpy of the state": by(lambda x: np.percentile(x.numpy(), 90), of_state=True),
}
NUMBERS = {
    "item": by(lambda m: m.std().item()),
    "float": by(lambda m: float(m.std())),
    "bool": by(lambda m: 1.0 if m.std() > 0.5 else 0.5),
    "max of numbers": by(lambda m: max(m.flatten().abs())),
    "format": by(lambda m: f"{m.std():.3f}"),
}


@pytest.mark.parametrize("way", LEAVING)
def test_values_that_leave_torch(way: str) -> None:
    refused(looping(), LEAVING[way], "takes values of the state out of torch")


@pytest.mark.parametrize("way", NUMBERS)
def test_numbers_read_from_the_state(way: str) -> None:
    refused(looping(), NUMBERS[way], "decides by the values of the state")


@pytest.mark.parametrize("of_state", [False, True])
def test_a_way_out_of_torch_that_nobody_sees(of_state: bool) -> None:
    """The pass that looks has other states and other outputs than the recording."""

    def number(m: torch.Tensor) -> Any:
        return np.from_dlpack(_Exported(torch.utils.dlpack.to_dlpack(m))).std()

    refused(looping(), by(number, of_state), "as it was recorded gives scheduler.step a model_output that is off")


class _Exported:
    """What NumPy takes from another library."""

    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


def swallowing(pipe: Any, i: int, t: Any, x: torch.Tensor) -> torch.Tensor:
    """Takes another way where it is refused one."""
    m = predict(pipe, t, x)
    try:
        return m / (1 + float(m.numpy().std()))
    except RuntimeError:
        return m


def counting(pipe: Any, i: int, t: Any, x: torch.Tensor) -> torch.Tensor:
    m = predict(pipe, t, x)
    return m / (1 + len(m[m > 0.2]) / m.numel())


@pytest.mark.parametrize("change", [swallowing, counting])
def test_values_of_the_state_that_decide_in_hiding(change: Change) -> None:
    refused(looping(), change, "as it was recorded gives scheduler.step a model_output that is off")


def in_place(pipe: Any, i: int, t: Any, x: torch.Tensor) -> torch.Tensor:
    m = predict(pipe, t, x)
    m *= 1.1
    m += 0.1 * x
    return m


def masked(pipe: Any, i: int, t: Any, x: torch.Tensor) -> torch.Tensor:
    m = predict(pipe, t, x).clone()
    m[m.abs() > 1] *= 0.5
    return m


def idle(pipe: Any, i: int, t: Any, x: torch.Tensor) -> torch.Tensor:
    """Calls the network once more for nothing."""
    predict(pipe, t, 0.5 * x)
    return predict(pipe, t, x)


@pytest.mark.parametrize("change", [in_place, masked, idle])
def test_loops_that_only_look_odd(change: Change) -> None:
    is_right(looping(), change)


# ---------------------------------------------------------------- gradients


def gradient(take: Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor], torch.Tensor]) -> Change:
    """Guidance by the gradient of a loss of the predicted clean sample."""

    def change(pipe: Any, i: int, t: Any, x: torch.Tensor) -> torch.Tensor:
        target, kept = randn(1, 3, 8, 8, seed=9), []

        def loss(x: torch.Tensor) -> torch.Tensor:
            kept.append(predict(pipe, t, x))
            return (target - x + kept[0]).norm()

        with torch.enable_grad():
            slope = take(loss, x.detach().requires_grad_(True))
        return kept[0].detach() + 0.3 * slope

    return change


def _backward(loss: Any, x: torch.Tensor) -> Any:
    loss(x).backward()
    return x.grad


def _scaled(loss: Any, x: torch.Tensor) -> Any:
    (loss(x) * 1024).backward()
    assert x.grad is not None
    return x.grad / 1024


GRADIENTS = {
    "grad": lambda loss, x: torch.autograd.grad(loss(x), x)[0],
    "grad of a graph": lambda loss, x: torch.autograd.grad(loss(x), x, create_graph=True)[0].detach(),
    "backward": _backward,
    "scaled": _scaled,
    "vjp": lambda loss, x: torch.autograd.functional.vjp(loss, x)[1],
}


@pytest.mark.parametrize("way", GRADIENTS)
def test_a_gradient_through_the_network(way: str) -> None:
    refused(looping(), gradient(GRADIENTS[way]), "takes a gradient through a network")


def test_a_gradient_around_the_network_is_followed() -> None:
    """Autograd gives the values that it has saved as other tensors."""

    def change(pipe: Any, i: int, t: Any, x: torch.Tensor) -> torch.Tensor:
        m = predict(pipe, t, x)
        with torch.enable_grad():
            own = x.detach().requires_grad_(True)
            loss = (randn(1, 3, 8, 8, seed=9) - own + m).norm() + (0.3 * own).exp().sum().sqrt()
            slope = torch.autograd.grad(loss, own)[0]
        return m + 0.3 * slope

    is_right(looping(), change)


def test_data_of_a_value_is_that_value() -> None:
    is_right(looping(), lambda pipe, i, t, x: predict(pipe, t, x).data.mul(1.1).data + 0.1 * x.data)


# ---------------------------------------------------------------- how outputs lie in memory


class Lying(torch.nn.Module):
    """A network whose outputs are not dense."""

    def __init__(self, unet: Any, how: str) -> None:
        super().__init__()
        self.unet, self.how, self.conv_out, self.mid_block = unet, how, unet.conv_out, unet.mid_block

    def forward(self, x: torch.Tensor, t: Any) -> Any:
        output = self.unet(x, t)
        m = output.sample
        if self.how == "channels_last":
            m = m.contiguous(memory_format=torch.channels_last)
        elif self.how == "cropped":
            m = torch.nn.functional.pad(m, (0, 2, 0, 2))[..., :-2, :-2]
        elif self.how == "expanded":
            m = m.mean(1, keepdim=True).expand_as(m)
        elif self.how == "transposed":
            m = m.transpose(2, 3)
        output.sample = m
        return output


def flattening(pipe: Any, i: int, t: Any, x: torch.Tensor) -> torch.Tensor:
    m = predict(pipe, t, x)
    scale = m.reshape(m.shape[0], -1).std(dim=1).reshape(-1, 1, 1, 1)
    lines = m.transpose(1, 2).flatten(2).flip(1).unflatten(2, (3, 8)).transpose(1, 2)
    pixels = m.permute(0, 2, 3, 1).reshape(m.shape[0], -1).unflatten(1, (8, 8, 3)).permute(0, 3, 1, 2)
    return (m + 0.1 * lines + 0.1 * pixels) / (1 + scale)


@pytest.mark.parametrize("how", ["dense", "channels_last", "cropped", "expanded", "transposed"])
def test_outputs_that_are_not_dense(how: str) -> None:
    pipe = looping()
    pipe.register_modules(unet=Lying(pipe.unet, how))
    is_right(pipe, flattening)


def test_states_that_are_not_dense() -> None:
    def change(pipe: Any, i: int, t: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        return flattening(pipe, i, t, x).contiguous(memory_format=torch.channels_last), x

    is_right(looping(), change)


# ---------------------------------------------------------------- the cost, and what is remembered


def test_what_the_look_costs_and_that_it_is_remembered() -> None:
    pipe = looping()
    rows = watch(pipe.unet, lambda x, *args: x.shape[0])

    def calls(**given: Any) -> int:
        rows.clear()
        with parallel_sampling(pipe, tolerance=0.0) as run:
            pipe(plain, **given)
        return len(rows) - run.stats.calls

    def plain(pipe: Any, i: int, t: Any, x: torch.Tensor) -> torch.Tensor:
        return predict(pipe, t, x) * pipe.setting

    first = calls()
    assert first - calls() == 4  # the first and the last step behind the first, in the loop and again
    again = calls()
    assert calls() == again
    assert calls(setting=0.5) - again == 4  # another number in the loop may be another way through it
    assert calls(setting=0.5) == again
    assert calls(n=STEPS + 1) - again == 4
    with hook(pipe, "forward hook", {}):
        assert calls() - again == 4


def test_a_fault_of_a_later_call_is_seen() -> None:
    pipe, store = looping(), {}

    def change(pipe: Any, i: int, t: Any, x: torch.Tensor) -> torch.Tensor:
        return with_feature(pipe, t, x, store) if pipe.setting == 2 else predict(pipe, t, x)

    with hook(pipe, "forward hook", store), parallel_sampling(pipe):
        pipe(change)
        with pytest.raises(PipelineNotParallelError, match="features from inside"):
            pipe(change, setting=2.0)
