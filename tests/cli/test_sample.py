"""``parasolver sample`` as a user meets it."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("diffusers")
pytest.importorskip("PIL")
import torch
from PIL import Image
from safetensors.torch import load_file

from parasolver_adapters.dit import PRESETS as DITS
from tests.adapters.weights import fill, relative, saved
from tests.adapters.workers import PATH
from tests.cli.test_cli import run


def record(out: Path) -> dict[str, Any]:
    def refused(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads((out / "result.json").read_text(), parse_constant=refused)


def sample(out: Path, *options: object, steps: int = 10) -> torch.Tensor:
    run("sample", "--out", out, "--overwrite", "--steps", steps, *options)
    return load_file(out / "samples.safetensors")["samples"]


@pytest.fixture(scope="module")
def dit_s(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of DiT-S/8 with random weights."""
    pytest.importorskip("timm", reason="DiT is built from timm's layers; pip install 'parasolver[timm]'")
    from parasolver_adapters.dit import DiT

    with torch.device("meta"):
        network = DiT(DITS["dit-s-8-256"])
    generator = torch.Generator().manual_seed(0)
    state = {
        key: (0.05 * torch.randn(value.shape, generator=generator)).half()
        for key, value in network.state_dict().items()
    }
    return saved(state, tmp_path_factory.mktemp("dit") / "dit-s-8.pt")


def test_the_embedded_model_writes_pictures_and_a_record(tmp_path: Path) -> None:
    samples = sample(tmp_path, "--count", 5, "--window", 3, "--labels", "3,7", "--compare")
    assert samples.shape == (5, 1, 28, 28)
    first = np.asarray(Image.open(tmp_path / "000.png"))
    np.testing.assert_allclose(first / 127.5 - 1, samples[0, 0].clamp(-1, 1).numpy(), atol=0.5 / 127.5 + 1e-6)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 28, 3 * 28)
    np.testing.assert_array_equal(grid[:28, :28], first)
    np.testing.assert_array_equal(grid[28:, 28:56], np.asarray(Image.open(tmp_path / "004.png")))
    assert not grid[28:, 56:].any()
    told = record(tmp_path)
    assert told["labels"] == [3, 7, 3, 7, 3]
    assert told["status"] == "converged"
    assert told["rounds"] < len(told["timesteps"]) == 10
    assert max(told["error_to_sequential"]) < 1e-2
    assert {"loading", "sampling", "sequential_sampling", "drawing"} == set(told["seconds"])


def test_the_report_shows_rounds_and_both_samples(tmp_path: Path) -> None:
    sample(tmp_path, "--count", 3, "--window", 4, "--labels", "sneaker,bag,dress", "--compare")
    told, text = record(tmp_path), (tmp_path / "report.html").read_text(encoding="utf-8")
    assert told["labels"] == [7, 8, 3]
    (story,) = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert story["steps"] == 10
    assert story["rounds"] == story["shown"][-1] == told["rounds"]
    assert len(story["frames"]) == len(story["errors"]) == len(story["shown"])
    assert story["errors"][-1] == pytest.approx(told["error_to_sequential"][0], rel=1e-3)
    assert story["errors"][0] > 10 * story["errors"][-1]
    assert story["front"][-1] == 10
    assert [name.partition(" ")[0] for name in story["pictures"]] == ["sequential", "parallel", "difference"]
    assert {"report.html", "002.png"} <= set(told["files"])


def test_fewer_pictures_in_the_same_folder(tmp_path: Path) -> None:
    printed = run("sample", "--out", tmp_path, "--count", 2, "--steps", 4, "--json", only="stdout")
    assert json.loads(printed) == record(tmp_path)
    assert "holds an earlier run" in " ".join(run("sample", "--out", tmp_path, "--count", 1, code=2).split())
    sample(tmp_path, "--count", 1, steps=4)
    files = {"000.png", "grid.png", "samples.safetensors", "report.html", "result.json"}
    assert {file.name for file in tmp_path.iterdir()} == files
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("method", ["identity", "sequential"])
def test_other_methods(tmp_path: Path, method: str) -> None:
    sample(tmp_path, "--count", 1, "--method", method, "--tolerance", "0.1%", steps=6)
    assert record(tmp_path)["settings"]["method"] == method
    assert (record(tmp_path)["evaluations"] == 6) == (method == "sequential")


def test_more_pictures_leave_the_first_as_they_are(tmp_path: Path) -> None:
    few = sample(tmp_path / "few", "--count", 1, "--tolerance", 0, "--seed", 5)
    more = sample(tmp_path / "more", "--count", 2, "--tolerance", 0, "--seed", 5)
    assert relative(more[:1], few) < 1e-5
    assert record(tmp_path / "more")["labels"][:1] == record(tmp_path / "few")["labels"]


@pytest.mark.parametrize("sampler", ["dpm", "ddpm"])
def test_other_samplers(tmp_path: Path, sampler: str) -> None:
    sample(tmp_path, "--count", 1, "--sampler", sampler, "--window", 1, "--guidance-scale", 2)
    assert record(tmp_path)["rounds"] == 10


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_checkpoint_of_dit(tmp_path: Path, dit_s: Path, sampler: str) -> None:
    options = ["--checkpoint", dit_s, "--preset", "dit-s-8-256", "--sampler", sampler, "--count", 2, "--compare"]
    samples = sample(tmp_path, *options, "--guidance-scale", 1.5, steps=6)
    assert samples.shape == (2, 4, 32, 32)
    assert np.asarray(Image.open(tmp_path / "001.png")).shape == (32, 32, 3)
    told = record(tmp_path)
    assert told["checkpoint"] == {
        "name": "dit-s-8.pt",
        "sha256": hashlib.sha256(dit_s.read_bytes()).hexdigest(),
    }
    assert all(0 <= label < 1000 for label in told["labels"])
    assert max(told["error_to_sequential"]) < 1e-2


def test_latents_are_decoded_with_a_vae(tmp_path: Path, dit_s: Path) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    options = ["--checkpoint", dit_s, "--preset", "dit-s-8-256", "--count", 1, "--labels", "none"]
    sample(tmp_path / "out", *options, "--vae", tmp_path / "vae", "--dtype", "bfloat16", steps=5)
    assert np.asarray(Image.open(tmp_path / "out" / "000.png")).shape == (64, 64, 3)
    assert record(tmp_path / "out")["labels"] == [1000]


def test_a_checkpoint_of_guided_diffusion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from parasolver_adapters import guided_diffusion

    options: dict[str, Any] = {"num_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 1), "num_head_channels": 16}
    config = guided_diffusion.UNetConfig(16, num_classes=5, learn_sigma=True, attention_resolutions=(8,), **options)
    network = guided_diffusion.UNet(config)
    fill(network)
    monkeypatch.setitem(guided_diffusion.PRESETS, "adm-64", guided_diffusion.Preset(config))
    path = saved(network.state_dict(), tmp_path / "adm.pt")
    samples = sample(tmp_path, "--checkpoint", path, "--preset", "adm-64", "--sampler", "ddpm", "--count", 2)
    assert samples.shape == (2, 3, 16, 16)
    assert all(0 <= label < 5 for label in record(tmp_path)["labels"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--preset", "sd"], "expected one of fashion-mnist, adm-64"),
        (["--sampler", "euler"], "expected one of ddim, dpm, ddpm"),
        (["--window", "0"], 'expected a number of at least 1, or "auto"'),
        (["--labels", "cat"], "expected classes of 0 T-shirt/top, 1 trouser"),
        (["--labels", "11"], "9 ankle boot, 10 none; got 11"),
        (["--method", "newton"], "expected one of secant, identity"),
        (["--preset", "adm-64", "--labels", "bag"], "expected classes such as 207,360"),
    ],
)
def test_bad_options_are_told(tmp_path: Path, options: list[str], told: str) -> None:
    assert told in " ".join(run("sample", "--out", tmp_path, *options, code=2).replace("│", " ").split())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--preset", "adm-64"], "--checkpoint: the preset adm-64 needs a file"),
        (["--preset", "adm-64", "--checkpoint", "nowhere.pt"], "there is no file nowhere.pt"),
        (["--steps", "2000"], "--steps: 2000 steps were asked for where there are 1000"),
        (["--method", "identity", "--calibrate"], "--calibrate: is of the method secant, got --method identity"),
        (
            ["--preset", "dit-xl-2-256", "--checkpoint", "x", "--labels", "1001"],
            "--labels: expected classes in 0..1000",
        ),
        (["--vae", "folder"], "--vae: the embedded model has no use for it"),
        (["--guide-all-channels"], "--guide-all-channels: the embedded model has no use for it"),
        (
            ["--preset", "lsun-cat", "--checkpoint", "x", "--labels", "3"],
            "--labels: the preset lsun-cat has no classes",
        ),
        (["--checkpoint", "x.pt"], "--preset: a checkpoint needs the name of its network"),
        (["--device", "meow"], "--device: 'meow' cannot be used"),
        (["--device", "meta"], "--device: 'meta' cannot be used"),
        (["--classifier-scale", "2"], "--classifier-scale: the embedded model has no use for it, got 2"),
        (
            ["--preset", "adm-64", "--checkpoint", "x", "--classifier-scale", "2"],
            "sampling without a classifier has no",
        ),
    ],
)
def test_what_does_not_fit_is_told(tmp_path: Path, options: list[str], told: str) -> None:
    error = run("sample", "--out", tmp_path / "new", *options, code=1, only="stderr")
    assert told in " ".join(error.split())
    assert not (tmp_path / "new").exists()


def test_a_file_with_code_is_refused(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"weight": Code()}, tmp_path / "code.pt")
    options = ["--checkpoint", tmp_path / "code.pt", "--preset", "adm-64"]
    assert "nothing was run" in " ".join(run("sample", "--out", tmp_path, *options, code=1).split())
    assert not (tmp_path / "ran").exists()


def test_pictures_that_are_not_finite_are_told(tmp_path: Path, dit_s: Path) -> None:
    state = torch.load(dit_s, weights_only=True)
    state["final_layer.linear.bias"][:] = torch.nan
    options = ["--checkpoint", saved(state, tmp_path / "nan.pt"), "--preset", "dit-s-8-256", "--count", 1]
    assert "NaN or infinity" in run("sample", "--out", tmp_path, "--steps", 5, *options, code=1)
    assert record(tmp_path)["status"] == "nonfinite_model"


def test_what_was_reached_is_kept_when_the_user_breaks_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from parasolver_cli import sample as command

    def bar(*_: object) -> Any:
        def broken_off(state: Any) -> None:
            if state.stats.rounds == 3:
                raise KeyboardInterrupt

        return broken_off

    monkeypatch.setattr(command, "bar", bar)
    told = run("sample", "--out", tmp_path, "--count", 1, "--steps", 10, "--window", 3, code=130)
    assert "Interrupted after round 3" in told
    assert record(tmp_path)["status"] == "interrupted"
    assert record(tmp_path)["error_estimate"] == [None]  # JSON has no infinity
    assert (tmp_path / "000.png").exists()


def test_an_interrupt_while_comparing_keeps_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from parasolver_cli import sample as command

    def bar(_: object, name: str, *__: object) -> Any:
        def broken_off(state: Any) -> None:
            if name == "sequentially":
                raise KeyboardInterrupt

        return broken_off

    monkeypatch.setattr(command, "bar", bar)
    told = run("sample", "--out", tmp_path, "--count", 1, "--steps", 4, "--window", 2, "--compare", code=130)
    assert "The comparison was interrupted; the pictures are kept." in told
    assert record(tmp_path)["status"] == "converged"
    assert record(tmp_path)["error_to_sequential"] is None


def test_an_interrupt_while_loading_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from parasolver_cli import sample as command

    def broken_off(*_: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "load", broken_off)
    told = run("sample", "--out", tmp_path / "new", code=130, only="stderr")
    assert "parasolver: interrupted; nothing was written" in told
    assert not (tmp_path / "new").exists()


def torchrun(out: Path, *options: object) -> subprocess.CompletedProcess[str]:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "parasolver_cli", "sample"]
    command = [sys.executable, "-m", *launcher, "--out", out, *options]
    environment = os.environ | {"PYTHONPATH": PATH}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=80, env=environment)


@pytest.mark.distributed
@pytest.mark.timeout(90)
def test_two_processes_draw_the_pictures_of_one(tmp_path: Path) -> None:
    options = ["--count", 3, "--steps", 12, "--sampler", "ddpm", "--window", 5, "--guidance-scale", 2]
    ended = torchrun(tmp_path / "two", *options)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("The pictures, report.html, grid.png") == 1
    expected = sample(tmp_path / "one", *options, steps=12)
    assert relative(load_file(tmp_path / "two" / "samples.safetensors")["samples"], expected) < 1e-5
    assert {one.name for one in (tmp_path / "two").iterdir()} == {one.name for one in (tmp_path / "one").iterdir()}
    for number in range(3):
        got, want = (np.asarray(Image.open(tmp_path / which / f"00{number}.png")) for which in ("two", "one"))
        assert np.abs(got.astype(int) - want).max() <= 1
    told, alone = record(tmp_path / "two"), record(tmp_path / "one")
    assert (told["processes"], alone["processes"]) == (2, 1)
    assert told["rounds"] == alone["rounds"]


@pytest.mark.distributed
@pytest.mark.timeout(90)
def test_what_does_not_fit_ends_two_processes(tmp_path: Path) -> None:
    ended = torchrun(tmp_path / "out", "--preset", "adm-64", "--checkpoint", "nowhere.pt")
    assert ended.returncode != 0
    assert "there is no file nowhere.pt" in ended.stderr
    assert not (tmp_path / "out").exists()


SLEEPING = """
import os, sys, time
from pathlib import Path
from parasolver_cli import main, sample

def bar(*_):
    def sleep(state):  # the other process waits for this one's share of the next round
        if state.stats.rounds == 3 and os.environ["RANK"] == "1":
            Path(sys.argv[2], "asleep").touch()
            time.sleep(60)
    return sleep

sample.bar = bar
main.app(["sample", "--out", sys.argv[1], "--count", "1", "--steps", "10", "--window", "3"])
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(150)
def test_ctrl_c_in_two_processes_keeps_what_was_reached(tmp_path: Path) -> None:
    (tmp_path / "sleeping.py").write_text(SLEEPING)
    arguments = [tmp_path / "sleeping.py", tmp_path / "out", tmp_path]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment, pipe = os.environ | {"PYTHONPATH": PATH}, subprocess.PIPE
    with subprocess.Popen(
        [*launcher, *map(str, arguments)], stdout=pipe, stderr=pipe, text=True, env=environment
    ) as run:
        deadline = time.monotonic() + 100
        while not (tmp_path / "asleep").exists() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        told, errors = run.communicate(timeout=45)
    assert told.count("Interrupted after round 3") == 1, errors
    assert record(tmp_path / "out")["status"] == "interrupted"
    assert (tmp_path / "out" / "000.png").exists()
    assert "Traceback" not in errors.split("torch/distributed")[0], errors


def test_margins_are_found_kept_and_used_again(tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    options = ("--count", 8, "--window", 8, "--tolerance", 0.05, "--labels", "3,7")
    found = sample(first, *options, "--calibrate", steps=12)
    kept = json.loads((first / "calibration.json").read_text())
    assert kept["gain"] >= 1
    with Image.open(first / "calibration.png") as picture:
        assert picture.size[0] > 400
    used = sample(again, *options, "--calibration", first / "calibration.json", steps=12)
    assert torch.equal(found, used)
    assert record(again)["rounds"] == record(first)["rounds"]
    refused = run("sample", "--out", again, "--overwrite", *options, "--calibrate", "--window", "auto", code=1)
    assert "--calibrate: finds a calibration for one window" in " ".join(refused.split())
