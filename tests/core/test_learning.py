"""What a memory keeps of finished samples, table by table, and the slopes that it finds: held against least squares."""

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parasolver_core import DDIM, Euler, Memory, NoiseSchedule, Recurrence, StepRule, solve_sequential
from parasolver_core.guesses.memory import KIND, _directions, _fit
from tests.core.any_tables import any_table, step
from tests.core.problems import TanhNetwork, normal

N, SIZE, SAMPLES = 12, 6, 16
GRID = np.arange(N, 0, -1)


class Given(StepRule):
    """A table that is at hand."""

    def __init__(self, own: Recurrence) -> None:
        self.own = own

    def recurrence(self, timesteps: np.ndarray) -> Recurrence:
        return replace(self.own, timesteps=np.asarray(timesteps))


TABLE = any_table(N, 2, 2, noisy=False, b=np.tril(np.random.default_rng(3).uniform(0.5, 1.0, (N, 2))))
RULE = Given(TABLE)


def finished(count: int = SAMPLES, seed: int = 1) -> Any:
    return solve_sequential(TanhNetwork(SIZE), normal((count, SIZE), seed=seed), GRID, RULE, save="trajectory")


def known(count: int = SAMPLES, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """States and predictions of the samples at each node, (N, n, size), by a plain loop."""
    network, X, M = TanhNetwork(SIZE), [normal((count, SIZE), seed=seed)], []
    for i in range(N):
        M.append(network(X[i], np.full(count, GRID[i])))
        X.append(step(TABLE, i, X, M))
    return np.stack(X[:N]), TABLE.held[:, :1, None] * np.stack(X[:N]) + TABLE.held[:, 1:, None] * np.stack(M)


def test_the_tables_of_a_memory() -> None:
    memory, (X, H) = Memory.learn(finished(), GRID, RULE), known()
    np.testing.assert_array_equal(memory.timesteps, GRID)
    np.testing.assert_array_equal(memory.held, TABLE.held)
    assert (memory.samples, memory.size) == (SAMPLES, SIZE)
    np.testing.assert_allclose(memory.states, X.mean(axis=1), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(memory.predictions, H.mean(axis=1), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(memory.squares, (H**2).sum(axis=2).mean(axis=1), rtol=1e-9)
    V = memory.directions
    x, h = X - X.mean(axis=1, keepdims=True), H - H.mean(axis=1, keepdims=True)
    for sample in range(SAMPLES):
        np.testing.assert_allclose(memory.along_states[sample], x[:, sample] @ V.T, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(memory.along_predictions[sample], h[:, sample] @ V.T, rtol=1e-8, atol=1e-10)
    x, h = x - x @ V.T @ V, h - h @ V.T @ V
    for i in range(N):
        assert memory.rest_states[i] == pytest.approx((x[i] ** 2).sum(), rel=1e-7, abs=1e-12)
        for j in range(N):
            np.testing.assert_allclose(memory.rest[:, i, j], [(x[i] * h[j]).sum(), (h[i] * h[j]).sum()], atol=1e-10)


@pytest.mark.parametrize(("count", "directions"), [(8, 4), (11, 5), (16, 6), (30, 6)])
def test_directions_are_those_in_which_predictions_vary_most(count: int, directions: int) -> None:
    """Two samples each, and at most as many as there are elements; of about ten nodes, the first and last included."""
    memory, (_, H) = Memory.learn(finished(count), GRID, RULE), known(count)
    V = memory.directions
    assert V.shape == (directions, SIZE)
    np.testing.assert_allclose(V @ V.T, np.eye(directions), atol=1e-12)
    nodes = [0, 1, 2, 3, 4, 6, 7, 8, 9, 11]
    deviations = (H - H.mean(axis=1, keepdims=True))[nodes].reshape(-1, SIZE)
    values, vectors = np.linalg.eigh(deviations.T @ deviations)
    best = vectors[:, np.argsort(values)[::-1][:directions]]
    np.testing.assert_allclose(best @ best.T, V.T @ V, atol=1e-8)


def test_no_more_than_a_dozen_directions() -> None:
    rng = np.random.default_rng(0)
    x_T, schedule = rng.standard_normal((40, 20)), NoiseSchedule.linear()
    done = solve_sequential(TanhNetwork(20), x_T, schedule.timesteps(10), DDIM(schedule), save="trajectory")
    assert Memory.learn(done, schedule.timesteps(10), DDIM(schedule)).directions.shape == (12, 20)


def test_directions_of_large_samples_take_no_more_memory_than_the_samples() -> None:
    H = normal((2, 8, 4000))
    tracemalloc.start()
    try:
        assert _directions(H).shape == (4, 4000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 * H.nbytes


@pytest.mark.parametrize("knows", [False, True], ids=["state", "state and prediction"])
@pytest.mark.parametrize("last", [0, 5])
def test_slopes_are_least_squares_with_a_pull(last: int, knows: bool) -> None:
    """Along each direction as if two samples more followed the common slopes; these near a prediction that stays."""
    memory, (X, H), nodes = Memory.learn(finished(), GRID, RULE), known(), np.array([6, 7, 11])
    memory = replace(memory, directions=memory.directions[:2])  # so that something lies across them
    V = memory.directions
    x, h = X - X.mean(axis=1, keepdims=True), H - H.mean(axis=1, keepdims=True)
    across = [part - part @ V.T @ V for part in (x, h)]
    sums = np.stack([np.einsum("ind,jnd->ij", part, across[1]) for part in across])
    memory = replace(
        memory, along_states=(x @ V.T).swapaxes(0, 1), along_predictions=(h @ V.T).swapaxes(0, 1), rest=sums,
        rest_states=np.einsum("ind,ind->i", across[0], across[0]),
    )  # fmt: skip
    B, C = memory.slopes(last, nodes, knows)
    assert B.shape == C.shape == (3, 3)

    def fitted(known_x: Any, known_h: Any, target: Any, prior: tuple[float, float], pull: float) -> Any:
        columns = [known_x.ravel(), known_h.ravel()][: 1 + knows]
        wide = [np.sqrt(pull) * np.linalg.norm(column) for column in columns]
        rows = np.concatenate([np.stack(columns, axis=1), np.diag(wide)])
        wanted = np.append(target.ravel(), np.array(wide) * prior[: 1 + knows])
        found = np.linalg.lstsq(rows, wanted, rcond=None)[0]
        return found[0], found[1] if knows else 0.0

    for row, node in enumerate(nodes.tolist()):
        common = fitted(across[0][last], across[1][last], across[1][node], (0.0, 1.0), 1e-3)
        np.testing.assert_allclose([B[row, 2], C[row, 2]], common, rtol=1e-7, atol=1e-10)
        for k in range(2):
            own = fitted(x[last] @ V[k], h[last] @ V[k], h[node] @ V[k], common, 2 / SAMPLES)
            np.testing.assert_allclose([B[row, k], C[row, k]], own, rtol=1e-7, atol=1e-10)


def test_slopes_of_what_does_not_vary_are_those_of_the_prior() -> None:
    nothing = np.zeros(3)
    for knows, expected in ((False, (0.0, 0.0)), (True, (0.4, 0.7))):
        B, C = _fit((nothing, nothing, nothing), (nothing[None], nothing[None]), (0.4, 0.7), 0.5, knows)
        np.testing.assert_array_equal([B[0], C[0]], [[one] * 3 for one in expected])


def test_samples_of_several_runs_and_those_that_failed() -> None:
    one, other = finished(10, seed=1), finished(9, seed=2)
    both = Memory.learn([one, other], GRID, RULE)
    whole = np.concatenate([known(10, seed=1)[0], known(9, seed=2)[0]], axis=1)
    assert both.samples == 19
    np.testing.assert_allclose(both.states, whole.mean(axis=1), rtol=1e-9, atol=1e-11)
    trajectory = one.trajectory.copy()
    trajectory[4, 3, 2], trajectory[N, 7, 0] = np.nan, np.inf
    some = Memory.learn(replace(one, trajectory=trajectory), GRID, RULE)
    assert some.samples == 8
    left = np.delete(known(10, seed=1)[0], [3, 7], axis=1)
    np.testing.assert_allclose(some.states, left.mean(axis=1), rtol=1e-9, atol=1e-11)
    shaped = replace(one, trajectory=one.trajectory.reshape(N + 1, 10, 2, 3))
    np.testing.assert_array_equal(Memory.learn(shaped, GRID, RULE).states, Memory.learn(one, GRID, RULE).states)


def test_what_a_memory_fits() -> None:
    """The same steps to a millionth."""
    memory = Memory.learn(finished(), GRID, RULE)
    memory.check(TABLE.__class__(GRID * (1 + 1e-8), TABLE.a, TABLE.b, TABLE.c, TABLE.held * (1 + 1e-8)), SIZE)
    for change, message in (
        ({"timesteps": GRID * (1 + 1e-4)}, "learnt with other timesteps"),
        ({"timesteps": GRID + 0.5}, "learnt with other timesteps"),
        ({"held": TABLE.held * (1 + 1e-4)}, "learnt with another noise schedule"),
    ):
        other = replace(TABLE, **({"timesteps": GRID} | change))
        with pytest.raises(ValueError, match=f"^memory: {message}"):
            memory.check(other, SIZE)
    flow = NoiseSchedule.flow_matching()
    few, near = flow.timesteps(10), flow.timesteps(10)
    near[4] *= 1.01  # timesteps of less than 1 differ by less than 1
    done = solve_sequential(TanhNetwork(SIZE), normal((8, SIZE)), few, Euler(flow), save="trajectory")
    with pytest.raises(ValueError, match=r"^memory: learnt with other timesteps"):
        Memory.learn(done, few, Euler(flow)).check(Euler(flow).recurrence(near), SIZE)


def test_what_is_kept_of_a_memory_in_a_file(tmp_path: Path) -> None:
    memory = Memory.learn(finished(), GRID, RULE)
    memory.save(tmp_path / "memory.npz")
    with np.load(tmp_path / "memory.npz") as archive:
        assert {archive[name].dtype for name in ("timesteps", "held")} == {np.dtype(np.float64)}
        assert archive["states"].dtype == np.float32
    again = Memory.load(tmp_path / "memory.npz")
    again.check(replace(TABLE, timesteps=GRID), SIZE)
    np.testing.assert_array_equal(again.held, memory.held)
    assert again.rest.dtype == np.float64
    np.testing.assert_allclose(again.rest, memory.rest, rtol=1e-6)
    assert repr(again) == repr(Memory.load(tmp_path / "memory.npz"))
    assert repr(again) != repr(memory)  # it says what it holds
    np.savez(tmp_path / "code.npz", kind=np.array(KIND), timesteps=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        Memory.load(tmp_path / "code.npz")
    np.savez(tmp_path / "other.npz", states=np.zeros(3))
    with pytest.raises(ValueError, match=r"^file: expected one that Memory\.save has written"):
        Memory.load(tmp_path / "other.npz")


def test_what_is_no_run_of_the_same_samples_is_told() -> None:
    other = solve_sequential(TanhNetwork(SIZE + 1), normal((8, SIZE + 1)), GRID, RULE, save="trajectory")
    with pytest.raises(ValueError, match=r"^solutions: expected some, of samples of one size, got 2 of sizes \[6, 7\]"):
        Memory.learn([finished(), other], GRID, RULE)
    with pytest.raises(ValueError, match=r"^solutions: expected some, of samples of one size, got 0 of sizes \[\]"):
        Memory.learn([], GRID, RULE)
    with pytest.raises(TypeError, match=r"^solutions: expected what solve returns, got ndarray"):
        Memory.learn([finished().trajectory], GRID, RULE)
