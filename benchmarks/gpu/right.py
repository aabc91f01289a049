"""Are the promises kept on this device: dtypes, TF32, graphs, generators, memory, values that are not finite?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.device import Lab, distance
from benchmarks.gpu.rounds import cheap_network
from benchmarks.policy import SCHEDULE, demonstrations, load_policy
from benchmarks.problems import Denoiser
from parasolver_adapters.graphs import GraphCaptureWarning, GraphedDenoiser
from parasolver_core import DDIM, DDPM, NoiseSchedule, NonFiniteError, StepRule, solve, solve_sequential

PART = "right"
LINEAR = NoiseSchedule.linear()
BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of tolerance=0: the network's own rounding
STEPS = 50


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """TF32 products allowed within the block, or not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Case:
    """The diffusion policy on the device."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.rule = DDIM(SCHEDULE, prediction_type="v_prediction")
        self.timesteps = SCHEDULE.timesteps(12 if lab.tiny else STEPS)
        self.x_T = torch.randn(2, 16, 2, generator=torch.Generator().manual_seed(0)).to(lab.device)

    def network(self, dtype: torch.dtype = torch.float32) -> Denoiser:
        policy = load_policy(dtype).to(self.lab.device)
        obstacle = demonstrations(1, torch.Generator().manual_seed(7))[1].to(self.lab.device, dtype)
        return lambda x, t: policy(x, t, obstacle.expand(len(x), -1))

    def promises(
        self, network: Denoiser, x_T: Tensor, bound: float, rule: StepRule | None = None, **options: Any
    ) -> dict[str, Any]:
        """Of ``window=1``, of tolerance 0 to ``bound``, of tolerance 1 %; with noise, of the seed too."""
        rule = rule or self.rule
        noisy = {"seed": list(range(len(x_T)))} if isinstance(rule, DDPM) else {}
        problem = (network, x_T, self.timesteps, rule)
        truth = solve_sequential(*problem, **noisy).sample
        same = bool(torch.equal(solve(*problem, window=1, **noisy).sample, truth))
        zero = distance(solve(*problem, window=8, tolerance=0, **noisy, **options).sample, truth)
        near = solve(*problem, window=16, tolerance=1e-2, **noisy, **options)
        percent = distance(near.sample, truth)
        values = {"same": same, "zero": zero, "percent": percent, "rounds": near.stats.rounds}
        if noisy:
            alone = solve(network, x_T[1:], self.timesteps, rule, window=16, tolerance=0, seed=[1]).sample
            values["alone"] = distance(alone, truth[1:])
        ok = same and zero <= bound and percent <= max(1e-2, bound) and values.get("alone", 0.0) <= bound
        return {"ok": ok, "message": near.message, **values}

    def precision(self, allowed: bool) -> dict[str, Any]:
        """With TF32 products allowed to the network, or not."""
        with tf32(allowed):
            return self.promises(self.network(), self.x_T, 1e-2 if allowed else BOUNDS[torch.float32])

    def own_products(self, allowed: bool) -> dict[str, Any]:
        """A network without a product of matrices: what TF32 changes is the solver's own, and must be nothing."""
        network = cheap_network(self.lab.device)
        event = (4, 8, 8) if self.lab.tiny else (4, 64, 64)
        x_T = torch.randn(2, *event, generator=torch.Generator().manual_seed(0)).to(self.lab.device)
        problem = (network, x_T, LINEAR.timesteps(24 if self.lab.tiny else 250), DDIM(LINEAR))
        truth = solve_sequential(*problem).sample
        with tf32(False):
            usual = solve(*problem, window=16, tolerance=1e-3, check=False)
        with tf32(allowed):
            found = solve(*problem, window=16, tolerance=1e-3, check=False)
        error, rounds = distance(found.sample, truth), found.stats.rounds
        return {"ok": error <= 1e-3 and rounds <= usual.stats.rounds + 1, "error": error, "rounds": rounds}

    def graphed(self) -> dict[str, Any]:
        """The network as graphs: captured on a card, and the promises as before."""
        network = GraphedDenoiser(self.network(), rows=(2, 8, 16, 34))
        values = self.promises(network, self.x_T, BOUNDS[torch.float32])
        return values | {"ok": values["ok"] and not network.failure, "failure": network.failure}

    def not_captured(self) -> dict[str, Any]:
        """A network that waits for the host is called plainly, with a warning on a card."""
        inner = self.network()

        def waiting(x: Tensor, t: Tensor) -> Tensor:
            return inner(x, t) * (1.0 + 0.0 * float(x.abs().max()))

        network = GraphedDenoiser(waiting, rows=(2, 8, 16, 34))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            values = self.promises(network, self.x_T, BOUNDS[torch.float32])
        warned = any(issubclass(one.category, GraphCaptureWarning) for one in told)
        return values | {"ok": values["ok"] and warned == self.lab.cuda, "failure": network.failure}

    def not_finite(self) -> dict[str, Any]:
        """A network that gives NaN near the end has to end the run, with a finite state to go on from."""

        def broken(x: Tensor, t: Tensor) -> Tensor:
            return torch.where((t < 300)[:, None, None], math.nan, 0.1 * x)

        try:
            solve(broken, self.x_T, self.timesteps, self.rule, window=8)
        except NonFiniteError as error:
            return {"ok": bool(torch.isfinite(error.solution.sample).all()), "message": str(error)}
        return {"ok": False, "error": "accepted"}

    def out_of_memory(self) -> dict[str, Any]:
        """Calls of six rows or more do not fit: they have to be halved, and the answer the same."""
        network, lab = self.network(), self.lab
        room = torch.cuda.mem_get_info(lab.device)[0] if lab.cuda else 0
        largest = 0

        def hungry(x: Tensor, t: Tensor) -> Tensor:
            nonlocal largest
            if not lab.cuda and len(x) > 5:
                raise torch.OutOfMemoryError("as on a full device")
            scratch = torch.empty(max(1, len(x) * room // 5), dtype=torch.uint8, device=lab.device)
            largest = max(largest, len(x))
            return network(x, t) + 0 * scratch[:1].float()

        found = solve(hungry, self.x_T, self.timesteps, self.rule, window=16, tolerance=1e-2)
        truth = solve_sequential(network, self.x_T, self.timesteps, self.rule).sample
        error = distance(found.sample, truth)
        return {"ok": error <= 1e-2 and largest < 6, "percent": error, "max_rows": found.stats.max_rows}

    def chosen_window(self) -> dict[str, Any]:
        found = solve(self.network(), self.x_T, self.timesteps, self.rule, window="auto")
        error = distance(found.sample, solve_sequential(self.network(), self.x_T, self.timesteps, self.rule).sample)
        return {"ok": error <= 1e-2, "percent": error, "message": found.message}


def run(lab: Lab) -> None:
    """All of it."""
    case = Case(lab)
    for dtype, bound in BOUNDS.items():
        start = case.x_T.to(dtype)
        lab.measure(PART, f"policy, {dtype}", lambda d=dtype, x=start, b=bound: case.promises(case.network(d), x, b))
    noisy = DDPM(SCHEDULE, prediction_type="v_prediction")
    exact = BOUNDS[torch.float32]
    lab.measure(PART, "policy, DDPM", lambda: case.promises(case.network(), case.x_T, exact, noisy))
    for allowed in (False, True):
        with_tf32 = f"TF32 {'allowed' if allowed else 'off'}"
        lab.measure(PART, f"policy, {with_tf32}", lambda a=allowed: case.precision(a))
        lab.measure(PART, f"the solver's own products, {with_tf32}", lambda a=allowed: case.own_products(a))
    network = case.network()
    lab.measure(PART, "states on the CPU", lambda: case.promises(network, case.x_T, exact, state_device="cpu"))
    lab.measure(PART, "buckets", lambda: case.promises(network, case.x_T, exact, buckets=(2, 8, 16, 34)))
    lab.measure(PART, "network as graphs", case.graphed)
    lab.measure(PART, "network that cannot be captured", case.not_captured)
    lab.measure(PART, "NaN from the network", case.not_finite)
    lab.measure(PART, "out of memory", case.out_of_memory)
    lab.measure(PART, 'window="auto"', case.chosen_window)
