"""Rounds of many windows at once, held against the equations of each sample by itself."""

from dataclasses import replace
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest

from parasolver_core import Recurrence, Secant
from parasolver_core.guesses.fill import Held
from parasolver_core.methods import window_batch
from parasolver_core.methods.window_batch import WindowBatch
from parasolver_core.rounds import shared as shared_module
from parasolver_core.rounds.acceptance import Acceptance, RoundView
from parasolver_core.rounds.matrix import unpack
from parasolver_core.rounds.shared import Shared
from parasolver_core.samplers import noise as noise_module
from parasolver_core.samplers.held_form import HeldForm
from parasolver_core.samplers.noise import NoiseSource, draw
from tests.arrays import from_numpy, load, to_numpy
from tests.core.any_tables import any_table, output, step
from tests.core.problems import normal

N, WIDTH, SIZE, SEED = 11, 5, 4, 7
SIGNAL = np.array([0.05, 0.09, *np.linspace(0.2, 0.98, N - 2)])  # the first two hardly depend on the sample
ACCEPTED = [[1, 3, 2], [2, 1, 1], [1, 4, 3], [2, 2, 5], [5, 1, 1], [2, 3, 4], [5, 5, 5], [5, 5, 5]]
USABLE = [[9, 9, 9], [9, 2, 9], [2, 9, 3], [9, 9, 9], [9, 1, 9], [9, 9, 9], [9, 9, 9], [9, 9, 9]]


class Scripted(Acceptance):
    """Takes so many nodes of each sample in each round."""

    many: ClassVar[bool] = True

    def __init__(self) -> None:
        self.turn, self.samples = 0, np.arange(3)

    def accept(self, view: RoundView, tolerance: float) -> Any:
        inside = np.isfinite(view.move).sum(axis=1)
        return np.minimum(np.array(ACCEPTED[self.turn])[self.samples], inside), np.zeros(len(inside))


class ScriptedFill(Held):
    """Of each window so many nodes are worth keeping."""

    def __init__(self, said: Scripted, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.said = said

    def usable(self, samples: Any, lo: Any, defects: Any, n: Any) -> Any:
        return np.minimum(np.array(USABLE[self.said.turn])[samples], n)


class Sample:
    """The states and predictions of one sample, node by node."""

    def __init__(self, table: Recurrence, form: HeldForm, start: np.ndarray, sample: int, uncorrected: bool) -> None:
        self.table, self.form, self.uncorrected = table, form, uncorrected
        self.z = [draw(SEED, sample, i, (SIZE,)) * (table.c[i] != 0) for i in range(N)]
        first = table.held[0, 0] * start if uncorrected else np.zeros(SIZE)
        self.X, self.H, self.said, self.dX = {0: start}, {0: first}, {}, {}
        self.lo, self.hi = 0, 1

    def fill(self, first: int, hi: int) -> None:
        if hi <= first:
            self.hi = hi
            return
        last = first - 1
        held = self.said[last] if self.uncorrected else self.H[last]
        for i in range(first, hi):
            outputs = {j: output(self.table, j, self.H[j], self.X[j]) for j in range(max(i - 3, 0), i)}
            self.X[i] = step(self.table, i - 1, self.X, outputs, self.z[i - 1])
            self.H[i] = held
        self.hi = hi

    def defects(self, D: np.ndarray) -> np.ndarray:
        nodes = range(self.lo, self.hi)
        for i, said in zip(nodes, D, strict=True):
            p, q = self.table.held[i]
            self.said[i] = p * self.X[i] + q * said
        return np.stack([self.said[i] - self.H[i] for i in nodes])

    def move(self, r: np.ndarray, slope: np.ndarray) -> None:
        dX: dict[int, Any] = {i: np.zeros(SIZE) for i in range(self.lo - 3, self.lo + 1)}
        dH: dict[int, Any] = {i: np.zeros(SIZE) for i in range(self.lo - 3, self.lo)}
        for j in range(len(r)):
            i = self.lo + j
            if j:
                dX[i] = sum(self.form.a[i - 1, k] * dX[i - 1 - k] for k in range(self.form.reads[0]))
                dX[i] = dX[i] + sum(self.form.b[i - 1, k] * dH[i - 1 - k] for k in range(self.form.reads[1]))
            dH[i] = r[j] + slope[j] * dX[i]
            self.X[i], self.H[i] = self.X[i] + dX[i], self.said[i] + slope[j] * dX[i]
        self.dX = {i: move for i, move in dX.items() if i > self.lo}

    def slide(self, accepted: int, sound: int) -> None:
        first = self.lo + sound
        self.lo += accepted
        hi = max(min(self.lo + WIDTH, N), self.lo + 1)
        self.dX = {i: move for i, move in self.dX.items() if i < first}
        self.fill(first, hi)


@pytest.fixture(params=["numpy", "torch", "array_api_strict"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Those of PyTorch as on a card: not as arrays of NumPy in the same memory."""
    if request.param == "torch":
        for module in (window_batch, shared_module, noise_module):
            monkeypatch.setattr(module, "host_view", lambda array: array)
    return load(request.param)


def compared(found: Any, table: Recurrence, active: list[Sample], defects: list[np.ndarray], grown: bool) -> None:
    """The sums of a round."""
    for row, (one, r) in enumerate(zip(active, defects, strict=True)):
        n = len(r)
        np.testing.assert_allclose(found.gram[row, :n, :n], r @ r.T, rtol=1e-8, atol=1e-9)
        X = np.stack([one.X[i] for i in range(one.lo, one.hi)])
        np.testing.assert_allclose(found.length[row, :n], np.linalg.norm(X, axis=1), rtol=1e-9)
        for i, move in one.dX.items():
            if i >= one.lo and not grown:
                assert found.cross[row, i - one.lo] == pytest.approx(move @ r[i - one.lo], rel=1e-7, abs=1e-10)
        said = np.stack([one.said[i] for i in range(one.lo, one.hi)])
        np.testing.assert_allclose(found.held[row, :n], np.linalg.norm(said, axis=1), rtol=1e-8)


def begun(run: WindowBatch, plain: list[Sample]) -> None:
    """What is known at the first node of each window, and before it."""
    for row, sample in enumerate(run.samples.tolist()):
        one = plain[sample]
        xs, hs = run._rows.history(row, 0)
        for k, x in enumerate(xs):
            if one.lo - k >= 0:
                np.testing.assert_allclose(to_numpy(x), one.X[one.lo - k], rtol=1e-8, atol=1e-10)
        for k, h in enumerate(hs):
            if one.lo - k >= 0:
                np.testing.assert_allclose(to_numpy(h), one.H[one.lo - k], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("grown", [False, True], ids=["moved", "made again"])
@pytest.mark.parametrize("uncorrected", [False, True], ids=["corrected", "evaluated"])
@pytest.mark.parametrize("noisy", [False, True], ids=["ode", "noise"])
@pytest.mark.parametrize(("states", "outputs"), [(1, 1), (2, 3), (3, 1)])
def test_rounds_of_many_windows(
    library: ModuleType, states: int, outputs: int, noisy: bool, uncorrected: bool, grown: bool, monkeypatch: Any
) -> None:
    table = any_table(N, states, outputs, noisy, signal=SIGNAL)
    form, said, start = HeldForm(table), Scripted(), normal((3, SIZE))
    x_T = from_numpy(start, library)
    noise = NoiseSource(x_T, x_T.dtype, N, SEED, None)
    shared = Shared(
        library, x_T.dtype, table, form, noise, Secant(), said, "held", said.bounds(table), WIDTH, 0, 0.01, True, None
    )
    run = WindowBatch(shared, ScriptedFill(said, form, WIDTH, uncorrected), np.arange(3), x_T)
    plain = [Sample(table, form, start[sample], sample, uncorrected) for sample in range(3)]
    for one in plain:
        one.fill(1, 1 if uncorrected else table.blind)
    assert table.blind == 2
    decisions: list[Any] = []
    decide = run._windows.decide

    def decided(*told: Any) -> Any:
        decisions.append(replace(decide(*told), grown=grown))
        return decisions[-1]

    monkeypatch.setattr(run._windows, "decide", decided)
    while len(run.samples):
        active = [plain[sample] for sample in run.samples.tolist()]
        said.samples = run.samples
        nodes = np.concatenate([range(one.lo, one.hi) for one in active])
        assert run.nodes.tolist() == nodes.tolist()
        inputs = np.concatenate([[one.X[i] for i in range(one.lo, one.hi)] for one in active])
        np.testing.assert_allclose(to_numpy(run.inputs), inputs, rtol=1e-9, atol=1e-11)
        D = normal((len(nodes), SIZE), seed=20 + said.turn)
        parts = np.split(D, np.cumsum([one.hi - one.lo for one in active])[:-1])
        defects = [one.defects(part) for one, part in zip(active, parts, strict=True)]
        sums = np.array(to_numpy(run.compare(from_numpy(D, library))), dtype=np.float64)
        found = unpack(run._rows, sums, run._windows)
        compared(found, table, active, defects, grown)
        run.correct(from_numpy(D, library), sums)
        decision = decisions[-1]
        for row, (one, r) in enumerate(zip(active, defects, strict=True)):
            accepted, sound = int(decision.accepted[row]), int(decision.sound[row])
            one.move(r, decision.slope[row])
            one.slide(accepted, sound)
        said.turn += 1
        begun(run, plain)
    for sample, one in enumerate(plain):
        assert one.lo == N
        outcome = run.ended[sample]
        trajectory = np.stack([to_numpy(state) for state in outcome.kept])
        np.testing.assert_allclose(trajectory, [one.X[i] for i in range(N + 1)], rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(to_numpy(outcome.state), one.X[N], rtol=1e-8, atol=1e-10)
