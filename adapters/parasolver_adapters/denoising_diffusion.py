"""The objects of denoising-diffusion-pytorch, with their own loops, in parallel.

Their loops keep the network to themselves: a step asks the object for the clean sample that the network predicts,
clipped, and is linear in that. So one method of the object, the one that gives the clean sample, is a network in the
sense of :mod:`parasolver_adapters.samplers`, and the loop around it is a sampler.

Example::

    diffusion = parallel_denoising_diffusion(GaussianDiffusion(unet, image_size=64).eval(), window=16)
    images = diffusion.sample(batch_size=4)
    print(diffusion.solution.message)
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from parasolver_adapters.drop_in import as_it_is_now, copied, with_methods
from parasolver_adapters.samplers import ParallelSampler, UnsupportedSamplerError, parallel
from parasolver_core import NoiseSchedule

_OFF = 1e-3  # what a step reads besides the clean sample, relative to its size, in float32 and near the data


def parallel_denoising_diffusion(diffusion: Any, window: int | Literal["auto"] = 16, **options: Any) -> Any:
    """A copy of a diffusion object whose loops find their samples in parallel; used as before.

    ``sample`` and what it calls, ``p_sample_loop`` and ``ddim_sample``, are the object's own, with its arguments,
    objective, schedule, clipping and random numbers; of an ``ElucidatedDiffusion``, ``sample`` and
    ``sample_using_dpmpp``. ``solution`` is that of the last loop.

    Args:
        diffusion: a ``GaussianDiffusion``, ``GaussianDiffusion1D`` or ``ElucidatedDiffusion``, or a subclass, in
            evaluation mode; not changed.
        window: as in :func:`parasolver_core.solve`; 1 leaves the loops as they are.

    Other arguments:
        options: of :func:`parasolver_adapters.samplers.parallel` but ``replicas``: ``tolerance``, ``fallback``, ...

    Raises:
        TypeError: it is no such object.
        UnsupportedSamplerError: with self-conditioning, where a step reads the last step's clean sample; when a loop is
            called whose steps read more of the network than the clean sample, such as a learned variance.
    """
    loops = {name: part for name, part in _parts(diffusion).items() if hasattr(diffusion, name)}
    if not loops:
        raise TypeError(
            "diffusion: expected a GaussianDiffusion or ElucidatedDiffusion of denoising-diffusion-pytorch, got "
            f"{type(diffusion).__name__}"
        )
    if getattr(diffusion, "self_condition", False):
        raise UnsupportedSamplerError(
            "diffusion: self_condition=True gives the network the last step's clean sample, so a step depends on more "
            "than its state; sample sequentially"
        )
    if getattr(diffusion, "training", False):
        raise ValueError("diffusion: it is in training mode, got .training=True; call .eval() on it first")
    if hasattr(diffusion, "alphas_cumprod"):
        bar = diffusion.alphas_cumprod.double().cpu().numpy()
        options.setdefault("schedule", NoiseSchedule.from_alphas_cumprod(bar, default_prediction_type="sample"))
    made = functools.partial(parallel, window=window, **options)
    made(getattr(diffusion, next(iter(loops))))  # refuses options that do not fit before a loop is called
    return with_methods("diffusion", diffusion, {name: _loop(name, made) for name in loops})


def _parts(diffusion: Any) -> dict[str, _Part]:
    """The loops that an object may have, and what they ask of it."""
    if hasattr(diffusion, "preconditioned_network_forward"):
        return dict.fromkeys(("sample", "sample_using_dpmpp"), _Preconditioned(diffusion))
    if not hasattr(diffusion, "model_predictions"):
        return {}
    return {"p_sample_loop": _Posterior(diffusion), "ddim_sample": _Predictions(diffusion)}


class _Part:
    """A method that gives the clean sample, among what the step computes of it.

    Attributes:
        name: of the method.
    """

    name: str

    def __init__(self, diffusion: Any) -> None:
        self._diffusion = diffusion

    def clean(self, x: Tensor, t: Any, *args: Any, **kwargs: Any) -> Tensor:
        """By the object's own method, for rows of any times."""
        returned = self.asked(x, t, *args, **kwargs)
        clean = self.clean_in(returned)
        for got, want in zip(self.returned(clean, x, t), returned, strict=False):
            if float((got - want).norm()) > _OFF * float(want.norm()):  # NaN is for the solver to tell
                raise UnsupportedSamplerError(
                    f"diffusion: {self.name} of {type(self._diffusion).__name__} gives its step more than the clean "
                    "sample (a learned variance, or noise from before clipping); sample sequentially"
                )
        return clean

    def asked(self, x: Tensor, t: Any, *args: Any, **kwargs: Any) -> Any:
        """What the method gives."""
        return getattr(self._diffusion, self.name)(x, t, *args, **kwargs)

    def clean_in(self, returned: Any) -> Tensor:
        raise NotImplementedError

    def returned(self, clean: Tensor, x: Tensor, t: Any) -> Any:
        """What the method returns for this clean sample."""
        raise NotImplementedError


class _Posterior(_Part):
    name = "p_mean_variance"

    def asked(self, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._diffusion.p_mean_variance(*args, x=x, t=t, **kwargs)  # of some only by name

    def clean_in(self, returned: Any) -> Tensor:
        return returned[3]

    def returned(self, clean: Tensor, x: Tensor, t: Tensor) -> Any:
        return (*self._diffusion.q_posterior(clean, x, t), clean)


class _Predictions(_Part):
    name = "model_predictions"

    def clean_in(self, returned: Any) -> Tensor:
        return returned[1]

    def returned(self, clean: Tensor, x: Tensor, t: Tensor) -> Any:
        return self._diffusion.predict_noise_from_start(x, t, clean), clean


class _Preconditioned(_Part):
    name = "preconditioned_network_forward"

    def clean_in(self, returned: Any) -> Tensor:
        return returned

    def returned(self, clean: Tensor, x: Tensor, t: Any) -> Any:
        return clean


def _loop(name: str, made: Callable[..., ParallelSampler]) -> Callable[..., Any]:
    """One of the loops, in parallel."""

    def loop(drop_in: Any, *args: Any, **kwargs: Any) -> Any:
        drop_in.solution = None
        diffusion = as_it_is_now(drop_in)
        sample, begin = made(_sampler(diffusion, name)), _zeros(getattr(diffusion, name), args, kwargs)
        returned = sample(_parts(diffusion)[name].clean, begin, *args, **kwargs)
        drop_in.solution = sample.solution
        return returned

    return loop


def _sampler(diffusion: Any, name: str) -> Callable[..., Any]:
    """The object's own loop as a function that asks a network for the clean sample."""

    def sampler(model: Callable[..., Tensor], begin: Tensor, *args: Any, disable: bool = False, **kwargs: Any) -> Any:
        """The loop from ``begin``, to which it adds what it draws."""

        def asked(x: Tensor, t: Any, *rest: Any, **named: Any) -> Any:
            # one time for all samples: while the loop is read, its state has another number of rows
            t = t.flatten()[:1].expand(len(x)) if isinstance(t, Tensor) else t
            return part.returned(model(x, t, *rest, **named), x, t)

        part, loop = _parts(diffusion)[name], copied(diffusion)
        setattr(loop, part.name, asked)
        with _Beginning(begin), contextlib.redirect_stderr(io.StringIO()) if disable else contextlib.nullcontext():
            return getattr(loop, name)(*args, **kwargs)

    sampler.__name__ = name
    return sampler


class _Beginning(TorchFunctionMode):
    """Draws of the loop have the shape of its state, and the first one is added to it."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self._x, self._begun = x, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.randn:
            return func(*args, **(kwargs or {}))
        drawn, begun, self._begun = torch.randn(self._x.shape, **(kwargs or {})), self._begun, True
        return drawn if begun else self._x + drawn


class _Stopping(TorchFunctionMode):
    """Stops at the first draw."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.randn:
            like = {name: value for name, value in (kwargs or {}).items() if name != "generator"}
            raise _DrawnError(torch.empty(*args, **like))
        return func(*args, **(kwargs or {}))


class _DrawnError(Exception):
    """Holds something like what was drawn."""


def _zeros(loop: Callable[..., Any], args: Any, kwargs: Any) -> Tensor:
    """Like the state that the loop begins with."""
    try:
        with _Stopping():
            loop(*args, **kwargs)
    except _DrawnError as drawn:
        return torch.zeros_like(drawn.args[0])
    raise UnsupportedSamplerError(f"diffusion: {loop.__name__} does not begin with torch.randn")
