"""A pipeline's rounds shared by several processes: each makes some of the network's calls, and all see all outputs.

Every process runs the pipeline itself, with the same arguments. What lies between two network calls (guidance, the
scheduler, the solver) is done in each of them; the rows of the network calls are dealt out. So all processes see the
same numbers, to the last bit, and come to the same sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from parasolver_adapters.diffusers.recording.batching import Forward, Networks, RecordedDenoiser
from parasolver_adapters.diffusers.recording.capture import Reference
from parasolver_adapters.diffusers.recording.programs import Call, Program
from parasolver_adapters.distributed import DistributedDenoiser, sampled_bytes
from parasolver_core.denoiser.contract import SharedDenoiser


class SharedNetworks(Networks):
    """The calls of many nodes, of which each process makes its share.

    Args:
        forwards, references: as in :class:`~parasolver_adapters.diffusers.recording.batching.Networks`.
        modules: the networks.
        group: the processes.
        timeout: seconds that a process waits for the others.
    """

    def __init__(
        self,
        forwards: dict[int, Forward],
        references: dict[tuple[Any, ...], Reference],
        modules: list[torch.nn.Module],
        group: dist.ProcessGroup,
        timeout: float,
    ) -> None:
        super().__init__(forwards, references)
        self.modules = modules  # their parameters are compared
        self._request: tuple[Call, list[list[Any]]] | None = None
        self.processes = DistributedDenoiser(self._some, group, timeout=timeout)

    def _batch(self, call: Call, nodes: list[list[Any]]) -> list[list[Any]]:
        form = self._references[call.signature[0]].outputs
        tensors = [output for output in form if isinstance(output, torch.Tensor)]
        room = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        blank = torch.zeros(len(nodes), room, dtype=torch.uint8, device=tensors[0].device)
        self._request = call, nodes
        rows = self.processes(blank, torch.arange(len(nodes), device="cpu"))
        return [_unpacked(row, form) for row in rows]

    def _some(self, blank: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
        """The outputs of some nodes, made by this process, as bytes: one row a node."""
        assert self._request is not None
        call, every = self._request
        return torch.stack(
            [_packed(outputs) for outputs in super()._batch(call, [every[node] for node in nodes.tolist()])]
        )


class SharedSteps(RecordedDenoiser, SharedDenoiser):
    """The recorded steps, with networks that several processes share; what those have recorded is compared."""

    def __init__(
        self, programs: Sequence[Program], first: torch.Tensor, networks: SharedNetworks, correct: Any
    ) -> None:
        super().__init__(programs, first, networks, correct)
        self._processes = networks.processes

    @property
    def devices(self) -> int:
        return self._processes.devices

    @property
    def max_rows(self) -> int | None:
        return self._processes.max_rows

    def begin(self, plan: Mapping[str, str]) -> None:
        self._processes.begin({**plan, "steps and conditions": _described(self._programs)})

    def agree(self, values: Sequence[float]) -> list[float]:
        return self._processes.agree(values)

    def end(self, error: BaseException | None = None) -> None:
        self._processes.end(error)


def modules_of(programs: Sequence[Program]) -> list[torch.nn.Module]:
    """The networks that the steps call, each once."""
    calls = (operation for program in programs for operation in program.operations if isinstance(operation, Call))
    return list({id(call.module): call.module for call in calls}.values())


def _packed(outputs: list[Any]) -> torch.Tensor:
    tensors = [output for output in outputs if isinstance(output, torch.Tensor)]
    return torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors])


def _unpacked(row: torch.Tensor, form: list[Any]) -> list[Any]:
    """The outputs of one node; what is no tensor is as in the known call."""
    outputs, start = [], 0
    for output in form:
        if isinstance(output, torch.Tensor):
            end = start + output.numel() * output.element_size()
            part = row[start:end].clone()  # aligned
            outputs.append(part.view(output.dtype).view(output.shape))
            start = end
        else:
            outputs.append(output)
    return outputs


def _described(programs: Sequence[Program]) -> str:
    """A short hash of what the steps do: their operations, numbers, and samples of their large constants."""
    digest, seen = hashlib.sha256(), set()
    for operation in (operation for program in programs for operation in program.operations):
        if isinstance(operation, Call):
            name, leaves = type(operation.module).__qualname__, operation.leaves
        else:
            name, leaves = str(operation.function), tree_leaves((operation.args, operation.kwargs))
        digest.update(name.encode())
        for value in leaves:
            if isinstance(value, (bool, int, float, str)):
                digest.update(repr(value).encode())
            elif isinstance(value, torch.Tensor) and value.ndim > 1 and id(value) not in seen:
                seen.add(id(value))  # what all steps share is one object
                digest.update(f"{tuple(value.shape)} {value.dtype}".encode() + sampled_bytes(value))
    return digest.hexdigest()[:16]
