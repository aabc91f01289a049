"""The overhead benchmark runs and counts; nothing here depends on time."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("torch")
from typer.testing import CliRunner

from benchmarks import overhead


@pytest.mark.parametrize("library", overhead.LIBRARIES)
def test_measures_time_and_memory(library: str) -> None:
    line = overhead.measure(library, (4, 16, 16), 4, seconds=0.0)
    assert (line.library, line.event, line.window) == (library, (4, 16, 16), 4)
    assert line.rounds >= 1
    assert 1 <= line.accepted <= 4
    assert line.seconds > 0
    assert line.copies > 0
    assert line.memory_windows > 1


@pytest.mark.parametrize("library", overhead.LIBRARIES)
def test_memory_does_not_grow_with_the_number_of_steps(library: str) -> None:
    assert overhead.measure(library, (4, 64, 64), 8, seconds=0.0).memory_windows <= 6


def test_torch_memory_counts_live_storages_once() -> None:
    import torch

    from benchmarks.torch_memory import TorchMemory

    with TorchMemory() as memory:
        x = torch.zeros(1000)
        y = x[:10].view(2, 5) + 1  # the view costs nothing
        x.add_(1)
        assert memory.now == memory.peak == 4040
        del x
        assert memory.now == 40
        z = torch.sin(y)
        assert (memory.now, memory.peak) == (80, 4040)
        del y, z
        assert memory.now == 0


def test_memory_of_numpy_counts_beside_that_of_torch() -> None:
    import torch

    from benchmarks.torch_memory import TorchMemory

    tracemalloc.start()
    try:
        with TorchMemory() as memory:
            first = np.zeros(100_000)
            x = torch.zeros(100_000)
            del first
            y = torch.zeros(100_000)
            alone = memory.peak
            second = np.zeros(200_000)
            del x, y
    finally:
        tracemalloc.stop()
    assert second.nbytes == 1_600_000
    assert 1_200_000 <= alone < 1_250_000
    assert 2_400_000 <= memory.peak < 2_450_000


def test_command_prints_a_table_and_writes_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "EVENTS", ((2, 8, 8),))
    monkeypatch.setattr(overhead, "WINDOWS", (4,))
    file = tmp_path / "overhead.json"
    app = overhead.typer.Typer()
    app.command()(overhead.main)
    result = CliRunner().invoke(app, ["--json", str(file), "--seconds", "0"], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert "2x8x8" in result.output
    lines = json.loads(file.read_text())
    assert [(line["library"], line["batch"]) for line in lines] == [
        (library, batch) for batch in (1, 1, 16) for library in overhead.LIBRARIES
    ]
    assert "Small states" in result.output
    assert set(lines[0]) >= {"event", "window", "seconds", "copy_seconds", "copies", "memory_windows"}
