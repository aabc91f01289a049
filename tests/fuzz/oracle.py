"""The plain loop, written by hand over single rows, and how much small changes of it matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np

from parasolver_core.samplers.noise import draw
from tests.fuzz.programs import Program

Float64 = np.ndarray


def working(program: Program) -> Any:
    """The dtype of the states."""
    return program.xp.float64 if program.dtype == "float64" else program.xp.float32


def eps(program: Program, dtype: Any = None) -> float:
    return float(program.xp.finfo(working(program) if dtype is None else dtype).eps)


def host(array: Any) -> Float64:
    """The values in float64."""
    if isinstance(array, np.ndarray | np.generic):
        return np.asarray(array, dtype=np.float64)
    xp: Any = array_api_compat.array_namespace(array)
    return np.from_dlpack(xp.astype(array, xp.float64))


def noise_of(program: Program, step: int, sample: int) -> Any:
    """``z`` in the working dtype, from what the program was given."""
    xp, given, event = program.xp, program.noise, tuple(program.x_T.shape[1:])
    if "noise" in given:
        z = given["noise"](step, sample) if callable(given["noise"]) else given["noise"][step, sample, ...]
        return xp.asarray(np.array(host(z)), dtype=working(program))
    seed = given.get("seed", 0)
    key, stream = (seed[sample], 0) if isinstance(seed, list) else (seed, sample)
    return xp.asarray(draw(key, stream, step, event), dtype=working(program))


@dataclass
class Way:
    """One sample's way: states ``x_0 ..`` and outputs, until something was not finite.

    Args:
        states, outputs: as far as they are finite; the states in the working dtype.
        whose: "" where all is finite, else "model" or "solver".
    """

    states: list[Any]
    outputs: list[Any]
    whose: str


def output(program: Program, step: int, sample: int, x: Any) -> Any:
    """What the network says to a state alone, in the working dtype."""
    xp, recurrence = program.xp, program.recurrence
    net_dtype = program.x_T.dtype
    if recurrence.input_scale is not None:
        x = x * xp.asarray(recurrence.input_scale[step], dtype=x.dtype)
    integral = np.issubdtype(program.grid.dtype, np.integer)
    t = xp.asarray(program.grid[step : step + 1], dtype=xp.int64 if integral else working(program))
    with np.errstate(over="ignore"):
        m = program.network.at(xp.astype(x[None, ...], net_dtype), t, np.array([sample]))
    return xp.astype(m, working(program))[0, ...]


def plain(program: Program, sample: int, shake: float = 0.0, rng: np.random.Generator | None = None) -> Way:
    """The steps one after another; with ``shake`` each state behind the first moves by that share of its RMS."""
    xp, recurrence, dtype = program.xp, program.recurrence, working(program)
    states, outputs = [xp.astype(program.x_T, dtype, copy=True)[sample, ...]], []
    half = eps(program, program.x_T.dtype) > eps(program)
    for i in range(len(recurrence)):
        m = output(program, i, sample, states[-1])
        if shake and (half or not program.network.kind.exact):
            m = moved(xp, m, max(shake, eps(program, program.x_T.dtype)), rng)
        if not bool(xp.all(xp.isfinite(m))):
            return Way(states, outputs, "model")
        outputs.append(m)
        with np.errstate(all="ignore"):
            x = step(program, i, sample, states, outputs)
        if not bool(xp.all(xp.isfinite(x))):
            return Way(states, outputs, "solver")
        states.append(moved(xp, x, shake, rng) if shake else x)
    return Way(states, outputs, "")


def step(program: Program, i: int, sample: int, states: list[Any], outputs: list[Any]) -> Any:
    """``x_{i+1}``: the states first, then the outputs, then the noise."""
    recurrence = program.recurrence
    x = states[i] * float(recurrence.a[i, 0])
    for k in range(1, recurrence.a.shape[1]):
        if recurrence.a[i, k] != 0:
            x = x + states[i - k] * float(recurrence.a[i, k])
    for k in range(recurrence.b.shape[1]):
        if recurrence.b[i, k] != 0:
            x = x + outputs[i - k] * float(recurrence.b[i, k])
    if recurrence.c[i] != 0:
        x = x + noise_of(program, i, sample) * float(recurrence.c[i])
    return x


def rms(values: Float64) -> float:
    largest = float(np.max(np.abs(values)))
    return largest * float(np.sqrt(np.mean(np.square(values / largest)))) if 0 < largest < np.inf else largest


def shaken(program: Program, sample: int, way: Way, share: float) -> float | None:
    """How far the sample comes from changes of each state by a share, RMS; None where it does not get there."""
    rng, worst = np.random.default_rng(program.seed + 1), 0.0
    size = host(way.states[0]).size
    for _ in range(2 if size > 8 else 8):  # what a few numbers are changed by, is little by chance
        other = plain(program, sample, share, rng)
        if other.whose:
            return None
        worst = max(worst, rms(host(other.states[-1]) - host(way.states[-1])))
    return worst


def moved(xp: Any, x: Any, share: float, rng: np.random.Generator | None) -> Any:
    assert rng is not None
    values = host(x)
    move = share * rms(values) * rng.standard_normal(values.shape)
    with np.errstate(all="ignore"):
        return x + xp.asarray(move, dtype=x.dtype)
