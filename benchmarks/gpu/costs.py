"""What a batch costs: milliseconds of k nodes, plain and as a captured graph, for networks of real size."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.device import Lab
from benchmarks.gpu.networks import NETWORKS, Make, Network

PART = "costs"
NODES = (1, 2, 3, 4, 8, 16, 32, 64)
LONGEST = 2000.0  # ms of a call: more rows than that are left out
HIDDEN = 120.0  # ms: a call so long hides its launches, and a graph of it saves nothing


def timed(lab: Lab, network: Network, k: int) -> dict[str, Any]:
    """A line of results for k nodes; inputs change from call to call."""
    inputs = [
        (torch.randn(k, *network.event, device=lab.device), torch.randint(0, 1000, (k,), device=lab.device))
        for _ in range(2)
    ]
    calls = 0

    def plain() -> None:
        nonlocal calls
        calls += 1
        network.nodes(*inputs[calls % 2])

    values: dict[str, Any] = {"ok": True, "k": k, "plain": lab.milliseconds(plain)}
    if values["plain"] < HIDDEN:
        x, t = (one.clone() for one in inputs[0])
        replay, output = lab.captured(lambda: network.nodes(x, t))

        def captured() -> None:
            nonlocal calls
            calls += 1
            x.copy_(inputs[calls % 2][0])
            t.copy_(inputs[calls % 2][1])
            replay()

        values["captured"] = lab.milliseconds(captured)
        values["ok"] = bool(torch.isfinite(output).all())
    return values


def measured(lab: Lab, name: str, make: Make, reserved: float) -> dict[str, Any]:
    """A line for each row count that fits in the time that is left beside ``reserved``, and what the network is."""
    network = make(lab.device, lab.tiny)
    last = 0.0
    for k in NODES[: 2 if lab.tiny else None]:
        guess = 2 * last
        if guess > LONGEST or lab.left - reserved < 5e-3 * guess:
            lab.put(PART, name, k=k, ok=False, error=f"left out: about {guess:.0f} ms a call")
            break
        values = timed(lab, network, k)
        lab.put(PART, name, **values)
        last = values["plain"]
    weights = list(network.module.parameters())
    return {"ok": True, "parameters": sum(one.numel() for one in weights), "dtype": str(weights[0].dtype)}


def run(lab: Lab) -> None:
    """Network after network, each with its share of the time."""
    with torch.no_grad():
        for place, (name, make) in enumerate(NETWORKS.items()):
            rest = len(NETWORKS) - place - 1
            reserved = lab.left * rest / (rest + 1)
            lab.measure(PART, name, lambda n=name, m=make, r=reserved: measured(lab, n, m, r))
