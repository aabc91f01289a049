"""The benchmark of differential equations runs and compares; nothing here depends on time."""

import json
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("torchdiffeq")
from typer.testing import CliRunner

from benchmarks import ode


@pytest.mark.parametrize("name", ode.PROBLEMS)
def test_small_problems_agree(name: str) -> None:
    steps = max(ode.PROBLEMS[name].fewest, 100)
    line = ode.compare(name, steps, repeats=1)
    assert (line.problem, line.steps) == (name, steps)
    assert line.difference < 1e-8
    assert line.calls > 0


def test_neural_gradients_agree() -> None:
    line = ode.compare_neural(1, 80, repeats=1, size=8)
    assert line.difference < 1e-8


def test_stages_as_nodes_reach_the_same_trajectory() -> None:
    steps, stages = ode.compare_stages("pendulum", 100, repeats=1)
    assert 1 < steps.rounds < 8
    assert 1 < stages.rounds < 8
    assert steps.calls == 4 * steps.rounds
    assert stages.calls == 4 + stages.rounds


def test_command_prints_a_table_and_writes_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ode, "STEPS", (80,))
    monkeypatch.setattr(
        ode, "PROBLEMS", {name: ode.PROBLEMS[name] for name in ("pendulum", "Lotka-Volterra", "linear, 16 states")}
    )
    monkeypatch.setattr(ode, "PICTURED", ("pendulum",))
    monkeypatch.setattr(ode, "SCALING", (70, 90))
    monkeypatch.setattr(ode, "SLOWEST_LOOP", 80)
    monkeypatch.setattr(ode, "BATCHES", ())
    app = ode.typer.Typer()
    app.command()(ode.main)
    files = [str(tmp_path / name) for name in ("ode.json", "ode.png")]
    result = CliRunner().invoke(
        app, ["--json", files[0], "--picture", files[1], "--repeats", "1"], env={"COLUMNS": "140"}
    )
    assert result.exit_code == 0, result.output
    assert "pendulum" in result.output
    assert len(json.loads(Path(files[0]).read_text())) == len(ode.PROBLEMS) + 6
    assert Path(files[1]).stat().st_size > 1000
