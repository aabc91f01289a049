"""Ordinary differential equations in parallel over time: ``python -m benchmarks.ode``.

``torchdiffeq``'s fixed-step rk4 and this project's own plain loop beside ``odeint``, on the same grid, in the same
process and in turn; medians of the seconds a user waits for, or with ``--cpu`` of those the processor works, which on a
machine that others use as well is what a quiet one would take. Every pair of answers is compared, and gradients too
where they are timed.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import array_api_compat.torch
import numpy as np
import torch
import torchdiffeq
import typer
from rich.console import Console
from rich.table import Table

from parasolver_adapters.vector_field import ODESolution, SequentialFallbackWarning, integrate
from parasolver_adapters.vector_field.methods import RK4, RungeKutta
from parasolver_adapters.vector_field.surrogate import Propagator, step_increment

DTYPE = torch.float64
STEPS = (1_000, 10_000)
SCALING = (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
SLOWEST_LOOP = 10_000  # steps up to which the loop is timed for the picture; it is linear beyond
BATCHES = (1, 4, 16, 128)
_WIDTH = 140  # of the table in a file
Clock = Callable[[], float]


@dataclass(frozen=True)
class Problem:
    """An initial value problem over ``[0, end]``; with fewer steps than ``fewest`` the method is unstable."""

    field: Callable[[Any, Any], Any]
    y0: tuple[float, ...]
    end: float
    fewest: int = 1


def lotka_volterra(t: Any, y: Any) -> Any:
    return torch.stack([1.5 * y[0] - y[0] * y[1], y[0] * y[1] - 3 * y[1]])


def van_der_pol(t: Any, y: Any) -> Any:
    return torch.stack([y[1], (1 - y[0] ** 2) * y[1] - y[0]])


def pendulum(t: Any, y: Any) -> Any:
    return torch.stack([y[1], -torch.sin(y[0])])


def two_body(t: Any, y: Any) -> Any:
    cubed = (y[0] ** 2 + y[1] ** 2) ** 1.5
    return torch.stack([y[2], y[3], -y[0] / cubed, -y[1] / cubed])


def lorenz(t: Any, y: Any) -> Any:
    return torch.stack([10 * (y[1] - y[0]), y[0] * (28 - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]])


def linear_system(size: int = 16) -> Callable[[Any, Any], Any]:
    """Damped rotations: antisymmetric less a tenth of the identity."""
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    matrix = (matrix - matrix.T) / 2 - 0.1 * torch.eye(size, dtype=DTYPE)
    return lambda t, y: y @ matrix.T


ECCENTRICITY = 0.5
PROBLEMS = {
    "Lotka-Volterra": Problem(lotka_volterra, (1.0, 1.0), 10.0),
    "Van der Pol, mu = 1": Problem(van_der_pol, (2.0, 0.0), 10.0),
    "pendulum": Problem(pendulum, (1.0, 0.0), 10.0),
    "two bodies, e = 0.5": Problem(
        two_body, (1 - ECCENTRICITY, 0.0, 0.0, math.sqrt((1 + ECCENTRICITY) / (1 - ECCENTRICITY))), 2 * math.pi
    ),
    "linear, 16 states": Problem(linear_system(), (1.0,) * 16, 10.0),
    "Lorenz, 20 units": Problem(lorenz, (1.0, 1.0, 1.0), 20.0, fewest=800),
}
PICTURED = ("Lotka-Volterra", "two bodies, e = 0.5", "linear, 16 states", "Lorenz, 20 units")


@dataclass(frozen=True)
class Line:
    """One line of a table.

    Args:
        problem, steps: what was integrated.
        loop, plain, parallel: median seconds of torchdiffeq, of this project's plain loop, and of its own choice.
        difference: largest difference of the answers, over the largest value.
        rounds, calls, evaluations, sequential_steps, linearization: of the parallel run.
    """

    problem: str
    steps: int
    loop: float
    plain: float
    parallel: float
    difference: float
    rounds: int
    calls: int
    evaluations: int
    sequential_steps: int
    linearization: str

    @property
    def speedup(self) -> float:
        """How many times faster than the quicker of the two loops."""
        return min(self.loop, self.plain) / self.parallel


def compare(name: str, steps: int, repeats: int, clock: Clock = time.perf_counter) -> Line:
    """A small problem, without gradients."""
    problem = PROBLEMS[name]
    y0, t = torch.tensor(problem.y0, dtype=DTYPE), torch.linspace(0, problem.end, steps + 1, dtype=DTYPE)
    with torch.no_grad():
        (loop, expected), (plain, _), (parallel, found) = interleaved(
            clock,
            repeats,
            lambda: torchdiffeq.odeint(problem.field, y0, t, method="rk4"),
            lambda: quietly(problem.field, y0, t, linearization="sequential"),
            lambda: quietly(problem.field, y0, t),
        )
    return _line(name, steps, (loop, plain, parallel), relative(found.states, expected), found)


def compare_neural(batch: int, steps: int, repeats: int, clock: Clock = time.perf_counter, size: int = 64) -> Line:
    """A multilayer perceptron, trajectory and gradients of a loss at the end; gradients are compared."""
    generator = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(size, size), torch.nn.Tanh(), torch.nn.Linear(size, size)).to(DTYPE)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=DTYPE) / math.sqrt(size)
    y0, t = torch.randn(batch, size, generator=generator, dtype=DTYPE), torch.linspace(0, 1, steps + 1, dtype=DTYPE)

    def gradients(states: Any) -> Any:
        return torch.cat([g.ravel() for g in torch.autograd.grad(states[-1].square().mean(), list(net.parameters()))])

    def own_run(**options: Any) -> tuple[Any, ODESolution]:
        solution = quietly(lambda t, y: net(y), y0, t, tolerance=1e-9, **options)
        return gradients(solution.states), solution

    (loop, expected), (plain, _), (parallel, (found, solution)) = interleaved(
        clock,
        repeats,
        lambda: gradients(torchdiffeq.odeint(lambda t, y: net(y), y0, t, method="rk4")),
        lambda: own_run(linearization="sequential"),
        own_run,
    )
    return _line(f"neural ODE, batch {batch}", steps, (loop, plain, parallel), relative(found, expected), solution)


def quietly(*arguments: Any, **options: Any) -> ODESolution:
    """Integrate without the announcement of a fall-back, which the table shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SequentialFallbackWarning)
        return integrate(*arguments, **options)


def interleaved(clock: Clock, repeats: int, *runs: Callable[[], Any]) -> list[tuple[float, Any]]:
    """Median seconds of each and its last answer; they take turns, so that a busy machine slows all."""
    seconds: list[list[float]] = [[] for _ in runs]
    answers: list[Any] = [run() for run in runs[1:]]  # warm up; the first is the loop, which has nothing to warm
    answers = [None, *answers]
    for _ in range(repeats):
        for k, run in enumerate(runs):
            started = clock()
            answers[k] = run()
            seconds[k].append(clock() - started)
    return [(float(np.median(times)), answer) for times, answer in zip(seconds, answers, strict=True)]


def relative(a: Any, b: Any) -> float:
    """Largest difference over the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def _line(name: str, steps: int, seconds: tuple[float, float, float], difference: float, run: ODESolution) -> Line:
    loop, plain, parallel = seconds
    return Line(
        problem=name,
        steps=steps,
        loop=loop,
        plain=plain,
        parallel=parallel,
        difference=difference,
        rounds=run.rounds,
        calls=run.calls,
        evaluations=run.evaluations,
        sequential_steps=run.sequential_steps,
        linearization=run.linearization,
    )


@dataclass(frozen=True)
class StagesLine:
    """Newton's method with stages as nodes, or with composite steps, from the same start to 1e-12.

    Args:
        problem, steps, nodes: what was done; nodes is "stages" or "steps".
        rounds, calls, seconds: until the trajectory is within 1e-12 of the answer; the median of several runs.
    """

    problem: str
    steps: int
    nodes: str
    rounds: int
    calls: int
    seconds: float


def compare_stages(name: str, steps: int, repeats: int, clock: Clock = time.perf_counter) -> list[StagesLine]:
    """Both ways, with exact Jacobians at every node, on a start that is off by a thousandth."""
    problem = PROBLEMS[name]
    t = torch.linspace(0, problem.end, steps + 1, dtype=DTYPE)
    with torch.no_grad():
        exact = quietly(problem.field, torch.tensor(problem.y0, dtype=DTYPE), t).states
        start = exact * (1 + 1e-3 * torch.sin(t))[:, None]
        start[0] = exact[0]
        runs = interleaved(
            clock, repeats, *(partial(_newton, problem.field, t, start, exact, nodes) for nodes in ("steps", "stages"))
        )
    return [
        StagesLine(name, steps, nodes, *answer, seconds)
        for nodes, (seconds, answer) in zip(("steps", "stages"), runs, strict=True)
    ]


def _newton(field: Callable[[Any, Any], Any], t: Any, y: Any, exact: Any, nodes: str) -> tuple[int, int]:
    """Rounds and calls of the field, Jacobians apart."""
    h, n, tableau = (t[1:] - t[:-1])[:, None], len(t) - 1, RK4
    batched, jacobians = torch.func.vmap(field), torch.func.vmap(torch.func.jacrev(field, argnums=1))
    times = [t[:-1] + sum(row) * h[:, 0] for row in tableau.a]
    calls, slopes = 0, []
    for rounds in range(30):
        if relative(y, exact) < 1e-12:
            return rounds, calls
        J = jacobians(t[:-1], y[:-1])
        if nodes == "steps" or not slopes:  # a composite step; with stages as nodes it gives the first slopes
            slopes, calls = _stages(tableau, h, y[:-1], lambda s, Y: batched(times[s], Y)), calls + len(times)
        defects = [torch.zeros_like(K) for K in slopes]
        if nodes == "stages":
            inputs = [y[:-1] + h * _weighted(row, slopes) for row in tableau.a]
            now, calls = batched(torch.cat(times), torch.cat(inputs)), calls + 1
            defects = [F - K for F, K in zip(now.split(n), slopes, strict=True)]

        def change(dy: Any, J: Any = J, defects: list[Any] = defects) -> list[Any]:
            return _stages(tableau, h, dy, lambda s, dY: defects[s] + (J @ dY[..., None])[..., 0])

        forcing = change(torch.zeros_like(y[:-1]))
        r = y[:-1] + h * _weighted(tableau.b, [K + d for K, d in zip(slopes, forcing, strict=True)]) - y[1:]
        increment = step_increment(array_api_compat.torch, (h[..., None] * J)[:, None], 4, 0, True)
        eye = torch.eye(y.shape[1], dtype=DTYPE)
        d = Propagator(array_api_compat.torch, increment, increment + eye, n, None, 1, True).propagate(r[:, None])[:, 0]
        dy = torch.cat([torch.zeros_like(d[:1]), d])
        if nodes == "stages":
            slopes = [K + dK for K, dK in zip(slopes, change(dy[:-1]), strict=True)]
        y = y + dy
    return rounds + 1, calls


def _stages(tableau: RungeKutta, h: Any, y: Any, slope: Callable[[int, Any], Any]) -> list[Any]:
    slopes: list[Any] = []
    for s, row in enumerate(tableau.a):
        slopes.append(slope(s, y + h * _weighted(row, slopes)))
    return slopes


def _weighted(weights: tuple[float, ...], slopes: list[Any]) -> Any:
    return sum(w * K for w, K in zip(weights, slopes, strict=False)) if weights else 0.0


def table(lines: list[Line]) -> Table:
    """The lines as the reader sees them."""
    shown = Table(title="rk4 in float64", title_justify="left", collapse_padding=True)
    names = (
        "problem",
        "steps",
        "torchdiffeq, s",
        "own loop, s",
        "odeint, s",
        "faster",
        "difference",
        "rounds",
        "calls",
    )
    for name in (*names, "in turn"):
        shown.add_column(name, justify="left" if name == "problem" else "right", no_wrap=True)
    for line in lines:
        shown.add_row(
            line.problem,
            str(line.steps),
            f"{line.loop:.3f}",
            f"{line.plain:.3f}",
            f"{line.parallel:.4f}",
            f"{line.speedup:.1f}x",
            f"{line.difference:.0e}",
            str(line.rounds),
            str(line.calls),
            str(line.sequential_steps),
        )
    return shown


def draw(lines: list[Line], file: Path) -> None:
    """Seconds against steps, of both, and rounds below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.6), layout="constrained")
    seconds, rounds = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    for colour, name in enumerate(dict.fromkeys(line.problem for line in lines)):
        own = [line for line in lines if line.problem == name]
        style: dict[str, Any] = {"color": f"C{colour}", "markersize": 4}
        timed = [line for line in own if not math.isnan(line.loop)]
        seconds.plot([line.steps for line in timed], [line.loop for line in timed], "s--", **style)
        seconds.plot([line.steps for line in own], [line.parallel for line in own], "o-", label=name, **style)
        rounds.plot([line.steps for line in own], [line.rounds for line in own], "o-", **style)
    seconds.set(xscale="log", yscale="log", ylabel="time, s")
    seconds.legend(title="odeint (solid), torchdiffeq (dashed)", fontsize="small", title_fontsize="small")
    rounds.set(xlabel="steps", ylabel="rounds", ylim=(0, None))
    for axes in (seconds, rounds):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130)


def scaling(name: str, repeats: int, clock: Clock = time.perf_counter) -> list[Line]:
    """From few steps to many; beyond ``SLOWEST_LOOP`` of odeint alone."""
    lines = []
    for steps in (n for n in SCALING if n >= PROBLEMS[name].fewest):
        if steps <= SLOWEST_LOOP:
            lines.append(compare(name, steps, repeats, clock))
            continue
        problem = PROBLEMS[name]
        t = torch.linspace(0, problem.end, steps + 1, dtype=DTYPE)
        y0 = torch.tensor(problem.y0, dtype=DTYPE)
        with torch.no_grad():
            [(parallel, run)] = interleaved(clock, repeats, partial(quietly, problem.field, y0, t))
        lines.append(_line(name, steps, (math.nan, math.nan, parallel), math.nan, run))
    return lines


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the lines to this file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Measure more numbers of steps and draw them here.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each; medians are shown.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch, for all.")] = 1,
    cpu: Annotated[bool, typer.Option("--cpu", help="Processor seconds; for a machine shared with others.")] = False,
) -> None:
    """Seconds of sequential and parallel integration."""
    torch.set_num_threads(threads)
    clock: Clock = time.process_time if cpu else time.perf_counter
    console = Console(width=_WIDTH if not sys.stdout.isatty() else None)
    lines, stages = [], []
    with console.status("Measuring") as status:
        for steps in STEPS:
            for name in PROBLEMS:
                status.update(f"{name}, {steps} steps")
                lines.append(compare(name, steps, repeats, clock))
        for batch in BATCHES:
            status.update(f"neural ODE, batch {batch}")
            lines.append(compare_neural(batch, 200, repeats, clock))
        for name in ("pendulum", "Lotka-Volterra", "linear, 16 states"):
            stages += compare_stages(name, STEPS[-1], repeats, clock)
    console.print(table(lines))
    for line in stages:
        console.print(
            f"{line.problem}, {line.steps} steps, {line.nodes} as nodes: {line.rounds} rounds, {line.calls} calls, "
            f"{line.seconds:.3f} s"
        )
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(line) for line in [*lines, *stages]], indent=2) + "\n")
    if picture is not None:
        draw([line for name in PICTURED for line in scaling(name, repeats, clock)], picture)


if __name__ == "__main__":
    typer.run(main)
