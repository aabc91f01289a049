"""The ``parasolver`` command as a user meets it."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("typer")
from typer.testing import CliRunner

from parasolver_cli.main import app
from parasolver_core import __version__

FIGURES = ("samples.png", "rounds.png", "residuals.png", "samples_grid.png")
PNG = b"\x89PNG\r\n\x1a\n"


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(one) for one in arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == code, result.output
    return re.sub(r"\x1b\[[0-9;]*m", "", result.output)


@pytest.fixture
def embedded() -> None:
    """Skip where the embedded model, or what it runs on, is not installed."""
    for name in ("torch", "diffusers", "matplotlib", "parasolver_adapters.embedded"):
        pytest.importorskip(name)


def test_help_names_the_commands() -> None:
    text = run("--help")
    assert "demo" in text
    assert "methods" in text


def test_help_of_demo_shows_the_defaults() -> None:
    text = run("demo", "--help")
    for option in ("--out", "--count", "--seed", "--window", "--tolerance", "--threads", "--quick"):
        assert option in text
    assert "0.01" in text


def test_version() -> None:
    assert run("--version").split() == ["parasolver", __version__]


def test_methods_lists_samplers_and_methods() -> None:
    text = run("methods")
    for name in ("DDIM", "DDPM", "DPMSolver", "Euler", '"secant"', '"sequential"'):
        assert name in text


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--count", 0),
        ("--count", 1000),
        ("--window", 0),
        ("--seed", -1),
        ("--threads", 0),
        ("--tolerance", "x"),
    ],
)
def test_bad_option(tmp_path: Path, option: str, value: object) -> None:
    assert f"Invalid value for '{option}'" in run("demo", "--out", tmp_path, option, value, code=2)


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_bad_tolerance(tmp_path: Path, value: str) -> None:
    text = run("demo", "--out", tmp_path, "--tolerance", value, code=2)
    assert "Invalid value for '--tolerance': expected a finite number of at least 0" in text


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--devices", "1,0"], "expected counts such as 1,2,4,8, got 1,0"),
        (["--devices", "²"], "expected counts such as 1,2,4,8, got ²"),  # a digit, but no number
        (["--costs", "1"], "expected rows:seconds"),
        (["--costs", "1:nan"], "costs: expected finite seconds"),
        (["--costs", "1:0.1,1:0.2"], "the same rows twice"),
    ],
)
def test_bad_options_of_plan(options: list[str], told: str) -> None:
    assert told in " ".join(run("plan", *options, code=2).replace("│", " ").split())


def test_unwritable_folder_is_refused_before_sampling(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    text = run("demo", "--out", file / "below", code=2)
    assert "cannot write to" in text


@pytest.mark.timeout(300)
def test_demo_writes_figures_and_true_errors(tmp_path: Path, embedded: None) -> None:
    text = run("demo", "--quick", "--count", 2, "--tolerance", "1e-2", "--threads", 1, "--out", tmp_path / "new")
    folder = tmp_path / "new"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FIGURES, "result.json"])
    for name in FIGURES:
        assert (folder / name).read_bytes().startswith(PNG)

    result = json.loads((folder / "result.json").read_text())
    assert result["version"] == __version__
    assert result["settings"]["count"] == 2
    assert result["machine"]["threads"] == 1
    assert all(one["error_mean"] < 1e-2 for one in result["samplers"])
    names = [one["name"] for one in result["samplers"]]
    assert names == ["DDIM-20", "DPM-Solver++(2M)-10", "DDPM-50"]
    for one in result["samplers"]:
        assert one["name"] in text
        assert one["error_worst"] == max(one["errors"]) <= 1e-2
        assert one["within_tolerance"] == (one["error_worst"] <= 1e-2)
        assert len(one["errors"]) == one["samples"] == 2
        assert one["rounds"] < one["steps"] <= one["evaluations_per_sample"]
        assert one["errors_after_round"][-1] < 0.1 * one["errors_after_round"][0]
        assert one["seconds_sequential"] > 0
        assert one["seconds_parallel"] > 0
