"""Where do structure heads keep their tolerance, and where not? ``python -m benchmarks.structure_errors``.

Three small random heads that care for their frame, eight structures each. *Growth*: what the sampler itself, one step
after another, makes of a relative difference of 1e-6 in its first state, over that difference, after alignment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import typer
from torch import Tensor

from parasolver_adapters.samplers import parallel
from parasolver_adapters.structures import RigidFrames, aligned_distance, centred_noise, sample_structure

HEADS, STRUCTURES, ATOMS = 3, 8, 12
SAMPLERS: dict[str, dict[str, float]] = {
    "AlphaFold 3's": {},
    "ESMFold2's": {"noise_scale": 0.0, "step_scale": 1.0, "gamma_0": 0.605, "gamma_min": 1.107},
    "without noise": {"noise_scale": 0.0},
}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def head(seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """As in the documentation of structure heads."""
    weights = normal(3 * ATOMS, 3 * ATOMS, seed=seed) / 6

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma[:, None, None]
        update = torch.tanh((x / (256 + s**2).sqrt()).flatten(1) @ weights).reshape(x.shape)
        return 256 / (256 + s**2) * x + 16 * s / (256 + s**2).sqrt() * update

    return network


def distances(steps: int, tolerance: float, options: dict[str, Any]) -> tuple[Tensor, Tensor, list[int]]:
    """Of all structures: the distance to the plain loop's over their size, the growth; and the rounds of each head."""
    sigmas = torch.cat([16 * torch.linspace(160 ** (1 / 7), 4e-4 ** (1 / 7), steps) ** 7, torch.zeros(1)])
    errors, growths, rounds = [], [], []
    for seed in range(HEADS):
        model, sample = RigidFrames(head(seed)), parallel(sample_structure, 64, sigma_data=16.0, tolerance=tolerance)
        x = sigmas[0] * centred_noise(STRUCTURES, ATOMS, generator=torch.Generator().manual_seed(seed))
        want = sample_structure(model, x, sigmas, **options)
        size = want.pow(2).sum(-1).mean(1).sqrt()
        errors.append(aligned_distance(sample(model, x, sigmas, **options), want) / size)
        beside = sample_structure(model, x * (1 + 1e-6 * normal(*x.shape, seed=9)), sigmas, **options)
        growths.append(aligned_distance(beside, want) / size / 1e-6)
        assert sample.solution is not None
        rounds.append(sample.solution.stats.rounds)
    return torch.cat(errors), torch.cat(growths), rounds


def _short(value: torch.Tensor) -> str:
    """Two digits, and no exponent."""
    return f"{float(f'{value:.1e}'):g}"


def main() -> None:
    """Print the table."""
    print("| sampler | steps | tolerance | rounds | within 1 % | largest distance | growth: median | largest |")
    print("|---|---|---|---|---|---|---|---|")
    for name, options in SAMPLERS.items():
        for steps in (68, 200):
            for tolerance in (1e-2, 1e-4):
                errors, growths, rounds = distances(steps, tolerance, options)
                within = f"{int((errors < 1e-2).sum())} of {len(errors)}"
                cells = [name, steps, f"{tolerance:.0e}", f"{min(rounds)} - {max(rounds)}", within]
                cells += [f"{errors.max():.1e}", _short(growths.median()), _short(growths.max())]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    typer.run(main)
