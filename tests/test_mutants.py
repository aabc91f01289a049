"""The script that changes the code: each change is one, and is code."""

import ast
import json
import subprocess
import sys
from pathlib import Path

from tests.changes import ROOT, described, function_at, immaterial, mutated, sites
from tests.mutants import closest


def test_every_change_is_valid_code_and_differs_from_the_module() -> None:
    own = [one for one in sites("core") if one[0].name == "acceptance.py"]
    assert len(own) > 20
    assert {mutated(one)[1] for one in own} == described(own[0][0])
    texts = {mutated(one)[0] for one in own}
    assert ast.unparse(ast.parse((ROOT / own[0][0]).read_text())) not in texts
    assert len(texts) > 0.9 * len(own)
    for text in texts:
        compile(text, "acceptance.py", "exec")


def test_the_tests_that_name_a_module_come_first() -> None:
    file = next(one[0] for one in sites("adapters") if one[0].name == "rounding.py")
    assert closest(file)[0] == "tests/adapters/test_vector_field_rounding.py"
    for part in ("core", "adapters"):
        assert all(closest(one) for one in {one[0] for one in sites(part)})


def test_a_change_belongs_to_the_innermost_function() -> None:
    tree = ast.parse("class A:\n  def f(self):\n    def g(): return 1\n    return 2\n  n = 3\nm = 4\n")
    numbers = {node.value: node for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert [function_at(tree, numbers[k]) for k in (1, 2, 3, 4)] == ["A.f.<locals>.g", "A.f", "", ""]


def test_what_was_reviewed_is_a_change_that_can_be_made() -> None:
    """As `make mutants` prints it; a line that has been written anew is looked at anew."""
    possible = {one for file in {file for file, _, _ in immaterial()} for one in described(Path(file))}
    assert immaterial().keys() - possible == set()
    assert all(immaterial().values())


TESTS = """
from parasolver_core import NoiseSchedule

def test_right():
    assert len(NoiseSchedule.linear().timesteps(3)) == 3

def test_wrong():
    assert len(NoiseSchedule.linear().timesteps(3)) == 4
"""


def test_a_recording_names_what_a_test_that_passes_calls(tmp_path: Path) -> None:
    (tmp_path / "test_schedule.py").write_text(TESTS)
    command = [sys.executable, "-m", "tests.reached", str(tmp_path / "test_schedule.py"), str(tmp_path / "kept.json")]
    subprocess.run(command, cwd=ROOT, check=True)
    ((name, known),) = json.loads((tmp_path / "kept.json").read_text()).items()
    assert name.endswith("::test_right")
    assert 0 < known["seconds"] < 20
    assert "parasolver_core/samplers/schedules.py:NoiseSchedule.linear" in known["functions"]
    assert not any("solve" in name.partition(":")[2] for name in known["functions"])
