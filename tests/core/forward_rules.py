"""Step rules in increasing time, as a user writes them, and a plain loop."""

from collections.abc import Callable
from typing import Any

import numpy as np

from parasolver_core import NoiseSchedule, Recurrence, StepRule

TABLE = NoiseSchedule.scaled_linear()


def table(timesteps: np.ndarray, **changes: Any) -> Recurrence:
    """``x' = x + h m``, with h the distance to the next timestep and the last one repeated."""
    n, h = len(timesteps), steps_of(timesteps)
    parts: dict[str, Any] = {
        "timesteps": timesteps,
        "a": np.ones((n, 1)),
        "b": h[:, None],
        "c": np.zeros(n),
    }
    return Recurrence(**(parts | changes))


def steps_of(timesteps: np.ndarray) -> np.ndarray:
    h = np.diff(timesteps)
    return np.append(h, h[-1])


class ExplicitEuler(StepRule):
    def recurrence(self, timesteps: np.ndarray) -> Recurrence:
        return table(timesteps)


class AdamsBashforth(StepRule):
    """Two steps, on a uniform grid; the first is Euler's."""

    def recurrence(self, timesteps: np.ndarray) -> Recurrence:
        h = steps_of(timesteps)
        b = np.stack([1.5 * h, -0.5 * h], axis=1)
        b[0] = h[0], 0.0
        return table(timesteps, b=b)


class LeapFrog(StepRule):
    """``x_{i+1} = x_{i-1} + 2 h m_i``: memory in the states, not in the outputs."""

    def recurrence(self, timesteps: np.ndarray) -> Recurrence:
        h = steps_of(timesteps)
        a = np.tile([0.0, 1.0], (len(h), 1))
        a[0] = 1.0, 0.0
        b = 2 * h[:, None]
        b[0] = h[0]
        return table(timesteps, a=a, b=b)


def loop(rule: StepRule, f: Callable[[Any, Any], Any], y: np.ndarray, t: np.ndarray) -> np.ndarray:
    """All states by a plain loop, each formula as its textbook has it."""
    ys, fs = [y], []
    for i, h in enumerate(steps_of(t)):
        fs.append(f(ys[i], np.full(len(y), t[i])))
        if isinstance(rule, AdamsBashforth) and i:
            ys.append(ys[i] + h * (1.5 * fs[i] - 0.5 * fs[i - 1]))
        elif isinstance(rule, LeapFrog) and i:
            ys.append(ys[i - 1] + 2 * h * fs[i])
        else:
            ys.append(ys[i] + h * fs[i])
    return np.stack(ys)
