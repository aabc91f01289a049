"""How calls are seen and everything is put back; what is known of a loop from the pass that is only watched."""

from __future__ import annotations

import inspect
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("diffusers")
import torch
from torch import nn

from parasolver_adapters.diffusers.passes.first_pass import Prelude, _bytes, _options, _places
from parasolver_adapters.diffusers.passes.listening import (
    Listener,
    by_name,
    called,
    decoders_of,
    is_a,
    listening,
    networks_of,
    processors_of,
    put_back,
    subclass,
    with_state,
)
from parasolver_adapters.diffusers.recording.capture import form_of_call
from parasolver_adapters.given import Streams, version_of


class Scheduler:
    def step(self, model_output: Any, timestep: Any, sample: Any, eta: float = 0.0) -> Any:
        return model_output + sample + eta


class Net(nn.Module):
    def forward(self, x: Any, scale: float = 1.0) -> Any:
        return x * scale


class Doubled(Listener):
    """Everything twice."""

    def network(self, module: Any, forward: Any, args: Any, kwargs: Any) -> Any:
        return 2 * super().network(module, forward, args, kwargs)

    def step(self, scheduler: Any, step: Any, given: dict[str, Any]) -> Any:
        assert next(iter(given)) == "self"
        return 2 * super().step(scheduler, step, given)


def pipe_of(net: nn.Module) -> Any:
    return SimpleNamespace(scheduler=Scheduler(), components={"unet": net, "vae": nn.Identity(), "tokenizer": "word"})


def test_calls_go_through_the_listener_and_everything_is_put_back() -> None:
    net = Net()
    pipe = pipe_of(net)
    signature = inspect.signature(pipe.scheduler.step)
    with listening(pipe, Doubled()):
        assert net(3, scale=2.0) == 12
        assert pipe.scheduler.step(1, 2, sample=4, eta=0.5) == 11
        assert inspect.signature(pipe.scheduler.step) == signature
        assert type(pipe.scheduler) == Scheduler  # noqa: E721
        kept, outliving = net.forward, type(pipe.scheduler)()
    assert type(pipe.scheduler) is Scheduler
    assert "forward" not in vars(net)
    assert net(3, scale=2.0) == 6
    assert kept(3, scale=2.0) == 6  # who has kept them is answered as ever
    assert outliving.step(1, 2, 4, 0.5) == 5.5


def test_listeners_in_each_other_and_a_forward_of_its_own() -> None:
    net = Net()
    net.forward = own = lambda x: x + 1  # type: ignore[method-assign, assignment]
    with listening(pipe_of(net), Doubled()):
        with listening(pipe_of(net), Doubled()):
            assert net(3) == 16
        assert net(3) == 8
    assert net.forward is own


def test_a_listener_hears_its_own_thread_only() -> None:
    net = Net()
    others = listening(pipe_of(net), Doubled())
    with ThreadPoolExecutor(1) as other:
        other.submit(others.__enter__).result()
        assert net(3) == 3
        assert other.submit(net, 3).result() == 6
        with listening(pipe_of(net), Doubled()):
            assert net(3) == 6
            assert other.submit(net, 3).result() == 6
        assert net(3) == 3  # taken back, and not the other's
        assert other.submit(net, 3).result() == 6
        with listening(pipe_of(net), Doubled()):
            other.submit(others.__exit__, None, None, None).result()
            assert net(3) == 6
            assert other.submit(net, 3).result() == 3
    assert "forward" not in vars(net)


def test_arguments_by_their_names() -> None:
    def function(a: int, b: int = 2, *, c: int = 3) -> None:
        pass

    signature = inspect.signature(function)
    assert by_name(signature, (1,), {"c": 4}) == {"a": 1, "c": 4}
    assert by_name(signature, (1, 5), {}) == {"a": 1, "b": 5}
    assert by_name(signature, (), {"a": 1}) == {"a": 1}
    for args, kwargs in (((1, 2, 3, 4), {}), ((1,), {"a": 2})):
        with pytest.raises(TypeError, match=r"too many positional|multiple values"):
            by_name(signature, args, kwargs)


@pytest.mark.parametrize("args", [(), (1,), (1, 2), (1, 2, 3)])
def test_arguments_without_names_stay_where_they_are(args: tuple[int, ...]) -> None:
    def anything(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    def one(a: Any = 0, *args: Any, **kwargs: Any) -> Any:
        return (a, *args), kwargs

    def first(a: Any = 0, /, **kwargs: Any) -> Any:
        return a, kwargs

    for function in (anything, one, first)[: 3 if len(args) < 2 else 2]:
        given = by_name(inspect.signature(function), args, {"c": 4})
        assert given["c"] == 4
        assert called(function, given) == function(*args, c=4)


def test_a_subclass_passes_for_the_class_itself() -> None:
    made = subclass(Scheduler, {"more": 1})
    assert made == Scheduler
    assert made != Net
    assert made is not Scheduler
    assert made == made
    assert hash(made) == hash(Scheduler)
    assert {Scheduler: 1}[made] == 1
    assert (made.__name__, made.__module__, made.__qualname__) == ("Scheduler", __name__, "Scheduler")
    assert made.more == 1
    assert issubclass(made, Scheduler)


def test_an_output_with_another_state() -> None:
    class Output(dict[str, Any]):
        @property
        def prev_sample(self) -> torch.Tensor:
            return self["prev_sample"]

    state = torch.ones(2, dtype=torch.float64)
    got = with_state((torch.zeros(2), "more"), state)
    assert got[1] == "more"
    assert (got[0].dtype, got[0].tolist()) == (torch.float32, [1, 1])
    got = with_state(Output(prev_sample=torch.zeros(2), more=1), state)
    assert got["more"] == 1
    assert (got["prev_sample"].dtype, got["prev_sample"].tolist()) == (torch.float32, [1, 1])


def test_classes_of_diffusers_are_known_by_name() -> None:
    from diffusers import DDIMScheduler

    class Own(DDIMScheduler):
        pass

    assert is_a(Own(), "DDIMScheduler")
    assert not is_a(Own(), "Own")
    assert not is_a(Own(), "DDPMScheduler")


def test_the_parts_of_a_pipeline() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn_processors, self.set = {"a": 1}, list[Any]()

        def set_attn_processor(self, given: dict[str, Any]) -> None:
            self.set.append(given)
            self.attn_processors = given

    vae, odd = nn.Module(), nn.Module()
    vae.decoder = nn.Identity()
    odd.decoder = nn.Identity()
    net, attending = Net(), Attending()
    parts = {"unet": net, "other": attending, "vae": vae, "my_vae": nn.Module(), "odd": odd, "word": "word"}
    pipe = SimpleNamespace(components=parts)
    assert networks_of(pipe) == {"unet": net, "other": attending, "odd": odd}
    assert decoders_of(pipe) == [vae.decoder]
    known = processors_of(pipe)
    assert known == [(attending, {"a": 1})]
    put_back(known)
    assert attending.set == []
    attending.attn_processors = {"a": 2}
    put_back(known)
    assert attending.set == [{"a": 1}]
    assert known[0][1] is not attending.attn_processors


def test_calls_before_the_loop_are_answered_as_they_were() -> None:
    net, other = Net(), Net()
    x, y = torch.ones(2), torch.ones(3)

    def known(module: nn.Module, given: torch.Tensor) -> Any:
        output = given * 5
        return form_of_call(module, {}, [given]), output, [version_of(output)]

    def answer(prelude: Prelude, module: nn.Module, given: torch.Tensor) -> list[float]:
        return prelude.answer(module, module.forward, (given,), {}).tolist()

    prelude = Prelude([known(net, x), known(net, y)])
    assert [answer(prelude, net, one) for one in (x, y, x)] == [[5, 5], [5, 5, 5], [1, 1]]  # each once
    prelude = Prelude([known(net, x), known(net, x)])
    assert answer(prelude, other, x) == [1, 1]  # another network
    assert answer(prelude, net, x) == [5, 5]
    prelude = Prelude([known(net, x), known(net, x)])
    assert answer(prelude, net, y) == [1, 1, 1]  # another form
    assert answer(prelude, net, x) == [5, 5]
    written = known(net, x)
    written[1].add_(1)
    assert answer(Prelude([written]), net, x) == [1, 1]


def test_the_places_of_a_timestep() -> None:
    timesteps = torch.tensor([9, 7, 7, 3])
    assert _places(timesteps, torch.tensor(7)) == [1, 2]
    assert _places(timesteps, torch.tensor([3, 3])) == [3]
    assert _places(timesteps, 9) == [0]
    assert _places(timesteps, 8) == []


def test_options_of_a_step_are_what_the_caller_has_chosen() -> None:
    class UnCLIPScheduler:
        pass

    class CogVideoXDPMScheduler:
        pass

    defaults = {"eta": 0.0, "flag": None}
    common = {"self": 1, "model_output": 1, "timestep": 1, "sample": 1, "generator": 1, "return_dict": False}
    given = common | {"eta": 0.5, "flag": None, "more": 1, "prev_timestep": 3, "timestep_back": 2}
    expected = {"eta": 0.5, "more": 1}
    assert _options(given, CogVideoXDPMScheduler(), defaults) == expected
    assert _options(given, UnCLIPScheduler(), defaults) == expected | {"timestep_back": 2}
    assert _options(common | {"eta": defaults["eta"]}, UnCLIPScheduler(), defaults) == {}


def test_bytes_of_any_table() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        assert len(_bytes(torch.ones(3, dtype=dtype))) == 3 * dtype.itemsize
    assert _bytes(torch.ones(3)) != _bytes(torch.zeros(3))
    assert _bytes(torch.arange(6).reshape(2, 3).T) == _bytes(torch.arange(6).reshape(2, 3).T.contiguous())


def test_streams_of_random_numbers_are_set_back() -> None:
    generator, inner = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    given = {"generator": generator, "more": [inner, 3], "word": "word"}
    streams = Streams(given)
    assert streams.same_as(Streams(given))

    def draws() -> list[float]:
        return [float(torch.rand((), generator=one)) for one in (generator, inner, None)]

    for one in (generator, inner, None):
        torch.rand((), generator=one)
        assert not streams.same_as(Streams(given))
        streams.restore()
        assert streams.same_as(Streams(given))
    first = draws()
    streams.restore()
    assert draws() == first
    later = Streams(given)
    streams.restore()
    later.restore()
    assert later.same_as(Streams(given))
    assert draws() != first
    streams.restore()


def test_streams_of_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for them."""
    states, seen = [torch.tensor([1]), torch.tensor([2])], list[Any]()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [state.clone() for state in states])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda given: seen.append([int(one) for one in given]))
    streams = Streams({})
    assert streams.same_as(Streams({}))
    states[1] += 1
    assert not streams.same_as(Streams({}))
    streams.restore()
    assert seen == [[1, 2]]
