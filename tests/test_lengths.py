"""No file, class or function is longer than a reader takes in at once; docstrings of functions do not count."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("parasolver", "parasolver_core", "adapters", "parasolver_cli", "benchmarks", "examples", "tests")
FILE, CLASS, FUNCTION = 400, 220, 60  # lines


def lines_of(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def too_long(name: str, source: str) -> Iterator[str]:
    """What is over its limit, with its lines."""
    if (count := len(source.splitlines())) > FILE:
        yield f"{name}: {count}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            count, limit = lines_of(node), CLASS
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = lines_of(node.body[0]) if ast.get_docstring(node, clean=False) is not None else 0
            count, limit = lines_of(node) - docstring, FUNCTION
        else:
            continue
        if count > limit:
            yield f"{name}: {node.name}: {count}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_is_too_long(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert [one for file in files for one in too_long(str(file.relative_to(ROOT)), file.read_text())] == []


def test_what_is_too_long_is_found() -> None:
    body = "\n".join(["    x = 1"] * 60)
    fits = f'def f():\n    """One.\n\n    Two.\n    """\n{body[10:]}\n'
    assert list(too_long("a.py", fits)) == []
    assert list(too_long("a.py", f"def f():\n{body}\n")) == ["a.py: f: 61"]
    assert list(too_long("a.py", "class A:\n" + "    x = 1\n" * 220)) == ["a.py: A: 221"]
    assert list(too_long("a.py", "x = 1\n" * 401)) == ["a.py: 401"]
