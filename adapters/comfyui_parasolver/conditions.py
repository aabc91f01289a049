"""What in ComfyUI's conditions and model looks at the first row of a call only."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parasolver_adapters.samplers import UnsupportedSamplerError

_KNOWN = {"transformer_options", "to_load_options", "registered_hooks", "disable_cfg1_optimization"}
_OUTSIDE = {"outer_sample", "prepare_sampling", "sampler_sample"}  # wrappers around the whole run


@dataclass(frozen=True)
class Conditions:
    """Which rows may share a call.

    Args:
        ranges: the ``(start, end)`` in sigmas between which something is active; None: no bound.
        by_step: whether a call has one sigma only.
        per_sample: whether the place of a row in a call matters.
        encodes_images: whether a ControlNet uses a VAE.
    """

    ranges: tuple[tuple[float | None, float | None], ...]
    by_step: bool
    per_sample: bool
    encodes_images: bool

    @classmethod
    def of(cls, guider: Any, extra_args: Mapping[str, Any], batch: int, batch_patches: bool) -> Conditions:
        """Those of a guider that is about to sample.

        Raises:
            UnsupportedSamplerError: something remembers the last step, or makes one sample of the whole batch.
        """
        conditions = [condition for group in guider.conds.values() for condition in group or ()]
        controls = [control for condition in conditions for control in _controls(condition)]
        options = extra_args.get("model_options") or {}
        _refuse(conditions, options)
        patches = _patches(options) + (["hooks"] if any("hooks" in condition for condition in conditions) else [])
        lengths = {n for condition in conditions for n in _lengths(condition)}
        lengths |= {n for control in controls for n in _hints(control)}
        uneven = sorted(n for n in lengths if batch % n)
        by_step = bool(uneven) or (bool(patches) and not batch_patches)
        if by_step:
            why = ", ".join(patches) or f"conditions for {uneven[0]} samples in a batch of {batch}"
            logging.getLogger(__name__).warning(
                "ParaSolver: %s may look at one step only, so each step is a call of its own: several devices help, a "
                "larger window on one does not",
                why,
            )
        ranges = [(condition.get("timestep_start"), condition.get("timestep_end")) for condition in conditions]
        ranges += [
            control.timestep_range for control in controls if getattr(control, "timestep_range", None) is not None
        ]
        return cls(
            tuple(dict.fromkeys(limits for limits in ranges if limits != (None, None))),
            by_step,
            by_step or bool(patches) or any(n > 1 for n in lengths),
            any(getattr(control, "vae", None) is not None for control in controls),
        )

    def groups(self, sigma: Tensor, samples: Tensor) -> Iterator[Tensor]:
        """Places of the rows of each call, (rows,) long tensors."""
        if self.by_step:
            alike = (sigma[:, None] == sigma) & (samples[:, None] == samples)
            again = alike.tril(-1).sum(1)  # two calls of a sampler may be at one sigma
            keys = torch.stack([sigma, again.to(sigma)], dim=1)
        elif not self.ranges:
            yield torch.arange(len(sigma), device=sigma.device)
            return
        else:
            keys = torch.stack([_active(sigma, *limits) for limits in self.ranges], dim=1)
        _, group = torch.unique(keys, dim=0, return_inverse=True)
        for number in range(int(group.max()) + 1):
            yield torch.nonzero(group == number).flatten()


def _active(sigma: Tensor, start: float | None, end: float | None) -> Tensor:
    active = torch.ones_like(sigma, dtype=torch.bool)
    if start is not None:
        active &= ~(sigma > start)
    if end is not None:
        active &= ~(sigma < end)
    return active


def _controls(condition: Mapping[str, Any]) -> Iterator[Any]:
    control = condition.get("control")
    while control is not None:
        yield control
        control = getattr(control, "previous_controlnet", None)


def _lengths(condition: Mapping[str, Any]) -> Iterator[int]:
    """For how many samples a condition has entries."""
    for entry in [condition.get("mask"), *condition.get("model_conds", {}).values()]:
        value = getattr(entry, "cond", entry)
        for part in value if isinstance(value, (list, tuple)) else [value]:  # several pictures that a model refers to
            if isinstance(part, Tensor) and part.ndim:
                yield len(part)


def _hints(control: Any) -> Iterator[int]:
    for value in [getattr(control, "cond_hint_original", None), *getattr(control, "extra_concat_orig", ())]:
        if isinstance(value, Tensor) and value.ndim:
            yield len(value)


def _patches(options: Mapping[str, Any]) -> list[str]:
    """Names of what other nodes have put into the model, of which nobody knows which rows it looks at."""
    transformer = options.get("transformer_options") or {}
    names = [name for name, value in options.items() if name not in _KNOWN and value]
    names += [name for name in ("patches", "patches_replace") if transformer.get(name)]
    wrappers = transformer.get("wrappers") or {}
    return names + [
        str(kind) for kind, functions in wrappers.items() if kind not in _OUTSIDE and any(_leaves(functions))
    ]


def _leaves(functions: Any) -> Iterator[Any]:
    for entry in functions.values() if isinstance(functions, Mapping) else functions or ():
        yield from entry if isinstance(entry, (list, tuple)) else [entry]


def _refuse(conditions: list[Mapping[str, Any]], options: Mapping[str, Any]) -> None:
    if any("num_video_frames" in condition.get("model_conds", {}) for condition in conditions):
        raise UnsupportedSamplerError(
            "model: it takes the pictures of a batch for the frames of one video, so they cannot be at different steps"
        )
    if options.get("context_handler") is not None:
        raise UnsupportedSamplerError("model: context windows join the rows of a call; sample without them")
    transformer = options.get("transformer_options") or {}
    caches = sorted(str(name) for name in transformer if "cache" in str(name).lower())
    if caches:
        raise UnsupportedSamplerError(
            f"model: {caches[0]} keeps the last step's output, and steps in parallel have none; take its node out"
        )
    for condition in conditions:
        hooks = getattr(condition.get("hooks"), "hooks", ())
        if any(len(getattr(getattr(hook, "hook_keyframe", None), "keyframes", ())) for hook in hooks):
            raise UnsupportedSamplerError(
                "conditioning: hooks with keyframes go through the steps in order and remember where they are; take "
                "the keyframes out, or split the prompt's time range with ConditioningSetTimestepRange"
            )
