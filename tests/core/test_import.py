"""The core imports no framework, and works where none is installed."""

import subprocess
import sys
from pathlib import Path

import parasolver_core

ROOT = Path(parasolver_core.__file__).parents[1]

WITHOUT_FRAMEWORKS = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        known = top in sys.stdlib_module_names or top.startswith("_")
        if not known and top not in ("numpy", "array_api_compat", "parasolver_core"):
            raise ModuleNotFoundError(f"{top} is not installed here", name=top)

sys.meta_path.insert(0, Refuse())
import numpy as np
"""


def run(code: str, *options: str) -> str:
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


ALLOWED = {"parasolver_core", "numpy", "array_api_compat"}

LOADED_BY_CORE = """
import sys
before = set(sys.modules)
import parasolver_core
files = [name for name in set(sys.modules) - before if getattr(sys.modules[name], "__spec__", None)]
new = {name.partition(".")[0] for name in files}
print(*sorted(new - set(sys.stdlib_module_names)))
"""


def test_core_loads_only_its_two_dependencies() -> None:
    assert set(run(LOADED_BY_CORE).split()) <= ALLOWED


def test_importing_the_core_loads_no_framework() -> None:
    loaded = run("import sys, parasolver_core, parasolver_core.samplers.step_rules; print(*sys.modules)").split()
    assert "numpy" in loaded
    tops = {name.partition(".")[0] for name in loaded}
    assert not tops & {"torch", "diffusers", "transformers", "scipy", "jax", "tqdm", "parasolver_adapters", "adapters"}


def test_the_core_works_with_only_numpy_and_array_api_compat() -> None:
    code = """
from parasolver_core import DDIM, NoiseSchedule, solve, solve_sequential

schedule = NoiseSchedule.linear()
x_T = np.random.default_rng(0).normal(size=(2, 3))
rule = DDIM(schedule, prediction_type="sample", eta=0.5)
denoiser = lambda x, t: np.tanh(x)
got = solve(denoiser, x_T, schedule.timesteps(10), rule, 4, tolerance=0, seed=1)
expected = solve_sequential(denoiser, x_T, schedule.timesteps(10), rule, seed=1)
print(got.status.value, np.max(np.abs(got.sample - expected.sample)) < 1e-13)
"""
    assert run(WITHOUT_FRAMEWORKS + code).split() == ["converged", "True"]


def test_a_progress_bar_without_tqdm_says_what_to_install() -> None:
    code = """
from parasolver_core import DDIM, NoiseSchedule, solve

schedule = NoiseSchedule.linear()
try:
    solve(lambda x, t: x, np.ones((1, 1)), schedule.timesteps(3), DDIM(schedule), progress=True)
except ImportError as error:
    print(error)
"""
    assert "pip install tqdm" in run(WITHOUT_FRAMEWORKS + code)


def test_completion_offers_the_names_for_users() -> None:
    code = "import parasolver_core as p; print(dir(p) == sorted([*p.__all__, '__version__']))"
    assert run(WITHOUT_FRAMEWORKS + code).strip().endswith("True")


def test_every_public_name_is_there() -> None:
    code = "import parasolver_core as p; print(all(hasattr(p, n) for n in p.__all__))"
    assert run(code).split() == ["True"]


SMALL_SOLVE = """
import numpy as np
from parasolver_core import DPMSolver, NoiseSchedule, NonFiniteError, solve

schedule = NoiseSchedule.linear()
x_T = np.random.default_rng(0).normal(size=(2, 3))
rule = DPMSolver(schedule, prediction_type="sample", stochastic=True)
run = solve(lambda x, t: np.tanh(x), x_T, schedule.timesteps(12), rule, 4, tolerance=1e-3, seed=1)
print(__debug__, run.status.value, run.stats.rounds, run.stats.evaluations, run.sample.tobytes().hex())
for bad in (dict(window=0), dict(tolerance=float("nan")), dict(window=True), dict(save="all")):
    try:
        solve(lambda x, t: x, x_T, schedule.timesteps(12), rule, **bad)
    except (TypeError, ValueError) as error:
        print(type(error).__name__, error)
try:
    solve(lambda x, t: np.full_like(x, np.nan), x_T, schedule.timesteps(12), rule)
except NonFiniteError as error:
    print(error, error.solution.steps)
"""


def test_python_with_optimization_behaves_the_same() -> None:
    plain, optimized = run(SMALL_SOLVE), run(SMALL_SOLVE, "-O")
    assert plain.startswith("True converged")
    assert optimized.startswith("False converged")
    assert plain.removeprefix("True") == optimized.removeprefix("False")
    assert len(plain.splitlines()) == 6
