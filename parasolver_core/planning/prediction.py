"""A window that chooses itself: predicted rounds times measured costs.

The rounds of the default method were measured on three networks (``benchmarks.planning``). A sliding window follows
:func:`~parasolver_core.methods.expected.sliding_rounds` within some 20 %, n spread nodes

    rounds = p + q log10(1 / tolerance) + r n / window

within half to twice. The seconds are those of the network's calls, with fewer rows in the first round and in the last,
and the solver's own time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from parasolver_core.methods.expected import FINEST, sliding_rounds
from parasolver_core.methods.method import Method
from parasolver_core.planning.costs import CostTable
from parasolver_core.samplers.recurrence import Recurrence

_SPREAD, _SPREAD_NOISY = (2.5, 4.0, 0.9), (8.0, 0.0, 0.4)  # p, q and r above
# These were chosen by trial, beside what benchmarks.planning counts.
_TAPER_NOISY = 1.3  # with noise the last nodes are final later than their share
_FILLED = 0.85  # of the window, on average, with spread nodes
_WORTH = 0.9  # the prediction is not exact: in parallel only where it takes less than this share of the time
_SPLIT, _WIDER = 1.05, 1.01  # timings are no better: calls are not split for less, nor more nodes evaluated


@dataclass(frozen=True)
class Prediction:
    """What one choice is expected to cost.

    Args:
        window: nodes evaluated in one round; 1: sequentially.
        max_rows: the most rows in one network call of one device.
        devices: how many share the rows.
        rounds, evaluations: evaluations count each sample of the batch.
        network, own: seconds in the network, and in the solver.
    """

    window: int
    max_rows: int
    devices: int
    rounds: float
    evaluations: float
    network: float
    own: float

    @property
    def seconds(self) -> float:
        """All that the user waits for."""
        return self.network + self.own


Choice = tuple[Prediction, Prediction]  # the best, and the best of the others to compare


@dataclass(frozen=True)
class Costs:
    """Measured seconds.

    Args:
        network: of one call, by rows.
        own: of the solver in one round, by its nodes; 1 is the sequential loop. None: nothing.
    """

    network: CostTable
    own: CostTable | None = None

    def of_round(self, rows: int, devices: int, max_rows: int) -> float:
        """Seconds in the network, of a round of so many rows shared by devices."""
        return self.network.in_calls(-(-rows // devices), max_rows)

    def of_solver(self, rows: Sequence[int], window: int) -> float:
        """Seconds in the solver, of rounds with so many nodes of each sample."""
        return 0.0 if self.own is None else sum(self.own(max(nodes, min(window, 2))) for nodes in rows)


def predicted_rounds(recurrence: Recurrence, method: Method, window: int, tolerance: float) -> float:
    """How many rounds the default method takes, one sample; see the top of this file."""
    if method.spreads(recurrence, window, tolerance):
        tolerance = max(tolerance, FINEST)
        p, q, r = _SPREAD_NOISY if recurrence.stochastic else _SPREAD
        digits = math.log10(1 / min(tolerance, 1.0))
        return min(p + q * digits + r * method.needed_nodes(recurrence, tolerance) / window, float(len(recurrence)))
    return sliding_rounds(recurrence, window, tolerance)


def predicted_rows(recurrence: Recurrence, method: Method, window: int, tolerance: float) -> list[int]:
    """The rows of each predicted round, one sample."""
    n, rounds = len(recurrence), max(round(predicted_rounds(recurrence, method, window, tolerance)), 1)
    if method.spreads(recurrence, window, tolerance):
        needed = method.needed_nodes(recurrence, tolerance)
        return [1] + [max(round(min(_FILLED * window, needed / 2, n)), 1)] * (rounds - 1)
    first = min(window, recurrence.blind) if method.fill == "held" else 1
    power = _TAPER_NOISY if recurrence.stochastic else 1.0
    left = ((n - 1) * (1 - i / (rounds - 1)) ** power for i in range(rounds - 1))  # nodes, before each later round
    return [first, *(max(min(window, round(nodes)), 1) for nodes in left)]


def predict(
    recurrence: Recurrence,
    method: Method,
    window: int,
    tolerance: float,
    costs: Costs,
    *,
    batch: int = 1,
    devices: int = 1,
    max_rows: int | None = None,
    warmup_steps: int = 0,
) -> Prediction:
    """The cost of one window, with the row count a call that is best for it.

    Args:
        recurrence, method, window, tolerance: of the run.
        costs: measured; those of one device.
        batch: samples.
        devices: how many share the rows of a round.
        max_rows: the most rows in one call; None: the most that was measured.
        warmup_steps: rounds of one node before the window opens.
    """
    nodes = ([1] * warmup_steps + predicted_rows(recurrence, method, window, tolerance))[: len(recurrence)]
    rows = [batch * count for count in nodes]
    limit = min(max_rows or costs.network.rows[-1], costs.network.rows[-1])
    sizes = [size for size in costs.network.rows if size <= limit] or [limit]
    seconds = {size: sum(costs.of_round(count, devices, size) for count in rows) for size in sizes}
    best = max(size for size in sizes if seconds[size] <= _SPLIT * min(seconds.values()))
    solver = costs.of_solver(nodes, window)
    return Prediction(window, best, devices, len(rows), float(sum(rows)), seconds[best], solver)


def candidates(steps: int) -> Iterator[int]:
    """Windows worth looking at: 2, 3, 4, 6, 8, 12, ... and all steps."""
    window = 2
    while window < steps:
        yield window
        if window + window // 2 < steps:
            yield window + window // 2
        window *= 2
    if steps > 1:
        yield steps


def choose(
    recurrence: Recurrence,
    method: Method,
    tolerance: float,
    costs: Costs,
    *,
    batch: int = 1,
    devices: int = 1,
    max_rows: int | None = None,
    warmup_steps: int = 0,
    max_rounds: int | None = None,
) -> Choice:
    """The best choice and, to compare, the best of the others: sequential sampling or a window. Arguments as above.

    Of those that are expected to end within ``max_rounds``; if none is, the one of the fewest rounds.
    """
    limits: dict[str, int | None] = {"batch": batch, "devices": devices, "max_rows": max_rows}

    def cost(window: int) -> Prediction:
        return predict(recurrence, method, window, tolerance, costs, warmup_steps=warmup_steps, **limits)  # type: ignore[arg-type]

    def fits(choice: Prediction) -> bool:
        return max_rounds is None or choice.rounds <= max_rounds

    sequential = cost(1)
    windows = [cost(window) for window in candidates(len(recurrence))]
    if windows and not any(map(fits, windows)) and not fits(sequential):
        return min(windows, key=lambda choice: (choice.rounds, choice.seconds)), sequential
    windows = [choice for choice in windows if fits(choice)]
    least = min((choice.seconds for choice in windows), default=math.inf)
    # the smallest of those
    parallel = next((choice for choice in windows if choice.seconds <= _WIDER * least), sequential)
    if fits(sequential) and not parallel.seconds < _WORTH * sequential.seconds:
        return sequential, parallel
    return parallel, sequential


def explain(chosen: Prediction, other: Prediction, max_rounds: int | None = None) -> str:
    """One sentence on a choice."""

    def described(choice: Prediction) -> str:
        name = "sequential sampling" if choice.window == 1 else f"a window of {choice.window}"
        return f"{name}: {choice.rounds:.0f} rounds in {seconds(choice.seconds)}"

    within = "" if max_rounds is None else f" within max_rounds={max_rounds}"
    return f'window="auto" chose{within} {described(chosen)} as predicted, not {described(other)}.'


def seconds(value: float) -> str:
    """Seconds for the reader."""
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"
