"""Several devices in one process; see :mod:`parasolver_adapters.multi_device`."""

from parasolver_adapters.multi_device import (
    MultiDeviceDenoiser,
)

__all__ = [
    "MultiDeviceDenoiser",
]
