"""The outputs of a network that would have made the states of a trajectory what they are: a step, backwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from parasolver_core.samplers.recurrence import Recurrence, StepNoise


def implied_outputs(recurrence: Recurrence, xp: Any, states: Sequence[Any], noise: StepNoise) -> list[Any]:
    """The outputs that would have made the steps from ``x_0`` to ``x_N``: N of them; zero where a step reads none.

    Args:
        recurrence: the sampler.
        xp: array namespace.
        states: ``x_0 .. x_N``.
        noise: of each step.
    """
    outputs: list[Any] = []
    for i in range(len(recurrence)):
        back = [i - k for k in range(min(recurrence.memory, i + 1))]
        xs, ms = [states[j] for j in back], [outputs[j] for j in back[1:]]
        outputs.append(implied_output(recurrence, xp, i, states[i + 1], xs, ms, noise(i)))
    return outputs


def implied_output(
    recurrence: Recurrence, xp: Any, i: int, after: Any, x: Sequence[Any], m: Sequence[Any], z: Any = None
) -> Any:
    """``m_i`` that makes step i end at ``after``, given ``x = (x_i, ...)`` and ``m = (m_{i-1}, ...)``."""
    nothing = xp.zeros_like(after)
    if recurrence.b[i, 0] == 0:
        return nothing
    return (after - recurrence.advance(i, x, [nothing, *m], z)) * float(1 / recurrence.b[i, 0])
