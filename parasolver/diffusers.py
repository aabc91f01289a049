"""Pipelines and schedulers of diffusers; see :mod:`parasolver_adapters.diffusers`."""

from parasolver_adapters.diffusers import *  # noqa: F403
from parasolver_adapters.diffusers import __all__  # noqa: F401
