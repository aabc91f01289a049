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

from parasolver_core.arrays import is_array, to_host
from parasolver_core.samplers.terms import Terms, combine
from parasolver_core.validation import check_count

Float64 = NDArray[np.float64]
StepNoise = Callable[[int], Any]  # ``z_i`` of step i; None where it adds none

UNDECIDED = 0.01  # a smaller share of the clean sample in a state: nothing of the sample is decided
_USUAL = 0.25  # data of this size or more, RMS beside noise of 1 at the start, are not small
_TOLD = 0.95  # with so much of the clean sample in a state, the predicted sample is about as large as the sample
_TINY = 1e-24  # squared: data of size 0
_CANCELS = 0.01  # what is left of what a step reads of the network, as a share; published samplers leave over a tenth
_BLIND = 0.1  # with a smaller share, a state is nearly the same whatever the sample will be
_LEFT_OUT: Float64 = np.empty(0)  # stands for a table that follows from the others
_TABLES = "timesteps", "a", "b", "c", "held", "slope", "identity_slope", "signal", "input_scale"


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
        _own_tables(self)
        n = len(self.timesteps)
        check_count("stages", self.stages)
        self._default("held", lambda: np.tile([0.0, 1.0], (n, 1)))
        self._default("slope", lambda: np.zeros(n))
        shapes = {"a": (n, self.a.shape[-1]), "b": (n, self.b.shape[-1]), "c": (n,), "held": (n, 2), "slope": (n,)}
        shapes |= {name: (n,) for name in ("signal", "input_scale") if getattr(self, name) is not None}
        self._check_tables(shapes)
        if np.any(self.held[:, 1] == 0):
            raise ValueError(f"held: q is 0 at step {int(np.argmin(np.abs(self.held[:, 1])))}; expected other values")
        for name in ("a", "b"):
            if np.any(np.triu(getattr(self, name), 1)):
                raise ValueError(f"{name}: step i may use the states and outputs 0..i only (zero where k > i)")
        self._default("identity_slope", self._identity_slope)
        self._check_tables({"identity_slope": (n,)})

    def _default(self, name: str, table: Callable[[], Float64]) -> None:
        """Fill in a table that was left out."""
        if getattr(self, name) is _LEFT_OUT:
            object.__setattr__(self, name, table())

    def _identity_slope(self) -> Float64:
        found = identity_slope(self.a, self.b, self.held[:, 0], self.held[:, 1])
        return np.where(np.isfinite(found), found, self.slope)

    def _check_tables(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Refuse tables of another shape, and what is not finite."""
        n = len(self.timesteps)
        for name, shape in shapes.items():
            table = getattr(self, name)
            if table.shape != shape:
                raise ValueError(f"{name}: expected shape {shape} for {n} timesteps, got {table.shape}")
            if not np.all(np.isfinite(table)):
                row = int(np.argmin(np.isfinite(table).reshape(n, -1).all(axis=1)))
                raise ValueError(
                    f"{name}: coefficient of step {row} (timestep {self.timesteps[row]}) is not finite; the step rule "
                    "is not defined there (for example epsilon prediction where alphas_cumprod is 0)"
                )

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

    def tells_size(self, nodes: Any) -> bool:
        """Whether the prediction at any of these nodes tells how large the sample is; that at the last always does."""
        return bool(self._telling[nodes].any())

    def smallness(self, node: Any, square: Any, state: Any = 0.0) -> Float64:
        """(N,), at most 1: by how much less a state's size tells of the sample's, where the data are small.

        An error in the sample counts relative to the sample, of which a state holds ``alpha``, and noise for the rest.
        For data of the usual size, about that of the noise, states are as large as the sample. Where the data's size s
        is much less, moves are measured by ``s sqrt(alpha^2 + sigma^2)`` in the place of the state's size,
        ``sqrt(alpha^2 s^2 + sigma^2)``.

        Args:
            node: where the predicted sample is known. With much noise it is the mean of the data and tells nothing; but
                of the last node it is what the sample is made of, with a share of the state and of noise. Of one
                sample, or (B,), like the next two; then the result is (B, N), or (N,) where none of them is small.
            square, state: the means of the squares of the prediction, and of the state.
        """
        if self.signal is None:
            return np.ones(len(self))
        telling = self._telling[node]
        if not telling.any():
            return np.ones(len(self))
        at_end = np.asarray(node) == len(self) - 1
        if at_end.any():
            a, b, c = self._last_step
            square = np.where(at_end, b**2 * square + a**2 * state + c**2, square)
        small = telling & (square < _USUAL**2)
        if not small.any():
            return np.ones(len(self))
        square = np.maximum(np.where(small, square, 1.0), _TINY)[..., None]
        return np.sqrt(square / (1 - self.signal**2 * (1 - square)))

    @cached_property
    def _telling(self) -> NDArray[np.bool_]:
        """(N,), at which nodes :meth:`tells_size` is true."""
        if self.signal is None:
            return np.zeros(len(self), dtype=np.bool_)
        return (self.signal >= _TOLD) | (np.arange(len(self)) == len(self) - 1)

    @cached_property
    def _last_step(self) -> tuple[float, float, float]:
        """What the last step takes of the state, of the held quantity and of noise, as if all it reads were alike."""
        a, b = self.held_form
        return float(a[-1].sum()), float(b[-1].sum()), float(self.c[-1])

    @property
    def blind(self) -> int:
        """How many leading nodes, at least 1, have states that hardly depend on the sample: less than a tenth is its.

        Their inputs are known well enough before anything was evaluated, with a predicted sample of 0.
        """
        return 1 if self.signal is None else max(1, int(np.argmin(np.append(self.signal < _BLIND, False))))

    @cached_property
    def held_form(self) -> tuple[Float64, Float64]:
        """``(a, b)`` with the held quantity ``h = p x + q m`` in the place of m, both of width :attr:`memory`."""
        n, width = len(self), self.memory
        a, b = (np.pad(table, ((0, 0), (0, width - table.shape[1]))) for table in (self.a, self.b))
        node = np.maximum(np.arange(n)[:, None] - np.arange(width), 0)  # b is 0 where this would be below 0
        p, q = self.held[node, 0], self.held[node, 1]
        of_outputs = b * p / q
        left = a - of_outputs
        rounding = 4 * np.finfo(np.float64).eps * (np.abs(a) + np.abs(of_outputs))
        return np.where(np.abs(left) <= rounding, 0.0, left), b / q  # else earlier states are read for nothing

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

    def implied_outputs(self, xp: Any, states: Sequence[Any], noise: StepNoise) -> list[Any]:
        """The outputs that would have made the steps from ``x_0`` to ``x_N``: N of them; zero where a step reads none.

        Args:
            xp: array namespace.
            states: ``x_0 .. x_N``.
            noise: of each step.
        """
        outputs: list[Any] = []
        for i in range(len(self)):
            back = [i - k for k in range(min(self.memory, i + 1))]
            xs, ms = [states[j] for j in back], [outputs[j] for j in back[1:]]
            outputs.append(self.implied_output(xp, i, states[i + 1], xs, ms, noise(i)))
        return outputs

    def implied_output(self, xp: Any, i: int, after: Any, x: Sequence[Any], m: Sequence[Any], z: Any = None) -> Any:
        """``m_i`` that makes step i end at ``after``, given ``x = (x_i, ...)`` and ``m = (m_{i-1}, ...)``."""
        nothing = xp.zeros_like(after)
        if self.b[i, 0] == 0:
            return nothing
        return (after - self.advance(i, x, [nothing, *m], z)) * float(1 / self.b[i, 0])

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


def _own_tables(recurrence: Recurrence) -> None:
    """Lists and arrays of other libraries become NumPy's."""
    for name in _TABLES:
        if (given := getattr(recurrence, name)) is _LEFT_OUT or given is None:
            continue
        table = to_host(given) if is_array(given) else np.asarray(given)
        if not np.issubdtype(table.dtype, np.integer) and not np.issubdtype(table.dtype, np.floating):
            raise TypeError(f"{name}: expected real numbers, got dtype {table.dtype}")
        if name in ("a", "b") and table.ndim != 2:
            n = len(recurrence.timesteps)
            raise ValueError(
                f"{name}: expected a column for each node that a step reads, shape ({n}, P), got {table.shape}"
            )
        own = table if name == "timesteps" else table.astype(np.float64, copy=False)
        object.__setattr__(recurrence, name, own)


def identity_slope(a: Float64, b: Float64, p: Float64, q: Float64) -> Float64:
    """The slope of each step's network, equal in terms of the held quantity, that makes the step's Jacobian 1.

    With ``p x + q m`` of slope g at all nodes that a step reads, ``sum_k a + sum_k b (g - p) / q = 1`` gives
    g. NaN where a step does not depend on the network, or what it reads cancels: g would be no one's slope.
    """
    node = np.maximum(np.arange(len(b))[:, None] - np.arange(b.shape[1]), 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        reads = b / q[node]
        g = (1 - a.sum(axis=1) + (b * (p / q)[node]).sum(axis=1)) / reads.sum(axis=1)
    cancels = np.abs(reads.sum(axis=1)) < _CANCELS * np.abs(reads).sum(axis=1)
    return (np.where(cancels, np.nan, g) - p) / q


def trim(table: Float64) -> Float64:
    """Without the trailing columns that are zero everywhere; the first is kept."""
    used = np.flatnonzero(np.any(table, axis=0))
    return table[:, : (used[-1] + 1 if used.size else 1)]
