"""What each adapter needs, so that one that lacks it says in one line what to install."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from types import ModuleType

NEEDS = {
    "arguments": ("torch", "torch"),
    "bands": ("torch", "torch"),
    "checkpoints": ("torch", "torch"),
    "denoising_diffusion": ("torch", "torch"),
    "diffusers": ("diffusers", "torch", "diffusers"),
    "distributed": ("torch", "torch"),
    "dit": ("timm", "torch"),  # timm itself only where a network is made
    "draws": ("torch", "torch"),
    "embedded": ("demo", "torch", "safetensors", "diffusers"),
    "epsilon_models": ("torch", "torch"),
    "exchange": ("torch", "torch"),
    "gaussian_diffusion": ("torch", "torch"),
    "gaussian_steps": ("torch", "torch"),
    "given": ("torch", "torch"),
    "graphs": ("torch", "torch"),
    "guided_diffusion": ("torch", "torch"),
    "multi_device": ("torch", "torch"),
    "policies": ("diffusers", "torch", "diffusers"),
    "samplers": ("torch", "torch"),
    "stepwise": ("torch", "torch"),
    "structures": ("torch", "torch"),
    "wrapping": ("torch", "torch"),
}
"""Of each module here that needs more than NumPy: the extra to install, and what it imports at once."""


def install(extra: str) -> str:
    """How to install an extra. The package is on no index yet, so from a copy of the repository."""
    return f"pip install '.[{extra}]' in a copy of the repository"


def missing(*modules: str) -> str | None:
    """The first of these that is not installed; nothing is imported."""
    return next((name for name in modules if not _installed(name)), None)


def _installed(name: str) -> bool:
    try:
        return name in sys.modules or find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):
        return False


class _Watch(MetaPathFinder):
    """Asked before a module of this package is looked for; it finds nothing itself."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        package, _, name = fullname.partition(".")
        if package != __package__ or name not in NEEDS:
            return
        extra, *modules = NEEDS[name]
        lacking = missing(*modules)
        if lacking is not None:
            raise ModuleNotFoundError(f"{fullname} needs {lacking}: {install(extra)}", name=lacking)


def watch() -> None:
    """Begin, once."""
    if not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())
