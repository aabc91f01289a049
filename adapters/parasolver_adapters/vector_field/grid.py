"""The grid of times: where steps begin and end, on the host and on the field's device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import array_api_compat
import numpy as np
from numpy.typing import ArrayLike, NDArray

from parasolver_core.arrays import Array, is_array, to_host
from parasolver_core.validation import as_float


class Grid:
    """Times ``t_0 .. t_N``, strictly monotone; step n goes from ``t_n`` to ``t_{n+1}``.

    Args:
        t: (N + 1,), float64, on the host.
        like: an array whose library, dtype and device the field's arguments have.
        ndim: number of axes of one state.
    """

    def __init__(self, t: NDArray[np.float64], like: Array, ndim: int) -> None:
        self.xp: Any = array_api_compat.array_namespace(like)
        self.t, self.h = t, np.diff(t)
        self.ndim, self.dtype, self._like = ndim, like.dtype, like
        self._h = self.column(self.h)
        self._times: dict[float, Array] = {}

    def __len__(self) -> int:
        return len(self.h)

    def column(self, values: NDArray[Any]) -> Array:
        """Host values, one a step, as an array that broadcasts against states ``(steps, *state)``."""
        return self.asarray(values.reshape(-1, *(1,) * self.ndim))

    def asarray(self, values: NDArray[Any]) -> Array:
        """Host values in the field's library and dtype, on its device."""
        return self.xp.asarray(np.array(values), dtype=self._like.dtype, device=array_api_compat.device(self._like))

    def steps(self, lo: int, hi: int) -> Any:
        """Lengths of the steps ``lo .. hi - 1``: a column, or a plain number for a single step."""
        return float(self.h[lo]) if hi - lo == 1 else self._h[lo:hi, ...]

    def times(self, lo: int, hi: int, c: float) -> Array:
        """(hi - lo,), the times at the fraction c of the steps ``lo .. hi - 1``; never outside a step."""
        if c not in self._times:
            self._times[c] = self.asarray(self.t[1:] if c == 1 else self.t[:-1] + c * self.h)
        return self._times[c][lo:hi]

    def part(self, nodes: NDArray[np.int64]) -> Grid:
        """The coarser grid that holds these nodes only."""
        return Grid(self.t[nodes], self._like, self.ndim)


def check_times(t: ArrayLike) -> NDArray[np.float64]:
    """``t`` as a host array (N + 1,): real, finite, strictly increasing or decreasing, at least one time."""
    if getattr(t, "requires_grad", False):
        raise ValueError("t: gradients with respect to times are not computed; pass t.detach()")
    try:
        host = np.asarray(to_host(t) if is_array(t) else t)
    except (TypeError, ValueError) as error:  # bfloat16, which NumPy does not have, or sequences of unequal lengths
        raise TypeError(f"t: expected a 1-D sequence of real numbers, got {error}") from error
    if host.ndim != 1 or host.size < 1:
        raise ValueError(f"t: expected a 1-D sequence of times, got shape {host.shape}; try linspace(0, 10, 1001)")
    if not (np.issubdtype(host.dtype, np.integer) or np.issubdtype(host.dtype, np.floating)):
        raise TypeError(f"t: expected real numbers, got dtype {host.dtype}")
    host = host.astype(np.float64)
    if not np.all(np.isfinite(host)):
        at = int(np.argmin(np.isfinite(host)))
        raise ValueError(f"t: expected finite times, got {host[at]} at index {at}")
    steps = np.diff(host)
    wrong = np.flatnonzero(steps <= 0) if host[-1] > host[0] else np.flatnonzero(steps >= 0)
    if wrong.size:
        at = int(wrong[0])
        raise ValueError(
            f"t: expected strictly increasing or strictly decreasing times, got {host[at]} then {host[at + 1]} at "
            f"index {at}; sort it and remove repeats"
        )
    return host


def substeps_of(t: ArrayLike, options: Mapping[str, Any]) -> int:
    """How many steps of ``options["step_size"]`` lie between two times."""
    if not isinstance(options, Mapping) or options.keys() != {"step_size"}:
        got = sorted(map(str, options)) if isinstance(options, Mapping) else repr(options)
        raise ValueError(f"options: of torchdiffeq's only 'step_size' is known, got {got}; steps are those of t")
    step, widths = as_float("options: step_size", options["step_size"]), np.abs(np.diff(check_times(t)))
    if not (math.isfinite(step) and step > 0):
        raise ValueError(f"options: expected a finite step_size above 0, got {step:g}")
    count = round(float(widths.max(initial=step)) / step)
    if count < 1 or not np.allclose(widths, count * step, rtol=1e-4, atol=0):
        raise ValueError(
            f"options: expected a step_size that divides all intervals of t into equally many steps, got {step:g} for "
            f"intervals of {widths.min():g} to {widths.max():g}; let t name the steps"
        )
    return count
