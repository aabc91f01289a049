"""Small changes of the code, one at a time, and those that a reader has found to change nothing that matters."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
REVIEWED = ROOT / "tests" / "immaterial.toml"
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


def mutated(site: Site) -> tuple[str, tuple[str, str, str]]:
    """The text of a module with one change; and its file, the line with what is changed in ``«»``, what it becomes."""
    file, _, number = site
    text = (ROOT / file).read_text()
    tree = ast.parse(text)
    node, change = list(changes(tree, _skipped(tree)))[number]
    marked = _marked(text.splitlines(), node)
    told = str(file), marked, change()
    return ast.unparse(ast.fix_missing_locations(tree)), told


def described(file: Path) -> set[tuple[str, str, str]]:
    """All changes of a module as `mutated` tells of them."""
    text = (ROOT / file).read_text()
    tree, lines = ast.parse(text), text.splitlines()
    return {(str(file), _marked(lines, node), change()) for node, change in list(changes(tree, _skipped(tree)))}


def function_of(site: Site) -> str:
    """The qualified name of the innermost function around a change; empty outside of any."""
    tree = ast.parse((ROOT / site[0]).read_text())
    return function_at(tree, list(changes(tree, _skipped(tree)))[site[2]][0])


def function_at(tree: ast.AST, target: ast.AST) -> str:
    """The qualified name of the innermost function around a node, as ``co_qualname`` has it; empty outside of any."""

    def search(node: ast.AST, name: str) -> str | None:
        if node is target:
            return name
        inner = name
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inner = f"{name}{node.name}.<locals>."
        elif isinstance(node, ast.ClassDef):
            inner = f"{name}{node.name}."
        found = (search(child, inner) for child in ast.iter_child_nodes(node))
        return next((one for one in found if one is not None), None)

    return (search(tree, "") or "").rpartition(".<locals>.")[0]


def _marked(lines: list[str], node: ast.AST) -> str:
    """The first line of a part of the code, that part marked."""
    assert isinstance(node, (ast.expr, ast.stmt))
    line = lines[node.lineno - 1].encode()  # columns count bytes
    end = node.end_col_offset if node.end_lineno == node.lineno else None
    parts = line[: node.col_offset], line[node.col_offset : end], line[len(line) if end is None else end :]
    before, part, after = (one.decode() for one in parts)
    return f"{before}«{part}»{after}".strip()


@cache
def immaterial() -> dict[tuple[str, str, str], str]:
    """Why a change is of no matter, by its file, its line and what it makes of it; the file says how it is written."""
    entries = tomllib.loads(REVIEWED.read_text())["change"]
    return {(one["file"], one["line"], one["to"]): one["reason"] for one in entries}
