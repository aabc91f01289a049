"""Several processes share the rows of a round: the same sample in all, and the same error when one of them fails."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from parasolver_adapters.distributed import (
    DistributedDenoiser,
    WorkerLostError,
    WorkersDisagreeError,
    fingerprint,
    process_group,
    sampled_bytes,
    shares,
)
from parasolver_adapters.exchange import Exchange, Header, Kind
from tests.adapters import workers
from tests.adapters.workers import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(90)]
both = pytest.mark.parametrize("ranks", [2, 4])


@both
@pytest.mark.parametrize(
    "options",
    [
        {"batch": 3, "dtype": "float64"},
        {"dtype": "bfloat16", "window": 5},
        {"batch": 2, "dtype": "float16", "noisy": True, "seed": 3, "max_rows": 5},
        {"window": 1},  # fewer rows than processes
        {"method": "sequential", "batch": 3},
        {"buckets": [2, 8], "window": 8},
        {"batch": 3, "labelled": True, "buckets": [4, 16]},
        {"batch": 80, "dtype": "float64", "steps": 5},  # more than the first part of a packet holds
    ],
    ids=str,
)
def test_same_bits_as_one_process(ranks: int, options: dict[str, Any], tmp_path: Path) -> None:
    seen = launch(workers.same_sample, ranks, tmp_path, options)
    assert all(one["bits"] == one["expected"] == seen[0]["bits"] for one in seen)
    assert all(one["rounds"][0] == one["rounds"][1] for one in seen)


@both
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("raise", "ValueError: boom (raised"),
        ("shape", "ValueError: denoiser: expected"),
        ("dtype", "ValueError: denoiser: expected"),
        ("memory", "OutOfMemoryError: no room for a single row (memory ran out"),
    ],
)
def test_an_exception_in_one_process_ends_all(fault: str, told: str, ranks: int, tmp_path: Path) -> None:
    seen = launch(workers.fails, ranks, tmp_path, fault, str(tmp_path))
    assert {one["type"] for one in seen} == {"WorkerError"}
    assert len({one["text"] for one in seen}) == 1
    assert seen[0]["text"].startswith(f"rank 1 of {ranks} failed in network call")
    assert told.split(" (")[0] in seen[0]["text"]
    assert {one["rank"] for one in seen} == {1}
    assert len({one["rounds"] for one in seen}) == 1
    assert all(one["status"] == "FAILED" and one["finite"] and one["after"] for one in seen)


@both
def test_a_process_that_dies_is_noticed_at_once(ranks: int, tmp_path: Path) -> None:
    """Neither the denoiser's timeout nor the group's is waited for; both are beyond the guard of `launch`."""
    seen = launch(workers.fails, ranks, tmp_path, "die", str(tmp_path))
    assert seen.pop(1) == {}
    assert {one["type"] for one in seen} == {"WorkerLostError"}
    assert all("died" in one["text"] and one["rounds"] >= 1 and one["finite"] for one in seen)
    assert {one["after"]["type"] for one in seen} == {"WorkerLostError"}
    assert all("start all processes again" in one["after"]["text"] for one in seen)


@both
def test_a_process_that_hangs_holds_nobody_in_the_group(ranks: int, tmp_path: Path) -> None:
    """It hangs until another has left the group, which therefore must not wait for it."""
    seen = launch(workers.fails, ranks, tmp_path, "hang", str(tmp_path))
    assert {one["type"] for one in seen} == {"WorkerLostError"}  # the one that slept finds the others gone
    assert all(one["rounds"] >= 1 and one["finite"] for one in seen)
    assert f"did not answer within {workers.TIMEOUT:g} s" in seen[0]["text"]


@pytest.mark.parametrize(
    ("how", "own", "other", "told"),
    [
        ("callback", "KeyError", "WorkerError", "rank 1 of 2 left run 2 after network call 3: KeyError: 'mine'"),
        ("last round", "KeyError", "WorkerError", "rank 1 of 2 left run 2 after network call"),
        ("interrupt", "KeyboardInterrupt", "WorkerError", "rank 1 of 2 left run 2 after network call 3: Keyboard"),
        ("argument", "TypeError", "WorkerError", "rank 1 of 2 left run 2 after network call 0: TypeError: seed: "),
        ("stop", "WorkersDisagreeError", "WorkersDisagreeError", "rank 1 has ended run 2 after network call 3"),
        ("states", "WorkersDisagreeError", "WorkersDisagreeError", "rank 1 has other states than rank 0"),
    ],
)
def test_a_run_left_by_one_process_ends_the_others(how: str, own: str, other: str, told: str, tmp_path: Path) -> None:
    """With the reason; after it the group is as good as new."""
    seen = launch(workers.leaves, 2, tmp_path, how)
    assert [one["type"] for one in seen] == [other, own]
    assert told in seen[0]["text"]
    if other == "WorkerError":
        assert seen[0]["rank"] == 1
    if how != "argument":
        assert seen[0]["status"] == "FAILED"
        assert seen[0]["rounds"] == seen[1]["rounds"] >= 1
    assert seen[0]["before"] == seen[0]["after"] == seen[1]["after"]


def test_a_process_interrupted_while_it_talks_to_the_others_cannot_use_the_group(tmp_path: Path) -> None:
    other, own = launch(workers.torn, 2, tmp_path)
    assert (other["type"], own["type"]) == ("WorkerLostError", "KeyboardInterrupt")
    assert own["after"]["type"] == other["after"]["type"] == "WorkerLostError"
    assert "rank 1 was interrupted while it talked to the others" in own["after"]["text"]


@pytest.mark.parametrize("kind", ["array", "function"])
def test_noise_that_differs_by_rank_is_noticed_before_the_first_round(kind: str, tmp_path: Path) -> None:
    for one in launch(workers.other_noise, 2, tmp_path, kind):
        assert one["type"] == "WorkersDisagreeError"
        assert "differ in seed or noise: " in one["text"]
        assert one["calls"] == 0


def test_a_noise_function_that_is_the_same_everywhere(tmp_path: Path) -> None:
    assert [one["type"] for one in launch(workers.other_noise, 2, tmp_path, "same")] == [None, None]


@both
@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("window", {"window": 9}),
        ("seed or noise", {"seed": 4}),
        ("timesteps and step rule", {"steps": 21}),
        ("timesteps and step rule", {"noisy": True}),
        ("shape and dtype of x_T", {"batch": 2}),
        ("x_T", {"start_seed": 1}),
        ("tolerance", {"tolerance": 1e-2}),
        ("solver", {"method": "sequential"}),
        ("network", None),
        ("window", {"window": "auto"}),
    ],
    ids=str,
)
def test_other_arguments_in_one_process(name: str, other: dict[str, Any] | None, ranks: int, tmp_path: Path) -> None:
    options, gain = [{} for _ in range(ranks)], [1.0] * ranks
    if other is None:
        gain[-1] = 1.001
    else:
        options[-1] = other
    seen = launch(workers.disagree, ranks, tmp_path, options, gain)
    assert {one["type"] for one in seen} == {"WorkersDisagreeError"}
    assert len({one["text"] for one in seen}) == 1
    assert f"{name}: " in seen[0]["text"]
    assert f"on rank {ranks - 1}" in seen[0]["text"]
    assert all(one["rounds"] == 0 for one in seen)


@both
def test_memory_that_runs_out_in_one_process_halves_its_calls(ranks: int, tmp_path: Path) -> None:
    seen = launch(workers.small_memory, ranks, tmp_path)
    assert all(one["bits"] == one["expected"] for one in seen)
    limits = [one["max_rows"] for one in seen]
    assert limits == ([None, 2] if ranks == 2 else [None] * 4)  # with four, each gets two rows at most


def test_beside_a_network_that_is_split_itself(tmp_path: Path) -> None:
    seen = launch(workers.beside_tensor_parallel, 4, tmp_path)
    assert all(one["difference"] < 1e-5 and one["rows"] == 4 for one in seen)
    assert all("mesh['solver']" in one["whole"] for one in seen)


def test_a_group_of_some_processes(tmp_path: Path) -> None:
    first, other, last = launch(workers.subgroup, 3, tmp_path)
    assert first["bits"] == first["expected"] == last["bits"]
    assert (first["rank"], last["rank"]) == (0, 1)
    assert "only its members" in other["refused"]


def test_the_embedded_model(tmp_path: Path) -> None:
    seen = launch(workers.embedded, 2, tmp_path)
    assert seen[0]["bits"] == seen[1]["bits"]
    assert all(one["difference"] < 1e-5 and one["rounds"][0] == one["rounds"][1] for one in seen)


@both
def test_automatic_windows_agree(ranks: int, tmp_path: Path) -> None:
    seen = launch(workers.automatic, ranks, tmp_path, str(tmp_path))
    assert len({str(one) for one in seen}) == 1
    assert "chose a window of" in seen[0]["message"]
    again = launch(workers.automatic, ranks, tmp_path, str(tmp_path))
    assert again == seen  # from what was kept


SCRIPT = """
import torch
from parasolver_adapters.distributed import DistributedDenoiser, process_group
from parasolver_core import DDIM, NoiseSchedule, solve

schedule = NoiseSchedule.linear()
network = lambda x, t: x / (1 + x * x)
x_T = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
arguments = (x_T, schedule.timesteps(30), DDIM(schedule), 8)
with process_group() as device:
    denoiser = DistributedDenoiser(network)
    shared = solve(denoiser, *arguments)
    assert torch.equal(shared.sample, solve(network, *arguments).sample)
    open(f"rank{denoiser.rank}", "w").close()
"""


def test_a_script_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60, env=os.environ | {"PYTHONPATH": workers.PATH})
    assert (tmp_path / "rank0").exists()
    assert (tmp_path / "rank1").exists()


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_processes_are_apart_where_their_inputs_differ_by_more_than_rounding(size: float) -> None:
    """By more than a thousandth of the largest number, whatever its size."""

    def told(*differences: float) -> Any:
        numbers = size * torch.linspace(-1, 0.5, 16)
        sketches = [numbers + size * difference for difference in differences]
        headers = [Header(Kind.CALL, run=2, call=7, rows=8, sketch=sketch) for sketch in sketches]
        packets = torch.zeros(len(headers), 0, dtype=torch.uint8)
        return Exchange._wrong(SimpleNamespace(size=len(headers)), headers, packets)  # type: ignore[arg-type]

    assert told(0, 9e-4, -9e-4) is None
    wrong = told(0, 9e-4, -1.1e-3)
    assert isinstance(wrong, WorkersDisagreeError)
    assert wrong.rank == 2
    assert "in network call 7 of run 2 rank 2 has other states than rank 0" in str(wrong)


@pytest.mark.parametrize("rows", range(10))
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_are_even_and_complete(rows: int, size: int) -> None:
    parts = shares(rows, size)
    counts = [part.stop - part.start for part in parts]
    assert sum(counts) == rows
    assert len(counts) == size
    assert max(counts) - min(counts) <= 1
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(rows))


def test_fingerprint_sees_the_network_inside() -> None:
    torch.manual_seed(0)
    one, same, other = (torch.nn.Linear(3, 3).requires_grad_(False) for _ in range(3))
    same.load_state_dict(one.state_dict())
    other.load_state_dict(one.state_dict())
    other.bias[1] += 1e-6

    class Holder:
        def __init__(self, network: torch.nn.Module) -> None:
            self.network = network

        def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.network(x)

    assert fingerprint(one) == fingerprint(same) == fingerprint(lambda x, t: one(x)) == fingerprint(Holder(same))
    assert fingerprint(Holder(other)) != fingerprint(one)
    assert fingerprint(one) != fingerprint(one.bfloat16())
    assert "no torch module" in fingerprint(lambda x, t: x)


def test_what_is_read_of_a_parameter() -> None:
    """At most 64 elements, spread over all of it; nothing of what has no values."""
    read = lambda value: torch.frombuffer(bytearray(sampled_bytes(value)), dtype=value.dtype).tolist()  # noqa: E731
    for count, at in (
        (1, range(1)),
        (64, range(64)),
        (127, range(64)),
        (128, range(0, 128, 2)),
        (1000, range(0, 960, 15)),
    ):
        assert read(torch.arange(count, dtype=torch.int16)) == [*at]
    assert read(torch.arange(6.0).reshape(2, 3).T) == [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]
    assert sampled_bytes(torch.zeros(0, 3)) == b""
    assert sampled_bytes(torch.zeros(3, device="meta")) == b""


def test_without_processes() -> None:
    with pytest.raises(RuntimeError, match="torchrun"):
        DistributedDenoiser(lambda x, t: x)
    with pytest.raises(RuntimeError, match="torchrun"), process_group():
        pass


def test_a_lost_group_is_a_solver_error() -> None:
    from parasolver_core import SolverError

    assert issubclass(WorkerLostError, SolverError)
