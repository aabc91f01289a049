"""The array libraries that tests run on, and the way from NumPy into each of them and back."""

import importlib
from types import ModuleType
from typing import Any

import numpy as np

# Namespaces as the core sees them; array_api_strict refuses whatever the array API standard does not promise. JAX,
# which compiles each operation for each shape that it meets, would take over ten minutes: its cases are in
# tests/core/test_jax.py.
LIBRARIES = {
    "numpy": "array_api_compat.numpy",
    "torch": "array_api_compat.torch",
    "array_api_strict": "array_api_strict",
}


def load(library: str) -> ModuleType:
    return importlib.import_module(LIBRARIES[library])


def from_numpy(array: np.ndarray, xp: ModuleType) -> Any:
    """A copy of `array` as an array of `xp`, of the same dtype."""
    return xp.asarray(array, copy=True)


def to_numpy(array: Any) -> np.ndarray:
    """The values of an array of any of the libraries, for comparisons."""
    try:
        return np.from_dlpack(array)
    except BufferError:  # NumPy before 2.1 hands out no read-only arrays in this way
        return np.asarray(array)
