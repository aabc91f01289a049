"""The rows of a round as the network wants them: its dtype, device, times and scale."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import array_api_compat
import numpy as np
from numpy.typing import NDArray

from parasolver_core.arrays import Array, integers, uploaded
from parasolver_core.denoiser.calls import BatchedCall
from parasolver_core.denoiser.contract import DenoiserFn, Rows, SharedDenoiser
from parasolver_core.samplers.recurrence import Recurrence


class Evaluator:
    """A denoiser with its contract checked at every call.

    Args:
        denoiser: the user's network.
        x_T: gives dtype, device and array library of what the network sees.
        recurrence: the sampler.
        noise: the noise of each step and sample, for a denoiser that takes rows.
        max_rows: the most rows in one call; a larger round is split. None: no limit.
        buckets: see :class:`BatchedCall`.
        state_device: where the rows come from and go to; None: the network's device.
    """

    def __init__(
        self,
        denoiser: DenoiserFn,
        x_T: Array,
        recurrence: Recurrence,
        noise: Callable[[int, int], Array],
        max_rows: int | None,
        buckets: Sequence[int] = (),
        state_device: Any = None,
    ) -> None:
        if not callable(denoiser):
            raise TypeError(f"denoiser: expected a callable denoiser(x, t), got {type(denoiser).__name__}")
        self._xp = xp = array_api_compat.array_namespace(x_T)
        self._denoiser, self._dtype, self._device = denoiser, x_T.dtype, array_api_compat.device(x_T)
        self._call = BatchedCall(denoiser, max_rows, buckets, None if state_device is None else self._device)
        self._batch, self._event = int(x_T.shape[0]), tuple(x_T.shape[1:])
        self._recurrence, self._noise, timesteps = recurrence, noise, recurrence.timesteps
        integral = np.issubdtype(timesteps.dtype, np.integer)
        self._time = integers(xp) if integral else _time_dtype(xp, x_T.dtype)
        self._host_t, self._scale = timesteps, recurrence.input_scale
        self.seconds = 0.0

    @property
    def calls(self) -> int:
        """Calls of the denoiser so far."""
        return self._call.calls

    @property
    def max_rows(self) -> int | None:
        """The most rows that memory has room for, as far as is known: None if it never ran out."""
        if isinstance(self._denoiser, SharedDenoiser):
            return self._denoiser.max_rows
        return self._call.max_rows if self._call.memory_ran_out else None

    @property
    def devices(self) -> int:
        """How many processes share the rows."""
        return self._denoiser.devices if isinstance(self._denoiser, SharedDenoiser) else 1

    def turns(self, nodes: NDArray[np.int64]) -> int:
        """How many network calls, one after another, rows at these nodes take, if each fits into one."""
        return 1

    def rows(self, nodes: NDArray[np.int64]) -> int:
        """How many rows the network is given for rows at these nodes."""
        return len(nodes)

    def agree(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over the processes that share the rows."""
        return self._denoiser.agree(values) if isinstance(self._denoiser, SharedDenoiser) else list(values)

    def begin(self, plan: Callable[[], Mapping[str, str]]) -> None:
        """Before the first round: processes that share the rows compare what they were given."""
        if isinstance(self._denoiser, SharedDenoiser):
            self._denoiser.begin(plan())

    def end(self) -> None:
        """After the last round: no process has left the run."""
        if isinstance(self._denoiser, SharedDenoiser):
            self._denoiser.end()

    def __call__(
        self,
        x: Array | list[Array],
        nodes: NDArray[np.int64],
        samples: NDArray[np.int64],
        again: Callable[[], list[Array]] | None = None,
    ) -> Array:
        """Predictions for rows ``x`` ``(rows, *event)`` at ``nodes`` (rows,), of ``samples`` (rows,).

        ``x``, one array or several, stays as it is. The result is good until the next call only.

        Args:
            x, nodes, samples: the rows.
            again: makes ``x`` anew: its memory is the network's then, which may work in place. None: it is not.
        """
        given = x if isinstance(x, list) else [x]
        made = again is not None or not self._as_it_is(given)
        remake = (lambda: self._cast(again() if again else given, nodes)) if made else None
        parts, t = self._cast(given, nodes), uploaded(self._xp, self._host_t[nodes], self._device, self._time)
        started = time.perf_counter()
        try:
            rows = Rows(nodes, samples, self._recurrence, self._noise, self._batch)
            return self._call(parts, t, rows, lambda part: self._describe(nodes[part]), remake)
        finally:
            self.seconds += time.perf_counter() - started

    def _as_it_is(self, parts: list[Array]) -> bool:
        """Whether the network wants the rows as they are."""
        return self._scale is None and all(part.dtype == self._dtype for part in parts)

    def _cast(self, parts: list[Array], nodes: NDArray[np.int64]) -> list[Array]:
        """Rows as the network wants them."""
        if self._as_it_is(parts):
            return parts
        cast, first = [], 0
        for part in parts:
            with np.errstate(over="ignore", under="ignore"):  # of a guess; what comes of it is judged as a guess
                scaled = self._scaled(part, nodes[first : first + part.shape[0]])
                cast.append(self._xp.astype(scaled, self._dtype, copy=False))
            first += part.shape[0]
        return cast

    def _scaled(self, rows: Array, nodes: NDArray[np.int64]) -> Array:
        if self._scale is None:
            return rows
        scale = uploaded(self._xp, self._scale[nodes], array_api_compat.device(rows), rows.dtype)
        return rows * self._xp.reshape(scale, (-1,) + (1,) * len(self._event))

    def _describe(self, nodes: NDArray[np.int64]) -> str:
        first, last = nodes.min(), nodes.max()
        return (
            f"raised by the denoiser in call {self.calls}, given {len(nodes)} rows of event shape {self._event} at "
            f"steps {first}..{last}, timesteps {self._host_t[first]}..{self._host_t[last]}"
        )


def _time_dtype(xp: Any, dtype: Any) -> Any:
    """Continuous times keep at least float32: bfloat16 cannot tell neighbouring timesteps apart."""
    return dtype if xp.finfo(dtype).bits >= 32 else xp.float32
