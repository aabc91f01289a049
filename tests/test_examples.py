"""The programs in ``examples/`` run as they stand, on tiny networks instead of weights."""

from __future__ import annotations

import asyncio
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from parasolver_core import NoiseSchedule

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name))


def test_policy_loop_succeeds_as_the_plain_loop_does_in_fewer_rounds() -> None:
    diffusers = pytest.importorskip("diffusers")
    names = load("policy_loop.py")
    scheduler, outcomes = diffusers.DDIMScheduler(**names["TRAINED"], clip_sample=False), []
    for options in ({"method": "sequential"}, {"window": 8}):
        plan = names["ActionSampler"](names["load_policy"](), scheduler, 20, shift=0, **options)
        outcomes.append(names["episode"](plan, 0))
    (safe, _, calls), (same, seconds, rounds) = outcomes
    assert safe == same
    assert calls == [20] * 16
    assert len(seconds) == 16
    assert sum(rounds[1:]) < 15 * 8


def test_pendulum_equals_the_loop() -> None:
    assert load("pendulum.py")["main"](1000) < 1e-12


def test_step_rule_of_ones_own_gives_the_sample_of_the_loop() -> None:
    assert load("step_rule.py")["main"]() < 1e-3


def test_readme_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    mpl = pytest.importorskip("matplotlib")
    pytest.importorskip("diffusers")
    mpl.use("Agg")
    cells = json.loads((EXAMPLES / "readme_picture.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]).replace("(50)", "(8)").replace("=16", "=4"), "cell", "exec"), names)
    assert names["solution"].success
    assert torch.equal(names["estimates"][-1], names["solution"].sample[0, 0])
    names["plt"].close("all")


def test_diffusers_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet_diffusers: None
) -> None:
    pytest.importorskip("transformers")
    from tests.adapters.saved_pipelines import save_sdxl

    save_sdxl(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["diffusers_pipeline.py", "--steps", "12", "--window", "4"])
    load("diffusers_pipeline.py")["main"]()
    told = capsys.readouterr().out
    assert "sequential: 12 calls" in told
    assert float(told.split("of a pixel: ")[1].split()[0]) < 0.05


class Server:
    """The server's module, with its worker running."""

    def __enter__(self) -> dict[str, Any]:
        pytest.importorskip("fastapi")
        names = load("server.py")
        self.sampler = names["sampler"]
        self.sampler.start()
        return names

    def __exit__(self, *_: object) -> None:
        self.sampler.stop()


def test_server_samples_a_request_that_is_alone_in_parallel() -> None:
    with Server() as names:
        request = names["Request"](condition=[2.0] * 8, seed=3)
        answer = asyncio.run(names["sample"](request))
        assert answer["batch"] == 1
        assert answer["rounds"] < 25
        assert names["health"]() == {"alive": True}
        noise = torch.randn(8, generator=torch.Generator().manual_seed(3))
        assert answer["sample"] == pytest.approx((noise + 2.0).tolist(), abs=0.1)  # the flow of N(2, 1), nearly
    assert names["health"]() == {"alive": False}


def test_server_batches_what_waits_and_each_request_gets_its_own_answer() -> None:
    pytest.importorskip("fastapi")
    names = load("server.py")
    sampler = names["sampler"]
    means = [0.0, 1.0, 2.0, 3.0]
    answers = [sampler.submit(torch.zeros(8), torch.full((8,), mean)) for mean in means]
    sampler.start()
    results = [answer.result(60) for answer in answers]
    sampler.stop()
    assert [together for _, together, _ in results] == [4] * 4
    for mean, (sample, _, _) in zip(means, results, strict=True):
        assert sample.mean().item() == pytest.approx(mean, abs=0.1)


def test_server_tells_an_error_and_goes_on() -> None:
    pytest.importorskip("fastapi")
    names = load("server.py")

    def model(x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return x if float(condition[0, 0]) < 1 else x[:, :1]

    sampler = names["Sampler"](model, NoiseSchedule.linear(), "epsilon", steps=4)
    sampler.start()
    with pytest.raises(ValueError, match="shape"):
        sampler.submit(torch.ones(8), torch.ones(8)).result(60)
    assert sampler.submit(torch.ones(8), torch.zeros(8)).result(60)[0].shape == (8,)
    sampler.stop()
    assert not sampler.alive
