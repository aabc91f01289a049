"""A sampler of your own: Adams-Bashforth of order 2 for flow matching, as a table of
numbers.

    x_{i+1} = x_i + h_i ((1 + r_i / 2) v_i - r_i / 2 v_{i-1})
    h_i = t_{i+1} - t_i,   r_i = h_i / h_{i-1}

Noise is at t = 1, data at t = 0, and v points from data to noise. A step rule
states the coefficients; the solver does the rest, sequentially and in parallel.
"""

import numpy as np
from numpy.typing import NDArray

from parasolver_core import Recurrence, StepRule, solve, solve_sequential


class AdamsBashforth2(StepRule):
    def recurrence(self, timesteps: NDArray[np.float64]) -> Recurrence:
        t, n = timesteps, len(timesteps)
        h = np.diff(np.append(t, 0.0))
        r = np.append(
            0.0, h[1:] / h[:-1]
        )  # the first step has no output before it: Euler
        return Recurrence(
            timesteps=t,
            a=np.ones((n, 1)),
            b=np.stack([h * (1 + r / 2), -h * r / 2], axis=1),
            c=np.zeros(n),  # no noise is added
            # Held constant before a node is evaluated: the clean sample x - t v.
            held=np.stack([np.ones(n), -t], axis=1),
            # A first guess of dv/dx, for data N(0, 1): it decides how many rounds only.
            slope=(2 * t - 1) / (t**2 + (1 - t) ** 2),
        )


def velocity(x: NDArray[np.float64], t: NDArray[np.float64]) -> NDArray[np.float64]:
    """The exact field of data N(2, 1); x is (rows, 8), t is (rows,)."""
    t = t[:, None]
    return (x * (2 * t - 1) - 2 * t) / (t**2 + (1 - t) ** 2)


def main() -> float:
    noise = np.random.default_rng(0).standard_normal((4, 8))
    timesteps = np.linspace(1, 0, 40, endpoint=False)
    sequential = solve_sequential(velocity, noise, timesteps, AdamsBashforth2())
    solution = solve(
        velocity, noise, timesteps, AdamsBashforth2(), window=16, tolerance=1e-3
    )
    distance = np.linalg.norm(solution.sample - sequential.sample) / np.linalg.norm(
        sequential.sample
    )
    print(solution.message)
    print(f"distance to the loop: {distance:.1e}, mean: {solution.sample.mean():.2f}")
    return float(distance)


if __name__ == "__main__":
    main()
