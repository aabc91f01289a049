"""The recorded steps as a denoiser: all nodes of a round together, their network calls made as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from parasolver_adapters.diffusers.recording.capture import Reference
from parasolver_adapters.diffusers.recording.programs import Call, Program
from parasolver_adapters.diffusers.recording.standins import dense
from parasolver_adapters.diffusers.recording.together import Together
from parasolver_adapters.diffusers.refusal import PipelineNotParallelError
from parasolver_core import Rows, SolverError

Forward = Callable[..., Any]


class Networks:
    """Calls of the pipeline's networks for many nodes at once.

    Conditioning is repeated once, for the largest round, and not in every round. The first batch of each form holds one
    row more, whose output is known from the pipeline's own call: so arguments that were wrongly taken for a batch, and
    networks that mix the rows of a batch, are found.

    Args:
        forwards: each network's forward, by its id.
        references: calls that were made by the pipeline itself.
    """

    def __init__(self, forwards: dict[int, Forward], references: dict[tuple[Any, ...], Reference]) -> None:
        self._forwards, self._references = forwards, references
        self._repeated: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._checked: set[tuple[Any, ...]] = set()
        self._comparable: dict[tuple[Any, ...], Reference | None] = {}
        self.calls = 0

    def together(self, requests: Sequence[tuple[Call, list[Any]]]) -> list[list[Any]]:
        """The outputs of these calls, each flattened; calls of one signature are made as one."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for at, (call, _) in enumerate(requests):
            groups.setdefault(call.signature, []).append(at)
        outputs: list[list[Any]] = [[]] * len(requests)
        for members in groups.values():
            call = requests[members[0]][0]
            results = self._group(call, [requests[at][1] for at in members])
            for at, result in zip(members, results, strict=True):
                outputs[at] = result
        return outputs

    def _group(self, call: Call, nodes: list[list[Any]]) -> list[list[Any]]:
        reference = None if call.signature in self._checked else self.reference(call)
        together = nodes if reference is None else [*nodes, reference.leaves]
        try:
            results = self._batch(call, together)
        except (RuntimeError, ValueError, IndexError) as error:
            known = call.signature in self._checked or len(together) == 1
            if known or isinstance(error, (torch.OutOfMemoryError, SolverError)):  # the latter of another process
                raise
            raise PipelineNotParallelError(
                f"{type(call.module).__name__} fails for a batch of several steps: {type(error).__name__}: {error}"
            ) from error
        if reference is not None:
            compare_rows(call, results.pop(), reference.outputs)
            self._checked.add(call.signature)
        return results

    def reference(self, call: Call) -> Reference | None:
        """The known call, if it could be part of this batch; looked for once, as numbers on a device are waited for."""
        if call.signature not in self._comparable:
            self._comparable[call.signature] = self._find_reference(call)
        return self._comparable[call.signature]

    def _find_reference(self, call: Call) -> Reference | None:
        reference = self._references.get(call.signature[0])
        if reference is None:
            return None
        rest = zip(call.leaves, reference.leaves, call.batched, strict=True)
        same = all(
            by_rows or (torch.equal(leaf, known) if isinstance(leaf, torch.Tensor) else leaf is known or leaf == known)
            for leaf, known, by_rows in rest
        )
        return reference if same else None

    def _batch(self, call: Call, nodes: list[list[Any]]) -> list[list[Any]]:
        self.calls += 1
        with nullcontext() if call.autocast is None else call.autocast.again():
            return self._forward(call, nodes)

    def _forward(self, call: Call, nodes: list[list[Any]]) -> list[list[Any]]:
        forward = self._forwards[id(call.module)]
        if len(nodes) == 1:
            args, kwargs = tree_unflatten(nodes[0], call.spec)
            return [[dense(output) for output in tree_flatten(forward(*args, **kwargs))[0]]]
        leaves = [
            self._rows(call, [node[at] for node in nodes]) if by_rows else nodes[0][at]
            for at, by_rows in enumerate(call.batched)
        ]
        args, kwargs = tree_unflatten(leaves, call.spec)
        outputs = [dense(output) for output in tree_flatten(forward(*args, **kwargs))[0]]
        return [list(parts) for parts in zip(*(_split(call, output, len(nodes)) for output in outputs), strict=True)]

    def _rows(self, call: Call, values: list[torch.Tensor]) -> torch.Tensor:
        """One argument of all nodes, ``(nodes x rows, ...)``."""
        first = values[0]
        if first.ndim == 0 or (first.numel() == 1 and first.shape[0] != call.rows):  # one number for all rows of a node
            values = [value.reshape(-1).expand(call.rows) for value in values]
            return torch.cat(values)
        if first.ndim > 1 and all(value is first for value in values):
            return self._repeat(first, len(values))
        return torch.cat(values)

    def _repeat(self, constant: torch.Tensor, count: int) -> torch.Tensor:
        known = self._repeated.get(id(constant))
        wanted = count * constant.shape[0]
        if known is None or known[1].shape[0] < wanted:
            known = constant, constant.repeat(count, *[1] * (constant.ndim - 1))
            self._repeated[id(constant)] = known
        return known[1][:wanted]


class RecordedDenoiser:
    """``denoiser(x, nodes, rows) -> m`` of the recorded steps; a row of x is the state of the whole batch at one node.

    It takes the rows for the nodes' numbers, which are wanted on the host: those on the device would be waited for.

    Args:
        programs: one for each node but the first.
        first: the first node's output, known from the pipeline's own call at its only input.
        networks: makes the calls.
        correct: ``correct(nodes, states, x, m)``, of some rows: the outputs that the recurrence is to be given in place
            of m; x are the states as the loop has changed them, or None.
    """

    takes_rows = True

    def __init__(
        self,
        programs: Sequence[Program],
        first: torch.Tensor,
        networks: Networks,
        correct: Callable[[list[int], torch.Tensor, torch.Tensor | None, torch.Tensor], torch.Tensor],
    ) -> None:
        self._programs, self._first, self._networks, self._correct = programs, first, networks, correct
        self._steps = Together(programs)
        self.outputs: dict[int, torch.Tensor] = {}  # of each node, as the pipeline would give it to its scheduler
        self.answers: dict[int, list[tuple[Any, list[Any]]]] = {}  # its network calls, in order: their form and outputs

    def __call__(self, x: torch.Tensor, nodes: torch.Tensor, rows: Rows | None = None, /) -> torch.Tensor:
        numbers = nodes.tolist() if rows is None else rows.steps.tolist()
        groups: dict[Any, list[int]] = {}
        for row, node in enumerate(numbers):
            groups.setdefault(self._steps.kind(node - 1) if node > 0 else None, []).append(row)
        first = len(groups.get(None, ()))
        results = self._run(groups, numbers, x) | {None: (None, self._first.expand(first, *self._first.shape))}
        corrected: list[Any] = [None] * len(numbers)
        for kind, group in groups.items():
            x_of_group, m_of_group = results[kind]
            of_group = [numbers[row] for row in group]
            self.outputs.update(zip(of_group, m_of_group.unbind(), strict=True))
            parts = self._correct(of_group, _chosen(x, group), x_of_group, m_of_group.to(x.dtype)).unbind()
            for row, part in zip(group, parts, strict=True):
                corrected[row] = part
        return torch.stack(corrected)

    def _run(self, groups: dict[Any, list[int]], numbers: list[int], x: torch.Tensor) -> dict[Any, tuple[Any, Any]]:
        """``(x, m)`` of the rows of each group; their network calls are made together."""
        self.answers.update({node: [] for node in numbers})
        runs = {
            kind: self._steps.run([numbers[row] - 1 for row in group], _chosen(x, group))
            for kind, group in groups.items()
            if kind is not None
        }
        results: dict[Any, tuple[Any, Any]] = {}
        waiting: dict[Any, Any] = dict.fromkeys(runs)
        while waiting:
            requests = {}
            for kind, sent in waiting.items():
                try:
                    requests[kind] = runs[kind].send(sent)
                except StopIteration as end:
                    results[kind] = end.value
            outputs = iter(
                self._networks.together([request for requested in requests.values() for request in requested])
            )
            waiting = {kind: [next(outputs) for _ in requested] for kind, requested in requests.items()}
            for kind, requested in requests.items():
                for row, (call, _), output in zip(groups[kind], requested, waiting[kind], strict=True):
                    self.answers[numbers[row]].append((call.signature[0], output))
        return results


def _chosen(x: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """These rows, in rising order, without an index that the device would have to be sent."""
    return x if len(rows) == len(x) else torch.stack([x[row] for row in rows])


def _split(call: Call, output: Any, count: int) -> Sequence[Any]:
    if not isinstance(output, torch.Tensor):
        return [output] * count
    if output.ndim == 0 or output.shape[0] % count:
        raise PipelineNotParallelError(
            f"{type(call.module).__name__} returns a tensor of shape {tuple(output.shape)} for a batch of {count} steps"
        )
    return output.chunk(count)


def compare_rows(call: Call, batched: list[Any], alone: list[Any]) -> None:
    """The outputs of a node of a batch have to be those of a call for it alone."""
    for got, want in zip(batched, alone, strict=True):
        if isinstance(want, torch.Tensor) and want.is_floating_point():
            _compare(call, got, want)


def _compare(call: Call, got: torch.Tensor, want: torch.Tensor) -> None:
    difference, size = float((got - want).abs().max()), float(want.abs().max())
    if not difference <= torch.finfo(want.dtype).eps ** 0.5 * size:
        raise PipelineNotParallelError(
            f"{type(call.module).__name__} gives other values in a batch of several steps than alone (by "
            f"{difference / size if size else difference:.2g} of their size); it mixes the rows of a batch, is not "
            "deterministic, is changed by the loop between its calls, or takes arguments whose batch could not be told"
        )
