"""The code about pipelines in the documentation, on tiny stand-ins for the weights, as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import torch

from parasolver_core import Status
from tests.adapters.saved_pipelines import CHURCH, SDXL, save_church, save_sdxl
from tests.adapters.workers import PATH

pytestmark = pytest.mark.usefixtures("quiet_diffusers")

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/pipelines.md").read_text()
BLOCK, LOOP, MODULAR = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
(FALLBACK,) = re.findall(r"```{code-block} python\n(.*?)```", PAGE, flags=re.DOTALL)
SCHEDULERS = re.findall(r"`((\w+Scheduler)\.from_config\(.*?\))` \| (\d+) \|", PAGE)
(SHARED,) = re.findall(r"```py\n(.*?)```", (ROOT / "docs/devices.md").read_text(), flags=re.DOTALL)
(README,) = re.findall(r"```py\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from which the names of the models lead to the stand-ins."""
    root = tmp_path_factory.mktemp("models")
    save_sdxl(root)
    save_church(root)
    return root


def run(code: str, models: Path, monkeypatch: pytest.MonkeyPatch, **names: Any) -> dict[str, Any]:
    monkeypatch.chdir(models)
    exec(compile(code, "example", "exec"), names)
    return names


def check(names: dict[str, Any], steps: int, rounds: int, **given: Any) -> None:
    """The picture of the example, against the pipeline's own in the same setting."""
    stats = names["run"].stats
    assert names["run"].status is Status.CONVERGED
    assert stats.rounds <= rounds
    pipe, generator = names["pipe"], torch.Generator().manual_seed(42)
    want = pipe(num_inference_steps=steps, generator=generator, **given).images[0]
    got, want = (torch.tensor(list(one.tobytes())).double() for one in (names["image"], want))
    assert names["image"].size == (64, 64) if given else (32, 32)
    assert (got - want).norm() < 0.05 * want.norm()


def test_the_table_of_schedulers_is_read() -> None:
    assert len(SCHEDULERS) == 5


def test_readme(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run(README, models, monkeypatch)
    check(names, 50, 25, prompt="a lighthouse on a cliff")


@pytest.mark.parametrize(("line", "name", "steps"), SCHEDULERS, ids=[name for _, name, _ in SCHEDULERS])
def test_block_with_each_scheduler(
    line: str, name: str, steps: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = min(int(steps), 60)
    code = BLOCK.replace("import DDIMScheduler", f"import {name}").replace("steps=50", f"steps={few}")
    code = re.sub(r"pipe\.scheduler = .*?\)\n", f"pipe.scheduler = {line}\n", code, flags=re.DOTALL)
    check(run(code, models, monkeypatch), few, few // 2, prompt="a lighthouse on a cliff")


@pytest.mark.parametrize("steps", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_churches(steps: int, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = BLOCK.replace("DDIMScheduler, StableDiffusionXLPipeline", "DDPMPipeline").replace(SDXL, CHURCH)
    code = re.sub(r"pipe\.scheduler = .*?\)\n", "", code, flags=re.DOTALL).replace(
        "StableDiffusionXLPipeline", "DDPMPipeline"
    )
    code = code.replace("prompt, num_inference_steps=50", f"num_inference_steps={steps}")
    check(run(code.replace("=16", "=32"), models, monkeypatch), steps, {60: 30, 1000: 80}[steps])


def test_fallback(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run(BLOCK.replace("=50", "=10"), models, monkeypatch)
    run(
        FALLBACK.replace("=25", "=10"),
        models,
        monkeypatch,
        **{name: names[name] for name in ("parallel_sampling", "pipe")},
    )


def test_a_loop_of_ones_own() -> None:
    names: dict[str, Any] = {}
    exec(compile(LOOP, "example", "exec"), names)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    want, got = (names[name](x, torch.Generator().manual_seed(0)) for name in ("sample", "parallel"))
    assert names["parallel"].run.stats.rounds < 50
    assert (got - want).norm() < 1e-2 * want.norm()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_pipeline_in_several_processes(models: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SHARED)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "script.py")]
    command, environment = [sys.executable, "-m", *launcher], os.environ | {"PYTHONPATH": PATH}
    ended = subprocess.run(
        command, cwd=models, capture_output=True, text=True, check=False, timeout=100, env=environment
    )
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"^\d+ rounds$", ended.stdout, flags=re.MULTILINE)
    assert (models / "lighthouse.png").exists()


def test_modular_blocks(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run(MODULAR, models, monkeypatch)
    assert "parallel_run" in [one.name for one in names["blocks"].sub_blocks["denoise"].intermediate_outputs]
