"""ParaSolver: parallel-in-time sampling of diffusion and flow models.

The core is framework-agnostic: it imports NumPy and array-api-compat, and works on any array library that the latter
knows. ``solve`` is the front door.
"""

from parasolver_core.calibration import Calibration, calibrate
from parasolver_core.denoiser.clipping import clip_sample
from parasolver_core.denoiser.conformance import DenoiserReport, check_denoiser
from parasolver_core.denoiser.contract import DenoiserFn, Rows, SharedDenoiser
from parasolver_core.errors import (
    ConvergenceError,
    CoupledRowsError,
    NondeterministicDenoiserError,
    NonFiniteError,
    SolverError,
)
from parasolver_core.guesses.memory import Memory
from parasolver_core.methods.method import Method
from parasolver_core.planning.costs import CostTable
from parasolver_core.rounds.acceptance import Acceptance, RelativeMove, RoundView
from parasolver_core.rounds.linearization import Identity, Linearization, Secant
from parasolver_core.samplers.recurrence import Recurrence
from parasolver_core.samplers.schedules import NoiseSchedule
from parasolver_core.samplers.step_rules import DDIM, DDPM, DiffusionRule, DPMSolver, Euler, StepRule
from parasolver_core.sampling import solve, solve_sequential
from parasolver_core.solution import RoundRecord, SampleRecord, Solution, Stats, Status
from parasolver_core.solver.parallel import ParallelIntegralSolver
from parasolver_core.solver.sequential import SequentialSolver

__all__ = [
    "DDIM",
    "DDPM",
    "Acceptance",
    "Calibration",
    "ConvergenceError",
    "CostTable",
    "CoupledRowsError",
    "DPMSolver",
    "DenoiserFn",
    "DenoiserReport",
    "DiffusionRule",
    "Euler",
    "Identity",
    "Linearization",
    "Memory",
    "Method",
    "NoiseSchedule",
    "NonFiniteError",
    "NondeterministicDenoiserError",
    "ParallelIntegralSolver",
    "Recurrence",
    "RelativeMove",
    "RoundRecord",
    "RoundView",
    "Rows",
    "SampleRecord",
    "Secant",
    "SequentialSolver",
    "SharedDenoiser",
    "Solution",
    "SolverError",
    "Stats",
    "Status",
    "StepRule",
    "calibrate",
    "check_denoiser",
    "clip_sample",
    "solve",
    "solve_sequential",
]
__version__ = "0.1.0"


def __dir__() -> list[str]:
    """What completion offers: the names for users, not the folders."""
    return [*__all__, "__version__"]
