"""Several devices: the rows of a round shared among the processes of a torch.distributed group.

Every process runs the same solver on the same arguments and gets the same sample; none of them is special. A round
costs one collective, which carries the predictions together with each process's errors, so that an exception anywhere
ends the run in the same round everywhere. Before the first round the processes compare what they were given.

Example, a script for ``torchrun --nproc-per-node 2``::

    with process_group() as device:
        denoiser = DistributedDenoiser(clip_sample(model.to(device), schedule))
        solution = solve(denoiser, x_T.to(device), timesteps, DDIM(schedule), window=16)
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from parasolver_core import __version__
from parasolver_core.denoiser import BatchedCall, DenoiserFn, Rows, SharedDenoiser, predicted_by, takes_rows
from parasolver_core.errors import SolverError
from parasolver_core.introspection import reachable

_HEADER = 1024  # bytes before a process's predictions: three numbers, then the text of an error
_NUMBERS = struct.Struct("=qqq")
_MESSAGE = 2**14  # bytes of what processes tell each other outside rounds
_SAMPLED = 64  # elements of each parameter that the fingerprint reads


class WorkerError(SolverError):
    """A process of the group failed; raised in all of them in the same round.

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
    """The processes of the group were started with different arguments or networks."""


class DistributedDenoiser(SharedDenoiser):
    """A denoiser whose rows are shared among the processes of a group.

    Args:
        denoiser: the network, in its final form (wrap what clips or guides first), the same in every process.
        group: the processes that share the rows: a process group, or a one-dimensional
            :class:`~torch.distributed.device_mesh.DeviceMesh` such as ``mesh["solver"]``, beside whose other dimensions
            the network may be split itself. None: all processes.

    Other arguments:
        timeout: seconds that a process waits for the others, in each round; longer than the slowest network call,
            its compilation included.
        max_rows: the most rows in one call of the network by one process. None: no limit. Halved in a process whose
            memory runs out.

    Raises:
        WorkerError: in all processes when one raised an exception.
        WorkerLostError: a process died, or did not answer within the timeout.
        WorkersDisagreeError: at the start of a run, if a process has other arguments or another network.
        RuntimeError: no process group has been started, or this process is not in ``group``.
    """

    def __init__(
        self,
        denoiser: DenoiserFn,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        *,
        timeout: float = 120.0,
        max_rows: int | None = None,
    ) -> None:
        if not callable(denoiser):
            raise TypeError(f"denoiser: expected a callable denoiser(x, t), got {type(denoiser).__name__}")
        self._group = check_group(group, timeout)
        self._rank, self._size = dist.get_rank(self._group), dist.get_world_size(self._group)
        self._denoiser, self._timeout = denoiser, timedelta(seconds=timeout)
        self._local = BatchedCall(denoiser, max_rows)
        self._calls, self._compared, self._lost = 0, False, ""

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return self._rank

    @property
    def takes_rows(self) -> bool:
        return takes_rows(self._denoiser)

    @property
    def prediction_type(self) -> str | None:
        return predicted_by(self._denoiser)

    @property
    def devices(self) -> int:
        return self._size

    @property
    def max_rows(self) -> int | None:
        return self._local.max_rows if self._local.memory_ran_out else None

    def begin(self, plan: Mapping[str, str]) -> None:
        mine = {
            "what is to be done": "begin a run",
            **plan,
            "network": fingerprint(self._denoiser),
            "version of parasolver": __version__,
        }
        self._compare(self._exchange(mine))
        self._calls, self._compared = 0, True

    def agree(self, values: Sequence[float]) -> list[float]:
        task = f"agree on {len(values)} figures, to choose a window"
        messages = self._exchange({"what is to be done": task, "values": list(values)})
        self._compare([{name: told for name, told in one.items() if name != "values"} for one in messages])
        return [max(column) for column in zip(*(one["values"] for one in messages), strict=True)]

    def __call__(self, x: Tensor, t: Tensor, rows: Rows | None = None, /) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x_T: several devices need a torch tensor, got {type(x).__name__}")
        if (
            not self._compared
        ):  # called by something other than the solver, or wrapped: at least the shapes are compared
            self.begin({"shape and dtype of x": f"{tuple(x.shape)}, {x.dtype}"})
        self._calls += 1
        parts = shares(x.shape[0], self._size)
        mine, part, error = parts[self._rank], None, None
        if mine.stop > mine.start:
            try:
                part = self._local(x[mine], t[mine], None if rows is None else rows[mine])
            except Exception as raised:
                error = raised
        most = max(share.stop - share.start for share in parts)
        packets = self._gather(_Packet.pack(part, error, self._calls, x, most))
        headers = packets[:, :_HEADER].cpu()  # waits for the device
        self._raise_for([_Packet.read(_bytes(header)) for header in headers], x.shape[0], error)
        values = packets[:, _HEADER : _HEADER + most * _row_bytes(x)].to(x.device).view(x.dtype)
        rows_of = zip(values.unflatten(1, (most, -1)).unbind(), parts, strict=True)
        return torch.cat([own[: share.stop - share.start] for own, share in rows_of]).view(x.shape)

    def _raise_for(self, told: list[_Packet], rows: int, error: Exception | None) -> None:
        failed = [(rank, one.text) for rank, one in enumerate(told) if one.text]
        if failed:
            others = "".join(f"; rank {rank}: {text}" for rank, text in failed[1:])
            raise WorkerError(
                f"rank {failed[0][0]} of {self._size} failed in network call {self._calls}: {failed[0][1]}{others}",
                failed[0][0],
            ) from error
        if any((one.calls, one.rows) != (self._calls, rows) for one in told):
            at = ", ".join(f"rank {rank} has {one.rows} rows in call {one.calls}" for rank, one in enumerate(told))
            raise WorkersDisagreeError(
                f"the processes have come apart: {at}. They need the same hardware and versions, and callbacks that "
                "decide alike"
            )

    def _exchange(self, message: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The messages of all processes, by rank."""
        text = json.dumps(message).encode()
        if len(text) > _MESSAGE - 8:
            raise ValueError(
                f"a message of {len(text)} bytes is longer than {_MESSAGE - 8}; use fewer or shorter arguments"
            )
        packet = torch.frombuffer(bytearray(text.ljust(_MESSAGE, b"\0")), dtype=torch.uint8)
        gathered = self._gather(packet.to(self._device())).cpu()
        return [json.loads(_bytes(one).rstrip(b"\0")) for one in gathered]

    def _compare(self, messages: list[dict[str, Any]]) -> None:
        names = dict.fromkeys(name for message in messages for name in message)
        if len({message["what is to be done"] for message in messages}) > 1:
            names = {"what is to be done": None}  # the rest has nothing to do with each other
        differing = {name: [message.get(name, "nothing") for message in messages] for name in names}
        differing = {name: values for name, values in differing.items() if len(set(values)) > 1}
        if differing:
            told = "; ".join(
                f"{name}: " + ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
                for name, values in differing.items()
            )
            raise WorkersDisagreeError(
                f"the processes must be given the same arguments and network, but differ in {told}"
            )

    def _gather(self, packet: Tensor) -> Tensor:
        """Every process's packet, (size, bytes); the only place where processes wait for each other."""
        if self._lost:
            raise WorkerLostError(f"the group lost a process before ({self._lost}); start all of them again")
        where = packet.device
        packet = packet.to(self._device(where))
        gathered = torch.empty(self._size * packet.numel(), dtype=torch.uint8, device=packet.device)
        try:
            work = dist.all_gather(list(gathered.view(self._size, -1).unbind()), packet, self._group, async_op=True)
            assert work is not None  # only where this process is not in the group
            work.wait(self._timeout)
        except RuntimeError as error:
            self._lost = str(error).split(". ")[0].strip()
            raise WorkerLostError(
                f"rank {self._rank} of {self._size} got no answer from the others in network call {self._calls + 1} "
                f"({self._lost}): a process died, left or did not answer within {self._timeout.total_seconds():g} s. "
                "See its own output; the state reached is in error.solution"
            ) from error
        return gathered.view(self._size, -1)

    def _device(self, device: torch.device | None = None) -> torch.device:
        """Where the group's backend wants its bytes."""
        if dist.get_backend(self._group) == "nccl":
            return device if device is not None and device.type == "cuda" else torch.device("cuda")
        return torch.device("cpu")


@dataclass(frozen=True)
class _Packet:
    """What one process tells the others of a call: the header before its predictions.

    Args:
        calls, rows: the number of the call, and of its rows; the same in all processes.
        text: of the error; empty if there was none.
    """

    calls: int
    rows: int
    text: str

    @classmethod
    def pack(cls, part: Tensor | None, error: Exception | None, calls: int, x: Tensor, most: int) -> Tensor:
        """The packet of one process, uint8, as long for each: room for ``most`` rows like those of ``x``."""
        text = b"" if error is None else _told(error)
        header = bytearray((_NUMBERS.pack(calls, x.shape[0], len(text)) + text).ljust(_HEADER, b"\0"))
        length = -(-most * _row_bytes(x) // 16) * 16  # rows of other processes stay aligned
        packet = torch.empty(_HEADER + length, dtype=torch.uint8, device=x.device)
        packet[:_HEADER] = torch.frombuffer(header, dtype=torch.uint8)
        if part is not None:
            values = part.contiguous().flatten().view(torch.uint8)
            packet[_HEADER : _HEADER + len(values)] = values
        return packet

    @classmethod
    def read(cls, header: bytes) -> _Packet:
        calls, rows, length = _NUMBERS.unpack_from(header)
        return cls(calls, rows, header[_NUMBERS.size : _NUMBERS.size + length].decode(errors="replace"))


def _told(error: Exception) -> bytes:
    """An exception with its notes, cut to what the header holds."""
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return f"{type(error).__name__}: {error}{notes}".encode()[: _HEADER - _NUMBERS.size]


def _bytes(packet: Tensor) -> bytes:
    return packet.numpy().tobytes()


def _row_bytes(x: Tensor) -> int:
    return x.element_size() * x[0].numel()


def shares(rows: int, size: int) -> list[slice]:
    """Which rows each process takes: as evenly as can be."""
    ends = [rank * rows // size for rank in range(size + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


def check_group(group: dist.ProcessGroup | DeviceMesh | None, timeout: float) -> dist.ProcessGroup | None:
    """The process group among the arguments of :class:`DistributedDenoiser`; raises for what cannot be."""
    if not timeout > 0:
        raise ValueError(f"timeout: expected a number of seconds > 0, got {timeout}")
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "group: torch.distributed has not been started; start the script with torchrun and call "
            "process_group() or torch.distributed.init_process_group() first"
        )
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group: expected one dimension of the mesh, such as mesh['solver'], got all of {group.mesh_dim_names}"
            )
        return group.get_group()
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise RuntimeError("group: this process is not in it; only its members may call the denoiser")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected a ProcessGroup, a DeviceMesh or None, got {type(group).__name__}")
    return group


def fingerprint(denoiser: Any) -> str:
    """A short hash of the networks that a denoiser refers to: names, shapes, dtypes and samples of their parameters."""
    digest, found = hashlib.sha256(), False
    for module in reachable(denoiser, leaf=lambda one: isinstance(one, (nn.Module, Tensor, DeviceMesh))):
        if not isinstance(module, nn.Module):
            continue
        for name, value in module.state_dict().items():
            if not isinstance(value, Tensor):
                continue
            found = True
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(sampled_bytes(value))
    return digest.hexdigest()[:16] if found else f"no torch module in {type(denoiser).__qualname__}"


def sampled_bytes(value: Tensor) -> bytes:
    """Some of a tensor's elements, spread evenly."""
    local = value.to_local() if isinstance(value, DTensor) else value
    if local.is_meta or local.numel() == 0:
        return b""
    flat = local.detach().flatten()
    return bytes(flat[:: max(len(flat) // _SAMPLED, 1)][:_SAMPLED].contiguous().view(torch.uint8).cpu().tolist())


@contextmanager
def process_group(timeout: float = 600.0) -> Iterator[torch.device]:
    """The process group that torchrun asks for, within the block; yields this process's device.

    NCCL and the GPU of the local rank where there are GPUs, else gloo and the CPU.

    Args:
        timeout: seconds to wait for the other processes to start, and for any collective. Longer than the denoiser's:
            NCCL ends a process whose collective takes longer than this, with no error that could be caught.

    Raises:
        RuntimeError: the process was not started by torchrun.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise RuntimeError(
            "process_group: start this script with torchrun, for example: torchrun --nproc-per-node 2 ..."
        )
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout))
    try:
        yield device
    finally:
        dist.destroy_process_group()
