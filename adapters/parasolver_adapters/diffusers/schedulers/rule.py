"""A diffusers scheduler as a step rule."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from parasolver_adapters.bands import noise_terms
from parasolver_adapters.diffusers.schedulers.clipping import Clip, ClippingDenoiser, clip_of, clips, switch_off
from parasolver_adapters.diffusers.schedulers.probing import check_replay, tabulate
from parasolver_adapters.diffusers.schedulers.stepping import (
    ENDS_WITH_ZERO,
    SPECIAL_ARGUMENTS,
    Loop,
    UnsupportedSchedulerError,
)
from parasolver_adapters.draws import Listener
from parasolver_adapters.given import streams_left_alone
from parasolver_adapters.stepwise import FixedRule
from parasolver_core.denoiser.contract import DenoiserFn
from parasolver_core.samplers.schedules import PredictionType

__all__ = ["SchedulerRule", "UnsupportedSchedulerError", "step_rule_from_scheduler"]

GIVEN_BY_THE_LOOP = {"model_output", "timestep", "sample", "generator", "return_dict"}
_TOKENS = "samples discrete tokens, which follow no linear recurrence"
UNSUPPORTED = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "VQDiffusionScheduler": _TOKENS,
    "HeliosDMDScheduler": "steps with tensors that its pipeline makes on the way (dmd_noisy_tensor, dmd_sigmas)",
    "PiflowScheduler": "integrates a policy that the network predicts, which is not linear in the network's output",
    "ScoreSdeVeScheduler": "has no step(model_output, timestep, sample), and its corrector is not linear",
}


@dataclass(frozen=True, eq=False)
class SchedulerRule(FixedRule):
    """The steps of a diffusers scheduler; made by :func:`step_rule_from_scheduler`.

    States are the scheduler's own ``sample``; what ``scale_model_input`` does is part of the rule, so the
    denoiser is the bare network.

    Args:
        table: the recurrence on the scheduler's timesteps.
        init_noise_sigma: what the scheduler wants standard normal noise to be multiplied with.
        independent_noise: whether the noise of the steps is independent. Where it is not, seeds of the solver
            would sample another process: give ``noise=rule.noise(...)``.
        clip: how the predicted clean sample is clipped, if it is; see :meth:`wrap_denoiser`.
    """

    init_noise_sigma: float
    independent_noise: bool
    clip: Clip | None = field(repr=False)
    loop: Loop = field(repr=False)

    @property
    def predicts(self) -> str | None:
        """What the scheduler is configured to be given, if that is one of the names of ``prediction_type``."""
        configured = self.loop.scheduler.config.get("prediction_type")
        configured = {"flow_prediction": "flow"}.get(configured, configured)
        return configured if configured in get_args(PredictionType) else None

    @property
    def band(self) -> tuple[int, int]:
        """How many states and how many network outputs a step reads."""
        return self.table.a.shape[1], self.table.b.shape[1]

    def noise(
        self,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """The noise that the scheduler's own loop would draw from ``generator``, for ``solve(..., noise=...)``.

        The scheduler is run with a network of zeros, and what it adds to the states is divided by the scale of the
        noise, so draws that it skips, repeats or mixes are as in its loop.

        Args:
            generator: as a pipeline has it after drawing the first latents, or one for each sample; it is advanced.
                None for the global stream of the device.
            shape: ``(batch, *event)``, of the sample.
            dtype: of the sample in the run that is reproduced.
            device: of the sample in that run, as pipelines without a generator draw on it. None: the generator's, or
                without one the default device.

        Returns:
            ``(N, batch, *event)`` on the device, at least float32, zero where a step adds none.

        Raises:
            ValueError: the scheduler draws from the global stream, whatever generator it is given.
        """
        given = list(generator) if isinstance(generator, Sequence) else generator
        first = given[0] if isinstance(given, list) else given
        if device is None:
            device = torch.get_default_device() if first is None else first.device
        zero = torch.zeros(tuple(shape), dtype=dtype, device=device)
        listener, stream = Listener(), torch.get_rng_state()
        with torch.device("cpu"):  # where the scheduler's tables are
            for _ in self.loop.run(lambda node: zero, zero, listener, given):  # in the dtype and order of the real run
                pass
        is_global = any(one is torch.default_generator for one in (given if isinstance(given, list) else [given]))
        moved = not is_global and not torch.equal(stream, torch.get_rng_state())
        if generator is not None and (listener.global_stream or moved):
            raise ValueError(
                f"generator: {self.loop.name} ignores it and draws from the global stream; pass None and call "
                "torch.manual_seed before"
            )
        kept = torch.promote_types(dtype, torch.float32)  # the solver's sums have at least that
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # as not every device has float64
            states = [torch.zeros(tuple(shape), dtype=torch.float64)]
            run = self.loop.run(lambda node: states[0], states[0], listener.playback(), given)
            states.extend(output.prev_sample for _, _, output in run)
            noise = torch.zeros((len(self.timesteps), *shape), dtype=kept)
        for i, term in enumerate(noise_terms(states, self.table.a)):
            if self.table.c[i] != 0:
                noise[i] = term / float(self.table.c[i])
        return noise.to(zero.device)

    def wrap_denoiser(self, denoiser: DenoiserFn) -> DenoiserFn:
        """The denoiser that this rule expects: with the clipping of the scheduler, if it has any, done inside."""
        return denoiser if self.clip is None else ClippingDenoiser(denoiser, self.clip)


def step_rule_from_scheduler(
    scheduler: SchedulerMixin,
    num_inference_steps: int | None = None,
    *,
    begin_index: int = 0,
    clipping: Literal["refuse", "denoiser"] = "refuse",
    sigma_data: float | None = None,
    **step_options: Any,
) -> SchedulerRule:
    """The scheduler, as configured, as a step rule: read from its own ``step``, which is run on random numbers.

    ``solve(denoiser, x_T * rule.init_noise_sigma, rule.timesteps, rule)`` gives what the scheduler's sequential loop
    gives with the network ``model(scheduler.scale_model_input(x, t), t)``.

    Args:
        scheduler: of diffusers; a copy is used, the object itself is not changed.
        num_inference_steps: given to ``set_timesteps``. None: its timesteps are set already, for example by
            ``scheduler.set_timesteps(sigmas=..., mu=...)``.

    Other arguments:
        begin_index: how many of the first timesteps to leave out, as image-to-image pipelines do.
        clipping: what to do if the scheduler clips the predicted clean sample (``clip_sample``, ``thresholding``,
            ``clip_denoised``), which is not linear. "denoiser": the clipping moves into the denoiser, which you wrap
            with ``rule.wrap_denoiser(denoiser)``. "refuse": an error, so that it is not forgotten.
        sigma_data: standard deviation of the data, for a first guess of the network's slope. None: what the scheduler
            says, or 1 for flow matching and 0.5 otherwise.
        **step_options: further arguments of ``scheduler.step``, for example ``eta=1.0``.

    Raises:
        UnsupportedSchedulerError: the scheduler is not linear as configured, or fails in its own loop; the message
            says why, and what to change where something can be.
        TypeError, ValueError: an argument is not as described here.

    Example::

        rule = step_rule_from_scheduler(pipe.scheduler, 50)
        solution = solve(denoiser, x_T * rule.init_noise_sigma, rule.timesteps, rule, window=16)
    """
    rule = read_scheduler(
        scheduler,
        num_inference_steps,
        begin_index=begin_index,
        clipping=clipping,
        sigma_data=sigma_data,
        **step_options,
    )
    if not rule.independent_noise:
        warnings.warn(
            f"{type(scheduler).__name__} draws noise that is correlated between steps; pass noise=rule.noise(...) to "
            "solve, which draws it as the scheduler does, and not a seed",
            stacklevel=2,
        )
    return rule


def read_scheduler(
    scheduler: Any,
    num_inference_steps: int | None = None,
    *,
    begin_index: int = 0,
    clipping: str = "denoiser",
    sigma_data: float | None = None,
    **step_options: Any,
) -> SchedulerRule:
    """:func:`step_rule_from_scheduler` for who draws the noise as the scheduler does, and need not be told to."""
    _check_scheduler(scheduler, step_options)
    if clipping not in ("refuse", "denoiser"):
        raise ValueError(f'clipping: expected "refuse" or "denoiser", got {clipping!r}')
    with torch.device("cpu"):  # for what the scheduler makes without saying where
        return _rule(scheduler, num_inference_steps, begin_index, clipping, sigma_data, step_options)


def _rule(
    scheduler: Any,
    num_inference_steps: int | None,
    begin_index: int,
    clipping: str,
    sigma_data: float | None,
    step_options: dict[str, Any],
) -> SchedulerRule:
    prepared = _with_timesteps(scheduler, num_inference_steps)
    loop = _loop(prepared, begin_index, step_options)
    active = clips(prepared)
    if active and clipping == "refuse":
        raise UnsupportedSchedulerError(
            f"scheduler: {', '.join(active)} of {loop.name} is not linear. Switch it off, or pass clipping='denoiser' "
            "and wrap your denoiser with rule.wrap_denoiser"
        )
    linear = loop
    if active:
        linear = replace(loop, scheduler=copy.deepcopy(prepared))
        switch_off(linear.scheduler)
    timesteps = torch.stack(linear.timesteps).numpy()
    with streams_left_alone():  # some schedulers seed their noise from the global stream
        table, path, independent = tabulate(linear, timesteps, _sigma_data(prepared, sigma_data))
        check_replay(linear, table)
        clip = clip_of(loop, table, path) if active else None
    return SchedulerRule(table, float(getattr(prepared, "init_noise_sigma", 1.0)), independent, clip, linear)


def _check_scheduler(scheduler: Any, step_options: dict[str, Any]) -> None:
    if not isinstance(scheduler, SchedulerMixin):
        raise TypeError(f"scheduler: expected a diffusers scheduler, got {type(scheduler).__name__}")
    name = type(scheduler).__name__
    if name in UNSUPPORTED:
        raise UnsupportedSchedulerError(f"scheduler: {name} {UNSUPPORTED[name]}")
    parameters = inspect.signature(scheduler.step).parameters  # type: ignore[attr-defined]
    accepted = {key: one for key, one in parameters.items() if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    for option in step_options:
        if option in GIVEN_BY_THE_LOOP | {"variance_noise"}:
            raise ValueError(f"{option}: it differs from step to step, so it cannot be an option of the rule")
        if option not in accepted and not takes_any:
            raise TypeError(f"{option}: {name}.step takes no such argument; it takes {', '.join(accepted)}")
    given = GIVEN_BY_THE_LOOP | set(step_options) | SPECIAL_ARGUMENTS.get(name, set())
    missing = [key for key, parameter in accepted.items() if parameter.default is parameter.empty and key not in given]
    if missing:
        raise UnsupportedSchedulerError(
            f"scheduler: {name}.step needs {', '.join(missing)} besides the network's output and the sample"
        )


def _with_timesteps(scheduler: Any, num_inference_steps: int | None) -> Any:
    """A private copy with its timesteps set, at the start of a run."""
    prepared, name = copy.deepcopy(scheduler), type(scheduler).__name__
    for attribute, value in vars(prepared).items():
        if isinstance(value, torch.Tensor):
            setattr(prepared, attribute, value.cpu())
    if num_inference_steps is not None:
        if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps: expected an integer of at least 1, got {num_inference_steps!r}")
        try:
            prepared.set_timesteps(num_inference_steps)
        except Exception as error:
            raise UnsupportedSchedulerError(
                f"scheduler: {name}.set_timesteps({num_inference_steps}) fails: {type(error).__name__}: {error}"
            ) from error
    elif getattr(prepared, "timesteps", None) is None or (
        getattr(prepared, "num_inference_steps", "unknown") is None and not getattr(prepared, "custom_timesteps", False)
    ):
        raise ValueError(f"num_inference_steps: expected a number, as {name}.set_timesteps has not been called")
    elif getattr(prepared, "_step_index", None) or getattr(prepared, "counter", 0):
        raise ValueError(f"scheduler: {name} is in the middle of a run; call set_timesteps again")
    return prepared


def _loop(scheduler: Any, begin_index: int, step_options: dict[str, Any]) -> Loop:
    timesteps = scheduler.timesteps
    if type(scheduler).__name__ in ENDS_WITH_ZERO:
        timesteps = timesteps[:-1]
    if not 0 <= begin_index < len(timesteps):
        raise ValueError(f"begin_index: expected 0..{len(timesteps) - 1}, got {begin_index}")
    if begin_index and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin_index)
    return Loop(scheduler, tuple(timesteps[begin_index:].cpu()), step_options)


def _sigma_data(scheduler: Any, given: float | None) -> float:
    if given is None:
        given = float(scheduler.config.get("sigma_data", 1.0 if hasattr(scheduler, "scale_noise") else 0.5))
    if not (np.isfinite(given) and given > 0):
        raise ValueError(f"sigma_data: expected a finite number > 0, got {given}")
    return given
