"""A sampler that is a function as a step rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parasolver_adapters.arguments import Kept
from parasolver_adapters.bands import (
    PROBES,
    Band,
    NotLinearError,
    Path,
    Trace,
    as_rows,
    correlated_scale,
    drawn_rows,
    fit,
    fit_band,
    noise_terms,
    replay,
    tabulated,
)
from parasolver_adapters.draws import Draw, Float64, Recorder, no_noise
from parasolver_adapters.given import streams_left_alone
from parasolver_adapters.samplers.calls import DRAWS, SamplerCall, Stub, UnsupportedSamplerError, sources, time_of
from parasolver_adapters.stepwise import FixedRule
from parasolver_core.samplers.sample_form import predicted_sample_coefficients
from parasolver_core.samplers.schedules import FlowSchedule, NoiseSchedule, PredictionType

Network = Callable[[int, NDArray[np.float64], float], NDArray[np.float64]]

_LONGEST_STEP = 8  # network calls of one step, at most, that are told apart


@dataclass(frozen=True, eq=False)
class SamplerRule(FixedRule):
    """The steps of a sampler; made by :func:`step_rule_from_sampler`.

    States are what the sampler gives its network.

    Args:
        table: the recurrence on the sampler's times.
        init_noise_sigma: what the sampler multiplies its first state with; 1 for k-diffusion.
        independent_noise: whether the noise of the steps is independent. Where it is not, and where the sampler adds
            noise before its first call (``noisy_start``), seeds of the solver would sample another process: use
            :meth:`prepare`.
        noisy_start: see there.
    """

    init_noise_sigma: float
    independent_noise: bool
    noisy_start: bool
    _call: SamplerCall = field(repr=False)
    _network: Any = field(repr=False)

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``(x_T, noise)`` for :func:`~parasolver_core.solve`, with the noise that the sampler itself would draw.

        The sampler is run with a network of zeros. It draws from the global stream, or from the ``noise_sampler`` or
        generator that it was given, and moves them on as a whole run does.

        Args:
            x: the sampler's first argument after the model, ``(batch, *event)``.

        Returns:
            The first state, and ``(N, batch, *event)`` or None where no step adds noise.
        """
        return Draft.of(self, x).start(x)


@dataclass(frozen=True)
class Draft:
    """A run of a sampler on zeros in the shape, on the device and with the draws of a real run.

    Args:
        rule: of the sampler.
        inputs: what the network was given, N tensors, then what came out; empty where only the calls were wanted.
        arguments: N pairs of args and kwargs.
        dtype: of the network's last input: a sampler's tables may be wider than what it begins with.
        drawn: what a ``noise_sampler`` of the user gave, in order.
    """

    rule: SamplerRule
    inputs: list[Tensor]
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    dtype: torch.dtype
    drawn: list[Tensor]

    @classmethod
    def of(cls, rule: SamplerRule, x: Tensor) -> Draft:
        """Run the sampler once, which moves streams of random numbers on."""
        inputs: list[Tensor] = []
        arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        drawn: list[Tensor] = []
        noisy, dtypes, kept = rule.table.stochastic or rule.noisy_start, [], Kept()

        def reply(i: int, state: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            arguments.append(kept((args, kwargs)))
            dtypes.append(state.dtype)
            if noisy:
                inputs.append(state.clone())
            return torch.zeros_like(state)

        def remembered(source: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def draw(*args: Any, **kwargs: Any) -> Tensor:
                drawn.append(source(*args, **kwargs))
                return drawn[-1]

            return draw

        given = {name: rule._call.given(name) for name in DRAWS}
        replaced = {name: remembered(source) for name, source in given.items() if source is not None}
        end = rule._call.silent(Stub(reply, rule._network), torch.zeros_like(x), **replaced)
        if len(arguments) != len(rule.table):
            raise UnsupportedSamplerError(
                f"sampler: {rule._call.name} made {len(arguments)} calls of its network, and {len(rule.table)} when it "
                "was read; its steps depend on more than its arguments"
            )
        if noisy:
            last = _state_in(end, inputs[0])
            inputs.append(torch.zeros_like(inputs[0]) if last is None else last)
        return cls(rule, inputs, arguments, dtypes[-1], drawn)

    def start(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The first state for ``x``, and the noise of all steps."""
        x_T = x.to(self.dtype) * self.rule.init_noise_sigma
        return (x_T + self.inputs[0] if self.rule.noisy_start else x_T), self.noise

    @property
    def noise(self) -> Tensor | None:
        """``(N, batch, *event)``, at least float32; zero where a step adds none."""
        table = self.rule.table
        if not table.stochastic:
            return None
        dtype = torch.promote_types(self.dtype, torch.float32)
        noise = torch.zeros((len(table), *self.inputs[0].shape), dtype=dtype, device=self.inputs[0].device)
        for i, term in enumerate(noise_terms([state.to(dtype) for state in self.inputs], table.a)):
            if table.c[i] != 0:
                noise[i] = term / float(table.c[i])
        return noise


def step_rule_from_sampler(
    fn: Callable[..., Any],
    *args: Any,
    model: Any = None,
    schedule: NoiseSchedule | None = None,
    prediction_type: PredictionType = "sample",
    sigma_data: float | None = None,
    **options: Any,
) -> SamplerRule:
    """A sampler ``fn(model, x, *args, **options)`` as a step rule: read from its own run on random numbers.

    ``solve(denoiser, x * rule.init_noise_sigma, rule.timesteps, rule)`` gives what the sampler gives with the network
    ``model(x, t)``, up to noise; ``rule.prepare(x)`` gives the sampler's own noise.

    Args:
        fn: calls ``model(x, t, ...)`` one step after another and returns the last state. Steps are linear in states,
            outputs and normal noise, as all samplers of k-diffusion with fixed steps are.
        *args: what follows ``x``, for k-diffusion the noise levels ``sigmas``.

    Other arguments:
        model: the network, if ``fn`` reads its attributes; it is not called.
        schedule: relates states to clean samples, for better first guesses. None: ``x = x_0 + t eps``.
        prediction_type: what the network predicts; "sample" in k-diffusion.
        sigma_data: standard deviation of the data, for a first guess of the network's slope; by default the schedule's.
        **options: further arguments of ``fn``, such as ``s_churn=40``.

    Raises:
        UnsupportedSamplerError: the sampler is not linear, chooses its steps by what the network says, or fails; the
            message says where.

    Example::

        rule = step_rule_from_sampler(sample_heun, sigmas, s_churn=40)
        x_T, noise = rule.prepare(x)
        solution = solve(denoiser, x_T, rule.timesteps, rule, noise=noise, window=16)
    """
    if not callable(fn):
        raise TypeError(f"fn: expected a sampler fn(model, x, ...), got {type(fn).__name__}")
    path = _PathOf(schedule, prediction_type)
    if sigma_data is None:
        sigma_data = 0.5 if schedule is None else schedule.sigma_data
    return read(SamplerCall(fn, args, options), model, path, sigma_data, free_end=False)


@dataclass(frozen=True)
class _PathOf:
    """What is known of the network at each time."""

    schedule: NoiseSchedule | None
    prediction_type: PredictionType

    def __call__(self, time: float) -> tuple[float, float, float, float]:
        alpha, sigma = 1.0, abs(float(time))
        if self.schedule is not None:
            alpha, sigma = self._levels(self.schedule, float(time))
        with np.errstate(divide="ignore", invalid="ignore"):
            p, q = predicted_sample_coefficients(self.prediction_type, np.array(alpha), np.array(sigma))
        return alpha, sigma, float(p), float(q)

    @staticmethod
    def _levels(schedule: NoiseSchedule, time: float) -> tuple[float, float]:
        if isinstance(schedule, FlowSchedule) and 0 <= time <= 1:
            return 1 - time, time  # also at the clean end, where the last stage of a step may be
        alpha, sigma = schedule.levels(np.array([time]))
        return float(alpha[0]), float(sigma[0])


def path_of(schedule: NoiseSchedule | None, prediction_type: PredictionType) -> Callable[[float], Any]:
    """``(alpha, sigma, p, q)`` as a function of time."""
    return _PathOf(schedule, prediction_type)


def read(call: SamplerCall, model: Any, path: Callable[[float], Any], sigma_data: float, free_end: bool) -> SamplerRule:
    """The step rule of one call of a sampler.

    Args:
        call: of the sampler.
        model: whose attributes it may read.
        path: see :func:`path_of`.
        sigma_data: standard deviation of the data.
        free_end: whether what the sampler makes of the last output may be anything, such as a clipped picture. The
            table then ends with that output in the place of the sample.
    """
    numbers = np.random.default_rng(0)

    def clean_samples(i: int, x: NDArray[np.float64], time: float) -> NDArray[np.float64]:
        clean, (_, _, p, q) = numbers.standard_normal(x.shape), path(time)
        return (clean - p * x) / q if np.isfinite(p) and np.isfinite(q) and q != 0 else clean

    with streams_left_alone():  # some samplers seed their noise from the global stream
        run = _Run.of(call, model, clean_samples, Recorder(seed=1))
        wavy = _Run.of(call, model, lambda i, x, time: np.cos(3 * x + i) * 2, None)
        if run.times != wavy.times:
            i = next((i for i, (s, t) in enumerate(zip(run.times, wavy.times, strict=False)) if s != t), 0)
            raise UnsupportedSamplerError(
                f"sampler: {call.name} chooses its steps by what the network says: call {i} came at other times with "
                "another network. Choose a sampler of fixed steps"
            )
        if not free_end and (run.end is None or wavy.end is None):
            raise UnsupportedSamplerError(
                f"sampler: {call.name} returns something else than its last state, or a tuple that begins with it"
            )
        _check_direction(path, run.times)
        try:
            scale, noisy_start = run.first(call)
            try:
                band, independent = _band(call, model, clean_samples, run)
            except NotLinearError as error:
                if not free_end or error.step < len(run.times) - 1:
                    raise
                run, wavy = replace(run, end=None), replace(wavy, end=None)
                band, independent = _band(call, model, clean_samples, run)
            known = Path(*np.array([path(time) for time in run.times], dtype=np.float64).T)
            table = tabulated(np.array(run.times), band, known, sigma_data, stages=_stages(band))
            replay(table, zip(wavy.states, wavy.outputs, wavy.states[1:], strict=False))
        except NotLinearError as error:
            raise UnsupportedSamplerError(
                f"sampler: step {error.step} of {call.name} (time {run.times[error.step]:.6g}) {error.reason}"
            ) from None
    return SamplerRule(table, scale, independent, noisy_start, call, model)


@dataclass(frozen=True)
class _Run:
    """A run of a sampler on probes, in float64.

    Args:
        begin: what the sampler was given.
        inputs: what it gave the network, N of them.
        end: the last state, if it returned that.
        outputs: N of the network.
        times: N.
        draws: what was drawn before each call and before the end, N + 1 lists.
    """

    begin: Tensor
    inputs: list[Tensor]
    end: Tensor | None
    outputs: list[Tensor]
    times: list[float]
    draws: list[list[Tensor]]

    @classmethod
    def of(
        cls, call: SamplerCall, model: Any, network: Network, recorder: Recorder | None, start: Tensor | None = None
    ) -> _Run:
        inputs, outputs, times, draws = [], [], [], []
        take = recorder.take if recorder else list
        draw: Draw = recorder or no_noise
        begin = torch.from_numpy(np.random.default_rng(3).standard_normal(PROBES)) if start is None else start
        device = call.device  # the sampler's own tensors are there; what is read of it comes to the host

        def reply(i: int, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            if not isinstance(x, Tensor) or x.shape != begin.shape:
                got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise UnsupportedSamplerError(
                    f"sampler: {call.name} gives its network {got} in call {i}, where its state is {tuple(begin.shape)}"
                )
            draws.append(take())
            inputs.append(x.detach().double().cpu().clone())
            times.append(time_of(args, kwargs, i))
            outputs.append(torch.from_numpy(network(i, inputs[-1].numpy(), times[-1])))
            return outputs[-1].clone().to(device)

        try:
            with Float64(lambda *drawn: draw(*drawn).to(device)):
                probes = begin.clone().to(device)
                end = call.silent(Stub(reply, model), probes, **sources(probes))
        except UnsupportedSamplerError:
            raise
        except Exception as error:
            raise UnsupportedSamplerError(
                f"sampler: {call.name}'s own run fails after {len(times)} calls of the network, "
                f"{type(error).__name__}: {error}"
            ) from error
        if not times:
            raise UnsupportedSamplerError(f"sampler: {call.name} did not call its network")
        draws.append(take())
        run = cls(begin, inputs, _state_in(end, begin), outputs, times, draws)
        for i, state in enumerate(run.states):
            if not bool(torch.all(torch.isfinite(state))):
                raise UnsupportedSamplerError(
                    f"sampler: {call.name}'s own run gives NaN or infinity at step {max(i - 1, 0)}"
                )
        return run

    @property
    def states(self) -> list[Tensor]:
        """N + 1; the last output in the place of an end that is none."""
        return [*self.inputs, self.outputs[-1] if self.end is None else self.end.double().cpu()]

    @property
    def trace(self) -> Trace:
        draws = [drawn_rows(i, drawn) for i, drawn in enumerate(self.draws[1:])]
        return Trace(as_rows(self.states), as_rows(self.outputs), draws)

    def first(self, call: SamplerCall) -> tuple[float, bool]:
        """What the first state is in terms of what the sampler was given, and whether noise is added to it."""
        drawn = drawn_rows(0, self.draws[0])
        weights = fit(np.vstack([as_rows([self.begin]), drawn]), as_rows([self.states[0]])[0])
        if weights is None:
            raise UnsupportedSamplerError(
                f"sampler: the first state of {call.name} is not a multiple of what it is given, plus noise"
            )
        return float(weights[0]), bool(np.any(weights[1:]))


def _band(call: SamplerCall, model: Any, network: Network, run: _Run) -> tuple[Band, bool]:
    """The band, and whether the noise of the steps is independent.

    Where steps share draws: from a run without noise, and one of noise alone.
    """
    try:
        return fit_band(run.trace), True
    except NotLinearError:
        still = _Run.of(call, model, network, None)
        a, b, _ = fit_band((still if run.end is not None else replace(still, end=None)).trace)
    zero = torch.zeros(PROBES, dtype=torch.float64)
    noise = _Run.of(call, model, lambda i, x, time: np.zeros_like(x), Recorder(seed=1), zero)
    c = correlated_scale(as_rows((noise if run.end is not None else replace(noise, end=None)).states), a)
    return (a, b, c), not np.any(c)


def _check_direction(path: Callable[[float], Any], times: list[float]) -> None:
    """A schedule that was given has to fit the sampler's times."""
    schedule = path.schedule if isinstance(path, _PathOf) else None
    if schedule is not None and path(times[-1])[1] > path(times[0])[1]:
        raise ValueError(
            f"schedule: by it the noise grows from time {times[0]:.6g} to {times[-1]:.6g}, where a sampler goes from "
            f"noise to data. {schedule.advice}"
        )


def _stages(band: Band) -> int:
    """How many network calls make a step: the period with which the table's pattern repeats, ends left out."""
    pattern = np.concatenate([band[0] != 0, band[1] != 0, (band[2] != 0)[:, None]], axis=1)
    inner = pattern[_LONGEST_STEP : -_LONGEST_STEP // 2] if len(pattern) > 3 * _LONGEST_STEP else pattern[2:-1]
    for period in range(1, min(_LONGEST_STEP, len(inner) // 2) + 1):
        if np.array_equal(inner[period:], inner[:-period]):
            return period
    return 1


def _state_in(returned: Any, like: Tensor) -> Tensor | None:
    """The last state among what a sampler returns, if it returns that."""
    end = returned[0] if isinstance(returned, tuple) and returned else returned
    return end.detach() if isinstance(end, Tensor) and end.shape == like.shape else None
