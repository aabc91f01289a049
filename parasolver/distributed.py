"""Several processes; see :mod:`parasolver_adapters.distributed`."""

from parasolver_adapters.distributed import *  # noqa: F403
from parasolver_adapters.distributed import __all__  # noqa: F401
