"""Pipelines whose rounds several processes share: the sample of one process, and errors in all of them."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
from parasolver_adapters.diffusers import parallel_sampling
from tests.adapters import pipeline_workers as scenarios
from tests.adapters.pipeline_families import FAMILIES
from tests.adapters.tiny_pipelines import stable_diffusion
from tests.adapters.workers import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(90), pytest.mark.usefixtures("quiet_diffusers")]
TITLES = [
    "StableDiffusionPipeline, DDIM, batch of 2",
    "StableDiffusionPipeline, DPM-Solver++ SDE",
    "StableDiffusionInpaintPipeline, 4 channels",  # the loop changes the state
    "StableDiffusionControlNetPipeline",  # two networks, one of many outputs
    "FluxPipeline",
    "DDPMPipeline, clip_sample",  # corrects the network's output
]
OTHERS = [family.title for family in FAMILIES if family.title not in TITLES]


@pytest.mark.parametrize(
    "titles",
    [TITLES, *(pytest.param(OTHERS[i : i + 6], marks=pytest.mark.slow) for i in range(0, len(OTHERS), 6))],
    ids=lambda titles: titles[0],
)
def test_the_sample_is_that_of_one_process(titles: list[str], tmp_path: Path) -> None:
    seen = launch(scenarios.families, 2, tmp_path, titles)
    assert set(seen[0]) == set(titles)
    for title in titles:
        one, other = (rank[title] for rank in seen)
        assert one["bits"] == other["bits"], title
        assert one["difference"] < 1, title
        assert one["rounds"][0] == one["rounds"][1], title
        assert one["evaluations"][0] == one["evaluations"][1], title


def test_each_process_makes_its_share_of_the_calls(tmp_path: Path) -> None:
    seen = launch(scenarios.shares, 2, tmp_path)
    assert all(one["difference"] < 1e-12 for one in seen)
    # the pipeline's own calls, in each process: one, two that are compared, and these once more beside the first
    first = 2 + 2 * 2 + 2 * 3
    rows = [sum(one["rows"]) - first - 2 * 10 for one in seen]  # without those of the sequential run
    compared = 2  # the row that is compared, once
    assert sum(rows) == 2 * (seen[0]["evaluations"] - 1) + compared  # guidance doubles; the first output is known
    assert abs(rows[0] - rows[1]) <= 0.3 * sum(rows)
    assert all(max(one["rows"]) <= 2 * (2 + 1) for one in seen)


def test_processes_that_are_called_differently(tmp_path: Path) -> None:
    told = {
        "seed": "x_T: ",
        "prompt": "steps and conditions: ",
        "guidance": "steps and conditions: ",
        "steps": "timesteps and step rule: ",
        "window": "window: 5 on rank 0, 4 on rank 1",
        "network": "network: ",
        "noise": "seed or noise: ",
    }
    for seen in launch(scenarios.disagree, 2, tmp_path):
        assert seen.pop("nothing") == {"type": None}  # the group is as good as new
        assert {one["type"] for one in seen.values()} == {"WorkersDisagreeError"}
        for name, one in seen.items():
            assert told[name] in one["text"]


@pytest.mark.parametrize(
    ("fault", "call", "kinds", "told"),
    [
        ("raise", 3, ["WorkerError", "PipelineNotParallelError"], "boom"),  # while the loop is looked at
        ("raise", 7, ["WorkerError", "WorkerError"], "boom"),  # in a round
        ("die", 3, ["WorkerLostError"], "died"),
        ("die", 7, ["WorkerLostError"], "died"),
    ],
)
def test_a_fault_in_one_process_ends_all(fault: str, call: int, kinds: list[str], told: str, tmp_path: Path) -> None:
    seen = launch(scenarios.fails, 2, tmp_path, fault, call)
    if fault == "die":
        assert seen.pop(1) == {}
    assert [one["type"] for one in seen] == kinds
    assert all(told in one["text"] for one in seen)


@pytest.mark.parametrize(
    ("how", "own", "told"),
    [
        ("callback", "KeyError", "KeyError: 'mine'"),
        ("preview", "OSError", "OSError: no room for the preview"),
        ("latents", None, "changed what the pipeline goes on with"),  # it goes on alone, sequentially
    ],
)
def test_a_run_left_by_one_process_ends_the_others(how: str, own: str | None, told: str, tmp_path: Path) -> None:
    seen = launch(scenarios.leaves, 2, tmp_path, how)
    assert [one["type"] for one in seen] == ["WorkerError", own]
    assert "rank 1 of 2 left run 1 after network call" in seen[0]["text"]
    assert told in seen[0]["text"]
    assert seen[0]["after"] == seen[1]["after"]


def test_what_is_refused_is_refused_everywhere(tmp_path: Path) -> None:
    seen = launch(scenarios.refused, 2, tmp_path)
    assert seen[0] == seen[1]
    assert len(seen[0]) > 3


def test_without_processes() -> None:
    group: Any = "all"
    with pytest.raises(RuntimeError, match=r"group: torch\.distributed has not been started"):
        parallel_sampling(stable_diffusion(), group=group).__enter__()
