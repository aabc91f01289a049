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

from benchmarks.gpu import costs, networks, right, rounds, runs
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


def test_a_broken_promise_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(right, "BOUNDS", {torch.float16: -1.0, torch.float32: 1e-4})
    monkeypatch.setattr(right.Case, "not_finite", lambda case: {"ok": False, "error": "accepted"})
    right.run(lab(tmp_path))
    wrong = [one["name"] for one in lines(tmp_path) if not one["ok"]]
    assert wrong == ["policy, torch.float16", "NaN from the network"]


def test_rounds_and_runs_in_small(tmp_path: Path) -> None:
    rounds.run(lab(tmp_path))
    runs.run(lab(tmp_path))
    found = lines(tmp_path)
    assert [one["part"] for one in found] == ["rounds", "runs", "runs"]
    assert all(one["ok"] for one in found), found
    assert found[0]["own"] > 0
    assert found[1]["rounds"] < 10


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_promises_are_kept_on_a_card(tmp_path: Path) -> None:
    right.run(lab(tmp_path, "cuda"))
    assert [one["name"] for one in lines(tmp_path) if not one["ok"]] == []
