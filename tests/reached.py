"""Which functions each test calls, so that a change of one is followed by the tests that can notice it.

``record(files, workers)`` keeps a file for each test file: of each test that passes, its seconds and what it called, in
processes that it started as well. Only what has no record yet, or has changed since, is run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".mutants_cache"
_SECONDS = 20.0  # longer tests are left out: there are many changes
_LISTENS = "PARASOLVER_MUTANTS_CALLS"  # the environment variable that says where
_CODE = tuple(str(ROOT / part) for part in ("parasolver_core", "adapters/parasolver_adapters"))


class Recorder:
    """A plugin of pytest that notes what is called while a test runs, its fixtures and processes included."""

    def __init__(self, folder: Path) -> None:
        self.tests: dict[str, dict[str, Any]] = {}
        self._folder = folder  # where processes write what they call

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        names: set[str] = set()
        started = time.monotonic()
        with calls(names):
            result = yield
        for file in self._folder.iterdir():
            names.update(json.loads(file.read_text()))
            file.unlink()
        self.tests.setdefault(item.nodeid, {}).update(seconds=time.monotonic() - started, functions=sorted(names))
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        kept = self.tests.setdefault(report.nodeid, {"passed": True})
        kept["passed"] = kept.get("passed", True) and report.passed


@contextmanager
def calls(names: set[str]) -> Iterator[None]:
    """Adds the names of the functions that are called meanwhile, at the end."""
    called: set[CodeType] = set()

    def trace(frame: FrameType, event: str, arg: object) -> None:  # whose lines are not followed
        called.add(frame.f_code)

    threading.settrace(trace)
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
        ours = [code for code in called if code.co_filename.startswith(_CODE)]
        names.update(f"{Path(code.co_filename).relative_to(ROOT)}:{code.co_qualname}" for code in ours)


@contextmanager
def calls_of_process() -> Iterator[None]:
    """In a process that a test has started: tell the recorder what is called meanwhile, if there is one."""
    if _LISTENS not in os.environ:
        yield
        return
    names: set[str] = set()
    try:
        with calls(names):
            yield
    finally:
        Path(os.environ[_LISTENS], f"{os.getpid()}.json").write_text(json.dumps(sorted(names)))


def record(files: Iterable[Path], workers: int) -> None:
    """Run the test files that have no record, or an older one, so many at once."""
    FOLDER.mkdir(exist_ok=True)

    def run(file: Path) -> None:
        command = [sys.executable, "-m", "tests.reached", str(file), str(_record_of(file))]
        subprocess.run(command, cwd=ROOT, check=True)

    known = {file: _record_of(file) for file in files}
    older = [file for file, kept in known.items() if not kept.exists() or kept.stat().st_mtime <= file.stat().st_mtime]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, older))


@cache
def tests_of(file: Path) -> dict[str, dict[str, Any]]:
    """What is kept of the tests of a file, of those that are quick enough."""
    kept = _record_of(file)
    known = json.loads(kept.read_text()) if kept.exists() else {}
    return {name: one for name, one in known.items() if one["seconds"] < _SECONDS}


def _record_of(file: Path) -> Path:
    return FOLDER / f"{file.parent.name}-{file.stem}.json"


def main(file: str, kept: str) -> None:
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "-m", "not slow", "--no-header"]
    with tempfile.TemporaryDirectory() as folder:
        os.environ[_LISTENS] = folder
        recorder = Recorder(Path(folder))
        pytest.main([*options, file], plugins=[recorder])
    whole = {name: one for name, one in recorder.tests.items() if one.pop("passed") and "functions" in one}
    Path(kept).write_text(json.dumps(whole))


if __name__ == "__main__":
    main(*sys.argv[1:])
