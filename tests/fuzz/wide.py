"""Random fields with many elements a sample, in one axis or two, behind axes of independent samples."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.fuzz.fields import Draw, Made


def _axes(draw: Draw, low: int = 33, high: int = 200) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes of the samples, and of one of them."""
    d = int(draw.log(low, high))
    rest = draw.pick((d,), (d,), (int(draw.pick(3, 6)), max(d // 6, 3)))
    draw.sample_axes = len(rest)
    return draw.pick((), (), (2,), (5,), (2, 2)), rest


def _diffusion(draw: Draw) -> Made:
    """A reaction and diffusion, to the edge of stability; on a ring or a torus."""
    (batch, rest), xp = _axes(draw), draw.xp
    end, w = draw.log(0.3, 20), draw.log(0.3, 5)
    share = draw.real(0.02, 0.55) / (2 * len(rest)) * draw.n / end
    axes = tuple(range(-len(rest), 0))
    reaction = draw.pick(lambda t, y: y - y**3, lambda t, y: y * (1 - y), lambda t, y: xp.sin(w * t) - 0 * y)

    def f(t: Any, y: Any) -> Any:
        neighbours = sum(xp.roll(y, k, axis=axis) - y for axis in axes for k in (-1, 1))
        return share * neighbours + reaction(t, y)

    return f, batch + rest, end


def _advection(draw: Draw) -> Made:
    """Upwind or by central differences, of a wave or of Burgers."""
    (batch, rest), xp = _axes(draw), draw.xp
    end = draw.log(0.3, 20)
    speed = draw.log(0.01, 0.7) * draw.n / end
    central, burgers = draw.rng.random() < 0.4, draw.rng.random() < 0.4

    def f(t: Any, y: Any) -> Any:
        back = xp.roll(y, 1, axis=-1)
        slope = (xp.roll(y, -1, axis=-1) - back) / 2 if central else y - back
        return -speed * slope * (y if burgers else 1.0)

    return f, batch + rest, end


def _oscillators(draw: Draw) -> Made:
    """Of Kuramoto, all to all within a sample; or a chain of Fermi, Pasta and Ulam."""
    xp, k, end = draw.xp, draw.log(0.1, 5), draw.log(1, 30)
    if draw.rng.random() < 0.5:
        batch, d = draw.pick((), (3,)), int(draw.log(20, 300))
        own = draw.normal(d)

        def f(t: Any, y: Any) -> Any:
            c, s = xp.mean(xp.cos(y), axis=-1, keepdims=True), xp.mean(xp.sin(y), axis=-1, keepdims=True)
            return own + k * (s * xp.cos(y) - c * xp.sin(y))

        return f, (*batch, d), end
    d = int(draw.log(12, 100))

    def chain(t: Any, y: Any) -> Any:
        x, v = y[..., :d], y[..., d:]
        right = xp.roll(x, -1, axis=-1) - x
        force = right + 0.3 * right**3
        return xp.concat([v, force - xp.roll(force, 1, axis=-1)], axis=-1)

    return chain, (2 * d,), end


def _random_network(draw: Draw) -> Made:
    """Quiet or chaotic by its gain."""
    xp, d, gain = draw.xp, int(draw.log(30, 300)), draw.log(0.3, 4)
    A, c = draw.normal(d, d, scale=gain / np.sqrt(d)), draw.normal(d, scale=draw.pick(0.0, 1.0))
    return lambda t, y: xp.tanh(y @ A + c * xp.sin(t)) - y, draw.pick((d,), (d,), (2, d), (2, 2, d)), draw.log(0.5, 30)


def _at_the_edge(draw: Draw) -> Made:
    """As many elements as matrices are made for, and one more or less."""
    xp, d = draw.xp, draw.pick(31, 32, 33, 34)
    A, w = draw.normal(d, d, scale=draw.log(0.1, 5) / np.sqrt(d)), draw.log(0.1, 10)
    g = draw.pick(xp.sin, xp.tanh, lambda y: y / (1 + y * y), lambda y: y)
    return lambda t, y: xp.sin(w * t) + g(y) @ A, draw.pick((d,), (2, d)), draw.log(0.2, 20)


def _graph(draw: Draw) -> Made:
    """A few bodies in the plane that attract each other: axes of bodies and coordinates."""
    xp, n, soft = draw.xp, draw.pick(3, 5, 9, 17), draw.log(1e-3, 0.3)
    batch, draw.sample_axes = draw.pick((), (2,)), 2

    def f(t: Any, y: Any) -> Any:
        x, v = y[..., :2], y[..., 2:]
        apart = x[..., None, :, :] - x[..., :, None, :]
        cubed = (xp.sum(apart * apart, axis=-1, keepdims=True) + soft) ** 1.5
        return xp.concat([v, xp.sum(apart / cubed, axis=-2) / n], axis=-1)

    return f, (*batch, n, 4), draw.log(0.3, 6)


def _activator(draw: Draw) -> Made:
    """Two species on a ring, which react: growth of patterns from nearly nothing, wide."""
    xp, d, end = draw.xp, int(draw.log(20, 100)), draw.log(1, 30)
    share = draw.real(0.02, 0.4) * draw.n / end
    a, slow, draw.sample_axes = draw.real(0.5, 4), draw.log(0.01, 1), 2

    def f(t: Any, y: Any) -> Any:
        u, v = y[..., 0, :], y[..., 1, :]
        spread = lambda x: xp.roll(x, 1, axis=-1) + xp.roll(x, -1, axis=-1) - 2 * x  # noqa: E731
        return xp.stack([share * slow * spread(u) + a * u - u**3 - v, share * spread(v) + u - v], axis=-2)

    return f, draw.pick((2, d), (2, d), (3, 2, d)), end


FAMILIES = (_diffusion, _advection, _oscillators, _random_network, _at_the_edge, _graph, _activator)
