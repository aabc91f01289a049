"""Corrections of one window that go as they are told to, and what is made of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from parasolver_adapters.vector_field.effort import Effort
from parasolver_adapters.vector_field.newton import ParallelIntegrator
from tests.adapters.test_vector_field_windows import corrected, exact, integrator, problem


class Told:
    """Corrects the second of two elements by a number a round, whatever the defects."""

    def __init__(self, script: list[float]) -> None:
        self.script = script
        self.told: list[tuple[float, float]] = []

    def propagate(self, r: Any, y: Any) -> Any:
        return np.broadcast_to([0.0, self.script[min(len(self.told), len(self.script) - 1)]], r.shape)

    def update(self, size: float, theta: float) -> None:
        self.told.append((size, theta))


def told(monkeypatch: pytest.MonkeyPatch, script: list[float]) -> tuple[Told, int, Effort]:
    surrogate = Told(script)
    monkeypatch.setattr(ParallelIntegrator, "surrogate", lambda *_: surrogate)
    one = problem(lambda t, y: 0 * y, 200, 2)
    _, accepted, effort = corrected(one, np.ones((201, 2)), "secant")
    return surrogate, accepted, effort


@pytest.mark.parametrize(
    ("script", "rounds"),
    [
        ([0.1, 1e-4, 0.09, 0.2, 0.1], 4),  # more than a thousand times the smallest
        ([0.1, 1e-4, 0.09, 0.08, 0.1, -0.07], 40),
    ],
)
def test_corrections_that_grow_a_thousandfold_end_a_window(
    monkeypatch: pytest.MonkeyPatch, script: list[float], rounds: int
) -> None:
    """One element that moves is enough for a node not to be accepted."""
    surrogate, accepted, effort = told(monkeypatch, script)
    assert (effort.rounds, accepted) == (rounds, 0)
    sizes, ratios = zip(*surrogate.told, strict=True)
    np.testing.assert_allclose(sizes[:3], [0.1, 1e-4 / 1.1, 0.09 / 1.1001], rtol=1e-6)  # of what it was before
    np.testing.assert_allclose(ratios[1:], np.array(sizes[1:]) / sizes[:-1], rtol=1e-12)
    assert ratios[0] == 0


@pytest.mark.parametrize(
    ("script", "rounds"),
    [
        ([1e-11, 5e-12, 1e-12, 1e-13], 4),  # a tenth, and a seventh on an average: 2e-14 is to come
        ([5e-13, 5e-13, 5e-13, 5e-13, 1e-13, 1e-14], 6),  # a fifth, but 0.67 on an average: 2e-13 is to come
    ],
)
def test_corrections_that_wander_are_not_over_when_two_have_fallen(
    monkeypatch: pytest.MonkeyPatch, script: list[float], rounds: int
) -> None:
    monkeypatch.setattr("parasolver_adapters.vector_field.newton.scatter", lambda *_: False)
    monkeypatch.setattr(ParallelIntegrator, "_rests", lambda *_: False)
    surrogate = Told([*script, 1e-3])
    monkeypatch.setattr(ParallelIntegrator, "surrogate", lambda *_: surrogate)
    _, accepted, effort = corrected(problem(lambda t, y: 0 * y, 200, 2), np.ones((201, 2)), "secant", own=5e-14)
    assert (effort.rounds, accepted) == (rounds, 200)


def test_steps_that_rest_are_accepted_whatever_the_last_correction_was() -> None:
    """Of a field of a hundred roundings, where nothing may be left to correct."""
    one = problem(lambda t, y: 1e5 - (y + 1e5), 200)
    states = exact(one)
    y, accepted, effort = corrected(one, np.where(np.arange(201)[:, None] > 0, 1.01 * states, states), own=0.0)
    assert accepted == 200
    assert effort.rounds < 40
    np.testing.assert_allclose(y, states, rtol=1e-9)


def test_a_window_gives_the_nodes_that_were_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ParallelIntegrator, "_correct", lambda self, problem, lo, hi, y, *_: (y, 37))
    found, whole = integrator()._window(problem(steps=200), 0, 200, [np.ones((1, 1))], Effort())
    assert (found.shape, whole) == ((37, 1), False)


@pytest.mark.parametrize("coarse_steps", [1, 2, 40])
def test_a_window_may_have_any_number_of_levels(coarse_steps: int) -> None:
    """Of 1, 9, 79 and 700 steps, for example."""
    one = problem(lambda t, y: -np.sin(y), 700, 2)
    runner = ParallelIntegrator("full", 1e-12, None, coarse_steps)
    found, whole = runner._window(one, 0, 700, [np.ones((1, 2))], Effort())
    assert whole
    np.testing.assert_allclose(found, exact(one)[1:], rtol=1e-11)


def test_what_a_step_makes_of_rounding_is_measured_at_its_own_beginning() -> None:
    """A small element that grows by itself: no rounding of the large one shows in it."""
    one = problem(lambda t, y: np.array([0.0, 4e-4]) + 0 * y, 400, 2)
    y = np.ones((401, 2))
    y[:, 1] = 1e-6 * np.arange(1, 402) + 50 * np.finfo(np.float64).eps * np.where(np.arange(401) % 2, 1, -1)
    ends, _ = one.method.advance(one.field, one.grid, 0, 400, y[:-1])
    scale = np.array([[1.0, 1e-6]]) * np.ones((400, 1, 1))
    assert not integrator()._rests(one, 0, 400, y, ends, None, scale)


def test_what_the_last_correction_leaves_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a field of 0 all that is wrong is in the first step; the last correction took a tenth of the one before."""
    monkeypatch.setattr("parasolver_adapters.vector_field.newton.scatter", lambda *_: False)
    monkeypatch.setattr(ParallelIntegrator, "_rests", lambda *_: False)
    _, _, effort = told(monkeypatch, [1e-9, 1e-10, 1e-11, 1e-12])
    (defects,), (correction,) = effort.defects, effort.corrections
    moved = 1e-9 + 1e-10 + 1e-11
    np.testing.assert_allclose(defects[0, 0], [0, -moved * 1.1], rtol=1e-5)
    np.testing.assert_allclose(defects[-1, 0], [0, -1e-12], rtol=1e-6)  # the steps behind begin without it
    assert not defects[1:-1].any()
    np.testing.assert_allclose(correction[:-1, 0, 1], 1e-12, rtol=1e-6)
    assert not correction[-1].any()
    assert not correction[..., 0].any()


def test_of_steps_before_one_that_still_moves_the_whole_defects_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    class First(Told):
        def propagate(self, r: Any, y: Any) -> Any:
            return np.where(np.arange(len(r))[:, None, None] < 50, [0.0, 1e-4], [0.0, 0.1]) * np.ones_like(r)

    monkeypatch.setattr(ParallelIntegrator, "surrogate", lambda *_: First([]))
    _, accepted, effort = corrected(problem(lambda t, y: 0 * y, 200, 2), np.ones((201, 2)), "secant", own=5e-3)
    assert (accepted, effort.rounds) == (50, 40)
    np.testing.assert_allclose(effort.defects[0][0, 0], [0, -2 * 39 * 1e-4], rtol=1e-6)
    np.testing.assert_allclose(effort.corrections[0][:-1, 0, 1], 1e-4, rtol=1e-6)


def test_states_that_rest_have_had_no_correction() -> None:
    one = problem(lambda t, y: 1e5 - (y + 1e5), 200)
    states = exact(one)
    _, _, effort = corrected(one, np.where(np.arange(201)[:, None] > 0, 1.01 * states, states), own=0.0)
    assert not effort.corrections[0].any()
    assert 0 < np.abs(effort.defects[0]).max() < 1e-12
