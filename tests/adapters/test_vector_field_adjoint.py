"""The backward recurrence at a trajectory, against what it is by hand, and when its rounds end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from parasolver_adapters.vector_field.adjoint import _Adjoint, attach
from parasolver_adapters.vector_field.field import Field
from parasolver_adapters.vector_field.grid import Grid
from parasolver_adapters.vector_field.methods import METHODS
from parasolver_adapters.vector_field.newton import ParallelIntegrator
from parasolver_adapters.vector_field.problem import Problem, integrate_sequentially

STEPS, H = 100, 0.05
Y0 = torch.tensor([1.0, 0.5], dtype=torch.float64)


def decay(t: Any, y: Any) -> Any:
    return -(y**2)


def problem(f: Any = decay) -> Problem:
    grid = Grid(np.linspace(0, STEPS * H, STEPS + 1), Y0, 1)
    return Problem(Field(f, Y0, "ty", "column"), grid, METHODS["euler"].bind(grid), 0)


def trajectory(one: Problem) -> Any:
    with torch.no_grad():
        return torch.cat(integrate_sequentially(one, 0, STEPS, [Y0[None]]))


def adjoint(linearization: Any = "full", tolerance: float = 1e-12, f: Any = decay) -> _Adjoint:
    one = problem(f)
    states = trajectory(one)
    start = states[:-1].clone().requires_grad_()
    ends, _ = one.method.advance(one.field, one.grid, 0, STEPS, start, None)
    return _Adjoint(one, ParallelIntegrator(linearization, tolerance, None, 40), Y0, start, ends, states)


def loss(seed: int = 0) -> Any:
    return torch.randn(STEPS + 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(states: Any, g: Any) -> Any:
    """``l_n = (1 - 2 h y_n) l_{n+1} + g_n``."""
    out = [g[-1]]
    for n in range(STEPS)[::-1]:
        out.append((1 - 2 * H * states[n]) * out[-1] + g[n])
    return torch.stack(out[::-1])


class Scripted:
    """Carries a defect back exactly, and makes of it what it is told to, round by round."""

    def __init__(self, states: Any, script: list[float]) -> None:
        self.states, self.script = states, script
        self.told: list[tuple[float, float]] = []
        self.rounds = 0

    def propagate_back(self, rho: Any, y: Any) -> Any:
        share = self.script[min(self.rounds, len(self.script) - 1)]
        self.rounds += 1
        g = torch.cat([rho[:, 0], torch.zeros(1, 2, dtype=rho.dtype)])
        return share * by_hand(self.states, g)[:-1, None]

    def update(self, size: float, theta: float) -> None:
        self.told.append((size, theta))


def scripted(monkeypatch: pytest.MonkeyPatch, script: list[float], tolerance: float = 1e-12) -> tuple[Any, Scripted]:
    one = adjoint(tolerance=tolerance)
    surrogate = Scripted(one.states, script)
    monkeypatch.setattr(ParallelIntegrator, "surrogate", lambda *_: surrogate)
    return one, surrogate


@pytest.mark.parametrize("linearization", ["full", "diagonal", "secant"])
@pytest.mark.parametrize("tolerance", [1e-12, 0.0])
def test_the_recurrence_is_solved_in_rounds(
    monkeypatch: pytest.MonkeyPatch, linearization: Any, tolerance: float
) -> None:
    """Where nothing may be left, until only rounding is."""
    one, g = adjoint(linearization, tolerance), loss()
    monkeypatch.setattr(_Adjoint, "_sequential", None)
    torch.testing.assert_close(one.solve(g), by_hand(one.states, g), rtol=1e-11, atol=1e-11)


def test_the_plain_loop_is_differentiated_with_the_loss_at_every_node() -> None:
    one, g = adjoint(), loss()
    with torch.no_grad():
        torch.testing.assert_close(one._sequential(g), by_hand(one.states, g), rtol=1e-12, atol=1e-12)


def test_a_surrogate_is_told_how_far_its_corrections_went(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine tenths of what is missing each time: a tenth of it is left."""
    one, surrogate = scripted(monkeypatch, [0.9])
    g = torch.zeros(STEPS + 1, 2, dtype=torch.float64)
    g[-1] = 1.0
    torch.testing.assert_close(one.solve(g), by_hand(one.states, g), rtol=1e-11, atol=1e-11)
    sizes, ratios = zip(*surrogate.told, strict=True)
    assert ratios[0] == 0  # nothing came before
    np.testing.assert_allclose(ratios[2:6], 0.1, rtol=1e-3)  # the first is held against gradients that are not whole
    np.testing.assert_allclose(np.array(sizes[1:6]) / sizes[:5], ratios[1:6], rtol=1e-12)
    assert 10 <= surrogate.rounds <= 14


def test_rounds_end_where_what_is_to_come_is_within_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    one, surrogate = scripted(monkeypatch, [0.9], tolerance=1e-4)
    g = loss()
    got = one.solve(g)
    assert surrogate.rounds == 5  # corrections of 0.9, 0.09 and so on; one of the tolerance's own size is the last
    torch.testing.assert_close(got, by_hand(one.states, g), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("script", "rounds"), [([np.nan], 1), ([0.5, np.inf], 2), ([-1.0], 40)])
def test_the_plain_loop_where_rounds_lead_nowhere(
    monkeypatch: pytest.MonkeyPatch, script: list[float], rounds: int
) -> None:
    one, surrogate = scripted(monkeypatch, script)
    g = loss()
    with np.errstate(all="ignore"):
        torch.testing.assert_close(one.solve(g), by_hand(one.states, g), rtol=1e-12, atol=1e-12)
    assert surrogate.rounds == rounds


def test_rounds_end_where_what_is_left_is_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Corrections that never get smaller than twenty roundings."""
    one, surrogate = scripted(monkeypatch, [1.0], tolerance=0.0)
    exactly, samples = surrogate.propagate_back, np.random.default_rng(0)
    signs = [torch.from_numpy(samples.choice([-5e-15, 5e-15], (STEPS, 1, 2))) for _ in range(40)]
    monkeypatch.setattr(surrogate, "propagate_back", lambda rho, y: exactly(rho, y) + signs[surrogate.rounds - 1])
    monkeypatch.setattr(_Adjoint, "_sequential", None)
    g = loss()
    torch.testing.assert_close(one.solve(g), by_hand(one.states, g), rtol=1e-12, atol=1e-12)
    assert surrogate.rounds <= 5


def test_nothing_is_attached_where_nothing_asks_for_it() -> None:
    one = problem()
    states = trajectory(one)
    runner = ParallelIntegrator("full", 1e-12, None, 40)
    assert attach(one, runner, Y0, states) is states
    wanted = Y0.clone().requires_grad_()
    assert attach(one, runner, wanted, states.clone()).requires_grad
    broken = states.clone()
    broken[7, 1] = torch.nan
    assert attach(one, runner, wanted, broken) is broken


@pytest.mark.parametrize("node", [0, STEPS // 2, STEPS])
def test_a_field_may_ask_for_gradients_at_the_first_the_middle_or_the_last_node(node: int) -> None:
    a = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def field(t: Any, y: Any) -> Any:
        here = torch.isclose(torch.as_tensor(t), torch.tensor(node * H, dtype=torch.float64))
        return torch.where(here, a * y, -y) if bool(here.any()) else -y

    one = problem(field)
    states = trajectory(one)
    assert attach(one, ParallelIntegrator("full", 1e-12, None, 40), Y0, states).requires_grad


def test_nothing_is_attached_where_a_batch_of_all_steps_ends_elsewhere() -> None:
    """The mean of all that is given, of which the step makes more than rounding, or less."""
    for share, attached in ((1e-9, False), (1e-17, True)):
        one = problem(lambda t, y, share=share: -y + share * y.mean() * torch.ones_like(y))
        states = trajectory(one)
        found = attach(one, ParallelIntegrator("full", 1e-14, None, 40), Y0.clone().requires_grad_(), states)
        assert (found is not None) is attached
