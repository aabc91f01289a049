"""The node and what it makes: a SAMPLER of ComfyUI whose steps run in parallel."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parasolver_adapters.samplers import UnsupportedSamplerError, parallel
from parasolver_core import NoiseSchedule

from .network import Network

_FALLBACKS = ["error", "sequential"]


@dataclass(frozen=True)
class Options:
    """What the node's user chose.

    Args:
        window: steps in a round.
        tolerance: relative distance to the sequential sample.
        devices: further devices, each with a replica of the model.
        max_rows: the most pictures in one call of the model; 0: no limit.
        fallback: "error" or "sequential": what to do with a sampler that is not linear.
        batch_patches: whether functions that other nodes put into the model may see several steps in a call.
    """

    window: int = 8
    tolerance: float = 0.01
    devices: Sequence[torch.device] = ()
    max_rows: int = 0
    fallback: str = "error"
    batch_patches: bool = False


def in_parallel(sampler: Any, options: Options) -> Any:
    """A SAMPLER like the given one, whose steps run in parallel.

    Raises:
        ValueError: the object has no function ``f(model, x, sigmas, ...)``.
    """
    if not callable(getattr(sampler, "sampler_function", None)):
        raise ValueError(
            "sampler: expected a SAMPLER that holds a sampler function, as those of KSamplerSelect do, got "
            f"{type(sampler).__name__}"
        )
    made = copy.copy(sampler)
    made.sampler_function = parallel_function(sampler.sampler_function, options)
    return made


def parallel_function(fn: Callable[..., Tensor], options: Options) -> Callable[..., Tensor]:
    """``fn(model, x, sigmas, extra_args, callback, disable, **options)`` in parallel, called as it is."""

    @functools.wraps(fn)
    def run(
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], Any] | None = None,
        disable: bool | None = None,
        **others: Any,
    ) -> Tensor:
        extra_args = extra_args or {}
        rest = {"callback": callback, "disable": disable, **others}
        if options.window == 1:
            return fn(model, x, sigmas, extra_args=extra_args, **rest)
        try:
            network = Network.of(model, extra_args, len(x), options.batch_patches, _interruption())
            replicas = [network.on(device) for device in options.devices]
        except UnsupportedSamplerError as error:
            if options.fallback == "error":
                raise
            warnings.warn(f"sampled sequentially: {error}", stacklevel=2)
            return fn(model, x, sigmas, extra_args=extra_args, **rest)
        sample = parallel(
            _for_rows(fn, network, extra_args),
            options.window,
            tolerance=options.tolerance,
            max_rows=options.max_rows or None,
            schedule=_schedule(model),
            replicas=replicas,
            fallback=options.fallback,  # type: ignore[arg-type]
        )
        return sample(network, x, sigmas, extra_args={}, **rest)

    return run


def _for_rows(fn: Callable[..., Tensor], network: Network, extra_args: dict[str, Any]) -> Callable[..., Tensor]:
    """``fn`` whose model is told which sample of the batch each row is, and no more: the rest does not change."""
    signature = inspect.signature(fn)

    @functools.wraps(fn)
    def sampler(model: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        samples = torch.arange(len(x), device=x.device)
        bound = signature.bind(_Passing(model, network, samples, extra_args), x, *args, **kwargs)
        bound.arguments["extra_args"] = dict(extra_args)  # some samplers write into it
        return fn(*bound.args, **bound.kwargs)

    return sampler


class _Passing:
    """The model in the hands of a sampler."""

    def __init__(self, model: Any, network: Network, samples: Tensor, extra_args: dict[str, Any]) -> None:
        self._model, self._network, self._samples, self._extra_args = model, network, samples, extra_args

    def __call__(self, x: Tensor, sigma: Tensor, **given: Any) -> Tensor:
        if self._model is self._network:  # the sampler runs as it is
            return self._network.inner(x, sigma, **given)
        changed = [name for name, value in given.items() if value is not self._extra_args.get(name)]
        if changed:
            raise UnsupportedSamplerError(
                f"sampler: it changes {', '.join(changed)} on the way to the model, to read more than the denoised "
                "picture, as samplers with CFG++ do. Choose another, or fallback = sequential"
            )
        return self._model(x, sigma, self._samples)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._model, name)


def _schedule(model: Any) -> NoiseSchedule | None:
    """How states relate to clean samples: None for ``x = x_0 + sigma eps``."""
    sampling = model.inner_model.inner_model.model_sampling
    flow = any(kind.__name__ == "CONST" for kind in type(sampling).__mro__)
    return NoiseSchedule.flow_matching() if flow else None


def _interruption() -> Callable[[], Any]:
    """What raises where the user has pressed Cancel."""
    return importlib.import_module("comfy.model_management").throw_exception_if_processing_interrupted


class ParaSolverSampler:
    """The node "ParaSolver Sampler"."""

    CATEGORY = "sampling/custom_sampling/samplers"
    DESCRIPTION = "Any sampler of fixed steps, several steps at a time: the same picture in fewer rounds of the model."
    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        names = importlib.import_module("comfy.samplers").SAMPLER_NAMES
        return {
            "required": {
                "sampler_name": (names, {"default": "euler" if "euler" in names else names[0]}),
                "window": ("INT", {"default": 8, "min": 1, "max": 1000, "tooltip": "steps in a round; 1: sequential"}),
                "tolerance": (
                    "FLOAT",
                    {
                        "default": 0.01,
                        "min": 0.0,
                        "max": 0.5,
                        "step": 0.001,
                        "round": 0.0001,
                        "tooltip": "relative distance to the sequential picture",
                    },
                ),
                "devices": (
                    "STRING",
                    {"default": "", "tooltip": "further devices with a replica each, such as cuda:1, cuda:2"},
                ),
                "max_rows": (
                    "INT",
                    {"default": 0, "min": 0, "max": 4096, "tooltip": "pictures in one call of the model; 0: no limit"},
                ),
                "fallback": (_FALLBACKS, {"tooltip": "what to do with a sampler that is not linear"}),
                "batch_patches": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "whether the model's patches look at each picture's own sigma"},
                ),
            },
            "optional": {"sampler": ("SAMPLER", {"tooltip": "instead of the name: another node's sampler"})},
        }

    def get_sampler(
        self,
        sampler_name: str,
        window: int,
        tolerance: float,
        devices: str = "",
        max_rows: int = 0,
        fallback: str = "error",
        batch_patches: bool = False,
        sampler: Any = None,
    ) -> tuple[Any]:
        """The SAMPLER."""
        if sampler is None:
            sampler = importlib.import_module("comfy.samplers").sampler_object(sampler_name)
        chosen = Options(window, tolerance, _devices(devices), max_rows, fallback, batch_patches)
        return (in_parallel(sampler, chosen),)


def _devices(text: str) -> list[torch.device]:
    try:
        return [torch.device(name.strip()) for name in text.split(",") if name.strip()]
    except RuntimeError as error:
        raise ValueError(f"devices: expected names such as cuda:1, cuda:2, got {text!r}: {error}") from None


NODE_CLASS_MAPPINGS = {"ParaSolverSampler": ParaSolverSampler}
NODE_DISPLAY_NAME_MAPPINGS = {"ParaSolverSampler": "ParaSolver Sampler"}
