"""How samples are taken from ``x_T`` to their end: runs, and the methods that begin them."""

from parasolver_core.methods.method import Method

__all__ = ["Method"]
