"""The paper's tables, end to end on tiny stand-ins for the models, with another measure of quality."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("typer")
import numpy as np
import torch
from PIL import Image
from typer import Typer
from typer.testing import CliRunner

from benchmarks.paper_tables import quality
from benchmarks.paper_tables.__main__ import main
from benchmarks.paper_tables.models import Model
from benchmarks.paper_tables.samplers import GROUPED, METHODS, OURS, SAMPLERS
from tests.adapters.saved_pipelines import save_church, save_stable_diffusion

pytestmark = pytest.mark.usefixtures("quiet_diffusers")

APP = Typer()
APP.command()(main)


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> Any:
        raise URLError("no network")

    monkeypatch.setattr(quality, "_fid", fail)
    monkeypatch.setattr(quality, "_clip_score", fail)
    shorter = replace(SAMPLERS["DDPM-1000"], steps=40, window=8)
    monkeypatch.setitem(SAMPLERS, "DDPM-1000", shorter)


def fill(model: str | Path, out: Path, *arguments: str) -> str:
    given = ["--model", str(model), "--out", str(out), "--device", "cpu", *arguments]
    result = CliRunner().invoke(APP, given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def lines(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(one["sampler"], one["method"]): one for one in json.loads((out / "results.json").read_text())}


def check(found: dict[tuple[str, str], dict[str, Any]], samplers: list[str]) -> None:
    assert list(found) == [(sampler, method) for sampler in samplers for method in METHODS]
    for (sampler, method), line in found.items():
        steps, longest = SAMPLERS[sampler].steps, GROUPED.get(method, 1)
        if method == "sequential":
            assert (line["rounds"], line["evaluations"], line["speedup"], line["error_worst"]) == (steps, steps, 1, 0)
        else:
            assert line["rounds"] <= math.ceil(steps / longest) * longest
            assert line["evaluations"] > steps
        if method in OURS:
            assert 0 < line["error_worst"] < OURS[method]
        assert line["seconds"] > 0


def test_stable_diffusion(tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    reference.mkdir()
    out, samplers = tmp_path / "out", ["DDIM-25", "DPMSolver-25"]
    chosen = [word for name in samplers for word in ("--sampler", name)]
    model = save_stable_diffusion(tmp_path)
    output = fill(model, out, "--samples", "2", "--size", "64", "--reference", str(reference), *chosen)
    assert "No FID: URLError" in output
    assert "No CLIP score: URLError" in output
    found = lines(out)
    check(found, samplers)
    assert found["DDIM-25", "parasolver"]["printed"]["rounds"] == 11
    assert found["DDIM-25", "halves"]["rounds"] > found["DDIM-25", "parasolver"]["rounds"]
    table = (out / "table.md").read_text()
    assert "| DDIM-25 | ParaSolver | 2 |" in table
    assert "11 / 49, 1.2 s, 2.8x, FID 61.9, CLIP 25.4" in table
    for name in samplers:
        with Image.open(out / f"{name}.png") as sheet:
            assert sheet.size == (2 * 64, 64 * len(METHODS))
    one, other = ((out / "DDIM-25/default" / f"{n:05d}.png").read_bytes() for n in (0, 1))
    assert one != other


def test_churches(tmp_path: Path) -> None:
    out = tmp_path / "out"
    output = fill(save_church(tmp_path), out, "--samples", "1", "--sampler", "DDPM-1000", "--sampler", "DDIM-25")
    assert "--reference" in output
    assert "CLIP" not in output
    check(lines(out), ["DDPM-1000", "DDIM-25"])
    assert "10 / 44, 0.5 s, 2.2x, FID 15.7" in (out / "table.md").read_text()


def test_the_embedded_model_has_its_own_distance(tmp_path: Path) -> None:
    fill("embedded", tmp_path, "--samples", "2", "--sampler", "DDIM-25", "--method", "default")
    found = lines(tmp_path)
    assert list(found) == [("DDIM-25", "sequential"), ("DDIM-25", "default")]
    one, other = (line["Frechet distance"] for line in found.values())
    assert 10 < one < 200
    assert abs(one - other) < 0.1 * one


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--samples", "2", "--sampler", "DDIM-25", "--method", "default"]
    draw, drawn = Model.draw, []

    def interrupted(self: Any, number: int, steps: int, choices: Any) -> Any:
        drawn.append((number, choices.get("method")))
        if len(drawn) == 6:
            raise KeyboardInterrupt
        return draw(self, number, steps, choices)

    monkeypatch.setattr(Model, "draw", interrupted)
    with pytest.raises(AssertionError):
        fill("embedded", tmp_path, *arguments)
    before = (tmp_path / "DDIM-25/sequential/records.json").read_text()
    assert len(json.loads(before)) == 2
    assert len(json.loads((tmp_path / "DDIM-25/default/records.json").read_text())) == 1
    del drawn[:]
    fill("embedded", tmp_path, *arguments)
    assert drawn == [(0, None), (1, None)]  # a first call that is not kept, and what was missing
    assert (tmp_path / "DDIM-25/sequential/records.json").read_text() == before
    assert lines(tmp_path)["DDIM-25", "default"]["pictures"] == 2


def test_results_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    arguments = ["--samples", "1", "--sampler", "DDIM-25", "--method", "default"]
    fill("embedded", tmp_path, *arguments)
    given = ["--model", "embedded", "--out", str(tmp_path), "--seed", "7", *arguments]
    result = CliRunner().invoke(APP, given)
    assert result.exit_code != 0
    assert "another seed" in " ".join(result.output.split())


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(APP, ["--model", "embedded", "--out", str(tmp_path), "--sampler", "DDIM"])
    assert result.exit_code != 0
    assert "DPMSolver-50" in result.output


class Features(torch.nn.Module):
    """In the place of the Inception network, which has to be downloaded."""

    num_features = 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x.double().mean((2, 3)), (0, 1))


def test_fid_is_that_of_torchmetrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")
    monkeypatch.undo()  # our own _fid
    own = fid.FrechetInceptionDistance
    monkeypatch.setattr(fid, "FrechetInceptionDistance", lambda feature, **given: own(Features(), **given))
    for folder, level in (("real", 100), ("near", 104), ("far", 180)):
        (tmp_path / folder).mkdir()
        for n in range(8):
            pixels = np.full((16, 16, 3), level + n % 2, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{n}.png")
    measure = quality._fid(tmp_path / "real")
    near, far = (measure(sorted((tmp_path / folder).glob("*.png")), []) for folder in ("near", "far"))
    assert near == pytest.approx(3 * 4**2, rel=1e-3)
    assert far == pytest.approx(3 * 80**2, rel=1e-3)
