"""Several steps as one: the sampler over time subintervals is the sampler, in groups."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parasolver_core import (
    DDIM,
    DDPM,
    DPMSolver,
    Euler,
    NoiseSchedule,
    ParallelIntegralSolver,
    StepRule,
    solve,
    solve_sequential,
)
from parasolver_core.samplers.step_rules import table
from parasolver_core.samplers.subintervals import Subintervals
from tests.core.problems import Counted, TanhNetwork, normal

SCHEDULE = NoiseSchedule.linear()
RULES: dict[str, StepRule] = {
    "DDIM": DDIM(SCHEDULE),
    "DDIM, eta": DDIM(SCHEDULE, eta=0.7),
    "DDPM": DDPM(SCHEDULE),
    "2M": DPMSolver(SCHEDULE, order=2),
    "3M": DPMSolver(SCHEDULE, order=3),
    "2M, SDE": DPMSolver(SCHEDULE, order=2, stochastic=True),
    "Euler": Euler(SCHEDULE),
}
NETWORK = TanhNetwork(6)


def distance(one: Any, other: Any) -> float:
    return float(np.linalg.norm(np.asarray(one) - np.asarray(other)) / np.linalg.norm(np.asarray(other)))


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(RULES)),
    steps=st.integers(2, 24),
    share=st.floats(0.01, 1),
    window=st.integers(2, 24),
    method=st.sampled_from(["secant", "identity", "parasolver", "paradigms"]),
)
def test_the_sampler_is_kept(name: str, steps: int, share: float, window: int, method: str) -> None:
    """With a tolerance of 0 all states are the plain loop's, those between the borders as well."""
    count, x_T, rule = max(round(share * steps), 1), normal((2, 6)), RULES[name]
    options = {"tolerance": 0.0, "save": "trajectory", "seed": 5}
    if method in ("parasolver", "paradigms") and name == "2M, SDE":
        method = "secant"
    found = solve(NETWORK, x_T, SCHEDULE.timesteps(steps), rule, window, subintervals=count, method=method, **options)
    way = solve_sequential(NETWORK, x_T, SCHEDULE.timesteps(steps), rule, **options)
    assert found.trajectory is not None
    assert found.trajectory.shape == (steps + 1, 2, 6)
    for got, expected in zip(found.trajectory, way.trajectory, strict=True):
        assert distance(got, expected) < 1e-10
    np.testing.assert_array_equal(found.trajectory[-1], found.sample)
    assert found.steps == (steps, steps)
    assert found.stats.evaluations == sum(record.evaluations for record in found.stats.history)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("count", [2, 5, 9])
def test_the_tolerance_is_kept(name: str, count: int) -> None:
    x_T = normal((4, 6))
    found = solve(NETWORK, x_T, SCHEDULE.timesteps(20), RULES[name], 6, subintervals=count, tolerance=1e-2)
    way = solve_sequential(NETWORK, x_T, SCHEDULE.timesteps(20), RULES[name])
    assert max(map(distance, found.sample, way.sample)) < 1e-2


def test_calls_are_counted_as_they_are_waited_for() -> None:
    """10 steps in 3 subintervals of 3, 4 and 3: a round has as many calls as the longest that it evaluates."""
    network = Counted(lambda x, t: np.ones_like(x))
    found = solve(network, normal((2, 3)), SCHEDULE.timesteps(10), DDIM(SCHEDULE), 3, subintervals=3, check=False)
    assert Subintervals(table(DDIM(SCHEDULE), SCHEDULE.timesteps(10)), 3).lengths.tolist() == [3, 4, 3]
    turns = [
        max({0: 3, 1: 4, 2: 3}[int(n)] for one in record.samples for n in one.nodes) for record in found.stats.history
    ]
    assert [record.turns for record in found.stats.history] == turns
    assert set(turns) == {3, 4}
    assert found.stats.rounds == sum(record.turns for record in found.stats.history) == found.stats.calls
    assert found.stats.evaluations == sum(network.rows)
    assert found.message.startswith(f"Converged in {found.stats.rounds} rounds")


def test_as_many_subintervals_as_steps_are_no_subintervals() -> None:
    x_T, steps = normal((3, 6)), SCHEDULE.timesteps(25)
    plain = solve(NETWORK, x_T, steps, RULES["2M"], 8, check=False)  # whose rows would count in the first run alone
    found = solve(NETWORK, x_T, steps, RULES["2M"], 8, subintervals=25, check=False)
    np.testing.assert_array_equal(plain.sample, found.sample)
    assert (plain.stats.rounds, plain.stats.evaluations) == (found.stats.rounds, found.stats.evaluations)


def test_one_subinterval_is_the_plain_loop() -> None:
    found = solve(NETWORK, normal((2, 6)), SCHEDULE.timesteps(12), RULES["3M"], 4, subintervals=1, check=False)
    assert (found.stats.rounds, found.stats.evaluations) == (12, 24)


def test_the_network_is_told_its_own_steps() -> None:
    """A denoiser with conditions of its own sees single steps, whose noise is theirs."""

    class Conditioned:
        takes_rows = True

        def __init__(self) -> None:
            self.told: set[tuple[int, int, float]] = set()

        def __call__(self, x: Any, t: Any, rows: Any) -> Any:
            self.told |= {(int(i), int(s), float(at)) for i, s, at in zip(rows.steps, rows.samples, t, strict=True)}
            noise = np.stack([rows.noise(int(i), int(s)) for i, s in zip(rows.steps, rows.samples, strict=True)])
            return 0.1 * x * np.asarray(rows.samples)[:, None] + 0.2 * noise

    steps, x_T = SCHEDULE.timesteps(12), normal((2, 4))
    network, plain = Conditioned(), Conditioned()
    found = solve(network, x_T, steps, DDPM(SCHEDULE), 3, subintervals=4, tolerance=0, seed=3)
    way = solve_sequential(plain, x_T, steps, DDPM(SCHEDULE), seed=3)
    assert distance(found.sample, way.sample) < 1e-12
    assert network.told == plain.told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_in_its_own_dtype(dtype: torch.dtype) -> None:
    x_T = torch.from_numpy(normal((2, 6))).to(dtype)
    options: dict[str, Any] = {"save": "trajectory"}

    def network(x: Any, t: Any) -> Any:
        return torch.tanh(x.flip(-1)) * (0.5 + t[:, None] / 2000).to(x.dtype)

    found = solve(network, x_T, SCHEDULE.timesteps(20), RULES["2M"], 5, subintervals=6, tolerance=1e-3, **options)
    way = solve_sequential(network, x_T, SCHEDULE.timesteps(20), RULES["2M"], **options)
    assert found.sample.dtype == dtype
    assert found.trajectory.shape == (21, 2, 6)
    assert distance(found.sample.float(), way.sample.float()) < (2e-3 if dtype == torch.float32 else 2e-2)


def test_an_interrupt_leaves_whole_subintervals() -> None:
    x_T, steps, calls = normal((2, 6)), SCHEDULE.timesteps(20), [0]

    def network(x: Any, t: Any) -> Any:
        calls[0] += 1
        if calls[0] == 17:
            raise KeyboardInterrupt
        return NETWORK(x, t)

    with pytest.raises(KeyboardInterrupt) as caught:
        solve(network, x_T, steps, RULES["2M"], 3, subintervals=5, tolerance=1e-9, save="trajectory")
    left = caught.value.solution  # type: ignore[attr-defined]
    way = solve_sequential(NETWORK, x_T, steps, RULES["2M"], save="trajectory").trajectory
    assert set(left.steps) <= {0, 4, 8, 12, 16}
    assert max(left.steps) > 0
    for sample, reached in enumerate(left.steps):
        assert np.allclose(left.trajectory[: reached + 1, sample], way[: reached + 1, sample], atol=1e-7)
        assert np.isnan(left.trajectory[reached + 1 :, sample]).all()
        np.testing.assert_array_equal(left.states[sample], left.trajectory[reached, sample])


def test_a_step_at_which_the_network_fails_is_named() -> None:
    def network(x: Any, t: Any) -> Any:
        return np.where(t[:, None] < 300, np.nan, NETWORK(x, t))

    found = solve(
        network, normal((1, 6)), SCHEDULE.timesteps(20), DDIM(SCHEDULE), 3, subintervals=5, throw=False, check=False
    )
    assert not found.success
    assert found.steps[0] in (8, 12)
    assert np.all(np.isfinite(found.sample))


def test_what_does_not_go_with_subintervals_is_refused() -> None:
    x_T, steps, rule = normal((1, 6)), SCHEDULE.timesteps(10), DDIM(SCHEDULE)
    way = solve(NETWORK, x_T, steps, rule, save="trajectory").trajectory
    for options, message in (
        ({"start": way}, "start: a warm start is of single steps"),
        ({"window": "auto"}, 'subintervals: window="auto" does not know of them'),
        ({"method": "sequential"}, "subintervals: the plain loop has no use for them"),
        ({"subintervals": 0}, "subintervals: expected an integer of at least 1"),
        ({"subintervals": 11}, "subintervals: expected at most as many as the sampler has steps, 10, got 11"),
    ):
        with pytest.raises(ValueError, match=message):
            solve(NETWORK, x_T, steps, rule, **({"subintervals": 5} | options))
    with pytest.raises(TypeError, match="subintervals: expected an integer"):
        ParallelIntegralSolver(rule, subintervals=2.5)  # type: ignore[arg-type]
