"""How much the tests notice: small changes of the code, one at a time, each followed by the tests that call it.

``python -m tests.mutants --seed 0 --count 200 --seconds 3600`` works in a temporary copy of the project. The closest
and quickest tests follow each change first; what they do not notice is followed by all others. Listed are the changes
after which all of them still pass. Look at each: a test is missing, or it changes nothing that matters. The latter are
written down in ``immaterial.toml``, with the reason, and counted apart. Changes of docstrings, messages, annotations
and logging are not made. A first run takes half an hour longer: it records which test calls which function. What was
noticed is remembered, so a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import importlib.util
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from tests.changes import PARTS, ROOT, Site, function_of, immaterial, mutated, sites
from tests.reached import FOLDER, record, tests_of

PROJECT = ("tests", "parasolver_core", "parasolver_adapters")
LIBRARIES = ("numpy", "torch", "scipy.linalg", "array_api_strict", "array_api_compat.torch")
PIPELINES = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"  # brings most that tests of pipelines need
KEPT = FOLDER / "noticed.txt"
_FORK: Any = multiprocessing.get_context("fork")  # the large libraries are imported once
_BUDGET = 8.0  # seconds of tests that follow a change at first
_PATIENCE = 10  # a change may make tests slower so many times
_HANGS = 60  # a test that takes so long hangs: those recorded take a third at most
_MISUSED = (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED)
_NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "_build", "__pycache__", ".*_cache")
Outcome = tuple[str, str]


def closest(file: Path) -> list[str]:
    """The test files that may call a module: those that name it, that import from its package, and all others.

    Of each kind the smallest is first.
    """
    folder = "core" if file.parts[0] == "parasolver_core" else "adapters"
    tests = sorted((ROOT / "tests" / folder).glob("test_*.py"), key=lambda one: one.stat().st_size)
    module = ".".join(file.with_suffix("").parts).removeprefix("adapters.")
    texts = {one: one.read_text() for one in tests}
    packages = module.rpartition(".")[0], ".".join(module.split(".")[:2])
    naming = [one for one in tests if module in texts[one] or file.stem in one.stem]
    near = [one for one in tests if any(f"{name} import" in texts[one] for name in packages)]
    return [str(one.relative_to(ROOT)) for one in dict.fromkeys(naming + near + tests)]


def following(site: Site, seconds: float) -> tuple[list[str], list[str], int]:
    """The tests that call the function of a change, or anything of its file if it is in none: first, later, how many.

    The first are taken in turn from each test file, the closest one first and the quickest test of each first, for some
    seconds; later come the others, the quickest first, for so many seconds.
    """
    file = site[0]
    name = f"{file}:{function_of(site)}"
    whole = name.endswith(":")
    queues = []
    for one in closest(file):
        calls = tests_of(ROOT / one).items()
        own = [
            (told["seconds"], test) for test, told in calls if any(_calls(f, name, whole) for f in told["functions"])
        ]
        queues.append(sorted(own))
    turns = [one for turn in zip_longest(*queues) for one in turn if one is not None]
    first = _within(_BUDGET, turns)
    later = _within(seconds, sorted(set(turns) - set(first)))
    return [test for _, test in first], [test for _, test in later], len(turns)


def _within(budget: float, turns: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Those that fit into so many seconds; a slow test leaves room for quick ones behind it."""
    chosen: list[tuple[float, str]] = []
    for seconds, test in turns:
        if seconds <= budget or not chosen:
            chosen.append((seconds, test))
            budget -= seconds
    return chosen


def _calls(function: str, name: str, whole: bool) -> bool:
    return function.startswith(name) if whole else function == name


class Copy:
    """A copy of the project in which one module at a time is changed."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder / "project", seconds
        shutil.copytree(ROOT, self.folder, ignore=_NOT_COPIED)
        self._sound: set[str] = set()  # tests that failed with a change, and pass without it
        self._broken: set[str] = set()  # those that fail without it too: here they say nothing

    def outcome(self, site: Site) -> Outcome:
        """What became of a change: noticed, at first or later, survived, immaterial or undecided; and why."""
        text, told = mutated(site)
        if told in immaterial():
            return "immaterial", immaterial()[told]
        first, later, known = following(site, self.seconds)
        for tests, name in ((first, "noticed"), (later, "noticed later")):
            test = self._noticing(site[0], text, tests)
            if test is None:
                return "undecided", "time ran out"
            if test:
                return name, test
        return "survived", f"{len(first) + len(later)} tests pass, of {known} that call it"

    def _noticing(self, file: Path, text: str, tests: list[str]) -> str | None:
        """The first test that fails with this text of a module and passes without; empty if none, None without time."""
        left = [one for one in tests if one not in self._broken]
        while left:
            test = self._failing(file, text, left)
            if not test or test in self._sound:
                return test
            if self._failing(file, (ROOT / file).read_text(), [test]) == "":
                self._sound.add(test)
                return test
            self._broken.add(test)
            left.remove(test)
        return ""

    def _failing(self, file: Path, text: str, tests: list[str]) -> str | None:
        """The first test that fails with this text of a module; empty if none does, None where time ran out."""
        (self.folder / file).write_text(text)
        told = self.folder / "failed.txt"
        told.write_text("")
        process = _FORK.Process(target=_run_tests, args=(self.folder, tests, told))
        process.start()
        process.join(_PATIENCE * (_BUDGET + self.seconds))
        undecided = process.is_alive()
        process.kill()
        process.join()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what tests of several processes have left
        (self.folder / file).write_text((ROOT / file).read_text())
        failed = told.read_text()
        if undecided or (not failed and process.exitcode in _MISUSED):
            return None
        if process.exitcode == 0:
            return ""
        failed = failed or tests[0]  # the process itself may have died
        return next(one for one in tests if one.startswith(failed))


def _run_tests(folder: Path, tests: list[str], told: Path) -> None:
    """In a process of its own, which has the large libraries already and takes the project from the copy."""
    os.setsid()
    os.chdir(folder)
    sys.path[:0] = own = [str(folder), str(folder / "adapters")]
    os.environ["PYTHONPATH"] = os.pathsep.join(own)  # for the processes that tests start
    for name in [name for name in sys.modules if name.split(".")[0] in PROJECT]:
        del sys.modules[name]
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)

    class Teller:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            self._tell(report)

        def pytest_collectreport(self, report: pytest.CollectReport) -> None:
            self._tell(report)

        def _tell(self, report: pytest.TestReport | pytest.CollectReport) -> None:
            if report.failed and not told.read_text():
                told.write_text(report.nodeid)

    options = ["-n", "0", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", "--timeout", str(_HANGS)]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    os._exit(int(pytest.main([*options, *tests], plugins=[Teller()])))


def work(own: list[Site], seconds: float, end: float, results: Any) -> None:
    """The changes of one worker, in a copy of its own."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder), seconds)
        for site in own:
            if time.monotonic() > end:
                break
            results.put((site, copy.outcome(site)))
    results.put(None)


def _key(site: Site) -> str:
    """The change, as long as its file stays what it is."""
    text = hashlib.sha256((ROOT / site[0]).read_bytes()).hexdigest()[:12]
    return f"{site[0]} {text} {site[2]}"


def noticed_before() -> dict[str, str]:
    """What an earlier run found noticed, and how; what was not is tried again, since tests may have been added."""
    lines = KEPT.read_text().splitlines() if KEPT.exists() else []
    return dict(line.split(": ") for line in lines)


def share_out(sample: list[Site], given: argparse.Namespace, end: float) -> Iterator[tuple[Site, Outcome]]:
    """The changes and what became of them, as the workers find out."""
    os.environ["OMP_NUM_THREADS"] = "1"  # as in all tests
    for library in (*LIBRARIES, *([PIPELINES] if importlib.util.find_spec("diffusers") else [])):
        importlib.import_module(library)
    results = _FORK.Queue()
    parts = [sample[start :: given.workers] for start in range(given.workers)]
    workers = [_FORK.Process(target=work, args=(part, given.each, end, results)) for part in parts]
    for worker in workers:
        worker.start()
    left = len(workers)
    while left:
        result = results.get()
        if result is None:
            left -= 1
        else:
            yield result


def summary(part: str, counts: Counter[str]) -> str:
    """The share of what was noticed among the changes that matter, as far as they were followed."""
    noticed = counts["noticed"] + counts["noticed later"]
    decided = max(noticed + counts["survived"], 1)
    return f"{part}: {noticed / decided:.0%} of {decided} changes noticed; {dict(counts)}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="How much the tests notice.")
    parser.add_argument("--seed", type=int, default=0, help="of the sample of changes")
    parser.add_argument("--count", type=int, default=200, help="how many changes")
    parser.add_argument("--seconds", type=float, default=3600, help="no new change after so many seconds")
    parser.add_argument("--workers", type=int, default=2, help="how many copies of the project work at once")
    parser.add_argument("--each", type=float, default=90, help="seconds of tests for what the first did not notice")
    parser.add_argument("--part", choices=[*PARTS, "both"], default="both")
    parser.add_argument("--file", default="", help="only files whose name contains this")
    given = parser.parse_args(argv)
    known = {part: [one for one in sites(part) if given.file in one[0].name] for part in PARTS}
    every = [one for part in PARTS if given.part in (part, "both") for one in known[part]]
    sample = random.Random(given.seed).sample(every, min(given.count, len(every)))
    record(sorted({ROOT / one for site in sample for one in closest(site[0])}), given.workers)
    end, before = time.monotonic() + given.seconds, noticed_before()
    found: dict[Site, Outcome] = {one: (before[_key(one)], "") for one in sample if _key(one) in before}
    for site, (how, why) in share_out([one for one in sample if one not in found], given, end):
        found[site] = how, why
        if how.startswith("noticed"):
            with KEPT.open("a") as kept:
                kept.write(f"{_key(site)}: {how}\n")
        elif how != "immaterial":
            _, line, to = mutated(site)[1]
            print(f"{site[0]}:{site[1]}: {line}  ->  {to}  ({how}: {why})", flush=True)
    for part in PARTS:
        own = Counter(found[one][0] for one in known[part] if one in found)
        print(f"{summary(part, own)}, of {len(known[part])} changes that could be made")
    return 0


if __name__ == "__main__":
    sys.exit(main())
