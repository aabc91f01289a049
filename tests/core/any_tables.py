"""Tables of arbitrary coefficients, and a step of them as the equation has it."""

from typing import Any

import numpy as np

from parasolver_core import Recurrence
from parasolver_core.samplers.held_form import HeldForm
from parasolver_core.samplers.small_data import SmallData


def any_table(
    n: int = 7, states: int = 2, outputs: int = 3, noisy: bool = True, seed: int = 0, **changes: Any
) -> Recurrence:
    """Steps that read so many states and outputs, each with a coefficient of its own; every third adds no noise."""
    rng = np.random.default_rng(seed)
    parts: dict[str, Any] = {
        "timesteps": np.arange(n)[::-1].copy(),
        "a": np.tril(rng.uniform(0.2, 0.9, (n, states))),
        "b": np.tril(rng.uniform(-0.8, 0.8, (n, outputs))),
        "c": rng.uniform(0.1, 0.5, n) * (np.arange(n) % 3 != 2) * noisy,
        "held": np.stack([rng.uniform(-0.5, 0.5, n), rng.uniform(0.5, 2.0, n)], axis=1),
        "slope": rng.uniform(-0.5, 0.5, n),
    }
    return Recurrence(**(parts | changes))


def small_data(recurrence: Recurrence) -> SmallData:
    """What the states of a sampler tell of the size of its sample."""
    return SmallData(recurrence.signal, HeldForm(recurrence))


def step(table: Recurrence, i: int, x: Any, m: Any, z: Any = 0.0) -> Any:
    """``x_{i+1}``, given all states ``x_0 .. x_i`` and outputs ``m_0 .. m_i``."""
    states = sum(table.a[i, k] * x[i - k] for k in range(min(table.a.shape[1], i + 1)))
    outputs = sum(table.b[i, k] * m[i - k] for k in range(min(table.b.shape[1], i + 1)))
    return states + outputs + table.c[i] * z


def output(table: Recurrence, i: int, h: Any, x: Any) -> Any:
    """The output at node i that makes the held quantity ``h``."""
    p, q = table.held[i]
    return (h - p * x) / q
