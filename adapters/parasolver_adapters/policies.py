"""Policies of robots: chunks of actions, one after another, each found in parallel, from the last one where wanted.

Example::

    policy = DiffusionPolicy.from_pretrained("lerobot/diffusion_pusht")
    sampler = parallel_policy(policy, window=16, max_seconds=0.1, warm_start=True)
    action = policy.select_action(observation)
    print(sampler.solution.message)
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from parasolver_adapters.arguments import same
from parasolver_adapters.diffusers.schedulers.rule import read_scheduler
from parasolver_adapters.given import Streams
from parasolver_adapters.wrapping import prediction_of
from parasolver_core import Rows, Solution, solve
from parasolver_core.samplers.recurrence import Recurrence
from parasolver_core.solver.deadline import check_seconds
from parasolver_core.validation import check_count

_GIVEN_BY_THE_SAMPLER = {"noise", "seed", "start", "save", "throw"}


class ActionSampler:
    """Chunks of actions from a diffusion policy: ``sampler(shape, conditions)`` gives ``(batch, horizon, actions)``.

    Each is the one that the scheduler's own loop gives from the same random numbers, within the tolerance, unless time
    was up. A sample of the batch is an environment, converges by itself, and has its own condition.

    With a ``shift`` each chunk begins at the last one, as far as that has not been executed yet: its noise is the last
    one's moved along the horizon, with new noise behind, and so is the trajectory that the first round starts from.
    Noise that was moved is still normal and independent, so that each chunk has the policy's law; but chunks
    of one episode are no longer independent of each other: they go on with what was decided. Call :meth:`reset` when an
    episode begins.

    Args:
        network: ``network(x, t, **conditions)``; x is ``(rows, horizon, actions)``, t is (rows,).
        scheduler: of diffusers; a copy is used.
        num_inference_steps: for its ``set_timesteps``.
        window: as in :func:`parasolver_core.solve`.

    Other arguments:
        shift: how many actions of a chunk are executed before the next one is asked for; 0 where a chunk's place in
            time does not move. None: every chunk begins anew.
        max_seconds: a deadline for each chunk, from the call on: it is then the best estimate, with the status
            MAX_SECONDS and a guess of its error. The next chunk begins there.
        options: of :func:`parasolver_core.solve`: ``tolerance``, ``method``, ``max_rows`` and others.

    Attributes:
        solution: of the last chunk: rounds in ``solution.stats``, ``solution.status``, ``solution.error_estimate`` of
            each environment. None before the first.
    """

    def __init__(
        self,
        network: nn.Module | Any,
        scheduler: Any,
        num_inference_steps: int,
        window: int | str = 16,
        *,
        shift: int | None = None,
        max_seconds: float | None = None,
        **options: Any,
    ) -> None:
        if not callable(network):
            raise TypeError(f"network: expected network(x, t, **conditions), got {type(network).__name__}")
        if isinstance(network, nn.Module) and network.training:
            raise ValueError("network: it is in training mode, got .training=True; call .eval() on the policy first")
        check_count("shift", shift, minimum=0, optional=True)
        check_seconds(max_seconds)
        for name in _GIVEN_BY_THE_SAMPLER & options.keys():
            raise TypeError(f"{name}: the sampler itself gives it to solve(); leave it out")
        self._rule = read_scheduler(scheduler, num_inference_steps)
        self._network: Any = _Conditioned(network)
        self._denoiser = self._rule.wrap_denoiser(self._network)
        self._options, self._shift, self._max_seconds = {"window": window, **options}, shift, max_seconds
        self._sequential = options.get("method") == "sequential"
        self._draws_plainly: bool | None = None
        self._last: _Chunk | None = None
        self.solution: Solution | None = None

    def reset(self) -> None:
        """Forget the last chunk: an episode begins."""
        self._last = None

    @torch.no_grad()
    def __call__(
        self,
        shape: Sequence[int],
        conditions: Mapping[str, Tensor | None],
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
    ) -> Tensor:
        """One chunk for each environment, ``(batch, horizon, actions)``.

        Args:
            shape: ``(batch, horizon, actions)``.
            conditions: for the network, each ``(batch, ...)`` or None.
            generator: of the noise, drawn in the order of the scheduler's own loop; None: torch's own.
            noise: the state to begin with, instead of drawing it. It is taken as it is, and nothing is moved.
            dtype, device: of the noise that is drawn.

        Raises:
            NonFiniteError, ConvergenceError: as :func:`parasolver_core.solve`.
        """
        started = time.perf_counter()
        _check_call(shape, conditions, noise)
        self._network.conditions = _checked(conditions, shape[0])
        last = None if noise is not None or self._shift is None else self._last
        if noise is None:
            noise = randn_tensor(tuple(shape), generator=generator, dtype=dtype, device=torch.device(device or "cpu"))
        x_T, start = noise * self._rule.init_noise_sigma, None
        z = self._noise(generator, x_T) if self._rule.table.stochastic else None
        if last is not None and last.x_T.shape == x_T.shape and last.x_T.device == x_T.device:
            x_T, z, start = last.moved(self._rule.table, x_T, z, self._shift or 0)
        seconds = self._max_seconds and max(self._max_seconds - (time.perf_counter() - started), 1e-9)
        self.solution = solution = solve(
            self._denoiser,
            x_T,
            self._rule.timesteps,
            self._rule,
            noise=z,
            start=None if self._sequential else start,
            save="sample" if self._shift is None else "trajectory",
            max_seconds=seconds,
            **self._options,
        )
        if self._shift is not None:
            self._last = _Chunk(x_T, z, solution)
        return solution.sample

    def _noise(self, generator: torch.Generator | None, like: Tensor) -> Tensor:
        """What the scheduler's own loop draws; without running it, once it is known to draw once a step."""
        if self._draws_plainly:
            return self._plain_noise(generator, like)
        before = Streams({"generator": generator})
        noise = self._rule.noise(generator, tuple(like.shape), like.dtype, like.device)
        if self._draws_plainly is None:
            after = Streams({"generator": generator})
            before.restore()
            plain = self._plain_noise(generator, like)
            apart = torch.amax((plain - noise).abs().flatten(1), dim=1).cpu().numpy() * self._rule.table.c
            self._draws_plainly = after.same_as(Streams({"generator": generator})) and bool(abs(apart).max() < 1e-6)
            after.restore()
            noise = plain if self._draws_plainly else noise
        return noise

    def _plain_noise(self, generator: torch.Generator | None, like: Tensor) -> Tensor:
        options = {"generator": generator, "device": like.device, "dtype": like.dtype}
        zero, kept = torch.zeros_like(like), torch.promote_types(like.dtype, torch.float32)
        draws = [randn_tensor(like.shape, **options) if c != 0 else zero for c in self._rule.table.c]
        return torch.stack(draws).to(kept)


class _Conditioned:
    """The network for any rows: each has the condition of its environment."""

    takes_rows = True

    def __init__(self, network: Any) -> None:
        self._network = network
        self.conditions: dict[str, Tensor | None] = {}

    def __call__(self, x: Tensor, t: Tensor, rows: Rows) -> Tensor:
        at = torch.as_tensor(rows.samples, device=x.device)
        given = {name: None if value is None else value[at] for name, value in self.conditions.items()}
        return prediction_of(self._network(x, t, **given))


class _Chunk:
    """A chunk that was sampled: its noise, and all its states."""

    def __init__(self, x_T: Tensor, noise: Tensor | None, solution: Solution) -> None:
        self.x_T, self.noise, self._solution = x_T, noise, solution

    def moved(
        self, table: Recurrence, fresh: Tensor, noise: Tensor | None, shift: int
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """``(x_T, noise, start)`` of the next chunk, whose noise would have been ``fresh`` and ``noise``."""
        solution, shift = self._solution, min(shift, fresh.shape[1])
        x_T = _along(1, self.x_T, fresh, shift)
        z = None if noise is None or self.noise is None else _along(2, self.noise, noise, shift)
        sample = solution.sample
        clean = _along(1, sample, sample[:, -1:].expand_as(sample), shift)  # the last action is held
        start, states = held_path(table, x_T, clean, z), solution.trajectory
        stay = fresh.shape[1] - shift
        assert states is not None
        for row, steps in enumerate(solution.steps):  # what was not final when time was up leads to the estimate
            final = min(steps, len(table)) + 1
            start[:final, row, :stay] = states[:final, row, shift:].to(start)
        return x_T, z, start


def held_path(table: Recurrence, x_T: Tensor, clean: Tensor, noise: Tensor | None) -> Tensor:
    """The states ``(N + 1, batch, *event)`` of a network that always predicts the same clean sample."""
    dtype = torch.promote_types(x_T.dtype, torch.float32)
    states, outputs, clean = [x_T.to(dtype)], [], clean.to(dtype)
    for i in range(len(table)):
        p, q = (float(number) for number in table.held[i])
        outputs.insert(0, (clean - p * states[0]) / q)
        z = None if noise is None else noise[i].to(dtype)
        states.insert(0, table.advance(i, states[: table.memory], outputs[: table.memory], z))
    return torch.stack(states[::-1])


def _along(axis: int, last: Tensor, new: Tensor, shift: int) -> Tensor:
    """``last`` moved by ``shift`` along an axis, with the end of ``new`` behind it."""
    length = new.shape[axis]
    return torch.cat([last.narrow(axis, shift, length - shift), new.narrow(axis, length - shift, shift)], dim=axis)


def _check_call(shape: Any, conditions: Any, noise: Any) -> None:
    if not isinstance(shape, Sequence) or len(shape) < 2:
        raise TypeError(f"shape: expected (batch, horizon, actions), got {shape!r}")
    if not isinstance(conditions, Mapping):
        raise TypeError(
            f"conditions: expected a dictionary of the network's arguments, got {type(conditions).__name__}"
        )
    if noise is not None and (not isinstance(noise, Tensor) or noise.shape != tuple(shape)):
        got = tuple(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
        raise ValueError(f"noise: expected a tensor of shape {tuple(shape)}, got {got}")


def _checked(conditions: Mapping[str, Tensor | None], batch: int) -> dict[str, Tensor | None]:
    for name, value in conditions.items():
        if value is not None and (not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != batch):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"conditions: expected {name} as a tensor with {batch} environments first, got {got}")
    return dict(conditions)


def parallel_policy(policy: Any, window: int | str = 16, *, warm_start: bool = False, **options: Any) -> ActionSampler:
    """A diffusion policy of LeRobot with its denoising loop in parallel; used as before.

    ``policy.diffusion.conditional_sample`` is replaced on this object; ``del policy.diffusion.conditional_sample``
    takes that back. The same random numbers are drawn in the same order.

    Args:
        policy: a ``DiffusionPolicy`` in evaluation mode, or its ``DiffusionModel``.
        window: as in :func:`parasolver_core.solve`.

    Other arguments:
        warm_start: whether each chunk begins at the last one, moved by ``n_action_steps``; see
            :class:`ActionSampler`. ``policy.reset()`` forgets it.
        options: of :class:`ActionSampler`, for example ``max_seconds`` and ``tolerance``.

    Returns:
        The :class:`ActionSampler`, with the ``solution`` of the last chunk.
    """
    model = getattr(policy, "diffusion", policy)
    for name in ("conditional_sample", "unet", "noise_scheduler", "num_inference_steps", "config"):
        if not hasattr(model, name):
            raise TypeError(
                f"policy: expected a diffusion policy of LeRobot, got {type(policy).__name__} without {name}; take "
                "parasolver_adapters.diffusers.parallel_loop, or an ActionSampler of the network"
            )
    shift = model.config.n_action_steps if warm_start else None
    sampler = ActionSampler(
        model.unet, model.noise_scheduler, model.num_inference_steps, window, shift=shift, **options
    )
    model.conditional_sample = _ConditionalSample(model, sampler)
    if model is not policy and hasattr(policy, "reset"):
        policy.reset = _Reset(policy.reset, sampler)
    return sampler


class _ConditionalSample:
    """In the place of the method of a ``DiffusionModel``. A deep copy is of the copied model and of a sampler of it."""

    def __init__(self, model: Any, sampler: ActionSampler) -> None:
        functools.update_wrapper(self, model.conditional_sample)
        self._model, self._sampler, self._read = model, sampler, _read_of(model)

    def __call__(
        self,
        batch_size: int,
        global_cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        model, config = self._model, self._model.config
        changed = [name for name, value in _read_of(model).items() if not same(value, self._read[name])]
        if changed:
            raise ValueError(
                f"policy: its {changed[0]} has been changed since it was made parallel; call "
                "del policy.diffusion.conditional_sample and parallel_policy once more"
            )
        shape, like = (batch_size, config.horizon, config.action_feature.shape[0]), next(model.parameters())
        return self._sampler(shape, {"global_cond": global_cond}, generator, noise, like.dtype, like.device)


class _Reset:
    """``policy.reset``, which also forgets the last chunk."""

    def __init__(self, reset: Callable[[], Any], sampler: ActionSampler) -> None:
        functools.update_wrapper(self, reset)
        self._reset, self._sampler = reset, sampler

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._sampler.reset()
        return self._reset(*args, **kwargs)


def _read_of(model: Any) -> dict[str, Any]:
    """What its own loop reads at every chunk, and the sampler once."""
    named = {name: getattr(model, name) for name in ("unet", "noise_scheduler", "num_inference_steps")}
    return named | {"noise_scheduler.config": dict(model.noise_scheduler.config)}
