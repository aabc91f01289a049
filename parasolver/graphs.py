"""Networks as CUDA graphs; see :mod:`parasolver_adapters.graphs`."""

from parasolver_adapters.graphs import GraphCaptureWarning, GraphedDenoiser, captured

__all__ = ["GraphCaptureWarning", "GraphedDenoiser", "captured"]
