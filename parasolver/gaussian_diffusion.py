"""The object ``GaussianDiffusion`` of guided-diffusion; see :mod:`parasolver_adapters.gaussian_diffusion`."""

from parasolver_adapters.gaussian_diffusion import (
    UnsupportedDiffusionError,
    parallel_gaussian_diffusion,
)

__all__ = [
    "UnsupportedDiffusionError",
    "parallel_gaussian_diffusion",
]
