"""In the places of ComfyUI's modules: what its samplers are called with, and a model that looks at the first row."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


class CancelledError(Exception):
    """What ComfyUI raises where the user has pressed Cancel."""


class EPS:
    """``x = x_0 + sigma eps``."""


class CONST:
    """``x = (1 - sigma) x_0 + sigma eps``."""


@dataclass
class Cond:
    """A condition that is repeated over the rows of a call."""

    cond: Tensor

    def rows(self, count: int) -> Tensor:
        return self.cond.repeat(math.ceil(count / len(self.cond)), 1)[:count]


@dataclass
class ListCond:
    """Several pictures that a model refers to, each repeated over the rows of a call."""

    cond: list[Tensor]

    def rows(self, count: int) -> Tensor:
        return torch.stack([Cond(one).rows(count) for one in self.cond]).sum(0)


@dataclass
class Control:
    """A ControlNet: one picture a sample, between two sigmas."""

    cond_hint_original: Tensor
    timestep_range: tuple[float, float] | None = None
    previous_controlnet: Any = None
    vae: Any = None

    def __call__(self, sigma: Tensor) -> Tensor | float:
        before = self.previous_controlnet(sigma) if self.previous_controlnet is not None else 0.0
        if self.timestep_range and not self.timestep_range[0] >= sigma[0] >= self.timestep_range[1]:
            return before
        return before + Cond(self.cond_hint_original).rows(len(sigma))


class Model(torch.nn.Module):
    """The network: a clean sample of each row that is not linear in x."""

    def __init__(self, sampling: Any) -> None:
        super().__init__()
        self.model_sampling = sampling
        self.weight = torch.nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(5)) / 3, False)
        self.calls = 0

    def forward(self, x: Tensor, sigma: Tensor, prompt: Tensor, control: Any) -> Tensor:
        self.calls += 1
        s = sigma[:, None]
        hidden = torch.tanh(x / (1 + s**2).sqrt() @ self.weight + prompt + control)
        return 0.6 * hidden + 0.3 * x / (1 + s**2)


@dataclass
class Patcher:
    """What holds a model's weights."""

    model: Model
    patches: dict[str, Tensor] = field(default_factory=dict)
    load_device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass
class Guider:
    """A mean of the conditions that are active at the sigma of the first row."""

    conds: dict[str, list[dict[str, Any]]]
    inner_model: Model = field(default_factory=lambda: Model(EPS()))

    def __post_init__(self) -> None:
        self.model_patcher = Patcher(self.inner_model, {"weight": torch.ones(1)})

    def __call__(self, x: Tensor, sigma: Tensor, model_options: Any = None, seed: Any = None) -> Tensor:
        total, count = torch.zeros_like(x), 0
        for one in self.conds["positive"]:
            start, end = one.get("timestep_start", math.inf), one.get("timestep_end", 0.0)
            if start >= sigma[0] >= end:
                control = one["control"](sigma) if "control" in one else 0.0
                total, count = (
                    total + self.inner_model(x, sigma, one["model_conds"]["c"].rows(len(x)), control),
                    count + 1,
                )
        out = total / max(count, 1)
        for patch in (model_options or {}).get("sampler_post_cfg_function", []):
            out = patch({"denoised": out, "sigma": sigma})
        return out


class Inpaint:
    """What samplers call."""

    def __init__(self, guider: Guider) -> None:
        self.inner_model = guider
        self.noise: Tensor | None = None
        self.latent_image: Tensor | None = None

    def __call__(self, x: Tensor, sigma: Tensor, denoise_mask: Tensor | None, model_options: Any, seed: Any) -> Tensor:
        if denoise_mask is not None:
            x = x * denoise_mask + (self.latent_image + self.noise * sigma[:, None]) * (1 - denoise_mask)
        out = self.inner_model(x, sigma, model_options=model_options, seed=seed)
        return out if denoise_mask is None else out * denoise_mask + self.latent_image * (1 - denoise_mask)


class KSAMPLER:
    """The object that a SAMPLER is."""

    def __init__(self, sampler_function: Callable[..., Tensor], extra_options: dict[str, Any] | None = None) -> None:
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}

    def sample(
        self,
        guider: Guider,
        sigmas: Tensor,
        noise: Tensor,
        mask: Tensor | None = None,
        latent: Tensor | None = None,
        callback: Any = None,
        model_options: dict[str, Any] | None = None,
    ) -> Tensor:
        model = Inpaint(guider)
        model.noise, model.latent_image = noise, torch.zeros_like(noise) if latent is None else latent
        told = None if callback is None else lambda one: callback(one["i"], one["denoised"], one["x"], len(sigmas) - 1)
        extra_args = {"model_options": model_options or {}, "seed": 3, "denoise_mask": mask}
        x = noise * sigmas[0]
        return self.sampler_function(
            model, x, sigmas, extra_args=extra_args, callback=told, disable=True, **self.extra_options
        )


def sample_euler(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Any = None,
    callback: Any = None,
    disable: Any = None,
    s_noise: float = 0.0,
) -> Tensor:
    generator = torch.Generator().manual_seed(extra_args["seed"])
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones([len(x)]), **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
        if s_noise:
            x = x + s_noise * sigmas[i + 1] * torch.randn(x.shape, generator=generator)
    return x


def sample_euler_cfg_pp(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None
) -> Tensor:
    seen: list[Tensor] = []
    extra_args["model_options"] = {
        "sampler_post_cfg_function": [lambda one: seen.append(one["sigma"]) or one["denoised"]]
    }
    return sample_euler(model, x, sigmas, extra_args, callback, disable)


def sample_heun(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None
) -> Tensor:
    """Two calls a step; the second is at the sigma of the next step's first."""
    ones = x.new_ones([len(x)])
    for i in range(len(sigmas) - 1):
        slope, width = (x - model(x, sigmas[i] * ones, **extra_args)) / sigmas[i], sigmas[i + 1] - sigmas[i]
        if sigmas[i + 1] > 0:
            end = x + slope * width
            slope = (slope + (end - model(end, sigmas[i + 1] * ones, **extra_args)) / sigmas[i + 1]) / 2
        x = x + slope * width
    return x


SAMPLERS = {"euler": sample_euler, "euler_cfg_pp": sample_euler_cfg_pp}


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Modules of ComfyUI in ``sys.modules``; gives ``comfy.model_management``, with its switch."""
    package, samplers, management = (
        ModuleType("comfy"),
        ModuleType("comfy.samplers"),
        ModuleType("comfy.model_management"),
    )
    samplers.SAMPLER_NAMES = list(SAMPLERS)  # type: ignore[attr-defined]
    samplers.sampler_object = lambda name: KSAMPLER(SAMPLERS[name])  # type: ignore[attr-defined]
    management.interrupted = False  # type: ignore[attr-defined]

    def throw() -> None:
        if management.interrupted:
            management.interrupted = False  # type: ignore[attr-defined]
            raise CancelledError

    management.throw_exception_if_processing_interrupted = throw  # type: ignore[attr-defined]
    for module in (package, samplers, management):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return management
