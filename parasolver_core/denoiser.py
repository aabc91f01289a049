"""Calling the user's network: in batches that fit into memory, checked, and with the seconds counted."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import array_api_compat
import numpy as np
from numpy.typing import NDArray

from parasolver_core.arrays import Array, assign, own_copy, take_rows
from parasolver_core.errors import note
from parasolver_core.recurrence import Recurrence, predicted_sample_coefficients
from parasolver_core.schedules import NoiseSchedule, check_prediction_type
from parasolver_core.step_rules import StepRule


class DenoiserFn(Protocol):
    """``denoiser(x, t) -> prediction``, the network in the form in which the solver calls it.

    ``x`` is ``(rows, *event)``, where the rows are the time steps and samples of one round in any number: sample by
    sample, and of each sample as many as it has nodes in the round, which need not be the same number for all.
    ``t`` is (rows,), each row's own timestep, integers or floats as the timesteps were given. The prediction has the
    shape, dtype and device of ``x``. Each row must depend on that row alone, and the same row must always give the
    same prediction (evaluation mode, no dropout).

    A denoiser whose attribute ``takes_rows`` is ``True`` is called ``denoiser(x, t, rows)`` with :class:`Rows`, which
    tell the samples of the batch apart: each may have its own class label or prompt. One with the attribute
    ``prediction_type`` is refused where the step rule reads another.
    """

    def __call__(self, x: Array, t: Array, /) -> Array: ...


@dataclass(frozen=True)
class Rows:
    """Which step of which sample each row of a call is.

    Args:
        steps: (rows,), on the host: indices into the recurrence's timesteps.
        samples: (rows,), on the host: places in the batch.
        recurrence: the sampler.
        noise: ``noise(step, sample)``, ``(*event)``, the standard normal ``z`` that the step adds to the sample.
    """

    steps: NDArray[np.int64]
    samples: NDArray[np.int64]
    recurrence: Recurrence
    noise: Callable[[int, int], Array]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, part: slice | NDArray[np.int64]) -> Rows:
        return replace(self, steps=self.steps[part], samples=self.samples[part])


def takes_rows(denoiser: Any) -> bool:
    """Whether a denoiser is called ``denoiser(x, t, rows)``; those that wrap another pass it on."""
    return getattr(denoiser, "takes_rows", False) is True


def predicted_by(denoiser: Any) -> str | None:
    """What a denoiser says that it predicts, by its attribute ``prediction_type``; those that wrap one pass it on."""
    told = getattr(denoiser, "prediction_type", None)
    return told if isinstance(told, str) else None


def check_agreement(denoiser: Any, step_rule: StepRule) -> None:
    """Refuse a denoiser that predicts something else than the step rule reads, where both say what."""
    given, read = predicted_by(denoiser), step_rule.predicts
    if given is not None and read is not None and given != read:
        raise ValueError(
            f"step_rule: it reads the network's output as {read!r}, and the denoiser predicts {given!r}; give the rule "
            f"prediction_type={given!r}, or make it from denoiser.schedule where there is one"
        )


class SharedDenoiser(ABC):
    """A denoiser whose rows several processes share, each of which runs the same solver on the same arguments."""

    @abstractmethod
    def __call__(self, x: Array, t: Array, rows: Rows | None = None, /) -> Array:
        """The prediction for all rows, the same in every process."""

    @property
    @abstractmethod
    def devices(self) -> int:
        """How many processes share the rows."""

    @property
    @abstractmethod
    def max_rows(self) -> int | None:
        """The most rows that this process evaluates in one call, if memory ran out in a larger one; else None."""

    @abstractmethod
    def begin(self, plan: Mapping[str, str]) -> None:
        """Called before the first round with what every process must have been given alike; raises if it was not."""

    @abstractmethod
    def agree(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over the processes, so that all of them decide alike."""

    def end(self, error: BaseException | None = None) -> None:  # noqa: B027
        """Called after the last round, or with the exception that ended the run here: other processes are told.

        Raises if another process has left the run, unless this one leaves it too.
        """


class Telling:
    """Within its ``with`` block, an exception that ends the run is told to the processes that share the rows.

    No generator: that would set attributes of the exception, which it may refuse.
    """

    def __init__(self, denoiser: Any) -> None:
        self._denoiser = denoiser

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and isinstance(self._denoiser, SharedDenoiser):
            self._denoiser.end(error)


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
    ) -> Array:
        """Predictions for rows ``x``, which stay as they are: the network may work in place and gets a copy.

        Good until the next call only.

        Args:
            x: ``(rows, *event)``, or a list of such arrays, whose rows are put together in the network's copy only.
            t: (rows,), on the network's device.
            rows: for a denoiser that takes them.
            describe: what to note on an exception of the network, given the rows.
        """
        parts = x if isinstance(x, list) else [x]
        count, done = t.shape[0], 0
        whole: Array = None
        while done < count:
            size = self._size(count - done)
            part = slice(done, min(done + size, count))
            prediction = self._attempt(parts, t, rows, part, size, describe)
            if prediction is None:
                continue  # with a smaller size
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
        limit = self.max_rows or max(rows, *self._buckets, 1)
        if not self._buckets:
            return min(rows, limit)
        fitting = [size for size in self._buckets if size <= limit] or [limit]
        return next((size for size in fitting if size >= rows), fitting[-1])

    def _attempt(
        self,
        parts: list[Array],
        t: Array,
        rows: Rows | None,
        part: slice,
        size: int,
        describe: Callable[[slice], str] | None,
    ) -> Array | None:
        """One call of the network; None if it ran out of memory, which the next one should not."""
        given, times = self._padded(parts, t, part, size)
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

    def _padded(self, parts: list[Array], t: Array, part: slice, size: int) -> tuple[Array, Array]:
        """The network's own copy of some rows, on its device, and their times; the last row again where too few."""
        xp: Any = array_api_compat.array_namespace(t)
        pieces, times, missing = _cut(parts, part), t[part], size - (part.stop - part.start)
        if missing:
            pieces += [pieces[-1][-1:, ...]] * missing
            times = xp.concat([times, *[times[-1:]] * missing])
        elsewhere = self._device is not None and self._device != array_api_compat.device(parts[0])
        rows = xp.concat(pieces) if len(pieces) > 1 else pieces[0] if elsewhere else own_copy(xp, pieces[0])
        return (array_api_compat.to_device(rows, self._device) if elsewhere else rows), times

    def _back(self, prediction: Array, x: Array) -> Array:
        return (
            prediction if self._device is None else array_api_compat.to_device(prediction, array_api_compat.device(x))
        )


def _filled_up(part: slice, size: int) -> NDArray[np.int64]:
    """The places of ``size`` rows, the last of the part again where it has too few."""
    return np.minimum(np.arange(part.start, part.start + size), part.stop - 1)


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
        self._event = tuple(x_T.shape[1:])
        self._recurrence, self._noise, timesteps = recurrence, noise, recurrence.timesteps
        integral = np.issubdtype(timesteps.dtype, np.integer)
        self._t = xp.asarray(timesteps, dtype=xp.int64 if integral else _time_dtype(xp, x_T.dtype), device=self._device)
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

    def __call__(self, x: Array | list[Array], nodes: NDArray[np.int64], samples: NDArray[np.int64]) -> Array:
        """Predictions for rows ``x`` ``(rows, *event)`` at ``nodes`` (rows,), of ``samples`` (rows,).

        ``x``, one array or several, stays as it is. The result is good until the next call only.
        """
        xp, parts, first = self._xp, [], 0
        for part in x if isinstance(x, list) else [x]:
            own = nodes[first : first + part.shape[0]]
            with np.errstate(over="ignore"):  # a guess in half precision; what comes of it is judged as a guess
                parts.append(xp.astype(self._scaled(part, own), self._dtype, copy=False))
            first += len(own)
        t = take_rows(self._t, nodes)
        started = time.perf_counter()
        try:
            rows = Rows(nodes, samples, self._recurrence, self._noise)
            return self._call(parts, t, rows, lambda part: self._describe(nodes[part]))
        finally:
            self.seconds += time.perf_counter() - started

    def _scaled(self, rows: Array, nodes: NDArray[np.int64]) -> Array:
        if self._scale is None:
            return rows
        scale = self._xp.asarray(self._scale[nodes], dtype=rows.dtype, device=array_api_compat.device(rows))
        return rows * self._xp.reshape(scale, (-1,) + (1,) * len(self._event))

    def _describe(self, nodes: NDArray[np.int64]) -> str:
        first, last = nodes.min(), nodes.max()
        return (
            f"raised by the denoiser in call {self.calls}, given {len(nodes)} rows of event shape {self._event} at "
            f"steps {first}..{last}, timesteps {self._host_t[first]}..{self._host_t[last]}"
        )


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
    same_type = type(prediction) is type(x)
    got = (tuple(prediction.shape), prediction.dtype, array_api_compat.device(prediction)) if same_type else None
    if got == (tuple(x.shape), x.dtype, device):
        return
    expected = f"{type(x).__name__} of shape {tuple(x.shape)}, dtype {x.dtype}, on {device}"
    if got is None:
        hint = "return the prediction itself, for example unet(x, t).sample or out[0]"
        raise TypeError(f"denoiser: expected {expected}, got {type(prediction).__name__}; {hint}")
    hint = "one prediction a row, in the dtype and on the device of x"
    if got[0] != tuple(x.shape) and x.ndim == 1:
        hint = "an x_T of shape (n,) is n samples of one number each; for one sample of n numbers give x_T[None]"
    raise ValueError(
        f"denoiser: expected the prediction as {expected}, got shape {got[0]}, dtype {got[1]}, on {got[2]}; {hint}"
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, whichever library raised it."""
    if any(kind.__name__ in ("MemoryError", "OutOfMemoryError") for kind in type(error).__mro__):
        return True  # NumPy's is a MemoryError; the others are torch.OutOfMemoryError and CuPy's
    told = ("RESOURCE_EXHAUSTED", "out of memory", "can't allocate memory")  # JAX, drivers, PyTorch on a CPU
    try:
        return isinstance(error, RuntimeError) and any(one in str(error) for one in told)
    except Exception:  # one that cannot say what it is
        return False


@dataclass(frozen=True)
class ClippedDenoiser:
    """A denoiser whose predicted clean sample is clipped to ``[-clip_range, clip_range]``; see :func:`clip_sample`."""

    denoiser: DenoiserFn
    schedule: NoiseSchedule
    prediction_type: str
    clip_range: float = 1.0

    def __post_init__(self) -> None:
        check_prediction_type("prediction_type", self.prediction_type)
        inner = predicted_by(self.denoiser)
        if inner is not None and inner != self.prediction_type:
            raise ValueError(
                f"prediction_type: the denoiser predicts {inner!r}, got {self.prediction_type!r}, of which the clean "
                "sample is another one"
            )

    @property
    def takes_rows(self) -> bool:
        return takes_rows(self.denoiser)

    def __call__(self, x: Array, t: Array, /, *rows: Rows) -> Array:
        xp = array_api_compat.array_namespace(x)
        host_t = np.asarray(array_api_compat.to_device(t, "cpu"))
        alpha, sigma = (level[:-1] for level in self.schedule.levels(host_t))
        p, q = (
            xp.reshape(xp.asarray(c, dtype=x.dtype, device=array_api_compat.device(x)), (-1,) + (1,) * (x.ndim - 1))
            for c in predicted_sample_coefficients(self.prediction_type, alpha, sigma)
        )
        sample = xp.clip(p * x + q * self.denoiser(x, t, *rows), -self.clip_range, self.clip_range)
        return (sample - p * x) / q


def clip_sample(
    denoiser: DenoiserFn,
    schedule: NoiseSchedule,
    prediction_type: str | None = None,
    clip_range: float = 1.0,
) -> DenoiserFn:
    """Clip the predicted clean sample, as pixel-space models do; the result predicts what ``denoiser`` predicts.

    Clipping is not linear, so it belongs to the network and not to the step rule. The noise direction is derived
    from the clipped sample, as DDPM and DPM-Solver++ do and as diffusers' DDIM does with
    ``use_clipped_model_output=True``.

    Args:
        denoiser: the network.
        schedule: the path that relates its prediction to the clean sample.
        prediction_type: what it predicts; None: what it says itself (its attribute ``prediction_type``), or else the
            schedule's default.
        clip_range: the largest absolute value kept, in the units of the data.
    """
    if not clip_range > 0:
        raise ValueError(f"clip_range: expected a number > 0, got {clip_range}")
    kind = prediction_type or predicted_by(denoiser) or schedule.default_prediction_type
    return ClippedDenoiser(denoiser, schedule, kind, clip_range)


def _time_dtype(xp: Any, dtype: Any) -> Any:
    """Continuous times keep at least float32: bfloat16 cannot tell neighbouring timesteps apart."""
    return dtype if xp.finfo(dtype).bits >= 32 else xp.float32
