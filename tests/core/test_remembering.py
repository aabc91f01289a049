"""A memory of finished samples saves rounds where it is right, costs next to none where it is wrong, and no result."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parasolver_core import (
    DDIM,
    DDPM,
    DPMSolver,
    Euler,
    Memory,
    NoiseSchedule,
    Solution,
    StepRule,
    solve,
    solve_sequential,
)
from parasolver_core.guesses.memory import _fit
from parasolver_core.guesses.recall import Recall
from tests.arrays import from_numpy
from tests.core.problems import Gaussian, Mixture, TanhNetwork, normal, relative

TABLE, FLOW = NoiseSchedule.linear(), NoiseSchedule.flow_matching()
SIZE, STEPS, LEARNT = 12, 30, 16
RULES: dict[str, tuple[StepRule, NoiseSchedule]] = {
    "ddim": (DDIM(TABLE), TABLE),
    "2m": (DPMSolver(TABLE, prediction_type="v_prediction"), TABLE),
    "3m": (DPMSolver(TABLE, order=3, prediction_type="sample"), TABLE),
    "flow": (Euler(FLOW), FLOW),
}
GRID = TABLE.timesteps(STEPS)


class Patterns:
    """The exact noise prediction of a mixture of fixed patterns, each blurred: its samples have a few directions."""

    def __init__(self, seed: int, count: int = 6, std: float = 0.3) -> None:
        self.patterns = np.random.default_rng(seed).choice([-1.0, 1.0], (count, SIZE))
        self.std = std

    def __call__(self, x: np.ndarray, t: np.ndarray) -> np.ndarray:
        alpha, sigma = (level[:-1, None] for level in TABLE.levels(t))
        variance = alpha**2 * self.std**2 + sigma**2
        far = ((x[:, None] - alpha[:, None] * self.patterns) ** 2).sum(-1) / (2 * variance)
        weights = np.exp(far.min(1, keepdims=True) - far)
        mean = weights @ self.patterns / weights.sum(1, keepdims=True)
        clean = mean + alpha * self.std**2 / variance * (x - alpha * mean)
        return (x - alpha * clean) / sigma


def finished(denoiser: Any, rule: StepRule = RULES["ddim"][0], grid: Any = GRID, count: int = LEARNT) -> Solution:
    return solve_sequential(denoiser, normal((count, SIZE), seed=900), grid, rule, save="trajectory")


def states(solution: Solution) -> np.ndarray:
    assert solution.trajectory is not None
    return solution.trajectory


def scaled(solution: Solution, factor: float) -> Solution:
    return replace(solution, trajectory=factor * states(solution))


def learnt(denoiser: Any, rule: StepRule = RULES["ddim"][0], grid: Any = GRID) -> Memory:
    return Memory.learn(finished(denoiser, rule, grid), grid, rule)


def test_for_gaussian_data_the_regression_is_the_closed_form() -> None:
    """``h_i = mean + slope (x_i - ...)`` and x_i is affine in x_0: B is their product, and C is not asked for."""
    gaussian = Gaussian(TABLE, "epsilon")
    memory, grid = learnt(gaussian), TABLE.timesteps(STEPS)
    alpha, sigma = (level[:STEPS] for level in TABLE.levels(grid))
    truth = states(solve_sequential(gaussian, normal((2, SIZE), seed=3), grid, DDIM(TABLE), save="trajectory"))
    growth = (truth[:STEPS, 0, 0] - truth[:STEPS, 1, 0]) / (truth[0, 0, 0] - truth[0, 1, 0])
    expected = alpha * gaussian.std**2 / (alpha**2 * gaussian.std**2 + sigma**2) * growth
    B, C = memory.slopes(0, np.arange(STEPS), known=False)
    np.testing.assert_allclose(B, np.repeat(expected[:, None], B.shape[1], axis=1), rtol=2e-3)  # the pull is 1e-3
    assert not C.any()


def test_what_is_expected_is_what_the_formula_of_a_memory_says() -> None:
    """Numbers along every direction, and one for all that lies across them."""
    memory = learnt(Patterns(1))
    x, h = normal((2, SIZE), seed=4), normal((2, SIZE), seed=5)
    recall, last, every = Recall(memory, x), np.array([3, 7]), np.arange(2)
    recall.right(every, np.zeros(2, dtype=int), np.zeros((2, 1)), np.ones(2, dtype=int))  # a round that found nothing
    found, V = recall.behind(every, last, 4, x, h), memory.directions
    assert 0 < len(V) < SIZE
    for row, node in enumerate(last.tolist()):
        B, C = memory.slopes(node, node + np.arange(1, 5), known=True)
        for ahead, i in enumerate(range(node + 1, node + 5)):
            expected = memory.predictions[i].copy()
            for slopes, away in ((B, x[row] - memory.states[node]), (C, h[row] - memory.predictions[node])):
                across = away - V.T @ (V @ away)
                expected += V.T @ (slopes[ahead, :-1] * (V @ away)) + slopes[ahead, -1] * across
            np.testing.assert_allclose(found[row, ahead], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_a_network_whose_samples_are_alike_takes_fewer_rounds(name: str) -> None:
    rule, schedule = RULES[name]
    grid = schedule.timesteps(STEPS)
    network = Mixture(schedule, {"2m": "v_prediction", "3m": "sample", "flow": "flow"}.get(name, "epsilon"))
    x_T, memory = normal((8, SIZE), seed=1), learnt(network, rule, grid)
    for window in (8, STEPS):
        plain, remembered = (rounds(network, x_T, grid, rule, window, one) for one in (None, memory))
        assert remembered <= plain - 0.25


def rounds(denoiser: Any, x_T: Any, grid: Any, rule: StepRule, window: int, memory: Memory | None) -> float:
    """Mean over the samples, all of which are within the tolerance."""
    solution = solve(denoiser, x_T, grid, rule, window, tolerance=1e-2, memory=memory, check=False)
    assert relative(solution.sample, solve_sequential(denoiser, x_T, grid, rule).sample) < 1e-2
    return sum(len(one.samples) for one in solution.stats.history) / len(x_T)


@pytest.mark.parametrize("window", [8, 16, STEPS])
@pytest.mark.parametrize("factor", [1.0, -1.0, 5.0, 0.1])
def test_a_memory_of_another_network_costs_half_a_round_at_most(factor: float, window: int) -> None:
    x_T, own = normal((8, SIZE), seed=1), Patterns(1)
    wrong = Memory.learn(scaled(finished(Patterns(2)), factor), GRID, DDIM(TABLE))
    plain, misled = (rounds(own, x_T, GRID, DDIM(TABLE), window, one) for one in (None, wrong))
    assert misled <= plain + 0.5


@given(
    st.sampled_from(sorted(RULES)),
    st.integers(2, STEPS),
    st.integers(1, 3),
    st.floats(0.2, 3.0),
    st.sampled_from([-100.0, -1.0, 0.0, 1.0, 1e6]),
    st.integers(0, 99),
)
def test_whatever_it_says_the_sample_is_the_same(
    name: str, window: int, batch: int, gain: float, factor: float, seed: int
) -> None:
    rule, schedule = RULES[name]
    grid, network = schedule.timesteps(STEPS), TanhNetwork(SIZE, gain=gain, seed=seed)
    memory = Memory.learn(scaled(finished(network, rule, grid, 8), factor), grid, rule)
    x_T = normal((batch, SIZE), seed=seed)
    truth = solve_sequential(network, x_T, grid, rule).sample
    exact = solve(network, x_T, grid, rule, window, tolerance=0, memory=memory).sample
    near = solve(network, x_T, grid, rule, window, tolerance=1e-6, memory=memory).sample
    assert relative(exact, truth) < 1e-10
    assert relative(near, truth) < 1e-6


def test_one_sample_takes_the_rounds_that_it_takes_in_a_batch() -> None:
    network, x_T = Patterns(1), normal((4, SIZE), seed=1)
    memory = learnt(network)
    together = solve(network, x_T, GRID, DDIM(TABLE), 8, memory=memory, check=False)
    for sample in range(4):
        alone = solve(network, x_T[sample : sample + 1], GRID, DDIM(TABLE), 8, memory=memory, check=False)
        own = [one for record in together.stats.history for one in record.samples if one.sample == sample]
        assert [one.accepted for one in own] == [record.samples[0].accepted for record in alone.stats.history]
        np.testing.assert_allclose(together.sample[sample], alone.sample[0], rtol=0, atol=1e-12)


def test_a_saved_memory_says_the_same(tmp_path: Path) -> None:
    memory, network, x_T = learnt(Patterns(1)), Patterns(1), normal((2, SIZE), seed=1)
    memory.save(tmp_path / "memory.npz")
    again = Memory.load(tmp_path / "memory.npz")
    first, second = (solve(network, x_T, GRID, DDIM(TABLE), 8, memory=one) for one in (memory, again))
    assert first.stats.rounds == second.stats.rounds
    np.testing.assert_allclose(first.sample, second.sample, rtol=0, atol=1e-6)  # kept in float32
    assert repr(again).startswith(f"Memory({LEARNT} samples of size {SIZE}, {STEPS} steps, ")
    np.savez(tmp_path / "other.npz", kind="something")
    with pytest.raises(ValueError, match=r"^file: "):
        Memory.load(tmp_path / "other.npz")


@pytest.mark.parametrize("batch", [1, 3])
def test_every_array_library_gives_the_same(xp: ModuleType, batch: int) -> None:
    network, values = TanhNetwork(SIZE, seed=1), normal((batch, SIZE), seed=1)
    x_T, memory = from_numpy(values, xp), learnt(network)
    expected = solve(network, values, GRID, DDIM(TABLE), 8, memory=memory, tolerance=1e-3)
    got = solve(network, x_T, xp.asarray(GRID), DDIM(TABLE), 8, memory=memory, tolerance=1e-3)
    assert got.stats.rounds == expected.stats.rounds
    assert relative(got.sample, expected.sample) < 1e-12


def test_spread_nodes_do_not_ask_it() -> None:
    network, x_T, grid = TanhNetwork(SIZE, seed=1), normal((2, SIZE), seed=1), TABLE.timesteps(400)
    memory = Memory.learn(finished(network, DDIM(TABLE), grid), grid, DDIM(TABLE))
    plain, remembered = (solve(network, x_T, grid, DDIM(TABLE), 16, memory=one) for one in (None, memory))
    assert plain.stats.rounds == remembered.stats.rounds
    np.testing.assert_array_equal(plain.sample, remembered.sample)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_rule": DDPM(TABLE)}, "memory: it follows samplers that add no noise"),
        ({"x_T": normal((1, SIZE + 1))}, "memory: learnt from samples of 12 elements, got 13"),
        ({"timesteps": TABLE.timesteps(20)}, "memory: learnt with other timesteps, 30 of them, got 20"),
        ({"step_rule": DDIM(NoiseSchedule.scaled_linear())}, "memory: learnt with another noise schedule"),
        ({"step_rule": DDIM(TABLE, prediction_type="sample")}, "memory: learnt with another noise schedule"),
        ({"method": "parataa"}, "memory: method='parataa' begins with copies"),
        ({"method": "paradigms"}, "memory: this method fills in nodes by its own rule"),
        ({"method": "sequential"}, "memory: the plain loop"),
        ({"subintervals": 10}, "memory: it is of single steps"),
        ({"start": np.zeros((STEPS + 1, 1, SIZE))}, "memory: a warm start says more"),
    ],
)
def test_what_it_does_not_fit_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    memory = learnt(Patterns(1))
    run: dict[str, Any] = {"x_T": normal((1, SIZE)), "timesteps": GRID, "step_rule": DDIM(TABLE), "window": 8} | change
    with pytest.raises(ValueError, match="^" + message):
        solve(Patterns(1), memory=memory, **run)


def test_what_cannot_be_learnt_from_is_refused_by_name() -> None:
    network, rule = Patterns(1), DDIM(TABLE)
    with pytest.raises(ValueError, match=r"^solutions: expected solutions of runs with save=\"trajectory\""):
        Memory.learn(replace(finished(network), trajectory=None), GRID, rule)
    with pytest.raises(ValueError, match=r"^solutions: expected at least 8 samples that converged, got 7"):
        Memory.learn([finished(network, count=7)], GRID, rule)
    with pytest.raises(ValueError, match=r"^solutions: expected trajectories of 20 steps, got one of 30"):
        Memory.learn(finished(network), TABLE.timesteps(20), rule)
    with pytest.raises(ValueError, match=r"^step_rule: a memory follows samplers that add no noise"):
        Memory.learn(finished(network), GRID, DDPM(TABLE))
    with pytest.raises(TypeError, match=r"^memory: expected a Memory, got str"):
        solve(network, normal((1, SIZE)), GRID, rule, 8, memory="memory.npz")  # type: ignore[arg-type]


def test_a_fit_with_a_pull_solves_its_normal_equations() -> None:
    """Least squares of ``target - B x - C h``, and of what B and C differ from a prior by, as large as x and h are."""
    x, h, target = normal((3, 5, 40), seed=6)
    prior, pull = (np.full(5, 0.4), np.full(5, -0.3)), 0.25
    own = tuple((one * other).sum(1) for one, other in ((x, x), (x, h), (h, h)))
    across = (x * target).sum(1)[None], (h * target).sum(1)[None]
    B, C = _fit(own, across, prior, pull, True)
    for k in range(5):
        wide = np.sqrt(pull) * np.array([np.linalg.norm(x[k]), np.linalg.norm(h[k])])
        rows = np.concatenate([np.stack([x[k], h[k]], axis=1), np.diag(wide)])
        wanted = np.concatenate([target[k], wide * np.array([prior[0][k], prior[1][k]])])
        np.testing.assert_allclose([B[0, k], C[0, k]], np.linalg.lstsq(rows, wanted, rcond=None)[0], rtol=1e-10)
