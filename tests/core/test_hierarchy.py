"""Nodes spread over the trajectory: the answer, its cost, and when they are used."""

from collections.abc import Callable
from dataclasses import replace
from types import FunctionType, ModuleType

import numpy as np
import pytest

from parasolver_core import (
    DDIM,
    DDPM,
    DPMSolver,
    Euler,
    Method,
    NoiseSchedule,
    ParallelIntegralSolver,
    Recurrence,
    solve,
    solve_sequential,
)
from parasolver_core.guesses.forecast import BetweenNodes
from parasolver_core.methods.expected import sliding_rounds
from parasolver_core.methods.levels import Level, Levels, interpolation, placement
from tests.core.problems import TanhNetwork, normal

SCHEDULE = NoiseSchedule.linear()
Denoiser = Callable[[np.ndarray, np.ndarray], np.ndarray]


def mixture_denoiser(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    """The exact noise for data that are N(m, 0.3^2) in each entry with m = -0.8 or 0.8."""
    bar = SCHEDULE.alphas_cumprod[t][:, None]
    alpha, sigma = np.sqrt(bar), np.sqrt(1 - bar)
    variance = alpha**2 * 0.3**2 + sigma**2
    mean = 0.8 * np.tanh(0.8 * alpha * x / variance)
    return sigma * (x - alpha * mean) / variance


def noise(batch: int = 4) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, 32))


def relative_error(sample: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.sqrt(((sample - truth) ** 2).mean(axis=1) / (truth**2).mean(axis=1))


@pytest.mark.parametrize("rule", [DDIM(SCHEDULE), DPMSolver(SCHEDULE), DPMSolver(SCHEDULE, 3)], ids=repr)
@pytest.mark.parametrize("tolerance", [3e-2, 1e-2])
def test_error_is_within_tolerance_at_a_fraction_of_the_cost(rule: DDIM | DPMSolver, tolerance: float) -> None:
    x_T, timesteps = noise(), SCHEDULE.timesteps(500)
    truth = solve_sequential(mixture_denoiser, x_T, timesteps, rule).sample
    solution = solve(mixture_denoiser, x_T, timesteps, rule, window=20, tolerance=tolerance)
    error = relative_error(solution.sample, truth)
    assert np.all(error <= tolerance)
    assert np.all(solution.error_estimate <= tolerance)
    assert np.all(solution.error_estimate >= 3 * error)  # with caution: of such smooth networks 5 to 20 times
    last = [one.error for record in solution.stats.history for one in record.samples if one.accepted]
    assert sorted(last) == sorted(solution.error_estimate)
    assert solution.stats.rounds <= 20  # a window sliding over 500 steps needs at least 25
    assert solution.stats.evaluations <= 4 * 250  # sequential: 500 for each of the 4 samples


def test_level_with_every_node_is_the_sampler_itself() -> None:
    recurrence: Recurrence = DPMSolver(SCHEDULE, 3).recurrence(SCHEDULE.timesteps(12))
    level = Level.of(recurrence, np.arange(12))
    rng = np.random.default_rng(1)
    x, held = [rng.standard_normal()], rng.standard_normal(12)
    outputs: list[float] = []
    for i in range(12):
        p, q = recurrence.held[i]
        outputs.insert(0, (held[i] - p * x[0]) / q)
        x.insert(0, recurrence.advance(i, x, outputs))
    states = np.array(x[::-1])
    np.testing.assert_allclose(level.free * states[0] + level.response @ held, states[:12], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(level.end_free * states[0] + level.end @ held, states[12], rtol=1e-12)


def test_levels_are_remembered_for_equal_samplers_alone() -> None:
    timesteps = SCHEDULE.timesteps(40)
    first = Levels.of(DDIM(SCHEDULE).recurrence(timesteps))
    assert Levels.of(DDIM(SCHEDULE).recurrence(timesteps)) is first
    for other in (DDPM(SCHEDULE), DPMSolver(SCHEDULE, order=2)):
        assert Levels.of(other.recurrence(timesteps)) is not first
    own = DDIM(SCHEDULE).recurrence(timesteps)
    assert own.signal is not None
    noisier = replace(own, signal=own.signal / 2)  # nodes are placed by it
    assert Levels.of(noisier) is not Levels.of(own)
    assert not np.array_equal(placement(noisier), placement(own))
    first = Levels.of(own)
    for steps in range(41, 51):
        Levels.of(DDIM(SCHEDULE).recurrence(SCHEDULE.timesteps(steps)))
    assert Levels.of(DDIM(SCHEDULE).recurrence(timesteps)) is not first  # few are kept


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_every_level_begins_with_the_first_nodes_and_ends_with_the_last_of_each_stage(stages: int) -> None:
    n = 60
    own = replace(DDIM(SCHEDULE).recurrence(SCHEDULE.timesteps(n)), stages=stages)
    level = Levels(own).first(9)
    for _ in range(3):
        assert level.nodes[:stages].tolist() == list(range(stages))
        assert level.nodes[-stages:].tolist() == list(range(n - stages, n))
        level = Levels(own).finer(level)


def test_interpolation_is_linear_between_nodes_and_constant_beyond() -> None:
    weights = interpolation(np.arange(6), np.array([1, 4]))
    np.testing.assert_allclose(weights @ [10.0, 40.0], [10, 10, 20, 30, 40, 40])


def test_stages_are_interpolated_by_themselves() -> None:
    weights = interpolation(np.arange(6), np.array([0, 1, 4, 5]), stages=2)
    np.testing.assert_allclose(weights @ [10.0, 1.0, 30.0, 3.0], [10, 1, 20, 2, 30, 3])
    alone = interpolation(np.arange(3), np.array([0, 2]), stages=2)  # no node of the other stage is known
    np.testing.assert_allclose(alone @ [10.0, 20.0], [10, 15, 20])


@pytest.mark.parametrize("steps", [99, 100])
def test_levels_hold_whole_steps(steps: int) -> None:
    levels = Levels(replace(DDIM(SCHEDULE).recurrence(SCHEDULE.timesteps(steps)), stages=2))
    level = levels.first(12)
    for _ in range(5):
        whole = np.arange(steps) // 2
        assert set(level.nodes) == {i for i in range(steps) if whole[i] in whole[level.nodes]}
        assert {0, steps - 1} <= set(level.nodes)
        level = levels.finer(level)
    assert len(level.nodes) == steps


@pytest.mark.parametrize(
    ("rule", "steps", "window", "tolerance", "spread"),
    [
        (DDIM(SCHEDULE), 500, 20, 1e-2, True),
        (DDIM(SCHEDULE), 100, 16, 5e-2, True),
        (DDIM(SCHEDULE), 100, 16, 1e-2, False),
        (DDIM(SCHEDULE), 64, 16, 5e-2, False),
        (DDIM(SCHEDULE), 50, 16, 5e-2, False),
        (DDIM(SCHEDULE), 50, 16, 2e-1, False),
        (DDIM(SCHEDULE), 500, 20, 0.0, False),
        (DDIM(SCHEDULE), 500, 4, 1e-2, False),
        (DDIM(SCHEDULE), 60, 5, 5e-2, False),
        (DDIM(SCHEDULE), 80, 8, 5e-2, True),
        (DDIM(SCHEDULE), 100, 5, 5e-2, True),
        (DPMSolver(SCHEDULE), 25, 8, 1e-2, False),
        (DDPM(SCHEDULE), 1000, 100, 1e-2, False),
        (DDPM(SCHEDULE), 1000, 100, 5e-2, False),
        (DDPM(SCHEDULE), 1000, 100, 2e-1, True),
        (DDPM(SCHEDULE), 1000, 32, 1e-1, True),
    ],
)
def test_nodes_are_spread_only_where_it_pays(
    rule: DDIM | DDPM, steps: int, window: int, tolerance: float, spread: bool
) -> None:
    recurrence = rule.recurrence(SCHEDULE.timesteps(steps))
    assert Method().spreads(recurrence, window, tolerance) is spread
    assert not Method(spread=False).spreads(recurrence, window, tolerance)


@pytest.mark.parametrize(
    "recurrence",
    [
        DDIM(SCHEDULE).recurrence(SCHEDULE.timesteps(1)),
        DDIM(SCHEDULE).recurrence(SCHEDULE.timesteps(1000)),
        Euler(NoiseSchedule.karras()).recurrence(NoiseSchedule.karras().timesteps(40)),
        Euler(NoiseSchedule.flow_matching()).recurrence(NoiseSchedule.flow_matching().timesteps(40)),
    ],
    ids=["one step", "ddim-1000", "karras", "flow"],
)
def test_placement_increases_from_0_to_1_and_levels_nest(recurrence: Recurrence) -> None:
    place = placement(recurrence)
    assert place[0] == 0
    assert len(place) == 1 or place[-1] == pytest.approx(1)
    assert np.all(np.diff(place) > 0)
    levels, n = Levels(recurrence), len(recurrence)
    level = levels.first(7)
    assert level.nodes[0] == 0
    assert level.nodes[-1] == n - 1
    for _ in range(10):
        finer = levels.finer(level)
        assert np.isin(level.nodes, finer.nodes).all()
        assert np.diff(level.nodes).max(initial=1) == 1 or len(finer.nodes) > len(level.nodes)
        level = finer
    np.testing.assert_array_equal(level.nodes, np.arange(n))


@pytest.mark.parametrize("noise_kind", ["seed", "array", "function"])
def test_sampler_with_noise_is_within_tolerance_at_a_fraction_of_the_cost(noise_kind: str) -> None:
    x_T, timesteps = noise(), SCHEDULE.timesteps(1000)
    z = np.random.default_rng(1).standard_normal((1000, 4, 32))
    drawn: dict[tuple[int, int], int] = {}

    def function(step: int, sample: int) -> np.ndarray:
        drawn[step, sample] = drawn.get((step, sample), 0) + 1
        return z[step, sample]

    options = {"seed": {"seed": 3}, "array": {"noise": z}, "function": {"noise": function}}[noise_kind]
    truth = solve_sequential(mixture_denoiser, x_T, timesteps, DDPM(SCHEDULE), **options).sample
    drawn.clear()
    solution = solve(mixture_denoiser, x_T, timesteps, DDPM(SCHEDULE), window=50, tolerance=0.1, **options)
    assert np.all(relative_error(solution.sample, truth) <= 0.1)
    assert sorted(drawn.values())[:-1] == [1] * (len(drawn) - 1) or not drawn  # once each; the first again, to compare
    assert max(drawn.values(), default=1) <= 2
    sliding = Method(spread=False)
    plain = solve(mixture_denoiser, x_T, timesteps, DDPM(SCHEDULE), 50, tolerance=0.1, method=sliding, **options)
    assert solution.stats.evaluations <= 0.8 * plain.stats.evaluations


def test_trajectory_of_a_sampler_with_noise_follows_the_sequential_one() -> None:
    x_T, timesteps = noise(2), SCHEDULE.timesteps(1000)
    options = {"seed": 5, "save": "trajectory"}
    truth = solve_sequential(mixture_denoiser, x_T, timesteps, DDPM(SCHEDULE), **options).trajectory
    solution = solve(mixture_denoiser, x_T, timesteps, DDPM(SCHEDULE), window=50, tolerance=0.1, **options)
    np.testing.assert_allclose(solution.trajectory[-1], solution.sample, rtol=1e-9, atol=1e-12)
    assert np.sqrt(((solution.trajectory - truth) ** 2).mean(axis=(1, 2))).max() <= 0.1


def test_expected_outputs_of_a_sliding_window_are_the_interpolated_predictions() -> None:
    recurrence = DDIM(SCHEDULE).recurrence(SCHEDULE.timesteps(9))
    weights, predictions = interpolation(np.arange(9), np.array([0, 4, 8])), np.array([[1.0], [3.0], [2.0]])
    x = np.array([0.7])
    for i, expected in ((0, 1.0), (1, 1.5), (4, 3.0), (6, 2.5), (8, 2.0)):
        m = BetweenNodes(weights, predictions, recurrence.held)(i, x, 0.0)
        p, q = recurrence.held[i]
        np.testing.assert_allclose(p * x + q * m, [expected], rtol=1e-12)


def test_a_sample_that_does_not_settle_goes_over_to_a_sliding_window() -> None:
    """The prediction jumps between neighbouring steps, so no interpolation describes it."""

    def rough(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        return np.sin(3 * x + 17.0 * t[:, None])

    x_T, timesteps = noise(2), SCHEDULE.timesteps(300)
    solution = solve(rough, x_T, timesteps, DDIM(SCHEDULE), window=20, tolerance=1e-2)
    truth = solve_sequential(rough, x_T, timesteps, DDIM(SCHEDULE)).sample
    assert solution.success
    assert np.all(relative_error(solution.sample, truth) <= 1e-2)


class Untrained:
    """A network with random weights that predicts the sample; ``expansion`` is about the norm of its first layer.

    Unlike a trained denoiser's, its Jacobian has no preferred direction, so a scalar slope says little of it.
    """

    def __init__(self, expansion: float, size: int = 32, seed: int = 0) -> None:
        rng, hidden = np.random.default_rng(seed), 64
        self.first = rng.standard_normal((size, hidden)) * expansion / size**0.5
        self.time = rng.standard_normal((3, hidden))
        self.second = rng.standard_normal((hidden, hidden)) * 1.5 / hidden**0.5
        self.last = rng.standard_normal((hidden, size)) / hidden**0.5

    def __call__(self, x: np.ndarray, t: np.ndarray) -> np.ndarray:
        bar = SCHEDULE.alphas_cumprod[t]
        lam = np.log(bar / (1 - bar)) / 2
        features = np.tanh(x @ self.first + np.stack([lam / 3, np.sin(lam), np.cos(lam)], axis=1) @ self.time)
        return np.tanh(features @ self.second) @ self.last


@pytest.mark.parametrize("window", [5, 16])
@pytest.mark.parametrize("rule", [DDIM, DPMSolver])
@pytest.mark.parametrize("expansion", [1.0, 3.0])
def test_untrained_networks_are_within_tolerance_and_take_at_most_twice_the_rounds_of_a_sliding_window(
    expansion: float, rule: type[DDIM | DPMSolver], window: int
) -> None:
    """Few nodes stepped over what the network does between them: up to three times the tolerance was left.

    One sample of 16 may take more: it may have spent as many rounds as a sliding window when it goes over to one.
    """
    x_T, timesteps, sampler = noise(16), SCHEDULE.timesteps(100), rule(SCHEDULE, prediction_type="sample")
    denoiser = Untrained(expansion)
    truth = solve_sequential(denoiser, x_T, timesteps, sampler).sample
    solution = solve(denoiser, x_T, timesteps, sampler, window=window, tolerance=5e-2)
    sliding = solve(denoiser, x_T, timesteps, sampler, window=window, tolerance=5e-2, method=Method(spread=False))
    assert np.mean(relative_error(solution.sample, truth) <= 5e-2) >= 15 / 16
    spread, slid = (
        np.bincount([s.sample for r in one.stats.history for s in r.samples]) for one in (solution, sliding)
    )
    assert spread.mean() <= 1.25 * slid.mean()
    assert np.sum(spread > 2 * slid.max()) <= 1
    assert spread.max() <= sliding_rounds(sampler.recurrence(timesteps), window, 5e-2) + 1 + slid.max()


@pytest.mark.parametrize("window", [5, 8, 16])
@pytest.mark.parametrize("rule", [DDIM, DPMSolver])
@pytest.mark.parametrize("network", [mixture_denoiser, Untrained(1.0), Untrained(5.0)], ids=["mixture", "one", "five"])
@pytest.mark.parametrize("steps", [50, 100])
def test_a_looser_tolerance_never_costs_more_rounds_beyond_one(
    steps: int, network: Denoiser, rule: type[DDIM | DPMSolver], window: int
) -> None:
    """Spread nodes were tried where they lose: 18 rounds at 5 % on a network that took 11 at 1 %.

    Three where a window too small for the first level goes astray, which it is found to do after four rounds.
    """
    beyond = 1 if isinstance(network, FunctionType) or window > 12 else 3
    kind = "sample" if isinstance(network, Untrained) else "epsilon"
    arguments = (network, noise(8), SCHEDULE.timesteps(steps), rule(SCHEDULE, prediction_type=kind), window)
    rounds = []
    for tolerance in (0.2, 0.1, 0.05, 0.02, 0.01):
        history = solve(*arguments, tolerance=tolerance).stats.history
        rounds.append(np.bincount([one.sample for part in history for one in part.samples]).mean())
    assert all(loose <= min(rounds[i + 1 :]) + beyond for i, loose in enumerate(rounds[:-1])), rounds


def test_trajectory_starts_at_the_noise_ends_at_the_sample_and_follows_the_sequential_one() -> None:
    x_T, timesteps = noise(), SCHEDULE.timesteps(500)
    options = {"save": "trajectory"}
    truth = solve_sequential(mixture_denoiser, x_T, timesteps, DDIM(SCHEDULE), **options).trajectory
    solution = solve(mixture_denoiser, x_T, timesteps, DDIM(SCHEDULE), window=20, tolerance=1e-2, save="trajectory")
    assert solution.trajectory.shape == truth.shape == (501, 4, 32)
    np.testing.assert_array_equal(solution.trajectory[0], x_T)
    np.testing.assert_allclose(solution.trajectory[-1], solution.sample, rtol=1e-9, atol=1e-12)
    distance = np.sqrt(((solution.trajectory - truth) ** 2).mean(axis=(1, 2)))
    assert distance.max() <= 2e-2


def test_nodes_are_spread_from_a_start_of_zero() -> None:
    """The state 0 has no relative moves; a differential equation may start there."""
    path = NoiseSchedule.flow_matching()
    timesteps, start = path.timesteps(300), np.zeros((1, 4))

    def field(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        return x - np.cos(2 * t[:, None] + np.arange(4))

    truth = solve_sequential(field, start, timesteps, Euler(path)).sample
    solution = solve(field, start, timesteps, Euler(path), window=10, tolerance=1e-2)
    assert np.all(relative_error(solution.sample, truth) <= 1e-2)
    assert solution.stats.rounds <= 20  # a window sliding over 300 steps needs at least 30


def test_nan_is_reported_with_its_timestep_and_the_other_samples_go_on() -> None:
    timesteps = SCHEDULE.timesteps(500)
    x_T = noise(3)
    x_T[1, 0] = 50.0  # marks the sample that fails

    def failing(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        bad = (x[:, 0] > 5) & (t < 400)
        return np.where(bad[:, None], np.nan, mixture_denoiser(x, t))

    solution = solve(failing, x_T, timesteps, DDIM(SCHEDULE), window=20, throw=False, check=False)
    assert [status.value for status in solution.statuses] == ["converged", "nonfinite_model", "converged"]
    assert "sample 1" in solution.message
    assert np.all(np.isfinite(solution.sample))
    alone = solve(mixture_denoiser, x_T[2:], timesteps, DDIM(SCHEDULE), window=20, check=False).sample
    np.testing.assert_allclose(solution.sample[2:], alone, rtol=1e-10, atol=1e-12)


def test_expected_outputs_are_like_the_start(xp: ModuleType) -> None:
    """They once were NumPy's on a CPU, whatever the library; pipelines hand them to their schedulers."""
    network, x_T, schedule = TanhNetwork(size=6, time_scale=1e-3), normal((1, 2, 3), xp), SCHEDULE
    solver = ParallelIntegralSolver(DDIM(schedule), window=32, tolerance=0.05)
    state = solver.init(network, x_T, schedule.timesteps(300), save="trajectory")
    while not solver.done(state):
        solver.step(state)
    found = [m for m in (state.expected(0, i) for i in range(300)) if m is not None]
    assert found
    assert {(type(m), m.dtype, tuple(m.shape)) for m in found} == {(type(x_T), x_T.dtype, (2, 3))}
