"""What a round asks of a device: a fixed number of operations and uploads, and one wait, for any window and batch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from parasolver_core import DDIM, DDPM, Method, NoiseSchedule, ParallelIntegralSolver, arrays, solve, solve_sequential
from parasolver_core.samplers.noise import NoiseSource, draw
from tests.away import away
from tests.traffic import Traffic

SCHEDULE = NoiseSchedule.linear()


def network(x: Any, t: Any) -> Any:
    return 0.3 * torch.sin(x)


def traffic_of(
    rule: Any, window: int, batch: int, steps: int, spread: bool = False, check: bool = True
) -> Counter[str]:
    """Of the fifth round."""
    with away() as device:
        x_T = torch.randn(batch, 64, generator=torch.Generator().manual_seed(0)).to(device)
        solver = ParallelIntegralSolver(rule(SCHEDULE), window, method=Method(spread=spread), check=check)
        state = solver.init(lambda x, t: network(x, t), x_T, SCHEDULE.timesteps(steps))
        for _ in range(4):
            solver.step(state)
        assert not solver.done(state)
        with Traffic() as traffic:
            solver.step(state)
    return traffic.seen


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("rule", [DDIM, DDPM])
def test_a_round_costs_the_same_for_any_window_and_batch(rule: Any, check: bool) -> None:
    small = traffic_of(rule, 4, 1, 64, check=check)
    assert small["to the host"] == 1
    assert small["to the device"] == (3 if rule is DDIM else 4)
    assert small["operations"] == 16 + 2 + 2 * check  # two are the network's
    for window, batch in ((32, 1), (4, 16), (32, 16)):
        seen = traffic_of(rule, window, batch, 8 * window, check=check)
        seen["operations"] -= check and batch > 1  # inputs are read again, and of one sample are a view
        assert seen == small


def test_a_round_of_spread_nodes_waits_once() -> None:
    seen = traffic_of(DDPM, 32, 4, 500, spread=True)
    assert seen["to the host"] == 1
    assert seen["to the device"] <= 20


@pytest.mark.parametrize("rule", [DDIM, DDPM])
def test_a_step_of_the_plain_loop_waits_once(rule: Any) -> None:
    with away() as device:
        x_T = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(device)
        seen = []
        for steps in (20, 40):
            with Traffic() as traffic:
                solve_sequential(network, x_T, SCHEDULE.timesteps(steps), rule(SCHEDULE))
            seen.append(traffic.seen)
    more = {name: (seen[1][name] - seen[0][name]) / 20 for name in ("to the host", "to the device", "operations")}
    assert more["to the host"] == 1
    assert more["to the device"] == (1 if rule is DDIM else 2)
    assert more["operations"] < 20


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The emulated device taken for a card; the sizes of what was pinned."""
    sizes: list[int] = []
    monkeypatch.setattr(arrays, "_is_card", lambda device: device.type == "meta")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: (sizes.append(self.numel()), self)[1])
    return sizes


@pytest.mark.parametrize("rule", [DDIM, DDPM])
def test_nothing_that_a_round_sends_to_a_card_is_waited_for(rule: Any, pinned: list[int]) -> None:
    seen = traffic_of(rule, 8, 2, 64)
    assert seen["blocking"] == 0
    assert seen["to the device"] == 3 + (rule is DDPM)
    assert len(pinned) >= seen["to the device"]


def test_pinned_memory_changes_nothing(pinned: list[int]) -> None:
    x_T = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    problem = SCHEDULE.timesteps(30), DDPM(SCHEDULE)
    with away() as device:
        got = solve(network, x_T.to(device), *problem, window=8).sample.cpu()
    assert pinned
    want = solve_sequential(network, x_T, *problem).sample
    assert float((got - want).norm() / want.norm()) < 1e-2


def test_a_table_is_brought_to_a_device_once() -> None:
    table = arrays.DeviceTable(np.arange(5.0))
    with away() as device:
        x = torch.zeros(1).to(device)
        with Traffic() as traffic:
            first, second = table.like(x), table.like(x)
            whole = table.like(x, torch.int64)
        assert first is second
        assert traffic.seen["to the device"] == 2
        assert whole.tolist() == [0, 1, 2, 3, 4]
    assert table.like(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("seed", [3, [5, 5, 9]])
def test_noise_drawn_by_several_threads_is_the_same(seed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from parasolver_core.samplers import seeded

    monkeypatch.setattr(seeded, "_MANY", 1)
    monkeypatch.setattr(seeded.os, "cpu_count", lambda: 4)
    source = NoiseSource(np.zeros((3, 7)), np.float64, 10, seed, None)
    wanted = [(step, sample) for step in range(5) for sample in range(3)]
    got = source.block([*wanted, None])
    keys = [(3, sample) for sample in range(3)] if seed == 3 else [(5, 0), (5, 0), (9, 0)]
    want = [draw(*keys[sample], step, (7,)) for step, sample in wanted]
    assert np.array_equal(got[:-1], want)
    assert not got[-1].any()
