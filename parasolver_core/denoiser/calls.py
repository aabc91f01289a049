"""Calling a network in batches that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import array_api_compat
import numpy as np
from numpy.typing import NDArray

from parasolver_core.arrays import Array, assign, own_copy
from parasolver_core.denoiser.contract import DenoiserFn, Rows, takes_rows
from parasolver_core.errors import note
from parasolver_core.validation import check_plain


class BatchedCall:
    """A network called in batches that fit: bounded, of few sizes, and halved for good where memory runs out.

    Args:
        denoiser: the network.
        max_rows: the most rows in one call; None: no limit. Falls when the network runs out of memory.
        buckets: the only row counts to call the network with, as far as ``max_rows`` allows: smaller batches are filled
            up by repeating their last row, so that compiled code sees few shapes. Empty: any row count.
        device: where the network wants its input; None: where the rows are.
    """

    def __init__(
        self, denoiser: DenoiserFn, max_rows: int | None = None, buckets: Sequence[int] = (), device: Any = None
    ) -> None:
        self._denoiser, self._buckets, self._device = denoiser, sorted(buckets), device
        self._takes_rows = takes_rows(denoiser)
        self.max_rows, self.calls, self.memory_ran_out = max_rows, 0, False

    def __call__(
        self,
        x: Array | list[Array],
        t: Array,
        rows: Rows | None = None,
        describe: Callable[[slice], str] | None = None,
        remake: Callable[[], list[Array]] | None = None,
    ) -> Array:
        """Predictions for rows ``x``, which stay as they are: the network may work in place and gets a copy.

        Good until the next call only.

        Args:
            x: ``(rows, *event)``, or a list of such arrays, whose rows are put together in the network's copy only.
            t: (rows,), on the network's device.
            rows: for a denoiser that takes them.
            describe: what to note on an exception of the network, given the rows.
            remake: makes ``x`` anew. The network then gets its memory, and no copy.
        """
        parts = x if isinstance(x, list) else [x]
        count, done = t.shape[0], 0
        whole: Array = None
        while done < count:
            size = self._size(count - done)
            part = slice(done, min(done + size, count))
            given, times = self._padded(parts, t, part, size, copy=remake is None)
            prediction = self._attempt(given, times, rows, part, size, describe)
            if prediction is None:  # once more, with a smaller size
                given = None  # memory
                parts = parts if remake is None else remake()
                continue
            if size == count:
                return self._back(prediction, parts[0])
            if whole is None:
                xp: Any = array_api_compat.array_namespace(parts[0])
                like = {"dtype": parts[0].dtype, "device": array_api_compat.device(parts[0])}
                whole = xp.zeros((count, *parts[0].shape[1:]), **like)
            # copied at once: the network may use its output's memory again
            whole = assign(whole, (part, ...), self._back(prediction, whole)[: part.stop - part.start, ...])
            done = part.stop
        return whole

    def _size(self, rows: int) -> int:
        """Rows of the next call, where so many are left."""
        limit = self.max_rows or max((rows, *self._buckets))
        if not self._buckets:
            return min(rows, limit)
        fitting = [size for size in self._buckets if size <= limit] or [limit]
        return next((size for size in fitting if size >= rows), fitting[-1])

    def _attempt(
        self,
        given: Array,
        times: Array,
        rows: Rows | None,
        part: slice,
        size: int,
        describe: Callable[[slice], str] | None,
    ) -> Array | None:
        """One call of the network; None if it ran out of memory, which the next one should not."""
        which = () if rows is None or not self._takes_rows else (rows[_filled_up(part, size)],)
        self.calls += 1
        try:
            prediction = self._denoiser(given, times, *which)
        except Exception as error:
            if not (out_of_memory(error) and size > 1):
                if describe is not None:
                    note(error, describe(part))
                if out_of_memory(error):
                    note(
                        error,
                        "memory ran out with a single row in the call: use a smaller window or state_device='cpu' to "
                        "keep fewer states on the device, or a smaller or half-precision network",
                    )
                raise
            # not retried here: while the exception is handled, its traceback keeps the network's arrays alive
        else:
            check_prediction(prediction, given)
            return prediction
        self.max_rows, self.memory_ran_out = size // 2, True
        return None

    def _padded(self, parts: list[Array], t: Array, part: slice, size: int, copy: bool) -> tuple[Array, Array]:
        """Some rows for the network, on its device, and their times; the last row again where too few.

        They are its own: a copy, where one is asked for.
        """
        xp: Any = array_api_compat.array_namespace(t)
        pieces, times, missing = _cut(parts, part), t[part], size - (part.stop - part.start)
        if missing:
            pieces += [pieces[-1][-1:, ...]] * missing
            times = xp.concat([times, *[times[-1:]] * missing])
        elsewhere = self._device is not None and self._device != array_api_compat.device(parts[0])
        if len(pieces) > 1:
            rows = xp.concat(pieces)
        else:
            rows = own_copy(xp, pieces[0]) if copy and not elsewhere else pieces[0]
        return (array_api_compat.to_device(rows, self._device) if elsewhere else rows), times

    def _back(self, prediction: Array, x: Array) -> Array:
        return (
            prediction if self._device is None else array_api_compat.to_device(prediction, array_api_compat.device(x))
        )


def _filled_up(part: slice, size: int) -> NDArray[np.int64]:
    """The places of ``size`` rows, the last of the part again where it has too few."""
    return np.minimum(np.arange(part.start, part.start + size), part.stop - 1)


def _cut(parts: list[Array], rows: slice) -> list[Array]:
    """Rows of several arrays, counted over all of them: views."""
    pieces, first = [], 0
    for part in parts:
        start, stop = max(rows.start - first, 0), min(rows.stop - first, part.shape[0])
        if start < stop:
            pieces.append(part[start:stop, ...])
        first += part.shape[0]
    return pieces


def check_prediction(prediction: Array, x: Array) -> None:
    """Refuse a prediction that is not like the rows ``x`` it was made for."""
    device = array_api_compat.device(x)
    same_type = type(prediction) is type(x) and getattr(prediction, "layout", None) == getattr(x, "layout", None)
    got = (tuple(prediction.shape), prediction.dtype, array_api_compat.device(prediction)) if same_type else None
    if got == (tuple(x.shape), x.dtype, device):
        return
    expected = f"{type(x).__name__} of shape {tuple(x.shape)}, dtype {x.dtype}, on {device}"
    if got is None:
        check_plain("denoiser: its prediction", prediction)
        hint = "return the prediction itself, for example unet(x, t).sample or out[0]"
        raise TypeError(f"denoiser: expected {expected}, got {type(prediction).__name__}; {hint}")
    hint = "one prediction a row, in the dtype and on the device of x"
    if got[0] == tuple(x.shape) and got[1] != x.dtype:  # most often a table of float64 times x
        hint = "cast it, or the tables that it is made with, to x.dtype"
    if got[0] != tuple(x.shape) and x.ndim == 1:
        hint = "an x_T of shape (n,) is n samples of one number each; for one sample of n numbers give x_T[None]"
    raise ValueError(
        f"denoiser: expected the prediction as {expected}, got shape {got[0]}, dtype {got[1]}, on {got[2]}; {hint}"
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, whichever library raised it."""
    if any(kind.__name__ in ("MemoryError", "OutOfMemoryError") for kind in type(error).__mro__):
        return True  # NumPy's is a MemoryError; the others are torch.OutOfMemoryError and CuPy's
    signs = ("RESOURCE_EXHAUSTED", "out of memory", "can't allocate memory")  # JAX, drivers, PyTorch on a CPU
    try:
        return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    except Exception:  # one that cannot say what it is
        return False
