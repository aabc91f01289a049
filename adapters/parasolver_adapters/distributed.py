"""Several devices: the rows of a round shared among the processes of a torch.distributed group.

Every process runs the same solver on the same arguments and gets the same sample; none of them is special. What they
tell each other, predictions and errors, is in :mod:`~parasolver_adapters.exchange`, so that an exception anywhere
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from parasolver_adapters.exchange import (
    Header,
    Kind,
    WorkerError,
    WorkerLostError,
    WorkersDisagreeError,
    exchange_of,
    lost_groups,
    sketch,
)
from parasolver_core import __version__
from parasolver_core.denoiser.calls import BatchedCall
from parasolver_core.denoiser.contract import DenoiserFn, Rows, SharedDenoiser, predicted_by, takes_rows
from parasolver_core.introspection import reachable

__all__ = ["DistributedDenoiser", "WorkerError", "WorkerLostError", "WorkersDisagreeError", "process_group"]

_SAMPLED = 64  # elements of each parameter that the fingerprint reads


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
        self._exchange = exchange_of(self._group)
        self._denoiser, self._timeout = denoiser, timeout
        self._local = BatchedCall(denoiser, max_rows)
        self._calls, self._running = 0, False

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return self._exchange.rank

    @property
    def takes_rows(self) -> bool:
        return takes_rows(self._denoiser)

    @property
    def prediction_type(self) -> str | None:
        return predicted_by(self._denoiser)

    @property
    def devices(self) -> int:
        return self._exchange.size

    @property
    def max_rows(self) -> int | None:
        return self._local.max_rows if self._local.memory_ran_out else None

    def begin(self, plan: Mapping[str, str]) -> None:
        mine = {**plan, "network": fingerprint(self._denoiser), "version of parasolver": __version__}
        self._exchange.run += 1
        self._calls, self._running = 0, True
        _compare(self._tell(Kind.BEGIN, mine))

    def agree(self, values: Sequence[float]) -> list[float]:
        figures = self._tell(Kind.AGREE, list(values))
        if len({len(listed) for listed in figures}) > 1:
            raise WorkersDisagreeError(
                f"the processes have come apart: they compare {[len(listed) for listed in figures]} figures"
            )
        return [max(column) for column in zip(*figures, strict=True)]

    def end(self, error: BaseException | None = None) -> None:
        begun, self._running = self._running, False
        if self._exchange.lost or isinstance(error, WorkerError):
            return  # the others know, or cannot be reached
        if not begun:  # refused before its first round, as in the others or alone
            self._exchange.run, self._calls = self._exchange.run + 1, 0
        if error is None:
            self._meet(Kind.END)
            return
        try:
            self._meet(Kind.LEFT, _text(error))
        except WorkerError as unheard:
            error.add_note(f"the other processes could not be told: {unheard}")

    def __call__(self, x: Tensor, t: Tensor, rows: Rows | None = None, /) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x_T: several devices need a torch tensor, got {type(x).__name__}")
        if not self._running:  # called by something other than the solver, or wrapped: at least the shapes are compared
            self.begin({"shape and dtype of x": f"{tuple(x.shape)}, {x.dtype}"})
        self._calls += 1
        parts = shares(x.shape[0], self.devices)
        mine, most = parts[self.rank], max(part.stop - part.start for part in parts)
        content = torch.zeros(-(-most * _row_bytes(x) // 16) * 16, dtype=torch.uint8, device=x.device)
        if mine.stop > mine.start:
            try:
                output = self._local(x[mine], t[mine], None if rows is None else rows[mine])
            except Exception as raised:
                self._fail(raised, x)
            values = output.contiguous().flatten().view(torch.uint8)
            content[: len(values)] = values
        packets = zip(self._meet(Kind.CALL, content, x), parts, strict=True)
        ends = [(packet, (part.stop - part.start) * _row_bytes(x)) for packet, part in packets]
        return torch.cat([packet[:end].to(x.device).view(x.dtype) for packet, end in ends]).view(x.shape)

    def _fail(self, error: Exception, x: Tensor) -> NoReturn:
        """Tell the others of an exception of the network, which ends the run in all of them."""
        try:
            self._meet(Kind.FAILED, _text(error), x)
        except WorkerError as answer:
            raise answer from error
        raise AssertionError("a failed call ends the run") from error

    def _meet(self, kind: Kind, content: Tensor | None = None, x: Tensor | None = None) -> list[Tensor]:
        """Every process's content, once all have come for the same."""
        rows, seen = (0, None) if x is None else (x.shape[0], sketch(x))
        header = Header(kind, self._exchange.run, self._calls, rows, sketch=seen)
        content = torch.zeros(0, dtype=torch.uint8) if content is None else content
        content = content.to(self._exchange.device(content.device if x is None else x.device))
        return self._exchange.meet(header, content, self._timeout)

    def _tell(self, kind: Kind, message: Any) -> list[Any]:
        """What all processes say, by rank."""
        text = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        return [json.loads(content.cpu().numpy().tobytes()) for content in self._meet(kind, text)]


def _compare(messages: list[dict[str, Any]]) -> None:
    names = dict.fromkeys(name for message in messages for name in message)
    differing = {name: [message.get(name, "nothing") for message in messages] for name in names}
    differing = {name: values for name, values in differing.items() if len(set(values)) > 1}
    if differing:
        differences = "; ".join(
            f"{name}: " + ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
            for name, values in differing.items()
        )
        raise WorkersDisagreeError(
            f"the processes must be given the same arguments and network, but differ in {differences}"
        )


def _text(error: BaseException) -> Tensor:
    """An exception with its notes."""
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return torch.frombuffer(bytearray(f"{type(error).__name__}: {error}{notes}".encode()), dtype=torch.uint8)


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
    for module in reachable(denoiser, leaf=lambda value: isinstance(value, (nn.Module, Tensor, DeviceMesh))):
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
        timeout: seconds to wait for the other processes to start, and for any collective; longer than the denoiser's.

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
    limit = timedelta(seconds=timeout)
    if on_gpu:
        # a process that is lost is told to the others as an exception; NCCL's watchdog would end them
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        dist.init_process_group("nccl", timeout=limit, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=limit)
    try:
        yield device
    finally:
        lost = lost_groups()
        if lost and on_gpu:  # destroying would wait for the lost process, in every group that it was in
            dist.distributed_c10d._abort_process_group()
        else:
            for group in lost:
                group.abort()  # who has lost a process does not wait for what it has begun
            dist.destroy_process_group()
