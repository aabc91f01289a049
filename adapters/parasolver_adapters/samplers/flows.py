"""A loop for flows with Runge-Kutta methods, to be read and run in parallel like anybody's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from parasolver_adapters.vector_field.methods import METHODS, RungeKutta


def sample_flow(
    model: Callable[..., Tensor],
    x: Tensor,
    times: Tensor | Sequence[float],
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    method: str | RungeKutta = "midpoint",
) -> Tensor:
    """``x' = v(x, t)`` through the given times, with a fixed step between them: the plain loop.

    Args:
        model: ``v(x, t, **extra_args)``; t is (batch,).
        x: the state at the first time, ``(batch, *event)``.
        times: (N + 1,), in either direction.
        extra_args: further arguments of the model.
        callback: called once a step with a dictionary of ``x``, ``i`` and ``t``, at the step's beginning.
        method: "euler", "midpoint", "heun", "heun3", "rk4" (the 3/8 rule) or "rk4_classic", with 1, 2, 2, 3, 4 and 4
            calls a step; or a :class:`~parasolver_adapters.vector_field.methods.RungeKutta`.

    Example::

        x_0 = parallel(sample_flow, window=16)(velocity, noise, torch.linspace(1, 0, 33), method="midpoint")
    """
    rule = METHODS.get(method) if isinstance(method, str) else method
    if not isinstance(rule, RungeKutta):
        known = ", ".join(repr(name) for name, scheme in METHODS.items() if isinstance(scheme, RungeKutta))
        raise ValueError(f"method: expected one of {known}, got {method!r}")
    grid = torch.as_tensor(times, device=x.device)
    grid = grid if grid.is_floating_point() else grid.to(x.dtype)
    for i, (t, following) in enumerate(pairwise(grid)):
        if callback is not None:
            callback({"x": x, "i": i, "t": t})
        h, slopes = following - t, []
        for row in rule.a:
            point = x
            for weight, slope in zip(row, slopes, strict=True):
                point = point + weight * h * slope if weight else point
            slopes.append(model(point, (t + sum(row) * h).expand(len(x)), **(extra_args or {})))
        for weight, slope in zip(rule.b, slopes, strict=True):
            x = x + weight * h * slope if weight else x
    return x
