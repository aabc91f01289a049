"""What is told of a sampler's table by its pattern, and of its network by a schedule."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from parasolver_adapters.samplers import UnsupportedSamplerError, parallel, step_rule_from_sampler
from parasolver_adapters.samplers.parallel import _check_outputs_are_read
from parasolver_adapters.samplers.rules import _stages, path_of
from parasolver_core import NoiseSchedule
from tests.adapters.test_sampler_rules import LEVELS, Changing, X, euler, network


def pattern(period: int, calls: int, part: int = 2) -> Any:
    """A band whose part (0: states, 1: outputs, 2: noise) is zero but in the first of so many calls."""
    a, b, c = np.ones((calls, 2)), np.ones((calls, 2)), np.ones(calls)
    first = np.arange(calls) % period == 0
    if part == 2:
        c = np.where(first, 1.0, 0.0)
    else:
        (a, b)[part][:, 1] = np.where(first, 0.5, 0.0)
    return a, b, c


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize(
    ("period", "calls", "stages"),
    [
        (1, 40, 1),
        (2, 40, 2),
        (3, 40, 3),
        (8, 40, 8),
        (9, 40, 1),  # not told apart
        (2, 7, 2),  # four inner calls
        (2, 6, 1),  # of three none is known to repeat
        (3, 9, 3),
        (3, 8, 1),
        (1, 2, 1),
    ],
)
def test_calls_that_repeat_make_a_step(period: int, calls: int, stages: int, part: int) -> None:
    assert _stages(pattern(period, calls, part)) == stages


@pytest.mark.parametrize(("calls", "odd", "stages"), [(25, 7, 2), (25, 8, 1), (25, 20, 1), (25, 21, 2), (24, 7, 1)])
def test_the_ends_of_long_runs_do_not_count(calls: int, odd: int, stages: int) -> None:
    """Eight calls at the beginning and four at the end; of up to 24 calls two and one."""
    a, b, c = pattern(2, calls)
    a[odd, 1] = 0
    assert _stages((a, b, c)) == stages


def rule_of(*b: list[float]) -> Any:
    return SimpleNamespace(table=SimpleNamespace(b=np.array(b)), _call=SimpleNamespace(name="one"))


@pytest.mark.parametrize(
    ("b", "step"),
    [
        ([[1.0, 0, 0], [1.0, 0.5, 0], [1.0, 0, 0.5]], None),
        ([[0.0, 0, 0], [1.0, 0, 0], [1.0, 1.0, 0]], None),  # what nobody reads does not matter
        ([[0.0, 0, 0], [1.0, 1.0, 0], [1.0, 0, 0]], 0),
        ([[0.0, 0, 0], [1.0, 0, 0], [1.0, 0, 0.5]], 0),
        ([[1.0, 0, 0], [0.0, 0, 0], [1.0, 0.5, 0]], 1),
        ([[1.0, 0, 0], [1.0, 0, 0], [0.0, 1.0, 1.0]], None),  # after the last none follows
    ],
)
def test_outputs_that_a_later_step_alone_reads_are_refused(b: list[list[float]], step: int | None) -> None:
    if step is None:
        _check_outputs_are_read(rule_of(*b))
        return
    with pytest.raises(UnsupportedSamplerError, match=f"step {step} of one does not read the network's output"):
        _check_outputs_are_read(rule_of(*b))


def test_what_is_known_of_a_network_at_a_time() -> None:
    """``(alpha, sigma, p, q)``: a clean sample is p times the state and q times the output."""
    assert path_of(None, "sample")(-3.0) == (1.0, 3.0, 0.0, 1.0)
    assert path_of(None, "epsilon")(2.0) == (1.0, 2.0, 1.0, -2.0)
    flow = path_of(NoiseSchedule.flow_matching(), "flow")
    for t in (0.0, 0.25, 1.0):
        assert flow(t) == (1 - t, t, 1.0, -t)
    with pytest.raises(ValueError, match="t"):
        flow(1.5)
    karras = path_of(NoiseSchedule.karras(0.1, 5.0), "sample")
    assert karras(2.0) == (1.0, 2.0, 0.0, 1.0)


def test_draws_that_only_some_steps_share() -> None:
    def some(model: Any, x: Any, levels: Any) -> Any:
        z = torch.randn_like(x)
        for k, (here, after) in enumerate(pairwise(levels)):
            m = model(x, torch.full((len(x),), here, dtype=x.dtype))
            x = m + after / here * (x - m) + (0.5 if k in (2, 3) else 0.0) * z
        return x

    rule = step_rule_from_sampler(some, LEVELS)
    assert not rule.independent_noise
    assert [bool(c) for c in rule.table.c > 1e-6] == [False, False, True, True, False]


@pytest.mark.parametrize(("dtype", "off", "fine"), [("float16", 1.02, True), ("float16", 1.1, False)])
def test_rounding_of_short_numbers_is_not_taken_for_another_sampler(dtype: str, off: float, fine: bool) -> None:
    """Up to the root of the dtype's precision, which is 0.03."""
    x = X.to(getattr(torch, dtype))
    nearly = Changing(lambda m, x, levels: euler(lambda y, t: m(y * off ** (t[0] == 2).item(), t), x, levels))
    sampler = parallel(nearly, 4, tolerance=0.0)
    if fine:
        assert bool(torch.isfinite(sampler(network, x, LEVELS)).all())
        return
    with pytest.raises(UnsupportedSamplerError, match="step 1 is off its own table"):
        sampler(network, x, LEVELS)


def noisy(model: Any, x: torch.Tensor, sigmas: torch.Tensor, draw: Any) -> torch.Tensor:
    for here, after in pairwise(sigmas):
        x = x + (x - model(x, here.expand(len(x)))) / here * (after - here) + 0.1 * after * draw(x)
    return x


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.randn((1, *x.shape[1:]), dtype=x.dtype),
        lambda x: torch.randn((len(x), 1), dtype=x.dtype),
        lambda x: torch.randn(x.numel(), dtype=x.dtype).reshape(x.shape),
    ],
    ids=["one for all samples", "one for all values", "flat"],
)
def test_noise_of_another_shape_than_the_state(draw: Any) -> None:
    """It ended in an error about the shape of an array."""
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = torch.arange(9.0, 0, -1)
    model = lambda x, sigma: torch.tanh(x.roll(1, 1)) / (1 + sigma[:, None])  # noqa: E731
    torch.manual_seed(1)
    want, after = noisy(model, x, levels, draw), torch.rand(1)
    sample = parallel(noisy, window=4, tolerance=0.0)
    torch.manual_seed(1)
    torch.testing.assert_close(sample(model, x, levels, draw), want, rtol=1e-6, atol=1e-6)
    assert torch.equal(torch.rand(1), after)
    assert sample.solution is not None


def test_a_sampler_that_is_refused_finds_the_stream_of_numpy_where_it_was() -> None:
    """It was read first, which drew from there."""
    numbers = np.random.mtrand._rand  # the global stream
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = torch.arange(9.0, 0, -1)
    model = lambda x, sigma: torch.tanh(x) / (1 + sigma[:, None])  # noqa: E731
    draw = lambda x: torch.from_numpy(numbers.standard_normal(x.shape))  # noqa: E731
    numbers.seed(1)
    want = noisy(model, x, levels, draw)
    numbers.seed(1)
    with pytest.warns(UserWarning, match="sequential"):
        assert torch.equal(parallel(noisy, window=4, fallback="sequential")(model, x, levels, draw), want)
