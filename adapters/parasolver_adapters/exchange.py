"""What the processes of a group tell each other: a packet from each at once, which begins alike whatever it is about.

All that a process waits for goes through :meth:`Exchange.meet`. The first part of a packet is as long as the longest
packet so far, which all processes have seen, so a round is one collective; and processes that have come apart, one of
them still in a run that another has left, meet once more and learn it.

On cards (NCCL) packets stay there: only their headers come to the host.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from parasolver_core.arrays import uploaded
from parasolver_core.errors import SolverError

_FIRST = 2**12  # bytes of a run's first packets; later ones are as long as the longest
_NUMBERS = struct.Struct("=qqqqq")
_SKETCH = 16  # numbers of the input of a call, by which processes that work on different states are told
_HEADER = 64 + 4 * _SKETCH
_ROOM = _FIRST - _HEADER
_LOOK = 2e-5  # seconds between two looks at whether a card's packets have arrived
_APART = 1e-3  # of the input's size: rounding differs on other hardware, other noise or other latents by far more


class WorkerError(SolverError):
    """A process of the group failed or left a run; raised in all others at the same point of it.

    Args:
        message: what happened, with the original exception.
        rank: of the first process that failed, within the group; None if that is not known.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class WorkerLostError(WorkerError):
    """A process of the group died, hangs or left; the group cannot be used any more."""


class WorkersDisagreeError(WorkerError):
    """The processes of the group were started with different arguments or networks, or have come apart."""


class Kind(IntEnum):
    """What a packet is about."""

    BEGIN = 0
    AGREE = 1
    CALL = 2
    FAILED = 3
    END = 4
    LEFT = 5


_ERRORS = (Kind.FAILED, Kind.LEFT)


@dataclass(frozen=True)
class Header:
    """What a packet is about, and where its process is.

    Args:
        kind: of the packet; ``FAILED`` and ``LEFT`` are followed by an error's text.
        run: how many runs the process has begun.
        call: how many network calls this run has made.
        rows: of the call, over all processes.
        length: bytes that follow.
        sketch: some numbers of the call's input, (16,) float32; zeros elsewhere.
    """

    kind: Kind
    run: int
    call: int
    rows: int = 0
    length: int = 0
    sketch: Tensor | None = None

    @property
    def place(self) -> tuple[Any, ...]:
        """What must be the same in all processes."""
        return Kind.CALL if self.kind is Kind.FAILED else self.kind, self.run, self.call, self.rows

    def __str__(self) -> str:
        return {
            Kind.BEGIN: f"begins run {self.run}",
            Kind.AGREE: f"chooses a window in run {self.run}",
            Kind.CALL: f"is in network call {self.call} of run {self.run} with {self.rows} rows",
            Kind.FAILED: f"failed in network call {self.call} of run {self.run}",
            Kind.END: f"has ended run {self.run} after network call {self.call}",
            Kind.LEFT: f"left run {self.run} after network call {self.call}",
        }[self.kind]

    def packed(self) -> NDArray[np.uint8]:
        numbers = _NUMBERS.pack(self.kind, self.run, self.call, self.rows, self.length).ljust(64, b"\0")
        return np.frombuffer(bytearray(numbers), dtype=np.uint8)

    @classmethod
    def read(cls, packet: Tensor) -> Header:
        """From the beginning of a packet, on the host."""
        kind, run, call, rows, length = _NUMBERS.unpack_from(packet[:64].numpy().tobytes())
        return cls(Kind(kind), run, call, rows, length, packet[64:_HEADER].clone().view(torch.float32))


class Exchange:
    """The meetings of one group's processes; all that use the group share it, see :func:`exchange_of`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = ref(group)  # a table of all exchanges holds them by their groups
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.run, self.lost = 0, ""
        self._room = _ROOM  # bytes of content that the first part has room for; the same in all processes

    def meet(self, purpose: Header, content: Tensor, timeout: float) -> list[Tensor]:
        """Every process's content, by rank.

        Args:
            purpose: what this process has come for; its length and sketch are filled in here.
            content: uint8; an error's text is cut to what the first part has room for.
            timeout: seconds to wait for the others.

        Raises:
            WorkerError: a process failed, or left the run.
            WorkersDisagreeError: the processes have not come for the same.
            WorkerLostError: a process died or did not come in time.
        """
        if self.lost:
            raise WorkerLostError(f"the group cannot be used any more ({self.lost}); start all processes again")
        self.lost = f"rank {self.rank} was interrupted while it talked to the others"
        if purpose.kind in _ERRORS:
            content = content[:_ROOM]
        room, device = self._room, content.device
        first = torch.zeros(_HEADER + room, dtype=torch.uint8, device=device)
        header = Header(purpose.kind, purpose.run, purpose.call, purpose.rows, len(content)).packed()
        first[:64] = uploaded(torch, header, device)
        if purpose.sketch is not None:
            first[64:_HEADER] = purpose.sketch.view(torch.uint8)
        first[_HEADER : _HEADER + min(len(content), room)] = content[:room]
        packets = self._gather(first, purpose, timeout)
        headers = [Header.read(packet) for packet in packets[:, :_HEADER].cpu()]
        wrong = self._wrong(headers, packets)
        most = max(header.length for header in headers)
        received = packets[:, _HEADER : _HEADER + most]
        if wrong is None and most > room:
            rest = torch.zeros(most - room, dtype=torch.uint8, device=device)
            rest[: max(len(content) - room, 0)] = content[room:]
            received = torch.cat([received, self._gather(rest, purpose, timeout)], dim=1)
        self.lost, self.run = "", max(header.run for header in headers)
        if wrong is None:  # as all processes find
            self._room = _ROOM if purpose.kind is Kind.END else max(room, most)
        if wrong is not None and purpose.kind is not Kind.LEFT:
            raise wrong
        return [packet[: header.length] for packet, header in zip(received, headers, strict=True)]

    def _wrong(self, headers: list[Header], packets: Tensor) -> WorkerError | None:
        """What ends the run in all processes alike."""
        failed = [rank for rank, header in enumerate(headers) if header.kind in _ERRORS]
        if failed:
            texts = []
            for rank in failed:
                text = packets[rank, _HEADER:][: headers[rank].length].cpu().numpy().tobytes().decode(errors="replace")
                texts.append(f"rank {rank} of {self.size} {headers[rank]}: {text}")
            return WorkerError("; ".join(texts), failed[0])
        if len({header.place for header in headers}) > 1:
            at = ", ".join(f"rank {rank} {header}" for rank, header in enumerate(headers))
            return WorkersDisagreeError(
                f"the processes have come apart: {at}. They need the same hardware and versions, and callbacks that "
                "decide alike"
            )
        sketches = torch.stack([header.sketch for header in headers if header.sketch is not None])
        apart = (sketches - sketches[0]).abs().amax(1) > _APART * sketches.abs().amax()
        if bool(apart.any()):
            rank = int(apart.int().argmax())
            return WorkersDisagreeError(
                f"the processes have come apart: in network call {headers[0].call} of run {headers[0].run} rank {rank} "
                "has other states than rank 0. They need the same noise, and callbacks that leave the states alone",
                rank,
            )
        return None

    def _gather(self, packet: Tensor, purpose: Header, timeout: float) -> Tensor:
        """Every process's packet, (size, bytes); the only place where processes wait for each other."""
        group, where = self._group(), self.device(packet.device)
        assert group is not None  # who meets has it
        packet = packet.to(where)
        gathered = torch.empty(self.size * packet.numel(), dtype=torch.uint8, device=where)
        options = dist.distributed_c10d.AllgatherOptions()
        try:
            if dist.get_backend(group) == "nccl":
                group._allgather_base(gathered, packet, options).wait()  # the stream does, and not the host
                _wait_for_card(timeout)
            else:
                options.timeout = timedelta(seconds=timeout)  # else the group's own, and nobody could leave it before
                group._allgather_base(gathered, packet, options).wait(options.timeout)
        except RuntimeError as error:
            self.lost = f"it lost a process before: {str(error).split('. ')[0].strip()}"
            raise WorkerLostError(
                f"rank {self.rank} of {self.size}, which {purpose}, got no answer from the others: a process died, "
                f"left or did not answer within {timeout:g} s ({error}). See its own output; the state reached is in "
                "error.solution"
            ) from error
        return gathered.view(self.size, -1)

    def device(self, device: torch.device | None = None) -> torch.device:
        """Where the group's backend wants its bytes."""
        if dist.get_backend(self._group()) == "nccl":
            return device if device is not None and device.type == "cuda" else torch.device("cuda")
        return torch.device("cpu")


def _wait_for_card(timeout: float) -> None:
    """Until the card has done all that it was given. NCCL's own wait with a limit looks every few milliseconds only.

    Raises:
        RuntimeError: it has not within so many seconds, as when another process never comes.
    """
    done, until = torch.cuda.Event(), time.monotonic() + timeout
    done.record()
    while not done.query():
        if time.monotonic() > until:
            raise RuntimeError("NCCL: the time is over")
        time.sleep(_LOOK)


_EXCHANGES: WeakKeyDictionary[dist.ProcessGroup, Exchange] = WeakKeyDictionary()


def exchange_of(group: dist.ProcessGroup | None) -> Exchange:
    """The exchange of a group; None: of all processes."""
    group = dist.group.WORLD if group is None else group
    assert group is not None  # the group has been checked
    if group not in _EXCHANGES:
        _EXCHANGES[group] = Exchange(group)
    return _EXCHANGES[group]


def lost_groups() -> list[dist.ProcessGroup]:
    """The groups that cannot be used any more."""
    return [group for group, exchange in _EXCHANGES.items() if exchange.lost]


def sketch(x: Tensor) -> Tensor:
    """Some numbers of a call's input, spread evenly, (16,) float32."""
    flat = x.detach().flatten()
    at = torch.arange(_SKETCH, device=flat.device) * (flat.numel() - 1) // (_SKETCH - 1)
    return flat[at].to(torch.float32)
