"""What a callback or a loop has changed: tensors, settings, switches and weights of networks."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("diffusers")
import torch
from torch import nn

from parasolver_adapters.diffusers.passes.changes import (
    Settings,
    Weights,
    are_same,
    hooks_of,
    positions_of,
    serial_of,
    switches_of,
    were_replaced,
    what_moved,
)
from parasolver_adapters.given import version_of, was_written


def test_whether_something_was_written_into_a_tensor() -> None:
    x = torch.zeros(2)
    before = version_of(x)
    assert not was_written(x, before)
    x.add_(0)
    assert was_written(x, before)
    assert version_of("word") is None
    assert not was_written("word", None)
    with torch.inference_mode():  # where no count is kept
        x = torch.zeros(2)
        before = version_of(x)
        assert not was_written(x, before)
        x[1] = 1
        assert was_written(x, before)


def test_whether_a_callback_gave_back_other_tensors() -> None:
    x, y = torch.zeros(2), torch.zeros(2)
    given = {"latents": (x, 0), "mask": (y, 0)}
    assert not were_replaced(given, {})
    assert not were_replaced(given, {"latents": x, "mask": y})
    assert were_replaced(given, {"latents": x, "mask": x})
    assert were_replaced(given, {"latents": x, "other": x})


class Switched(nn.Module):
    """What attention layers with adapters keep."""

    def __init__(self) -> None:
        super().__init__()
        self.processor: Any = nn.Identity()  # a module is kept among the modules
        self.scale, self.scaling, self.enabled = [1.0, 2.0], {"default": 1.0}, True
        self._active_adapter, self._disable_adapters, self.other = ["one"], False, 3.0


def pipe_of(*networks: nn.Module) -> Any:
    return SimpleNamespace(components={f"unet {at}": network for at, network in enumerate(networks)})


def flip(part: Switched, name: str) -> None:
    """Changes a switch, in place where it can be."""
    value = getattr(part, name)
    if isinstance(value, list):
        value[0] = "other"
    elif isinstance(value, dict):
        value["default"] = 0.5
    else:
        setattr(part, name, nn.Tanh() if isinstance(value, nn.Module) else not value)


@pytest.mark.parametrize("name", ["processor", "scale", "scaling", "enabled", "_active_adapter", "_disable_adapters"])
def test_switches_of_networks_that_moved_are_named(name: str) -> None:
    part = Switched()
    switches = switches_of(pipe_of(nn.Linear(1, 1), nn.Sequential(nn.ReLU(), part)))
    assert len(switches) == 6
    before = positions_of(switches)
    assert what_moved(switches, before) == set()
    flip(part, name)
    assert what_moved(switches, before) == {name}


def test_equal_lists_are_the_same_position_and_a_switch_that_is_gone_is_not() -> None:
    part = Switched()
    switches = switches_of(pipe_of(part))
    before = positions_of(switches)
    part.scale, part.scaling, part.other = [1.0, 2.0], {"default": 1.0}, 4.0
    assert what_moved(switches, before) == set()
    del part.scale
    part.processor = part.processor
    assert what_moved(switches, before) == {"scale"}


class Parts(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 64, dtype=dtype)
        self.norm = nn.BatchNorm1d(4, dtype=dtype)
        self.gain, self.word, self.flag = 1.0, "word", False


def write_data(net: Parts, at: int = 0) -> None:
    net.layer.weight.data.view(-1)[at] += 1.0


CHANGES: dict[str, Any] = {
    "a number of a module": lambda net: setattr(net, "gain", 2.0),
    "a word of a module": lambda net: setattr(net, "word", "other"),
    "a switch of a module": lambda net: setattr(net, "flag", True),
    "an attribute more": lambda net: setattr(net, "more", [1]),
    "another module": lambda net: setattr(net, "norm", nn.BatchNorm1d(4)),
    "a hook": lambda net: net.layer.register_forward_hook(lambda *given: None),
    "a hook before": lambda net: net.layer.register_forward_pre_hook(lambda *given: None),
    "another parameter": lambda net: setattr(net.layer, "weight", nn.Parameter(net.layer.weight.detach())),
    "another place": lambda net: setattr(net.layer.weight, "data", net.layer.weight.data.clone()),
    "no parameter": lambda net: setattr(net.layer, "bias", None),
    "written to": lambda net: net.layer.weight.detach().zero_(),
    "a buffer": lambda net: net.norm.running_mean.add_(1),
    "through data": write_data,
    "a mode": lambda net: net.eval(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_a_network_is_seen(name: str) -> None:
    net = Parts()
    weights = Weights(pipe_of(nn.Linear(2, 2), net))
    before = weights.look()
    assert not Weights.differ(before, weights.look())
    CHANGES[name](net)
    assert Weights.differ(before, weights.look())
    again = weights.look()
    assert not Weights.differ(again, weights.look())
    write_data(net)  # into whatever is there now
    assert Weights.differ(again, weights.look())


@pytest.mark.parametrize("at", [0, 8, 16, 248])
def test_some_values_are_looked_at_all_over_a_tensor(at: int) -> None:
    """Of 256 each eighth, so that what is written through ``data`` is seen; those between are not."""
    net = Parts()
    weights = Weights(pipe_of(net))
    before = weights.look()
    write_data(net, at + 1)
    assert not Weights.differ(before, weights.look())
    write_data(net, at)
    assert Weights.differ(before, weights.look())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_any_dtype(dtype: torch.dtype) -> None:
    net = Parts(dtype)
    net.register_buffer("spaced", torch.zeros(6, 4, dtype=dtype)[:, ::2])
    weights = Weights(pipe_of(net))
    before = weights.look()
    write_data(net)
    assert Weights.differ(before, weights.look())


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_buffers_of_single_bytes(dtype: torch.dtype) -> None:
    net = nn.Module()
    net.register_buffer("table", torch.zeros(3, 5).to(dtype))
    weights = Weights(pipe_of(net))
    before = weights.look()
    assert not Weights.differ(before, weights.look())
    net.table.data.view(torch.uint8)[2, 4] = 1  # type: ignore[operator, union-attr]
    assert Weights.differ(before, weights.look())


def test_tensors_of_few_values_of_odd_layouts_and_of_none() -> None:
    net = nn.Module()
    spaced = torch.zeros(64, 10)[:, ::5]  # values five places from each other
    net.register_buffer("spaced", spaced)
    net.register_buffer("last", torch.zeros(3))
    net.register_buffer("nan", torch.tensor([torch.nan]))
    net.register_buffer("nothing", torch.zeros(0))
    net.register_buffer("meta", torch.zeros(2, device="meta"))
    net.register_buffer("sparse", torch.eye(2).to_sparse())
    net.register_buffer("none", None)
    weights = Weights(pipe_of(net))
    before = weights.look()
    assert not Weights.differ(before, weights.look())  # NaN is equal to itself
    net.last.data[2] = 1  # type: ignore[operator, union-attr]
    assert Weights.differ(before, weights.look())
    before = weights.look()
    spaced.data[0, 0] = 1
    assert Weights.differ(before, weights.look())
    part = nn.Module()
    part.register_buffer("part", torch.arange(100.0)[60:70])
    assert Weights(pipe_of(part)).look()[1][0].tolist() == [60.0 + at for at in range(10)]


def test_networks_of_another_number_of_tensors_differ() -> None:
    assert Weights.differ(([], []), ([], [torch.zeros(1)]))
    assert Weights.differ(([1], []), ([], []))
    assert not Weights.differ(([1], [torch.zeros(1)]), ([1], [torch.zeros(1)]))
    assert Weights.differ(([1], [torch.zeros(1), torch.zeros(1)]), ([1], [torch.zeros(1), torch.ones(1)]))


def test_tensors_of_inference_mode() -> None:
    with torch.inference_mode():
        net = nn.Linear(2, 2)
    weights = Weights(pipe_of(net))
    before = weights.look()
    with torch.inference_mode():
        net.weight.zero_()
    assert Weights.differ(before, weights.look())


def test_hooks_are_named_by_their_modules() -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    assert hooks_of(net) == {}
    hooks = [
        net.register_forward_hook(lambda *given: None),
        net[1].register_forward_pre_hook(lambda *given: None),
        nn.modules.module.register_module_forward_hook(lambda *given: None),
        nn.modules.module.register_module_forward_pre_hook(lambda *given: None),
    ]
    try:
        assert list(hooks_of(net).values()) == ["every module", "every module", "Sequential", "1"]
    finally:
        for hook in hooks:
            hook.remove()
    assert hooks_of(net) == {}


def test_a_serial_number_is_never_given_again() -> None:
    class Thing:
        pass

    thing, other = Thing(), Thing()
    first = serial_of(thing)
    assert serial_of(thing) == first != serial_of(other)
    del thing
    gc.collect()
    things = [Thing() for _ in range(50)]  # one of them may lie where the first did
    assert first not in {serial_of(one) for one in things}
    assert serial_of([1]) == "list"  # what cannot be followed


def test_arguments_are_the_same() -> None:
    x, y = torch.zeros(2), torch.zeros(2)
    assert are_same({"x": x, "n": 1.5, "s": "a"}, {"x": x, "n": float("1.5"), "s": "a"})
    for other in ({"x": y, "n": 1.5}, {"x": x, "n": 2.5}, {"x": x}, {"x": x, "n": 1.5, "m": 1}):
        assert not are_same({"x": x, "n": 1.5}, other)
        assert not are_same(other, {"x": x, "n": 1.5})
    nan = float("nan")
    assert are_same({"n": nan}, {"n": nan})
    assert not are_same({"n": nan}, {"n": 0.0})


SETTINGS: dict[str, Any] = {
    "a number": lambda pipe: setattr(pipe, "scale", 2.0),
    "another object": lambda pipe: setattr(pipe, "unet", nn.Identity()),
    "a new attribute": lambda pipe: setattr(pipe, "more", 1),
    "an attribute that is gone": lambda pipe: delattr(pipe, "scale"),
    "a number in a dictionary": lambda pipe: pipe.options.update(scale=0.5),
    "a tensor, written into": lambda pipe: pipe.options["mask"].add_(1),
    "a longer list": lambda pipe: pipe.options["layers"].append(3),
    "another scheduler": lambda pipe: setattr(pipe, "scheduler", SimpleNamespace(sigmas=torch.ones(3))),
    "the scheduler": lambda pipe: pipe.scheduler.sigmas[1:].mul_(2),
}


def with_settings() -> Any:
    options = {"scale": 1.0, "mask": torch.zeros(2), "layers": [1, 2]}
    scheduler = SimpleNamespace(sigmas=torch.ones(3), least=-float("inf"), unknown=float("nan"))
    return SimpleNamespace(unet=nn.Identity(), scale=1.0, options=options, scheduler=scheduler)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_change_of_a_setting_is_seen(name: str) -> None:
    pipe, inner = with_settings(), with_settings()
    settings = Settings(pipe, 3, inner)
    assert not settings.differ()
    pipe._interrupt = True
    assert not settings.differ()
    SETTINGS[name](inner)
    assert settings.differ()
