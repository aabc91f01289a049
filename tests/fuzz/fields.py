"""Random fields: what the plain loop makes of them, and the parallel one has to."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Field = Callable[[Any, Any], Any]
Made = tuple[Field, tuple[int, ...], float]  # the shape of a state, and where to integrate to


@dataclass
class Draw:
    """One random problem, from its seed.

    Args:
        seed: gives the same problem each time.
        words: what it is.
        sample_axes: how many of the state's last axes are of one sample.
    """

    seed: int
    words: list[str] = field(default_factory=list)
    sample_axes: int = 1

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.library = str(self.rng.choice(["torch", "numpy", "array_api_strict", "jax"], p=[0.48, 0.42, 0.06, 0.04]))
        self.dtype = np.dtype(np.float32 if self.rng.random() < 0.2 else np.float64)
        if self.library == "jax" and (importlib.util.find_spec("jax") is None or self.dtype == np.float64):
            self.library = "numpy"
        self.torch, self.writable = self.library == "torch", self.library in ("torch", "numpy")
        name = f"array_api_compat.{self.library}" if self.writable else self.library
        self.xp: Any = importlib.import_module("jax.numpy" if name == "jax" else name)
        self.n = int(self.log(64, 1500) if self.writable else self.log(64, 300))
        self.words += [self.library, str(self.dtype)]

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
        return torch.from_numpy(host) if self.torch else self.xp.asarray(host)

    def normal(self, *shape: int, scale: float = 1.0) -> Any:
        """Gaussian."""
        return self.array(scale * self.rng.standard_normal(shape))


def _linear(draw: Draw) -> Made:
    d = draw.pick(1, 2, 3, 5, 16, 40)
    A = draw.normal(d, d, scale=draw.log(0.1, 30) / np.sqrt(d))
    xp, w = draw.xp, draw.log(0.1, 10)
    return lambda t, y: y @ A + xp.sin(w * t), draw.pick((d,), (3, d)), draw.log(0.2, 10)


def _stiff_scalar(draw: Draw) -> Made:
    rate, w, xp = draw.log(1, 1000), draw.log(0.1, 10), draw.xp
    return lambda t, y: -rate * (y - xp.sin(w * t)), draw.pick((), (1,), (4,)), draw.log(0.2, 10)


def _stiff_van_der_pol(draw: Draw) -> Made:
    mu, xp = draw.log(0.3, 100), draw.xp
    return _pair(xp, lambda t, x, v: (v, mu * (1 - x * x) * v - x)), (2,), draw.log(1, 40)


def _lorenz(draw: Draw) -> Made:
    xp, rho = draw.xp, draw.real(5, 60)

    def f(t: Any, y: Any) -> Any:
        x, v, z = y[..., 0], y[..., 1], y[..., 2]
        return xp.stack([10 * (v - x), x * (rho - z) - v, x * v - z * (8 / 3)], axis=-1)

    return f, draw.pick((3,), (2, 3)), draw.log(0.3, 30)


def _lorenz_96(draw: Draw) -> Made:
    xp, force = draw.xp, draw.real(2, 12)

    def f(t: Any, y: Any) -> Any:
        r = lambda k: xp.roll(y, k, axis=-1)  # noqa: E731
        return (r(-1) - r(2)) * r(1) - y + force

    return f, (draw.pick(5, 40),), draw.log(0.3, 20)


def _duffing(draw: Draw) -> Made:
    xp, a, w, c = draw.xp, draw.real(0, 8), draw.real(0.5, 2), draw.real(0, 0.3)
    return _pair(xp, lambda t, x, v: (v, x - x**3 - c * v + a * xp.cos(w * t))), (2,), draw.log(1, 60)


def _regrowth(draw: Draw) -> Made:
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


def _oscillating_rate(draw: Draw) -> Made:
    xp, a, w = draw.xp, draw.log(1, 300), draw.log(0.3, 6)
    forced = draw.pick(0.0, 1e-6, 1.0)
    return lambda t, y: a * xp.cos(w * t) * y + forced * xp.sin(t), draw.pick((), (2,)), draw.log(1, 15)


def _discontinuous(draw: Draw) -> Made:
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


def _clipped_by_norm(draw: Draw) -> Made:
    """By the norm of all that is given: wrong for a batch over times, once that is large enough."""
    xp, d, limit = draw.xp, draw.pick(2, 3), draw.log(0.5, 100)
    A = draw.normal(d, d, scale=2.0)
    own = draw.rng.random() < 0.5
    draw.words.append("of each state" if own else "of all")

    def f(t: Any, y: Any) -> Any:
        norm = xp.sqrt(xp.sum(y * y, axis=-1, keepdims=True)) if own else xp.sqrt(xp.sum(y * y))
        return (y @ A) / xp.where(norm > limit, norm, limit + 0 * norm)

    return f, (d,), draw.log(0.3, 10)


def _coupled_through_statistics(draw: Draw) -> Made:
    """A largest value or a mean over all that is given, which matters only beyond a threshold."""
    xp, a = draw.xp, draw.log(0.5, 20)
    over = draw.pick(xp.max, xp.min, xp.mean)
    return lambda t, y: xp.sin(t) - y + xp.where(over(y) > a, over(y), 0 * over(y)), (draw.pick(1, 3),), draw.log(1, 20)


def _blow_up(draw: Draw) -> Made:
    xp, p, a = draw.xp, draw.pick(2, 3, 4, 5), draw.log(0.01, 1)
    sign = draw.pick(1.0, -1.0)
    return lambda t, y: sign * a * y**p + 0.1 * xp.sin(t), draw.pick((), (1,), (4,)), draw.log(0.3, 10)


def _network(draw: Draw) -> Made:
    xp, d, h = draw.xp, draw.pick(2, 8, 40), draw.pick(4, 32)
    A, B = (
        draw.normal(d, h, scale=draw.log(0.3, 3) / np.sqrt(d)),
        draw.normal(h, d, scale=draw.log(0.3, 10) / np.sqrt(h)),
    )
    c = draw.normal(h)
    return lambda t, y: xp.tanh(y @ A + c * xp.sin(t)) @ B, draw.pick((d,), (2, d), (2, 2, d)), draw.log(0.3, 10)


def _two_bodies(draw: Draw) -> Made:
    xp, soft = draw.xp, draw.pick(0.0, 0.1)

    def f(t: Any, y: Any) -> Any:
        cubed = (y[0] ** 2 + y[1] ** 2 + soft) ** 1.5
        return xp.stack([y[2], y[3], -y[0] / cubed, -y[1] / cubed])

    return f, (4,), draw.log(1, 30)


def _scales_apart(draw: Draw) -> Made:
    """Elements of very different size, coupled or not."""
    xp, small, rate = draw.xp, draw.log(1e-12, 1e-3), draw.real(-8, 8)
    back = draw.pick(0.0, 1.0)
    pair = _pair(xp, lambda t, x, v: (xp.cos(t) - x + back * v, rate * xp.cos(t) * v + small * x * draw_coupling))
    draw_coupling = draw.pick(0.0, 1.0)
    return pair, (2,), draw.log(1, 20)


def _saddle(draw: Draw) -> Made:
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
