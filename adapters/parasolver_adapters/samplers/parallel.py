"""The drop-in: a sampler that is a function, run unchanged over a solver that gives it what its network would say."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from parasolver_adapters.arguments import Kept, StepArguments, equal
from parasolver_adapters.given import Given
from parasolver_adapters.multi_device import MultiDeviceDenoiser
from parasolver_adapters.samplers.calls import DRAWS, SamplerCall, Stub, UnsupportedSamplerError, same_draws, time_of
from parasolver_adapters.samplers.rules import Draft, SamplerRule, path_of, read
from parasolver_adapters.stepwise import Choices, Stepwise
from parasolver_adapters.wrapping import prediction_of
from parasolver_core import Rows, Solution
from parasolver_core.denoiser.contract import DenoiserFn
from parasolver_core.samplers.implied import implied_output
from parasolver_core.samplers.schedules import NoiseSchedule, PredictionType

_OFF = 1e-4  # of a state in float32 or float64 that a sampler works out; k-diffusion's are off by 1e-5 at most
_ROUNDING = 1e-6  # of a time that a sampler works out from its tables; it was read in float64


class ParallelSampler:
    """A sampler in parallel, with its own signature and return; made by :func:`parallel`.

    Attributes:
        solution: of the last call: rounds in ``solution.stats``, the status and the error estimate. Its ``sample`` is
            the last state. None before the first call and after one that was sequential.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        choices: Choices,
        path: Callable[[float], Any],
        sigma_data: float,
        replicas: Sequence[Any],
        fallback: str,
    ) -> None:
        self._fn, self._choices, self._path, self._sigma_data = fn, choices, path, sigma_data
        self._replicas, self._fallback = tuple(replicas), fallback
        self.solution: Solution | None = None
        functools.update_wrapper(self, fn)

    def __call__(self, model: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What ``fn(model, x, *args, **kwargs)`` returns."""
        call, self.solution = SamplerCall(self._fn, args, kwargs), None
        if self._choices.sequential:
            return call.run(model, x)
        told = _Told(call.given("callback"))
        given = Given({"x": x, "args": args, "kwargs": kwargs}) if self._fallback == "sequential" else None
        try:
            return self._parallel(call, model, x, told)
        except UnsupportedSamplerError as error:
            if given is None or told.some:  # the callback would be told of steps twice
                raise
            given.restore()
            self.solution = None
            warnings.warn(f"sampled sequentially: {error}", stacklevel=2)
            return call.run(model, x)

    def _parallel(self, call: SamplerCall, model: Any, x: Tensor, told: _Told) -> Any:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        rule = read(call, model, self._path, self._sigma_data, free_end=True)
        _check_outputs_are_read(rule)
        with same_draws(x, (call.args, call.kwargs)):
            draft = Draft.of(rule, x)
        live = _Live(self._choices, rule, self._denoiser(model, draft, len(x)), draft)
        drawn = iter(draft.drawn)
        replaced: dict[str, Any] = {name: _played(drawn) for name in DRAWS if call.given(name) is not None}
        if told.callback is not None:
            replaced["callback"] = told
        with torch.no_grad():
            returned = call.run(Stub(live, model), x, **replaced)
        self.solution = live.end()
        return returned

    def _denoiser(self, model: Any, draft: Draft, batch: int) -> Any:
        try:
            arguments = StepArguments(draft.arguments, batch, "arguments of the network")
        except ValueError as error:
            raise UnsupportedSamplerError(f"sampler: {error}") from None
        rows: list[Any] = [RowDenoiser(network, arguments) for network in (model, *self._replicas)]
        return MultiDeviceDenoiser(rows) if self._replicas else rows[0]


class RowDenoiser:
    """A network called as the sampler calls it, for any rows of any steps."""

    takes_rows = True

    def __init__(self, model: Any, arguments: StepArguments) -> None:
        self._model, self._arguments = model, arguments

    def __call__(self, x: Tensor, t: Tensor, rows: Rows) -> Tensor:
        args, kwargs = self._arguments(rows, x.device)
        before = x.clone()
        output = prediction_of(self._model(x, *args, **kwargs)).to(x.dtype)
        if not equal(before, x):
            raise UnsupportedSamplerError(
                "sampler: the network writes into the state that it is given, which changes the sampler's own; let it "
                "work on a copy, such as x.clone()"
            )
        return output


class _Live:
    """The replies to a sampler's calls: the output that takes its own step to the solver's next state."""

    def __init__(self, choices: Choices, rule: SamplerRule, denoiser: DenoiserFn, draft: Draft) -> None:
        self._choices, self._rule, self._denoiser = choices, rule, denoiser
        self._arguments, self._noise, self._dtype = draft.arguments, draft.noise, draft.dtype
        self._run: Stepwise | None = None
        self._xs: list[Tensor] = []
        self._ms: list[Tensor] = []
        self._calls = 0

    def __call__(self, i: int, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        rule, table = self._rule, self._rule.table
        if self._run is None:
            self._run = self._choices.begin(self._denoiser, x.to(self._dtype), rule, rule.timesteps, self._noise)
        elif i == len(table):
            raise UnsupportedSamplerError(
                f"sampler: it calls its network more often than the {len(table)} times when it was read"
            )
        time, rounding = time_of(args, kwargs, i), _rounding(args, kwargs)
        if not math.isclose(time, rule.timesteps[i], rel_tol=rounding, abs_tol=_ROUNDING * abs(rule.timesteps[0])):
            raise UnsupportedSamplerError(
                f"sampler: call {i} is at time {time:.6g}, and was at {rule.timesteps[i]:.6g} when the sampler was "
                "read; its steps depend on more than its arguments"
            )
        if not equal(self._arguments[i], (args, kwargs)):
            raise UnsupportedSamplerError(
                f"sampler: call {i} gives the network other arguments than when the sampler was tried with outputs of "
                "zero, so they depend on what the network says (as with self-conditioning); sample sequentially"
            )
        after, self._calls = self._run.after(i + 1), i + 1
        self._check(i, x, self._run.after(i))
        memory = table.memory
        self._xs = [x.to(after.dtype, copy=True), *self._xs[: memory - 1]]
        z = None if self._noise is None else self._noise[i].to(after.dtype)
        m = implied_output(table, torch, i, after.to(x.device), self._xs, self._ms, z)
        self._ms = [m, *self._ms[: memory - 1]]
        return m.to(self._dtype, copy=True)  # states and outputs are the sampler's, which may write into them

    def end(self) -> Solution:
        """How the run ended."""
        if self._run is None or self._calls < len(self._rule.table):
            raise UnsupportedSamplerError(
                f"sampler: it called its network {self._calls} times, and {len(self._rule.table)} when it was read"
            )
        return self._run.solution

    def _check(self, i: int, x: Tensor, known: Tensor) -> None:
        """The sampler has to have come where the table came."""
        want, eps = known.to(x.device), torch.finfo(x.dtype).eps
        limit = eps**0.5 if eps > _ROUNDING else _OFF
        size = float(want.norm())
        off = float((x.to(want.dtype) - want).norm())
        lost = 10 * eps * float(self._xs[0].norm()) if self._xs else 0.0  # where a step makes the state far smaller
        if not off <= limit * size + lost:
            error = off / max(size, torch.finfo(want.dtype).tiny)
            raise UnsupportedSamplerError(
                f"sampler: step {i - 1} is off its own table by {error:.2g}; its steps depend on more than states, the "
                "network's outputs and noise. Take a sampler of fixed steps, or sample sequentially"
            )


def parallel(
    fn: Callable[..., Any],
    window: int | Literal["auto"] = 16,
    *,
    schedule: NoiseSchedule | None = None,
    prediction_type: PredictionType = "sample",
    sigma_data: float | None = None,
    replicas: Sequence[Any] = (),
    fallback: Literal["error", "sequential"] = "error",
    **options: Any,
) -> ParallelSampler:
    """A sampler ``fn(model, x, ...)`` that finds its sample in parallel; called as ``fn`` is, and returns what it does.

    The function itself runs, once: its callback is called once a step and in order, as soon as the step is final, its
    progress bar moves, and its noise is drawn as it draws it. What it asks its network is answered by the solver.

    Args:
        fn: see :func:`step_rule_from_sampler`. The network is called with many rows: tensors among its arguments that
            have one entry for each sample along their first axis, also inside dictionaries, are dealt out to them.
        window: as in :func:`parasolver_core.solve`; 1 calls ``fn`` as it is.

    Other arguments:
        schedule, prediction_type, sigma_data: as in :func:`step_rule_from_sampler`.
        replicas: the same network on other devices, which share the rows of each round.
        fallback: what to do with a sampler that is not linear, or changes while it runs: "error", or "sequential" with
            a warning, unless the callback has been told of steps by then.
        options: further arguments of :func:`parasolver_core.solve`: ``tolerance``, ``method``, ``max_rounds``,
            ``max_rows``, ``buckets``, ``state_device``, ``warmup_steps``, ``check``.

    Raises:
        UnsupportedSamplerError: when it is called; the message says at which step and why.

    Example::

        sample = parallel(sample_heun, window=16)
        x = sample(model, x, sigmas, extra_args={"cond": cond}, callback=show)
        print(sample.solution.message)
    """
    if not callable(fn):
        raise TypeError(f"fn: expected a sampler fn(model, x, ...), got {type(fn).__name__}")
    if fallback not in ("error", "sequential"):
        raise ValueError(f'fallback: expected "error" or "sequential", got {fallback!r}')
    if sigma_data is None:
        sigma_data = 0.5 if schedule is None else schedule.sigma_data
    choices = Choices.checked(window, **options)
    return ParallelSampler(fn, choices, path_of(schedule, prediction_type), sigma_data, replicas, fallback)


def _check_outputs_are_read(rule: SamplerRule) -> None:
    """Each output has to be known from the state that follows, or not to matter."""
    b = rule.table.b
    for i in range(len(b)):
        later = any(b[i + k, k] != 0 for k in range(1, b.shape[1]) if i + k < len(b))
        if b[i, 0] == 0 and later:
            raise UnsupportedSamplerError(
                f"sampler: step {i} of {rule._call.name} does not read the network's output at its own state, but a "
                "later one does; solve() with step_rule_from_sampler() takes it"
            )


def _rounding(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The same, of a time that the network is given in the dtype of the state."""
    time = next(iter([*args, *kwargs.values()]), None)
    if not isinstance(time, Tensor) or not time.is_floating_point():
        return _ROUNDING
    return max(_ROUNDING, torch.finfo(time.dtype).eps)


class _Told:
    """The callback, which may look at the run and not change it: its steps ahead are made already.

    Attributes:
        callback: the user's; None: there is none.
        some: whether it was told of a step.
    """

    def __init__(self, callback: Any) -> None:
        self.callback: Callable[..., Any] | None = callback if callable(callback) else None
        self.some = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert self.callback is not None
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        before, self.some = Kept()(tensors), True
        returned = self.callback(*args, **kwargs)
        if not equal(before, tensors):
            raise UnsupportedSamplerError(
                "callback: it writes into the tensors that it is told, which changes the steps that follow; let it "
                "work on copies, or sample sequentially"
            )
        return returned


def _played(drawn: Iterator[Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: next(drawn)
