r"""Gradients of a trajectory, without differentiating through the rounds that found it.

At the solution ``y_{n+1} = Phi_n(y_n)``, so the adjoint :math:`\lambda_n = dL/dy_n` obeys a linear recurrence,
backwards,

.. math:: \lambda_n = \Bigl(\frac{\partial \Phi_n}{\partial y}\Bigr)^T \lambda_{n+1} + \frac{\partial L}{\partial y_n} ,

which is solved for all steps at once in the same way as the trajectory; products with the exact Jacobians are one
backward pass through one batched step of all nodes, and so are the gradients with respect to what the field uses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from parasolver_adapters.vector_field.newton import ParallelIntegrator, basin, settled
from parasolver_adapters.vector_field.problem import Problem, integrate_sequentially
from parasolver_adapters.vector_field.rounding import is_rounding, local_scale, reach, relative

_MOST_ROUNDS = 40  # backward passes through one batched step; then the plain loop is differentiated
_MISSED = 16.0  # tolerances, of a node's size, by which the step to it may end elsewhere


def attach(problem: Problem, integrator: ParallelIntegrator, y0: Tensor, states: Tensor) -> Tensor | None:
    """The trajectory ``(N + 1, *state)`` as a function of ``y0`` and of all that the field uses.

    None where one batch of all steps does not end at its nodes: rows act on each other, maybe in steps that were made
    one after another, and what is differentiated would be another field.
    """
    grid, n = problem.grid, len(problem.grid)
    nodes = [0, n // 2, n]
    needed = y0.requires_grad or problem.field(grid.asarray(grid.t[nodes]), states[nodes]).requires_grad
    if not needed or not bool(torch.isfinite(states).all()):
        return states
    start = states[:-1].requires_grad_()
    ends, _past = problem.method.advance(problem.field, grid, 0, n, start, None)
    with torch.no_grad():
        scale = local_scale(problem.xp, problem.flat(states), reach(n))[1:]
        missed = relative(problem.xp, problem.flat(ends - states[1:]), scale)
    if not missed <= _MISSED * max(integrator.tolerance, 64 * torch.finfo(states.dtype).eps):
        return None
    return _Trajectory.apply(y0, ends, _Adjoint(problem, integrator, y0, start, ends, states.detach()))


class _Trajectory(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y0: Tensor, ends: Tensor, adjoint: _Adjoint) -> Tensor:
        ctx.adjoint = adjoint
        return adjoint.states.clone()  # it may be changed in place, and holds this context: no circle of references

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        with torch.no_grad():
            adjoint = ctx.adjoint.solve(g)
        if torch.is_grad_enabled():  # create_graph=True
            adjoint = _OnceOnly.apply(adjoint, g, ctx.adjoint.y0, ctx.adjoint.ends)
        return adjoint[0], adjoint[1:], None


class _OnceOnly(torch.autograd.Function):
    """A gradient that depends on all these and cannot be differentiated.

    PyTorch's own mark, ``once_differentiable``, lets pass what comes of a constant gradient.
    """

    @staticmethod
    def forward(ctx: Any, adjoint: Tensor, *depends_on: Tensor) -> Tensor:
        return adjoint.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        raise RuntimeError(
            "second derivatives of a trajectory found in parallel are not computed; linearization='sequential' has them"
        )


class _Adjoint:
    """The backward recurrence at a trajectory.

    Args:
        problem, integrator: what found the trajectory.
        y0: the first state, with its history.
        start: (N, *state), leaves of the graph of ``ends``.
        ends: (N, *state), the ends of all steps.
        states: (N + 1, *state).
    """

    def __init__(
        self, problem: Problem, integrator: ParallelIntegrator, y0: Tensor, start: Tensor, ends: Tensor, states: Tensor
    ) -> None:
        self.problem, self.integrator, self.y0 = problem, integrator, y0
        self.start, self.ends, self.states = start, ends, states

    def solve(self, g: Tensor) -> Tensor:
        """``dL/dy_0 .. dL/dy_N``, (N + 1, *state), from the loss's own ``g_0 .. g_N``."""
        problem, n = self.problem, len(self.problem.grid)
        surrogate = self.integrator.surrogate(problem, 0, n)
        adjoint = torch.cat([torch.zeros_like(g[:-1]), g[-1:]])
        before = np.inf
        for _ in range(self._rounds_that_pay()):
            rho = problem.flat(self._back(adjoint[1:]) + g[:-1] - adjoint[:-1])
            d = surrogate.propagate_back(rho, self.states)
            adjoint = torch.cat([adjoint[:-1] + problem.unflat(d), adjoint[-1:]])
            scale = self.integrator.scale(problem, adjoint.flip(0)).flip(0)
            size = float(torch.max(d.abs() / scale[:-1]))
            if not np.isfinite(size):
                break
            if settled(size, before, self.integrator.tolerance, basin(problem.xp, g.dtype)):
                return adjoint
            if size > 0.5 * before and self._is_rounding(rho, adjoint, scale[:-1]):
                return adjoint
            surrogate.update(size, size / before)
            before = size
        return self._sequential(g)

    def _is_rounding(self, rho: Tensor, adjoint: Tensor, scale: Tensor) -> bool:
        flat, unflat = self.problem.flat, self.problem.unflat
        return is_rounding(self.problem.xp, rho, scale, lambda factors: flat(self._back(adjoint[1:] * unflat(factors))))

    def _rounds_that_pay(self) -> int:
        """As many as cost what the plain loop does."""
        problem, n = self.problem, len(self.problem.grid)
        loop, a_round = problem.sequential_cost(n), problem.method.stages * problem.field.cost(1, n)
        return min(_MOST_ROUNDS, int(loop / a_round))

    def _back(self, following: Tensor) -> Tensor:
        """``A_n^T l_{n+1}`` for all n."""
        (out,) = torch.autograd.grad(self.ends, self.start, following, retain_graph=True, materialize_grads=True)
        return out

    def _sequential(self, g: Tensor) -> Tensor:
        """By differentiating the plain loop."""
        with torch.enable_grad():
            first = self.states[:1].detach().requires_grad_()
            states = integrate_sequentially(self.problem, 0, len(self.problem.grid), [first])
            return torch.cat(torch.autograd.grad(states, states, list(g.split(1))))
