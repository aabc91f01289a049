"""The front door: everything of :mod:`parasolver_core`, and the adapters by short names, each imported on its own.

from parasolver import DDIM, NoiseSchedule, solve
from parasolver.diffusers import parallel_sampling
"""

from parasolver_core import *  # noqa: F403
from parasolver_core import __all__, __version__  # noqa: F401
