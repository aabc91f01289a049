"""Ordinary differential equations; see :mod:`parasolver_adapters.vector_field`."""

from parasolver_adapters.vector_field import *  # noqa: F403
from parasolver_adapters.vector_field import __all__  # noqa: F401
