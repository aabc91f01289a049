"""Parareal (SRDS), which does not have the shape of a window, as a baseline for comparisons."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parasolver_core import StepRule


@dataclass(frozen=True)
class Iterate:
    """The sample after an iteration, (batch, *event), and what it took for each sample of the batch.

    Args:
        rounds: the longest chain of calls that waited for one another.
    """

    sample: Tensor
    rounds: int
    evaluations: int


def parareal(
    denoiser: Callable[[Tensor, Tensor], Tensor],
    x_T: Tensor,
    timesteps: NDArray[np.int64],
    step_rule: StepRule,
    blocks: int | None = None,
) -> Iterator[Iterate]:
    """Self-refining diffusion sampling: blocks, about sqrt(N) of them, each with a coarse step and its fine ones.

    ``x[b + 1] = fine(x[b]) + coarse(x[b]) - coarse_before(x[b])``. The call that a coarse step makes serves the block's
    first fine step too. Pipelined, with as many rows in a call as there is work for: a block's steps begin as soon as
    its state is known, while the coarse sweep goes on and while other blocks are in earlier iterations. For
    deterministic one-step rules.

    Reference: Selvam, Merchant, Ermon, "Self-Refining Diffusion Samplers", NeurIPS 2024
    (https://arxiv.org/abs/2412.08292).
    """
    n = len(timesteps)
    edges = np.unique(np.round(np.linspace(0, n, (blocks or round(n**0.5)) + 1)).astype(int))
    blocks = len(edges) - 1
    fine, coarse = step_rule.recurrence(timesteps), step_rule.recurrence(timesteps[edges[:-1]])
    if fine.memory > 1 or fine.stochastic:
        raise ValueError("step_rule: Parareal is written for deterministic one-step rules, such as DDIM")

    def call(xs: list[Tensor], nodes: list[int]) -> list[Tensor]:
        t = torch.from_numpy(np.repeat(timesteps[nodes], len(x_T)))
        return list(denoiser(torch.cat(xs), t).split(len(x_T)))

    states, outputs, jumps = [x_T], [], []
    for b in range(blocks):
        outputs += call([states[b]], [int(edges[b])])
        jumps.append(coarse.advance(b, [states[b]], [outputs[b]]))
        states.append(jumps[b])
    known = list(range(blocks + 1))  # after how many rounds each state is
    evaluations = blocks
    yield Iterate(states[-1], known[-1], evaluations)
    for done in range(blocks):
        ends = list(states[:-1])
        ended = [known[b] + int(edges[b + 1] - edges[b]) for b in range(blocks)]
        for k in range(int(np.max(np.diff(edges)))):
            active = [b for b in range(done, blocks) if edges[b] + k < edges[b + 1]]
            if not active:  # the blocks that are left are shorter
                break
            nodes = [int(edges[b]) + k for b in active]
            if k == 0:
                found = [outputs[b] for b in active]
            else:
                found = call([ends[b] for b in active], nodes)
                evaluations += len(active)
            for b, node, m in zip(active, nodes, found, strict=True):
                ends[b] = fine.advance(node, [ends[b]], [m])
        states[done + 1], known[done + 1] = ends[done], ended[done]
        for b in range(done + 1, blocks):
            outputs[b] = call([states[b]], [int(edges[b])])[0]
            new = coarse.advance(b, [states[b]], [outputs[b]])
            states[b + 1] = ends[b] + new - jumps[b]
            jumps[b], known[b + 1] = new, max(ended[b], known[b] + 1)
            evaluations += 1
        yield Iterate(states[-1], known[-1], evaluations)
