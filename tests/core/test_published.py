"""The published methods as presets: their rules, written out once more in the plainest form."""

import numpy as np
import pytest

from parasolver_core import DDIM, DDPM, DPMSolver, Method, NoiseSchedule, solve, solve_sequential
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
    variance = (1 - ab[1:n]) / (1 - ab[: n - 1]) * (1 - ab[: n - 1] / ab[1:n])
    variance = np.append(variance, variance[-1])
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
    with pytest.raises(ValueError, match="single step"):
        solve(TanhNetwork(), normal((1, 6)), SCHEDULE.timesteps(1), DDIM(SCHEDULE), method="paradigms")


def test_an_unknown_fill_is_refused() -> None:
    with pytest.raises(ValueError, match="fill: expected"):
        Method(fill="nearest")  # type: ignore[arg-type]
