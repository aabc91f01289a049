"""Random fields with kinks, sudden changes, fast times numbers at both ends of their range, hardly any field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.fuzz.fields import Draw, Made


def _kinks(draw: Draw) -> Made:
    xp, a, level, w = draw.xp, draw.log(0.3, 20), draw.real(-0.5, 0.5), draw.log(0.3, 10)
    relu = lambda y: xp.where(y > level, y - level, 0 * y)  # noqa: E731
    g = draw.pick(xp.abs, relu, lambda y: xp.clip(y, -0.3, 0.5), lambda y: xp.abs(y) ** 0.5, lambda y: xp.abs(y) ** 1.5)
    sign = draw.pick(1.0, -1.0)
    return lambda t, y: sign * a * g(y) - a * y + xp.sin(w * t), draw.pick((), (2,), (3, 2), (40,)), draw.log(0.5, 10)


def _switch_in_time(draw: Draw) -> Made:
    """A jump in time, which falls between nodes; another law behind it."""
    xp, end, a = draw.xp, draw.log(1, 20), draw.log(0.3, 5)
    at, rate = end * draw.real(0.05, 0.95), draw.real(-3, 3)
    back = draw.pick(0.0, 1.0)

    def f(t: Any, y: Any) -> Any:
        on = xp.where(xp.abs(t) > at, 1.0 + 0 * t, 0 * t)
        return on * (a * xp.cos(y) + back) + (1 - on) * (rate * y / (1 + y * y))

    return f, draw.pick((), (2,), (40,), (2, 40)), end


def _fast_forcing(draw: Draw) -> Made:
    """Turns several times within a step."""
    xp, end, a = draw.xp, draw.log(0.5, 20), draw.log(0.1, 30)
    w = draw.log(0.3, 30) * draw.n / end
    g = draw.pick(lambda y: -y, xp.sin, lambda y: -(y**3))
    inside = draw.rng.random() < 0.4
    f = (lambda t, y: g(y) * (1 + a * xp.cos(w * t))) if inside else (lambda t, y: g(y) + a * xp.cos(w * t))
    return f, draw.pick((), (1,), (3,), (36,)), end


def _near_stability(draw: Draw) -> Made:
    """A step that hardly forgets, or overshoots: the method's own limit, on both sides."""
    xp, end, w = draw.xp, draw.log(0.5, 20), draw.log(0.3, 5)
    rate = draw.real(0.3, 2.9) * draw.n / end
    g = draw.pick(lambda y: y, xp.sin, lambda y: y + y**3, xp.tanh)
    return lambda t, y: -rate * g(y - xp.sin(w * t)), draw.pick((), (2,), (40,), (2, 34)), end


def _far_growth(draw: Draw) -> Made:
    """By many powers of ten, in one direction or the other."""
    xp, end = draw.xp, draw.log(0.5, 10)
    a = draw.real(-780, 690) / end * draw.pick(1.0, 0.3, 0.1)
    if draw.dtype.itemsize == 4:
        a *= 0.12
    other = draw.pick(0.0, 0.3)
    return lambda t, y: a * y * (1 + other * xp.sin(t)), draw.pick((), (2,), (40,), (2, 3)), end


def _mixed_growth(draw: Draw) -> Made:
    """Each element at its own rate, with or without something that holds them together."""
    xp, end, d = draw.xp, draw.log(0.5, 10), draw.pick(3, 8, 40)
    rates = draw.array(draw.rng.uniform(-60, 40, d) / end)
    back = draw.pick(0.0, 1e-3, 1.0)
    return lambda t, y: rates * y + back * xp.sin(xp.roll(y, 1, axis=-1)), draw.pick((d,), (2, d)), end


def _singular(draw: Draw) -> Made:
    """Passes near a pole."""
    xp, soft, c = draw.xp, draw.log(1e-6, 0.3), draw.real(-1, 1)
    table: tuple[Callable[[Any, Any], Any], ...] = (
        lambda t, y: 1 / ((y - c) ** 2 + soft),
        lambda t, y: 1 / ((t - 1) ** 2 + soft) - y,
        lambda t, y: -y / (xp.abs(y) + soft),
        lambda t, y: xp.log(y * y + soft),
        lambda t, y: 1 / (y - c),
    )
    return draw.pick(*table), draw.pick((), (3,), (40,)), draw.log(0.5, 6)


def _powers(draw: Draw) -> Made:
    """Of integers, which are even or odd."""
    xp, p, a = draw.xp, draw.pick(2, 3, 5, 7, -1, -2), draw.log(0.01, 1)
    sign = draw.pick(1.0, -1.0)
    return lambda t, y: sign * a * y**p + xp.cos(t), draw.pick((), (2,), (2, 3), (40,)), draw.log(0.3, 10)


def _hardly_any(draw: Draw) -> Made:
    """Of the time or the state alone, of neither, or the same array each time."""
    xp, shape = draw.xp, draw.pick((), (2,), (2, 3), (40,), (1, 36))
    cache: dict[Any, Any] = {}

    def held(t: Any, y: Any) -> Any:
        if tuple(y.shape) not in cache:
            cache[tuple(y.shape)] = 0 * y + 0.3
        return cache[tuple(y.shape)]

    table: tuple[Callable[[Any, Any], Any], ...] = (
        lambda t, y: xp.sin(3 * t) + 0 * y,
        lambda t, y: xp.cos(y),
        lambda t, y: 0 * y,
        lambda t, y: 0 * y + 2.5,
        lambda t, y: y,
        lambda t, y: 1e-3 * y,
        lambda t, y: t * t + 0 * y,
        held,
    )
    return draw.pick(*table), shape, draw.log(0.1, 30)


def _with_a_memory(draw: Draw) -> Made:
    """Counts, remembers what it gave for the same arguments, works in place or in one array."""
    xp, kind, a = draw.xp, draw.pick("counts", "remembers", "in place", "one array"), draw.log(0.3, 5)
    draw.words.append(kind)
    counted, known = [0], {}
    written: dict[Any, Any] = {}

    def f(t: Any, y: Any) -> Any:
        counted[0] += 1
        out = xp.sin(a * y + t) - y
        if kind == "remembers" and not draw.torch:  # what is remembered without a gradient has none
            key = (str(t), tuple(y.shape), float(xp.sum(y)), float(xp.max(y)))
            return known.setdefault(key, out)
        if kind == "in place" and draw.writable:
            y *= a
            y += t
            t *= 0
            return y * (xp.cos(y) - 1)
        if kind == "one array" and draw.writable:
            into = written.setdefault(tuple(y.shape), 0 * y)
            into[...] = out
            return into
        return out

    return f, draw.pick((2,), (2, 3), (40,)), draw.log(0.5, 10)


FAMILIES = (
    _kinks,
    _switch_in_time,
    _fast_forcing,
    _near_stability,
    _far_growth,
    _mixed_growth,
    _singular,
    _powers,
    _hardly_any,
    _with_a_memory,
)
