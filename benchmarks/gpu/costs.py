"""What a batch costs: milliseconds of k nodes, plain, as a captured graph and compiled, for networks of real size."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.device import Lab
from benchmarks.gpu.networks import NETWORKS, Make, Network

PART = "costs"
NODES = (1, 2, 3, 4, 8, 16, 32, 64)
LONGEST = 2000.0  # ms of a call: more rows than that are left out
HIDDEN = 120.0  # ms: a call so long hides its launches, and a graph of it saves nothing
COMPILED = ("robot 1-D U-Net", "DiT-XL/2, 256 pixels, guidance")
COMPILED_NODES = (1, 8)
COMPILING = 60.0  # seconds that compiling for one row count may take


class Inputs:
    """Two sets of inputs of k nodes that take turns: calls with the same numbers may be faster."""

    def __init__(self, lab: Lab, network: Network, k: int) -> None:
        self._sets = [
            (torch.randn(k, *network.event, device=lab.device), torch.randint(0, 1000, (k,), device=lab.device))
            for _ in range(2)
        ]
        self._calls = 0

    def next(self) -> tuple[Tensor, Tensor]:
        self._calls += 1
        return self._sets[self._calls % 2]


def timed(lab: Lab, network: Network, k: int) -> dict[str, Any]:
    """A line of results for k nodes."""
    inputs = Inputs(lab, network, k)
    values: dict[str, Any] = {"ok": True, "k": k, "plain": lab.milliseconds(lambda: network.nodes(*inputs.next()))}
    if values["plain"] < HIDDEN:
        x, t = (one.clone() for one in inputs.next())
        replay, output = lab.captured(lambda: network.nodes(x, t))

        def captured() -> None:
            new_x, new_t = inputs.next()
            x.copy_(new_x)
            t.copy_(new_t)
            replay()

        values["captured"] = lab.milliseconds(captured)
        values["ok"] = bool(torch.isfinite(output).all())
    return values


def counted(network: Network, device: torch.device) -> dict[str, Any]:
    """What a node needs at least: operations, and bytes of weights."""
    x, t = torch.randn(1, *network.event, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    with FlopCounterMode(display=False) as flops:
        network.nodes(x, t)
    weights = list(network.module.parameters())
    return {
        "parameters": sum(one.numel() for one in weights),
        "megabytes": sum(one.numel() * one.element_size() for one in weights) / 1e6,
        "gflop": flops.get_total_flops() / 1e9,
        "dtype": str(weights[0].dtype),
    }


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
    return {"ok": True, **counted(network, lab.device)}


def compiled(lab: Lab, name: str, k: int) -> dict[str, Any]:
    """Milliseconds of k nodes by ``torch.compile`` with its own graphs, and the seconds that compiling took."""
    if lab.left < COMPILING and not lab.tiny:
        return {"ok": False, "error": f"no time left to compile: {lab.left:.0f} s"}
    network = NETWORKS[name](lab.device, lab.tiny)
    inputs = Inputs(lab, network, k)
    backend: dict[str, Any] = {"mode": "reduce-overhead"} if lab.cuda else {"backend": "eager"}
    nodes: Callable[..., Tensor] = torch.compile(network.nodes, dynamic=False, **backend)
    started = time.perf_counter()
    output = nodes(*inputs.next())
    lab.wait()
    compiling, finite = time.perf_counter() - started, bool(torch.isfinite(output).all())
    found = lab.milliseconds(lambda: nodes(*inputs.next()))
    torch._dynamo.reset()
    return {"ok": finite, "k": k, "compiled": found, "seconds to compile": compiling}


def ceilings(lab: Lab) -> dict[str, Any]:
    """What the card reaches at all: operations of a product of matrices, and bytes of a copy, a second."""
    n, size = (256, 2**20) if lab.tiny else (8192, 2**30)
    a, b = torch.randn(2, n, n, device=lab.device).to(torch.bfloat16)
    source, target = torch.empty(2, size, dtype=torch.uint8, device=lab.device).random_(0, 255)
    product, copy = lab.milliseconds(lambda: a @ b), lab.milliseconds(lambda: target.copy_(source))
    return {"ok": True, "TFLOP/s": 2 * n**3 / product / 1e9, "TB/s": 2 * size / copy / 1e9}


def run(lab: Lab) -> None:
    """Network after network, each with its share of the time; then two of them compiled."""
    with torch.no_grad():
        lab.measure(PART, "ceilings", lambda: ceilings(lab))
        for place, (name, make) in enumerate(NETWORKS.items()):
            rest = len(NETWORKS) - place - 1 + (2 if not lab.tiny else 0)
            reserved = lab.left * rest / (rest + 1)
            lab.measure(PART, name, lambda n=name, m=make, r=reserved: measured(lab, n, m, r))
        for name in COMPILED:
            for k in COMPILED_NODES[: 1 if lab.tiny else None]:
                lab.measure(PART, name, lambda n=name, k=k: compiled(lab, n, k))
