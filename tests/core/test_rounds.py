"""Rounds of a window that slides, held against plain loops over nodes: of one sample swept, and of many together."""

from typing import Any

import numpy as np
import pytest

from parasolver_core import DDIM, DDPM, DPMSolver, Identity, Method, NoiseSchedule, ParallelIntegralSolver, Secant
from parasolver_core.methods.sample_window import SampleWindow
from parasolver_core.methods.window_batch import WindowBatch
from tests.core.problems import TanhNetwork, normal

SCHEDULE = NoiseSchedule.linear()
NETWORK = TanhNetwork(5, gain=3.0)


class ByHand:
    """One sample's window, as the theory page has it: a sweep by the sampler with the surrogate in the network's place.

    How many nodes are final is read from the solver's record.
    """

    def __init__(self, shared: Any, sample: int, method: Method) -> None:
        self.shared, self.sample, self.method, self.recurrence = shared, sample, method, shared.recurrence
        self.lo, self.hi, self.N = 0, 1, len(self.recurrence)
        self.x, self.m = {0: normal((2, 5))[sample]}, {}
        self.slope = method.linearization.initial(self.recurrence).copy()
        self.moved: dict[int, np.ndarray] = {}
        if shared.warmup_steps:
            return
        if method.fill == "copy":
            self.m[0] = self.implied(0, self.x[0])
            self.fill(1, min(shared.width, self.N), "copy", None)
        elif method.fill == "held":
            self.m[0] = self.believed(0, 0 * self.x[0])
            self.fill(1, min(shared.width, self.recurrence.blind), "held", 0 * self.x[0])

    def noise(self, i: int) -> Any:
        return np.reshape(self.shared.noise(i, self.sample), -1) if self.recurrence.c[i] else None

    def behind(self, i: int, x: dict[int, np.ndarray], m: dict[int, np.ndarray]) -> np.ndarray:
        back = [j for j in range(i, i - self.recurrence.memory, -1) if j >= 0]
        return self.recurrence.advance(i, [x[j] for j in back], [m[j] for j in back], self.noise(i))

    def believed(self, i: int, held: np.ndarray) -> np.ndarray:
        p, q = self.recurrence.held[i]
        return (held - p * self.x[i]) / q

    def implied(self, i: int, after: np.ndarray) -> np.ndarray:
        """The output that makes step i end there."""
        without = self.behind(i, self.x, self.m | {i: 0 * after})
        return (after - without) / self.recurrence.b[i, 0]

    def fill(self, first: int, hi: int, kind: str, held: Any) -> None:
        copy = self.behind(first - 1, self.x, self.m) if hi > first else None
        for i in range(first, hi):
            self.x[i] = copy if kind == "copy" else self.behind(i - 1, self.x, self.m)
            self.m[i] = self.implied(i, copy) if kind == "copy" else self.believed(i, held)
            self.moved.pop(i, None)
        self.hi = max(hi, self.hi)

    def round(self, accepted: int, usable: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Its residuals and defects; of so many leading nodes something is known, the others are filled in anew."""
        self.hi = self.hi if usable is None else self.lo + usable
        nodes = range(self.lo, self.hi)
        D = {i: NETWORK(self.x[i][None], np.asarray(self.recurrence.timesteps)[[i]])[0] for i in nodes}
        r = {i: D[i] - self.m.get(i, 0 * D[i]) for i in nodes}
        if isinstance(self.method.linearization, Secant):
            for i in nodes:
                if i in self.moved:
                    self.slope[i] += self.moved[i] @ r[i] / (self.moved[i] @ self.moved[i])
        x, m = dict(self.x), dict(self.m)
        m[self.lo] = D[self.lo]
        for i in range(self.lo + 1, self.hi):
            x[i] = self.behind(i - 1, x, m)
            self.moved[i] = x[i] - self.x[i]
            m[i] = D[i] + self.slope[i] * self.moved[i]
        size = {i: np.linalg.norm(self.x[i]) for i in nodes}
        residuals = [np.linalg.norm(x[i] - self.x[i]) / size[i] for i in nodes]
        defects = [np.sqrt(np.mean(r[i] ** 2)) for i in nodes]
        last = self.hi - 1
        p, q = self.recurrence.held[last]
        held = p * x[last] + q * m[last] if self.method.fill == "held" else p * self.x[last] + q * D[last]
        self.x, self.m = x, m
        self.x[self.hi] = self.behind(last, x, m)
        self.lo += accepted
        width = self.shared.width if self.lo > self.shared.warmup_steps else 1
        self.fill(self.hi, min(self.lo + width, self.N), self.method.fill, held)
        return np.array(residuals), np.array(defects)

    def estimate(self) -> np.ndarray:
        """With the last prediction held to the end."""
        last, x, m = self.hi - 1, dict(self.x), dict(self.m)
        p, q = self.recurrence.held[last]
        held = p * x[last] + q * m[last]
        for i in range(last, self.N):
            if i > last:
                m[i] = (held - self.recurrence.held[i][0] * x[i]) / self.recurrence.held[i][1]
            x[i + 1] = self.behind(i, x, m)
        return x[self.N]


METHODS = {
    "secant": Method(spread=False),
    "identity": Method(linearization=Identity(), spread=False),
    "evaluated": Method(spread=False, fill="evaluated"),
    "copies": Method(linearization=Identity(), spread=False, fill="copy"),
}


@pytest.mark.parametrize("batch", [1, 2], ids=["swept", "together"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(
    "rule", [DDIM(SCHEDULE), DPMSolver(SCHEDULE, 3), DDPM(SCHEDULE)], ids=["one", "three", "noise"]
)
@pytest.mark.parametrize(("width", "warmup"), [(5, 0), (4, 2), (30, 0)])
def test_rounds_are_those_of_plain_loops(rule: Any, method: Method, batch: int, width: int, warmup: int) -> None:
    solver = ParallelIntegralSolver(rule, width, tolerance=1e-3, method=method, check=False, warmup_steps=warmup)
    state = solver.init(NETWORK, normal((2, 5))[:batch], SCHEDULE.timesteps(14), seed=3, save="trajectory")
    (run,) = state.runs  # type: ignore[union-attr]
    assert type(run) is (SampleWindow if batch == 1 else WindowBatch)
    windows = [ByHand(state._shared, sample, method) for sample in range(batch)]  # type: ignore[union-attr]
    close: dict[str, Any] = {"rtol": 1e-7, "atol": 1e-9}
    for _ in range(5):
        if solver.done(state) or len(run.samples) < batch:
            break
        inputs = np.asarray(run.inputs)
        ends = np.cumsum([one.hi - one.lo for one in windows])
        assert run.nodes.tolist() == [i for one in windows for i in range(one.lo, one.hi)]
        for one, rows in zip(windows, np.split(inputs, ends[:-1]), strict=True):
            np.testing.assert_allclose(rows, [one.x[i] for i in range(one.lo, one.hi)], **close)
        solver.step(state)
        for one, record in zip(windows, state.stats.history[-1].samples, strict=True):
            lo, hi, first = one.lo, one.hi, not one.m
            residuals, defects = one.round(record.accepted)
            assert record.nodes.tolist() == [*range(lo, hi)]
            np.testing.assert_allclose(record.residuals, residuals, **close)
            if not first:  # else there was no belief
                np.testing.assert_allclose(record.defects, defects, **close)
            if one.sample in run.samples:
                np.testing.assert_allclose(run.estimate(one.sample), one.estimate(), **close)
                row = run.samples.tolist().index(one.sample)
                assert (run.steps[row], run.errors[row]) == (one.lo, record.error)
                np.testing.assert_allclose(run.states()[row, :], one.x[one.lo], **close)
                kept = np.array(run.kept(one.sample))
                np.testing.assert_allclose(kept, [one.x[i] for i in range(one.lo + 1)], **close)
            else:
                np.testing.assert_allclose(state.estimate()[one.sample], one.x[14], **close)


@pytest.mark.parametrize("batch", [1, 2], ids=["swept", "together"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("rule", [DDIM(SCHEDULE), DPMSolver(SCHEDULE, 3)], ids=["one", "three"])
def test_nodes_from_an_output_on_that_is_not_finite_are_filled_in_anew(rule: Any, bad: float, batch: int) -> None:
    """Of their last moves nothing is known any more: samples moved together once took their slopes from these."""
    calls: list[int] = []

    def network(x: Any, t: Any) -> Any:
        calls.append(len(x))
        out = NETWORK(x, t)
        if len(calls) == 2:
            out[3, 1] = bad
        return out

    method = METHODS["secant"]
    solver = ParallelIntegralSolver(rule, 6, tolerance=1e-3, method=method, check=False)
    state = solver.init(network, normal((2, 5))[:batch], SCHEDULE.timesteps(14), seed=3)
    (run,) = state.runs  # type: ignore[union-attr]
    windows = [ByHand(state._shared, sample, method) for sample in range(batch)]  # type: ignore[union-attr]
    for number in range(4):
        solver.step(state)
        for one, record in zip(windows, state.stats.history[-1].samples, strict=True):
            usable = 3 if number == 1 and one.sample == 0 else None
            assert record.nodes.tolist() == [*range(one.lo, one.hi)]
            residuals, _ = one.round(record.accepted, usable)
            np.testing.assert_allclose(record.residuals[: len(residuals)], residuals, rtol=1e-7, atol=1e-9)
            assert len(record.residuals) == len(record.defects) == len(record.nodes)
        assert run.nodes.tolist() == [i for one in windows for i in range(one.lo, one.hi)]
        rows = [one.x[i] for one in windows for i in range(one.lo, one.hi)]
        np.testing.assert_allclose(run.inputs, rows, rtol=1e-7, atol=1e-9)
