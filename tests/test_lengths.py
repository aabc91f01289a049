"""No file, class or function is longer than a reader takes in at once; docstrings of functions do not count."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("parasolver", "parasolver_core", "adapters", "parasolver_cli", "benchmarks", "examples", "tests")
FILE, CLASS, FUNCTION = 400, 220, 60  # lines
ROUND = 900  # lines of code of the rooms that explain a round
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


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


def code_in(source: str) -> set[int]:
    """The lines that are no comment and no part of a docstring."""
    found = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {line for one in found if one.type not in NO_CODE for line in range(one.start[0], one.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and ast.get_docstring(node, clean=False) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return lines


def test_the_rooms_that_explain_a_round_are_short() -> None:
    told = (ROOT / "docs/architecture.md").read_text().split("## To read a round")[1].split("##")[0]
    rooms = re.findall(r"`(\w+/\w+)`", told)
    assert len(rooms) == 11
    assert sum(len(code_in((ROOT / "parasolver_core" / f"{room}.py").read_text())) for room in rooms) < ROUND


def test_lines_of_code_are_counted() -> None:
    source = '"""One.\n\nTwo.\n"""\n\nx = (  # three\n    1,\n)\n\n\n'
    source += 'def f():\n    """Four."""\n    # five\n    return """a\nb"""\n'
    assert code_in(source) == {6, 7, 8, 11, 14, 15}


def test_what_is_too_long_is_found() -> None:
    body = "\n".join(["    x = 1"] * 60)
    fits = f'def f():\n    """One.\n\n    Two.\n    """\n{body[10:]}\n'
    assert list(too_long("a.py", fits)) == []
    assert list(too_long("a.py", f"def f():\n{body}\n")) == ["a.py: f: 61"]
    assert list(too_long("a.py", "class A:\n" + "    x = 1\n" * 220)) == ["a.py: A: 221"]
    assert list(too_long("a.py", "x = 1\n" * 401)) == ["a.py: 401"]
