"""Adapters import their framework only when used, and say what to install where it is not there."""

import os
import pkgutil
import subprocess
import sys
from importlib import import_module

import pytest

import parasolver
import parasolver_core
from parasolver_adapters.extras import NEEDS


def python(code: str) -> list[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # this copy, and not an installed one
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return run.stdout.splitlines()


@pytest.mark.parametrize("package", ["parasolver_adapters", "parasolver"])
def test_importing_the_package_loads_no_framework(package: str) -> None:
    code = f'import sys, {package}\nprint(*({{"torch", "diffusers", "transformers", "timm"}} & set(sys.modules)))'
    assert python(code) == [""]


WITHOUT = """
import importlib, sys
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in LACKING:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

LACKING = {lacking!r}
sys.meta_path.insert(0, Refuse())
for module in {modules!r}:
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(error)
"""


def test_every_adapter_without_torch_says_what_to_install() -> None:
    told = python(WITHOUT.format(lacking=["torch"], modules=[f"parasolver_adapters.{name}" for name in NEEDS]))
    expected = [
        f"parasolver_adapters.{name} needs torch: pip install '.[{extra}]' in a copy of the repository"
        for name, (extra, *_) in NEEDS.items()
    ]
    assert told == expected


def test_the_adapter_of_diffusers_without_diffusers() -> None:
    assert python(WITHOUT.format(lacking=["diffusers"], modules=["parasolver.diffusers"])) == [
        "parasolver_adapters.diffusers needs diffusers: pip install '.[diffusers]' in a copy of the repository"
    ]


def test_no_adapter_is_forgotten() -> None:
    """Without torch, none but those that need NumPy only can be imported, and none fails without a word."""
    code = WITHOUT.format(lacking=["torch"], modules=[]) + (
        "import pkgutil, parasolver_adapters\n"
        "for one in pkgutil.iter_modules(parasolver_adapters.__path__):\n"
        "    try:\n"
        "        importlib.import_module(f'parasolver_adapters.{one.name}')\n"
        "    except ImportError as error:\n"
        "        if 'pip install' not in str(error):\n"
        "            print(one.name, error)\n"
    )
    assert python(code) == []


def test_the_front_door_has_what_the_packages_have() -> None:
    assert parasolver.__all__ == parasolver_core.__all__
    assert parasolver.solve is parasolver_core.solve
    assert parasolver.__version__ == parasolver_core.__version__


SHORT = [one.name for one in pkgutil.iter_modules(parasolver.__path__)]


@pytest.mark.parametrize("module", SHORT)
def test_short_names_are_the_adapters(module: str) -> None:
    pytest.importorskip("diffusers")
    short, long = import_module(f"parasolver.{module}"), import_module(f"parasolver_adapters.{module}")
    assert all(getattr(short, name) is getattr(long, name) for name in short.__all__)
    assert set(getattr(long, "__all__", ())) <= set(short.__all__)
