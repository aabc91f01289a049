"""The oldest versions that ``pyproject.toml`` allows, as constraints for pip: ``python -m tests.oldest``."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
#: What a user installs; tools of the developers are taken as they come.
EXTRAS = ("torch", "diffusers", "timm", "progress", "demo", "server")


def requirements() -> list[str]:
    """What a user installs, without the project's own extras."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    listed = [*project["dependencies"], *(one for name in EXTRAS for one in project["optional-dependencies"][name])]
    return [one for one in dict.fromkeys(listed) if not one.startswith("parasolver")]


def oldest() -> list[str]:
    """``name==version`` of each lower bound; what has none is a ``ValueError``."""
    bounds = [re.fullmatch(r"([\w-]+)>=([\d.]+)", one) for one in requirements()]
    without = [one for one, bound in zip(requirements(), bounds, strict=True) if bound is None]
    if without:
        raise ValueError(f"pyproject.toml: expected name>=version, got {', '.join(without)}")
    return [f"{bound[1]}=={bound[2]}" for bound in bounds if bound]


if __name__ == "__main__":
    print("\n".join(oldest()))
