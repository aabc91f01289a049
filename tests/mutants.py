"""How much the tests notice: small changes of the code, one at a time, each followed by the tests closest to it.

``python -m tests.mutants --seed 0 --count 200 --seconds 3600`` works in a temporary copy of the project, and lists the
changes after which all tests that were run still pass. Look at each: it changes nothing that matters, or a test is
missing. Changes of docstrings, messages, annotations and logging are not made. A first run takes minutes longer: it
records which test calls which function. What was noticed is remembered, so a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from tests.reached import FOLDER, function_at, record, tests_of

ROOT = Path(__file__).parents[1]
LEFT_OUT = ("__init__.py", "introspection.py", "progress.py", "errors.py")
PARTS = {"core": "parasolver_core", "adapters": "adapters/parasolver_adapters"}
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.MatMult: ast.Mult,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum", "maximum": "minimum"}
PROJECT = ("tests", "parasolver_core", "parasolver_adapters")
LIBRARIES = ("numpy", "torch", "scipy.linalg", "array_api_strict", "array_api_compat.torch")
_FORK: Any = multiprocessing.get_context("fork")  # the large libraries are imported once
KEPT = FOLDER / "noticed.txt"
_BUDGET = 8.0  # seconds of tests for one change
_CONTROL = 20  # one change in so many is followed by the same tests without it
_UNUSABLE = "the tests fail, or take too long, without a change"
Change = Callable[[], str]
Site = tuple[Path, int, int]


def changes(tree: ast.AST, skipped: set[int]) -> Iterator[tuple[ast.AST, Change]]:
    """Every small change of a module, as a function that makes it and says what it was."""
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
            yield node, _setter(node.ops, 0, COMPARISONS[type(node.ops[0])]())
        elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in ARITHMETIC:
            yield node, _setter(node, "op", ARITHMETIC[type(node.op)]())
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            yield node, _setter(node, "op", ast.UAdd())
        elif isinstance(node, ast.BoolOp):
            yield node, _setter(node, "op", ast.Or() if isinstance(node.op, ast.And) else ast.And())
        elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
            yield node, _setter(node, "test", _without_not(node.test))
        elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
            value = node.value
            yield node, _setter(node, "value", (not value) if isinstance(value, bool) else value + 1 if value else 1)
        elif isinstance(node, ast.Name) and node.id in NAMES:
            yield node, _setter(node, "id", NAMES[node.id])
        elif isinstance(node, ast.Attribute) and node.attr in NAMES:
            yield node, _setter(node, "attr", NAMES[node.attr])
        elif isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
            yield node, _setter(node, "value", ast.Constant(None))


def _setter(target: object, at: str | int, new: object) -> Change:
    def change() -> str:
        if isinstance(at, int):
            target[at] = new  # type: ignore[index]
        else:
            setattr(target, at, new)
        return type(new).__name__ if isinstance(new, ast.AST) else repr(new)

    return change


def _without_not(test: ast.expr) -> ast.expr:
    return (
        test.operand if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not) else ast.UnaryOp(ast.Not(), test)
    )


def _skipped(tree: ast.AST) -> set[int]:
    """Nodes whose change is no change of behaviour: annotations, what an error says, decorators, `__all__`."""
    roots: list[ast.AST] = []
    for node in ast.walk(tree):
        roots += [part for name in ("annotation", "returns") if (part := getattr(node, name, None)) is not None]
        roots += getattr(node, "decorator_list", [])
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            roots += node.exc.args
        if isinstance(node, (ast.JoinedStr, ast.Assert, ast.Import, ast.ImportFrom)):
            roots.append(node)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            roots.append(node)
    return {id(inner) for root in roots for inner in ast.walk(root)}


def sites(part: str) -> list[Site]:
    """``(file, line, number of the change in the file)`` of every change that could be made."""
    files = [file for file in sorted((ROOT / PARTS[part]).rglob("*.py")) if file.name not in LEFT_OUT]
    found = []
    for file in files:
        tree = ast.parse(file.read_text())
        found += [
            (file.relative_to(ROOT), getattr(node, "lineno", 0), number)
            for number, (node, _) in enumerate(changes(tree, _skipped(tree)))
        ]
    return found


def mutated(file: Path, number: int) -> tuple[str, str]:
    """The text of a module with one change, and what it is."""
    tree = ast.parse((ROOT / file).read_text())
    node, change = list(changes(tree, _skipped(tree)))[number]
    before = ast.unparse(node).splitlines()[0]
    told = change()
    return ast.unparse(ast.fix_missing_locations(tree)), f"{before[:80]}  ->  {told}"


def closest(file: Path) -> list[str]:
    """The test files that may call a module, those first that name it; the smallest of each kind first."""
    folder = "core" if file.parts[0] == "parasolver_core" else "adapters"
    tests = sorted((ROOT / "tests" / folder).glob("test_*.py"), key=lambda one: one.stat().st_size)
    module = ".".join(file.with_suffix("").parts).removeprefix("adapters.")
    texts = {one: one.read_text() for one in tests}
    packages = module.rpartition(".")[0], ".".join(module.split(".")[:2])
    naming = [one for one in tests if module in texts[one] or file.stem in one.stem]
    others = [one for one in tests if folder == "core" or any(f"{name} import" in texts[one] for name in packages)]
    return [str(one.relative_to(ROOT)) for one in dict.fromkeys(naming + others)]


def able(site: Site, thorough: bool) -> list[str]:
    """The tests that call the function of a change, or anything of its file if it is in none.

    In turn from each test file, the closest one first and the quickest test of each first, for some seconds.
    """
    file, _, number = site
    tree = ast.parse((ROOT / file).read_text())
    node, _ = list(changes(tree, _skipped(tree)))[number]
    name = f"{file}:{function_at(tree, node)}"
    whole = name.endswith(":")
    queues = []
    for one in closest(file):
        calls = tests_of(ROOT / one).items()
        own = [
            (told["seconds"], test) for test, told in calls if any(_calls(f, name, whole) for f in told["functions"])
        ]
        queues.append(sorted(own))
    turns = [one for turn in zip_longest(*queues) for one in turn if one is not None]
    chosen, spent = [], 0.0
    for seconds, test in turns:
        if not chosen or thorough or spent + seconds <= _BUDGET:  # a slow test leaves room for many quick ones
            chosen.append(test)
            spent += seconds
    return chosen


def _calls(function: str, name: str, whole: bool) -> bool:
    return function.startswith(name) if whole else function == name


def survives(copy: Path, site: Site, limit: float, thorough: bool) -> str | None:
    """What the change was, if all tests near it still pass; None if one fails."""
    file, _, number = site
    text, told = mutated(file, number)
    tests = able(site, thorough)
    if not tests:
        return f"{told}  (no test calls it)"
    whole = (ROOT / file).read_text()
    (copy / file).write_text(text)
    failed = fails(copy, tests, limit)
    (copy / file).write_text(whole)
    if failed is None:
        return f"{told}  (time ran out, undecided)"
    return None if failed else told


def fails(copy: Path, files: list[str], limit: float) -> bool | None:
    """Whether a test among these fails; None where time ran out."""
    tests = _FORK.Process(target=_run_tests, args=(copy, files))
    tests.start()
    tests.join(limit)
    undecided = tests.is_alive()
    tests.kill()
    tests.join()
    return None if undecided else tests.exitcode != 0


def _run_tests(copy: Path, files: list[str]) -> None:
    """In a process of its own, which has the large libraries already and takes the project from the copy."""
    os.chdir(copy)
    sys.path[:0] = [str(copy), str(copy / "adapters")]
    for name in [name for name in sys.modules if name.split(".")[0] in PROJECT]:
        del sys.modules[name]
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    options = ["-n", "0", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", "--timeout", "600"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    os._exit(int(pytest.main([*options, *files])))


def work(own: list[Site], each: float, thorough: bool, end: float, results: Any) -> None:
    """The changes of one worker, in a copy of its own."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "_build", "__pycache__", ".*_cache"))
        for number, site in enumerate(own):
            if time.monotonic() > end:
                break
            told = survives(copy, site, each, thorough)
            if told is None and number % _CONTROL == 0 and fails(copy, able(site, thorough), each) is not False:
                told = f"{_UNUSABLE} (undecided)"  # else every change would count as noticed
            results.put((site, told))
    results.put(None)


def _key(site: Site) -> str:
    """The change, as long as its file stays what it is."""
    text = hashlib.sha256((ROOT / site[0]).read_bytes()).hexdigest()[:12]
    return f"{site[0]} {text} {site[2]}"


def noticed_before() -> set[str]:
    """Changes that an earlier run found noticed; what was not is tried again, since tests may have been added."""
    return set(KEPT.read_text().splitlines()) if KEPT.exists() else set()


def share_out(sample: list[Site], given: argparse.Namespace, end: float) -> Iterator[tuple[Site, str | None]]:
    """The changes and what became of them, as the workers find out."""
    for library in LIBRARIES:
        importlib.import_module(library)
    results = _FORK.Queue()
    parts = [sample[start :: given.workers] for start in range(given.workers)]
    workers = [_FORK.Process(target=work, args=(part, given.each, given.thorough, end, results)) for part in parts]
    for worker in workers:
        worker.start()
    left = len(workers)
    while left:
        result = results.get()
        if result is None:
            left -= 1
        else:
            yield result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="How much the tests notice.")
    parser.add_argument("--seed", type=int, default=0, help="of the sample of changes")
    parser.add_argument("--count", type=int, default=200, help="how many changes")
    parser.add_argument("--seconds", type=float, default=3600, help="no new change after so many seconds")
    parser.add_argument("--workers", type=int, default=2, help="how many copies of the project work at once")
    parser.add_argument("--each", type=float, default=180, help="seconds for the tests of one change")
    parser.add_argument("--thorough", action="store_true", help="all tests that call the changed function")
    parser.add_argument("--part", choices=[*PARTS, "both"], default="both")
    parser.add_argument("--file", default="", help="only files whose name contains this")
    given = parser.parse_args(argv)
    known = [one for part in PARTS if given.part in (part, "both") for one in sites(part) if given.file in one[0].name]
    sample = random.Random(given.seed).sample(known, min(given.count, len(known)))
    end, before = time.monotonic() + given.seconds, noticed_before()
    record(sorted({ROOT / one for site in sample for one in closest(site[0])}), end)
    again = [one for one in sample if _key(one) not in before]
    counts = {"noticed": len(sample) - len(again), "survived": 0, "undecided": 0}
    for site, told in share_out(again, given, end):
        counts["noticed" if told is None else "undecided" if told.endswith("undecided)") else "survived"] += 1
        if told is not None:
            print(f"{site[0]}:{site[1]}: {told}", flush=True)
        else:
            with KEPT.open("a") as kept:
                kept.write(f"{_key(site)}\n")
    decided = max(counts["noticed"] + counts["survived"], 1)
    print(f"{counts['noticed'] / decided:.0%} noticed; {counts}, of {len(known)} changes that could be made")
    return 0


if __name__ == "__main__":
    sys.exit(main())
