"""Several devices in one process: a replica of the network on each, a thread each, the rows of a round dealt out.

For notebooks and tools, where torchrun is not at hand; :mod:`parasolver_adapters.distributed` has a process a device.

Example::

    networks = [copy.deepcopy(model).to(f"cuda:{i}") for i in range(torch.cuda.device_count())]
    solution = solve(MultiDeviceDenoiser(networks), x_T, timesteps, DDIM(schedule), window=16)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from parasolver_adapters.distributed import WorkersDisagreeError, fingerprint, shares
from parasolver_core.arrays import Array
from parasolver_core.denoiser.calls import BatchedCall
from parasolver_core.denoiser.contract import DenoiserFn, Rows, SharedDenoiser, takes_rows
from parasolver_core.errors import note
from parasolver_core.introspection import reachable
from parasolver_core.validation import check_count


class MultiDeviceDenoiser(SharedDenoiser):
    """A denoiser whose rows are shared among replicas of a network on several devices, in this process.

    Args:
        networks: denoisers ``denoiser(x, t)``, in their final form, one for each device and alike.
        devices: where each computes; None: where its parameters are. A network without parameters computes where the
            rows are.

    Other arguments:
        max_rows: the most rows in one call of one replica. None: no limit. Halved for a replica whose memory runs out.

    Raises:
        WorkersDisagreeError: at the start of a run, if the replicas are not of the same network.
        Exception: whatever a replica raises, once all of them have returned, with a note that names it.
    """

    def __init__(
        self, networks: Sequence[DenoiserFn], devices: Sequence[Any] | None = None, *, max_rows: int | None = None
    ) -> None:
        self._networks = list(networks)
        if not self._networks:
            raise ValueError("networks: expected at least one, got none")
        for network in self._networks:
            if not callable(network):
                raise TypeError(f"networks: expected callables denoiser(x, t), got {type(network).__name__}")
        check_count("max_rows", max_rows, optional=True)
        if devices is not None and len(devices) != len(self._networks):
            raise ValueError(f"devices: expected one for each of {len(self._networks)} networks, got {len(devices)}")
        self._where = (
            [_device_of(network) for network in self._networks] if devices is None else list(map(_named, devices))
        )
        self._local = [BatchedCall(network, max_rows) for network in self._networks]
        self._calls = 0

    @property
    def takes_rows(self) -> bool:
        return takes_rows(self._networks[0])

    @property
    def devices(self) -> int:
        return len(self._networks)

    @property
    def max_rows(self) -> int | None:
        return min((call.max_rows for call in self._local if call.memory_ran_out and call.max_rows), default=None)

    def begin(self, plan: Mapping[str, str]) -> None:
        first, *others = [fingerprint(network) for network in self._networks]
        for i, other in enumerate(others, start=1):
            if other != first:
                raise WorkersDisagreeError(
                    f"networks: expected replicas of one network, but those at 0 and {i} differ in shapes, dtypes or "
                    "weights"
                )

    def agree(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def __call__(self, x: Tensor, t: Tensor, rows: Rows | None = None, /) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x_T: several devices need a torch tensor, got {type(x).__name__}")
        self._calls += 1
        rows, modes = _one_at_a_time(rows), _modes(x.device)
        jobs: dict[int, Future[Tensor]] = {}
        with ThreadPoolExecutor(self.devices, thread_name_prefix="parasolver") as pool:  # waits for all on leaving
            for i, part in enumerate(shares(len(x), self.devices)):
                if part.stop > part.start:
                    rows_of_part = None if rows is None else rows[part]
                    jobs[i] = pool.submit(self._evaluate, i, x[part], t[part], rows_of_part, modes)
        failed = {i: job.exception() for i, job in jobs.items() if job.exception() is not None}
        for i, error in failed.items():
            assert error is not None
            note(error, f"raised by replica {i} of {self.devices}, on {self._place(i)}, in call {self._calls}")
            for j, other in failed.items():
                if j > i:
                    note(error, f"replica {j} failed as well: {type(other).__name__}: {other}")
            raise error
        return torch.cat([job.result() for job in jobs.values()])

    def _evaluate(self, i: int, x: Tensor, t: Tensor, rows: Rows | None, modes: list[Any]) -> Tensor:
        """A replica's rows, on the device of ``x``; in the replica's thread."""
        device = self._where[i] or x.device
        on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with _entered(modes), on_device:  # the caller's stream makes its card the current one
            return self._local[i](x.to(device), t.to(device), rows).to(x.device)

    def _place(self, i: int) -> str:
        return str(self._where[i] or "the device of the rows")


def _named(device: Any) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"devices: expected devices of torch, such as cuda:1, got {device!r}: {error}") from None


def _device_of(network: Any) -> torch.device | None:
    """Where the parameters are that a denoiser refers to."""
    for module in reachable(network, leaf=lambda value: isinstance(value, (nn.Module, Tensor))):
        if isinstance(module, nn.Module):
            for value in module.parameters():
                return value.device
    return None


def _one_at_a_time(rows: Rows | None) -> Rows | None:
    """Rows whose noise threads may ask for together."""
    if rows is None:
        return None
    lock, noise = threading.Lock(), rows.noise

    def locked(step: int, sample: int) -> Array:
        with lock:
            return noise(step, sample)

    return replace(rows, noise=locked)


def _modes(device: torch.device) -> list[Any]:
    """What a thread has to be told of the one that starts it: contexts, each to be made when it is entered."""
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    modes: list[Any] = [lambda: torch.inference_mode(inference), lambda: torch.set_grad_enabled(grad)]
    if device.type == "cuda":  # copies from one card to another run on streams of both, and wait for each other there
        stream = torch.cuda.current_stream(device)
        modes.append(lambda: torch.cuda.stream(stream))
    for kind in {device.type, "cpu"} - {"meta"}:
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            modes.append(lambda kind=kind, dtype=dtype: torch.autocast(kind, dtype))
    return modes


@contextmanager
def _entered(modes: Sequence[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for make in modes:
            stack.enter_context(make())
        yield
