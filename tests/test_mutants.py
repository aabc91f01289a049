"""The script that changes the code: each change is one, and is code."""

import ast

from tests.mutants import ROOT, closest, mutated, sites


def test_every_change_is_valid_code_and_differs_from_the_module() -> None:
    own = [one for one in sites("core") if one[0].name == "acceptance.py"]
    assert len(own) > 20
    texts = {mutated(file, number)[0] for file, _, number in own}
    assert ast.unparse(ast.parse((ROOT / own[0][0]).read_text())) not in texts
    assert len(texts) > 0.9 * len(own)
    for text in texts:
        compile(text, "acceptance.py", "exec")


def test_the_tests_closest_to_a_module_come_first() -> None:
    file = sites("core")[0][0].with_name("acceptance.py")
    assert closest(file, thorough=False)[:2] == ["tests/core/test_custom_rules.py", "tests/core/test_promises.py"]
    assert len(closest(file, thorough=True)) > len(closest(file, thorough=False))
    for part in ("core", "adapters"):
        assert all(closest(one, thorough=True) for one in {one[0] for one in sites(part)})
