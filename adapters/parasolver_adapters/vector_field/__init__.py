"""Ordinary differential equations ``y' = f(t, y)`` integrated in parallel over time."""

from parasolver_adapters.vector_field.odeint import SequentialFallbackWarning, integrate, odeint, solve_ivp
from parasolver_adapters.vector_field.result import IVPResult, ODESolution

__all__ = ["IVPResult", "ODESolution", "SequentialFallbackWarning", "integrate", "odeint", "solve_ivp"]
