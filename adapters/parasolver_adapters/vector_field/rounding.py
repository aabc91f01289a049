"""How large rounding is: what numbers are held against, and whether small ones are no more than rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from array_api_compat import device

from parasolver_core.arrays import Array

_LEAST = {64: 1e-3, 32: 1.0}  # of its sample's largest element: what a smaller one is held against
_ROUNDING = {64: 1e3, 32: 16.0}  # in roundings, by bits: defects that are no more than rounding
_DRIFT = 0.25  # of what a random walk of such defects comes to: their sum, which rounding leaves far below
_JITTER = 4.0  # roundings


def local_scale(xp: Any, states: Array, reach: int) -> Array:
    """The largest value of each element at a node and ``reach`` nodes before it, of states (n, samples, size).

    Nodes further back do not count, nor other elements: what has decayed to nothing may grow again. Nor do later nodes:
    where they have run away, earlier ones would seem accurate beside them.
    """
    tiny = xp.full_like(states[:1, ...], float(xp.finfo(states.dtype).smallest_normal))
    largest, width, wanted = xp.maximum(xp.abs(states), tiny), 1, min(reach + 1, states.shape[0])
    while width < wanted:
        step = min(width, wanted - width)
        largest = xp.concat([largest[:step, ...], xp.maximum(largest[step:, ...], largest[:-step, ...])], axis=0)
        width += step
    return largest


def reach(steps: int) -> int:
    """How many nodes around count as near: the range of double precision decays by 1e6 over so many at most."""
    return max(steps // 50, 1)


def scatter(xp: Any, defects: Array, allowed: Array) -> bool:
    """Whether defects (n, ...) are as small as allowed, and have no common direction: a thousand small ones add up."""
    if not bool(xp.all(xp.abs(defects) <= allowed)):
        return False
    drift = xp.abs(xp.cumulative_sum(defects / allowed, axis=0))
    return bool(xp.all(drift <= _DRIFT * defects.shape[0] ** 0.5))


def is_rounding(xp: Any, defects: Array, size: Array, shaken: Callable[[Array], Array]) -> bool:
    """Whether defects (n, samples, size) are no more than the rounding of what they are made of, and scatter like it.

    They are held against the size of the element itself first, and where that is exceeded against what a step makes of
    rounding in all elements of its beginning, which is measured.

    Args:
        xp: array namespace.
        defects: of each step.
        size: (n, samples, size), of the elements that they are the difference of.
        shaken: by how much the steps' ends change if their beginnings do by these factors.
    """
    eps = float(xp.finfo(size.dtype).eps)
    roundings = _ROUNDING[xp.finfo(size.dtype).bits]
    allowed = roundings * eps * size
    if bool(xp.all(xp.abs(defects) <= allowed)):
        return scatter(xp, defects, allowed)
    of_sample = xp.max(allowed, axis=-1, keepdims=True)  # a jump of the field is not rounding
    if not bool(xp.all(xp.abs(defects) <= of_sample)):
        return False
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=tuple(size.shape))
    signs = xp.asarray(signs, dtype=size.dtype, device=device(size))
    answer = xp.abs(shaken(signs * (_JITTER * eps))) * (roundings / _JITTER)
    return scatter(xp, defects, xp.maximum(allowed, xp.minimum(answer, of_sample)))


def relative(xp: Any, difference: Array, scale: Array) -> float:
    """The largest difference (n, samples, size), of the elements' sizes.

    An element counts as at least a thousandth of its sample's largest, in float32 as the largest: below that it is
    decided by the rounding of the others, in the plain loop too.
    """
    least = _LEAST[xp.finfo(scale.dtype).bits] * xp.max(scale, axis=-1, keepdims=True)
    return float(xp.max(xp.abs(difference) / xp.maximum(scale, least)))
