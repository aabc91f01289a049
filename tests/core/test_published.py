"""The published methods as presets: their rules, written out once more in the plainest form."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from parasolver_core import DDIM, DDPM, DPMSolver, Method, NoiseSchedule, solve, solve_sequential
from parasolver_core.errors import NonFiniteError
from parasolver_core.methods.anderson import Anderson, triangular_weights
from parasolver_core.methods.presets import METHODS
from parasolver_core.rounds.acceptance import RelativeMove
from parasolver_core.rounds.linearization import Identity
from parasolver_core.rounds.step_variance import StepVariance
from tests.core.problems import TanhNetwork, normal, relative

SCHEDULE = NoiseSchedule.linear()


def ddim_step(network, x, alpha_bar, after, t):
    eps = network(x[None], np.array([t]))[0]
    x0 = (x - np.sqrt(1 - alpha_bar) * eps) / np.sqrt(alpha_bar)
    return np.sqrt(after) * x0 + np.sqrt(1 - after) * eps, x0


def picard(network, x_T, timesteps, window, tolerance, fill):
    """Picard iteration over a sliding window, as the papers write it: rounds and the final state."""
    n = len(timesteps)
    ab = np.append(SCHEDULE.alphas_cumprod[timesteps], 1.0)
    after = np.append(ab[1:n], 1.0 if fill == "copy" else 1 - 1e-4)
    variance = (1 - after) / (1 - ab[:n]) * (1 - ab[:n] / after)
    states, lo, hi, rounds = [x_T] * (n + 1), 0, 1 if fill == "evaluated" else min(window, n), 0
    while lo < n:
        steps = [ddim_step(network, states[i], ab[i], ab[i + 1], timesteps[i]) for i in range(lo, hi)]
        rounds += 1
        drift = np.cumsum([new - states[i] for i, (new, _) in zip(range(lo, hi), steps, strict=True)], axis=0)
        moved = states[lo] + drift
        count = 1
        for i in range(lo + 1, hi):
            if np.mean((moved[i - lo - 1] - states[i]) ** 2) > tolerance**2 * variance[i]:
                break
            count += 1
        for i in range(lo, hi):
            states[i + 1] = moved[i - lo]
        lo, old = lo + count, hi
        hi = min(lo + window, n)
        for i in range(old, hi):
            states[i + 1] = states[old]
            if fill == "evaluated":
                x0 = steps[-1][1]
                eps = (states[i] - np.sqrt(ab[i]) * x0) / np.sqrt(1 - ab[i])
                states[i + 1] = np.sqrt(ab[i + 1]) * x0 + np.sqrt(1 - ab[i + 1]) * eps
    return rounds, states[n]


@pytest.mark.parametrize(("name", "fill"), [("paradigms", "copy"), ("parasolver", "evaluated")])
@pytest.mark.parametrize(("steps", "window"), [(20, 20), (25, 8), (50, 16)])
@pytest.mark.parametrize("tolerance", [0.1, 0.01])
def test_a_published_method_is_its_algorithm(name, fill, steps, window, tolerance) -> None:
    network, x_T, timesteps = TanhNetwork(), normal((1, 6)), SCHEDULE.timesteps(steps)
    rounds, sample = picard(network, x_T[0], timesteps, window, tolerance, fill)
    got = solve(network, x_T, timesteps, DDIM(SCHEDULE), window, tolerance=tolerance, method=name)
    assert got.stats.rounds == rounds
    assert relative(got.sample[0], sample) < 1e-10


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(), NoiseSchedule.squared_cosine()], ids=["linear", "cosine"])
def test_the_published_stop_rule_knows_the_noise_of_the_first_steps(schedule) -> None:
    timesteps = schedule.timesteps(1000)
    ab = schedule.alphas_cumprod[timesteps]
    beta = 1 - ab[:-1] / ab[1:]
    bounds = StepVariance().bounds(DDPM(schedule).recurrence(timesteps))
    np.testing.assert_allclose(bounds[:-1] ** 2, beta * (1 - ab[1:]) / (1 - ab[:-1]), rtol=1e-9)
    assert bounds[-1] < 1e-8  # it ends where the last step begins: that one waits for its final input


def anderson(network, x_T, timesteps, window, tolerance, order, memory):
    """ParaTAA as the paper writes it, with explicit sums and a least squares problem for every state."""
    n = len(timesteps)
    ab = np.append(SCHEDULE.alphas_cumprod[timesteps], 1.0)
    a = np.sqrt(ab[1:] / ab[:-1])
    b = np.sqrt(1 - ab[1:]) - a * np.sqrt(1 - ab[:-1])
    after = np.append(ab[1:n], 1 - 1e-4)
    deviation = np.sqrt((1 - after) / (1 - ab[:n]) * (1 - ab[:n] / after))
    x, lo, rounds, history = {i: x_T for i in range(window + 1)}, 0, 0, []
    while lo < n:
        hi = min(lo + window, n)
        for i in range(lo, hi):
            x.setdefault(i + 1, x[i])
        eps = {i: network(x[i][None], timesteps[i : i + 1])[0] for i in range(lo, hi)}
        rounds += 1
        residual = {}
        for i in range(lo, hi):
            begin = max(i + 1 - order, lo)
            value = x[begin]
            for j in range(begin, i + 1):
                value = a[j] * value + b[j] * eps[j]
            residual[i + 1] = value - x[i + 1]
        history.append((dict(x), residual))
        first = next(
            (
                i
                for i in range(lo, hi)
                if np.sqrt(np.mean((a[i] * x[i] + b[i] * eps[i] - x[i + 1]) ** 2)) > tolerance * max(deviation[i], 0.2)
            ),
            hi - 1,
        )
        new = dict(x)
        pairs = list(itertools.pairwise(history[-memory - 1 :]))
        for i in range(lo, hi):
            new[i + 1] = x[i + 1] + residual[i + 1]
            if i <= first:
                continue
            rows = range(lo + 1, i + 2)
            dR = [np.concatenate([p[1][s] - q[1][s] if s in q[1] else 0 * x_T for s in rows]) for q, p in pairs]
            R = np.concatenate([residual[s] for s in rows])
            gram = np.array([[p @ q for q in dR] for p in dR])
            if pairs:
                weights = np.linalg.solve(gram + 1e-3 * np.eye(len(dR)), np.array([p @ R for p in dR]))
                for weight, (q, p) in zip(weights, pairs, strict=True):
                    if i + 1 in q[1]:
                        new[i + 1] = new[i + 1] - weight * (p[0][i + 1] - q[0][i + 1] + p[1][i + 1] - q[1][i + 1])
        x, lo = new, first + 1
    return rounds, x[n]


@pytest.mark.parametrize(("order", "memory"), [(1, 0), (4, 0), (4, 2), (16, 1), (16, 3)])
@pytest.mark.parametrize(("steps", "window"), [(16, 16), (25, 8)])
@pytest.mark.parametrize("tolerance", [0.05, 0.001])
def test_parataa_is_its_algorithm(steps, window, tolerance, order, memory) -> None:
    network, x_T, timesteps = TanhNetwork(), normal((1, 6)), SCHEDULE.timesteps(steps)
    rounds, sample = anderson(network, x_T[0], timesteps, window, tolerance, order, memory)
    method = Anderson(order=order, memory=memory)
    got = solve(network, x_T, timesteps, DDIM(SCHEDULE), window, tolerance=tolerance, method=method)
    assert got.stats.rounds == rounds
    assert relative(got.sample[0], sample) < 1e-9


def test_parataa_refuses_multistep_rules() -> None:
    with pytest.raises(ValueError, match="read the current node only"):
        solve(TanhNetwork(), normal((1, 6)), SCHEDULE.timesteps(9), DPMSolver(SCHEDULE), method="parataa")


def test_parataa_with_noise_is_exact_without_tolerance() -> None:
    arguments = (TanhNetwork(), normal((2, 6)), SCHEDULE.timesteps(24), DDPM(SCHEDULE))
    exact = solve_sequential(*arguments, seed=3, save="trajectory")
    got = solve(*arguments, 7, tolerance=0, method="parataa", seed=3, save="trajectory")
    assert relative(got.trajectory, exact.trajectory) < 1e-10


@pytest.mark.parametrize("name", ["order", "memory"])
def test_numbers_of_parataa_that_cannot_be(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected an integer of at least {int(name == 'order')}, got -1$"):
        Anderson(**{name: -1})


def test_parataa_with_a_window_beyond_the_last_step() -> None:
    arguments = (TanhNetwork(), normal((2, 6)), SCHEDULE.timesteps(9), DDIM(SCHEDULE))
    got = solve(*arguments, 40, tolerance=0, method="parataa")
    assert relative(got.sample, solve_sequential(*arguments).sample) < 1e-10
    assert got.stats.history[0].window == 9


def test_parataa_reports_a_network_that_fails() -> None:
    def broken(x, t):
        return np.where(t[:, None] < 500, np.nan, x)

    with pytest.raises(NonFiniteError, match=r"^The denoiser gave NaN or infinity for sample 0 at step") as raised:
        solve(broken, normal((1, 6)), SCHEDULE.timesteps(16), DDIM(SCHEDULE), 8, method="parataa")
    assert np.all(np.isfinite(raised.value.solution.states))


@pytest.mark.parametrize("name", ["paradigms", "parasolver"])
@pytest.mark.parametrize("rule", [DDIM(SCHEDULE), DDPM(SCHEDULE), DPMSolver(SCHEDULE)], ids=["ddim", "ddpm", "2m"])
def test_a_published_method_without_tolerance_is_exact(name, rule) -> None:
    arguments = (TanhNetwork(), normal((2, 6)), SCHEDULE.timesteps(24), rule)
    exact = solve_sequential(*arguments, seed=3)
    got = solve(*arguments, 7, tolerance=0, method=name, seed=3)
    assert relative(got.sample, exact.sample) < 1e-10


def test_copies_fill_the_first_window() -> None:
    got = solve(TanhNetwork(), normal((1, 6)), SCHEDULE.timesteps(30), DDIM(SCHEDULE), 12, method="paradigms")
    assert [len(part.samples[0].nodes) for part in got.stats.history][:2] == [12, 12]


def test_the_published_stop_rule_needs_noise_levels() -> None:
    recurrence = replace(DDIM(SCHEDULE).recurrence(SCHEDULE.timesteps(9)), signal=None)
    with pytest.raises(ValueError, match="no noise levels"):
        StepVariance().bounds(recurrence)


def test_an_unknown_fill_is_refused() -> None:
    with pytest.raises(ValueError, match="fill: expected"):
        Method(fill="nearest")  # type: ignore[arg-type]


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
@pytest.mark.parametrize("memory", [1, 2, 4])
@pytest.mark.parametrize(
    "network",
    [
        lambda x, t: np.zeros_like(x),  # no round changes anything
        lambda x, t: 0.5 * x,  # all changes are alike
        lambda x, t: np.where(np.abs(x) > 1e-3, 1.0, 0.0) * t[:, None],  # steps: the same change again and again
        lambda x, t: 30.0 * np.sin(x),
        lambda x, t: 1e8 * np.tanh(x),  # the ridge is lost in the rounding of the sums
    ],
    ids=["zero", "linear", "steps", "wild", "large"],
)
def test_parataa_with_rounds_that_cannot_be_told_apart(network, memory, ridge) -> None:
    x_T, timesteps = normal((2, 1)), SCHEDULE.timesteps(24)
    exact = solve_sequential(network, x_T, timesteps, DDIM(SCHEDULE), save="trajectory")
    method = Anderson(memory=memory, ridge=ridge)
    got = solve(network, x_T, timesteps, DDIM(SCHEDULE), 8, tolerance=0, method=method, save="trajectory")
    assert relative(got.trajectory, exact.trajectory) < 1e-9


def test_weights_of_nodes_whose_sums_are_out_of_range() -> None:
    gram, cross = np.ones((2, 2, 3)), np.ones((2, 3))
    gram[:, :, 1] = 1e308
    gram[:, :, 2] = 1e308
    with np.errstate(over="ignore"):
        weights = triangular_weights(gram, cross, 0.0)
    np.testing.assert_allclose(weights[:, 0], [0.5, 0.5])  # the least of those that fit
    assert np.all(np.isfinite(weights))
    np.testing.assert_array_equal(weights[:, 2], 0.0)


@pytest.mark.parametrize("choice", [{"fill": "held"}, {"spread": True}, {"linearization": Identity()}], ids=str)
def test_parataa_takes_no_choices_that_it_has_no_use_for(choice) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(choice))}'"):
        Anderson(**choice)
    with pytest.raises(ValueError, match=next(iter(choice))):
        replace(METHODS["parataa"], **choice)


@pytest.mark.parametrize(
    ("name", "value"), [("ridge", -1.0), ("ridge", np.nan), ("floor", -0.1), ("acceptance", RelativeMove())]
)
def test_parataa_refuses_wrong_choices(name, value) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
        Anderson(**{name: value})


@pytest.mark.parametrize("window", [1, 8])
def test_parataa_has_no_warm_start_and_no_warm_up(window) -> None:
    arguments = (TanhNetwork(), normal((1, 6)), SCHEDULE.timesteps(16), DDIM(SCHEDULE), window)
    with pytest.raises(ValueError, match=r"^start: method='parataa' begins with copies"):
        solve(*arguments, method="parataa", start=np.zeros((17, 1, 6)))
    with pytest.raises(ValueError, match=r"^warmup_steps: method='parataa' opens its window at once, got 3"):
        solve(*arguments, method="parataa", warmup_steps=3)


@pytest.mark.parametrize(
    ("name", "value"), [("linearization", Identity), ("acceptance", RelativeMove), ("spread", "no")]
)
def test_a_method_of_wrong_parts_is_refused(name, value) -> None:
    with pytest.raises(TypeError, match=f"^{name}: expected"):
        Method(**{name: value})


def test_every_method_says_what_it_is() -> None:
    told = [method.summary for method in METHODS.values()]
    assert all(told)
    assert len(set(told)) == len(METHODS)
