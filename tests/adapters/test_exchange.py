"""What NCCL's processes tell each other, with stand-ins for it and for cards; a round is one collective."""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("torch")
import torch
import torch.distributed as dist

from parasolver_adapters import distributed, exchange
from parasolver_adapters.distributed import DistributedDenoiser, process_group
from parasolver_adapters.exchange import Exchange, Header, Kind, WorkerLostError
from parasolver_adapters.multi_device import MultiDeviceDenoiser
from parasolver_core import DDIM, NoiseSchedule, solve, solve_sequential

SCHEDULE = NoiseSchedule.linear()


class Work:
    """NCCL's: ``wait`` is the stream's, and returns at once."""

    def wait(self, *limit: Any) -> None:
        assert not limit, "a limit makes NCCL's wait look every few milliseconds only"


class Group:
    """One process's NCCL group: its own packet comes back, once for each rank."""

    def __init__(self) -> None:
        self.collectives: list[int] = []

    def _allgather_base(self, gathered: torch.Tensor, packet: torch.Tensor, options: Any) -> Work:
        self.collectives.append(packet.numel())
        gathered.view(-1, packet.numel()).copy_(packet)
        return Work()


class Event:
    """A card that is done after so many looks."""

    looks = 3

    def __init__(self) -> None:
        self.seen = 0

    def record(self) -> None:
        pass

    def query(self) -> bool:
        self.seen += 1
        return self.seen > self.looks


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    monkeypatch.setattr(dist, "get_backend", lambda group=None: "nccl")
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 1)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Exchange, "device", lambda self, device=None: torch.device("cpu"))
    return Group()


def denoiser_of(group: Group, monkeypatch: pytest.MonkeyPatch, network: Any) -> DistributedDenoiser:
    monkeypatch.setattr(distributed, "check_group", lambda group, timeout: group)
    return DistributedDenoiser(network, group, timeout=1.0)  # type: ignore[arg-type]


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) * 0.7 + 0.1 * torch.cos(0.01 * t)[:, None]


def test_a_round_is_one_collective(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a round does not fit into the first packets."""
    x_T = torch.randn(1, 800, generator=torch.Generator().manual_seed(0))
    problem = x_T, SCHEDULE.timesteps(40), DDIM(SCHEDULE)
    denoiser = denoiser_of(group, monkeypatch, network)
    solution = solve(denoiser, *problem, window=8, tolerance=0, check=False)
    assert torch.allclose(solution.sample, solve_sequential(network, *problem).sample, atol=1e-5)
    calls, rounds = group.collectives[1:-1], solution.stats.rounds  # without those at the beginning and the end
    # a round that is longer than all before is told in two parts
    assert rounds <= len(calls) <= rounds + 3
    assert max(calls) >= 8 * 800 * 4
    ends = group.collectives[-1]
    solve(denoiser, *problem, window=8, tolerance=0, check=False)
    assert ends > 4096
    assert group.collectives[len(calls) + 2] == 4096  # the next run begins with short packets


def test_a_process_that_never_comes_is_an_error_in_time(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Event, "looks", 10**9)
    own = Exchange(group)  # type: ignore[arg-type]
    with pytest.raises(WorkerLostError, match=r"did not answer within 0\.05 s"):
        own.meet(Header(Kind.BEGIN, 1, 0), torch.zeros(4, dtype=torch.uint8), 0.05)
    assert own.lost


def test_only_headers_come_to_the_host(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []
    to_host = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: (moved.append(self.numel()), to_host(self))[1])
    own = Exchange(group)  # type: ignore[arg-type]
    (got,) = own.meet(Header(Kind.CALL, 1, 1, 4), torch.ones(10_000, dtype=torch.uint8), 1.0)
    assert len(got) == 10_000
    assert bool((got == 1).all())
    assert moved == [exchange._HEADER]


def test_the_process_group_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound to its card from the start; aborted where a process was lost, and destroyed else."""
    seen: list[Any] = []
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(("device", device.index)))
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **how: seen.append((backend, how["device_id"].index))
    )
    monkeypatch.setattr(dist, "destroy_process_group", lambda: seen.append("destroyed"))
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: seen.append("aborted"))
    with process_group() as device:
        assert device == torch.device("cuda", 1)
        assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    assert seen == [("device", 1), ("nccl", 1), "destroyed"]
    monkeypatch.setattr(distributed, "lost_groups", lambda: [None])
    with pytest.raises(WorkerLostError), process_group():
        raise WorkerLostError("gone")
    assert seen[-1] == "aborted"


def test_a_replicas_thread_uses_the_callers_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its copies would not wait for what the caller has begun."""
    from parasolver_adapters import multi_device

    entered: list[str] = []
    stream = type("Stream", (), {"__enter__": lambda self: entered.append("stream"), "__exit__": lambda *_: None})()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"of {device}")
    monkeypatch.setattr(torch.cuda, "stream", lambda which: (entered.append(which), stream)[1])
    with multi_device._entered(multi_device._modes(torch.device("cuda", 1))):
        pass
    assert entered == ["of cuda:1", "stream"]
    assert MultiDeviceDenoiser([network]).devices == 1
