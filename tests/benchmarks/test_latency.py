"""The latency benchmark runs and counts; nothing here depends on time."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("diffusers")
pytest.importorskip("sklearn")
import torch
from typer import Typer
from typer.testing import CliRunner

from benchmarks.latency import __main__ as command
from benchmarks.latency import timings
from benchmarks.latency.devices import BatchCost, Device, break_even, mean_speedup
from benchmarks.latency.replays import replay
from benchmarks.latency.timings import bare_loop
from benchmarks.pareto.settings import Setting, step_rule
from benchmarks.problems import PROBLEMS
from parasolver_core import solve_sequential


@pytest.mark.parametrize(
    ("free", "gpus", "rows", "calls"),
    [
        (1, 1, 1, 1.0),
        (1, 1, 8, 8.0),
        (4, 1, 3, 1.0),
        (4, 1, 6, 1.5),
        (4, 2, 6, 1.0),
        (2, 2, 9, 2.5),
        (math.inf, 1, 99, 1.0),
    ],
)
def test_a_batch_costs_a_call_up_to_k_rows_and_its_share_beyond(
    free: float, gpus: int, rows: int, calls: float
) -> None:
    assert Device(free, gpus).call(rows) == calls


def test_speedup_replays_the_rounds() -> None:
    # 4 + 2 + 1 calls and three times the overhead instead of 14 calls
    assert Device(2, overhead=0.0).speedup(14, [8, 4, 1]) == pytest.approx(2.0)
    assert Device(2, overhead=1.0).speedup(14, [8, 4, 1]) == pytest.approx(1.4)


def test_break_even_is_the_smallest_k_that_pays() -> None:
    histories = [[8, 8, 8], [4, 8, 8]]  # 24 and 20 rows for 10 steps
    k = break_even(10, histories, gpus=1, overhead=0.0)
    assert k == 3
    assert mean_speedup(10, histories, Device(3, overhead=0.0)) >= 1
    assert mean_speedup(10, histories, Device(2, overhead=0.0)) < 1
    assert break_even(10, histories, gpus=4, overhead=0.0) == 1
    assert break_even(2, histories, gpus=1, overhead=0.0) is None


def test_the_cost_of_a_batch_grows_in_proportion_beyond_what_was_measured() -> None:
    cost = BatchCost("policy", [1, 10], [1.0, 4.0])
    assert [cost(1), cost(4), cost(10), cost(20)] == [1.0, 2.0, 4.0, 8.0]
    assert cost.free == 2.5


@pytest.mark.parametrize("sampler", ["DDIM", "2M"])
def test_the_bare_loop_is_the_sequential_sampler(sampler: str) -> None:
    problem = PROBLEMS["policy"]
    denoiser, x_T = problem.make(), problem.starts(2)
    rule, timesteps = step_rule(problem, Setting("", sampler, 12, 1))
    truth = solve_sequential(denoiser, x_T, timesteps, rule).sample
    torch.testing.assert_close(bare_loop(denoiser, x_T, timesteps, rule, torch.Generator()), truth)


def test_a_replay_records_the_rows_of_each_sample() -> None:
    problem = PROBLEMS["policy"]
    one = replay(problem, problem.make(), "DDIM", 25, 8, seeds=2, tolerance=1e-2)
    assert len(one.rounds) == 2
    assert all(max(rounds) <= 8 and sum(rounds) >= len(rounds) for rounds in one.rounds)
    assert one.error < 1e-2


def test_command_writes_table_json_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "SAMPLERS", (("DDIM", 12),))
    monkeypatch.setattr(timings, "WINDOWS", (4, 100))
    monkeypatch.setattr(command, "MEASURED", ("policy",))
    monkeypatch.setattr(command, "REPLAYED", {"policy": (("DDPM", 12, (4, 12)),)})
    app = Typer()
    app.command()(command.main)
    arguments = ["--out", str(tmp_path), "--repeats", "1", "--seeds", "1"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "Simulated" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "latency.png").stat().st_size > 1000
    found = json.loads((tmp_path / "results.json").read_text())
    assert {one["window"] for one in found["timings"]} == {4, 12}
    assert {one["window"] for one in found["replays"]} == {4, 12}
    assert all(one["parallel"] > one["network"] > 0 and np.isfinite(one["error"]) for one in found["timings"])
