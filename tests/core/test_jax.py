"""JAX: its arrays cannot be written to, and a compiled network is compiled for each number of rows.

In its 32-bit mode, which is the usual one, but for the promises: those are of float64. The promises are tried on a few
runs each; on any, in the slow tests, where JAX is one of the libraries of the fixture `xp`.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from parasolver_core import DDIM, DDPM, DPMSolver, NoiseSchedule, StepRule, solve, solve_sequential
from tests.arrays import jax_in_64_bits
from tests.core import test_promises as promises
from tests.core.any_runs import Run
from tests.core.problems import normal, relative

jax = pytest.importorskip("jax")
jnp = jax.numpy

SCHEDULE = NoiseSchedule.linear()
WEIGHTS = normal((8, 8), dtype="float32") / 2


@pytest.mark.parametrize(
    ("rule", "method"), [(DPMSolver(SCHEDULE), "secant"), (DDPM(SCHEDULE), "secant"), (DDIM(SCHEDULE), "parataa")]
)
def test_a_compiled_network_is_sampled_as_by_numpy_in_buckets(rule: StepRule, method: str) -> None:
    compiled: list[Any] = []

    @jax.jit
    def network(x: jax.Array, t: jax.Array) -> jax.Array:
        compiled.append((x.shape, str(t.dtype)))  # while it is traced
        return jnp.tanh(x @ WEIGHTS) + 0.3 * x

    start, grid = normal((2, 8), dtype="float32", seed=1), SCHEDULE.timesteps(20)
    options: dict[str, Any] = {"method": method, "tolerance": 1e-3, "save": "trajectory"}
    got = solve(network, jnp.asarray(start), grid, rule, 6, buckets=(1, 4, 12), **options)
    same = solve(lambda x, t: np.tanh(x @ WEIGHTS) + np.float32(0.3) * x, start, grid, rule, 6, **options)
    assert isinstance(got.sample, jax.Array)
    assert got.sample.dtype == jnp.float32
    assert abs(got.stats.rounds - same.stats.rounds) <= 1  # another rounding
    assert relative(np.asarray(got.trajectory), same.trajectory) < 2e-3
    assert set(compiled) <= {((rows, 8), "int32") for rows in (1, 4, 12)}
    assert len(set(compiled)) == len(compiled)


def test_a_sample_that_fails_leaves_the_plain_loop() -> None:
    def network(x: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.where((t[:, None] < 500) & (x[:, :1] < 0), jnp.nan, 0.1 * jnp.tanh(x))

    x_T = jnp.asarray([[4.0, 1.0], [-4.0, 1.0]])
    got = solve_sequential(network, x_T, SCHEDULE.timesteps(4), DDIM(SCHEDULE), throw=False)
    assert np.isfinite(np.asarray(got.sample[0, :])).all()
    assert [status.name for status in got.statuses] == ["CONVERGED", "NONFINITE_MODEL"]


@pytest.fixture
def double() -> Iterator[None]:
    with jax_in_64_bits():
        yield


PROMISES: dict[str, tuple[Any, dict[str, Any]]] = {
    "window of one": (promises.test_window_one_is_the_sequential_sampler_to_the_last_bit, {"tolerance": 0.1}),
    "k rounds": (promises.test_after_k_rounds_the_first_k_states_are_exact, {"method": "secant"}),
    "tolerance of zero": (promises.test_tolerance_zero_is_the_sequential_sample, {}),
}


@pytest.mark.parametrize("name", PROMISES)
@pytest.mark.parametrize(
    "run", [Run("dpm 2", 6, 3, 2, "float64", 0), Run("ddpm", 5, 8, 1, "float64", 1)], ids=lambda run: run.sampler
)
def test_the_promises_hold(double: None, name: str, run: Run) -> None:
    promise, options = PROMISES[name]
    promise.hypothesis.inner_test(jnp, run=run, **options)
