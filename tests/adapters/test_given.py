"""What a call is given is as it was after passes that are only watched, and after a refusal."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers")
import torch
from torch import Tensor, nn

from parasolver_adapters.diffusers import PipelineNotParallelError, parallel_loop
from parasolver_adapters.given import Given, Streams, write_back
from tests.adapters.tiny_pipelines import ddim, distance, randn

pytestmark = pytest.mark.usefixtures("quiet_diffusers")

GLOBAL = np.random.mtrand._rand  # the global stream of NumPy

STEPS = 12


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh()).requires_grad_(False).double()


def test_arguments_are_as_they_were_in_the_same_objects() -> None:
    x, array, filled, words = torch.ones(2), np.ones(2), [1], {"a": [2]}
    fixed = np.ones(2)
    fixed.flags.writeable = False
    given = Given({"x": x, "more": (array, fixed, {"filled": filled}), "words": words})
    x.mul_(2)
    array *= 2
    filled.append(3)
    words["a"].append(4)
    words["b"] = []
    inner = words["a"]
    words["a"] = [5]
    given.restore()
    assert x.tolist() == array.tolist() == [1, 1]
    assert (filled, words) == ([1], {"a": [2]})
    assert words["a"] is inner


def test_values_are_written_back_wherever_tensors_come_from() -> None:
    with torch.inference_mode():
        inferred = torch.ones(2)
    learned, base = nn.Parameter(torch.ones(2)), torch.ones(1)
    for value in (inferred, learned):
        write_back(value, torch.tensor([3.0, 4.0]))
        assert value.tolist() == [3, 4]
    given = Given({"base": base, "repeated": base.expand(3)})
    base.zero_()
    given.restore()
    assert base.tolist() == [1]


@pytest.mark.parametrize("kind", ["NumPy", "Python", "Generator", "RandomState", "Random"])
def test_streams_outside_of_torch_are_set_back(kind: str) -> None:
    own: dict[str, Any] = {
        "Generator": np.random.default_rng(1), "RandomState": np.random.RandomState(1), "Random": random.Random(1)
    }  # fmt: skip
    draw = {
        "NumPy": GLOBAL.rand, "Python": random.random, "Generator": own["Generator"].random,
        "RandomState": own["RandomState"].rand, "Random": own["Random"].random,
    }[kind]  # fmt: skip
    streams = Streams({"more": [own]})
    first = draw()
    assert draw() != first
    streams.restore()
    assert draw() == first


@pytest.mark.parametrize("refused", [True, False])
def test_a_loop_that_writes_into_its_arguments(refused: bool) -> None:
    """What is left to the loop began with what the watched pass had written, without a word, and was off by a half."""
    net = network()
    scheduler: Any = ddim()

    @torch.no_grad()
    def loop(x: Tensor, seen: list[Any], counts: np.ndarray) -> Tensor:
        scheduler.set_timesteps(STEPS)
        x.mul_(0.5)
        for i, t in enumerate(scheduler.timesteps):
            m = net(x)
            if refused and i == STEPS // 2:
                m = m * float(x.norm() > 0)
            counts += 1
            seen.append(i)
            x = scheduler.step(m, t, x).prev_sample
        return x

    def arguments() -> tuple[Tensor, list[Any], np.ndarray]:
        return randn(2, 6), [], np.zeros(1)

    own, ours, before = arguments(), arguments(), arguments()
    want = loop(*own)
    options: dict[str, Any] = {"scheduler": scheduler, "networks": [net], "tolerance": 0.0}
    if refused:
        with pytest.raises(PipelineNotParallelError, match="decides by the values"):
            parallel_loop(loop, 5, **options)(*ours)
        assert torch.equal(ours[0], before[0])
        assert ours[1:] == before[1:]
        with pytest.warns(UserWarning, match="sampled sequentially"):
            got = parallel_loop(loop, 5, fallback="sequential", **options)(*ours)
    else:
        got = parallel_loop(loop, 5, **options)(*ours)
    assert distance(got, want) < 1e-12
    assert torch.equal(ours[0], own[0])
    assert ours[1:] == own[1:]


def test_a_state_inside_a_dictionary_that_the_loop_writes_back() -> None:
    """The second pass began with the last state of the first, and was refused for that."""
    net = network()
    scheduler: Any = ddim()

    @torch.no_grad()
    def loop(batch: dict[str, Tensor]) -> Tensor:
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            batch["x"] = scheduler.step(net(batch["x"]), t, batch["x"]).prev_sample
        return batch["x"]

    sample = parallel_loop(loop, 5, scheduler=scheduler, networks=[net], tolerance=0.0)
    assert distance(sample({"x": randn(2, 6)}), loop({"x": randn(2, 6)})) < 1e-12
    assert sample.run.reason is None
    assert sample.run.stats.rounds > 1


@pytest.mark.parametrize("refused", [True, False])
def test_noise_that_numpy_draws(refused: bool) -> None:
    """Of the global stream: it was drawn again for each pass."""
    net = network()
    scheduler: Any = ddim()

    @torch.no_grad()
    def loop() -> Tensor:
        scheduler.set_timesteps(STEPS)
        x = torch.from_numpy(GLOBAL.standard_normal((2, 6)))
        for t in scheduler.timesteps:
            m = net(x) * (float(x.norm() > 0) if refused else 1.0)
            x = scheduler.step(m, t, x).prev_sample + 0.01 * torch.from_numpy(GLOBAL.standard_normal((2, 6)))
        return x

    GLOBAL.seed(3)
    want, after = loop(), GLOBAL.rand()
    GLOBAL.seed(3)
    fallback = "sequential" if refused else "error"
    sample = parallel_loop(loop, 5, scheduler=scheduler, networks=[net], tolerance=0.0, fallback=fallback)
    if refused:
        with pytest.warns(UserWarning, match="sampled sequentially"):
            got = sample()
    else:
        got = sample()
    assert distance(got, want) < 1e-12
    assert GLOBAL.rand() == after


def test_a_refused_call_leaves_the_generator_where_it_was() -> None:
    net = network()
    scheduler: Any = ddim()

    @torch.no_grad()
    def loop(generator: torch.Generator) -> Tensor:
        scheduler.set_timesteps(STEPS)
        x = torch.randn(2, 6, generator=generator, dtype=torch.float64)
        for t in scheduler.timesteps:
            x = scheduler.step(net(x) * float(x.norm() > 0), t, x).prev_sample
        return x

    generator = torch.Generator().manual_seed(0)
    with pytest.raises(PipelineNotParallelError):
        parallel_loop(loop, 5, scheduler=scheduler, networks=[net])(generator)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())
