"""Checkpoints of DiT; see :mod:`parasolver_adapters.dit`."""

from parasolver_adapters.dit import *  # noqa: F403
from parasolver_adapters.dit import __all__  # noqa: F401
