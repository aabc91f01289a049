"""How many rounds could any slope save? ``python -m benchmarks.limits``.

All steps are in the window, and what stands for the network's Jacobian at a node is the identity slope, the secant, or
the Jacobian itself, applied to the correction of the node. The last is Newton's method for the whole trajectory; its
products are made one node after another, so that it is a bound and no method to use.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks.pareto.runs import Bench
from benchmarks.pareto.settings import SETTINGS, Setting
from benchmarks.problems import PROBLEMS
from benchmarks.tables import show

STEP = 1e-2  # of the state's norm: where the network is evaluated for the products with its Jacobian
KINDS = ("identity", "secant", "full Jacobian")

Product = Callable[[int, Tensor], Tensor]


class Trajectory:
    """States ``(N + 1, batch, size)`` and the outputs ``(N, batch, size)`` believed there, corrected as a whole."""

    def __init__(self, bench: Bench, kind: str) -> None:
        self.bench, self.kind = bench, kind
        self.table = bench.rule.recurrence(bench.timesteps)
        self.t = torch.as_tensor(np.asarray(self.table.timesteps))
        slope = self.table.identity_slope if kind == "identity" else self.table.slope
        self.slopes = torch.from_numpy(slope)[:, None].repeat(1, len(bench.x_T))
        self.moved: Tensor | None = None
        self.x_T = bench.x_T.flatten(1).double()
        (p, q), first = self.table.held[0], self.network(0, self.x_T)
        held = p * self.x_T + q * first
        self.x, self.m = self.run(self.x_T, lambda i, x: (held - self.table.held[i][0] * x) / self.table.held[i][1])

    def network(self, i: int, x: Tensor) -> Tensor:
        rows = x.reshape(-1, *self.bench.x_T.shape[1:]).to(self.bench.x_T)
        return self.bench.denoiser(rows, self.t[i].expand(len(rows))).flatten(1).double()

    def run(self, x_0: Tensor, output: Product) -> tuple[Tensor, Tensor]:
        """The recurrence from ``x_0`` with ``m_i = output(i, x_i)``."""
        x, m = [x_0], []
        for i in range(len(self.table)):
            m.insert(0, output(i, x[0]))
            x.insert(0, self.table.advance(i, x[: self.table.memory], m[: self.table.memory]))
        return torch.stack(x[::-1]), torch.stack(m[::-1])

    def round(self) -> None:
        """Evaluate every node, and correct all states."""
        outputs = torch.stack([self.network(i, x) for i, x in enumerate(self.x[:-1])])
        defects = outputs - self.m
        if self.kind == "secant" and self.moved is not None:
            size = self.moved.square().sum(-1)
            change = (self.moved * defects).sum(-1) / size.clamp(min=1e-300)
            self.slopes += torch.where(size > 0, change, 0.0)
        moves, changes = self.run(torch.zeros_like(self.x_T), lambda i, dx: defects[i] + self.product(i, dx))
        self.x, self.m, self.moved = self.x + moves, self.m + changes, moves[:-1]

    def product(self, i: int, dx: Tensor) -> Tensor:
        """What stands for the Jacobian at node i, times the correction."""
        if self.kind != "full Jacobian" or not dx.any():
            return self.slopes[i][:, None] * dx
        scale = STEP * self.x[i].norm(dim=1, keepdim=True) / dx.norm(dim=1, keepdim=True).clamp(min=1e-300)
        ahead, back = self.network(i, torch.cat([self.x[i] + scale * dx, self.x[i] - scale * dx])).chunk(2)
        return (ahead - back) / (2 * scale)

    def error(self) -> float:
        """Geometric mean over the samples."""
        return float(np.exp(np.mean(np.log(self.bench.errors(self.x[-1])))))


def calls_until(errors: list[float], error: float) -> str:
    """Network calls until an error, interpolated in its logarithm; ``errors[k]`` is that after ``k + 1`` calls."""
    for k, (before, after) in enumerate(pairwise(errors), start=1):
        if after <= error < before:
            return f"{k + np.log(before / error) / np.log(before / after):.1f}"
    return f"> {len(errors)}"


@torch.no_grad()
def main(
    seeds: Annotated[int, typer.Option(help="Samples of each problem.")] = 8,
    error: Annotated[float, typer.Option(help="Relative error of the sample.")] = 1e-2,
    most: Annotated[int, typer.Option(help="The most rounds.")] = 10,
) -> None:
    """Print network calls until the error, and the errors after each call."""
    rows = []
    for name in PROBLEMS:
        denoiser = PROBLEMS[name].make()
        for setting in (SETTINGS["DDIM-50, window 50"], Setting("2M-25, window 25", "2M", 25, 25)):
            bench = Bench(PROBLEMS[name], setting, denoiser, seeds)
            for kind in KINDS:
                path = Trajectory(bench, kind)
                errors = [path.error()]
                for _ in track(range(most), f"{name}, {setting.name}, {kind}"):
                    path.round()
                    errors.append(path.error())
                row = {"problem": name, "setting": setting.name, "slopes": kind}
                row |= {f"calls to {error:.1%}": calls_until(errors, error)}
                rows.append(row | {"errors": " ".join(f"{one:.0e}" for one in errors)})
    show(Console(), f"{seeds} samples, all steps in the window", rows)


if __name__ == "__main__":
    typer.run(main)
