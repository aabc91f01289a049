"""``parasolver demo`` and ``parasolver bench`` as a user meets them."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from parasolver_cli import bench, demo
from parasolver_cli.bench import Measured, Timing
from parasolver_cli.outcome import told_seconds, verdict
from parasolver_core import __version__
from tests.cli.test_cli import run

FIGURES = ("samples.png", "rounds.png", "residuals.png", "samples_grid.png")
PNG = b"\x89PNG\r\n\x1a\n"


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


@pytest.mark.timeout(300)
def test_demo_writes_figures_and_true_errors(tmp_path: Path) -> None:
    folder, options = tmp_path / "new", ("--quick", "--count", 2, "--tolerance", "1%", "--threads", 1)
    text = run("demo", *options, "--out", folder, columns=80)
    result = record(folder)
    _check_table(result["table"], text)
    # Each row is told as soon as it is known, before the table.
    assert all(text.index(f"{row['name']}: ") < text.index("One step after another") for row in result["table"])
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FIGURES, "report.html", "result.json"])
    assert sorted(result["files"]) == sorted([*FIGURES, "report.html"])
    for name in FIGURES:
        assert (folder / name).read_bytes().startswith(PNG)
    assert result["version"] == __version__
    assert result["settings"]["count"] == 2
    assert result["settings"]["tolerance"] == 0.01
    assert result["machine"]["threads"] == 1
    assert [one["name"] for one in result["samplers"]] == ["DDIM-20", "DPM-Solver++(2M)-10", "DDPM-50"]
    for one, samples in zip(result["samplers"], (2, 2, 1), strict=True):
        assert one["name"] in text
        assert one["error_worst"] == max(one["errors"])
        assert one["error_worst"] < 0.1
        assert one["within_tolerance"] == (one["error_worst"] <= 1e-2)
        assert len(one["errors"]) == one["samples"] == samples
        assert one["rounds_of_first"] <= one["rounds"] < one["steps"] <= one["evaluations_per_sample"]
        assert one["rounds_shown"][-1] == one["rounds"]
        assert one["errors_after_round"][-1] == pytest.approx(one["errors"][0], rel=1e-3)
        assert one["seconds_sequential"] > 0
        assert one["seconds_parallel"] > 0


def _check_table(table: list[dict[str, Any]], text: str) -> None:
    """It begins with what is faster here, and nothing in it is cut."""
    assert [one["name"].partition(",")[0] for one in table] == [
        "Pendulum", "Robot paths", "2 pictures", "2 pictures", "1 picture"
    ]  # fmt: skip
    pendulum, paths = table[:2]
    assert pendulum["rounds"] < 10
    assert pendulum["evaluations"][0] == 4 * pendulum["steps"]
    assert pendulum["error"] < 1e-10
    assert paths["rounds"] < paths["steps"] / 5
    assert paths["error"] < 1e-2
    assert "…" not in text
    for one in table:
        assert one["verdict"].split()[-1] in ("faster", "slower", "fast")
        assert f"{one['steps']}→{one['rounds']}" in text
    assert "the seconds of the pictures follow the evaluations" in " ".join(text.split())


def test_an_earlier_demonstration_is_replaced_on_request(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(demo, "cases", lambda settings: [])
    out, options = tmp_path / "out", ("demo", "--quick", "--count", 1, "--out", tmp_path / "out")
    run(*options)
    kept = {file.name: file.read_bytes() for file in out.iterdir()}
    assert sorted(kept) == ["report.html", "result.json"]
    assert "holds an earlier run" in " ".join(run(*options, code=2).split())
    assert {file.name: file.read_bytes() for file in out.iterdir()} == kept
    assert json.loads(run(*options, "--overwrite", "--json", only="stdout")) == record(out)


def test_what_was_finished_is_kept_when_the_user_breaks_off(tmp_path: Path, monkeypatch: Any) -> None:
    def broken_off(*_: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_sample", broken_off)
    text = run("demo", "--quick", "--count", 1, "--out", tmp_path / "out", code=130)
    assert "Interrupted; what was finished is kept." in text
    assert [one["name"] for one in record(tmp_path / "out")["table"]] == ["Pendulum, RK4-2000", "Robot paths, DDIM-100"]
    assert record(tmp_path / "out")["interrupted"] is True
    monkeypatch.setattr(demo, "pendulum", broken_off)
    told = run("demo", "--quick", "--out", tmp_path / "none", code=130, only="stderr")
    assert "parasolver: interrupted; nothing was written" in told
    assert not (tmp_path / "none").exists()


def test_plain_verdicts() -> None:
    assert verdict(6.5, 0.2) == "32x faster"
    assert verdict(3.8, 6.4) == "1.7x slower"
    assert verdict(2200.0, 20.0) == "110x faster"
    assert verdict(1.0, 1.05) == verdict(1.05, 1.0) == "as fast"


def test_seconds_in_one_unit() -> None:
    assert told_seconds(6.52, 0.213) == "6.5→0.21 s"
    assert told_seconds(0.955, 0.063) == "955→63 ms"
    assert told_seconds(41.2, 25.4) == "41→25 s"


def measured(*seconds: float, call: float = 12.0) -> Measured:
    windows = [1, 2, 4, 8]
    return Measured("net", [Timing(w, 50 // w, 50, s, 0.0) for w, s in zip(windows, seconds, strict=False)], call)


def test_bench_tells_whether_it_pays() -> None:
    assert measured(0.88, 0.9, 0.6, 0.42).verdict == "pays: 2.1x at window 8 (0.42 s instead of 0.88 s)"
    told = measured(0.8, 1.0, 1.6).verdict
    assert told.startswith(
        "does not pay here: at best 0.8x, at window 2 (1 s instead of 0.8 s). A call of 16 rows takes"
    )
    assert "12 times as long" in told
    assert told.endswith("it pays where that is less")
    assert "the solver's own time counts with it" in measured(0.8, 1.0, 1.6, call=1.1).verdict
    assert "no time for a window" in measured(100.0).verdict


def test_bench_of_the_policy() -> None:
    told = json.loads(run("bench", "--network", "policy", "--steps", 16, "--threads", 1, "--json", only="stdout"))
    (found,) = told["networks"]
    timings = found["timings"]
    assert [one["window"] for one in timings][:3] == [1, 2, 4]
    assert timings[0]["rounds"] == timings[0]["evaluations"] == 16
    assert all(one["rounds"] < 16 and one["error"] < 0.02 for one in timings[1:])
    assert found["verdict"].startswith(("pays: ", "does not pay here: "))
    assert told["machine"]["threads"] == 1


OWN = """
import torch

def network(device):
    return lambda x, t: torch.tanh(x), torch.randn(2, 3, device=device)

def nothing(device):
    return 3
"""


def test_bench_of_a_function_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    text = run("bench", "--network", f"{tmp_path / 'mine.py'}:network", "--steps", 8, columns=60)
    assert "network, DDIM-8, tolerance 1 %" in text
    assert "sequential" in text
    for name, told in (("nothing", "should return (denoiser, x_T)"), ("other", "has no function 'other'")):
        error = run("bench", "--network", f"{tmp_path / 'mine.py'}:{name}", code=1, only="stderr")
        assert error.startswith("parasolver: --network: ")
        assert told in error
    assert "there is no Python file nowhere.py" in run("bench", "--network", "nowhere.py:f", code=1, only="stderr")
    assert "expected fashion-mnist, policy, or file.py:function" in run("bench", "--network", "sd", code=1)


def test_bench_stops_when_windows_are_ever_slower() -> None:
    assert bench._hopeless(measured(1.0, 2.0, 3.0, 4.0).timings)
    assert not bench._hopeless(measured(1.0, 2.0, 1.5, 4.0).timings)
    assert not bench._hopeless(measured(1.0, 2.0, 3.0).timings)
