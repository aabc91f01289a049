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
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from safetensors.torch import load
from torch import Tensor

from parasolver_adapters.epsilon_models import EpsilonModel
from parasolver_core import NoiseSchedule, Rows
from parasolver_core.arrays import DeviceTable

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
_LEVELS = DeviceTable(np.sqrt([SCHEDULE.alphas_cumprod, 1.0 - SCHEDULE.alphas_cumprod]))


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
        signal, noise = _LEVELS.like(v)[:, t]
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


def class_label(given: int | str) -> int:
    """The number of a class: a name of ``CLASS_NAMES`` in any case or the first word of one, its number, or "none".

    Raises:
        ValueError: there is no such class; the message lists them.
    """
    text = str(given).strip().lower()
    if text.isdecimal() and int(text) <= NO_CLASS:
        return int(text)
    if text == "none":
        return NO_CLASS
    fitting = [i for i, name in enumerate(CLASS_NAMES) if text in (name.lower(), *re.split("[ /]", name.lower()))]
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(f"{i} {name}" for i, name in enumerate(CLASS_NAMES))
    raise ValueError(f"labels: expected classes of {names}, {NO_CLASS} none; got {given}")


@dataclass(frozen=True)
class EmbeddedDenoiser:
    """The embedded model as a function ``eps = denoiser(x, t)``.

    With ``guidance_scale = w`` it returns the classifier-free combination (Ho and Salimans 2022,
    https://arxiv.org/abs/2207.12598)

        eps = eps_uncond + w (eps_cond - eps_uncond)

    from one network call of twice as many rows.

    Args:
        labels: Class of all samples, 0 .. 9 or a name of ``CLASS_NAMES``; or one for each sample of the batch; or None
            for no class.
        guidance_scale: ``w`` above; 1 is the plain conditional model, None saves the second row of each pair.
        model: Network to call, by default a new float32 copy on the CPU.

    Raises:
        ValueError: If ``labels`` names no class, or ``guidance_scale`` is given without ``labels``.

    Example:
        >>> dresses = EmbeddedDenoiser(labels="dress", guidance_scale=2.0)
        >>> dresses(torch.zeros(2, 1, 28, 28), torch.tensor([999, 999])).shape
        torch.Size([2, 1, 28, 28])
    """

    labels: int | str | Sequence[int | str] | None = None
    guidance_scale: float | None = None
    model: UNet2DModel = field(default_factory=load_embedded_model, repr=False, compare=False)

    prediction_type: ClassVar[str] = "epsilon"

    def __post_init__(self) -> None:
        if self.guidance_scale is not None and self.labels is None:
            raise ValueError("guidance_scale needs a class; pass labels, an int in 0 .. 9, or drop guidance_scale")
        object.__setattr__(self, "labels", self._numbers())

    def _numbers(self) -> int | tuple[int, ...] | None:
        if self.labels is None:
            return None
        single = isinstance(self.labels, (int, str, np.integer))
        given: Sequence[Any] = [self.labels] if single else self.labels  # type: ignore[assignment]
        listed = isinstance(given, Sequence | np.ndarray) and len(given) > 0
        if not listed or not all(isinstance(label, (int, str, np.integer)) for label in given):
            raise TypeError(f"labels: expected a class, or one for each sample, got {self.labels!r}")
        numbers = tuple(class_label(int(label) if isinstance(label, np.integer) else label) for label in given)
        return numbers[0] if single else numbers

    @property
    def takes_rows(self) -> bool:
        """Whether the samples have classes of their own, so that it must know whose each row is."""
        return isinstance(self.labels, tuple)

    @cached_property
    def _denoiser(self) -> EpsilonModel:
        return EpsilonModel(
            lambda x, t, y: self.model(x, t, class_labels=y, return_dict=False)[0],
            SCHEDULE,
            NO_CLASS if self.labels is None else self.labels,  # type: ignore[arg-type]
            num_classes=NO_CLASS + 1,
            learn_sigma=False,
            guidance_scale=self.guidance_scale,
            null_label=NO_CLASS,
        )

    def __call__(self, x: Tensor, t: Tensor, rows: Rows | None = None) -> Tensor:
        """Predict the noise in each row.

        Args:
            x: Noisy pictures (rows, 1, 28, 28), in the model's dtype; clean pictures lie in [-1, 1].
            t: Integer timesteps in 0 .. 999, one per row, (rows,).
            rows: Which sample each row belongs to; ``solve`` tells it where the samples have classes of their own.

        Returns:
            ``eps``, same shape and dtype as ``x``.

        Raises:
            TypeError: If x or t is no torch tensor.
            ValueError: If the shapes do not fit.
        """
        for name, value in (("x", x), ("t", t)):
            if not isinstance(value, Tensor):
                kind = type(value).__module__.partition(".")[0]
                raise TypeError(f"{name}: this network takes torch tensors, got one of {kind}; use torch.as_tensor")
        if x.shape[1:] != SAMPLE_SHAPE or t.shape != x.shape[:1]:
            raise ValueError(
                f"x must have shape (rows, 1, 28, 28) and t shape (rows,); got {tuple(x.shape)} and {tuple(t.shape)}"
            )
        return self._denoiser(x, t, rows)
