"""A pendulum over 10,000 steps of RK4, by a loop and with all steps worked on at once.
No GPU is needed to gain."""

import time

import torch

from parasolver_adapters.vector_field import integrate

STEPS = 10_000


def pendulum(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.stack([y[1], -torch.sin(y[0])])


def main(steps: int = STEPS) -> float:
    y0 = torch.tensor([1.0, 0.0], dtype=torch.float64)
    t = torch.linspace(0, 10, steps + 1, dtype=torch.float64)
    start = time.perf_counter()
    sequential = integrate(
        pendulum, y0, t, method="rk4", linearization="sequential"
    ).states
    between = time.perf_counter()
    solution = integrate(pendulum, y0, t, method="rk4")
    end = time.perf_counter()
    difference = float((solution.states - sequential).abs().max())
    print(f"loop:     {between - start:.2f} s")
    print(f"parallel: {end - between:.2f} s, {solution.rounds} rounds")
    print(f"largest difference: {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
