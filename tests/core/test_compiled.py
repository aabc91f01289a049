"""``solve`` inside a function that ``torch.compile`` compiles: left out of the graph, with the same result."""

from typing import Any

import pytest
import torch

from parasolver_core import DDIM, NoiseSchedule, ParallelIntegralSolver, SequentialSolver, solve, solve_sequential
from tests.core.problems import normal

SCHEDULE = NoiseSchedule.linear()
STEPS, RULE = SCHEDULE.timesteps(12), DDIM(SCHEDULE)


class Network(torch.nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x / (1 + x * x)


RUNS: dict[str, Any] = {
    "solve": lambda network, x: solve(network, x, STEPS, RULE, 4),
    "solve_sequential": lambda network, x: solve_sequential(network, x, STEPS, RULE),
    "parallel": lambda network, x: ParallelIntegralSolver(RULE, 4).solve(network, x, STEPS),
    "sequential": lambda network, x: SequentialSolver(RULE).solve(network, x, STEPS),
}


@pytest.mark.parametrize(("name", "compiled_network"), [*((name, False) for name in RUNS), ("solve", True)])
def test_a_run_inside_a_compiled_function(name: str, compiled_network: bool) -> None:
    torch._dynamo.reset()
    run, graphs = RUNS[name], []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append({node.name for node in graph.graph.nodes})
        return graph.forward

    network = torch.compile(Network(), backend=backend, dynamic=True) if compiled_network else Network()

    def function(x: torch.Tensor) -> torch.Tensor:
        return run(network, x * 2).sample + 1

    x = torch.asarray(normal((2, 4)))
    expected = run(Network(), x * 2).sample + 1
    got = torch.compile(function, backend=backend)(x)
    assert torch.equal(got, expected)
    before_and_after = [graph for graph in graphs if graph & {"mul", "add"}]
    assert 2 <= len(graphs) <= 2 + 2 * compiled_network, graphs
    assert len(before_and_after) >= 2
    torch._dynamo.reset()


def test_what_wraps_a_run_is_not_seen() -> None:
    assert solve.__name__ == "solve"
    assert "Sample in parallel" in str(solve.__doc__)
