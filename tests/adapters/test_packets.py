"""The packets of a group's processes, exchanged by threads of one: what each gets, and in how many collectives."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
import torch
import torch.distributed as dist
from torch import Tensor

from parasolver_adapters import exchange
from parasolver_adapters.exchange import (
    Exchange,
    Header,
    Kind,
    WorkerError,
    WorkerLostError,
    WorkersDisagreeError,
    exchange_of,
    lost_groups,
    sketch,
)

FIRST = 4096  # bytes of a run's first packets
ROOM = FIRST - 128  # what is left of them beside the header


class Member:
    """One process's view of a group."""

    def __init__(self, rank: int = 2) -> None:
        self.rank = rank


class Group:
    """Some members, a thread each, who wait for each other as processes do."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.size, self.collectives = size, list[int]()
        self._barrier, self._packets = threading.Barrier(size), list[Any]([None] * size)
        monkeypatch.setattr(dist, "get_rank", lambda member: member.rank)
        monkeypatch.setattr(dist, "get_world_size", lambda member: size)
        self._named = [Member(rank) for rank in range(size)]  # held here, as an exchange does not hold them
        self.exchanges = [Exchange(member) for member in self._named]  # type: ignore[arg-type]
        for own in self.exchanges:
            monkeypatch.setattr(own, "_gather", self._gather_of(own.rank))

    def _gather_of(self, rank: int) -> Any:
        def gather(packet: Tensor, purpose: Header, timeout: float) -> Tensor:
            self._packets[rank] = packet.clone()
            if self._barrier.wait(5) == 0:
                self.collectives.append(packet.numel())
            gathered = torch.stack(self._packets)
            self._barrier.wait(5)
            return gathered

        return gather

    def meet(self, headers: list[Header], contents: list[Tensor]) -> list[Any]:
        """What each member gets of a meeting, or the error that it ends in."""

        def of(rank: int) -> Any:
            try:
                return self.exchanges[rank].meet(headers[rank], contents[rank], 5.0)
            except WorkerError as error:
                return error

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(of, range(self.size)))


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Group:
    return Group(2, monkeypatch)


def content(*lengths: int) -> list[Tensor]:
    """Bytes of a content that no part of another one resembles."""
    return [(torch.arange(length) * 7 + 13 * at + 1).to(torch.uint8) for at, length in enumerate(lengths)]


def numbers(at: float) -> Tensor:
    return torch.linspace(-1, 2, 16) + at


def call(run: int, number: int, rows: int, at: float = 0.0) -> Header:
    return Header(Kind.CALL, run, number, rows, sketch=numbers(at))


@pytest.mark.parametrize(
    ("lengths", "collectives"),
    [
        ((0, 0), [FIRST]),
        ((5, 3), [FIRST]),
        ((ROOM, 7), [FIRST]),  # just fits
        ((ROOM + 1, 7), [FIRST, 1]),
        ((9, ROOM + 2), [FIRST, 2]),
        ((ROOM + 20, ROOM + 4), [FIRST, 20]),
    ],
)
def test_every_member_gets_every_content(lengths: tuple[int, int], collectives: list[int], pair: Group) -> None:
    sent = content(*lengths)
    for got in pair.meet([call(1, 1, 4)] * 2, sent):
        assert [one.tolist() for one in got] == [one.tolist() for one in sent]
    assert pair.collectives == collectives
    assert [(own.lost, own.run) for own in pair.exchanges] == [("", 1)] * 2


def test_packets_stay_as_long_as_the_longest_of_the_run(pair: Group) -> None:
    """A shorter one later does not make them shorter; the next run begins with short ones again."""
    long, short = content(ROOM + 100, 50), content(2, 50)
    pair.meet([call(1, 1, 4)] * 2, long)
    pair.meet([call(1, 2, 4)] * 2, short)
    pair.meet([call(1, 3, 4)] * 2, long)
    pair.meet([Header(Kind.END, 1, 3)] * 2, content(0, 0))
    pair.meet([Header(Kind.BEGIN, 2, 0)] * 2, short)
    assert pair.collectives == [FIRST, 100, FIRST + 100, FIRST + 100, FIRST + 100, FIRST]


def test_an_error_of_one_is_that_of_all_and_cut_to_the_first_packet(pair: Group) -> None:
    text = torch.frombuffer(bytearray(b"ValueError: " + b"x" * 2 * FIRST), dtype=torch.uint8)
    pair.meet([call(1, 1, 4)] * 2, content(ROOM + 100, 0))  # packets are longer now
    first, second = pair.meet([call(1, 2, 4), Header(Kind.FAILED, 1, 2, 4, sketch=numbers(0))], [content(3)[0], text])
    assert str(first) == str(second)
    assert str(first) == "rank 1 of 2 failed in network call 2 of run 1: ValueError: " + "x" * (ROOM - 12)
    assert (type(first), first.rank, second.rank) == (WorkerError, 1, 1)
    assert pair.exchanges[0].lost == pair.exchanges[1].lost == ""
    assert pair.collectives[-1] == FIRST + 100


def test_all_who_fail_are_named_the_first_as_the_errors_rank(pair: Group) -> None:
    headers = [Header(Kind.LEFT, 3, 5), Header(Kind.FAILED, 3, 6, 8)]
    texts = [torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (b"KeyError: 1", b"boom")]
    left, failed = pair.meet(headers, texts)
    assert [bytes(one.tolist()) for one in left] == [b"KeyError: 1", b"boom"]  # who leaves does not hear of it again
    assert failed.rank == 0
    assert str(failed) == (
        "rank 0 of 2 left run 3 after network call 5: KeyError: 1; rank 1 of 2 failed in network call 6 of run 3: boom"
    )


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (Header(Kind.AGREE, 2, 7), "rank 1 chooses a window in run 2"),
        (call(2, 7, 9), "rank 1 is in network call 7 of run 2 with 9 rows"),
        (call(2, 8, 8), "rank 1 is in network call 8 of run 2 with 8 rows"),
        (call(3, 7, 8), "rank 1 is in network call 7 of run 3 with 8 rows"),
        (Header(Kind.BEGIN, 3, 0), "rank 1 begins run 3"),
        (Header(Kind.END, 2, 7), "rank 1 has ended run 2 after network call 7"),
    ],
)
def test_members_that_have_come_for_something_else_have_come_apart(other: Header, told: str, pair: Group) -> None:
    for error in pair.meet([call(2, 7, 8), other], content(0, 0)):
        assert type(error) is WorkersDisagreeError
        assert "rank 0 is in network call 7 of run 2 with 8 rows, " + told + ". They need" in str(error)
    run = max(2, other.run)
    assert [own.run for own in pair.exchanges] == [run, run]  # so that the next runs have one number
    assert pair.collectives == [FIRST]


def test_members_with_other_states_have_come_apart(pair: Group) -> None:
    for error in pair.meet([call(1, 1, 4), call(1, 1, 4, at=0.1)], content(ROOM + 1, 3)):
        assert type(error) is WorkersDisagreeError
        assert error.rank == 1
    assert pair.collectives == [FIRST]  # nothing more is told
    pair.meet([call(2, 1, 4)] * 2, content(1, 1))
    assert pair.collectives[-1] == FIRST  # and what did not go well makes no packet longer


def test_headers_are_read_as_they_were_written() -> None:
    assert len(Kind) == 6  # no two numbers are the same
    for kind in Kind:
        written = Header(kind, run=2**40, call=3, rows=5, length=7)
        packet = torch.zeros(200, dtype=torch.uint8)
        packet[:64] = torch.from_numpy(written.packed())
        packet[64:128] = numbers(0.5).view(torch.uint8)
        read = Header.read(packet)
        assert (read.kind, read.run, read.call, read.rows, read.length) == (kind, 2**40, 3, 5, 7)
        assert read.sketch is not None
        assert torch.equal(read.sketch, numbers(0.5))
        expected = Kind.CALL if kind is Kind.FAILED else kind  # who fails is where the others are
        assert read.place == written.place == (expected, 2**40, 3, 5)
    assert Header(Kind.BEGIN, 1, 0).place == (Kind.BEGIN, 1, 0, 0)


@pytest.mark.parametrize(
    ("count", "at"),
    [
        (1, [0] * 16),
        (3, [0] * 8 + [1] * 7 + [2]),
        (16, range(16)),
        (31, range(0, 32, 2)),
        (1501, range(0, 1501, 100)),
    ],
)
def test_a_sketch_is_spread_over_the_whole_input(count: int, at: Any) -> None:
    x = torch.arange(count, dtype=torch.float64, requires_grad=True) + 0.5
    got = sketch(x.reshape(1, count))
    assert got.dtype == torch.float32
    assert not got.requires_grad
    assert got.tolist() == [0.5 + i for i in at]


def test_an_exchange_is_that_of_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    own, world = Member(), Member()
    monkeypatch.setattr(dist, "get_rank", lambda member: member.rank)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 3)
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=world))
    monkeypatch.setattr(exchange, "_EXCHANGES", type(exchange._EXCHANGES)())
    of_own: Any = exchange_of(own)  # type: ignore[arg-type]
    assert exchange_of(own) is of_own  # type: ignore[arg-type]
    assert exchange_of(None) is exchange_of(world) is not of_own  # type: ignore[arg-type]
    assert (of_own.rank, of_own.size, of_own.run) == (2, 3, 0)
    assert lost_groups() == []
    of_own.lost = "it lost a process before"
    assert lost_groups() == [own]
    with pytest.raises(WorkerLostError, match=r"cannot be used any more \(it lost a process before\)"):
        of_own.meet(Header(Kind.BEGIN, 1, 0), torch.zeros(0, dtype=torch.uint8), 1.0)


@pytest.mark.parametrize(
    ("backend", "given", "expected"),
    [
        ("gloo", None, "cpu"),
        ("gloo", "cuda:1", "cpu"),
        ("nccl", None, "cuda"),
        ("nccl", "cpu", "cuda"),
        ("nccl", "cuda:1", "cuda:1"),
    ],
)
def test_packets_lie_where_the_backend_wants_them(
    backend: str, given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda group: backend)
    own: Any = SimpleNamespace(_group=lambda: None)
    device = None if given is None else torch.device(given)
    assert Exchange.device(own, device) == torch.device(expected)


@pytest.mark.parametrize("limit", [2.5, 40.0])
def test_others_are_waited_for_as_long_as_the_caller_says(limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a group whose own limit is another; and a group that fails is lost, for the reason that it gave."""
    seen: list[float] = []

    def gather(gathered: Tensor, packet: Tensor, options: Any) -> Any:
        seen.append(options.timeout.total_seconds())
        return SimpleNamespace(wait=lambda limit: seen.append(limit.total_seconds()))

    def fail(gathered: Tensor, packet: Tensor, options: Any) -> Any:
        raise RuntimeError("Connection closed by peer. Look there")

    group = SimpleNamespace(_allgather_base=gather)
    monkeypatch.setattr(dist, "get_backend", lambda group: "gloo")
    own: Any = SimpleNamespace(_group=lambda: group, size=2, rank=1, lost="", device=lambda device: torch.device("cpu"))
    packet = torch.zeros(6, dtype=torch.uint8)
    assert Exchange._gather(own, packet, Header(Kind.BEGIN, 1, 0), limit).shape == (2, 6)
    assert seen == [limit, limit]
    group._allgather_base = fail
    with pytest.raises(WorkerLostError, match=rf"rank 1 of 2, which begins run 1, .* within {limit:g} s \(Connection"):
        Exchange._gather(own, packet, Header(Kind.BEGIN, 1, 0), limit)
    assert own.lost == "it lost a process before: Connection closed by peer"


def test_a_card_is_looked_at_many_times_a_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a round of a quick network would wait for the look."""
    slept: list[float] = []

    class Event:
        def record(self) -> None:
            pass

        def query(self) -> bool:
            return len(slept) == 3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(exchange.time, "sleep", slept.append)
    exchange._wait_for_card(10.0)
    assert len(slept) == 3
    assert max(slept) <= 1e-4
