"""The array libraries that tests run on, and the way from NumPy into each of them and back."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np

# Namespaces as the core sees them; array_api_strict refuses whatever the array API standard does not promise.
LIBRARIES = {
    "numpy": "array_api_compat.numpy",
    "torch": "array_api_compat.torch",
    "array_api_strict": "array_api_strict",
    "jax": "jax.numpy",
}


def load(library: str) -> ModuleType:
    return importlib.import_module(LIBRARIES[library])


@contextmanager
def jax_in_64_bits() -> Iterator[None]:
    """JAX with 64-bit arrays, which are off unless a user asks for them."""
    import jax

    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


def from_numpy(array: np.ndarray, xp: ModuleType) -> Any:
    """A copy of `array` as an array of `xp`, of the same dtype."""
    return xp.asarray(array, copy=True)


def to_numpy(array: Any) -> np.ndarray:
    """The values of an array of any of the libraries, for comparisons."""
    try:
        return np.from_dlpack(array)
    except BufferError:  # NumPy before 2.1 hands out no read-only arrays in this way
        return np.asarray(array)


@contextmanager
def on_a_device() -> Iterator[None]:
    """Tensors of a CPU take the path of an accelerator's: they are not worked on as arrays of NumPy."""
    with ExitStack() as patches:
        core = [module for name, module in sys.modules.items() if name.startswith("parasolver_core.")]
        for module in [module for module in core if hasattr(module, "host_view")]:
            patches.enter_context(patch.object(module, "host_view", lambda array: array))
        yield
