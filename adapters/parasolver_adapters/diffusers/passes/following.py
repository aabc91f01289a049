"""Whether the table of a scheduler follows what the loop does to the state between two steps.

The recurrence knows the states that steps return, and the loop may give the next step another one. What that is worth
is put into the network's output. For a scheduler that reads one state and one output this is exact. One that remembers
more takes it up right only where the loop sets a part of the state anew at every step from then on (inpainting), or
where the scheduler reads the state through its predicted sample alone (UniPC).
"""

from __future__ import annotations

import torch

from parasolver_adapters.diffusers.passes.first_pass import Capture
from parasolver_adapters.diffusers.refusal import PipelineNotParallelError
from parasolver_adapters.diffusers.schedulers.rule import SchedulerRule
from parasolver_adapters.diffusers.schedulers.stepping import Node
from parasolver_adapters.draws import Float64, no_noise

_SINGLE = 1e-6  # tables of schedulers are float32


def refuse_what_is_not_followed(capture: Capture) -> None:
    """Run the scheduler and its table side by side, with the loop's changes and a network of about the right slope."""
    table, programs = capture.rule.table, capture.programs
    if capture.unchanged or table.memory == 1:
        return
    name = type(capture.scheduler).__name__

    def changed(i: int, state: torch.Tensor) -> torch.Tensor:
        """What the loop gives step ``i``, of the state that the step before it has returned."""
        if not 0 < i <= len(programs):
            return state
        x = programs[i - 1].sample(state.to(capture.start.device))
        if x is None:
            raise PipelineNotParallelError(
                f"the loop changes the state by what the network says, and {name} reads earlier states, too; take a "
                "scheduler that reads one (DDIM, DDPM, Euler)"
            )
        return x.to("cpu", torch.float64)

    stream = torch.Generator().manual_seed(0)
    start = capture.start.to("cpu", torch.float64)

    def network(node: Node) -> torch.Tensor:  # states stay in the range of half precision
        return node.x * float(table.slope[node.index]) + torch.randn(start.shape, generator=stream, dtype=start.dtype)

    states, outputs, given = [start], [], start
    limit = max(torch.finfo(capture.first.dtype).eps ** 0.5, torch.finfo(capture.start.dtype).eps ** 0.5, _SINGLE)
    for node, m, output in capture.rule.loop.run(network, start, Float64(no_noise), changed=changed):
        outputs.append(m + (given - states[-1]) * worth(capture.rule, node.index))
        states.append(table.advance(node.index, states[::-1], outputs[::-1]))
        if node.index == len(programs):
            return
        given, real = (changed(node.index + 1, state) for state in (states[-1], output.prev_sample))
        error = float((given - real).norm() / real.norm())
        if not error <= limit:
            raise PipelineNotParallelError(
                f"the loop changes the state before step {node.index + 1}, and {name}, which reads earlier states, "
                f"too, goes on otherwise than its table (by {error:.2g}); take a scheduler that reads one (DDIM, DDPM, "
                "Euler), or set the same part of the state anew after every step"
            )


def worth(rule: SchedulerRule, node: int) -> float:
    """What a change of x is worth in outputs."""
    table = rule.table
    one_step = table.memory == 1 and table.b[node, 0] != 0
    return float(table.a[node, 0] / table.b[node, 0] if one_step else table.held[node, 0] / table.held[node, 1])
