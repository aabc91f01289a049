"""JAX, in its 32-bit mode: its arrays cannot be written to, and a compiled network is compiled for each number of rows.

Warnings are errors here as everywhere.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parasolver_core import DDIM, DDPM, DPMSolver, NoiseSchedule, StepRule, solve, solve_sequential
from tests.core.problems import normal, relative

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
