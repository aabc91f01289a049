"""Checkpoints of guided-diffusion; see :mod:`parasolver_adapters.guided_diffusion`."""

from parasolver_adapters.guided_diffusion import *  # noqa: F403
from parasolver_adapters.guided_diffusion import __all__  # noqa: F401
