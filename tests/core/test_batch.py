"""Rounds of a batch: a dozen array operations for any window and any number of samples, each its own."""

import collections
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parasolver_core import (
    DDIM,
    DDPM,
    DPMSolver,
    Method,
    NoiseSchedule,
    ParallelIntegralSolver,
    solve,
    solve_sequential,
)
from parasolver_core.rounds import sizes
from parasolver_core.rounds.acceptance import Acceptance, RoundView
from parasolver_core.samplers.held_form import HeldForm
from tests.arrays import on_a_device
from tests.core.problems import Rational, normal, relative

SCHEDULE = NoiseSchedule.scaled_linear()
RULES = [DDIM(SCHEDULE), DPMSolver(SCHEDULE, order=2), DPMSolver(SCHEDULE, order=3), DDPM(SCHEDULE)]
by_name = pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{type(rule).__name__}{getattr(rule, 'order', '')}")
VIEWS = {"view", "slice", "select", "reshape", "expand", "unsqueeze", "permute", "transpose", "detach", "alias", "t"}
VIEWS |= {"_unsafe_view", "unbind", "lift_fresh", "split", "squeeze", "as_strided", "split_with_sizes"}
WINDOW = Method(spread=False)


class First(Acceptance):
    """Only the first node, whose input is final."""

    def accept(self, view: RoundView, tolerance: float) -> tuple[int, float]:
        return 1, 0.0


ONE_BY_ONE = Method(spread=False, acceptance=First())


class Operations(TorchDispatchMode):
    """Counts what an accelerator would be asked to do, were the tensors on one; and what is uploaded."""

    def __init__(self) -> None:
        super().__init__()
        self.count: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def work(self) -> int:
        return sum(number for name, number in self.count.items() if name not in VIEWS)


@pytest.fixture
def as_on_a_device() -> Iterator[None]:
    with on_a_device():
        yield


@pytest.mark.usefixtures("as_on_a_device")
@by_name
@pytest.mark.parametrize("window", [8, 64])
@pytest.mark.parametrize("count", [1, 16])
def test_a_round_is_so_many_operations_whatever_the_window_and_the_batch(rule: Any, window: int, count: int) -> None:
    solver = ParallelIntegralSolver(rule, window, method=WINDOW, check=False)
    state = solver.init(lambda x, t: x, torch.randn(count, 32), SCHEDULE.timesteps(100))
    solver.step(state)  # short windows
    with Operations() as seen:
        solver.step(state)
    assert seen.work <= 18 + (count > 1)  # of one sample, the inputs are a view
    assert seen.count["lift_fresh"] <= 4 + rule.recurrence(SCHEDULE.timesteps(100)).stochastic


@by_name
@pytest.mark.parametrize("method", ["secant", "identity", "paradigms", "parasolver"])
@pytest.mark.parametrize("tolerance", [0.0, 1e-2])
def test_samples_do_not_depend_on_their_neighbours(rule: Any, method: str, tolerance: float) -> None:
    """Together and each by itself: the same rounds, the same sample."""
    x_T, timesteps = normal((5, 6)), SCHEDULE.timesteps(24)
    x_T[3] *= 1e-3
    options: dict[str, Any] = {"window": 6, "method": method, "tolerance": tolerance, "check": False}
    together = solve(Rational(), x_T, timesteps, rule, seed=[1, 2, 3, 4, 5], **options)
    rounds = collections.Counter(one.sample for record in together.stats.history for one in record.samples)
    for sample in range(5):
        alone = solve(Rational(), x_T[sample : sample + 1], timesteps, rule, seed=[sample + 1], **options)
        assert relative(together.sample[sample : sample + 1], alone.sample) < 1e-12
        assert rounds[sample] == alone.stats.rounds
        assert together.error_estimate[sample] == pytest.approx(alone.error_estimate[0], rel=1e-6, abs=1e-14)


@pytest.mark.filterwarnings("ignore:x_T. has an RMS")  # one of the samples is far too large
@by_name
def test_a_sample_that_fails_leaves_the_others_alone(rule: Any) -> None:
    timesteps = SCHEDULE.timesteps(20)

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        out = Rational()(x, t)
        out[(x[:, 0] > 50) & (t == timesteps[7])] = np.nan
        return out

    x_T = normal((3, 4))
    x_T[1, 0] = 1e3
    got = solve(network, x_T, timesteps, rule, 6, seed=0, throw=False, check=False)
    want = solve_sequential(network, x_T, timesteps, rule, seed=0, throw=False)
    assert got.statuses == want.statuses
    assert relative(got.sample[[0, 2]], want.sample[[0, 2]]) < 1e-2
    assert got.steps[1] == want.steps[1]
    assert relative(got.states[1:2], want.states[1:2]) < 1e-2


@pytest.mark.usefixtures("as_on_a_device")
@by_name
def test_states_that_once_were_much_larger_are_made_again(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a state is moved it keeps the rounding of the largest that it ever was; made again, its own.

    One node a round is taken, so that all that is left is rounding. Slopes are far off while nodes wait, the network
    being flat where it once was steep.
    """
    tiny = NoiseSchedule.karras(sigma_min=1e-4, sigma_max=80.0)
    kind = type(rule)(tiny, order=rule.order) if isinstance(rule, DPMSolver) else type(rule)(tiny)
    made, moved = [], []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 1e-3 * torch.tanh(x / 1e-3)

    for seed in range(12):
        x_T, timesteps = torch.from_numpy(80 * normal((2, 6), seed=seed)).float(), tiny.timesteps(18)
        want = solve_sequential(network, x_T, timesteps, kind, seed=seed).sample
        options: dict[str, Any] = {"tolerance": 0.0, "seed": seed, "check": False, "method": ONE_BY_ONE}
        made.append(relative(solve(network, x_T, timesteps, kind, 18, **options).sample, want))
        with monkeypatch.context() as changed:
            changed.setattr(sizes, "_ROOM", np.inf)
            moved.append(relative(solve(network, x_T, timesteps, kind, 18, **options).sample, want))
    assert max(made) < 4e-7  # a few units in the last place, whatever the states were
    if isinstance(rule, DDPM):
        assert max(moved) > 6e-7  # the largest states are those of the first guesses


def test_states_onwards_are_those_of_the_recurrence() -> None:
    rng = np.random.default_rng(0)
    for rule in RULES:
        recurrence = rule.recurrence(SCHEDULE.timesteps(12))
        form, lo, count = HeldForm(recurrence), 5, 4
        states, outputs, z = rng.standard_normal((12, 3)), rng.standard_normal((12, 3)), rng.standard_normal((12, 3))
        held = recurrence.held[:, :1] * states + recurrence.held[:, 1:] * outputs
        xs, ms, expected = list(states[: lo + 1]), list(outputs[: lo + count]), []
        for i in range(lo, lo + count):
            ms[i] = (held[i] - recurrence.held[i, 0] * xs[i]) / recurrence.held[i, 1]
            back = range(i, max(i - recurrence.memory, -1), -1)
            xs.append(recurrence.advance(i, [xs[j] for j in back], [ms[j] for j in back], z[i]))
            expected.append(xs[-1])
        reads, past = form.reads[0], form.reads[1] - 1
        given = [*states[lo - np.arange(reads)], *held[lo - 1 - np.arange(past)], *held[lo : lo + count]]
        given += list(z[lo : lo + count]) if form.noisy else []
        got = form.onwards(np.array([lo]), count)[0] @ np.array(given)
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["secant", "paradigms", "parasolver"])
def test_outputs_in_half_precision_that_are_not_finite_are_dropped(half: torch.dtype, method: str) -> None:
    """A guess of the first sample, in the second call: the samples are those of the plain loop all the same."""
    x_T, timesteps, calls = torch.from_numpy(normal((3, 40))).to(half), SCHEDULE.timesteps(20), []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        out = torch.tanh(x)
        if len(calls) == 2:
            out[2] = float("nan")
        return out

    want = solve_sequential(lambda x, t: torch.tanh(x), x_T, timesteps, DDIM(SCHEDULE)).sample
    got = solve(network, x_T, timesteps, DDIM(SCHEDULE), 6, tolerance=1e-3, method=method, check=False)
    assert got.success
    assert relative(got.sample.float().numpy(), want.float().numpy()) < 0.05
