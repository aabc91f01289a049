"""Structure heads of the AlphaFold3 kind; see :mod:`parasolver_adapters.structures`."""

from parasolver_adapters.structures import (
    RigidFrames,
    align,
    aligned_distance,
    centred_noise,
    parallel_esmfold2,
    rotations,
    sample_structure,
)

__all__ = [
    "RigidFrames",
    "align",
    "aligned_distance",
    "centred_noise",
    "parallel_esmfold2",
    "rotations",
    "sample_structure",
]
