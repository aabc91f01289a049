"""The comparison with caches and fewer steps: what is counted, what the caches do, and the command from end to end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("typer")
import torch
from diffusers import DiTTransformer2DModel, TaylorSeerCacheConfig
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from diffusers.models.cache_utils import CacheMixin
from typer import Typer
from typer.testing import CliRunner

from benchmarks.alternatives import __main__ as command
from benchmarks.alternatives import methods
from benchmarks.alternatives.caches import (
    CachedDiT,
    Work,
    first_block,
    load_dit,
    mag_cache,
    magnitude_ratios,
    sea_cache,
    taylor_seer,
)
from benchmarks.alternatives.methods import Sample
from benchmarks.alternatives.report import front
from benchmarks.alternatives.results import OURS, SEQUENTIAL, Results, Run
from benchmarks.latency.devices import Device

pytestmark = pytest.mark.usefixtures("quiet_diffusers")

STEPS = 8
SKIPPED_BUT_THE_FIRST = 1 / 8  # of eight blocks


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def network() -> CachedDiT:
    return load_dit()


@pytest.fixture
def sample(network: CachedDiT) -> Sample:
    return Sample(network, Work(network), 3, STEPS)


def shares(calls: list[tuple[int, float]]) -> list[float]:
    return [share for _, share in calls]


def test_the_whole_network_is_counted_as_one(sample: Sample) -> None:
    assert sample.sequential()[1] == [(2, 1.0)] * STEPS


def test_guidance_in_a_part_of_the_steps_saves_rows(sample: Sample) -> None:
    _, calls = sample.sequential(guided=range(2, 5))
    assert calls == [(2 if 2 <= step < 5 else 1, 1.0) for step in range(STEPS)]


def test_each_cache_skips_what_it_says(sample: Sample) -> None:
    _, calls = sample.sequential(config=first_block(1e6))
    assert shares(calls) == [1.0] + [SKIPPED_BUT_THE_FIRST] * (STEPS - 1)
    _, calls = sample.sequential(config=taylor_seer(3, 1))
    assert shares(calls) == [1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    _, calls = sample.sequential(config=sea_cache(1e6))
    assert shares(calls) == [1.0] + [0.0] * (STEPS - 2) + [1.0]  # the last step is always run
    ratios = magnitude_ratios(sample.network, sample.sequential, STEPS)
    assert ratios[0] == 1.0
    assert all(0.5 < ratio < 2 for ratio in ratios)
    _, calls = sample.sequential(config=mag_cache(1e6, ratios))
    assert shares(calls) == [1.0, 1.0] + [0.0] * (STEPS - 2)  # a fifth of the steps is always run


def test_a_cache_that_never_skips_changes_nothing_and_leaves_nothing(sample: Sample) -> None:
    truth, _ = sample.sequential()
    for config in (first_block(0.0), sea_cache(0.0), mag_cache(0.0, [0.9] * STEPS), taylor_seer(1, 1)):
        found, calls = sample.sequential(config=config)
        assert shares(calls) == [1.0] * STEPS
        assert torch.equal(found, truth)
    assert torch.equal(sample.sequential()[0], truth)


def test_what_the_caches_do_with_the_network_as_it_stands() -> None:
    assert not issubclass(DiTTransformer2DModel, CacheMixin)
    network = load_dit()
    inputs: dict[str, Any] = {"timestep": torch.tensor([500]), "class_labels": torch.tensor([3])}
    names = TaylorSeerCacheConfig(cache_interval=100, disable_cache_before_step=1)
    network.enable_cache(names)  # matches no module
    x = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    work = Work(network)
    for _ in range(4):
        network(x, **inputs)
    assert work.take() == 4.0
    network.disable_cache()
    apply_first_block_cache(network, FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="No cache context is set"):
        network(x, **inputs)


def test_ours_gives_the_sequential_sample_in_fewer_rounds(sample: Sample) -> None:
    truth, _ = sample.sequential()
    found, calls = sample.ours(8, 1e-2)
    assert (found - truth).norm() < 1e-2 * truth.norm()
    assert len(calls) < STEPS
    assert sum(rows for rows, _ in calls) > 2 * STEPS


def test_time_is_that_of_rows_on_a_machine(tmp_path: Path) -> None:
    def run(method: str, calls: list[tuple[int, float]]) -> Run:
        return Run(method, "", 0.0, calls, 0.0, [], True)

    calls = [(16, 1.0), (8, 1.0), (2, 0.5)]
    assert run("cache", calls).time(Device(1, overhead=0.0)) == 16 + 8 + 1
    assert run("cache", calls).time(Device(1, 4, overhead=0.0)) == 4 + 2 + 0.5
    assert run("cache", calls).time(Device(16)) == 2.5
    assert run(OURS, calls).time(Device(16, overhead=0.05)) == pytest.approx(2.65)
    results = Results(tmp_path)
    results.points[SEQUENTIAL, ""].append(run(SEQUENTIAL, [(2, 1.0)] * 25))
    assert results.time(results.points[SEQUENTIAL, ""], Device(1)) == 1
    assert results.time(results.points[SEQUENTIAL, ""], Device(1, 2)) == 0.5  # guidance on two devices
    assert results.time([run("cache", calls)], Device(1)) == 0.5


def test_what_others_beat_is_not_drawn() -> None:
    assert front([(2.0, 0.1), (1.0, 0.3), (3.0, 0.2), (1.5, 0.3)]) == [(1.0, 0.3), (2.0, 0.1)]


def test_the_command_resumes_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "TOLERANCES", {8: (1e-2,)})
    monkeypatch.setattr(methods, "FEWER", (2,))
    monkeypatch.setattr(methods, "configurations", lambda ratios: [("FirstBlockCache", "bold", first_block(1.0))])
    app = Typer()
    app.command()(command.main)

    methods.Bench(tmp_path, 3).complete(0, 1)
    first = (tmp_path / "sample-000.json").read_bytes()
    given = ["--out", str(tmp_path), "--steps", "3", "--samples", "2"]
    result = CliRunner().invoke(app, given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "sample-000.json").read_bytes() == first
    results = Results(tmp_path)
    assert {len(runs) for runs in results.points.values()} == {2}
    assert results.methods[0] == SEQUENTIAL
    assert results.methods[-1] == OURS
    assert results.best(OURS, Device(16), 1e-2) is not None
    assert "| sequential |  | 3.0 | 1.00 |" in (tmp_path / "tables.md").read_text()
    assert (tmp_path / "alternatives.png").stat().st_size > 10_000
    assert (tmp_path / "alternatives_quality.png").stat().st_size > 10_000
