"""What a process of a group tells the others, packet by packet: two of them are threads of this one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
import torch.distributed as dist
from torch import Tensor, nn

from parasolver_adapters import distributed
from parasolver_adapters.distributed import (
    DistributedDenoiser,
    WorkerError,
    WorkersDisagreeError,
    check_group,
    fingerprint,
    process_group,
)
from parasolver_adapters.exchange import Header, Kind, sketch
from parasolver_core import Recurrence, __version__
from parasolver_core.denoiser.contract import Rows


class Place:
    """An exchange that keeps what it was asked to tell."""

    def __init__(self, rank: int, others: list[Place]) -> None:
        self.rank, self.run, self.lost = rank, 0, ""
        self.size, self.others, self.told = len(others), others, list[tuple[Header, Tensor, float]]()
        self.barrier: Any = None

    def device(self, device: torch.device) -> torch.device:
        return device

    def meet(self, header: Header, content: Tensor, timeout: float) -> list[Tensor]:
        self.told.append((header, content, timeout))
        self.barrier.wait(20)
        packets = [place.told[-1] for place in self.others]
        self.barrier.wait(20)
        for rank, (other, text, _) in enumerate(packets):
            if other.kind in (Kind.FAILED, Kind.LEFT):
                raise WorkerError(bytes(text.tolist()).decode(), rank)
        return [packet for _, packet, _ in packets]


def places(size: int, monkeypatch: pytest.MonkeyPatch) -> list[Place]:
    made: list[Place] = []
    made += [Place(rank, made) for rank in range(size)]
    barrier, left = threading.Barrier(size), list(made)
    for place in made:
        place.size, place.barrier = size, barrier
    monkeypatch.setattr(distributed, "check_group", lambda group, timeout: group)
    monkeypatch.setattr(distributed, "exchange_of", lambda group: left.pop(0))
    return made


def together(*calls: Callable[[], Any]) -> list[Any]:
    """What each returns or raises, in threads of their own."""
    results: list[Any] = [None] * len(calls)

    def run(at: int) -> None:
        try:
            results[at] = calls[at]()
        except Exception as error:
            results[at] = error

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def numbers(content: Tensor) -> Any:
    return json.loads(bytes(content.tolist()))


@pytest.mark.parametrize(
    ("count", "dtype"), [(5, torch.float64), (40, torch.float64), (4, torch.bfloat16), (1, torch.float32)]
)
def test_every_process_evaluates_its_share_and_has_all_rows(
    count: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, seen = places(2, monkeypatch), list[tuple[int, list[float]]]()

    def network(rank: int) -> Any:
        return lambda x, t: (seen.append((rank, t.tolist())), (2 * x + t[:, None, None].to(x.dtype)))[1]

    denoisers = [DistributedDenoiser(network(rank), timeout=7.5) for rank in range(2)]
    x, t = torch.arange(3.0 * 2 * count).reshape(count, 2, 3).to(dtype), torch.arange(float(count))
    for call in (1, 2):
        seen.clear()
        got = together(*(lambda one=one: one(x, t) for one in denoisers))
        for one in got:
            assert torch.equal(one, 2 * x + t[:, None, None].to(dtype))
            assert (one.dtype, one.shape) == (dtype, x.shape)
        share = count // 2
        assert sorted(seen) == [part for part in ((0, [*map(float, range(share))]),) if share] + [
            (1, [*map(float, range(share, count))])
        ]
        for place in made:
            header, content, timeout = place.told[-1]
            assert (header.kind, header.run, header.call, header.rows) == (Kind.CALL, 1, call, count)
            assert header.sketch is not None
            assert torch.equal(header.sketch, sketch(x))
            most = (count - share) * 6 * x.element_size()
            assert most <= len(content) < most + 16  # whole numbers of any dtype, the same in all
            assert len(content) % 16 == 0
            assert timeout == 7.5
    begun, content, _ = made[0].told[0]
    assert (begun.kind, begun.run, begun.call, begun.rows, begun.sketch) == (Kind.BEGIN, 1, 0, 0, None)
    assert numbers(content)["shape and dtype of x"] == f"({count}, 2, 3), {dtype}"
    assert [len(place.told) for place in made] == [3, 3]


def test_a_share_of_the_rows_is_told_which_rows_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    places(2, monkeypatch)
    told: dict[int, Any] = {}

    class Asking:
        takes_rows = True

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def __call__(self, x: Tensor, t: Tensor, rows: Rows | None = None, /) -> Tensor:
            assert rows is not None
            told[self.rank] = rows.steps.tolist(), rows.samples.tolist()
            return x

    table = Recurrence(np.arange(4), np.ones((4, 1)), np.ones((4, 1)), np.zeros(4))
    rows = Rows(np.array([3, 1, 2]), np.array([0, 0, 1]), table, lambda step, sample: np.zeros(2), 2)
    one, other = (DistributedDenoiser(Asking(rank)) for rank in range(2))
    assert one.takes_rows
    together(lambda: one(torch.ones(3, 2), torch.zeros(3), rows), lambda: other(torch.ones(3, 2), torch.zeros(3), rows))
    assert told == {0: ([3], [0]), 1: ([1, 2], [0, 1])}


def test_a_run_begins_with_what_all_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    made = places(2, monkeypatch)
    network = nn.Linear(2, 2)
    one, other = (DistributedDenoiser(lambda x, t: network(x)) for _ in range(2))
    for run in (1, 2):
        got = together(lambda: one.begin({"window": "4"}), lambda: other.begin({"window": "4"}))
        assert got == [None, None]
        assert (one._calls, one._running, made[0].run) == (0, True, run)
        one._calls = 5
    plan = {"window": "4", "network": fingerprint(network), "version of parasolver": __version__}
    assert [numbers(place.told[-1][1]) for place in made] == [plan, plan]
    for error in together(lambda: one.begin({"a": "1", "b": "2"}), lambda: other.begin({"a": "1", "c": "3"})):
        assert isinstance(error, WorkersDisagreeError)
        assert str(error) == (
            "the processes must be given the same arguments and network, but differ in b: 2 on rank 0, nothing on "
            "rank 1; c: nothing on rank 0, 3 on rank 1"
        )


def test_of_figures_the_largest_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    places(2, monkeypatch)
    one, other = (DistributedDenoiser(lambda x, t: x) for _ in range(2))
    got = together(lambda: one.agree([1.0, -3.0]), lambda: other.agree([0.5, -2.0]))
    assert got == [[1.0, -2.0]] * 2
    for error in together(lambda: one.agree([1.0]), lambda: other.agree([1.0, 2.0])):
        assert isinstance(error, WorkersDisagreeError)
        assert str(error) == "the processes have come apart: they compare [1, 2] figures"


def test_an_end_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    (place,) = places(1, monkeypatch)
    denoiser = DistributedDenoiser(lambda x, t: x)
    denoiser(torch.ones(1, 2), torch.zeros(1))
    denoiser.end()
    header = place.told[-1][0]
    assert (header.kind, header.run, header.call, len(place.told[-1][1])) == (Kind.END, 1, 1, 0)
    denoiser.end()  # of a run that no round of was made
    header = place.told[-1][0]
    assert (header.kind, header.run, header.call) == (Kind.END, 2, 0)
    error = KeyError("mine")
    error.add_note("seen")
    denoiser.end(error)
    header, content, _ = place.told[-1]
    assert (header.kind, header.run, header.call) == (Kind.LEFT, 3, 0)
    assert bytes(content.tolist()) == b"KeyError: 'mine' (seen)"
    assert error.__notes__ == ["seen", "the other processes could not be told: KeyError: 'mine' (seen)"]
    told = len(place.told)
    denoiser.end(WorkerError("known"))
    place.lost = "died"
    denoiser.end()
    assert (len(place.told), place.run) == (told, 3)


def test_an_exception_of_a_share_is_told_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    made = places(2, monkeypatch)

    def fails(x: Tensor, t: Tensor) -> Tensor:
        raise ValueError("boom")

    one, other = DistributedDenoiser(lambda x, t: x), DistributedDenoiser(fails)
    fails.prediction_type = "velocity"  # type: ignore[attr-defined]
    assert other.prediction_type == "velocity"
    x = torch.ones(3, 2)
    for error in together(lambda: one(x, torch.zeros(3)), lambda: other(x, torch.zeros(3))):
        assert isinstance(error, WorkerError)
        assert str(error) == "ValueError: boom"
        assert error.rank == 1
    header = made[1].told[-1][0]
    assert (header.kind, header.run, header.call, header.rows) == (Kind.FAILED, 1, 1, 3)
    assert header.place == made[0].told[-1][0].place
    assert header.sketch is not None


def test_a_limit_is_told_once_memory_has_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    places(1, monkeypatch)
    sizes: list[int] = []

    def small(x: Tensor, t: Tensor) -> Tensor:
        sizes.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x

    denoiser = DistributedDenoiser(small, max_rows=4)
    assert (denoiser.max_rows, denoiser.devices, denoiser.rank) == (None, 1, 0)
    assert denoiser.prediction_type is None
    denoiser(torch.ones(4, 2), torch.zeros(4))
    assert denoiser.max_rows == 2
    assert sizes == [4, 2, 2]
    with pytest.raises(TypeError, match="x_T: several devices need a torch tensor, got list"):
        denoiser([1.0], torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="denoiser: expected a callable"):
        DistributedDenoiser(1)  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan")])
def test_seconds_and_groups_that_cannot_be(timeout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="timeout: expected a number of seconds > 0, got"):
        check_group(None, timeout)
    with pytest.raises(RuntimeError, match="has not been started"):
        check_group(None, 1e-9)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    assert check_group(None, 0.5) is None
    with pytest.raises(TypeError, match="group: expected a ProcessGroup, a DeviceMesh or None, got int"):
        check_group(7, 0.5)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="this process is not in it"):
        check_group(dist.GroupMember.NON_GROUP_MEMBER, 0.5)  # type: ignore[arg-type]
    group = dist.ProcessGroup(0, 1)  # pyright: ignore[reportCallIssue]
    assert check_group(group, 0.5) is group

    class Mesh(dist.DeviceMesh):
        ndim, mesh_dim_names = 1, ("solver", "tensor")  # type: ignore[assignment]

        def __init__(self) -> None: ...

        def get_group(self, mesh_dim: Any = None) -> Any:
            return group

    mesh = Mesh()
    assert check_group(mesh, 0.5) is group
    for dimensions in (0, 2):
        monkeypatch.setattr(Mesh, "ndim", dimensions)
        with pytest.raises(ValueError, match=r"expected one dimension of the mesh.*got all of .'solver', 'tensor'"):
            check_group(mesh, 0.5)


def test_a_fingerprint_is_of_names_shapes_and_all_networks() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    both, single = (lambda x, t: other(one(x))), (lambda x, t: one(x))
    assert len(fingerprint(one)) == 16
    assert fingerprint(both) != fingerprint(single)
    flat, tall = nn.Module(), nn.Module()
    flat.weight, tall.weight = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3, 2))
    named = nn.Module()
    named.bias = nn.Parameter(torch.ones(2, 3))
    assert len({fingerprint(module) for module in (flat, tall, named)}) == 3

    class Extra(nn.Module):
        def get_extra_state(self) -> str:
            return "none of a tensor"

    assert fingerprint(Extra()).endswith(".Extra")
    assert fingerprint(Extra()).startswith("no torch module in ")


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("lost", [[], ["one", "two"]], ids=["all there", "lost"])
def test_a_group_as_torchrun_asks_for_it(on_gpu: bool, lost: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    groups = [SimpleNamespace(abort=lambda name=name: done.append(f"abort {name}")) for name in lost]
    monkeypatch.setattr(distributed, "lost_groups", lambda: groups)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(str(device)))
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: done.append((args, options)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("destroy"))
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: done.append("abort all"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCH_NCCL_ASYNC_ERROR_HANDLING"):
        monkeypatch.delenv(name, raising=False)
    for name in ("RANK", "WORLD_SIZE"):  # each alone is not enough
        monkeypatch.setenv(name, "1")
        with pytest.raises(RuntimeError, match="start this script with torchrun"), process_group():
            pass
        monkeypatch.delenv(name)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for local in (None, "1"):
        done.clear()
        if local:
            monkeypatch.setenv("LOCAL_RANK", local)
        with process_group(90.0) as device:
            done.append("inside")
        limit = {"timeout": timedelta(seconds=90)}
        if on_gpu:
            name = f"cuda:{local or 0}"
            assert str(device) == name
            begun = [name, (("nccl",), limit | {"device_id": device})]
            assert done == [*begun, "inside", "abort all" if lost else "destroy"]
        else:
            assert device == torch.device("cpu")
            assert done == [(("gloo",), limit), "inside", *[f"abort {name}" for name in lost], "destroy"]
