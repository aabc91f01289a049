"""Calling the user's field at many times at once: in what shape it takes them, checked against single calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import array_api_compat
import numpy as np

from parasolver_adapters.vector_field.grid import Grid
from parasolver_core.arrays import Array, copied, detach, is_array, no_grad, to_host

Batching = Literal["auto", "column", "trailing", "merged", "rows", "vmap", "loop"]
Signature = Literal["ty", "yt"]
_ROW_COST = 1 / 500  # of a call, for states up to so many elements; measured for larger ones
_SMALL = 256
_TRIALS = 4
_SPREAD = 0.01
_SAME = 1e-6  # of the largest change
_ROUNDING = 4  # of the largest value: what the same row may differ by in two calls of the same shape
_FEW_PROBE_ROWS = (3,)
_PROBE_ROWS = (5, 7, 11, 13, 17, 19, 23)  # a number that is no axis of the state, so that axes cannot be mistaken


class Field:
    """The user's field as ``field(t, y)`` with t (rows,) and y ``(rows, *state)``; counts what it is asked for.

    Args:
        f: ``f(t, y)``, written for one time: t without axes, y of the shape of ``y0``.
        y0: gives shape, dtype, device and array library.
        signature: the order of f's arguments.
        batching: how f takes many times at once.

            * ``"column"``: y ``(rows, *state)``, t ``(rows, 1, ..., 1)``.
            * ``"trailing"``: y ``(*state, rows)``, t ``(rows,)``; fields that take the state apart as ``y[0], y[1]``.
            * ``"merged"``: y ``(rows * batch, *rest)``, t ``(rows * batch, 1, ..., 1)``; networks for batches.
            * ``"rows"``: y ``(rows, *state)``, t ``(rows,)``; also single calls are then made so.
            * ``"vmap"``: ``torch.func.vmap``, for fields that none of the above fits.
            * ``"loop"``: not at all, one call after another.
            * ``"auto"``: the first of these that agrees with single calls (:meth:`probe`).
    """

    def __init__(self, f: Callable[..., Any], y0: Array, signature: Signature, batching: Batching) -> None:
        if not callable(f):
            raise TypeError(f"f: expected a function f(t, y), got {type(f).__name__}")
        if signature not in get_args(Signature):
            raise ValueError(f'signature: expected "ty" for f(t, y) or "yt" for f(y, t), got {signature!r}')
        if batching not in get_args(Batching):
            raise ValueError(f"batching: expected one of {', '.join(get_args(Batching))}, got {batching!r}")
        self.xp: Any = array_api_compat.array_namespace(y0)
        self._torch, self._numpy = array_api_compat.is_torch_array(y0), array_api_compat.is_numpy_array(y0)
        if batching == "vmap" and not self._torch:
            raise ValueError('batching: "vmap" is for torch; use another, or "auto"')
        if batching == "merged" and y0.ndim < 2:
            raise ValueError(f'batching: "merged" needs a state (batch, *rest), got shape {tuple(y0.shape)}')
        self.shape = tuple(y0.shape)
        self._type, self._dtype = _array_type(y0), y0.dtype
        self._f = _with_own_memory(f if signature == "ty" else lambda t, y: f(y, t))
        self.batching: Batching = batching
        self._vmapped: Any = None
        self.calls = 0
        self.evaluations = 0
        self.row_cost = _ROW_COST

    @property
    def spent(self) -> float:
        """Everything asked for so far, in calls of one row."""
        return self.cost(self.calls, self.evaluations)

    def cost(self, calls: int, rows: int) -> float:
        """What calls of so many rows altogether cost, in calls without rows."""
        return calls + rows * self.row_cost

    @property
    def parallel(self) -> bool:
        """Whether many times can be evaluated in one call."""
        return self.batching != "loop"

    def __call__(self, t: Array, y: Array) -> Array:
        """The field at each row, ``(rows, *state)``; every row counts as one evaluation."""
        self.calls += 1
        self.evaluations += (rows := y.shape[0])
        if rows == 1 and self.batching != "rows":
            return self._checked(self._f(t[0], y[0, ...]), self.shape)[None, ...]
        return self._batched(self.batching, t, y)

    def probe(self, grid: Grid, y0: Array, few: bool) -> str:
        """Settle how f takes many times at once; why it does not where it does not.

        Args:
            grid: of the steps.
            y0: where they begin.
            few: with as few calls as can be, and without timing them.

        Raises:
            ValueError: f does not take them as declared.
        """
        sizes = (_FEW_PROBE_ROWS if few else ()) + _PROBE_ROWS
        xp, rows = self.xp, next(n for n in sizes if n not in self.shape)
        with no_grad(xp), np.errstate(all="ignore"):
            nodes = np.linspace(0, len(grid), rows).astype(int)  # times of the grid; states inside the first step
            t = grid.asarray(grid.t[nodes])
            y0 = detach(y0)
            first = self._single(t[:1], y0[None, ...])[0, ...]
            noise = np.random.default_rng(0).uniform(-1, 1, (rows, *self.shape))
            noise[0] = 0  # that is y0, where the field is known by now
            y = xp.stack([y0 + first * float(grid.h[0] * k / (rows - 1)) for k in range(rows)])
            y = y * grid.asarray(1 + _SPREAD * noise)  # so that rows that act on each other are noticed
            others = [self._single(t[k : k + 1], y[k : k + 1, ...]) for k in range(1, rows)]
            singles = xp.concat([first[None, ...], *others], axis=0)
            self.calls += rows
            self.evaluations += rows
            reasons = []
            for name in self._candidates():
                if (reason := self._disagreement(name, t, y, singles)) == "":
                    self.batching = name
                    if not few:
                        self._measure(t, y)
                    return ""
                reasons.append(f"{name}: {reason}")
        if self.batching != "auto":
            raise ValueError(
                f"f: called with {rows} times at once as batching={self.batching!r} it does not give what single calls "
                f"give ({reasons[0]}). Each row must depend on its own time and state only, and the same row must "
                "always give the same; batching='auto' looks for a way that fits"
            )
        self.batching = "loop"
        return "; ".join(reasons)

    def independent_axes(self, grid: Grid, y0: Array) -> int:
        """How many leading axes of the state count samples that do not act on each other, as far as a few trials show.

        What a trial misses costs rounds and never accuracy, since corrections go on until all defects vanish.
        """
        xp, ndim = self.xp, len(self.shape)
        y0, generator = detach(y0), np.random.default_rng(0)
        scale = float(xp.max(xp.abs(y0))) or 1.0
        with no_grad(xp), np.errstate(all="ignore"):
            t = grid.asarray(np.full(_TRIALS + 1, grid.t[0]))
            for axes in range(ndim, 0, -1):
                moved = np.zeros((_TRIALS + 1, int(np.prod(self.shape[:axes]))))
                for k in range(1, _TRIALS, 2):  # half of the samples, then the others
                    moved[k, generator.permutation(moved.shape[1])[: (moved.shape[1] + 1) // 2]] = 1
                    moved[k + 1] = 1 - moved[k]
                moved = moved.reshape(-1, *self.shape[:axes], *(1,) * (ndim - axes))
                f = to_host(self(t, y0[None, ...] + grid.asarray(moved * (0.01 * scale) * np.ones(self.shape))))
                change = np.where(moved[1:] == 0, np.abs(f[1:] - f[:1]), 0.0)
                if np.max(change) <= _SAME * np.max(np.abs(f[1:] - f[:1]), initial=1e-30):
                    return axes
        return 0

    def _measure(self, t: Array, y: Array) -> None:
        """What one more row costs, in calls; from the times of calls with one row and with several."""
        rows = y.shape[0]
        if np.prod(self.shape) <= _SMALL:
            return
        single, several = (min(self._seconds(t[:n], y[:n, ...]) for _ in range(3)) for n in (1, rows))
        share = min(max((several / single - 1) / (rows - 1), 0.0), 0.99)  # of a call with one row that the row costs
        self.row_cost = share / (1 - share)

    def _seconds(self, t: Array, y: Array) -> float:
        started = time.perf_counter()
        to_host(self(t, y)[:1, ...])  # waits for the device
        return time.perf_counter() - started

    def _candidates(self) -> tuple[Batching, ...]:
        if self.batching != "auto":
            return (self.batching,)
        merged: tuple[Batching, ...] = ("merged",) if len(self.shape) > 1 else ()
        vmap: tuple[Batching, ...] = ("vmap",) if self._torch else ()
        return ("column", *merged, "trailing", *vmap)

    def _single(self, t: Array, y: Array) -> Array:
        if self.batching == "rows":
            return self._batched("rows", t, y)
        return self._checked(self._f(t[0], y[0, ...]), self.shape)[None, ...]

    def _disagreement(self, name: Batching, t: Array, y: Array, singles: Array) -> str:
        """Why the rows of one batched call are not those of single calls; empty if they are."""
        self.calls += 1
        self.evaluations += y.shape[0]
        try:
            batched = self._batched(name, t, y)
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        a, b = to_host(batched), to_host(singles)
        scale, eps = np.max(np.abs(b), initial=0.0), float(self.xp.finfo(self._dtype).eps)
        scale = scale if np.isfinite(scale) else 1.0
        if not np.allclose(a, b, rtol=0, atol=float(np.sqrt(eps)) * scale, equal_nan=True):
            return f"differs from single calls by up to {np.max(np.abs(a - b)):.2g}"
        # Another shape rounds otherwise, which may hide what other rows do to a row; the same shape hides nothing.
        xp, rows, k = self.xp, y.shape[0], y.shape[0] // 2
        self.calls += 1
        self.evaluations += rows
        same = self._batched(name, xp.stack([t[k]] * rows), xp.stack([y[k, ...]] * rows))
        change = np.abs(to_host(same)[k] - a[k])
        return f"rows change each other by {np.max(change):.2g}" if np.any(change > _ROUNDING * eps * scale) else ""

    def _batched(self, name: Batching, t: Array, y: Array) -> Array:
        xp, rows, ndim = self.xp, y.shape[0], len(self.shape)
        if name == "column":
            return self._checked(self._f(xp.reshape(t, (rows, *(1,) * ndim)), y), (rows, *self.shape))
        if name == "rows":
            return self._checked(self._f(t, y), (rows, *self.shape))
        if name == "trailing":
            back = self._checked(self._f(t, xp.moveaxis(y, 0, -1)), (*self.shape, rows))
            return xp.moveaxis(back, -1, 0)
        if name == "merged":
            batch, rest = self.shape[0], self.shape[1:]
            each = xp.broadcast_to(xp.reshape(t, (rows, 1)), (rows, batch))
            merged = (rows * batch, *rest)
            out = self._f(xp.reshape(each, (rows * batch, *(1,) * len(rest))), xp.reshape(y, merged))
            return xp.reshape(self._checked(out, merged), (rows, *self.shape))
        if name == "vmap":
            if self._vmapped is None:
                from torch.func import vmap

                self._vmapped = vmap(self._f)
            return self._checked(self._vmapped(t, y), (rows, *self.shape))
        each_row = [self._checked(self._f(t[k], y[k, ...]), self.shape) for k in range(rows)]
        return xp.stack(each_row)

    def _checked(self, out: Any, shape: tuple[int, ...]) -> Array:
        if isinstance(out, (list, tuple)) and self._numpy:  # as SciPy's fields may
            out = np.asarray(out, dtype=cast(Any, self._dtype))
        elif self._numpy and np.isscalar(out):
            out = np.asarray(out)
        if not isinstance(out, self._type):
            raise TypeError(f"f: expected {self._type.__name__} of shape {shape}, got {type(out).__name__}")
        out = cast(Any, out)
        if tuple(out.shape) != shape or out.dtype != self._dtype:
            raise ValueError(
                f"f: expected the derivative as shape {shape}, dtype {self._dtype}, got shape {tuple(out.shape)}, "
                f"dtype {out.dtype}; return one derivative for each element of the state, in the state's dtype"
            )
        return out


def _with_own_memory(f: Callable[..., Any]) -> Callable[[Array, Array], Any]:
    """f, which may then work in place on what it is given and write all that it returns into the same array."""
    return lambda t, y: own_memory(f(own_memory(t), own_memory(y)))


def own_memory(values: Any) -> Any:
    """A copy of an array, with its history of gradients; what is no array as it is."""
    if array_api_compat.is_torch_array(values):
        return values.clone()
    if isinstance(values, np.ndarray):
        return np.array(values)
    if is_array(values):
        return copied(array_api_compat.array_namespace(values), values)
    return values


def _array_type(y0: Array) -> type:
    """What the field gives; ``y0`` itself may be a parameter of a torch module or a NumPy number."""
    if array_api_compat.is_torch_array(y0):
        import torch

        return torch.Tensor
    return np.ndarray if array_api_compat.is_numpy_array(y0) else type(y0)
