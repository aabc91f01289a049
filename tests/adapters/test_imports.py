"""Adapters import their framework only when used."""

import subprocess
import sys

FRAMEWORKS_LOADED = """
import sys, parasolver_adapters
print(*({"torch", "diffusers", "transformers", "timm"} & set(sys.modules)))
"""


def test_importing_the_adapters_loads_no_framework() -> None:
    command = [sys.executable, "-c", FRAMEWORKS_LOADED]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
