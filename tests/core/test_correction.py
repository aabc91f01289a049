"""The correction: the recurrence on a CPU, the matrix elsewhere, and both as the equations say."""

from typing import Any

import numpy as np
import pytest
import torch

from parasolver_core import DDIM, DDPM, Method, NoiseSchedule, NonFiniteError, solve, solve_sequential
from parasolver_core.methods import sliding
from parasolver_core.rounds import sweep as correction
from parasolver_core.samplers.held_form import HeldForm
from parasolver_core.samplers.step_rules import DPMSolver
from parasolver_core.samplers.terms import combine
from tests.core.problems import Mixture, Rational, normal, relative

SCHEDULE = NoiseSchedule.linear()
TIMESTEPS = SCHEDULE.timesteps(30)
RULES = [DDIM(SCHEDULE), DDPM(SCHEDULE), DPMSolver(SCHEDULE, order=2), DPMSolver(SCHEDULE, order=3)]
by_name = pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{type(rule).__name__}{getattr(rule, 'order', '')}")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """States of a few elements are worked on in blocks and sampled, as large ones are."""
    monkeypatch.setattr(sliding, "_LARGE", 0)
    monkeypatch.setattr(correction, "_WHOLE", 4)
    monkeypatch.setattr(correction, "_STRIPE", 2)
    monkeypatch.setattr(correction, "_PERIOD", 5)
    monkeypatch.setattr(correction, "_BLOCK", 10)


def test_in_place_sums_are_the_same_to_the_last_bit() -> None:
    arrays = normal((4, 50)).astype(np.float32)
    terms = list(zip([0.3, -1.7, 1e-3, 2.9], arrays, strict=True))
    out, work = np.empty_like(arrays[0]), np.empty_like(arrays[0])
    got = combine(terms, out, work)
    assert got is out
    assert np.array_equal(got, combine(terms))
    assert np.array_equal(got, ((arrays[0] * 0.3 + arrays[1] * -1.7) + arrays[2] * 1e-3) + arrays[3] * 2.9)


@by_name
def test_the_matrix_solves_the_equations(rule: Any) -> None:
    """``L dX - B G dX = B r`` for all states but the first, which does not move."""
    recurrence, lo, n = rule.recurrence(TIMESTEPS), 7, 6
    slope = normal((n,))
    L, B = np.eye(n), np.zeros((n, n))
    for j in range(1, n):
        for k in range(min(recurrence.a.shape[1], j)):
            L[j, j - 1 - k] -= recurrence.a[lo + j - 1, k]
        for k in range(min(recurrence.b.shape[1], j)):
            B[j, j - 1 - k] = recurrence.b[lo + j - 1, k]
    expected = np.linalg.solve(L - B * slope, B)
    p, q = recurrence.held[lo : lo + n].T
    defects = np.random.default_rng(1).standard_normal((n, 3))
    held = q[:, None] * defects
    given = np.arange(lo, lo + n), p + q * slope, held @ held.T
    T, squares = HeldForm(recurrence).propagation(*(part[None, ...] for part in given))
    assert np.allclose(T[0] * q, expected, rtol=1e-12, atol=1e-14)  # a defect of the held quantity is q times it
    assert np.allclose(squares[0], ((expected @ defects) ** 2).sum(axis=1), rtol=1e-10, atol=1e-12)


@by_name
@pytest.mark.parametrize("method", ["secant", "identity", "paradigms", "parasolver"])
def test_recurrence_and_matrix_are_one_method(rule: Any, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, x_T = Mixture(SCHEDULE, "epsilon"), normal((2, 40))
    options: dict[str, Any] = {"window": 7, "method": method, "tolerance": 1e-3}
    by_matrix = solve(network, x_T, TIMESTEPS, rule, **options)
    monkeypatch.setattr(sliding, "_LARGE", 0)
    swept = solve(network, x_T, TIMESTEPS, rule, **options)
    assert relative(swept.sample, by_matrix.sample) < 1e-6
    for one, other in zip(swept.stats.history, by_matrix.stats.history, strict=True):
        for a, b in zip(one.samples, other.samples, strict=True):
            assert (a.first, a.window, a.accepted) == (b.first, b.window, b.accepted)
            assert np.allclose(a.residuals, b.residuals, rtol=0.02, atol=1e-10)  # sizes are measured now and then
            assert np.allclose(a.defects, b.defects, rtol=1e-3, atol=1e-10)


@pytest.mark.usefixtures("small_blocks")
@by_name
@pytest.mark.parametrize("method", ["secant", "paradigms", "parasolver"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_blocks_and_samples_keep_the_promises(rule: Any, method: str, dtype: Any) -> None:
    x_T = normal((2, 33)).astype(dtype)
    exact = solve_sequential(Rational(), x_T, TIMESTEPS, rule).sample
    alone = solve(Rational(), x_T, TIMESTEPS, rule, 1, method=method)
    assert np.array_equal(alone.sample, exact)
    for window in (5, 30):  # inputs that moved by rounding alone are not evaluated again
        got = solve(Rational(), x_T, TIMESTEPS, rule, window, tolerance=0.0, method=method)
        assert relative(got.sample, exact) < 100 * np.finfo(dtype).eps
    near = solve(Rational(), x_T, TIMESTEPS, rule, 8, tolerance=1e-2, method=Method(spread=False))
    assert near.stats.rounds < len(TIMESTEPS)
    assert relative(near.sample, exact) < 1e-2


@pytest.mark.parametrize("element", [0, 3000, 8999])
@pytest.mark.parametrize("node", [0, 7, 29])
@pytest.mark.parametrize("kind", [torch.asarray, np.asarray], ids=["torch", "numpy"])
def test_one_number_that_is_not_finite_in_a_large_state(kind: Any, node: int, element: int) -> None:
    """Sums are taken over some elements of a large state; what is not finite is found in all, also at the last node."""

    def network(x: Any, t: Any) -> Any:
        out = Rational()(x, t)
        out[t == TIMESTEPS[node], element] = np.inf
        return out

    with pytest.raises(NonFiniteError, match=rf"at step {node} \(timestep {TIMESTEPS[node]}\)"):
        solve(network, kind(normal((1, 9000))), TIMESTEPS, DDIM(SCHEDULE), 6)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("element", [0, 4, 32])
@pytest.mark.parametrize("node", [3, 11, 29])
def test_what_is_not_finite_is_found_outside_the_sample_too(node: int, element: int) -> None:
    def network(x: Any, t: Any) -> Any:
        out = Rational()(x, t)
        out[t == TIMESTEPS[node], element] = np.nan
        return out

    with pytest.raises(NonFiniteError, match=str(TIMESTEPS[node])) as caught:
        solve(network, normal((1, 33)), TIMESTEPS, DDIM(SCHEDULE), 6)
    solution = caught.value.solution  # type: ignore[attr-defined]
    assert np.all(np.isfinite(solution.states))
    assert solution.steps[0] <= node
