"""A network of your own, as its training code calls it, as a denoiser: ``model(x, t, **conditions)``.

Example::

    denoiser = ModelDenoiser(
        unet, NoiseSchedule.linear(), "v_prediction", conditions={"encoder_hidden_states": prompts}
    )
    solution = solve(denoiser, x_T, timesteps, DDIM(denoiser.schedule), window=16)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from parasolver_adapters.arguments import remade, same
from parasolver_adapters.epsilon_models import NEEDS_ROWS, check_scale, guided
from parasolver_core import NoiseSchedule, Rows
from parasolver_core.arrays import DeviceTable, uploaded
from parasolver_core.samplers.schedules import DiscreteSchedule, FlowSchedule, KarrasSchedule, PredictionType

Convention = Literal["timestep", "unit", "sigma"]
TimeFn = Callable[[Tensor], Tensor]

_TRAIN_STEPS = 1000  # of networks for flow matching that count their time in timesteps


@dataclass(frozen=True, eq=False)
class ModelDenoiser:
    """``denoiser(x, t)`` of any ``model(x, t, **conditions)``, with the conditions given once.

    What the model predicts becomes the default of ``denoiser.schedule``: make the step rule from that, as in
    ``DDIM(denoiser.schedule)``.

    Args:
        model: a module in evaluation mode, or any function. It may return the prediction, a tuple that begins with it,
            or an object with the attribute ``sample``.
        schedule: the path that it was trained on.
        prediction_type: "epsilon", "sample" (the clean sample), "v_prediction" or "flow".

    Other arguments:
        time: what the model is given as t. None: what the schedule counts in. "timestep": 0..999 (1000 t for flow
            matching). "unit": 0..1, the timestep over the last one. "sigma": the noise level over the signal's, as in
            k-diffusion. Or a function of t, (rows,).
        conditions: keyword arguments of the model. A tensor has one condition for each sample of the batch along its
            first axis, or one for all of them; dictionaries, lists and tuples may hold tensors. Anything else is passed
            on as it is.
        null_conditions: for classifier-free guidance, what stands in place of some of them for "no condition".
        guidance_scale: w of ``null + w (given - null)``, from one call of twice as many rows.
        dtype: what the model computes in, if not in that of x.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """

    model: Callable[..., Any] = field(repr=False)
    schedule: NoiseSchedule = field(repr=False)
    prediction_type: PredictionType
    time: Convention | TimeFn | None = field(default=None, kw_only=True)
    conditions: Mapping[str, Any] = field(default_factory=dict, kw_only=True, repr=False)
    null_conditions: Mapping[str, Any] | None = field(default=None, kw_only=True, repr=False)
    guidance_scale: float | None = field(default=None, kw_only=True)
    dtype: torch.dtype | None = field(default=None, kw_only=True)
    _time: TimeFn = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not callable(self.model):
            raise TypeError(f"model: expected model(x, t, **conditions), got {type(self.model).__name__}")
        if isinstance(self.model, nn.Module) and self.model.training:
            raise ValueError("model: it is in training mode, got .training=True; call model.eval() first")
        if self.prediction_type not in get_args(PredictionType):
            known = ", ".join(map(repr, get_args(PredictionType)))
            raise ValueError(f"prediction_type: expected one of {known}, got {self.prediction_type!r}")
        self._check_kinds()
        if (self.guidance_scale is None) != (self.null_conditions is None):
            raise ValueError(
                f"guidance_scale: expected it and null_conditions together, got {self.guidance_scale} and "
                f"{'none' if self.null_conditions is None else 'some'}"
            )
        check_scale("guidance_scale", self.guidance_scale)
        unknown = [name for name in self.null_conditions or () if name not in self.conditions]
        if unknown:
            raise ValueError(f"null_conditions: expected names of conditions, got {unknown[0]!r}")
        object.__setattr__(self, "schedule", _predicting(self.schedule, self.prediction_type))
        object.__setattr__(self, "_time", _time_function(self.schedule, self.time))

    def _check_kinds(self) -> None:
        for name, value in (("conditions", self.conditions), ("null_conditions", self.null_conditions)):
            if not isinstance(value, Mapping) and (value is not None or name == "conditions"):
                raise TypeError(f"{name}: expected a dictionary of the model's arguments, got {type(value).__name__}")
        if self.dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise TypeError(f"dtype: expected one such as torch.float16, got {self.dtype!r}")

    @property
    def takes_rows(self) -> bool:
        """Whether samples have conditions of their own, so that it must know whose each row is."""
        return _of_samples(self.conditions) or _of_samples(self.null_conditions)

    def __call__(self, x: Tensor, t: Tensor, rows: Rows | None = None) -> Tensor:
        """The prediction for each row, like ``x``.

        Args:
            x: (rows, *event).
            t: (rows,), as the schedule counts.
            rows: which sample each row belongs to; not needed where conditions are for all samples.
        """
        samples = None if rows is None or not self.takes_rows else _Samples(rows, x.device)
        given = x if self.dtype is None else x.to(self.dtype)
        times = self._time(t)
        conditions = _of_rows(self.conditions, samples, len(x), "conditions")
        if self.guidance_scale is None or self.null_conditions is None:
            return prediction_of(self.model(given, times, **conditions)).to(x.dtype)
        null = conditions | _of_rows(self.null_conditions, samples, len(x), "null_conditions")
        pairs = {name: _joined(conditions[name], null[name], f"null_conditions[{name!r}]") for name in conditions}
        out = prediction_of(self.model(torch.cat([given, given]), torch.cat([times, times]), **pairs)).to(x.dtype)
        with_conditions, without = out.chunk(2)
        return guided(without, with_conditions, self.guidance_scale)


def k_diffusion_denoiser(
    model: Callable[..., Any], schedule: KarrasSchedule | None = None, **options: Any
) -> ModelDenoiser:
    """A model in the manner of k-diffusion, ``denoised = model(x, sigma, **conditions)``, with ``x = x_0 + sigma eps``.

    Args:
        model: gives the clean sample.
        schedule: its noise levels, ``NoiseSchedule.karras(sigma_min, sigma_max)``; x_T is noise times ``sigma_max``.

    Other arguments:
        options: further arguments of :class:`ModelDenoiser`, such as ``conditions`` (k-diffusion's ``extra_args``).

    Example::

        denoiser = k_diffusion_denoiser(model, NoiseSchedule.karras(0.03, 14.6))
        timesteps = denoiser.schedule.timesteps(50)
        solution = solve(denoiser, noise * 14.6, timesteps, Euler(denoiser.schedule), window=16)
    """
    schedule = NoiseSchedule.karras() if schedule is None else schedule
    if not isinstance(schedule, KarrasSchedule):
        raise TypeError(
            f"schedule: expected NoiseSchedule.karras(...), whose states are x_0 + sigma eps, got "
            f"{type(schedule).__name__}; for a network on another path use ModelDenoiser"
        )
    return ModelDenoiser(model, schedule, "sample", time="sigma", **options)


def _predicting(schedule: NoiseSchedule, prediction_type: PredictionType) -> NoiseSchedule:
    """The same path, of networks that predict something else."""
    if not isinstance(schedule, (DiscreteSchedule, KarrasSchedule, FlowSchedule)):
        raise TypeError(
            f"schedule: expected a NoiseSchedule such as NoiseSchedule.linear(), got {type(schedule).__name__}"
        )
    return replace(schedule, default_prediction_type=prediction_type)


def _time_function(schedule: NoiseSchedule, convention: Convention | TimeFn | None) -> TimeFn:
    """From the schedule's own time to the model's."""
    if callable(convention):
        return lambda t: _checked_times(convention(t), t)
    usual = {DiscreteSchedule: "timestep", KarrasSchedule: "sigma", FlowSchedule: "unit"}[type(schedule)]
    if convention is None or convention == usual:
        return lambda t: t
    if isinstance(schedule, DiscreteSchedule) and convention in ("unit", "sigma"):
        alpha, sigma = (level[:-1] for level in schedule.levels(np.arange(schedule.train_steps)))
        table = np.linspace(0.0, 1.0, schedule.train_steps) if convention == "unit" else sigma / alpha
        values = DeviceTable(table)
        return lambda t: values.like(t, torch.float32)[t]
    if isinstance(schedule, FlowSchedule) and convention == "timestep":
        return lambda t: _TRAIN_STEPS * t
    raise ValueError(
        f"time: expected None or {usual!r} for this schedule, got {convention!r}; for anything else give a function of "
        "t"
    )


def _checked_times(times: Any, t: Tensor) -> Tensor:
    if not isinstance(times, Tensor) or times.shape != t.shape:
        got = tuple(times.shape) if isinstance(times, Tensor) else type(times).__name__
        raise ValueError(f"time: expected the function to give a tensor of shape {tuple(t.shape)}, got {got}")
    return times


class _Samples:
    """Which sample each row of a call belongs to, on the host and on the devices of conditions."""

    def __init__(self, rows: Rows, device: torch.device) -> None:
        self.batch = rows.batch
        self._there = uploaded(torch, rows.samples, device)

    def on(self, device: torch.device) -> Tensor:
        return self._there.to(device)


def _of_samples(value: Any) -> bool:
    """Whether some condition has one for each sample along its first axis."""
    if isinstance(value, Mapping):
        return any(map(_of_samples, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_of_samples, value))
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) > 1


def _of_rows(value: Any, samples: _Samples | None, rows: int, name: str) -> Any:
    """Conditions of the samples as conditions of rows."""
    if isinstance(value, Mapping):
        return {key: _of_rows(entry, samples, rows, f"{name}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [_of_rows(entry, samples, rows, f"{name}[{i}]") for i, entry in enumerate(value)]
        return remade(value, parts)
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if len(value) == 1:
        return value.expand(rows, *value.shape[1:])
    if samples is None:
        if len(value) != rows:
            raise ValueError(f"{name}: got {len(value)} for {rows} rows; {NEEDS_ROWS}")
        return value
    if len(value) != samples.batch:
        raise ValueError(
            f"{name}: expected one for each of the {samples.batch} samples, or a first axis of 1, got {len(value)}"
        )
    return value[samples.on(value.device)]


def _joined(given: Any, null: Any, name: str) -> Any:
    """Conditions of the rows, with and without."""
    if isinstance(given, Mapping) and isinstance(null, Mapping):
        unknown = [key for key in null if key not in given]
        if unknown:
            raise ValueError(
                f"{name}: expected keys of the condition, {', '.join(map(repr, given))}; got {unknown[0]!r}"
            )
        return {
            key: _joined(condition, null.get(key, condition), f"{name}[{key!r}]") for key, condition in given.items()
        }
    if isinstance(given, (list, tuple)) and isinstance(null, (list, tuple)) and len(given) == len(null):
        pairs = enumerate(zip(given, null, strict=True))
        return remade(given, [_joined(condition, other, f"{name}[{i}]") for i, (condition, other) in pairs])
    if isinstance(given, Tensor) and isinstance(null, Tensor) and given.shape == null.shape and given.ndim:
        return torch.cat([given, null])
    if same(given, null):  # one value for all rows
        return given
    raise ValueError(
        f"{name}: expected a tensor shaped like the condition, got {_kind(null)} for {_kind(given)}; a single value "
        "can differ without the condition only as a tensor of shape (1,)"
    )


def _kind(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def prediction_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    prediction = output[0] if isinstance(output, tuple) and output else getattr(output, "sample", None)
    if not isinstance(prediction, Tensor):
        raise TypeError(
            f"model: expected a tensor, a tuple that begins with one or an object with .sample, got "
            f"{type(output).__name__}"
        )
    return prediction
