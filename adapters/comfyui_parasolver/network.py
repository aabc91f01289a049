"""ComfyUI's model, called with rows of any steps and samples."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parasolver_adapters.samplers import UnsupportedSamplerError

from .conditions import Conditions
from .replicas import replica


class Network:
    """``denoised = network(x, sigma, samples)`` for rows of any steps of the run, in as many calls as they need.

    The model's conditions look at the first row's sigma only, so a call has rows among which no condition, ControlNet
    or patch changes. Where something has an entry for each sample of the batch, row p of a call is of sample
    ``p % batch``, as it is in the calls of a sequential sampler.

    Args:
        inner: what ComfyUI gives its samplers: ``inner(x, sigma, **extra_args)``, with the attributes ``noise`` and
            ``latent_image``, (batch, *event), and the guider in ``inner_model``.
        extra_args: with ``denoise_mask``, which broadcasts to (batch, *event).
        batch: number of samples.
        conditions: of the guider.
        interruption: raises where the user wants to stop.
        device: where it computes.
    """

    def __init__(
        self,
        inner: Any,
        extra_args: dict[str, Any],
        batch: int,
        conditions: Conditions,
        interruption: Callable[[], Any],
        device: torch.device | None = None,
    ) -> None:
        self.inner, self.batch, self._extra_args = inner, batch, extra_args
        self._conditions, self._interruption, self._device = conditions, interruption, device

    @classmethod
    def of(
        cls, inner: Any, extra_args: dict[str, Any], batch: int, batch_patches: bool, interruption: Callable[[], Any]
    ) -> Network:
        """The network of one run.

        Raises:
            UnsupportedSamplerError: a condition or the model looks at more than its own row.
        """
        conditions = Conditions.of(inner.inner_model, extra_args, batch, batch_patches)
        return cls(inner, extra_args, batch, conditions, interruption)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def on(self, device: torch.device) -> Network:
        """A replica on another device."""
        if self._conditions.encodes_images:
            raise UnsupportedSamplerError(
                "devices: a ControlNet with a VAE encodes its picture on ComfyUI's own device only; leave devices empty"
            )
        inner, extra_args = replica(self.inner, self._extra_args, device)
        return Network(inner, extra_args, self.batch, self._conditions, self._interruption, device)

    def __call__(self, x: Tensor, sigma: Tensor, samples: Tensor) -> Tensor:
        device = x.device if self._device is None else self._device
        x, sigma, samples, home = x.to(device), sigma.to(device), samples.to(device), x.device
        denoised = torch.empty_like(x)
        for rows in self._conditions.groups(sigma, samples):
            self._interruption()
            chosen, of_rows, where = rows, samples[rows], torch.arange(len(rows), device=device)
            if self._conditions.per_sample:
                places, where = self._arranged(of_rows)
                chosen, of_rows = rows[places], torch.arange(len(places), device=device) % self.batch
            denoised[rows] = self._evaluate(x[chosen], sigma[chosen], of_rows).to(x.dtype)[where]
        return denoised.to(home)

    def _arranged(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Rows in the order of samples in which a call has them: the row at each place, and the place of each row.

        A place for which there is no row has the first row's state, and its output is dropped.
        """
        found, where = [0] * self.batch, []
        for sample in samples.tolist():
            where.append(found[sample] * self.batch + sample)
            found[sample] += 1
        places = torch.zeros(max(found) * self.batch, dtype=torch.long, device=samples.device)
        at = torch.tensor(where, device=samples.device)
        places[at] = torch.arange(len(samples), device=samples.device)
        return places, at

    def _evaluate(self, x: Tensor, sigma: Tensor, samples: Tensor) -> Tensor:
        inner, extra_args = copy.copy(self.inner), dict(self._extra_args)
        for name in ("noise", "latent_image"):
            setattr(inner, name, self._rows_of(getattr(inner, name, None), samples))
        extra_args["denoise_mask"] = self._rows_of(extra_args.get("denoise_mask"), samples)
        return inner(x, sigma, **extra_args)

    def _rows_of(self, value: Tensor | None, samples: Tensor) -> Tensor | None:
        if value is None or len(value) == 1:
            return value
        return value[samples.to(value.device)]
