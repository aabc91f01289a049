"""Random programs for `solve`: step rules, networks, inputs and choices, each drawn from one number."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any

import array_api_compat
import numpy as np

from parasolver_core import DDIM, DDPM, DPMSolver, Euler, Identity, Method, NoiseSchedule, Recurrence, Secant, StepRule
from parasolver_core.methods.anderson import Anderson
from parasolver_core.rounds.acceptance import RelativeMove
from parasolver_core.rounds.margins import Margins
from parasolver_core.samplers.tables import identity_slope
from tests.arrays import load
from tests.core.problems import Mixture

CHOICES = 4  # programs of one problem, whose plain loops are run once
KARRAS = (NoiseSchedule.karras(0.02, 10.0), NoiseSchedule.karras(0.3, 80.0, 5.0))
FLOW = (NoiseSchedule.flow_matching(), NoiseSchedule.flow_matching(3.0))
TABLES = (NoiseSchedule.linear(), NoiseSchedule.scaled_linear(), NoiseSchedule.squared_cosine())
DTYPES = {
    "numpy": ("float64", "float64", "float32", "float32", "float16"),
    "torch": ("float64", "float32", "float32", "float16", "bfloat16"),
    "array_api_strict": ("float64", "float32"),
}
Rng = np.random.Generator
Formula = Callable[[Any, Any, Any, Any, float], Any]


class NetworkError(Exception):
    """Raised by a network that fails."""


@dataclass(frozen=True)
class Tables(StepRule):
    """A sampler without a schedule: the table itself."""

    recurrence_: Recurrence

    def recurrence(self, timesteps: np.ndarray) -> Recurrence:
        return self.recurrence_


# Networks: formulas of rows x, a column of times within [0, 1], a column of conditions and a number g of order 1.


@dataclass(frozen=True)
class Kind:
    """A formula; whether its batches give the bits of single rows, it is continuous, and it is as tame as a network."""

    formula: Formula
    exact: bool = True
    smooth: bool = True
    tame: bool = False


def _rows_mean(xp: Any, x: Any) -> Any:
    mean = xp.mean(xp.reshape(x, (x.shape[0], -1)), axis=1)
    return xp.reshape(mean, (-1,) + (1,) * (x.ndim - 1))


def _mixed(xp: Any, x: Any, g: float) -> Any:
    """A matrix of fixed numbers between two saturations, as in a network of two layers."""
    flat = xp.reshape(x, (x.shape[0], -1))
    size = flat.shape[1]
    weights = np.cos(np.arange(size)[:, None] * 2.1 + np.arange(size) * 1.3) * (g / np.sqrt(size))
    return xp.reshape(xp.matmul(xp.tanh(flat), xp.asarray(weights, dtype=x.dtype)), x.shape)


KINDS: dict[str, Kind] = {
    "rational": Kind(lambda xp, x, t, c, g: g * x / (1 + x * x) + t + c, tame=True),
    "matrix": Kind(lambda xp, x, t, c, g: _mixed(xp, x, g) + t + c, exact=False, tame=True),
    "mean": Kind(lambda xp, x, t, c, g: g * (x - _rows_mean(xp, x)) / (1 + t) + c, exact=False, tame=True),
    "linear": Kind(lambda xp, x, t, c, g: 2 * g * x + c),
    "expansive": Kind(lambda xp, x, t, c, g: 4 * g * x / (1 + t) + c),
    "cubic": Kind(lambda xp, x, t, c, g: g * x - x * x * x + c),
    "kink": Kind(lambda xp, x, t, c, g: g * xp.abs(x - 0.1) + c),
    "sign": Kind(lambda xp, x, t, c, g: xp.where(x > 0.05, xp.ones_like(x), -xp.ones_like(x)) * g + c, smooth=False),
    "stairs": Kind(lambda xp, x, t, c, g: xp.floor(x * 3.0) * (g / 3) + t, smooth=False),
    "saw": Kind(lambda xp, x, t, c, g: g * (x - xp.floor(x)) + c, smooth=False),
    "early and late": Kind(lambda xp, x, t, c, g: xp.where(t > 0.5, g * x / (1 + x * x), -g * x + c) + 0 * x),
    "constant": Kind(lambda xp, x, t, c, g: xp.zeros_like(x) + g + t),
    "nothing": Kind(lambda xp, x, t, c, g: xp.zeros_like(x)),
    "mixture": Kind(lambda xp, x, t, c, g: g * xp.tanh(x), exact=False, tame=True),
    "noisy in time": Kind(lambda xp, x, t, c, g: g * x * (t * 37.0 - xp.floor(t * 37.0))),
}


@dataclass
class Network:
    """A formula as a denoiser, with what a test has to know of its calls.

    Args:
        scale: multiplies the output.
        conditions: one number a sample, for a network that takes rows; else None.
        mixture: the exact denoiser of two clouds of data in the place of the formula.
        outside: beyond this size of an element the output is `hole`; None: nowhere.
        hole: NaN or an infinity.
        hole_at: a time at which the output is `hole` for every row; None: never.
        reuses: it writes into its own buffer, and into its input.
        fails_in: the call in which it raises; 0: never.
    """

    kind: Kind
    g: float
    time_scale: float
    scale: float = 1.0
    conditions: np.ndarray | None = None
    mixture: Mixture | None = None
    outside: float | None = None
    hole: float = float("nan")
    hole_at: float | None = None
    reuses: bool = False
    fails_in: int = 0
    calls: list[int] = field(default_factory=list)
    holes: int = 0

    @property
    def takes_rows(self) -> bool:
        return self.conditions is not None

    def __call__(self, x: Any, t: Any, rows: Any = None) -> Any:
        self.calls.append(x.shape[0])
        if len(self.calls) == self.fails_in:
            raise NetworkError("the network's own error")
        samples = rows.samples if rows is not None else np.zeros(x.shape[0], dtype=int)
        m = self.at(x, t, samples)
        xp: Any = array_api_compat.array_namespace(x)
        self.holes += int(not bool(xp.all(xp.isfinite(m))))
        if self.reuses:
            x[...] = m
            return x
        return m

    def at(self, x: Any, t: Any, samples: np.ndarray) -> Any:
        """The output for rows of the given samples."""
        xp: Any = array_api_compat.array_namespace(x)
        column: Any = (-1,) + (1,) * (x.ndim - 1)
        column_t, c = xp.reshape(t, column), 0.0
        if self.conditions is not None:
            c = xp.reshape(xp.asarray(self.conditions[samples], dtype=x.dtype), column)
        with np.errstate(all="ignore"):
            if self.mixture is None:
                m = self.kind.formula(xp, x, xp.astype(column_t, x.dtype) * self.time_scale, c, self.g) * self.scale
            else:
                m = self.mixture(x, t) + c
            m = xp.astype(m, x.dtype)
            hole = xp.full_like(m, self.hole)
            if self.outside is not None:
                m = xp.where(xp.abs(x) > self.outside, hole, m)
            if self.hole_at is not None:
                now = xp.abs(xp.astype(column_t, xp.float64) - self.hole_at) < 1e-6 * (1 + abs(self.hole_at))
                m = xp.where(now & (x == x), hole, m)
        return m


@dataclass
class Program:
    """One call of `solve`; `options` are the solver's choices, and `told` says what was drawn."""

    seed: int
    xp: ModuleType
    dtype: str
    rule: StepRule
    grid: np.ndarray
    x_T: Any
    network: Network
    window: int
    tolerance: float
    method: str | Method
    noise: dict[str, Any]
    options: dict[str, Any]
    reach: float | None
    start: tuple[str, float] | None
    stop_after: int
    tame: bool

    @cached_property
    def recurrence(self) -> Recurrence:
        return self.rule.recurrence(self.grid)

    @property
    def told(self) -> str:
        kind = next(name for name, kind in KINDS.items() if kind is self.network.kind)
        data = None if self.network.mixture is None else self.network.mixture.mean
        rule = "a table" if isinstance(self.rule, Tables) else repr(self.rule)
        return (
            f"{self.xp.__name__.split('.')[-1]} {self.dtype} {tuple(self.x_T.shape)}, {len(self.grid)} steps of "
            f"{rule}, {kind!r} g={self.network.g:.2f} data {data} scale={self.network.scale:g} reach={self.reach}, "
            f"window {self.window}, tolerance {self.tolerance:g}, {self.method}, start {self.start}, {self.options}"
        )


def problem_of(seed: int) -> int:
    """The number of a program's problem: sampler, network, x_T and noise, which ``CHOICES`` programs share."""
    return seed // CHOICES


def program(seed: int) -> Program:
    """The program of that number: a problem, and choices for it."""
    rng = np.random.default_rng(problem_of(seed))
    library = str(rng.choice(["numpy", "torch", "array_api_strict"], p=[0.62, 0.34, 0.04]))
    xp, dtype = load(library), str(rng.choice(DTYPES[library]))
    n = int(rng.choice([rng.integers(1, 6), rng.integers(3, 24), rng.integers(20, 90)], p=[0.25, 0.6, 0.15]))
    from_table = bool(rng.random() < 0.45)
    rule, grid, size = _random_table(rng, n) if from_table else _sampler(rng, n)
    batch = int(rng.choice([1, 1, 2, 3, 5]))
    event = [(), (1,), (4,), (2, 3), (16,)][int(rng.choice(5, p=[0.05, 0.15, 0.4, 0.3, 0.1]))]
    half = dtype in ("float16", "bfloat16")
    values = rng.standard_normal((batch, *event)) * size * float(rng.choice([1, 1, 1, 0.01, 30 if half else 1e3]))
    network = _network(rng, grid, batch, half, dtype)
    if not from_table and not half and rng.random() < 0.25:
        network.kind, of, data = KINDS["mixture"], rule, float(rng.choice([0.8, 0.8, 0.1, 0.01]))
        kind = of.prediction_type or of.schedule.default_prediction_type  # type: ignore[attr-defined]
        network.mixture, network.scale = Mixture(of.schedule, kind, data, data / 4), 1.0  # type: ignore[attr-defined]
    noise, reach, x_T = (
        _noise(rng, xp, dtype, n, batch, event),
        _reach(rng),
        xp.asarray(values, dtype=getattr(xp, dtype)),
    )
    rng = np.random.default_rng([seed, 1])
    network.reuses = bool(rng.random() < 0.1)
    network.fails_in = int(rng.integers(1, len(grid) + 1)) if rng.random() < 0.04 else 0
    tolerance = float(rng.choice([0, 0, 1e-4, 1e-3, 1e-2, 5e-2, 0.3]))
    window = int(rng.choice([1, rng.integers(2, 6), rng.integers(2, n + 5), rng.integers(5, 20), n]))
    return Program(
        seed, xp, dtype, rule, grid, x_T, network, max(window, 1), tolerance, _method(rng), noise,
        _options(rng, n, batch, library), reach, _start(rng),
        int(rng.integers(1, n + 1)) if rng.random() < 0.05 else 0, network.kind.tame and not from_table,
    )  # fmt: skip


def _network(rng: Rng, grid: np.ndarray, batch: int, half: bool, dtype: str) -> Network:
    name = str(rng.choice(list(KINDS))) if rng.random() < 0.6 else str(rng.choice(["rational", "matrix", "mean"]))
    network = Network(KINDS[name], float(rng.uniform(-1.2, 1.2)), 1 / max(float(np.abs(grid).max()), 1e-9))
    if rng.random() < 0.1:
        wild = [1e-30, 1e-8, 1e8, 1e19 if dtype == "float32" else 1e90]
        network.scale = float(rng.choice([1e-3, 1e3] if half else wild))
    if rng.random() < 0.2:
        network.conditions = rng.standard_normal(batch)
    if rng.random() < 0.05:
        network.hole_at, network.hole = float(rng.choice(grid)), float(rng.choice([np.nan, np.inf]))
    return network


def _reach(rng: Rng) -> float | None:
    """How many times the trajectory's largest element the network is good for; None: everywhere."""
    return float(rng.choice([1.3, 1.5, 2.0, 4.0])) if rng.random() < 0.25 else None


def _start(rng: Rng) -> tuple[str, float] | None:
    """A warm start: the trajectory itself, changed by a share, or anything."""
    if rng.random() > 0.15:
        return None
    return [("near", 0.0), ("near", 0.01), ("near", 0.3), ("any", 1.0), ("any", 1e4)][int(rng.integers(5))]


def _method(rng: Rng) -> str | Method:
    if rng.random() < 0.8:
        names = ["secant", "identity", "parasolver", "paradigms", "parataa", "sequential"]
        return str(rng.choice(names, p=[0.5, 0.15, 0.1, 0.08, 0.12, 0.05]))
    if rng.random() < 0.25:
        order = None if rng.random() < 0.3 else int(rng.integers(1, 9))
        return Anderson(order=order, memory=int(rng.integers(0, 4)), ridge=float(rng.choice([1e-6, 1e-3, 1.0])))
    return Method(
        linearization=Secant() if rng.random() < 0.6 else Identity(),
        acceptance=RelativeMove(Margins().times(float(rng.choice([0.2, 0.5])))),
        spread=bool(rng.random() < 0.5),
        fill=str(rng.choice(["held", "evaluated", "copy"])),  # type: ignore[arg-type]
    )


def _noise(rng: Rng, xp: Any, dtype: str, n: int, batch: int, event: tuple[int, ...]) -> dict[str, Any]:
    kind, values = rng.integers(6), rng.standard_normal((n, batch, *event))
    if kind == 0:
        return {"seed": int(rng.integers(2**40))}
    if kind == 1:
        return {"seed": [int(one) for one in rng.integers(2**40, size=batch)]}
    if kind == 2:
        return {"noise": xp.asarray(values, dtype=getattr(xp, dtype))}
    if kind == 3:
        return {"noise": lambda step, sample: values[step, sample]}
    if kind == 4:
        buffer = np.zeros(event)

        def reused(step: int, sample: int) -> np.ndarray:
            buffer[...] = values[step, sample]
            return buffer

        return {"noise": reused}
    return {}


def _options(rng: Rng, n: int, batch: int, library: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if rng.random() < 0.2:
        options["max_rows"] = int(rng.integers(1, 12))
    if rng.random() < 0.1:
        options["buckets"] = tuple(int(one) for one in rng.integers(1, 20, size=2))
    if rng.random() < 0.1:
        options["warmup_steps"] = int(rng.integers(0, n + 2))
    if rng.random() < 0.1:
        options["max_rounds"] = int(rng.integers(1, n + 1))
    if rng.random() < 0.2:
        options["check"] = False
    if library == "torch" and rng.random() < 0.1:
        options["state_device"] = "cpu"
    return options


# Step rules


def _random_table(rng: Rng, n: int) -> tuple[StepRule, np.ndarray, float]:
    """Linear tables of any bandwidth, from contracting to expanding, whose steps may leave the network out."""
    P, Q = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    a, b = rng.standard_normal((n, P)) * 0.3, rng.standard_normal((n, Q)) * float(rng.choice([0.05, 0.3, 1.0]))
    a[:, 0] += rng.uniform(0.4, 1.1)
    c = np.abs(rng.standard_normal(n)) * 0.3 if rng.random() < 0.4 else np.zeros(n)
    if rng.random() < 0.2:
        b[rng.random(n) < 0.3] = 0.0
        c[rng.random(n) < 0.3] = 0.0
    for table in (a, b):
        table[np.arange(table.shape[1]) > np.arange(n)[:, None]] = 0.0
    held = np.stack([rng.standard_normal(n), rng.choice([-1, 1], n) * rng.uniform(0.2, 2, n)], axis=1)
    if rng.random() < 0.3:
        held = np.tile([0.0, 1.0], (n, 1))
    identity = identity_slope(a, b, held[:, 0], held[:, 1])
    signal = np.sort(rng.uniform(0.005, 1.0, n)) if rng.random() < 0.5 else None
    if rng.random() < 0.5:
        grid = np.sort(rng.choice(1000, size=n, replace=False))[::-1].copy()
    else:
        grid = np.sort(rng.uniform(0.0, 1.0, n))[:: int(rng.choice([-1, 1]))].copy()
    recurrence = Recurrence(
        timesteps=grid, a=a, b=b, c=c, held=held,
        slope=rng.standard_normal(n) * 0.5,
        identity_slope=np.where(np.isfinite(identity), identity, 0.0),
        signal=signal,
        noise_share=float(rng.uniform()) if np.any(c) else 0.0,
        input_scale=rng.uniform(0.2, 2.0, n) if rng.random() < 0.15 else None,
        stages=int(rng.choice([1, 1, 1, 2, 3])),
    )  # fmt: skip
    return Tables(recurrence), grid, 1.0


def _sampler(rng: Rng, n: int) -> tuple[StepRule, np.ndarray, float]:
    """A published sampler on a schedule; its timesteps and the size of x_T."""
    path = rng.integers(3)
    if path == 0:
        schedule: Any = TABLES[int(rng.integers(len(TABLES)))]
        grid = schedule.timesteps(n, str(rng.choice(["trailing", "leading", "linspace"])))
        kinds, size = ["epsilon", "sample", "v_prediction"], 1.0
    elif path == 1:
        schedule = KARRAS[int(rng.integers(len(KARRAS)))]
        grid, kinds, size = schedule.timesteps(n), ["epsilon", "sample", "v_prediction"], schedule.sigma_max
    else:
        schedule = FLOW[int(rng.integers(len(FLOW)))]
        grid, kinds, size = schedule.timesteps(n), ["sample", "flow", "v_prediction"], 1.0
    kind: Any = str(rng.choice(kinds))
    rules: list[Callable[[], StepRule]] = [
        lambda: DDIM(schedule, prediction_type=kind, eta=float(rng.choice([0.0, 0.0, 0.4, 1.0]))),
        lambda: DDPM(schedule, prediction_type=kind, variance_type=str(rng.choice(["fixed_small", "fixed_large"]))),  # type: ignore[arg-type]
        lambda: DPMSolver(
            schedule, prediction_type=kind, order=int(rng.integers(1, 4)), stochastic=bool(rng.random() < 0.3),
            solver_type=str(rng.choice(["midpoint", "heun"])), lower_order_final=bool(rng.random() < 0.7),  # type: ignore[arg-type]
        ),
        lambda: Euler(schedule, prediction_type=kind),
    ]  # fmt: skip
    for _ in range(20):  # pure noise at the first timestep is not defined for every rule
        rule = rules[int(rng.integers(4))]()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rule.recurrence(grid)
        except ValueError:
            continue
        return rule, grid, size
    return _random_table(rng, n)
