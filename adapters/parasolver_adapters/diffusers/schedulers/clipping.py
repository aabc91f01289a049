"""Clipping of the predicted clean sample, moved out of the scheduler's step and into the denoiser.

A step that clips is not linear in the network's output m. But it equals the linear step for another output,

    m' = m + w (clip(h) - h) ,      h = p x + q m  (the predicted clean sample),

so that the recurrence stays a table. ``w`` depends on what else the step makes of m, and is read from the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from parasolver_adapters.bands import Path, as_rows, fit
from parasolver_adapters.diffusers.schedulers.probing import Network, check_replay, run_nonlinear, wavy
from parasolver_adapters.diffusers.schedulers.stepping import Loop, Node, UnsupportedSchedulerError
from parasolver_core.arrays import DeviceTable, uploaded
from parasolver_core.denoiser.contract import DenoiserFn, Rows, predicted_by, takes_rows
from parasolver_core.samplers.recurrence import Recurrence

OPTIONS = ("clip_sample", "clip_denoised", "thresholding")

Float64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Clip:
    """How a scheduler clips, on its own grid.

    Args:
        function: the scheduler's clipping of predicted clean samples, ``(rows, *event)``.
        p, q, w: (N,), the coefficients above.
        scale: (N,), what the state is multiplied with before the network sees it.
        timesteps: (N,), to find the node from what the denoiser is given.
    """

    function: Callable[[torch.Tensor], torch.Tensor]
    p: Float64
    q: Float64
    w: Float64
    scale: Float64
    timesteps: NDArray[Any]

    def correct(self, i: int, x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        """``m'`` of one node, from its state."""
        return _corrected(self.function, x, m, float(self.p[i]), float(self.q[i]), float(self.w[i]))

    def correct_all(self, nodes: list[int], x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        """``m'`` of several nodes, from their states ``(nodes, rows, *event)``."""
        table = uploaded(torch, np.stack([self.p, self.q, self.w])[:, nodes], m.device, m.dtype)
        p, q, w = table.reshape(3, -1, *[1] * (m.ndim - 1))
        return _corrected(lambda h: self.function(h.flatten(0, 1)).view_as(h), x, m, p, q, w)


def _corrected(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, m: torch.Tensor, p: Any, q: Any, w: Any
) -> torch.Tensor:
    h = x * p + m * q
    return m + (function(h) - h) * w


@dataclass(frozen=True, eq=False)
class ClippingDenoiser:
    """A denoiser with outputs ``m'``.

    Args:
        denoiser: the network.
        clip: how its scheduler clips.
    """

    denoiser: DenoiserFn
    clip: Clip
    _grid: DeviceTable = field(init=False, repr=False)
    _table: DeviceTable = field(init=False, repr=False)

    def __post_init__(self) -> None:
        clip = self.clip
        object.__setattr__(self, "_grid", DeviceTable(clip.timesteps))
        object.__setattr__(self, "_table", DeviceTable(np.stack([clip.p / clip.scale, clip.q, clip.w])))

    @property
    def takes_rows(self) -> bool:
        return takes_rows(self.denoiser)

    @property
    def prediction_type(self) -> str | None:
        return predicted_by(self.denoiser)

    def __call__(self, x: torch.Tensor, t: torch.Tensor, /, *rows: Rows) -> torch.Tensor:
        clip, m = self.clip, self.denoiser(x, t, *rows)
        node = (t[:, None] == self._grid.like(t)).to(torch.int8).argmax(dim=1)
        p, q, w = self._table.like(x)[:, node].reshape(3, -1, *[1] * (x.ndim - 1))
        return _corrected(clip.function, x, m, p, q, w)


def clips(scheduler: Any) -> list[str]:
    """The clipping options that are switched on."""
    return [option for option in OPTIONS if scheduler.config.get(option)]


def switch_off(scheduler: Any) -> None:
    """Make a private copy of a scheduler linear."""
    scheduler.register_to_config(**{option: False for option in clips(scheduler)})


def clip_of(loop: Loop, recurrence: Recurrence, path: Path) -> Clip:
    """How ``loop``, which clips, relates to the table of the same loop without clipping.

    ``w`` is fitted, and then checked with outputs that are larger than the states.
    """
    if not np.all(np.isfinite([path.p, path.q])) or np.any(path.q == 0):
        raise _cannot_move(loop, "its predicted clean sample is not known at every step")
    scale = np.ones(len(recurrence)) if recurrence.input_scale is None else recurrence.input_scale
    try:
        p, q = _before_thresholding(loop, path)
        clip = Clip(_function(loop.scheduler), p, q, 1 / q, scale, recurrence.timesteps)
        network = _beyond_the_limits(clip)
        clip = replace(clip, w=_weights(loop, recurrence, clip, network))
        check_replay(loop, recurrence, clip.correct, tolerance=1e-6, network=network)
    except UnsupportedSchedulerError as error:
        raise _cannot_move(loop, str(error)) from error
    _check_unique(clip)
    return clip


def _before_thresholding(loop: Loop, path: Path) -> tuple[Float64, Float64]:
    """``p`` and ``q`` of what the step hands to its thresholding, where it does.

    ``add_noise``, from which the path has them for schedulers that do not return the clean sample, rounds sigma in
    another place. That is 6e-8 of it, as the processor has it, but the first steps multiply by ``1 / alpha = 157``.
    """
    p, q, seen = path.p.copy(), path.q.copy(), []

    def network(node: Node) -> torch.Tensor:
        threshold = type(node.scheduler)._threshold_sample
        seen.clear()

        def listening(sample: torch.Tensor) -> torch.Tensor:
            seen.append(sample)
            return threshold(node.scheduler, sample)

        node.scheduler._threshold_sample = listening
        return wavy(node)

    if loop.scheduler.config.get("thresholding"):
        for node, m, _ in run_nonlinear(loop, network):
            fitted = fit(as_rows([node.x, m]), as_rows([seen[0]])[0]) if seen else None
            if fitted is not None:
                p[node.index], q[node.index] = fitted
    return p, q


def _beyond_the_limits(clip: Clip) -> Network:
    """A network whose predicted clean sample has to be clipped at every node."""

    def network(node: Node) -> torch.Tensor:
        sample = 2 * torch.cos(3 * node.model_input + node.index)
        for _ in range(64):
            if not torch.equal(clip.function(sample), sample):
                break
            sample = 2 * sample
        return (sample - float(clip.p[node.index]) * node.x) / float(clip.q[node.index])

    return network


def _weights(loop: Loop, recurrence: Recurrence, clip: Clip, network: Network) -> Float64:
    """``w`` of each node: how far the clipping step is from the linear one, over ``b (clip(h) - h)``.

    A step that uses nothing of m but the clipped sample has ``w = 1 / q``; DDIM, which keeps the noise as predicted
    before clipping, has another.
    """
    weights, xs, ms = clip.w.copy(), [], []
    for node, m, output in run_nonlinear(loop, network):
        i = node.index
        xs.insert(0, node.x)
        change = (clip.correct(i, node.x, m) - m) * float(recurrence.b[i, 0] / clip.w[i])
        difference = output.prev_sample - recurrence.advance(i, xs, [m, *ms])
        if torch.any(change != 0):
            weights[i] = float((difference * change).sum() / (change * change).sum())
        ms.insert(0, replace(clip, w=weights).correct(i, node.x, m))
    return weights


def _cannot_move(loop: Loop, reason: str) -> UnsupportedSchedulerError:
    options = " and ".join(clips(loop.scheduler))
    return UnsupportedSchedulerError(
        f"scheduler: {options} of {loop.name} cannot be moved into the denoiser; switch it off ({reason})"
    )


def _function(scheduler: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    if scheduler.config.get("thresholding"):
        return scheduler._threshold_sample
    limit = float(scheduler.config.get("clip_sample_range", 1.0))
    return lambda sample: sample.clamp(-limit, limit)


def _check_unique(clip: Clip) -> None:
    """The denoiser is given a timestep, so nodes of one timestep have to clip alike."""
    _, first, group = np.unique(clip.timesteps, return_index=True, return_inverse=True)
    for table in (clip.p, clip.q, clip.w, clip.scale):
        if not np.allclose(table, table[first][group], rtol=1e-12, atol=0):
            raise UnsupportedSchedulerError(
                "scheduler: it clips, and visits a timestep twice with different coefficients; switch clipping off"
            )
