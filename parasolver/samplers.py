"""Samplers that are functions; see :mod:`parasolver_adapters.samplers`."""

from parasolver_adapters.samplers import *  # noqa: F403
from parasolver_adapters.samplers import __all__  # noqa: F401
