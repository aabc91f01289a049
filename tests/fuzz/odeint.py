"""Random fields, integrated in parallel and by the plain loop: ``python -m tests.fuzz.odeint --seed 0 --count 1000``.

An answer or a gradient that is further from the plain loop's than ``LIMITS`` allow, and was not announced, is a
failure. Every problem follows from its seed alone, and each failure is printed with the command that repeats it.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from parasolver_adapters.vector_field import SequentialFallbackWarning, integrate
from parasolver_adapters.vector_field.jacobian import LARGEST_DENSE
from parasolver_adapters.vector_field.methods import EXPONENTIAL, METHODS
from parasolver_core.arrays import to_host
from parasolver_core.errors import NonFiniteError
from tests.fuzz import couplings, extremes, fields, wide
from tests.fuzz.fields import Draw, Field

# Of the local scale: what docs/odeint.md promises, a little more than rounding may show without a word.
LIMITS = {np.dtype(np.float64): 1e-8, np.dtype(np.float32): 3e-5}
# Of the largest element of the state: below, what an element is follows from the rounding of others, by the loop too.
LEAST = {np.dtype(np.float64): 1e-3, np.dtype(np.float32): 1.0}
FAMILIES = (*fields.FAMILIES, *wide.FAMILIES, *couplings.FAMILIES, *extremes.FAMILIES)
RUNGE_KUTTA = [name for name in METHODS if not name.startswith("ab")]
SAME_FOR_THE_LOOP = ("method", "linear", "substeps")


@dataclass
class Drawn:
    """A problem.

    Args:
        draw: its words and library.
        f, y0, t, options: arguments of ``integrate``.
        gradients: whether these are compared.
    """

    draw: Draw
    f: Field
    y0: Any
    t: np.ndarray
    options: dict[str, Any]
    gradients: bool


def problem(seed: int) -> Drawn:
    """The problem with that seed."""
    draw = Draw(seed)
    few = draw.rng.random() < 0.08
    if few:
        draw.n = int(draw.log(8, 64))
    family = draw.pick(*FAMILIES)
    draw.words.append(family.__name__.strip("_"))
    f, shape, end = family(draw)
    draw.sample_axes = len(shape) if family in couplings.FAMILIES else min(draw.sample_axes, len(shape))
    y0 = draw.normal(*shape, scale=draw.pick(0.1, 1.0, 1.0, 3.0))
    if draw.rng.random() < 0.06:
        y0 = y0 * draw.pick(*((1e-200, 1e-30, 1e30, 1e150) if draw.dtype.itemsize == 8 else (1e-30, 1e-12, 1e12)))
        draw.words.append(f"y0 up to {np.max(np.abs(to_host(y0))):.1g}")
    if draw.rng.random() < 0.05:
        y0 = y0 * draw.array(10.0 ** draw.rng.uniform(-12, 3, shape))
        draw.words.append("y0 of all sizes")
    t, options = times(draw, end), choices(draw, shape, few)
    words = [f"state {tuple(shape)}", f"{len(t) - 1} steps to {t[-1]:.3g}", *(f"{k}={v}" for k, v in options.items())]
    gradients = draw.torch and draw.rng.random() < 0.3 and "one array" not in draw.words
    draw.words += words + ["gradients"] * gradients
    return Drawn(draw, f, y0, t, options, gradients)


def times(draw: Draw, end: float) -> np.ndarray:
    """Of equal or unequal steps, forwards, backwards or below zero."""
    n, t = draw.n, np.linspace(0.0, end, draw.n + 1)
    kind = draw.rng.random()
    if kind < 0.3:
        widths = draw.rng.uniform(0.3, 1.0, n)
        if kind < 0.1:
            widths = np.exp(draw.rng.uniform(np.log(1e-4), 0, n)) if kind < 0.05 else np.geomspace(1e-4, 1, n)
        t = np.cumsum(np.append(0.0, widths))
        t = t * (end / t[-1])
    if draw.rng.random() < 0.4:
        t = t[::-1].copy() if draw.rng.random() < 0.5 else -t
    return t


def choices(draw: Draw, shape: tuple[int, ...], few: bool) -> dict[str, Any]:
    """Options of ``integrate``."""
    method = draw.pick(*RUNGE_KUTTA) if few else draw.pick(*METHODS, *EXPONENTIAL)
    options: dict[str, Any] = {"method": method}
    if few:
        options["few_steps"] = "parallel"
    if method in EXPONENTIAL:
        options["linear"] = draw.pick(-0.5, -3.0, 0.3) if draw.rng.random() < 0.7 or not shape else -draw.log(0.1, 30)
    if draw.rng.random() < 0.3:
        options["linearization"] = draw.pick("full", "diagonal", "secant", "identity")
    if draw.rng.random() < 0.2:
        options["window"] = int(draw.log(1, 70) if few else draw.log(64, 1000))
    if draw.rng.random() < 0.2:
        options["coarse_steps"] = draw.pick(1, 5, 10, 80)
    if draw.rng.random() < 0.1:
        options["tolerance"] = draw.pick(1e-9, 1e-12)
    if draw.rng.random() < 0.08:
        options["substeps"] = draw.pick(2, 3)
    if draw.rng.random() < 0.08:
        options["batch_dims"] = int(draw.rng.integers(len(shape) + 1))  # right or not
    return options


def local_scale(states: np.ndarray, draw: Draw) -> np.ndarray:
    """What a difference is held against: the largest value of each element within a fiftieth of the nodes around.

    But at least ``LEAST`` of the largest element of its sample there.
    """
    size, n = np.abs(states), len(states)
    reach = max(n // 50, 1)
    around = np.stack([np.max(size[max(k - reach, 0) : k + reach + 1], axis=0) for k in range(n)])
    axes = tuple(range(size.ndim - draw.sample_axes, size.ndim))
    whole = np.max(around, axis=axes, keepdims=True)
    return np.maximum(np.maximum(around, LEAST[draw.dtype] * whole), np.finfo(draw.dtype).tiny)


def solved(drawn: Drawn, options: dict[str, Any]) -> tuple[Any, list[Any], str]:
    """The solution, the gradients of a sum of it with random weights, and what was warned of."""
    factor: Any = torch.tensor(1.0, dtype=torch.float64).requires_grad_() if drawn.gradients else 1
    y0 = drawn.y0.clone().requires_grad_() if drawn.gradients else drawn.y0
    f = (lambda t, y: drawn.f(t, y) * factor.to(y.dtype)) if drawn.gradients else drawn.f
    gradients: list[Any] = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        solution = integrate(f, y0, drawn.t, throw=False, **options)
        if drawn.gradients and solution.success:
            weights = np.random.default_rng(0).standard_normal(tuple(solution.states.shape))
            weights = torch.from_numpy(weights).to(y0.dtype) / solution.states.detach().abs().amax().clamp(min=1e-300)
            (solution.states * weights).sum().backward()
            gradients = [y0.grad, factor.grad]
    told = [str(w.message) for w in seen if issubclass(w.category, SequentialFallbackWarning)]
    return solution, gradients, "; ".join(told)


def run(seed: int) -> tuple[str, str]:
    """``("", what)`` where all is well, and what is wrong otherwise; with the problem in words."""
    drawn, told, got = problem(seed), "", None
    plain = {key: drawn.options[key] for key in SAME_FOR_THE_LOOP if key in drawn.options}
    try:
        want, wanted, _ = solved(drawn, {**plain, "linearization": "sequential"})
        got, gradients, told = solved(drawn, drawn.options)
        wrong = compare(got, want, drawn.draw, drawn.options.get("tolerance", 0.0))
        wrong = wrong or astray(gradients, wanted)
        if wrong and (wrong.startswith("the gradient") or unseen(drawn)):
            wrong = "" if rounding_decides(drawn, plain, want, wanted) else wrong
        elif wrong:
            wrong = "" if single_precision_decides(drawn, plain, want) else wrong
    except NonFiniteError:
        raise
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    words = ", ".join(drawn.draw.words)
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
        far = np.abs(a[:last] - b[:last]) / local_scale(b[:last], draw)
    worst = np.unravel_index(int(np.argmax(far)), far.shape)
    limit = max(LIMITS[draw.dtype], 1e3 * tolerance)  # which is of the largest element of a state
    if not far[worst] <= limit:
        return f"off by {far[worst]:.2g} at node {worst}: {a[worst]!r} for {b[worst]!r}"
    return ""


def astray(got: list[Any], want: list[Any], times: float = 10.0) -> str:
    """Why the gradients are not the plain loop's: of the largest element of each."""
    for name, a, b in zip(("y0", "a factor of f"), got, want, strict=False):
        a, b = to_host(a).astype(np.float64), to_host(b).astype(np.float64)
        if not np.isfinite(b).all():
            continue
        limit = LIMITS[np.dtype(str(got[0].dtype).split(".")[1])] * times
        far = float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-300))
        if not far <= limit:
            return f"the gradient of {name} is off by {far:.2g} of {np.max(np.abs(b)):.2g}"
    return ""


def unseen(drawn: Drawn) -> bool:
    """Whether docs/odeint.md says that growth is not looked at: in few steps of a wide state."""
    return "few_steps" in drawn.options and int(np.prod(drawn.y0.shape)) > LARGEST_DENSE


def rounding_decides(drawn: Drawn, plain: dict[str, Any], want: Any, wanted: list[Any]) -> bool:
    """Whether the loop's own answer is another from a state that a few roundings have changed, or in double precision.

    Where it is, a warning tells so, but the gradients are still those of another trajectory.
    """
    for roundings in (4, -4, 32):  # in a thousand steps they come to the last
        by = 1 + roundings * float(np.finfo(drawn.draw.dtype).eps)  # of f too, beside which y0 may be nothing
        moved = replace(drawn, y0=drawn.y0 * by, f=lambda t, y, by=by: drawn.f(t, y) * by)
        other, gradients, _ = solved(moved, {**plain, "linearization": "sequential"})
        if astray(gradients, wanted, 1.0) != "" or compare(other, want, drawn.draw, 0.0) != "":
            return True
    exact, gradients = in_double_precision(drawn, plain) if wanted else (None, [])
    return exact is not None and astray([gradient.float() for gradient in gradients], wanted) != ""


def single_precision_decides(drawn: Drawn, plain: dict[str, Any], want: Any) -> bool:
    """Whether the loop's own answer is as far from that in double precision as an answer may not be from the loop's."""
    exact, _ = in_double_precision(drawn, plain)
    return exact is not None and compare(exact, want, drawn.draw, 0.0) != ""


def in_double_precision(drawn: Drawn, plain: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The loop's solution and gradients of a problem in single precision; None where they cannot be had."""
    if drawn.draw.dtype == np.float64 or not drawn.draw.writable:
        return None, []
    y0 = drawn.y0.double() if drawn.draw.torch else drawn.y0.astype(np.float64)
    try:
        return solved(replace(drawn, y0=y0), {**plain, "linearization": "sequential"})[:2]
    except (RuntimeError, TypeError, ValueError):  # its matrices are of single precision
        return None, []


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
