"""The network of a subinterval, held against the sampler's own steps one by one."""

from typing import Any

import numpy as np
import pytest

from parasolver_core.denoiser.subintervals import SubintervalEvaluator
from parasolver_core.samplers.noise import NoiseSource, draw
from parasolver_core.samplers.subintervals import SubintervalNoise, Subintervals
from tests.core.any_tables import any_table, step
from tests.core.problems import normal

N, BATCH, SIZE, SEED = 10, 3, 4, 5


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("noisy", [False, True], ids=["ode", "noise"])
@pytest.mark.parametrize("reads", [(1, 1), (1, 3), (2, 1), (3, 2)], ids=str)
def test_subintervals_of_several_samples_at_once(reads: tuple[int, int], noisy: bool, keep: bool) -> None:
    table = any_table(N, *reads, noisy)
    tables, x_T, asked = Subintervals(table, 4), normal((BATCH, SIZE)), list[Any]()
    assert tables.lengths.tolist() == [2, 3, 3, 2]
    states, outputs = tables.form.reads

    def network(x: Any, t: Any) -> Any:
        asked.append(t.tolist())
        return np.tanh(x[:, ::-1]) + np.asarray(t)[:, None] / 10

    X, H = np.zeros((BATCH, N + 1, SIZE)), np.zeros((BATCH, N, SIZE))
    for sample in range(BATCH):
        x, m = {0: x_T[sample]}, {}
        for i in range(N):
            m[i] = network(x[i][None], table.timesteps[[i]])[0]
            H[sample, i] = table.held[i] @ np.stack([x[i], m[i]])
            x[i + 1] = step(table, i, x, m, draw(SEED, sample, i, (SIZE,)))
        X[sample] = [x[i] for i in range(N + 1)]

    def travelling(sample: int, j: int) -> np.ndarray:
        first = tables.ends[j]
        before = [X[sample, first - k] if first >= k else np.zeros(SIZE) for k in range(states)]
        held = [H[sample, first - 1 - k] if first > k else np.zeros(SIZE) for k in range(outputs - 1)]
        return np.stack([*before, *(tables.scale[j] * h for h in held)])

    noise = NoiseSource(x_T, x_T.dtype, N, SEED, None)
    evaluator = SubintervalEvaluator(network, x_T, tables, noise, None, keep=keep)
    own = SubintervalNoise(tables.begin(x_T), x_T.dtype, noise, tables)
    nodes, samples = np.array([1, 3, 0, 2, 0]), np.array([0, 1, 1, 2, 2])
    given = np.stack([travelling(s, j) for s, j in zip(samples, nodes, strict=True)])
    given = given if tables.rows > 1 else given[:, 0]
    asked.clear()
    for x in (given, [given[:2], given[2:]]):
        out = np.reshape(evaluator(x, nodes, samples), (len(nodes), tables.rows, SIZE))
        for row, (s, j) in enumerate(zip(samples.tolist(), nodes.tolist(), strict=True)):
            after = tables.a[j] * travelling(s, j) + tables.b[j] * out[row]
            after[0] += tables.recurrence.c[j] * np.ravel(own(j, s))[:SIZE] if noisy else 0.0
            want = travelling(s, j + 1) if j < 3 else X[s, [N]]
            np.testing.assert_allclose(after[: len(want)], want, rtol=1e-9, atol=1e-10)
            between = X[s, tables.ends[j] + 1 : tables.ends[j + 1]] if keep else []
            np.testing.assert_allclose(np.array(evaluator.between(s, j)), np.array(between), rtol=1e-9, atol=1e-10)
    first = [table.timesteps[tables.ends[nodes] + ahead].tolist() for ahead in (0, 1)]
    assert asked[:2] == first
    assert [len(one) for one in asked] == [5, 5, 2, 5, 5, 2]
    assert (evaluator.turns(nodes), evaluator.rows(nodes)) == (3, 12)
