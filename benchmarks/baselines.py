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
    """The sample after an iteration, (batch, *event), and what it took for each sample of the batch."""

    sample: Tensor
    rounds: int
    evaluations: int


def parareal(
    denoiser: Callable[[Tensor, Tensor], Tensor], x_T: Tensor, timesteps: NDArray[np.int64], step_rule: StepRule
) -> Iterator[Iterate]:
    """Self-refining diffusion sampling: about sqrt(N) blocks, each with a coarse step and sqrt(N) fine ones.

    ``x[b + 1] = fine(x[b]) + coarse(x[b]) - coarse_before(x[b])``; the coarse sweep is sequential, the fine steps of
    all blocks run side by side. The call that a coarse step makes serves the block's first fine step too. For
    deterministic one-step rules.

    Reference: Selvam, Merchant, Ermon, "Self-Refining Diffusion Samplers", NeurIPS 2024
    (https://arxiv.org/abs/2412.08292).
    """
    n = len(timesteps)
    edges = np.unique(np.round(np.linspace(0, n, round(n**0.5) + 1)).astype(int))
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
    rounds = evaluations = blocks
    yield Iterate(states[-1], rounds, evaluations)
    for done in range(blocks):
        ends = list(states[:-1])
        for k in range(int(np.max(np.diff(edges)))):
            active = [b for b in range(done, blocks) if edges[b] + k < edges[b + 1]]
            if not active:  # the blocks that are left are shorter
                break
            nodes = [int(edges[b]) + k for b in active]
            if k == 0:
                found = [outputs[b] for b in active]
            else:
                found = call([ends[b] for b in active], nodes)
                rounds, evaluations = rounds + 1, evaluations + len(active)
            for b, node, m in zip(active, nodes, found, strict=True):
                ends[b] = fine.advance(node, [ends[b]], [m])
        states[done + 1] = ends[done]
        for b in range(done + 1, blocks):
            outputs[b] = call([states[b]], [int(edges[b])])[0]
            new = coarse.advance(b, [states[b]], [outputs[b]])
            states[b + 1] = ends[b] + new - jumps[b]
            jumps[b] = new
            rounds, evaluations = rounds + 1, evaluations + 1
        yield Iterate(states[-1], rounds, evaluations)
