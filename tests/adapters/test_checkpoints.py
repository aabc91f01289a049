"""Checkpoint files: what is read, what is refused, and that nothing in them is run."""

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from safetensors.torch import save_file

from parasolver_adapters.checkpoints import CheckpointError, check_weights, load_weights, read_state_dict


def network() -> Any:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.SiLU(), torch.nn.Linear(4, 2))


@pytest.fixture
def state() -> dict[str, Any]:
    torch.manual_seed(0)
    return network().state_dict()


def saved(state: dict[str, Any], path: Path, **options: Any) -> Path:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path, **options)
    return path


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_come_back(tmp_path: Path, state: dict[str, Any], name: str, dtype: Any) -> None:
    read = read_state_dict(saved({key: value.to(dtype) for key, value in state.items()}, tmp_path / name))
    assert {value.dtype for value in read.values()} == {dtype}
    with torch.device("meta"):
        loaded = network()
    load_weights(loaded, read, name)
    for key, value in loaded.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[key].to(dtype).float())


def test_safetensors_are_known_by_their_content(tmp_path: Path, state: dict[str, Any]) -> None:
    path = saved(state, tmp_path / "weights.safetensors").rename(tmp_path / "weights.pt")
    assert set(read_state_dict(path)) == set(state)


def test_the_old_format_of_torch(tmp_path: Path, state: dict[str, Any]) -> None:
    path = saved(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_state_dict(path)["0.weight"], state["0.weight"])


def test_a_training_checkpoint_gives_its_averaged_weights(tmp_path: Path, state: dict[str, Any]) -> None:
    averaged = {key: value + 1 for key, value in state.items()}
    content = {"model": state, "ema": averaged, "opt": {"state": {}}, "args": argparse.Namespace(model="DiT-S/8")}
    path = saved(content, tmp_path / "0050000.pt")
    assert torch.equal(read_state_dict(path)["0.weight"], averaged["0.weight"])
    del content["ema"]
    assert torch.equal(read_state_dict(saved(content, path))["0.weight"], state["0.weight"])


def one_more(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value + 1 for key, value in state.items()}


def without_dots(state: dict[str, Any]) -> dict[str, Any]:
    return {key.replace(".", ""): value for key, value in state.items()}


def under(name: str, state: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}.{key}": value for key, value in state.items()}


NUMBERS = {"decay": torch.tensor(0.999), "num_updates": torch.tensor(7)}
WITH_AVERAGES: dict[str, Callable[[Any, Any], Any]] = {
    "ema": lambda raw, mean: {"model": raw, "ema": mean},
    "the other order": lambda raw, mean: {"model_ema": mean, "model": raw},
    "timm": lambda raw, mean: {"state_dict": raw, "state_dict_ema": mean},
    "model_ema": lambda raw, mean: {"model": raw, "model_ema": mean},
    "ema_state_dict": lambda raw, mean: {"model_state_dict": raw, "ema_state_dict": mean},
    "ema_model": lambda raw, mean: {"model": raw, "ema_model": under("module", mean)},
    "model_averaged": lambda raw, mean: {"model": raw, "model_averaged": mean},
    "EMAModel": lambda raw, mean: {"net": raw, "EMAModel": mean},
    "netEMA": lambda raw, mean: {"net": raw, "netEMA": mean},
    "ema_0.9999": lambda raw, mean: {"model": raw, "ema_0.9999": mean},
    "swa_utils": lambda raw, mean: {
        "model": raw,
        "swa_model": {"n_averaged": torch.tensor(3), **under("module", mean)},
    },
    "alone": lambda raw, mean: {"ema": mean},
    "alone, with numbers": lambda raw, mean: {"ema": {"decay": 0.999, "shadow": mean}},
    "deeper": lambda raw, mean: {"checkpoint": {"network": raw, "ema": {"decay": 0.9, "state": mean}}, "epoch": 3},
    "without names": lambda raw, mean: {"model": raw, "ema": {**NUMBERS, "shadow_params": list(mean.values())}},
    "beside numbers": lambda raw, mean: {"model": raw, "ema": {"decay": 0.999, **mean}},
    "in one network": lambda raw, mean: {
        **under("online_model", raw),
        **under("ema_model", mean),
        "step": NUMBERS["decay"],
    },
    "of a trainer": lambda raw, mean: {"model": raw, "ema": {**under("online_model", raw), **under("ema_model", mean)}},
    "beside its own": lambda raw, mean: {**raw, **under("ema", mean)},
    "names without dots": lambda raw, mean: {
        **under("model", raw),
        **under("model_ema", {**without_dots(mean), **NUMBERS}),
    },
    "in an optimizer": lambda raw, mean: {"state_dict": raw, "optimizer_states": [{"ema": tuple(mean.values())}]},
    "in a list, after a number": lambda raw, mean: [torch.tensor(3), {"model": raw, "ema": mean}],
    "compiled": lambda raw, mean: {"model": under("_orig_mod", raw), "ema": under("module", mean)},
    "a step's average": lambda raw, mean: {"model": raw, "ema": mean, "avg_loss": {"train": torch.tensor(0.1)}},
}


@pytest.mark.parametrize("layout", WITH_AVERAGES)
def test_averaged_weights_are_found_under_any_usual_name(tmp_path: Path, state: dict[str, Any], layout: str) -> None:
    averaged = one_more(state)
    read = read_state_dict(saved(WITH_AVERAGES[layout](state, averaged), tmp_path / "weights.pt"))
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], averaged[key]) for key in state)


def test_what_was_not_averaged_comes_from_the_others(tmp_path: Path, state: dict[str, Any]) -> None:
    averaged = {key: value for key, value in one_more(state).items() if "bias" not in key}
    read = read_state_dict(saved({"model": state, "ema": averaged}, tmp_path / "weights.pt"))
    assert all(torch.equal(read[key], averaged.get(key, state[key])) for key in state)


def moments(state: dict[str, Any]) -> dict[str, Any]:
    network_ = network()
    optimizer = torch.optim.Adam(network_.parameters())
    network_(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    by_name = {"exp_avg": one_more(state)}
    return {
        "optimizer": optimizer.state_dict(),
        "adam": optimizer.state_dict(),
        "opt": {"avg": by_name},
        "mine": by_name,
    }


WITHOUT_AVERAGES: dict[str, Callable[[Any], Any]] = {
    "an optimizer": lambda raw: {"model": raw, **moments(raw)},
    "another network": lambda raw: {"discriminator": {"0.weight": torch.zeros(9)}, "model": raw},
    "any name": lambda raw: {"generator": raw, "epoch": 3},
    "two names for one": lambda raw: {"model": raw, "best": dict(raw)},
    "no average yet": lambda raw: {
        "model": raw,
        "ema": None,
        "ema_decay": 0.999,
        "ema_statistics": {"loss": torch.zeros(2)},
    },
    "a layer of that name": lambda raw: {**raw, "ema.weight": torch.zeros(3)},
}


@pytest.mark.parametrize("layout", WITHOUT_AVERAGES)
def test_what_only_looks_like_averaged_weights(tmp_path: Path, state: dict[str, Any], layout: str) -> None:
    read = read_state_dict(saved(WITHOUT_AVERAGES[layout](state), tmp_path / "weights.pt"))
    assert all(torch.equal(read[key], state[key]) for key in state)


UNKNOWN: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "two rates": (
        lambda raw, mean: {"model": raw, "ema_0.99": mean, "ema_0.9999": one_more(mean)},
        r"several sets of weights, under ema_0\.99, ema_0\.9999, .* in a file of its own",
    ),
    "a name that says nothing": (
        lambda raw, mean: {"model": raw, "target_model": mean},
        "several sets of weights, under model, target_model",
    ),
    "a list of both": (lambda raw, mean: [raw, 3, mean], "several sets of weights, under 0, 2"),
    "other names": (
        lambda raw, mean: {"model": raw, "ema": under("inner", mean)},
        "averaged weights under ema, which cannot be matched with those under model; save those",
    ),
    "a list that does not fit": (
        lambda raw, mean: {"model": raw, "ema": list(mean.values())[1:]},
        "averaged weights under ema, which cannot be matched with those under model",
    ),
    "a list alone": (
        lambda raw, mean: {"ema": list(mean.values())},
        "averaged weights under ema, which cannot be matched with others that have names",
    ),
}


@pytest.mark.parametrize("layout", UNKNOWN)
def test_weights_of_which_it_is_not_known_which_are_wanted(tmp_path: Path, state: dict[str, Any], layout: str) -> None:
    content, said = UNKNOWN[layout]
    with pytest.raises(CheckpointError, match=r"weights\.pt: holds .*" + said):
        read_state_dict(saved(content(state, one_more(state)), tmp_path / "weights.pt"))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_dropped(tmp_path: Path, state: dict[str, Any], prefix: str) -> None:
    path = saved({prefix + key: value for key, value in state.items()}, tmp_path / "weights.pt")
    assert list(read_state_dict(path)) == list(state)


def test_the_loaded_weights_do_not_depend_on_the_file(tmp_path: Path, state: dict[str, Any]) -> None:
    path = saved(state, tmp_path / "weights.pt")
    loaded = network()
    load_weights(loaded, read_state_dict(path), "weights")
    path.write_bytes(b"")  # a mapped file would now end the process
    assert torch.equal(loaded.state_dict()["0.weight"], state["0.weight"])


class Payload:
    """Makes a file when it is unpickled by an ordinary reader."""

    def __init__(self, path: Path) -> None:
        self.command = f"touch {path}"

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("form", ["zip", "old", "pickle", "hidden"])
def test_a_pickle_with_code_is_refused_and_nothing_is_run(tmp_path: Path, state: dict[str, Any], form: str) -> None:
    trace, path = tmp_path / "trace", tmp_path / "evil.pt"
    content = {"ema": state, "args": Payload(trace)} if form == "hidden" else Payload(trace)
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "old")
    with pytest.raises(CheckpointError, match=r"evil\.pt: refused, as it asks for (posix|nt)\.system.*nothing was run"):
        read_state_dict(path)
    assert not trace.exists()
    if form == "pickle":  # the payload is a real one
        pickle.loads(path.read_bytes())
        assert trace.exists()


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_torchscript_is_refused_and_not_recommended_to_be_run(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    with pytest.raises(
        CheckpointError, match=r"script\.pt: refused, as it is a TorchScript archive.*nothing was run"
    ) as told:
        read_state_dict(tmp_path / "script.pt")
    assert "weights_only" not in str(told.value)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "old.pt"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.6, 0.95, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str, share: float) -> None:
    options = {"_use_new_zipfile_serialization": False} if name == "old.pt" else {}
    path = saved({"weight": torch.randn(64, 64), "bias": torch.randn(64)}, tmp_path / name, **options)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read"):
        read_state_dict(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"GIF89a" * 20, b"<html>not found</html>", b"\x80\x05K\x01."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"file{suffix}"):
        read_state_dict(path)


@pytest.mark.parametrize("content", [[1, 2], {}, {"step": 3}, {"model": {"lr": 0.1}}, torch.zeros(3)])
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(CheckpointError, match="expected a dictionary of tensors"):
        read_state_dict(saved(content, tmp_path / "weights.pt"))


def test_a_dictionary_that_holds_itself_is_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    with pytest.raises(CheckpointError, match="expected a dictionary of tensors"):
        read_state_dict(saved(content, tmp_path / "weights.pt"))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_state_dict(tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("2.bias"), r"1 missing \(2\.bias\)"),
        (lambda s: s.clear(), r"4 missing \(0\.weight, 0\.bias, 2\.weight, \.\.\.\)"),
        (lambda s: s.update(extra=torch.zeros(1)), r"1 unexpected \(extra\)"),
        (
            lambda s: s.update({"0.weight": torch.zeros(4, 5)}),
            r"1 of another shape \(0\.weight is \(4, 5\) for \(4, 3\)\)",
        ),
        (
            lambda s: s.update({"0.bias": torch.zeros(4, dtype=torch.int8)}),
            r"floating-point numbers \(0\.bias is torch.int8\)",
        ),
        (lambda s: s.update({"0.bias": torch.zeros(4).to_sparse()}), r"floating-point numbers \(0\.bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(state: dict[str, Any], change: Any, said: str) -> None:
    change(state)
    target = network()
    before = target.state_dict()["0.weight"].clone()
    with pytest.raises(CheckpointError, match=r"my\.pt: does not fit Sequential, which has 4 tensors: .*" + said):
        load_weights(target, state, "my.pt")
    assert torch.equal(target.state_dict()["0.weight"], before)


def test_a_small_file_that_claims_a_huge_shape_takes_no_memory(tmp_path: Path, state: dict[str, Any]) -> None:
    state["0.weight"] = torch.zeros(1).expand(2**20, 2**20)  # 4 TiB
    path = saved(state, tmp_path / "bomb.pt")
    assert path.stat().st_size < 10_000
    with pytest.raises(CheckpointError, match="1048576"):
        load_weights(network(), read_state_dict(path), "bomb.pt")


def test_numpy_objects_are_refused(tmp_path: Path, state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="refused, as it asks for numpy"):
        read_state_dict(saved({"ema": state, "step": np.array([3])}, tmp_path / "weights.pt"))


def test_checking_needs_no_memory() -> None:
    with torch.device("meta"):
        large = torch.nn.Linear(2**20, 2**20)
    check_weights(large, {k: torch.zeros(1).expand(v.shape) for k, v in large.state_dict().items()}, "huge.pt")
