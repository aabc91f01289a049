"""The ``parasolver`` command as a user meets it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
from rich.console import Console
from typer.testing import CliRunner

from parasolver_cli.folder import prepared, write_record
from parasolver_cli.main import app
from parasolver_cli.options import read_tolerance
from parasolver_cli.terminal import Column, in_options, print_table
from parasolver_core import __version__


def run(*arguments: object, code: int = 0, columns: int | None = 200, only: str | None = None) -> str:
    """What the command prints, on both streams or only on "stdout" or "stderr"."""
    env = {"COLUMNS": None if columns is None else str(columns), "TERM": "dumb"}
    result = CliRunner().invoke(app, [str(one) for one in arguments], env=env)
    assert result.exit_code == code, result.output
    return re.sub(r"\x1b\[[0-9;]*m", "", result.output if only is None else getattr(result, only))


def test_help_names_the_commands() -> None:
    text = run("--help")
    assert "demo" in text
    assert "methods" in text


def test_help_of_demo_shows_the_defaults() -> None:
    text = run("demo", "--help")
    for option in ("--out", "--count", "--seed", "--window", "--tolerance", "--threads", "--quick", "--overwrite"):
        assert option in text
    assert "0.01" in text


def test_version() -> None:
    assert run("--version").split() == ["parasolver", __version__]


def test_methods_lists_samplers_and_methods() -> None:
    text = run("methods")
    for name in ("DDIM", "DDPM", "DPMSolver", "Euler", "secant", "sequential"):
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


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("-1", "expected a finite number of at least 0 (0 means exact), got -1"),
        ("nan", "expected a finite number of at least 0 (0 means exact), got nan"),
        ("inf", "expected a finite number of at least 0 (0 means exact), got inf"),
        ("x%", "expected a share such as 0.01 or 1%, got x%"),
        ("5", "5 means 500 %; for 5 % give 0.05 or 5%"),
        ("100%", "100% means 100 %; for 1 % give 0.01 or 1%"),
    ],
)
@pytest.mark.parametrize("command", ["demo", "sample", "plan", "bench"])
def test_bad_tolerance(command: str, value: str, told: str) -> None:
    text = " ".join(run(command, "--tolerance", value, code=2).replace("│", " ").split())
    assert f"Invalid value for '--tolerance': {told}" in text


@pytest.mark.parametrize(("given", "share"), [("1%", 0.01), ("0.01", 0.01), ("0", 0.0), ("2.5 %", 0.025), (0.05, 0.05)])
def test_tolerance_as_a_share_or_in_per_cent(given: object, share: float) -> None:
    assert read_tolerance(given) == pytest.approx(share, rel=1e-15)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--devices", "1,0"], "expected counts such as 1,2,4,8, got 1,0"),
        (["--devices", "²"], "expected counts such as 1,2,4,8, got ²"),  # a digit, but no number
        (["--costs", "1"], "expected rows:seconds"),
        (["--device", "a100"], "expected one of h100, got a100"),
        (["--device", "h100", "--network", "guidance"], "'guidance' is a part of several of the networks known"),
        (["--device", "h100", "--network", "unheard"], "'unheard' is none of the networks known: DiT-XL/2"),
        (["--device", "h100", "--costs", "1:0.1"], "give either costs or a card"),
        (["--graphs"], "needs --device"),
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
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("command", ["demo", "sample"])
def test_a_folder_with_an_earlier_run_is_refused(tmp_path: Path, command: str) -> None:
    (tmp_path / "result.json").write_text("{}")
    told = " ".join(run(command, "--out", tmp_path, code=2, only="stderr").replace("│", " ").split())
    assert "holds an earlier run; give another folder, or --overwrite to replace it" in told


def test_an_earlier_run_is_removed_and_nothing_else(tmp_path: Path) -> None:
    outside, mine = tmp_path / "outside.png", tmp_path / "out" / "notes.txt"
    (tmp_path / "out").mkdir()
    for file in (outside, mine, tmp_path / "out" / "002.png"):
        file.write_text("")
    (tmp_path / "out" / "result.json").write_text(json.dumps({"files": ["002.png", "../outside.png", str(outside)]}))
    with prepared(tmp_path / "out") as folder:
        assert list(folder.iterdir()) == [mine]
        write_record(folder, {"a": 1}, ["new.png"])
    assert outside.exists()
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == {"a": 1, "files": ["new.png"]}
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["notes.txt", "result.json"]


def test_a_folder_made_for_nothing_is_removed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), prepared(tmp_path / "new"):
        raise ValueError("no")
    assert not list(tmp_path.iterdir())


COSTS = ("plan", "--costs", "1:0.05,8:0.0612,64:0.333")


@pytest.mark.parametrize("columns", [40, 60, 80, 100, None])
def test_no_number_of_plan_is_cut(columns: int | None) -> None:
    narrow, wide = run(*COSTS, columns=columns), run(*COSTS, columns=400)
    assert "…" not in narrow
    numbers = re.compile(r"\d+(?:\.\d+)?(?: m?s\b|x)?")
    tables = (text.partition("Predicted")[0] for text in (narrow, wide))
    found, expected = (sorted(numbers.findall(re.sub(r"[^\S\n]+", " ", text))) for text in tables)
    assert found == expected
    assert len(expected) > 60


def test_a_table_that_does_not_fit_is_told_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=20)
    print_table(console, "Title", [Column("a"), Column("long\nname")], [["1234567890", "0.123456789"]])
    assert capsys.readouterr().out.split("\n") == ["Title", "a: 1234567890", "  long name: 0.123456789", "", ""]


def test_json_of_plan_has_all_figures() -> None:
    told = json.loads(run(*COSTS, "--json", only="stdout"))
    assert told["costs"]["seconds_by_rows"] == {"1": 0.05, "8": 0.0612, "64": 0.333}
    assert told["windows"][0]["window"] == 1
    assert told["windows"][0]["seconds"] == pytest.approx(2.5)
    assert [one["devices"] for one in told["best"]] == [1, 2, 4, 8]
    assert told["best"][-1]["times_as_fast"] == pytest.approx(2.5 / told["best"][-1]["seconds"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize("command", ["methods", "methods --json", "plan --costs 1:0.1,8:0.1 --json"])
def test_output_that_cannot_be_written_is_one_line(command: str) -> None:
    with Path("/dev/full").open("w") as full:
        arguments = [sys.executable, "-m", "parasolver_cli", *command.split()]
        ended = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr == "parasolver: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("command", ["methods", "methods --json"])
def test_a_reader_that_has_gone_is_no_error_to_tell(command: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    arguments = [sys.executable, "-m", "parasolver_cli", *command.split()]
    ended = subprocess.run(arguments, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_json_of_methods() -> None:
    told = json.loads(run("methods", "--json", only="stdout"))
    assert {"secant", "parataa", "sequential"} <= told["methods"].keys()
    assert "DDIM" in told["samplers"]


def test_methods_are_told_apart() -> None:
    summaries = json.loads(run("methods", "--json", only="stdout"))["methods"].values()
    assert len(set(summaries)) == len(summaries)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("spacing: 5000 steps", "--steps: 5000 steps"),
        ("guide_all_channels: no", "--guide-all-channels: no"),
        ("x_T: of no use", "x_T: of no use"),
        ("there is no file a: b", "there is no file a: b"),
    ],
)
def test_messages_speak_of_options(message: str, told: str) -> None:
    assert in_options(message) == told


WITHOUT = """
import sys
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {lacking!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refuse())
sys.argv = ["parasolver", *{arguments!r}]
from parasolver_cli.main import app
app()
"""


def without(folder: Path, lacking: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    code = WITHOUT.format(lacking=lacking, arguments=arguments)
    path = os.pathsep.join(map(os.path.abspath, (".", "adapters")))
    environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "300"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environment, timeout=100
    )


@pytest.mark.parametrize(
    ("lacking", "arguments", "told"),
    [
        (["typer"], ["demo"], "the command line needs typer: pip install '.[demo]' in a copy of the repository"),
        (["torch"], ["plan"], "torch is not installed: pip install '.[demo]' in a copy of the repository"),
        (["torch"], ["demo", "--quick"], "torch is not installed: pip install '.[demo]' in a copy of the repository"),
        (["torch"], ["sample"], "torch is not installed: pip install '.[demo]'"),
        (["torch"], ["bench"], "torch is not installed: pip install '.[demo]'"),
        (["matplotlib"], ["demo", "--quick"], "matplotlib is not installed: pip install '.[demo]'"),
    ],
)
def test_without_an_extra_one_line_says_what_to_install(
    tmp_path: Path, lacking: list[str], arguments: list[str], told: str
) -> None:
    ended = without(tmp_path, lacking, *arguments)
    assert ended.returncode == 1
    *_, line = ended.stderr.strip().split("\n")
    assert line.startswith("parasolver: ")
    assert told in line
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.iterdir())


def test_the_version_needs_no_extra(tmp_path: Path) -> None:
    ended = without(tmp_path, ["typer", "rich"], "--version")
    assert ended.stdout == f"parasolver {__version__}\n"
    assert ended.returncode == 0


def test_plan_of_a_card_says_whether_it_was_measured() -> None:
    text = " ".join(run("plan", "--device", "h100", "--network", "robot", "--graphs", "--steps", "100").split())
    assert "robot 1-D U-Net, expected of, and not measured on, an NVIDIA H100 80GB HBM3" in text
    told = json.loads(run("plan", "--device", "H100", "--network", "sdxl", "--json", only="stdout"))
    assert told["costs"]["seconds_by_rows"]["1"] == 0.042
    assert told["best"][0]["window"] == 1  # one node fills the card
    plain = json.loads(run("plan", "--device", "h100", "--json", only="stdout"))
    assert plain["costs"]["source"].startswith("DiT-XL/2, 256 pixels")


def test_a_card_that_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks.gpu import table
    from parasolver_cli import cards

    lines = [
        {"part": "machine", "name": "NVIDIA H200", "ok": True, "tiny": False},
        {"part": "costs", "name": "ceilings", "ok": True, "TB/s": 4.3},
        {"part": "costs", "name": "a network", "ok": True, "k": 1, "plain": 8.0, "captured": 2.0},
        {"part": "costs", "name": "a network", "ok": True, "k": 8, "plain": 150.0},
        {"part": "rounds", "name": "4x64x64, window 16, batch 1, DDIM, sliding", "ok": True, "own": 0.3},
        {"part": "costs", "name": "a network", "ok": False, "k": 16, "error": "left out"},
    ]
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page, known = tmp_path / "gpu.md", tmp_path / "cards.json"
    page.write_text(f"before\n{table.BEGIN}old\n{table.END}after\n")
    known.write_text(json.dumps(table.expected()))
    monkeypatch.setattr(table, "PAGE", page)
    monkeypatch.setattr(table, "CARDS", known)
    table.main(tmp_path)
    assert "| a network | plain | 8 |  |  |  | 150 |" in page.read_text()
    assert "|  | captured | 2 |  |  |  | 150 |" in page.read_text()
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
    assert "Expected" not in page.read_text()
    monkeypatch.setattr(cards.resources, "files", lambda _: tmp_path)
    found = cards.card_costs("h200", None, graphs=True)
    assert (found.costs.network(1), found.costs.network(8), found.measured) == (0.002, 0.15, True)
    assert found.costs.own is not None
    assert found.costs.own(16) == 0.0003
    with pytest.raises(ValueError, match="expected one of h200"):
        cards.card_costs("h100", None, graphs=True)
    (tmp_path / "results.jsonl").write_text(json.dumps({"part": "machine", "name": "cpu", "ok": True, "tiny": True}))
    with pytest.raises(ValueError, match="in small on a CPU"):
        table.main(tmp_path)
