"""The script for a GPU: in small on a CPU, and its promises on a card where there is one."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("typer")
import torch
import typer

import benchmarks.gpu.__main__ as command
from benchmarks.gpu import costs, libraries, networks, pipelines, right, rounds, runs, scores, trained
from benchmarks.gpu.device import Lab

pytestmark = pytest.mark.usefixtures("quiet_diffusers")


def lab(folder: Path, device: str = "cpu", seconds: float = 600.0) -> Lab:
    return Lab(torch.device(device), folder / "results.jsonl", device == "cpu", time.monotonic() + seconds)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_the_promises_are_checked(tmp_path: Path) -> None:
    right.run(lab(tmp_path))
    found = {one["name"]: one for one in lines(tmp_path)}
    assert all(one["ok"] for one in found.values()), found
    assert found["out of memory"]["max_rows"] == 5
    assert found["policy, DDPM"]["alone"] < 1e-4
    assert found["the solver's own products, TF32 allowed"]["error"] < 1e-3


def test_a_broken_promise_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(right, "BOUNDS", {torch.float16: -1.0, torch.float32: 1e-4})
    monkeypatch.setattr(right.Case, "not_finite", lambda case: {"ok": False, "error": "accepted"})
    right.run(lab(tmp_path))
    wrong = [one["name"] for one in lines(tmp_path) if not one["ok"]]
    assert wrong == ["policy, torch.float16", "NaN from the network"]


def test_libraries_and_pipelines_in_small(tmp_path: Path) -> None:
    libraries.run(lab(tmp_path))
    pipelines.run(lab(tmp_path))
    found = {one["name"]: one for one in lines(tmp_path)}
    assert all(one["ok"] for one in found.values()), found
    assert found["torch, float64, DDPM"]["numpy"] < 1e-9
    assert found["DDPMScheduler, generator of the host, torch.float32"]["same"]


def test_rounds_in_small(tmp_path: Path) -> None:
    rounds.run(lab(tmp_path))
    found = lines(tmp_path)
    assert [one["ok"] for one in found] == [True] * 3
    assert all(one["ms"] > one["network"] > 0 for one in found)
    assert rounds._kind("cudaStreamSynchronize", torch.autograd.DeviceType.CPU) == "waits"
    assert rounds._kind("Memcpy HtoD (Pageable -> Device)", torch.autograd.DeviceType.CUDA) == "copies to the card"
    assert rounds._kind("void at::native::elementwise", torch.autograd.DeviceType.CUDA) == "kernels"


@pytest.mark.parametrize("case", [0, 2], ids=["trained", "beside an exact score"])
def test_a_race_in_small(case: int, tmp_path: Path) -> None:
    place = lab(tmp_path)
    with torch.no_grad():
        problem = runs.CASES[case][0](place)
        runs.raced(place, "runs", problem, 60.0)
    found = {one["way"]: one for one in lines(tmp_path)}
    assert all(one["ok"] for one in found.values()), found
    assert {"plain loop", "captured loop", 'window "auto"'} < set(found)
    parallel = next(one for way, one in found.items() if way.endswith("graphs"))
    assert parallel["rounds"] < problem.steps
    assert parallel["error of the sample"] < 0.05
    assert parallel["times the plain loop"] == pytest.approx(found["plain loop"]["seconds"] / parallel["seconds"])


def test_a_network_is_trained_and_raced(tmp_path: Path) -> None:
    trained.run(lab(tmp_path))
    training, *races = lines(tmp_path)
    assert training["ok"]
    assert (training["steps"], training["pictures"]) == (2, 8)
    assert 0 < training["loss"] < 10
    assert all(one["ok"] for one in races), races


def test_an_exact_score_is_that_of_its_pictures() -> None:
    data = torch.tensor([[0.5, -0.5]], dtype=torch.float64)
    score, t = scores.Score(data, rounds.SCHEDULE), torch.tensor([500])
    kept = float(rounds.SCHEDULE.alphas_cumprod[500])
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    total = kept * scores.BLUR**2 + 1 - kept  # one blurred picture: a normal distribution
    assert torch.allclose(score(x, t), (1 - kept) ** 0.5 * (x - kept**0.5 * data) / total)


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_every_network_is_called_with_its_rows(name: str) -> None:
    network = networks.NETWORKS[name](torch.device("cpu"), True)
    x, t = torch.randn(2, *network.event), torch.tensor([10, 900])
    output = network.nodes(x, t)
    assert len(output) == 2 * network.rows
    assert torch.isfinite(output).all()
    assert not torch.equal(output[0], output[1])


def test_costs_stop_where_the_time_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "LONGEST", float("inf"))  # a busy machine is no fault
    made = networks.NETWORKS["church DDPM, 256 pixels"]
    with torch.no_grad():
        values = costs.measured(lab(tmp_path), "church", made, 0.0)
    assert values["ok"]
    assert [one["k"] for one in lines(tmp_path)] == [1, 2]
    lab(tmp_path, seconds=-1.0).measure("costs", "late", lambda: {"ok": True})
    assert lines(tmp_path)[-1] == {"part": "costs", "name": "late", "ok": False, "error": "no time left"}


def test_a_compiled_call_is_timed(tmp_path: Path) -> None:
    with torch.no_grad():
        found = costs.compiled(lab(tmp_path), "robot 1-D U-Net", 1)
    assert found["ok"]
    assert found["compiled"] > 0
    late = costs.compiled(Lab(torch.device("cpu"), tmp_path / "results.jsonl", False, time.monotonic()), "any", 1)
    assert not late["ok"]


def test_the_command_shares_out_its_time_and_tells_of_a_part_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    asked: dict[str, float] = {}

    def run(part: str, device: str, file: Path, tiny: bool, until: float) -> None:
        asked[part] = until - time.monotonic()
        Lab(torch.device(device), file, tiny, until).put(part, "a promise", ok=part != "libraries")

    monkeypatch.setattr(command, "run_apart", run)
    with pytest.raises(typer.Exit):
        command.main(out=None, tiny=True, seconds=440.0, part=None)
    machine, *found = lines(tmp_path)
    assert (machine["part"], machine["tiny"]) == ("machine", True)
    assert [one["part"] for one in found] == list(command.PARTS)
    assert asked["right"] == pytest.approx(35, abs=1)
    assert asked["trained"] == pytest.approx(440, abs=3)  # the others took nothing
    command.main(out=tmp_path, tiny=True, seconds=10.0, part=["rounds"])
    assert [one["part"] for one in lines(tmp_path)] == ["machine", "rounds"]


@pytest.mark.timeout(300)
def test_a_part_that_breaks_off_is_a_line(tmp_path: Path) -> None:
    command.run_apart("no such part", "cpu", tmp_path / "results.jsonl", True, time.monotonic() + 200)
    (only,) = lines(tmp_path)
    assert (only["name"], only["ok"], only["error"]) == ("the whole part", False, "exit status 1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_promises_are_kept_on_a_card(tmp_path: Path) -> None:
    for part in (right, libraries, pipelines):
        part.run(lab(tmp_path, "cuda"))
    assert [one["name"] for one in lines(tmp_path) if not one["ok"]] == []
