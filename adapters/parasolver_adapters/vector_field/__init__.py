"""Ordinary differential equations ``y' = f(t, y)`` integrated in parallel over time."""

from parasolver_adapters.vector_field.odeint import (
    IVPResult,
    ODESolution,
    SequentialFallbackWarning,
    integrate,
    odeint,
    solve_ivp,
)

__all__ = ["IVPResult", "ODESolution", "SequentialFallbackWarning", "integrate", "odeint", "solve_ivp"]
