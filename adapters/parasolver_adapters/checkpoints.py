"""Reading other people's checkpoints without running their code, and refusing those that do not fit.

A ``.pt`` file is a pickle, which can run any code when it is read. Here it is read by PyTorch's restricted reader,
which knows tensors and plain containers only. A ``.safetensors`` file cannot hold code at all: prefer it if you can
choose.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

StateDict = Mapping[str, Tensor]

_SHOWN = 3  # offending keys that an error names
_WRAPPERS = ("module.", "_orig_mod.")  # put before each key by data-parallel training and by torch.compile
_DEEPEST = 4  # nested so often at most: a dictionary may hold itself
_USUAL = ("state_dict", "model")  # where training scripts keep the weights, if there are several
# words in names: of averaged weights, of others beside them, and of what holds tensors named like weights
_AVERAGED = {"ema", "averaged", "average", "avg", "swa", "shadow", "polyak", "smoothed"}
_RAW = {"online", "raw", "current"}
_OPTIMIZER = {"opt", "optim", "optimizer", "optimizers", "exp", "sq", "grad"}
_A_FEW = 0.1  # of the weights' numbers: less are no weights


class CheckpointError(ValueError):
    """A checkpoint that is damaged, not safe to read, or not of the network it was to be loaded into."""


def read_state_dict(path: str | Path) -> StateDict:
    """The weights in a checkpoint file, on the CPU, as they were saved.

    Args:
        path: a ``.safetensors`` file, or a file of ``torch.save`` that holds tensors in plain containers: a state dict,
            or dictionaries with one inside. Averaged weights are preferred, under any usual name ("ema", "model_ema",
            "ema_state_dict", "swa_model", "shadow_params" and so on); what was not averaged is taken from the others.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, holds code (none of which has been run), no state dict, or several of which it
            cannot be known which is wanted.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}")
    content = _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path)
    return _find_state_dict(content, path)


def check_weights(network: nn.Module, state: StateDict, source: str) -> None:
    """Refuse weights that do not fit the network exactly.

    Args:
        network: may be on the "meta" device.
        state: its weights.
        source: what the error calls them.

    Raises:
        CheckpointError: naming the first keys that are missing, unexpected, or of another shape or kind.
    """
    expected = network.state_dict()
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    shapes = [
        f"{key} is {tuple(state[key].shape)} for {tuple(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    kinds = [f"{key} is {state[key].dtype}" for key in expected if key in state and not _is_real(state[key])]
    faults = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": shapes,
        "not plain floating-point numbers": kinds,
    }
    if any(faults.values()):
        found = "; ".join(f"{len(keys)} {name} ({_first(keys)})" for name, keys in faults.items() if keys)
        raise CheckpointError(
            f"{source}: does not fit {type(network).__name__}, which has {len(expected)} tensors: {found}. Choose the "
            "preset or the configuration that the checkpoint was trained with"
        )


def load_weights(network: nn.Module, state: StateDict, source: str, dtype: torch.dtype = torch.float32) -> None:
    """Give a network its weights; every key must match.

    The network may have been made on the "meta" device, so that it takes no memory twice.

    Args:
        network: the network.
        state: its weights, in any floating-point type.
        source: what an error calls them.
        dtype: what they are converted to.
    """
    check_weights(network, state, source)  # before the copy: a few bytes can claim any shape
    copies = {
        key: value.to(dtype=dtype, memory_format=torch.contiguous_format, copy=True) for key, value in state.items()
    }
    network.load_state_dict(copies, strict=True, assign=True)


def _is_safetensors(path: Path) -> bool:
    """By content: the length of a header, in eight bytes, and the brace that it begins with."""
    with path.open("rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or (len(start) == 9 and start[8:] == b"{" and start[6:8] == b"\0\0")


def _read_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error}); it may be truncated") from error


def _read_pickle(path: Path) -> Any:
    try:
        # DiT's training script saves its command line along; a Namespace holds values and has no code to run
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a foreign pickle is refused below if it cannot be read
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise CheckpointError(f"{path}: cannot be read; it is damaged or no checkpoint of torch.save") from error
        raise CheckpointError(
            f"{path}: refused, as it asks for {named[1]}, which is not a tensor; nothing was run. If you trust where "
            "it comes from, load it there with torch.load and save its state dict as safetensors"
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "weights_only" in reason:  # PyTorch advises to read such a file without it, which would run its code
            raise CheckpointError(
                f"{path}: refused, as it is a TorchScript archive or of PyTorch's oldest format, which hold code; "
                "nothing was run. If you trust where it comes from, load it there and save its weights as safetensors"
            ) from None
        raise CheckpointError(f"{path}: cannot be read ({reason}); it may be truncated") from error


def _find_state_dict(content: Any, path: Path) -> StateDict:
    found = list(_weights(content, ()))
    raw = {_name(place): state for place, state in found if not _is_averaged(place) and isinstance(state, dict)}
    averaged = {_name(place): state for place, state in found if _is_averaged(place)}
    most = max((_numbers(state) for state in raw.values()), default=0)
    averaged = {name: state for name, state in averaged.items() if _numbers(state) > _A_FEW * most}
    if averaged:
        return _only(path, {name: _completed(path, name, state, raw) for name, state in averaged.items()})
    if not raw:
        got = f"keys {_first(list(content))}" if isinstance(content, Mapping) and content else type(content).__name__
        raise CheckpointError(f"{path}: expected a dictionary of tensors, or one inside of dictionaries; got {got}")
    usual = [state for name in _USUAL for place, state in raw.items() if place.split("/")[-1] == name]
    return _only(path, {name: state for name, state in raw.items() if not usual or state.keys() == usual[0].keys()})


def _weights(content: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Where in a file there are tensors by name, or averaged ones in a list, as ``(place, them)``."""
    if isinstance(content, (list, tuple)) and content and all(isinstance(value, Tensor) for value in content):
        if _is_averaged(place):
            yield place, list(content)
        return
    if isinstance(content, (list, tuple)):
        content = {str(number): value for number, value in enumerate(content)}
    if not isinstance(content, Mapping) or "param_groups" in content:  # of an optimizer
        return
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors and (_is_averaged(place) or (len(tensors) == len(content) and not _is_optimizer(place))):
        yield from ((place + part, state) for part, state in _parts(_unwrapped(tensors)))
    for key, value in content.items():
        if len(place) < _DEEPEST and not isinstance(value, Tensor):
            yield from _weights(value, (*place, str(key)))


def _parts(state: StateDict) -> Iterator[tuple[tuple[str, ...], StateDict]]:
    """A state dict; or the two of a network that was saved together with its average, which has the same names."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        first, _, rest = key.partition(".")
        groups.setdefault(first, {})[rest] = value
    for name in groups:
        if _words(name) & _AVERAGED:
            others = {key: value for key, value in state.items() if key.partition(".")[0] != name}
            pairs = {"the others": others, **groups}
            beside = [other for other in pairs if other != name and _fitted(groups[name], pairs[other]) is not None]
            if beside:
                yield (name,), groups[name]
                yield (beside[0],), pairs[beside[0]]
                return
    yield (), state


def _completed(path: Path, name: str, averaged: Any, raw: Mapping[str, StateDict]) -> StateDict:
    """Averaged weights, with what was not averaged (buffers, for example)."""
    fitted = [found for state in raw.values() if (found := _fitted(averaged, state)) is not None]
    if fitted:
        return max(fitted, key=len)
    if raw or not isinstance(averaged, dict):
        others = f"those under {_first(list(raw))}" if raw else "others that have names"
        raise CheckpointError(
            f"{path}: holds averaged weights under {name}, which cannot be matched with {others}; save those that you "
            "want, by name, in a file of their own"
        )
    return averaged


def _fitted(averaged: Any, raw: StateDict) -> StateDict | None:
    """``raw`` with averaged weights in place of those that were averaged; None if they are not of the same network."""
    if isinstance(averaged, list):
        averaged = dict(zip(raw, averaged, strict=True)) if len(averaged) == len(raw) else {"": averaged[0]}
    without_dots = {key.replace(".", ""): key for key in raw}  # some libraries cannot have dots in names
    names = {key: without_dots[key] if key in without_dots and key not in raw else key for key in averaged}
    counted = {names[key]: value for key, value in averaged.items() if names[key] in raw or value.numel() > 1}
    if not counted or any(key not in raw or raw[key].shape != value.shape for key, value in counted.items()):
        return None
    return {**raw, **counted}


def _only(path: Path, states: Mapping[str, StateDict]) -> StateDict:
    """The one that there is, perhaps under several names."""
    first, *others = states.values()
    if any(other.keys() != first.keys() or not all(_same(first[key], other[key]) for key in first) for other in others):
        raise CheckpointError(
            f"{path}: holds several sets of weights, under {_first(list(states))}, and which of them is wanted cannot "
            "be known; save that one in a file of its own"
        )
    return first


def _same(tensor: Tensor, other: Tensor) -> bool:
    """Whether they are one tensor in the file; a small file may hold a huge one, so nothing is compared."""
    return tensor.data_ptr() == other.data_ptr() and tensor.shape == other.shape and tensor.stride() == other.stride()


def _unwrapped(state: StateDict) -> StateDict:
    """Without what data-parallel training, torch.compile and averaging put before each key."""
    state = {key: value for key, value in state.items() if key != "n_averaged"}
    for prefix in _WRAPPERS * 2:  # in either order
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _words(name: str) -> set[str]:
    """In lower case: of "model_ema", "modelEMA", "EMAModel"."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def _is_averaged(place: tuple[str, ...]) -> bool:
    """What the innermost name that says anything says."""
    known = {"ema"} if _is_optimizer(place) else _AVERAGED  # optimizers average gradients, too
    for name in reversed(place):
        if _words(name) & (known | _RAW):
            return not _words(name) & _RAW
    return False


def _is_optimizer(place: tuple[str, ...]) -> bool:
    return any(_words(name) & _OPTIMIZER for name in place)


def _numbers(state: Any) -> int:
    return sum(tensor.numel() for tensor in (state if isinstance(state, list) else state.values()))


def _name(place: tuple[str, ...]) -> str:
    return "/".join(place) or "the top"


def _is_real(value: Tensor) -> bool:
    return value.is_floating_point() and value.layout is torch.strided and not value.is_quantized


def _first(keys: list[Any]) -> str:
    return ", ".join(map(str, keys[:_SHOWN])) + (", ..." if len(keys) > _SHOWN else "")
