"""What do time subintervals cost? ``python -m benchmarks.subintervals``.

Samples some problems with the steps in groups, each group a node (``solve(..., subintervals=M)``), and each step by
itself, with the same rows in a network call. Rounds count the network calls that are waited for.
"""

from __future__ import annotations

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from benchmarks.problems import PROBLEMS
from benchmarks.tables import markdown
from parasolver_core import DDIM, DDPM, Solution, StepRule, solve, solve_sequential

NETWORKS = ("mixture", "policy")
SAMPLERS = {"DDPM-1000": (DDPM, 1000, (1000, 500, 200, 100)), "DDIM-50": (DDIM, 50, (50, 25, 10))}
WINDOWS = (8, 32)
TOLERANCE = 1e-2
SAMPLES = 4


def errors(found: Solution, way: Solution) -> np.ndarray:
    """True relative error of each sample."""
    apart, size = (one.double().flatten(1).norm(dim=1) for one in (found.sample - way.sample, way.sample))
    return (apart / size).numpy()


def lines(console: Console) -> list[dict[str, str]]:
    """A line for each network, sampler, window and number of subintervals."""
    table = []
    jobs = [(network, sampler) for network in NETWORKS for sampler in SAMPLERS]
    for network, sampler in track(jobs, "sampling", console=console):
        problem, (rule, steps, counts) = PROBLEMS[network], SAMPLERS[sampler]
        step_rule: StepRule = rule(problem.schedule, prediction_type=problem.prediction_type)
        run = (problem.make(), problem.starts(SAMPLES), problem.schedule.timesteps(steps), step_rule)
        with torch.inference_mode():
            way = solve_sequential(*run)
            for window in WINDOWS:
                for method, count in [("secant", one) for one in counts] + [("parasolver", one) for one in counts]:
                    tolerance = TOLERANCE if method == "secant" else 0.55 if sampler.startswith("DDPM") else 5e-2
                    found = solve(*run, window, subintervals=count, method=method, tolerance=tolerance, check=False)
                    table.append(
                        {
                            "problem": network,
                            "sampler": f"{sampler}, window {window}",
                            "method": method,
                            "subintervals": str(count),
                            "rounds": str(found.stats.rounds),
                            "evaluations a sample": f"{found.stats.evaluations / SAMPLES:.0f}",
                            "median true error": f"{100 * float(np.median(errors(found, way))):.2g} %",
                        }
                    )
                    console.print(" | ".join(table[-1].values()))
    return table


def main() -> None:
    """Print the table."""
    console = Console()
    console.print(markdown("Subintervals", lines(console)))


if __name__ == "__main__":
    main()
