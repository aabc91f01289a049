"""A small class-conditional diffusion model of 28 x 28 clothes that needs no download.

The network predicts the noise ``eps`` in

    x_t = sqrt(alphas_cumprod[t]) x_0 + sqrt(1 - alphas_cumprod[t]) eps,   t = 0 .. 999,

with the linear schedule of Ho et al. 2020 (https://arxiv.org/abs/2006.11239). It was trained on
Fashion-MNIST; ``MODEL_CARD.md`` in this folder has the data's licence, the training and the quality reached.

Example:
    >>> import torch
    >>> denoiser = EmbeddedDenoiser()
    >>> denoiser(torch.zeros(3, 1, 28, 28), torch.tensor([999, 500, 0])).shape
    torch.Size([3, 1, 28, 28])
"""

import json
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from typing import ClassVar

import numpy as np
import torch
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from safetensors.torch import load
from torch import Tensor

from parasolver_adapters.diffusers.denoisers import UNetDenoiser
from parasolver_core import NoiseSchedule

SAMPLE_SHAPE = (1, 28, 28)
CLASS_NAMES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
NO_CLASS = len(CLASS_NAMES)


SCHEDULE = NoiseSchedule.linear(beta_start=1e-4, beta_end=0.02, train_steps=1000)
"""The noise schedule that the model was trained with."""
_LEVELS = torch.tensor(np.sqrt([SCHEDULE.alphas_cumprod, 1.0 - SCHEDULE.alphas_cumprod]), device="cpu")


class NoiseUNet2DModel(UNet2DModel):
    """A ``UNet2DModel`` that learns the velocity ``v`` and returns the noise ``eps``.

    With ``a = alphas_cumprod[t]`` the layers give ``v = sqrt(a) eps - sqrt(1 - a) x_0`` (Salimans and Ho
    2022, https://arxiv.org/abs/2202.00512), and the result is

        eps = sqrt(a) v + sqrt(1 - a) x_t.

    Near pure noise ``eps`` is almost ``x_t``: the layers need not copy their input, and their errors are
    damped by ``sqrt(a)``, so that a small network can be sampled without clipping ``x_0``.
    """

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predict the noise.

        Args:
            sample: Noisy pictures ``x_t`` (rows, 1, 28, 28); clean pictures lie in [-1, 1].
            timestep: Integers in 0 .. 999, one for all rows or (rows,).
            class_labels: Integers (rows,) in 0 .. 9, or 10 for "no class"; None, as in pipelines: no class.
            return_dict: Whether to return an object with field ``sample`` instead of a tuple.

        Returns:
            ``eps``, same shape and dtype as ``sample``.
        """
        if class_labels is None:
            class_labels = torch.full((len(sample),), NO_CLASS, device=sample.device)
        v = super().forward(sample, timestep, class_labels, return_dict=False)[0]
        t = torch.as_tensor(timestep, dtype=torch.int64, device=sample.device).view(-1, 1, 1, 1)
        signal, noise = _LEVELS.to(v.dtype).to(sample.device)[:, t]  # not every device has float64
        eps = signal * v + noise * sample
        return UNet2DOutput(sample=eps) if return_dict else (eps,)


def load_embedded_model(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> NoiseUNet2DModel:
    """Load the network that ships with this package; it is a ``UNet2DModel`` that returns ``eps``.

    Its call is ``model(x, t, class_labels=y).sample`` with ``x`` (rows, 1, 28, 28), ``t`` (rows,) integers in
    0 .. 999 and ``y`` (rows,) integers in 0 .. 9, or 10 (``NO_CLASS``) for "no class". Rows do not influence
    each other: all normalisation is over the channels and pixels of one row, and there is no dropout.

    Args:
        dtype: Floating-point type of the weights, and of the ``x`` that the network accepts.
        device: Device of the weights.

    Returns:
        The network in evaluation mode, with gradients of the weights switched off.
    """
    folder = resources.files(__name__)
    with torch.device("cpu"):  # and not on the default device, which may hold no values
        model = NoiseUNet2DModel(**json.loads(folder.joinpath("config.json").read_text()))
    model.load_state_dict(load(folder.joinpath("fashion_mnist.safetensors").read_bytes()))
    torch.nn.Module.to(model, device=device, dtype=dtype)  # diffusers' own ``to`` warns without cause
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class EmbeddedDenoiser:
    """The embedded model as a function ``eps = denoiser(x, t)``.

    With ``guidance_scale = w`` it returns the classifier-free combination (Ho and Salimans 2022,
    https://arxiv.org/abs/2207.12598)

        eps = eps_uncond + w (eps_cond - eps_uncond)

    from one network call of twice as many rows. One label serves all rows, so that the number of rows, which
    is (batch x nodes) in a parallel-in-time solver, may change from call to call.

    Args:
        labels: Class of all rows, 0 .. 9 as in ``CLASS_NAMES``, or None for no class.
        guidance_scale: ``w`` above; 1 is the plain conditional model, None saves the second row of each pair.
        model: Network to call, by default a new float32 copy on the CPU.

    Raises:
        ValueError: If ``labels`` is out of range, or ``guidance_scale`` is given without ``labels``.

    Example:
        >>> dresses = EmbeddedDenoiser(labels=CLASS_NAMES.index("dress"), guidance_scale=2.0)
        >>> dresses(torch.zeros(2, 1, 28, 28), torch.tensor([999, 999])).shape
        torch.Size([2, 1, 28, 28])
    """

    labels: int | None = None
    guidance_scale: float | None = None
    model: UNet2DModel = field(default_factory=load_embedded_model, repr=False, compare=False)

    prediction_type: ClassVar[str] = "epsilon"

    def __post_init__(self) -> None:
        if self.labels is not None and not 0 <= self.labels < NO_CLASS:
            raise ValueError(f"labels must be None or an int in 0 .. {NO_CLASS - 1}; got {self.labels}")
        if self.guidance_scale is not None and self.labels is None:
            raise ValueError("guidance_scale needs a class; pass labels, an int in 0 .. 9, or drop guidance_scale")

    @cached_property
    def _denoiser(self) -> UNetDenoiser:
        label, no_class = (
            {"class_labels": torch.tensor([one], device=self.model.device)}
            for one in (NO_CLASS if self.labels is None else self.labels, NO_CLASS)
        )
        guided = self.guidance_scale is not None
        return UNetDenoiser(
            self.model,
            label,
            negative=no_class if guided else None,
            guidance_scale=self.guidance_scale,
        )

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict the noise in each row.

        Args:
            x: Noisy pictures (rows, 1, 28, 28), in the model's dtype; clean pictures lie in [-1, 1].
            t: Integer timesteps in 0 .. 999, one per row, (rows,).

        Returns:
            ``eps``, same shape and dtype as ``x``.

        Raises:
            ValueError: If the shapes do not fit.
        """
        if x.shape[1:] != SAMPLE_SHAPE or t.shape != x.shape[:1]:
            raise ValueError(
                f"x must have shape (rows, 1, 28, 28) and t shape (rows,); got {tuple(x.shape)} and {tuple(t.shape)}"
            )
        return self._denoiser(x, t)
