"""When nodes are spread: just enough steps, and one too few, for what the tolerance asks."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from parasolver_core import Identity, Method
from parasolver_core.methods.expected import sliding_rounds
from parasolver_core.rounds.acceptance import RelativeMove
from parasolver_core.samplers.recurrence import Recurrence

METHOD = Method()


def plain(steps: int, stages: int = 1, noisy: bool = False) -> Recurrence:
    once, noise = np.ones((steps, 1)), np.full(steps, float(noisy))
    return Recurrence(np.arange(steps), once, 0.1 * once, noise, stages=stages)


def tolerance_of(nodes: float, noisy: bool = False) -> float:
    """What asks for so many nodes: 5.5 over the root of 1.3 tolerances; with noise 7 over 0.4 of them."""
    return 7 / nodes / 0.4 if noisy else (5.5 / nodes) ** 2 / 1.3


def test_how_many_nodes_a_tolerance_asks_for() -> None:
    assert METHOD.needed_nodes(plain(100), tolerance_of(20)) == pytest.approx(20)
    assert METHOD.needed_nodes(plain(100, stages=2), tolerance_of(20)) == pytest.approx(40)
    assert METHOD.needed_nodes(plain(100, noisy=True), tolerance_of(20, True)) == pytest.approx(20)


@pytest.mark.parametrize(
    ("steps", "window", "options", "nodes"),
    [
        (90, 8, {}, 30.0),
        (90, 90, {}, 30.0),
        (90, 7, {}, (90 - 8) / 3),
        (90, 5, {}, (90 - 24) / 3),
        (180, 16, {"stages": 2}, 30.0),
        (180, 5, {"stages": 2}, (180 - 8 * 11) / 6),
        (300, 10, {"noisy": True}, (300 - 70) / 2),
    ],
)
def test_so_many_steps_are_enough(steps: int, window: int, options: dict[str, Any], nodes: float) -> None:
    recurrence, noisy = plain(steps, **options), "noisy" in options
    assert METHOD.spreads(recurrence, window, tolerance_of(nodes * (1 - 1e-9), noisy))
    assert not METHOD.spreads(recurrence, window, tolerance_of(nodes * (1 + 1e-9), noisy))


@pytest.mark.parametrize(
    ("steps", "window", "stages", "spread"),
    [(64, 5, 1, True), (63, 5, 1, False), (64, 4, 1, False), (128, 16, 2, True), (127, 16, 2, False)],
)
def test_never_over_few_steps_nor_in_a_small_window(steps: int, window: int, stages: int, spread: bool) -> None:
    assert METHOD.spreads(plain(steps, stages), window, 0.9) is spread


class Own(RelativeMove):
    """The default rule under another name."""


@pytest.mark.parametrize(
    ("method", "spread"),
    [
        (Method(linearization=Identity()), True),
        (Method(spread=False), False),
        (Method(fill="evaluated"), False),
        (Method(acceptance=Own()), False),
    ],
)
def test_never_by_a_method_with_rules_of_a_window(method: Method, spread: bool) -> None:
    assert method.spreads(plain(300), 20, 0.5) is spread
    assert not method.spreads(plain(300), 20, 0.0)
    assert not method.sliding().spreads(plain(300), 20, 0.5)
    assert method.sliding() == replace(method, spread=False)


def test_a_window_of_the_same_rounds() -> None:
    """A tolerance beyond 1 asks for no digits, and one below a millionth for six."""
    recurrence = plain(100)
    assert sliding_rounds(recurrence, 10, 4.0) == sliding_rounds(recurrence, 10, 1.0) == pytest.approx(10 + 0.9 * 2.6)
    wanted = 10 + 0.9 * (2.6 + 1.1 * 6 * 10 ** (1 / 3))
    assert sliding_rounds(recurrence, 10, 1e-9) == pytest.approx(wanted)
