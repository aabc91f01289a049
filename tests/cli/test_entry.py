"""Ctrl-C while the command line is still being imported."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("typer")

ROOT = Path(__file__).parents[2]
# Python imports this by itself, before anything of the command.
CUSTOMIZE = """
import os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal: a job in the background ignores it

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPTED_IMPORT"]:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
"""


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("parasolver_cli.main", ["methods"]),
        ("numpy", ["methods"]),
        ("parasolver_core", ["methods"]),
        ("typer", ["--version"]),
        ("rich.console", ["--help"]),
        ("parasolver_cli.cards", ["plan"]),
        ("torch", ["plan"]),
        ("torch", ["demo"]),
        ("torch.nn", ["sample"]),
        ("torch", ["bench"]),
    ],
)
def test_ctrl_c_while_importing_ends_in_one_line(tmp_path: Path, module: str, arguments: list[str]) -> None:
    (tmp_path / "sitecustomize.py").write_text(CUSTOMIZE)
    path = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "adapters")))
    environment = os.environ | {"PYTHONPATH": path, "INTERRUPTED_IMPORT": module, "COLUMNS": "200"}
    ended = subprocess.run(
        [sys.executable, "-m", "parasolver_cli", *arguments],
        capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=100,
    )  # fmt: skip
    assert ended.returncode == 130, ended.stderr
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    *_, line = ended.stderr.splitlines()
    assert line.startswith("parasolver: interrupted; nothing was ")
    assert {one.name for one in tmp_path.iterdir()} <= {"sitecustomize.py", "__pycache__"}


def test_the_installed_command_begins_at_the_entry() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"parasolver": "parasolver_cli.entry:main"}
