"""Samplers of a few lines, whose tables are known: what is read of them, what is refused, and how they are run."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from torch import Tensor

from parasolver_adapters.samplers import UnsupportedSamplerError, parallel, step_rule_from_sampler
from parasolver_adapters.samplers.rules import Draft
from parasolver_core import NoiseSchedule

LEVELS = [4.0, 3.0, 2.0, 1.0, 0.5, 0.25]
X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


def network(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.tanh(x / (1 + sigma[:, None]))


def euler(model: Any, x: Tensor, levels: Any, noise: float = 0.0, start: float = 0.0, scale: float = 1.0) -> Tensor:
    """``x' = r x + (1 - r) m + noise z`` with the ratio r of two levels."""
    x = scale * x
    if start:
        x = x + start * torch.randn_like(x)
    for here, after in pairwise(levels):
        m = model(x, torch.full((len(x),), here, dtype=x.dtype))
        x = m + after / here * (x - m)
        if noise and after < 2:
            x = x + noise * after * torch.randn_like(x)
    return x


RATIOS = np.array(LEVELS[1:]) / np.array(LEVELS[:-1])


@pytest.mark.parametrize(
    ("noise", "start", "scale"), [(0.0, 0.0, 1.0), (0.3, 0.0, 2.0), (0.3, 0.7, 4.0), (0.0, 0.7, 1.0)]
)
def test_the_table_of_a_sampler_that_is_known(noise: float, start: float, scale: float) -> None:
    rule = step_rule_from_sampler(euler, LEVELS, noise=noise, start=start, scale=scale)
    np.testing.assert_array_equal(rule.timesteps, LEVELS[:-1])
    np.testing.assert_allclose(rule.table.a, RATIOS[:, None], rtol=1e-12)
    np.testing.assert_allclose(rule.table.b, 1 - RATIOS[:, None], rtol=1e-12)
    added = np.where(np.array(LEVELS[1:]) < 2, noise * np.array(LEVELS[1:]), 0)
    np.testing.assert_allclose(rule.table.c, added, rtol=1e-12)
    assert rule.init_noise_sigma == pytest.approx(scale, rel=1e-12)
    assert (rule.independent_noise, rule.noisy_start, rule.table.stages) == (True, start > 0, 1)
    # the network's slope for data of deviation 1/2 beside noise: 1/4 over 1/4 and the level's square
    np.testing.assert_allclose(rule.table.slope, 0.25 / (0.25 + np.array(LEVELS[:-1]) ** 2), rtol=1e-12)
    wide = step_rule_from_sampler(euler, LEVELS, sigma_data=1.0)
    np.testing.assert_allclose(wide.table.slope, 1 / (1 + np.array(LEVELS[:-1]) ** 2), rtol=1e-12)
    x_T, drawn = rule.prepare(X)
    assert (drawn is None) == (noise == 0)
    if not start:
        assert torch.equal(x_T, scale * X)


def test_a_schedule_says_what_the_data_are() -> None:
    """By default of the deviation that the schedule was made for."""
    karras = NoiseSchedule.karras(0.1, 5.0, sigma_data=1.0)
    rule = step_rule_from_sampler(euler, LEVELS, schedule=karras)
    np.testing.assert_allclose(rule.table.slope, 1 / (1 + np.array(LEVELS[:-1]) ** 2), rtol=1e-12)
    assert parallel(euler, schedule=karras)._sigma_data == 1.0
    assert parallel(euler, schedule=karras, sigma_data=2.0)._sigma_data == 2.0
    assert parallel(euler)._sigma_data == 0.5
    with pytest.raises(ValueError, match=r"schedule: by it the noise grows from time 0\.5 to 4"):
        step_rule_from_sampler(euler, [0.5, 1.0, 2.0, 4.0, 5.0], schedule=karras)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_the_samplers_own_noise_step_by_step(dtype: torch.dtype) -> None:
    rule = step_rule_from_sampler(euler, LEVELS, noise=0.3, start=0.7, scale=2.0)
    x = X.to(dtype)
    torch.manual_seed(1)
    x_T, noise = rule.prepare(x)
    follows = torch.rand(1)
    torch.manual_seed(1)
    start, *drawn = [torch.randn_like(x) for _ in range(4)]
    assert torch.equal(follows, torch.rand(1))
    torch.testing.assert_close(x_T, 2 * x + 0.7 * start)
    assert noise is not None
    assert noise.dtype is (torch.float32 if dtype is torch.float16 else dtype)
    limit = {torch.float16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    assert not noise[:2].any()
    torch.testing.assert_close(noise[2:], torch.stack(drawn).to(noise.dtype), rtol=limit, atol=limit)


def late(model: Any, x: Tensor, levels: Any) -> Tensor:
    """As it should be, up to a clip at the end."""
    return euler(model, x, levels).clamp(-0.5, 0.5)


def middle(model: Any, x: Tensor, levels: Any) -> Tensor:
    return euler(lambda x, t: model(x, t) if t[0] != 2 else model(x, t).clamp(-0.5, 0.5), x, levels)


def test_what_follows_the_last_output_is_the_samplers_own_where_it_runs_itself() -> None:
    with pytest.raises(UnsupportedSamplerError, match=r"step 4 of late \(time 0\.5\) is not a linear combination"):
        step_rule_from_sampler(late, LEVELS)
    got = parallel(late, 4, tolerance=0.0)(network, X, LEVELS)
    torch.testing.assert_close(got, late(network, X, LEVELS), rtol=1e-5, atol=1e-5)
    for read in (lambda: step_rule_from_sampler(middle, LEVELS), lambda: parallel(middle, 4)(network, X, LEVELS)):
        with pytest.raises(UnsupportedSamplerError, match=r"step 2 of middle \(time 2\) is not a linear combination"):
            read()


def adaptive(model: Any, x: Tensor, levels: Any) -> Tensor:
    m = x
    for k, level in enumerate(levels):
        own = level / 2 if k >= 2 and float(m.abs().max()) > 2.01 else level
        m = model(x, torch.full((len(x),), own, dtype=x.dtype))
        x = x / 2 + m / 2
    return x


def test_steps_that_the_network_chooses_are_refused() -> None:
    with pytest.raises(UnsupportedSamplerError, match=r"adaptive chooses its steps .*: call 2 came at other times"):
        step_rule_from_sampler(adaptive, LEVELS)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda model, x: [model(x, 1.0)], "returns something else than its last state, or a tuple that begins"),
        (lambda model, x: model(x, 1.0)[:, :, :1], "returns something else than its last state"),
        (lambda model, x: (), "did not call its network"),
        (lambda model, x: model(model(x, 2.0) / 0, 1.0), "own run gives NaN or infinity at step 0"),
        (lambda model, x: model(model(x, 2.0), 1.0) / 0, "own run gives NaN or infinity at step 1"),
        (lambda model, x: model(3, 1.0), "gives its network int in call 0, where its state is"),
        (lambda model, x: model(model(x, 2.0)[:, 0], 1.0), r"gives its network \(1, 8, 8\) in call 1"),
        (lambda model, x: model(model(x, 2.0), 1.0).missing, "own run fails after 2 calls of the network, Attrib"),
        (lambda model, x: model(x**2, 1.0), "the first state of <lambda> is not a multiple of what it is given"),
    ],
)
def test_what_is_no_sampler_is_refused(fn: Any, message: str) -> None:
    with pytest.raises(UnsupportedSamplerError, match=message):
        step_rule_from_sampler(fn)
    with pytest.raises(TypeError, match="fn: expected a sampler"):
        step_rule_from_sampler(3)  # type: ignore[arg-type]


def test_a_tuple_may_begin_with_the_last_state() -> None:
    rule = step_rule_from_sampler(lambda model, x: (euler(model, x, LEVELS), "and more"))
    np.testing.assert_allclose(rule.table.a, RATIOS[:, None], rtol=1e-12)


def shares(model: Any, x: Tensor, levels: Any, noise: float = 0.5) -> Tensor:
    """Two steps, one draw: each step adds the same noise as the step before it did."""
    z = noise * torch.randn_like(x)
    for here, after in pairwise(levels):
        m = model(x, torch.full((len(x),), here, dtype=x.dtype))
        x = m + after / here * (x - m) + z
    return x


def test_steps_that_share_their_draws() -> None:
    rule = step_rule_from_sampler(shares, LEVELS)
    assert not rule.independent_noise
    np.testing.assert_allclose(rule.table.a, RATIOS[:, None], rtol=1e-12)
    np.testing.assert_allclose(rule.table.c, rule.table.c[0], rtol=1e-12)
    np.testing.assert_allclose(rule.table.c, 0.5, rtol=0.5)  # as large as the numbers of the probes happen to be
    torch.manual_seed(3)
    want = shares(network, X, LEVELS)
    torch.manual_seed(3)
    torch.testing.assert_close(parallel(shares, 4, tolerance=0.0)(network, X, LEVELS), want, rtol=1e-5, atol=1e-5)
    assert step_rule_from_sampler(shares, LEVELS, noise=0.0).independent_noise


class Changing:
    """A sampler that is another from its fourth run on: it is read in two, drafted in one."""

    def __init__(self, fn: Any) -> None:
        self.fn, self.runs = fn, 0

    def __call__(self, model: Any, x: Tensor, levels: Any) -> Tensor:
        self.runs += 1
        return euler(model, x, levels) if self.runs <= 3 else self.fn(model, x, levels)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda m, x, levels: euler(m, x, levels[:-1]), "it called its network 4 times, and 5 when it was read"),
        (lambda m, x, levels: x, "it called its network 0 times, and 5 when it was read"),
        (lambda m, x, levels: euler(m, x, [*levels, 0.1]), "more often than the 5 times when it was read"),
        (
            lambda m, x, levels: euler(m, x, [*levels[:2], 2.0001, *levels[3:]]),
            "call 2 is at time 2.0001, and was at 2",
        ),
        (
            lambda m, x, levels: euler(lambda y, t: m(y * 1.01 ** (t[0] == 2), t), x, levels),
            "step 1 is off its own table",
        ),
    ],
)
def test_a_sampler_that_changes_is_found_out(fn: Any, message: str) -> None:
    with pytest.raises(UnsupportedSamplerError, match=message):
        parallel(Changing(fn), 4, tolerance=0.0)(network, X, LEVELS)
    with pytest.warns(UserWarning, match="sampled sequentially"):
        parallel(middle, 4, fallback="sequential")(network, X, LEVELS)


def test_small_differences_are_a_samplers_own_rounding() -> None:
    nearly = Changing(lambda m, x, levels: euler(lambda y, t: m(y * 1.00005 ** (t[0] == 2), t), x, levels))
    sampler = parallel(nearly, 4, tolerance=0.0)
    want = euler(network, X, LEVELS)
    torch.testing.assert_close(sampler(network, X, LEVELS), want, rtol=2e-4, atol=2e-4)
    assert nearly.runs == 4
    assert sampler.solution is not None
    assert sampler.solution.trajectory is None


def test_the_last_call_says_what_it_cost() -> None:
    sampler = parallel(euler, 4, tolerance=0.0)
    assert sampler.solution is None
    got = sampler(network, X, LEVELS)
    assert sampler.solution is not None
    torch.testing.assert_close(sampler.solution.sample, got, rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match="x: expected a tensor, got ndarray"):
        sampler(network, X.numpy(), LEVELS)  # type: ignore[arg-type]
    assert sampler.solution is None
    plain = parallel(euler, 1)
    assert torch.equal(plain(network, X, LEVELS), euler(network, X, LEVELS))
    assert plain.solution is None
    with pytest.raises(TypeError, match="fn: expected a sampler"):
        parallel(None)  # type: ignore[arg-type]


def test_arguments_that_steps_cannot_share_are_refused_with_their_name() -> None:
    def worded(model: Any, x: Tensor, levels: Any) -> Tensor:
        return euler(lambda x, t: model(x, t, f"level {float(t[0])}"), x, levels)

    with pytest.raises(UnsupportedSamplerError, match=r"sampler: arguments of the network.* changes from call to call"):
        parallel(worded, 4)(lambda x, t, word: network(x, t), X, LEVELS)


def test_a_draft_is_of_the_runs_own_shape_and_dtype() -> None:
    rule = step_rule_from_sampler(euler, LEVELS)
    draft = Draft.of(rule, X.double())
    assert draft.dtype is torch.float64
    assert (draft.inputs, draft.drawn) == ([], [])
    assert [float(args[0][0]) for args, _ in draft.arguments] == LEVELS[:-1]
    assert {tuple(args[0].shape) for args, _ in draft.arguments} == {(2,)}
    noisy = Draft.of(step_rule_from_sampler(euler, LEVELS, noise=0.3), X)
    assert len(noisy.inputs) == len(LEVELS)
    assert {(tuple(state.shape), state.dtype) for state in noisy.inputs} == {((2, 3), torch.float32)}
    rule = step_rule_from_sampler(Fewer(), LEVELS)
    with pytest.raises(UnsupportedSamplerError, match="made 4 calls of its network, and 5 when it was read"):
        Draft.of(rule, X)


class Fewer(Changing):
    def __init__(self) -> None:
        super().__init__(None)

    def __call__(self, model: Any, x: Tensor, levels: Any) -> Tensor:
        self.runs += 1
        return euler(model, x, levels if self.runs <= 2 else levels[:-1])


def test_replicas_share_the_rows_of_a_round() -> None:
    rows: list[list[int]] = [[], []]

    def counted(k: int) -> Any:
        return lambda x, t: rows[k].append(len(x)) or network(x, t)

    got = parallel(euler, 4, tolerance=0.0, replicas=[counted(1)])(counted(0), X, LEVELS)
    torch.testing.assert_close(got, euler(network, X, LEVELS), rtol=1e-5, atol=1e-5)
    assert sum(rows[0]) > 0
    assert sum(rows[1]) > 0


@pytest.mark.parametrize("given", ["noise_sampler", "randn_like"])
def test_draws_from_the_users_own_source_are_played_once_more(given: str) -> None:
    """In their order, and the source is asked no more often than the sampler asks it."""
    asked: list[int] = []

    def source(*_: Any) -> Tensor:
        asked.append(len(asked))
        return torch.full((2, 3), float(len(asked)))

    def drawing(model: Any, x: Tensor, levels: Any, **sources: Any) -> Tensor:
        for here, after in pairwise(levels):
            m = model(x, torch.full((len(x),), here, dtype=x.dtype))
            x = m + after / here * (x - m) + 0.1 * sources[given](x)
        return x

    want = drawing(network, X, LEVELS, **{given: source})
    asked.clear()
    got = parallel(drawing, 4, tolerance=0.0)(network, X, LEVELS, **{given: source})
    assert len(asked) == 5
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_single_number_that_is_none_is_enough() -> None:
    def broken(model: Any, x: Tensor) -> Tensor:
        x = model(x, 2.0)
        return model(torch.where(torch.arange(x.numel()).reshape(x.shape) == 5, torch.nan, x), 1.0)

    with pytest.raises(UnsupportedSamplerError, match="own run gives NaN or infinity at step 0"):
        step_rule_from_sampler(broken)


@pytest.mark.parametrize("which", [0, 1])
def test_a_sampler_that_returns_its_state_to_some_networks_only_is_refused(which: int) -> None:
    runs: list[int] = []

    def moody(model: Any, x: Tensor, levels: Any) -> Any:
        runs.append(1)
        end = euler(model, x, levels)
        return {"x": end} if len(runs) - 1 == which else end

    with pytest.raises(UnsupportedSamplerError, match="moody returns something else than its last state"):
        step_rule_from_sampler(moody, LEVELS)


def test_noise_that_grows_between_any_two_times_is_of_no_matter_but_from_first_to_last() -> None:
    """A second call of a step may be at a lower time than the next step's."""
    flow = NoiseSchedule.flow_matching()

    def two(model: Any, x: Tensor, times: Any) -> Tensor:
        for here, after in pairwise(times):
            m = model(x, torch.full((len(x),), here, dtype=x.dtype))
            m = model(x + (after - here) * m, torch.full((len(x),), after, dtype=x.dtype))
            x = x + (after - here) * m
        return x

    rule = step_rule_from_sampler(two, [1.0, 0.75, 0.5, 0.25, 0.0], schedule=flow, prediction_type="flow")
    assert rule.timesteps.tolist() == [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0.0]
    with pytest.raises(ValueError, match="schedule: by it the noise grows from time 0 to 1"):
        step_rule_from_sampler(two, [0.0, 0.5, 0.75, 1.0], schedule=flow, prediction_type="flow")
    with pytest.raises(ValueError, match=r"schedule: by it the noise grows from time 0\.5 to 0\.75"):
        step_rule_from_sampler(two, [0.5, 0.25, 0.75], schedule=flow, prediction_type="flow")
    with pytest.raises(ValueError, match=r"schedule: by it the noise grows from time 0\.25 to 0\.5"):
        step_rule_from_sampler(two, [0.25, 1.0, 0.75, 0.5], schedule=flow, prediction_type="flow")
