"""Any ``model(x, t, **conditions)``; see :mod:`parasolver_adapters.wrapping`."""

from parasolver_adapters.wrapping import (
    ModelDenoiser,
    k_diffusion_denoiser,
)

__all__ = [
    "ModelDenoiser",
    "k_diffusion_denoiser",
]
