"""Random programs for `solve`, each held against the plain loop by the promises: `python -m tests.fuzz.solve --seed 0`.

What is checked of each program:

* the library's plain loop is the hand-written one, to the bit where the network is;
* `window=1` is the plain loop to the bit, and so are statuses, steps and trajectory;
* `tolerance=0`: every step of the accepted trajectory is the sampler's own step, and the sample is the plain loop's,
  as far as rounding reaches;
* `tolerance=e`: the sample is as near as changes of the states by `e` would leave it, where the network is continuous;
* a sample that the plain loop finishes is finished, and one that it does not finish is never "converged";
* nothing accepted is NaN, statuses, counts, estimates and messages are true, and no argument is changed.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parasolver_core import Solution, Status, solve
from parasolver_core.methods import window_batch
from parasolver_core.methods.anderson import Anderson
from parasolver_core.methods.method import Method
from parasolver_core.methods.presets import get_method
from tests.arrays import on_a_device, to_numpy
from tests.fuzz import oracle
from tests.fuzz.plain import fits, plain_loops, shaken
from tests.fuzz.programs import NetworkError, Program, problem_of, program

# Choices that do not go together, refused by name before the first call.
REFUSED = (
    r"method: 'parataa' is defined for step rules that read the current node only",
    r"start: method='parataa' begins with copies of x_T",
    r"warmup_steps: method='parataa' opens its window at once",
    r'(start|warmup_steps): the plain loop of method="sequential" has no use for it',
    r"method: its stop rule weighs a move by the variance of a diffusion step",
)
ROUNDING = 64  # changes of the states, in units in the last place, that an exact run may be off by at each step
LOUD = 20.0  # times the schedule's noise, of which solve warns
DISTANCE = 10.0  # times what changes of the states by the tolerance do


@dataclass
class Outcome:
    """What became of one program.

    Args:
        complaints: promises broken, each in a sentence.
        refused: whether the choices were refused by name.
        tame: relative error over the tolerance, of each sample to which the promise of 95 % applies.
    """

    complaints: list[str] = field(default_factory=list)
    refused: bool = False
    tame: list[float] = field(default_factory=list)

    def expect(self, holds: bool, complaint: str) -> bool:
        if not holds:
            self.complaints.append(complaint)
        return bool(holds)


def run(seed: int) -> Outcome:
    """Draw the program of that number, run it and check what it gave."""
    drawn, outcome = program(seed), Outcome()
    plain = plain_loops(problem_of(seed))
    ways, sequential, drawn.network.outside = plain.ways, plain.sequential, plain.outside
    outcome.complaints += plain.complaints
    arguments, before = _arguments(drawn, sequential), to_numpy(_bits(drawn, drawn.x_T)).copy()
    drawn.network.calls.clear()
    drawn.network.holes = 0
    rounds: list[float] = []

    def callback(state: Any) -> None:
        rounds.append(float(np.max(np.append(state.errors()[np.isfinite(state.errors())], 0.0))))
        if len(rounds) == drawn.stop_after:
            raise StopIteration

    try:
        got = solve(
            drawn.network, drawn.x_T, drawn.grid, drawn.rule, drawn.window, tolerance=drawn.tolerance,
            method=drawn.method, callback=callback, save="trajectory", throw=False, **arguments,
        )  # fmt: skip
    except NetworkError as error:
        outcome.expect(len(drawn.network.calls) >= drawn.network.fails_in, f"raised too early: {error}")
        got = error.solution  # type: ignore[attr-defined]
        outcome.expect(got.status is Status.FAILED or not _running(got), f"status {got.status} after an error")
    except (ValueError, TypeError) as error:
        outcome.refused = any(re.match(one, str(error)) for one in REFUSED) and not drawn.network.calls
        outcome.expect(outcome.refused, f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-4)}")
        return outcome
    outcome.expect(to_numpy(_bits(drawn, drawn.x_T)).tobytes() == before.tobytes(), "x_T was changed")
    _check_form(drawn, got, ways, outcome)
    _check_counts(drawn, got, outcome)
    for sample, way in enumerate(ways):
        _check_sample(drawn, got, sample, way, outcome)
    if (
        drawn.window == 1
        and drawn.network.fails_in == 0
        and drawn.stop_after == 0
        and "max_rounds" not in drawn.options
    ):
        _check_window_one(drawn, got, sequential, outcome)
    return outcome


def _running(solution: Solution) -> bool:
    return Status.RUNNING in solution.statuses


def _bits(drawn: Program, array: Any) -> Any:
    """An array as one that NumPy has."""
    return drawn.xp.astype(array, drawn.xp.float32) if drawn.dtype == "bfloat16" else array


def _arguments(drawn: Program, sequential: Solution) -> dict[str, Any]:
    """What goes into the call beside the choices, with a warm start from the plain loop."""
    arguments = drawn.noise | drawn.options
    if drawn.start is not None:
        kind, share = drawn.start
        rng, shape = np.random.default_rng(drawn.seed + 2), (len(drawn.grid) + 1, *drawn.x_T.shape)
        values = np.nan_to_num(oracle.host(sequential.trajectory), posinf=0, neginf=0)
        normal = rng.standard_normal(shape)
        values = values * (1 + share * normal) if kind == "near" else share * normal
        limit = 0.9 * float(drawn.xp.finfo(drawn.x_T.dtype).max)
        arguments["start"] = drawn.xp.asarray(np.clip(values, -limit, limit), dtype=drawn.x_T.dtype)
    return arguments


def _check_form(drawn: Program, got: Solution, ways: list[oracle.Way], outcome: Outcome) -> None:
    """Shapes, dtypes, statuses and estimates."""
    x_T, n = drawn.x_T, len(drawn.grid)
    over = [not way.whose and not fits(drawn, way.states[-1]) for way in ways]
    for name, array, shape in (
        ("sample", got.sample, x_T.shape),
        ("states", got.states, x_T.shape),
        ("trajectory", got.trajectory, (n + 1, *x_T.shape)),
    ):
        outcome.expect(type(array) is type(x_T) and array.dtype == x_T.dtype, f"{name}: {type(array)} {array.dtype}")
        outcome.expect(tuple(array.shape) == tuple(shape), f"{name}: shape {tuple(array.shape)}")
    trajectory, sample, states = (oracle.host(one) for one in (got.trajectory, got.sample, got.states))
    outcome.expect(np.array_equal(trajectory[0], oracle.host(x_T)), "the trajectory does not begin with x_T")
    outcome.expect(got.error_estimate.shape == (x_T.shape[0],), "shape of error_estimate")
    for i, (status, steps) in enumerate(zip(got.statuses, got.steps, strict=True)):
        error = float(got.error_estimate[i])
        complete = status is Status.CONVERGED or (status is Status.NONFINITE_SOLVER and over[i])
        outcome.expect(0 <= steps <= n and (steps == n) == complete, f"{steps} steps, {status}")
        if status is Status.CONVERGED:
            outcome.expect(bool(np.isfinite(sample[i]).all()), f"sample {i}: converged and not finite")
            # a parallel run is never sure of the last place, and the plain loop is what it is
            least, most = (0.0, 0.0) if _alone(drawn) else (oracle.eps(drawn), np.finfo(np.float64).max)
            outcome.expect(least <= error <= most, f"sample {i}: error_estimate {error}, at least {least:.2g}")
            outcome.expect(np.array_equal(trajectory[-1, i], sample[i]), f"sample {i}: the trajectory ends elsewhere")
            outcome.expect(bool(np.isfinite(trajectory[:, i]).all()), f"sample {i}: a hole in the trajectory")
        else:
            outcome.expect(bool(np.isnan(trajectory[steps + 1 :, i]).all()), f"sample {i}: more than final states")
        finite = bool(np.isfinite(states[i]).all() and np.isfinite(trajectory[: steps + 1, i]).all())
        half = drawn.dtype in ("float16", "bfloat16")  # saturates
        outcome.expect(finite, f"sample {i}: final states are not finite")
        if finite and not half:
            same = np.array_equal(trajectory[steps, i], states[i])
            outcome.expect(same, f"sample {i}: states[{i}] is not trajectory[{steps}, {i}]")
    first = next((one for one in got.statuses if one is not Status.CONVERGED), Status.CONVERGED)
    outcome.expect(got.status is first, f"status {got.status} of {got.statuses}")
    if Status.NONFINITE_MODEL in got.statuses:
        outcome.expect(drawn.network.holes > 0, "the network is blamed for NaN and gave none")


def _check_counts(drawn: Program, got: Solution, outcome: Outcome) -> None:
    """Rounds, calls and rows are what the network saw; estimates never fall."""
    stats, calls = got.stats, drawn.network.calls
    if drawn.network.fails_in == 0:
        outcome.expect(stats.calls == len(calls), f"{stats.calls} calls told of {len(calls)}")
        if "buckets" not in drawn.options:
            outcome.expect(stats.evaluations == sum(calls), f"{stats.evaluations} evaluations told of {sum(calls)}")
    if "max_rows" in drawn.options:
        outcome.expect(max(calls, default=0) <= drawn.options["max_rows"], "a call beyond max_rows")
    limit = len(drawn.grid) + len(drawn.grid) // drawn.window + 18
    outcome.expect(stats.rounds <= limit, f"{stats.rounds} rounds for {len(drawn.grid)} steps, window {drawn.window}")
    outcome.expect(stats.rounds <= drawn.options.get("max_rounds", limit), "more than max_rounds")
    if got.status is Status.MAX_ROUNDS:
        outcome.expect(stats.rounds == drawn.options.get("max_rounds"), "MAX_ROUNDS too early")
    accepted, spread = [0] * drawn.x_T.shape[0], False
    for record in stats.history:
        for one in record.samples:
            accepted[one.sample] += one.accepted
            spread |= one.window > 1 and bool(np.any(np.diff(one.nodes) != 1))
            outcome.expect(one.window <= drawn.window, "a window wider than asked for")
    for i, (told, steps) in enumerate(zip(accepted, got.steps, strict=True)):
        outcome.expect(told == steps, f"sample {i}: {told} nodes accepted, {steps} steps")


def _check_sample(drawn: Program, got: Solution, sample: int, way: oracle.Way, outcome: Outcome) -> None:
    """One sample against the plain loop."""
    status, exact = got.statuses[sample], drawn.tolerance == 0 or _alone(drawn)
    end = (Status.CONVERGED, Status.MAX_ROUNDS, Status.STOPPED, Status.FAILED, Status.INTERRUPTED)
    ulp = oracle.eps(drawn)
    share = ROUNDING * ulp if exact else max(drawn.tolerance, ROUNDING * ulp)
    if way.whose:
        if exact and drawn.network.kind.exact:
            outcome.expect(got.steps[sample] <= len(way.states) - 1, f"sample {sample}: further than the plain loop")
        return
    want, distance = oracle.host(way.states[-1]), _is_distance(drawn.method)
    # announced: beside noise so much larger than the schedule's, data are small in a way that no table tells
    loud = oracle.rms(oracle.host(drawn.x_T)) > LOUD * drawn.rule.start_scale(drawn.grid)
    info, size = drawn.xp.finfo(drawn.x_T.dtype), oracle.rms(want)
    error = oracle.rms(oracle.host(got.sample[sample, ...]) - want) if status is Status.CONVERGED else np.inf
    last = float(info.eps) * (size + float(info.smallest_normal))  # the sample in its own dtype
    near = 4 * last + (0 if exact else drawn.tolerance * size)
    if not error <= near:
        moved = shaken(problem_of(drawn.seed), sample, share)
        if moved is None or not fits(drawn, way.states[-1]):
            return  # rounding decides whether the plain loop gets there
        if _on_device(drawn) and status is Status.NONFINITE_SOLVER and _near_range(drawn, way):
            return
        if not exact and not distance and (drawn.network.outside is not None or status is Status.NONFINITE_MODEL):
            return  # a published stop rule may accept a state from which the network is out of reach
        told = f"sample {sample}: {status}, and the plain loop finishes; {got.message}"
        if not outcome.expect(status in end, told):
            return
        if exact and oracle.eps(drawn, drawn.x_T.dtype) == ulp:
            _check_steps(drawn, got, sample, outcome)
        relative = size > 1e-6 * max(
            oracle.rms(oracle.host(x)) for x in way.states
        )  # of a sample that is 0 it means nothing
        if status is Status.CONVERGED and drawn.network.kind.smooth and (exact or (distance and relative and not loud)):
            told = f"off by {error:.3g} of {size:.3g}; changes by {share:.1g} do {moved:.2g}"
            estimate = f"estimate {got.error_estimate[sample]:.2g}, tolerance {drawn.tolerance:g}"
            outcome.expect(error <= DISTANCE * moved + near, f"sample {sample}: {told}; {estimate}")
    if status is not Status.CONVERGED:
        return
    tame = drawn.tame and drawn.network.scale == 1 and not isinstance(drawn.method, Method)
    if (
        tame
        and distance
        and not loud
        and size > 0
        and drawn.tolerance > 30 * oracle.eps(drawn, drawn.x_T.dtype)
        and not exact
    ):
        outcome.tame.append(error / size / drawn.tolerance)


def _alone(drawn: Program) -> bool:
    """Whether the run is the plain loop itself."""
    return min(drawn.window, len(drawn.grid)) == 1 or drawn.method == "sequential"


def _on_device(drawn: Program) -> bool:
    """Whether states are moved by products, and not by the very steps of the plain loop."""
    return not isinstance(window_batch.host_view(drawn.xp.zeros(1)), np.ndarray)


def _near_range(drawn: Program, way: oracle.Way) -> bool:
    """Whether what is held may leave the range of the dtype where states and outputs do not."""
    limit = float(drawn.xp.finfo(oracle.working(drawn)).max) / 1e3
    return max(float(np.abs(oracle.host(x)).max()) for x in [*way.states, *way.outputs]) > limit


def _is_distance(method: Any) -> bool:
    """Whether the tolerance is one on the distance to the plain loop."""
    if method == "sequential":
        return True
    chosen = get_method(method)
    return not isinstance(chosen, Anderson) and type(chosen.acceptance).__name__ == "RelativeMove"


def _check_steps(drawn: Program, got: Solution, sample: int, outcome: Outcome) -> None:
    """Every accepted state is the sampler's step from those before it, as far as rounding reaches."""
    rng, ulp = np.random.default_rng(drawn.seed + 3), oracle.eps(drawn)
    swept = not _on_device(drawn)
    final = got.steps[sample]
    told = [one.error for record in got.stats.history for one in record.samples if one.sample == sample]
    estimate = max(told, default=0.0)  # of its final states, also where the sample is not
    states = [got.trajectory[i, sample, ...] for i in range(final + 1)]  # type: ignore[index]
    outputs, doubts = [], []
    for i in range(final):
        m = oracle.output(drawn, i, sample, states[i])
        near = [
            oracle.output(drawn, i, sample, oracle.moved(drawn.xp, states[i], 2 * ROUNDING * ulp, rng))
            for _ in range(2)
        ]
        outputs.append(m)
        change = max(oracle.rms(oracle.host(one) - oracle.host(m)) for one in near)
        doubts.append(change + 16 * ulp * oracle.rms(oracle.host(m)))
        x, b = oracle.step(drawn, i, sample, states, outputs), drawn.recurrence.b[i]
        sizes = [oracle.rms(oracle.host(states[i - k]) * a) for k, a in enumerate(drawn.recurrence.a[i]) if a != 0]
        doubt = sum(abs(value) * doubts[i - k] for k, value in enumerate(b) if value != 0)
        sizes += [oracle.rms(oracle.host(outputs[i - k]) * value) for k, value in enumerate(b) if value != 0]
        sizes.append(abs(float(drawn.recurrence.c[i])))
        off = oracle.rms(oracle.host(x) - oracle.host(states[i + 1]))
        # two draws of what rounding does to the network are few; one product may make all states of a window
        limit = 4 * doubt + 16 * ulp * sum(sizes) * (1 if swept else drawn.window)
        if not swept:  # states that once were larger, or were moved by parts that cancel: the estimate tells of them
            limit += estimate * oracle.rms(oracle.host(states[i + 1]))
        if not np.isfinite(limit):
            return
        told = f"sample {sample}: step {i} of the exact trajectory is off by {off:.3g}, limit {limit:.2g}"
        if not outcome.expect(off <= limit, told):
            return


def _check_window_one(drawn: Program, got: Solution, sequential: Solution, outcome: Outcome) -> None:
    """``window=1`` is the plain loop, to the bit."""
    if (drawn.x_T.shape[0] > 1 or "buckets" in drawn.options) and not drawn.network.kind.exact:
        return  # filled up to a bucket, or without a sample that failed, a call is another product
    outcome.expect(got.statuses == sequential.statuses, f"window=1: {got.statuses}, plain loop {sequential.statuses}")
    for name in ("sample", "trajectory"):
        a, b = (to_numpy(_bits(drawn, getattr(one, name))) for one in (got, sequential))
        outcome.expect(np.array_equal(a, b, equal_nan=True), f"window=1: {name} is not the plain loop's")


def programs(seed: int, count: int, seconds: float) -> Iterator[int]:
    """The numbers of the programs to run, until the time is up."""
    end = time.monotonic() + seconds
    for number in range(seed, seed + count):
        if time.monotonic() > end:
            return
        yield number


def report(name: str, run: Callable[[int], Outcome], numbers: Iterator[int]) -> int:
    """Run them, tell of each that breaks a promise how to repeat it; 0 if none does."""
    done, refused, failed, tame, started = 0, 0, 0, [], time.monotonic()
    for number in numbers:
        outcome = guarded(run, number)
        done, refused = done + 1, refused + outcome.refused
        tame += outcome.tame
        if outcome.complaints:
            failed += 1
            print(f"python -m {name} --seed {number} --count 1\n  {program(number).told}")
            print("\n".join(f"  * {one}" for one in outcome.complaints[:4]), flush=True)
    within = f", {np.mean(np.array(tame) <= 1):.1%} of {len(tame)} samples within the tolerance" if tame else ""
    print(f"{name}: {done} programs, {refused} refused, {failed} failed{within}, {time.monotonic() - started:.0f} s")
    few = len(tame) >= 400 and np.mean(np.array(tame) <= 1) < 0.95
    if few:
        print("fewer than 95 % of the samples of tame networks are within the tolerance")
    return int(failed > 0 or few)


def guarded(run: Callable[[int], Outcome], number: int) -> Outcome:
    """Any other way out than an outcome is a complaint."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message="x_T: has an RMS")  # noise of another size is drawn on purpose
            return run(number)
    except Exception as error:
        return Outcome([f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-5)}"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.solve", description="Random programs for solve.")
    parser.add_argument("--seed", type=int, default=0, help="number of the first program")
    parser.add_argument("--count", type=int, default=10_000, help="how many")
    parser.add_argument("--seconds", type=float, default=1200, help="no new program after so many seconds")
    parser.add_argument("--device", action="store_true", help="tensors take the path of accelerators")
    given = parser.parse_args(argv)
    with on_a_device() if given.device else nullcontext():
        name = "tests.fuzz.solve --device" if given.device else "tests.fuzz.solve"
        return report(name, run, programs(given.seed, given.count, given.seconds))


if __name__ == "__main__":
    sys.exit(main())
