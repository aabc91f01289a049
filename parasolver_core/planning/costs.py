"""What a network call costs, by its number of rows: measured warm, and kept for later runs."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import array_api_compat

from parasolver_core.arrays import Array, is_array
from parasolver_core.introspection import reachable

_REPEATS = 15  # timed calls of each size at most
_LINEAR = 1.9  # twice the rows cost so many times as much: larger calls gain nothing more
_DAYS = 30  # how long tables are kept
_MOST_BYTES, _MOST_ROWS = 10**6, 2**31  # of a file of tables, and in a table; what is larger is none of ours
_DAY = 86400.0


@dataclass(frozen=True)
class CostTable:
    """Seconds of one network call by its rows; linear in between, proportional to the rows beyond the last.

    Args:
        rows: increasing, at least 1.
        seconds: as many, finite and above 0.

    Example:
        >>> CostTable.of({1: 0.05, 8: 0.06, 32: 0.2})(16)
        0.10666666666666667
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.rows or len(self.rows) != len(self.seconds):
            raise ValueError(f"costs: expected seconds for some row counts, got {self.rows} and {self.seconds}")
        if list(self.rows) != sorted(set(self.rows)) or self.rows[0] < 1:
            raise ValueError(f"costs: expected increasing row counts of at least 1, got {self.rows}")
        if not all(math.isfinite(second) and second > 0 for second in self.seconds):
            raise ValueError(f"costs: expected finite seconds above 0, got {self.seconds}")

    @classmethod
    def of(cls, costs: CostTable | Mapping[int, float]) -> CostTable:
        """From seconds by row count."""
        if isinstance(costs, CostTable):
            return costs
        if not isinstance(costs, Mapping):
            raise TypeError(f"costs: expected seconds by row count, such as {{1: 0.05, 8: 0.06}}, got {costs!r}")
        try:
            pairs = sorted((int(rows), float(seconds)) for rows, seconds in costs.items())
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"costs: expected seconds by row count, such as {{1: 0.05, 8: 0.06}}, got {costs}"
            ) from error
        return cls(tuple(rows for rows, _ in pairs), tuple(seconds for _, seconds in pairs))

    def __call__(self, rows: int) -> float:
        """Seconds of one call with so many rows."""
        if rows <= self.rows[0]:
            return self.seconds[0]
        for i in range(1, len(self.rows)):
            if rows <= self.rows[i]:
                share = (rows - self.rows[i - 1]) / (self.rows[i] - self.rows[i - 1])
                return (1 - share) * self.seconds[i - 1] + share * self.seconds[i]
        return self.seconds[-1] * rows / self.rows[-1]

    def up_to(self, rows: int) -> CostTable:
        """Without larger calls, but for the smallest."""
        kept = max(sum(size <= rows for size in self.rows), 1)
        return CostTable(self.rows[:kept], self.seconds[:kept])

    def in_calls(self, rows: int, most: int) -> float:
        """Seconds of so many rows in calls of at most ``most``."""
        full, rest = divmod(rows, most)
        return full * self(most) + (self(rest) if rest else 0.0)


def measure(
    call: Callable[[int], Any],
    smallest: int,
    largest: int,
    calls: float,
    least: float = 0.0,
    agree: Callable[[Sequence[float]], list[float]] = list,
) -> CostTable:
    """Time calls of ``smallest``, twice, four times ... as many rows, each warm: the fastest of a few.

    Larger sizes are tried until one would cost too much or gains nothing any more; what is left to spend goes into
    timing all of them again, in turns, so that a machine that is slow for a moment spoils no size alone.

    Args:
        call: evaluates so many rows, and waits until they are done.
        smallest, largest: row counts.
        calls, least: what to spend: as long as so many calls of the smallest size take, and at least so many seconds.
        agree: makes the seconds the same in all processes that share the rows.
    """

    def timed(rows: int) -> float:
        started = time.perf_counter()
        call(rows)
        return agree([time.perf_counter() - started])[0]

    times: dict[int, list[float]] = {}
    size, spent = smallest, 0.0
    while True:
        # compiles, chooses kernels and finds memory; once in the life of a network, so not charged for that
        timed(size)
        times[size] = [timed(size)]
        spent += 2 * times[size][0]
        budget = max(calls * times[smallest][0], least)
        last = [repeats[0] for repeats in times.values()][-3:]
        linear = len(last) == 3 and last[2] >= _LINEAR * last[1] >= _LINEAR**2 * last[0]
        size = min(2 * size, largest)
        if linear or size in times or spent + 4 * last[-1] > budget:
            break
    while len(times[smallest]) < _REPEATS and spent + sum(repeats[0] for repeats in times.values()) <= budget:
        for size, repeats in times.items():
            repeats.append(timed(size))
            spent += repeats[-1]
    fastest = [min(repeats) for repeats in times.values()]  # what disturbs a call only ever makes it slower
    # fewer rows do not take longer: they could be filled up
    return CostTable(tuple(times), tuple(min(fastest[i:]) for i in range(len(fastest))))


def describe(denoiser: Any, x_T: Array, *others: Any) -> str:
    """A key for the costs of a denoiser: what it is made of, the device, the shape and dtype, and what else matters.

    Labels, prompts and scales that it holds do not make another network of it, but a number of 0 or 1, such as a
    guidance scale, may switch a part of it off.
    """
    parts = [_device(x_T), f"{tuple(x_T.shape)} {x_T.dtype}", *map(str, others)]
    for held in reachable(denoiser, leaf=lambda part: is_array(part) or _has_parameters(part)):
        if isinstance(held, (bool, int, float, str)):
            parts.append(f"{type(held).__name__} {held if held in (0, 1) else 'of any value'}")
        elif is_array(held):
            parts.append(f"array {tuple(held.shape)} {held.dtype}")
        else:
            code = getattr(held, "__code__", None)
            parts.append(f"{type(held).__module__}.{type(held).__qualname__} {getattr(held, '__qualname__', '')}")
            parts += [code.co_code.hex()] if code is not None else []
            parts += _parameters(held) if _has_parameters(held) else []
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def recall(key: str, names: Sequence[str]) -> dict[str, CostTable] | None:
    """The tables of these names kept under a key; None if there are none, or they are old or damaged."""
    try:
        file = cache_folder() / f"{key}.json"
        about = file.stat()
        fresh = time.time() - about.st_mtime <= _DAY * _DAYS
        if not (fresh and stat.S_ISREG(about.st_mode) and about.st_size <= _MOST_BYTES):
            return None
        kept = json.loads(file.read_text(encoding="utf-8"))
        tables = {name: CostTable.of({int(rows): seconds for rows, seconds in kept[name].items()}) for name in names}
        return tables if all(table.rows[-1] <= _MOST_ROWS for table in tables.values()) else None
    except Exception:  # whatever the file holds, the run goes on: what is not there is measured
        return None


def keep(key: str, tables: Mapping[str, CostTable]) -> None:
    """Keep tables for later runs of this user; silently not, where nothing can be written."""
    entry = {name: dict(zip(t.rows, t.seconds, strict=True)) for name, t in tables.items()}
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        part = _written(folder, json.dumps(entry))
        try:
            part.replace(folder / f"{key}.json")  # other processes see the old file or the new one
        except OSError:
            part.unlink()
        for file in folder.iterdir():
            if time.time() - file.stat().st_mtime > _DAY * _DAYS:
                file.unlink(missing_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return


def _written(folder: Path, text: str) -> Path:
    """A new file with this text."""
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False, encoding="utf-8") as part:
        part.write(text)
    return Path(part.name)


def cache_folder() -> Path:
    """Where costs are kept, a file a key: ``parasolver/costs`` in the user's cache. It may be deleted at any time.

    A relative path in a variable of the environment is not used: it would be another folder in each working directory.
    """
    paths = (os.environ.get(name, "") for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"))
    folder = next((Path(path) for path in paths if os.path.isabs(path)), None)
    return (folder or Path.home() / ".cache") / "parasolver" / "costs"


def _has_parameters(thing: Any) -> bool:
    """Whether a thing is a network in the manner of PyTorch."""
    return not isinstance(thing, type) and callable(getattr(thing, "parameters", None))


def _parameters(network: Any) -> list[str]:
    """Shapes and dtypes of a network's arrays."""
    try:
        return [f"{tuple(array.shape)} {array.dtype}" for array in network.parameters()]
    except Exception:  # something else of that name
        return []


def _device(x_T: Array) -> str:
    """The device and, as far as the library tells, its model and threads."""
    device, library = array_api_compat.device(x_T), sys.modules[type(x_T).__module__.partition(".")[0]]
    told = [_machine(), str(getattr(library, "__version__", ""))]
    if array_api_compat.is_torch_array(x_T):
        xp: Any = array_api_compat.array_namespace(x_T)
        told += [str(xp.get_num_threads())]
        told += [xp.cuda.get_device_name(device)] if str(device).startswith("cuda") else []
    return f"{type(x_T).__module__} {device} {' '.join(told)}"


@cache
def _machine() -> str:
    return f"{platform.node()} {platform.machine()} {os.cpu_count()}"
