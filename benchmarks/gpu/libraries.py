"""Are the promises kept on every array library that is here, in float32 and float64?"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.device import Lab
from benchmarks.gpu.scores import Score
from parasolver_core import DDIM, DDPM, DPMSolver, NoiseSchedule, StepRule, solve, solve_sequential
from parasolver_core.arrays import to_host

PART = "libraries"
SCHEDULE = NoiseSchedule.linear()
RULES: dict[str, StepRule] = {
    "DDIM": DDIM(SCHEDULE),
    "DDPM": DDPM(SCHEDULE),
    "2M": DPMSolver(SCHEDULE, order=2),
}
BOUNDS = {"float32": 2e-4, "float64": 1e-9}  # of tolerance=0, and of the sample against NumPy's


def libraries(lab: Lab) -> dict[str, Callable[[Any], Any]]:
    """What makes an array of each from NumPy's."""
    found: dict[str, Callable[[Any], Any]] = {"numpy": np.asarray, "torch": torch.from_numpy}
    if lab.cuda:
        found["torch on the card"] = lambda array: torch.from_numpy(array).to(lab.device)
        if importlib.util.find_spec("cupy") is not None:
            import cupy

            found["cupy"] = cupy.asarray
    return found


def apart(found: Any, truth: Any) -> float:
    """Relative RMS distance, on the host."""
    a, b = (np.asarray(to_host(one), dtype=np.float64) for one in (found, truth))
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))


class Comparison:
    """The same problems on one library after another; the first one's samples are what others are compared with."""

    def __init__(self, steps: int) -> None:
        draw = np.random.default_rng(1)
        self._data, self._x_T = draw.uniform(-1, 1, (50, 64)), draw.standard_normal((3, 64))
        self._timesteps = SCHEDULE.timesteps(steps)
        self._first: dict[tuple[str, str], Any] = {}

    def found(self, make: Callable[[Any], Any], dtype: str, name: str) -> dict[str, Any]:
        """A line of results."""
        rule, x_T = RULES[name], make(self._x_T.astype(dtype))
        problem: tuple[Any, ...] = (Score(make(self._data.astype(dtype)), SCHEDULE), x_T, self._timesteps, rule)
        noisy: dict[str, Any] = {"seed": [7, 8, 9]} if name == "DDPM" else {}
        truth = solve_sequential(*problem, **noisy).sample
        near = solve(*problem, window=16, tolerance=1e-2, **noisy)
        values = {
            "zero": apart(solve(*problem, window=8, tolerance=0, **noisy).sample, truth),
            "percent": apart(near.sample, truth),
            "numpy": apart(truth, self._first.setdefault((dtype, name), to_host(truth))),
        }
        if noisy:  # the same seed, alone and with another window
            alone = solve(problem[0], x_T[2:], *problem[2:], window=16, tolerance=0, seed=[9]).sample
            values["alone"] = apart(alone, truth[2:])
        same = bool((to_host(solve(*problem, window=1, **noisy).sample) == to_host(truth)).all())
        close = all(value <= BOUNDS[dtype] for key, value in values.items() if key != "percent")
        ok = same and close and values["percent"] <= 1e-2
        return {"ok": ok, "same": same, "rounds": near.stats.rounds, **values}


def run(lab: Lab) -> None:
    """All libraries, dtypes and samplers."""
    compared = Comparison(12 if lab.tiny else 50)
    for library, make in libraries(lab).items():
        for dtype in BOUNDS:
            for rule in RULES:
                name = f"{library}, {dtype}, {rule}"
                lab.measure(PART, name, lambda m=make, d=dtype, r=rule: compared.found(m, d, r))
