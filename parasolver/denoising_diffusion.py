"""The objects of denoising-diffusion-pytorch; see :mod:`parasolver_adapters.denoising_diffusion`."""

from parasolver_adapters.denoising_diffusion import (
    parallel_denoising_diffusion,
)

__all__ = [
    "parallel_denoising_diffusion",
]
