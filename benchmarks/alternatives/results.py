"""What the methods took and what came out, by sample, method and setting."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.frechet import fit_gaussian, gaussian_distance, load_reference
from benchmarks.latency.devices import Device

SEQUENTIAL, OURS = "sequential", "ParaSolver"
Calls = list[tuple[int, float]]


@dataclass(frozen=True)
class Run:
    """One sample by one method with one setting.

    Args:
        method, setting: as in tables.
        error: relative RMS distance to the sequential sample.
        calls: of the network, one after another: rows (guidance takes two) and share of the network that ran.
        seconds: on this machine, with everything that a user waits for.
        features: (64,), of the picture, for the Frechet distance.
        right: whether the classifier sees the class that was asked for.
    """

    method: str
    setting: str
    error: float
    calls: Calls
    seconds: float
    features: list[float]
    right: bool

    def time(self, device: Device) -> float:
        """Of the network, in calls of one row on one device; ours with the solver's own part."""
        overhead = device.overhead if self.method == OURS else 0.0
        return sum(share * device.call(rows) + overhead for rows, share in self.calls)


class Results:
    """The runs of all samples in a folder, by method and setting."""

    def __init__(self, folder: Path) -> None:
        self.points: dict[tuple[str, str], list[Run]] = defaultdict(list)
        files = sorted(folder.glob("sample-*.json"))
        self.samples = len(files)
        for file in files:
            for one in json.loads(file.read_text()):
                run = Run(**one | {"calls": [(rows, share) for rows, share in one["calls"]]})
                self.points[run.method, run.setting].append(run)

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.points))

    def of(self, method: str) -> list[list[Run]]:
        """The runs of each setting of a method."""
        return [runs for (name, _), runs in self.points.items() if name == method]

    def time(self, runs: list[Run], device: Device) -> float:
        """Mean on ``device``; the unit is the sequential sample on a single one."""
        alone = Device(device.free, overhead=0.0)
        unit = np.mean([one.time(alone) for one in self.points[SEQUENTIAL, ""]])
        return float(np.mean([one.time(device) for one in runs]) / unit)

    def best(self, method: str, device: Device, error: float) -> float | None:
        """The least time of a setting whose error is no larger; None if there is none."""
        times = [self.time(runs, device) for runs in self.of(method) if mean_error(runs) <= error]
        return min(times, default=None)


def mean_error(runs: list[Run]) -> float:
    """Geometric mean."""
    return float(np.exp(np.mean(np.log([max(one.error, 1e-9) for one in runs]))))


def frechet(runs: list[Run]) -> float:
    """Squared distance to the real pictures; with few samples too large, so compare at equal numbers; one: NaN."""
    if len(runs) < 2:
        return float("nan")
    return gaussian_distance(fit_gaussian(np.array([one.features for one in runs])), load_reference())
