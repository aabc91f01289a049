"""Importing the core loads NumPy and array-api-compat, and nothing else from outside the standard library."""

import subprocess
import sys

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
    run = subprocess.run([sys.executable, "-c", LOADED_BY_CORE], capture_output=True, text=True, check=True)
    assert set(run.stdout.split()) <= ALLOWED
