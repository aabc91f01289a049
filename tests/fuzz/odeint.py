"""Random fields, integrated in parallel and by the plain loop: ``python -m tests.fuzz.odeint --seed 0 --count 1000``.

An answer that is further from the plain loop's than ``LIMITS`` allow, and was not announced, is a failure. Every
problem follows from its seed alone, and each failure is printed with the command that repeats it.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import array_api_compat.numpy
import array_api_compat.torch
import numpy as np
import torch

from parasolver_adapters.vector_field import SequentialFallbackWarning, integrate
from parasolver_adapters.vector_field.methods import EXPONENTIAL, METHODS
from parasolver_core.arrays import to_host
from parasolver_core.errors import NonFiniteError

# Of the local scale: what docs/odeint.md promises, a little more than rounding may show without a word.
LIMITS = {np.dtype(np.float64): 1e-8, np.dtype(np.float32): 3e-5}
# Of the largest element of the state: below, what an element is follows from the rounding of others, by the loop too.
LEAST = {np.dtype(np.float64): 1e-3, np.dtype(np.float32): 1.0}
Field = Callable[[Any, Any], Any]


@dataclass
class Draw:
    """One random problem, from its seed.

    Args:
        seed: gives the same problem each time.
    """

    seed: int
    words: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.torch = bool(self.rng.random() < 0.5)
        self.xp: Any = array_api_compat.torch if self.torch else array_api_compat.numpy
        self.dtype = np.dtype(np.float32 if self.rng.random() < 0.2 else np.float64)
        self.words += ["torch" if self.torch else "numpy", str(self.dtype)]

    def pick(self, *choices: Any) -> Any:
        """One of them."""
        return choices[int(self.rng.integers(len(choices)))]

    def real(self, lo: float, hi: float) -> float:
        """Uniform."""
        return float(self.rng.uniform(lo, hi))

    def log(self, lo: float, hi: float) -> float:
        """Uniform in the logarithm."""
        return float(np.exp(self.rng.uniform(np.log(lo), np.log(hi))))

    def array(self, values: Any) -> Any:
        """In the library and dtype of the problem."""
        host = np.array(values, dtype=self.dtype)
        return torch.from_numpy(host) if self.torch else host

    def normal(self, *shape: int, scale: float = 1.0) -> Any:
        """Gaussian."""
        return self.array(scale * self.rng.standard_normal(shape))


def problem(seed: int) -> tuple[Draw, Field, Any, np.ndarray, dict[str, Any]]:
    """Field, first state, times and options of the problem with that seed."""
    draw = Draw(seed)
    family = draw.pick(*FAMILIES)
    draw.words.append(family.__name__.strip("_"))
    f, shape, end = family(draw)
    y0 = draw.normal(*shape, scale=draw.pick(0.1, 1.0, 1.0, 3.0))
    n = int(draw.log(64, 1500))
    t = np.linspace(0.0, end, n + 1)
    if draw.rng.random() < 0.3:
        t = end * np.cumsum(np.append(0.0, draw.rng.uniform(0.3, 1.0, n)))
        t = t * (end / t[-1])
    if draw.rng.random() < 0.4:
        t = t[::-1].copy() if draw.rng.random() < 0.5 else -t
    method = draw.pick(*METHODS, *EXPONENTIAL)
    options: dict[str, Any] = {"method": method}
    if method in EXPONENTIAL:
        options["linear"] = draw.pick(-0.5, -3.0, 0.3) if draw.rng.random() < 0.7 or not shape else -draw.log(0.1, 30)
    if draw.rng.random() < 0.3:
        options["linearization"] = draw.pick("full", "diagonal", "secant", "identity")
    if draw.rng.random() < 0.2:
        options["window"] = int(draw.log(64, 1000))
    if draw.rng.random() < 0.2:
        options["coarse_steps"] = draw.pick(5, 10, 80)
    if draw.rng.random() < 0.1:
        options["tolerance"] = draw.pick(1e-9, 1e-12)
    draw.words += [f"state {tuple(shape)}", f"{n} steps to {t[-1]:.3g}", *(f"{k}={v}" for k, v in options.items())]
    return draw, f, y0, t, options


def _linear(draw: Draw) -> tuple[Field, tuple[int, ...], float]:
    d = draw.pick(1, 2, 3, 5, 16, 40)
    A = draw.normal(d, d, scale=draw.log(0.1, 30) / np.sqrt(d))
    xp, w = draw.xp, draw.log(0.1, 10)
    return lambda t, y: y @ A + xp.sin(w * t), draw.pick((d,), (3, d)), draw.log(0.2, 10)


def _stiff_scalar(draw: Draw) -> tuple[Field, tuple[int, ...], float]:
    rate, w, xp = draw.log(1, 1000), draw.log(0.1, 10), draw.xp
    return lambda t, y: -rate * (y - xp.sin(w * t)), draw.pick((), (1,), (4,)), draw.log(0.2, 10)


def _stiff_van_der_pol(draw: Draw) -> tuple[Field, tuple[int, ...], float]:
    mu, xp = draw.log(0.3, 100), draw.xp
    return _pair(xp, lambda t, x, v: (v, mu * (1 - x * x) * v - x)), (2,), draw.log(1, 40)


def _lorenz(draw: Draw) -> tuple[Field, tuple[int, ...], float]:
    xp, rho = draw.xp, draw.real(5, 60)

    def f(t: Any, y: Any) -> Any:
        x, v, z = y[..., 0], y[..., 1], y[..., 2]
        return xp.stack([10 * (v - x), x * (rho - z) - v, x * v - z * (8 / 3)], axis=-1)

    return f, draw.pick((3,), (2, 3)), draw.log(0.3, 30)


def _lorenz_96(draw: Draw) -> tuple[Field, tuple[int, ...], float]:
    xp, force = draw.xp, draw.real(2, 12)

    def f(t: Any, y: Any) -> Any:
        r = lambda k: xp.roll(y, k, axis=-1)  # noqa: E731
        return (r(-1) - r(2)) * r(1) - y + force

    return f, (draw.pick(5, 40),), draw.log(0.3, 20)


def _duffing(draw: Draw) -> tuple[Field, tuple[int, ...], float]:
    xp, a, w, c = draw.xp, draw.real(0, 8), draw.real(0.5, 2), draw.real(0, 0.3)
    return _pair(xp, lambda t, x, v: (v, x - x**3 - c * v + a * xp.cos(w * t))), (2,), draw.log(1, 60)


def _regrowth(draw: Draw) -> tuple[Field, tuple[int, ...], float]:
    """Decays to nothing, and grows again."""
    xp, end = draw.xp, draw.log(1, 20)
    a, middle = draw.log(1, 250) * 4 / end**2, end * draw.real(0.3, 0.6)
    g = draw.pick(xp.tanh, xp.sin, lambda y: y * (1 - y), lambda y: y / (1 + y * y), lambda y: y)
    other = draw.rng.random() < 0.5
    if not other:
        return lambda t, y: a * (t - middle) * g(y), draw.pick((), (1,), (3,)), end

    def f(t: Any, y: Any) -> Any:
        return xp.stack([a * (t - middle) * g(y[..., 0]), xp.cos(t + y[..., 1])], axis=-1)

    return f if draw.rng.random() < 0.5 else _pair(xp, lambda t, x, v: (a * (t - middle) * g(x), -v + x)), (2,), end


def _oscillating_rate(draw: Draw) -> tuple[Field, tuple[int, ...], float]:
    xp, a, w = draw.xp, draw.log(1, 300), draw.log(0.3, 6)
    forced = draw.pick(0.0, 1e-6, 1.0)
    return lambda t, y: a * xp.cos(w * t) * y + forced * xp.sin(t), draw.pick((), (2,)), draw.log(1, 15)


def _discontinuous(draw: Draw) -> tuple[Field, tuple[int, ...], float]:
    xp, k, w, level = draw.xp, draw.log(0.3, 30), draw.log(0.3, 10), draw.real(-1, 1)
    kind = draw.pick("sign", "sign of time", "step", "floor", "friction")
    draw.words.append(kind)
    if kind == "sign":
        return lambda t, y: -k * xp.sign(y - level) + xp.cos(w * t), draw.pick((), (3,)), draw.log(0.5, 10)
    if kind == "sign of time":
        return lambda t, y: xp.sign(xp.sin(w * t)) - 0.3 * y, draw.pick((1,), (3,)), draw.log(0.5, 20)
    if kind == "step":
        return lambda t, y: xp.where(y > level, -k * y, 1.0 + 0 * y), draw.pick((1,), (3,)), draw.log(0.5, 10)
    if kind == "floor":
        return lambda t, y: xp.floor(4 * y) / 4 - y + xp.sin(w * t), draw.pick((1,), (3,)), draw.log(0.5, 10)
    return _pair(xp, lambda t, x, v: (v, -x - xp.sign(v) * 0.2 + 0.5 * xp.cos(w * t))), (2,), draw.log(1, 30)


def _clipped_by_norm(draw: Draw) -> tuple[Field, tuple[int, ...], float]:
    """By the norm of all that is given: wrong for a batch over times, once that is large enough."""
    xp, d, limit = draw.xp, draw.pick(2, 3), draw.log(0.5, 100)
    A = draw.normal(d, d, scale=2.0)
    own = draw.rng.random() < 0.5
    draw.words.append("of each state" if own else "of all")

    def f(t: Any, y: Any) -> Any:
        norm = xp.sqrt(xp.sum(y * y, axis=-1, keepdims=True)) if own else xp.sqrt(xp.sum(y * y))
        return (y @ A) / xp.where(norm > limit, norm, limit + 0 * norm)

    return f, (d,), draw.log(0.3, 10)


def _coupled_through_statistics(draw: Draw) -> tuple[Field, tuple[int, ...], float]:
    """A largest value or a mean over all that is given, which matters only beyond a threshold."""
    xp, a = draw.xp, draw.log(0.5, 20)
    over = draw.pick(xp.max, xp.min, xp.mean)
    return lambda t, y: xp.sin(t) - y + xp.where(over(y) > a, over(y), 0 * over(y)), (draw.pick(1, 3),), draw.log(1, 20)


def _blow_up(draw: Draw) -> tuple[Field, tuple[int, ...], float]:
    xp, p, a = draw.xp, draw.pick(2, 3, 4, 5), draw.log(0.01, 1)
    sign = draw.pick(1.0, -1.0)
    return lambda t, y: sign * a * y**p + 0.1 * xp.sin(t), draw.pick((), (1,), (4,)), draw.log(0.3, 10)


def _network(draw: Draw) -> tuple[Field, tuple[int, ...], float]:
    xp, d, h = draw.xp, draw.pick(2, 8, 40), draw.pick(4, 32)
    A, B = (
        draw.normal(d, h, scale=draw.log(0.3, 3) / np.sqrt(d)),
        draw.normal(h, d, scale=draw.log(0.3, 10) / np.sqrt(h)),
    )
    c = draw.normal(h)
    return lambda t, y: xp.tanh(y @ A + c * xp.sin(t)) @ B, draw.pick((d,), (2, d), (2, 2, d)), draw.log(0.3, 10)


def _two_bodies(draw: Draw) -> tuple[Field, tuple[int, ...], float]:
    xp, soft = draw.xp, draw.pick(0.0, 0.1)

    def f(t: Any, y: Any) -> Any:
        cubed = (y[0] ** 2 + y[1] ** 2 + soft) ** 1.5
        return xp.stack([y[2], y[3], -y[0] / cubed, -y[1] / cubed])

    return f, (4,), draw.log(1, 30)


def _scales_apart(draw: Draw) -> tuple[Field, tuple[int, ...], float]:
    """Elements of very different size, coupled or not."""
    xp, small, rate = draw.xp, draw.log(1e-12, 1e-3), draw.real(-8, 8)
    back = draw.pick(0.0, 1.0)
    pair = _pair(xp, lambda t, x, v: (xp.cos(t) - x + back * v, rate * xp.cos(t) * v + small * x * draw_coupling))
    draw_coupling = draw.pick(0.0, 1.0)
    return pair, (2,), draw.log(1, 20)


def _saddle(draw: Draw) -> tuple[Field, tuple[int, ...], float]:
    """Grows in one direction and shrinks in the other, seen from turned axes."""
    xp, a, b, angle = draw.xp, draw.log(0.3, 12), draw.log(0.3, 30), draw.real(0, 3)
    c, s = np.cos(angle), np.sin(angle)
    A = draw.array(np.array([[c, -s], [s, c]]) @ np.diag([a, -b]) @ np.array([[c, s], [-s, c]]))
    w = draw.log(0.3, 5)
    return lambda t, y: (y @ A) * xp.cos(w * t), draw.pick((2,), (3, 2)), draw.log(0.5, 10)


def _pair(xp: Any, f: Callable[[Any, Any, Any], tuple[Any, Any]]) -> Field:
    return lambda t, y: xp.stack(list(f(t, y[0], y[1])))


FAMILIES = (
    _linear,
    _stiff_scalar,
    _stiff_van_der_pol,
    _lorenz,
    _lorenz_96,
    _duffing,
    _regrowth,
    _oscillating_rate,
    _discontinuous,
    _clipped_by_norm,
    _coupled_through_statistics,
    _blow_up,
    _network,
    _two_bodies,
    _scales_apart,
    _saddle,
)


def local_scale(states: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """What a difference is held against: the largest value of each element within a fiftieth of the nodes around.

    But at least ``LEAST`` of the largest element of its sample there, which the last axis holds.
    """
    size, n = np.abs(states), len(states)
    reach = max(n // 50, 1)
    around = np.stack([np.max(size[max(k - reach, 0) : k + reach + 1], axis=0) for k in range(n)])
    whole = np.max(around, axis=-1, keepdims=True) if size.ndim > 1 else around
    return np.maximum(np.maximum(around, LEAST[dtype] * whole), np.finfo(dtype).tiny)


def run(seed: int) -> tuple[str, str]:
    """``("", what)`` where all is well, and what is wrong otherwise; with the problem in words."""
    draw, f, y0, t, options = problem(seed)
    plain = {key: options[key] for key in ("method", "linear") if key in options}
    told = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            want = integrate(f, y0, t, linearization="sequential", throw=False, **plain)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            got = integrate(f, y0, t, throw=False, **options)
        told = "; ".join(str(w.message) for w in seen if issubclass(w.category, SequentialFallbackWarning))
        wrong = compare(got, want, draw, options.get("tolerance", 0.0))
    except NonFiniteError:
        raise
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
        got = None
    words = ", ".join(draw.words)
    if got is not None:
        words += f" [{got.linearization}, {got.batching}, {got.windows} windows, {got.rounds} rounds"
        words += f", {got.sequential_steps} in turn, {got.calls} calls]"
    return wrong, f"{words} {told[:160]}"


def compare(got: Any, want: Any, draw: Draw, tolerance: float) -> str:
    """Why the answer is not the plain loop's."""
    a, b = to_host(got.states).astype(np.float64), to_host(want.states).astype(np.float64)
    if got.success != want.success:
        return f"{got.status} for {want.status}: {got.message}"
    finite: Any = np.isfinite(b).reshape(len(b), -1).all(axis=1) & np.isfinite(a).reshape(len(a), -1).all(axis=1)
    last = len(finite) if finite.all() else int(np.argmin(finite))
    with np.errstate(all="ignore"):
        far = np.abs(a[:last] - b[:last]) / local_scale(b[:last], draw.dtype)
    worst = np.unravel_index(int(np.argmax(far)), far.shape)
    limit = max(LIMITS[draw.dtype], 1e3 * tolerance)  # which is of the largest element of a state
    if not far[worst] <= limit:
        return f"off by {far[worst]:.2g} at node {worst}: {a[worst]!r} for {b[worst]!r}"
    return ""


def main(argv: list[str] | None = None) -> int:
    """Number of failures, at most 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.odeint", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the first problem")
    parser.add_argument("--count", type=int, default=1000, help="problems")
    parser.add_argument("--seconds", type=float, default=600.0, help="stop after so long")
    parser.add_argument("--verbose", action="store_true", help="print every problem")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    started, failures, done = time.monotonic(), 0, 0
    for seed in range(arguments.seed, arguments.seed + arguments.count):
        if time.monotonic() - started > arguments.seconds:
            break
        wrong, words = run(seed)
        done += 1
        failures += bool(wrong)
        if wrong or arguments.verbose:
            print(f"{seed}: {wrong or 'right'}\n    {words}", flush=True)
        if wrong:
            print(f"    python -m tests.fuzz.odeint --seed {seed} --count 1 --verbose", flush=True)
    print(f"odeint: {done} problems from seed {arguments.seed}, {failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
