"""The small models that ship with the project; see :mod:`parasolver_adapters.embedded`."""

from parasolver_adapters.embedded import (
    CLASS_NAMES,
    SAMPLE_SHAPE,
    SCHEDULE,
    EmbeddedDenoiser,
    load_embedded_model,
)

__all__ = [
    "CLASS_NAMES",
    "SAMPLE_SHAPE",
    "SCHEDULE",
    "EmbeddedDenoiser",
    "load_embedded_model",
]
