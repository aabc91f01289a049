"""The table that a step rule becomes: equation (1) of the theory page.

A sampler is a causal linear recurrence around a nonlinear network,

    x_{i+1} = sum_k a[i, k] x_{i-k} + sum_k b[i, k] m_{i-k} + c[i] z_i ,      m_i = denoiser(s[i] x_i, t_i) ,

with ``s[i] = 1`` unless the network wants its input scaled.

Sequential sampling, the fill-in of new nodes and the parallel correction all read this one table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parasolver_core.samplers.tables import check_table, identity_slope_or, own_table
from parasolver_core.samplers.terms import Terms, combine
from parasolver_core.validation import check_count

Float64 = NDArray[np.float64]
StepNoise = Callable[[int], Any]  # ``z_i`` of step i; None where it adds none

UNDECIDED = 0.01  # a smaller share of the clean sample in a state: nothing of the sample is decided
_BLIND = 0.1  # with a smaller share, a state is nearly the same whatever the sample will be
_LEFT_OUT: Float64 = np.empty(0)  # stands for a table that follows from the others
_TABLES = "timesteps", "a", "b", "c", "held", "slope", "signal", "input_scale", "identity_slope"


@dataclass(frozen=True, eq=False)
class Recurrence:
    """Coefficients of a sampler on one grid, all float64 on the host; N is the number of network calls.

    Args:
        timesteps: (N,), passed to the denoiser as they are.
        a: (N, P), ``a[i, k]`` multiplies the state ``x_{i-k}``; zero where ``k > i``.
        b: (N, Q), ``b[i, k]`` multiplies the network's output at node ``i - k``; zero where ``k > i``.
        c: (N,), scale of the standard normal noise added by step i; all zero for an ODE sampler.
        held: (N, 2), rows ``(p, q)``: the quantity ``p x_i + q m_i`` is held constant when a node is filled in before
            its first evaluation. For diffusion it is the predicted clean sample. ``q`` is not 0.
        slope: (N,), a first guess of the slope ``dm/dx``, used before a node has been evaluated twice.
        identity_slope: (N,), the slope that makes a step's Jacobian the identity (Picard iteration).
        signal: (N,), within (0, 1], the share of the clean sample in a state of unit size; None for 1. Of diffusion it
            is :func:`~parasolver_core.samplers.sample_form.signal_share`.
        noise_share: within [0, 1], how much of the noise of a full reverse diffusion the steps add:
            :func:`~parasolver_core.samplers.sample_form.added_noise_share`.
        input_scale: (N,), ``s``, what a state is multiplied with before the network sees it; None for 1.
        stages: how many nodes make one step of the sampler, 2 for Heun's method. Outputs are alike, and change little
            from step to step, only at nodes of equal ``i % stages``.
    """

    timesteps: NDArray[Any]
    a: Float64
    b: Float64
    c: Float64
    held: Float64 = field(default_factory=lambda: _LEFT_OUT)
    slope: Float64 = field(default_factory=lambda: _LEFT_OUT)
    identity_slope: Float64 = field(default_factory=lambda: _LEFT_OUT)
    signal: Float64 | None = None
    noise_share: float = 0.0
    input_scale: Float64 | None = None
    stages: int = 1

    def __post_init__(self) -> None:
        for name in _TABLES:
            if (given := getattr(self, name)) is not _LEFT_OUT and given is not None:
                object.__setattr__(self, name, own_table(name, given))
        check_count("stages", self.stages)
        self._default("held", lambda: np.tile([0.0, 1.0], (len(self), 1)))
        self._default("slope", lambda: np.zeros(len(self)))
        self._check(*_TABLES[:-1])
        self._default("identity_slope", lambda: identity_slope_or(self.slope, self.a, self.b, self.held))
        self._check("identity_slope")

    def _default(self, name: str, table: Callable[[], Float64]) -> None:
        """Fill in a table that was left out."""
        if getattr(self, name) is _LEFT_OUT:
            object.__setattr__(self, name, table())

    def _check(self, *names: str) -> None:
        for name in names:
            if (table := getattr(self, name)) is not None:
                check_table(name, table, self.timesteps)

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def memory(self) -> int:
        """How many nodes, the current one included, a step reads."""
        return max(self.a.shape[1], self.b.shape[1])

    @property
    def stochastic(self) -> bool:
        """Whether any step adds noise."""
        return bool(np.any(self.c))

    @property
    def influence(self) -> Float64:
        """(N,), about how large a relative error in a state may become in the sample.

        Without noise, once the flow has made up its mind, ``x = alpha x_0 + ...`` makes an error d in x one of
        d / alpha in the sample. A full reverse diffusion of Gaussian data remembers only alpha of x, but a trained
        network was measured to keep what it has decided, noise or not: an error d stays one of about d. In between,
        the weight falls exponentially with the variance added.
        """
        if self.signal is None:
            return np.ones(len(self))
        return np.maximum(self.signal, UNDECIDED) ** (self.noise_share - 1)

    @property
    def blind(self) -> int:
        """How many leading nodes, at least 1, have states that hardly depend on the sample: less than a tenth is its.

        Their inputs are known well enough before anything was evaluated, with a predicted sample of 0.
        """
        return 1 if self.signal is None else max(1, int(np.argmin(np.append(self.signal < _BLIND, False))))

    def march(
        self, last: int, x: Sequence[Any], m: Sequence[Any], believe: Callable[[int, Any], Any], noise: StepNoise
    ) -> Iterator[tuple[Any, Any]]:
        """States and outputs behind node ``last``, with ``believe(i, x)`` in the place of the network; ends at N.

        Args:
            last, x, m: as i, x and m in :meth:`advance`.
            believe: the output at node i for the state x. At N there is none.
            noise: of each step.
        """
        for i in range(last, len(self)):
            state = self.advance(i, x, m, noise(i))
            output = believe(i + 1, state) if i + 1 < len(self) else None
            yield state, output
            x, m = [state, *x][: self.memory], [output, *m][: self.memory]

    def advance(self, i: int, x: Sequence[Any], m: Sequence[Any], z: Any = None) -> Any:
        """``x_{i+1}`` from ``x = (x_i, x_{i-1}, ...)``, ``m = (m_i, m_{i-1}, ...)`` and the noise ``z_i``.

        The only place where a state is computed from a node's final values, so that sequential and parallel
        sampling agree to the last bit. Terms are added in the order of the table.
        """
        return combine(self.terms().of_step(i, x, m, z))

    def terms(self, dtype: Any = None) -> Terms:
        """What :meth:`advance` adds up, with coefficients of a dtype of NumPy arrays, or numbers."""
        if dtype not in self._terms:
            self._terms[dtype] = Terms(self.a, self.b, self.c, self.held, dtype)
        return self._terms[dtype]

    @cached_property
    def _terms(self) -> dict[Any, Terms]:
        return {}
