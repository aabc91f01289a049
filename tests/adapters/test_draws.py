"""A sampler's normal draws, listened to and replaced."""

from typing import Any

import pytest

pytest.importorskip("torch")
import torch

from parasolver_adapters.draws import Float64, Listener, Recorder, no_noise

SINGLE, DOUBLE = torch.ones(2), torch.ones(2, dtype=torch.float64)


def test_casts_to_single_precision_keep_double() -> None:
    with Float64(no_noise):
        for cast in (
            DOUBLE.float(),
            DOUBLE.to(torch.float32),
            DOUBLE.to(dtype=torch.float32),
            DOUBLE.to("cpu", torch.float32),
            DOUBLE.to("cpu", dtype=torch.float32),
        ):
            assert cast.dtype is torch.float64
        assert DOUBLE.to(torch.float16).dtype is torch.float16
        assert DOUBLE.to(torch.int64).dtype is torch.int64
        assert SINGLE.to("cpu").dtype is torch.float32
        assert (2 * SINGLE).dtype is torch.float32
    assert DOUBLE.float().dtype is torch.float32
    assert DOUBLE.to(torch.float32).dtype is torch.float32


def test_products_take_the_wider_dtype() -> None:
    square = torch.eye(2)
    with Float64(no_noise):
        assert torch.matmul(square, DOUBLE).dtype is torch.float64
        assert torch.dot(SINGLE, DOUBLE).dtype is torch.float64
        assert torch.einsum("i,i->", SINGLE, DOUBLE).dtype is torch.float64
        assert torch.dot(SINGLE, SINGLE).dtype is torch.float32
        assert torch.dot(DOUBLE, DOUBLE).dtype is torch.float64
        with pytest.raises(RuntimeError, match="dtype"):
            torch.dot(SINGLE, torch.ones(2, dtype=torch.int64))


def test_draws_are_replaced() -> None:
    asked: list[Any] = []

    def draw(function: Any, args: Any, kwargs: Any) -> Any:
        asked.append((function, args, kwargs))
        return torch.full((2,), 3.0)

    with Float64(draw):
        one, two = torch.randn(2, generator=None), torch.randn_like(SINGLE)
    assert (one.dtype, two.dtype) == (torch.float64, torch.float64)
    assert torch.equal(one, 3 * DOUBLE)
    assert asked[0] == (torch.randn, (2,), {"generator": None})
    assert asked[1][0] is torch.randn_like
    assert asked[1][1][0] is SINGLE


@pytest.mark.parametrize(
    ("args", "kwargs", "shape"),
    [
        ((2, 3), {}, (2, 3)),
        (((2, 3),), {}, (2, 3)),
        ((), {"size": (4,)}, (4,)),
        ((5,), {}, (5,)),
        (([1, 2],), {}, (1, 2)),
    ],
)
def test_zeros_have_the_shape_of_the_draw(args: Any, kwargs: Any, shape: Any) -> None:
    found = no_noise(torch.randn, args, kwargs)
    assert tuple(found.shape) == shape
    assert not found.any()
    drawn = Recorder(seed=3)(torch.randn, args, kwargs)
    assert (tuple(drawn.shape), drawn.dtype) == (shape, torch.float64)


def test_zeros_are_like_a_tensor_and_on_the_device_asked_for() -> None:
    like = no_noise(torch.randn_like, (torch.ones(2, 3, dtype=torch.float16),), {})
    assert (tuple(like.shape), like.dtype) == ((2, 3), torch.float16)
    assert not like.any()
    assert no_noise(torch.randn, (2,), {"device": "meta"}).device.type == "meta"


def test_recorded_draws_are_independent_and_taken_once() -> None:
    recorder = Recorder(seed=1)
    a, b = (recorder(torch.randn, (1000,), {}) for _ in range(2))
    assert [one is two for one, two in zip(recorder.take(), (a, b), strict=True)] == [True, True]
    assert recorder.take() == []
    c = recorder(torch.randn_like, (a,), {})
    assert recorder.take()[0] is c
    numbers = torch.stack([a, b, c])
    assert float((numbers @ numbers.T / 1000 - torch.eye(3)).abs().max()) < 0.15
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(a, torch.randn(1000, generator=generator, dtype=torch.float64))
    assert not torch.equal(a, Recorder(seed=2)(torch.randn, (1000,), {}))


def test_a_listener_keeps_draws_and_whose_stream_they_came_from() -> None:
    generator = torch.Generator()
    with Listener() as listener:
        first = torch.randn(2, generator=generator)
        torch.rand(2)
        assert not listener.global_stream
        second = torch.randn_like(first)
        assert listener.global_stream
        third = torch.randn(3, generator=generator)
        assert listener.global_stream
    torch.randn(2)
    assert [one is two for one, two in zip(listener.draws, (first, second, third), strict=True)] == [True] * 3
    with listener.playback():
        again = [torch.randn(2), torch.randn(2), torch.randn_like(third)]
    for own, other in zip(listener.draws, again, strict=True):
        assert other.dtype is torch.float64
        assert torch.equal(own.double(), other)
