"""Random fields in which rows act on each other, or are mistaken for the state's own axes: a slip of who wrote them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.fuzz.fields import Draw, Made


def _over_first_axis(draw: Draw) -> Made:
    """Sums, orders and shares along the first axis: of the state alone, of rows among many."""
    xp, a = draw.xp, draw.log(0.01, 3)
    name = draw.pick("softmax", "cumsum", "sort", "roll", "argmax", "max", "norm")
    draw.words.append(name)
    table: dict[str, Callable[[Any], Any]] = {
        "softmax": lambda y: xp.exp(y) / xp.sum(xp.exp(y), axis=0),
        "cumsum": lambda y: xp.cumulative_sum(y, axis=0),
        "sort": lambda y: xp.sort(y, axis=0),
        "roll": lambda y: xp.roll(y, 1, axis=0),
        "argmax": lambda y: xp.where(y == xp.max(y), 1.0 + 0 * y, 0 * y),
        "max": lambda y: xp.max(y, axis=0) + 0 * y,
        "norm": lambda y: y / (1 + xp.sqrt(xp.sum(y * y, axis=0))),
    }
    of = table[name]
    return lambda t, y: xp.sin(t) - y + a * of(y), draw.pick((3,), (2, 3), (1,), (40,), (2, 20)), draw.log(1, 20)


def _over_all(draw: Draw) -> Made:
    """Statistics of all that is given, beyond a threshold or from a time on; or of the state alone."""
    xp, a, level = draw.xp, draw.log(0.01, 3), draw.real(0.3, 3)
    over = draw.pick(
        xp.mean,
        xp.max,
        xp.std,
        xp.sum,
        lambda y: xp.sort(xp.reshape(y, (-1,)))[(y.size if not draw.torch else y.numel()) // 2],
    )
    end = draw.log(1, 20)
    kind = draw.pick("always", "where large", "from a time on", "beyond its own size", "of the state")
    draw.words.append(kind)
    start = end * draw.real(0.1, 0.9)

    def f(t: Any, y: Any) -> Any:
        if kind == "of the state":
            return xp.sin(t) - y + a * xp.max(y, axis=-1, keepdims=True)
        s = over(y)
        if kind == "where large":
            s = xp.where(xp.abs(y) > level, s + 0 * y, 0 * y)
        if kind == "beyond its own size":
            s = xp.where(s > level, s, 0 * s)
        if kind == "from a time on":
            s = s * xp.where(t > start, 1.0 + 0 * t, 0 * t)
        return xp.sin(t) - y + a * s

    return f, draw.pick((), (1,), (3,), (2, 3), (40,)), end


def _normalised(draw: Draw) -> Made:
    """By the mean and spread of a batch, which the first axis holds: of samples or of rows."""
    xp, a, level = draw.xp, draw.log(0.1, 3), draw.log(0.1, 10)

    def f(t: Any, y: Any) -> Any:
        mean = xp.mean(y, axis=0, keepdims=True)
        spread = xp.sqrt(xp.mean((y - mean) ** 2, axis=0, keepdims=True) + 0.1)
        return a * xp.where(spread > level, (y - mean) / spread, (y - mean) / level + 0 * spread) - y + xp.cos(t)

    return f, draw.pick((4,), (8, 3), (2, 5), (40,), (5, 40)), draw.log(0.5, 20)


def _slip(draw: Draw) -> Made:
    """Meant for one state, and something else for many."""
    xp, a = draw.xp, draw.log(0.1, 3)
    d = draw.pick(2, 3, 5, 36)
    A = draw.normal(d, d, scale=draw.log(0.1, 3) / d**0.5)
    name = draw.pick("first", "transposed", "dot", "mean", "outer", "time", "last", "length")
    draw.words.append(name)
    table: dict[str, Callable[[Any, Any], Any]] = {
        "first": lambda t, y: xp.sin(y[0, ...]) - a * y,
        "transposed": lambda t, y: A @ y,
        "dot": lambda t, y: -a * y * xp.sum(y * y),
        "mean": lambda t, y: a * (xp.mean(y) - y),
        "outer": lambda t, y: xp.cos(t) - y * y[0, ...] * a,
        "time": lambda t, y: xp.sin(a * t) * y[..., 0:1] - y,
        "last": lambda t, y: xp.tanh(y[-1, ...]) - a * y,
        "length": lambda t, y: -y / xp.sqrt(1 + xp.sum(y * y)),
    }
    return table[name], draw.pick((d,), (d,), (d, d)), draw.log(0.5, 10)


def _samples_late(draw: Draw) -> Made:
    """Samples that act on each other only once they are large, or from a time on: none do at the beginning."""
    xp, a, level = draw.xp, draw.log(0.3, 20), draw.log(0.5, 5)
    end = draw.log(1, 20)
    start, by_time = end * draw.real(0.05, 0.6), draw.rng.random() < 0.5
    axis = -2

    def f(t: Any, y: Any) -> Any:
        mean = xp.mean(y, axis=axis, keepdims=True)
        on = xp.where(t > start, 1.0 + 0 * t, 0 * t) if by_time else xp.where(xp.abs(mean) > level, 1.0, 0.0 * mean)
        return xp.sin(t + y) + a * on * xp.sin(mean - 2 * xp.roll(y, 1, axis=axis))

    return f, draw.pick((3, 2), (8, 1), (5, 3), (20, 2)), end


FAMILIES = (_over_first_axis, _over_all, _normalised, _slip, _samples_late)
