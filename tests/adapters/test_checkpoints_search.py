"""Where in a checkpoint the weights are looked for, which names say that they were averaged, and how they are given."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
import torch

from parasolver_adapters.checkpoints import (
    CheckpointError,
    _is_averaged,
    _words,
    check_weights,
    load_weights,
    read_state_dict,
)
from tests.adapters.test_checkpoints import network, saved


@pytest.fixture
def state() -> dict[str, Any]:
    torch.manual_seed(0)
    return network().state_dict()


@pytest.mark.parametrize(("deep", "found"), [(3, True), (4, True), (5, False)])
def test_weights_are_looked_for_so_deep(tmp_path: Path, state: dict[str, Any], deep: int, found: bool) -> None:
    content: Any = state
    for _ in range(deep):
        content = {"inside": content}
    path = saved(content, tmp_path / "deep.pt")
    if found:
        assert read_state_dict(path).keys() == state.keys()
        return
    with pytest.raises(CheckpointError, match="expected a dictionary of tensors, or one inside"):
        read_state_dict(path)


@pytest.mark.parametrize(("numbers", "averaged"), [(2, False), (3, True)])
def test_a_tenth_of_the_numbers_are_no_averaged_weights(tmp_path: Path, numbers: int, averaged: bool) -> None:
    raw = {"weight": torch.zeros(17), "bias": torch.zeros(3 if averaged else 2), "scale": torch.zeros(1)}
    ema = {"bias": torch.ones(numbers)}
    got = read_state_dict(saved({"model": raw, "ema": ema}, tmp_path / "some.pt"))
    assert got.keys() == raw.keys()
    assert bool(got["bias"].any()) == averaged


def test_a_tenth_is_of_the_largest(tmp_path: Path) -> None:
    raw = {"weight": torch.zeros(19), "bias": torch.zeros(2)}
    content = {"model": raw, "extra": {"x": torch.zeros(1)}, "ema": {"bias": torch.ones(2)}}
    got = read_state_dict(saved(content, tmp_path / "some.pt"))
    assert got.keys() == raw.keys()
    assert not got["bias"].any()


@pytest.mark.parametrize(
    ("content", "said"), [({"step": 3}, "got keys step$"), ({}, "got dict$"), ([1, 2], "got list$")]
)
def test_what_was_found_instead_of_weights_is_told(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        read_state_dict(saved(content, tmp_path / "none.pt"))


def test_errors_name_three_keys(state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"4 missing \(0\.weight, 0\.bias, 2\.weight, \.\.\.\)"):
        check_weights(network(), {}, "nothing")
    with pytest.raises(CheckpointError, match=r"3 missing \(0\.bias, 2\.weight, 2\.bias\)"):
        check_weights(network(), {"0.weight": state["0.weight"]}, "one")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model_ema", {"model", "ema"}),
        ("modelEMA", {"model", "ema"}),
        ("EMAModel", {"ema", "model"}),
        ("exp_avg_sq", {"exp", "avg", "sq"}),
        ("ema2", {"ema"}),
    ],
)
def test_words_in_a_name(name: str, words: set[str]) -> None:
    assert _words(name) == words


@pytest.mark.parametrize(
    ("place", "averaged"),
    [
        (("ema",), True),
        (("model",), False),
        (("ema", "model"), True),
        (("ema", "online_model"), False),  # the innermost name that says anything
        (("online", "ema_model"), True),
        (("optimizer", "exp_avg"), False),  # of gradients
        (("optimizer", "ema"), True),
        ((), False),
    ],
)
def test_which_names_are_of_averaged_weights(place: tuple[str, ...], averaged: bool) -> None:
    assert _is_averaged(place) == averaged


def test_a_number_that_counts_averages_is_no_weight(tmp_path: Path, state: dict[str, Any]) -> None:
    averaged = {f"module.{key}": value for key, value in state.items()} | {"n_averaged": torch.tensor(7)}
    assert read_state_dict(saved(averaged, tmp_path / "swa.pt")).keys() == state.keys()
    assert read_state_dict(saved({"ema": averaged}, tmp_path / "ema.pt")).keys() == state.keys()


def test_weights_are_converted_and_copied(state: dict[str, Any]) -> None:
    one = network()
    load_weights(one, state, "state")
    with torch.no_grad():
        one[0].weight.zero_()
    assert bool(state["0.weight"].any())
    load_weights(one, state, "state", torch.float64)
    assert one[0].weight.dtype is torch.float64
    turned = state | {"0.weight": state["0.weight"].T.contiguous().T}
    load_weights(one, turned, "state")
    assert one[0].weight.is_contiguous()


def test_two_parts_of_a_network_that_are_alike_are_no_average(tmp_path: Path, state: dict[str, Any]) -> None:
    both = {f"{side}.{key}": value for side in ("left", "right") for key, value in state.items()}
    assert read_state_dict(saved(both, tmp_path / "both.pt")).keys() == both.keys()


@pytest.mark.parametrize("other", [{"0.weight": torch.zeros(9, 9)}, {"5.weight": torch.zeros(2)}])
def test_a_single_tensor_that_does_not_fit_is_enough(tmp_path: Path, state: dict[str, Any], other: Any) -> None:
    path = saved({"model": state, "ema": {**state, **other}}, tmp_path / "one.pt")
    with pytest.raises(CheckpointError, match="averaged weights under ema, which cannot be matched with those under"):
        read_state_dict(path)


def test_a_part_that_is_named_like_a_wrapper_keeps_its_name(tmp_path: Path) -> None:
    state = {"module.weight": torch.zeros(3), "head.weight": torch.ones(2)}
    assert read_state_dict(saved(state, tmp_path / "part.pt")).keys() == state.keys()


def test_a_list_of_a_single_average_is_not_matched(tmp_path: Path, state: dict[str, Any]) -> None:
    path = saved({"model": state, "ema": [state["0.weight"] + 1]}, tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="averaged weights under ema, which cannot be matched with those under"):
        read_state_dict(path)
