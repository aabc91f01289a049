"""Loops of pipelines that depend on more than the networks' outputs: refused, or right, and never wrong in silence."""

from __future__ import annotations

import copy
import ctypes
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from parasolver_adapters.diffusers import PipelineNotParallelError, parallel_sampling
from parasolver_core import Status
from tests.adapters.tiny_pipelines import ddim_pipeline, distance, randn, stable_diffusion, text, watch

STEPS = 8

pytestmark = pytest.mark.usefixtures("quiet_diffusers")

Change = Callable[..., Any]


class Loop(diffusers.DDIMPipeline):
    """A loop that gives the scheduler what ``change(pipe, i, t, x)`` returns."""

    @torch.no_grad()
    def __call__(self, change: Change, n: int = STEPS, setting: float = 1.0) -> Any:
        self.scheduler.set_timesteps(n)
        self.setting, self.kept = setting, torch.zeros(1, 3, 8, 8, dtype=torch.float64)
        x = randn(1, 3, 8, 8)
        for i, t in enumerate(self.scheduler.timesteps):
            m = change(self, i, t, x)
            m, x = m if isinstance(m, tuple) else (m, x)
            x = self.scheduler.step(m, t, x).prev_sample
        return (x,)


def looping(unet: Any = None) -> Any:
    tiny = ddim_pipeline()
    pipe = Loop(tiny.unet if unet is None else unet, tiny.scheduler)
    pipe.unet.conv_out.weight.data *= 4  # outputs of about unit size
    return pipe


def predict(pipe: Any, t: Any, x: torch.Tensor) -> torch.Tensor:
    return pipe.unet(x, t).sample


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


def refused(pipe: Any, change: Change, match: str, given: dict[str, Any] | None = None) -> None:
    """Refused with this reason, and the untouched sample where that was asked for."""
    given = given or {}
    want = pipe(change, **given)[0]
    with pytest.raises(PipelineNotParallelError, match=match), parallel_sampling(pipe):
        pipe(change, **given)
    with (
        pytest.warns(UserWarning, match="sampled sequentially"),
        parallel_sampling(pipe, fallback="sequential") as run,
    ):
        got = pipe(change, **given)[0]
    assert torch.equal(got, want)
    assert run.status is Status.CONVERGED


def is_right(pipe: Any, change: Change) -> None:
    want = pipe(change)[0]
    with parallel_sampling(pipe, tolerance=0.0) as run:
        got = pipe(change)[0]
    assert distance(got, want) < 1e-12
    assert run.reason is None
    assert run.stats.rounds > 1


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


# ---------------------------------------------------------------- features from inside


@contextmanager
def hook(pipe: Any, kind: str, store: dict[str, Any]) -> Iterator[None]:
    block = pipe.unet.mid_block
    layer = block.attentions[0].to_out[0]
    if kind == "forward hook":
        handle = block.register_forward_hook(lambda module, args, output: store.update(f=output))
    elif kind == "hook in an attention":
        handle = layer.register_forward_hook(lambda module, args, output: store.update(f=output.mean().reshape(1, 1)))
    elif kind == "forward pre-hook":
        handle = block.register_forward_pre_hook(lambda module, args: store.update(f=args[0]))
    else:
        seen = lambda module, args, output: store.update(f=output) if module is block else None  # noqa: E731
        handle = register_module_forward_hook(seen)
    try:
        yield
    finally:
        handle.remove()


HOOKS = ("forward hook", "hook in an attention", "forward pre-hook", "hook of every module")


def with_feature(pipe: Any, t: Any, x: torch.Tensor, store: dict[str, Any]) -> torch.Tensor:
    m = predict(pipe, t, x)
    return m * (1 + store["f"].mean())


@pytest.mark.parametrize("kind", HOOKS)
def test_features_that_a_hook_takes_from_inside_the_network(kind: str) -> None:
    pipe, store = looping(), {}
    with hook(pipe, kind, store):
        refused(pipe, lambda pipe, i, t, x: with_feature(pipe, t, x, store), "features from inside a network .hooks on")


@pytest.mark.parametrize("kind", HOOKS)
def test_features_of_a_hook_that_the_loop_sets_and_of_a_store_that_it_empties(kind: str) -> None:
    """Where the networks are not really called the loop fails, in code of its own."""

    def change(pipe: Any, i: int, t: Any, x: torch.Tensor) -> torch.Tensor:
        store: dict[str, Any] = {}
        with hook(pipe, kind, store):
            return with_feature(pipe, t, x, store)

    refused(looping(), change, "the loop fails where the networks' outputs are not known yet .KeyError")


def test_features_that_are_used_late_only() -> None:
    pipe, store = looping(), {}

    def change(pipe: Any, i: int, t: Any, x: torch.Tensor) -> torch.Tensor:
        return with_feature(pipe, t, x, store) if i > STEPS - 3 else predict(pipe, t, x)

    with hook(pipe, "forward hook", store):
        refused(pipe, change, "step [67] as it was recorded")


def test_features_that_only_look_are_no_matter() -> None:
    pipe, store = looping(), {}
    with hook(pipe, "forward hook", store):
        is_right(pipe, lambda pipe, i, t, x: predict(pipe, t, x))


class Storing(diffusers.models.attention_processor.AttnProcessor):
    """Keeps what it returned."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.kept = super().__call__(*args, **kwargs)
        return self.kept


class Attending(diffusers.StableDiffusionPipeline):
    """Uses what an attention processor keeps."""

    @torch.no_grad()
    def __call__(self, change: Any = None) -> Any:
        self.scheduler.set_timesteps(STEPS)
        x, prompt = randn(1, 4, 16, 16), text()["prompt_embeds"]
        processor = next(one for one in self.unet.attn_processors.values() if isinstance(one, Storing))
        for t in self.scheduler.timesteps:
            m = self.unet(x, t, encoder_hidden_states=prompt).sample
            x = self.scheduler.step(m * (1 + processor.kept.mean()), t, x).prev_sample
        return (x,)


def test_features_that_an_attention_processor_stores() -> None:
    pipe = Attending(**stable_diffusion().components, requires_safety_checker=False)
    processors = dict(pipe.unet.attn_processors)
    pipe.unet.set_attn_processor(processors | {next(iter(processors)): Storing()})
    refused(pipe, lambda: None, "attention processors Storing")


# ---------------------------------------------------------------- what an earlier step left


def carried(pipe: Any, m: torch.Tensor, kept: Any) -> torch.Tensor:
    own, pipe.kept = pipe.kept, kept
    return m + 0.1 * own


def test_the_first_frame_of_the_state_before() -> None:
    """As in image-to-video of LTX and Sana, and in inpainting of IF."""

    def change(pipe: Any, i: int, t: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.cat([pipe.kept[:, :, :1], x[:, :, 1:]], dim=2)
        pipe.kept = x
        return predict(pipe, t, x), x

    refused(looping(), change, "carries a part of the previous state over, as image-to-video of LTX")


def test_momentum() -> None:
    refused(looping(), lambda pipe, i, t, x: carried(pipe, m := predict(pipe, t, x), m), "momentum")


def test_momentum_that_recording_does_not_see() -> None:
    def change(pipe: Any, i: int, t: Any, x: torch.Tensor) -> torch.Tensor:
        m = predict(pipe, t, x)
        return carried(pipe, m, torch.from_dlpack(torch.utils.dlpack.to_dlpack(m.clone())))

    refused(looping(), change, "as it was recorded gives scheduler.step a model_output that is off")


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
    assert first - calls() == 2  # the first and the last step behind the first
    again = calls()
    assert calls() == again
    assert calls(setting=0.5) - again == 2  # another number in the loop may be another way through it
    assert calls(setting=0.5) == again
    assert calls(n=STEPS + 1) - again == 2
    with hook(pipe, "forward hook", {}):
        assert calls() - again == 2


def test_a_fault_of_a_later_call_is_seen() -> None:
    pipe, store = looping(), {}

    def change(pipe: Any, i: int, t: Any, x: torch.Tensor) -> torch.Tensor:
        return with_feature(pipe, t, x, store) if pipe.setting == 2 else predict(pipe, t, x)

    with hook(pipe, "forward hook", store), parallel_sampling(pipe):
        pipe(change)
        with pytest.raises(PipelineNotParallelError, match="features from inside"):
            pipe(change, setting=2.0)
