"""Replicas of a network in one process, on a CPU: rows dealt out, and what goes wrong in a thread."""

import copy
import threading
from typing import Any

import pytest

pytest.importorskip("torch")
import torch
from torch import Tensor

from parasolver_adapters.distributed import WorkersDisagreeError
from parasolver_adapters.epsilon_models import EpsilonModel, LearnedVariance
from parasolver_adapters.multi_device import MultiDeviceDenoiser
from parasolver_adapters.wrapping import ModelDenoiser
from parasolver_core import DDIM, DDPM, NoiseSchedule, solve

LINEAR = NoiseSchedule.linear()


class Network(torch.nn.Module):
    """eps of each row, and the threads, rows and gradient modes in which it was called."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(8, channels)
        self.seen: list[tuple[int, int, bool]] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.seen.append((threading.get_ident(), len(x), torch.is_grad_enabled()))
        shift = 0 if y is None else 0.1 * y[:, None].to(x.dtype)
        return torch.tanh(self.layer(x) + t[:, None] / 1000 + shift)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_rows_are_dealt_out_and_the_sample_is_the_same(count: int) -> None:
    network = Network().eval()
    replicas = [copy.deepcopy(network) for _ in range(count)]
    arguments = normal(2, 8), LINEAR.timesteps(20), DDIM(LINEAR)
    want = solve(network, *arguments, window=6, tolerance=0)
    got = solve(MultiDeviceDenoiser(replicas), *arguments, window=6, tolerance=0)
    torch.testing.assert_close(got.sample, want.sample, rtol=1e-5, atol=1e-6)
    assert got.stats.rounds == want.stats.rounds
    assert got.sample.grad_fn is None
    for one in replicas:
        assert not any(grad for _, _, grad in one.seen)
        assert max(rows for _, rows, _ in one.seen) <= -(-13 // count)  # 2 windows of 6, and one row again
    assert sum(rows for one in replicas for _, rows, _ in one.seen) == sum(rows for _, rows, _ in network.seen)
    if count > 1:
        assert threading.get_ident() not in {thread for one in replicas for thread, _, _ in one.seen}


def test_conditions_and_noise_belong_to_the_rows() -> None:
    conditions = {"y": torch.tensor([1.0, 5.0, 3.0])}
    networks = [ModelDenoiser(Network().eval(), LINEAR, "epsilon", conditions=conditions) for _ in range(2)]
    arguments = normal(3, 8), LINEAR.timesteps(20), DDIM(LINEAR)
    want = solve(networks[0], *arguments, window=5, tolerance=0).sample
    got = solve(MultiDeviceDenoiser(networks), *arguments, window=5, tolerance=0).sample
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    learned = [LearnedVariance(EpsilonModel(Network(16).eval(), LINEAR)) for _ in range(2)]  # asks for noise in threads
    noisy = normal(3, 8), LINEAR.timesteps(20), DDPM(LINEAR)
    want = solve(learned[0], *noisy, window=5, tolerance=0, seed=3).sample
    got = solve(MultiDeviceDenoiser(learned), *noisy, window=5, tolerance=0, seed=3).sample
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_an_error_keeps_its_type_and_says_where_it_came_from() -> None:
    class InterruptedByUserError(Exception):
        pass

    def breaks(x: Tensor, t: Tensor) -> Tensor:
        if bool((t < 500).any()):
            raise InterruptedByUserError("stop")
        return x

    good, bad = (lambda x, t: x), breaks
    with pytest.raises(InterruptedByUserError, match="stop") as caught:
        solve(MultiDeviceDenoiser([good, bad]), normal(1, 8), LINEAR.timesteps(20), DDIM(LINEAR), window=6)
    assert any(
        "raised by replica 1 of 2, on the device of the rows, in call" in note for note in caught.value.__notes__
    )
    assert 0 < caught.value.solution.steps[0] <= 10  # type: ignore[attr-defined]
    with pytest.raises(InterruptedByUserError) as caught:
        MultiDeviceDenoiser([bad, bad])(normal(4, 8), torch.zeros(4))
    assert any("replica 1 failed as well: InterruptedByUserError: stop" in note for note in caught.value.__notes__)


def test_memory_that_runs_out_halves_the_calls_of_that_replica_alone() -> None:
    sizes: dict[str, list[int]] = {"small": [], "large": []}

    def network(name: str, most: int) -> Any:
        def call(x: Tensor, t: Tensor) -> Tensor:
            sizes[name].append(len(x))
            if len(x) > most:
                raise RuntimeError("CUDA out of memory")
            return torch.tanh(x)

        return call

    denoiser = MultiDeviceDenoiser([network("small", 2), network("large", 100)])
    solution = solve(denoiser, normal(1, 8), LINEAR.timesteps(30), DDIM(LINEAR), window=12)
    assert solution.success
    assert solution.stats.max_rows == 2 or solution.stats.max_rows == 1
    assert max(sizes["large"]) > 2
    assert "Memory ran out" in solution.message


def test_the_least_memory_of_all_replicas_is_told() -> None:
    def network(most: int) -> Any:
        def call(x: Tensor, t: Tensor) -> Tensor:
            if len(x) > most:
                raise RuntimeError("CUDA out of memory")
            return torch.tanh(x)

        return call

    denoiser = MultiDeviceDenoiser([network(4), network(2), network(100)])
    assert denoiser.max_rows is None
    denoiser(normal(24, 8), torch.zeros(24))
    assert denoiser.max_rows == 2


def test_limits_are_told_once_memory_has_run_out() -> None:
    def full(x: Tensor, t: Tensor) -> Tensor:
        if len(x) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x

    denoiser = MultiDeviceDenoiser([full, lambda x, t: x], max_rows=3)
    assert denoiser.max_rows is None
    assert denoiser.agree([2.0, -1.0]) == [2.0, -1.0]  # with nobody else
    denoiser(normal(12, 8), torch.zeros(12))
    assert denoiser.max_rows == 1  # and not the other's 3, whose memory has sufficed


def test_each_replica_computes_where_it_is_told() -> None:
    seen: list[tuple[int, str]] = []

    def network(at: int) -> Any:
        return lambda x, t: (seen.append((at, f"{x.device} {t.device}")), x.to("cpu") if at else x)[1]

    rows = normal(3, 8)
    got = MultiDeviceDenoiser([network(1), network(2)], ["cpu", "cpu"])(rows, torch.zeros(3))
    assert torch.equal(got, rows)
    assert sorted(seen) == [(1, "cpu cpu"), (2, "cpu cpu")]
    here = Network()
    assert MultiDeviceDenoiser([here, lambda x, t: x])._where == [torch.device("cpu"), None]
    assert MultiDeviceDenoiser([lambda x, t: here(x, t)])._where == [torch.device("cpu")]  # inside a function
    bare = torch.nn.ReLU()
    assert MultiDeviceDenoiser([lambda x, t: here(bare(x), t)])._where == [torch.device("cpu")]


def test_modes_of_the_caller_reach_the_threads() -> None:
    seen: list[tuple[bool, bool, bool]] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        seen.append(modes)
        return x

    denoiser, rows = MultiDeviceDenoiser([network]), normal(1, 8)
    denoiser(rows, torch.zeros(1))
    with torch.no_grad():
        denoiser(rows, torch.zeros(1))
    with torch.inference_mode():
        denoiser(rows, torch.zeros(1))
    with torch.autocast("cpu", torch.bfloat16):
        denoiser(rows, torch.zeros(1))
    assert seen == [(True, False, False), (False, False, False), (False, True, False), (True, False, True)]


def test_errors_of_all_replicas_are_told_with_the_first() -> None:
    def fails(x: Tensor, t: Tensor) -> Tensor:
        raise ValueError(f"boom at {int(t[0])}")

    denoiser = MultiDeviceDenoiser([lambda x, t: x, fails, fails])
    for call in (1, 2):
        with pytest.raises(ValueError, match="boom at 1") as caught:
            denoiser(normal(3, 8), torch.arange(3))
        assert caught.value.__notes__ == [
            f"raised by replica 1 of 3, on the device of the rows, in call {call}",
            "replica 2 failed as well: ValueError: boom at 2",
        ]


def test_autocast_reaches_the_threads() -> None:
    seen: list[torch.dtype] = []
    layer = torch.nn.Linear(8, 8)

    def network(x: Tensor, t: Tensor) -> Tensor:
        out = layer(x)
        seen.append(out.dtype)
        return out.to(x.dtype)

    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        MultiDeviceDenoiser([network, network])(normal(4, 8), torch.zeros(4))
    assert seen == [torch.bfloat16] * 2


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="networks: expected at least one, got none"):
        MultiDeviceDenoiser([])
    with pytest.raises(TypeError, match="networks: expected callables"):
        MultiDeviceDenoiser([1])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="devices: expected one for each of 2 networks, got 1"):
        MultiDeviceDenoiser([Network(), Network()], ["cpu"])
    with pytest.raises(ValueError, match="devices: expected devices of torch, such as cuda:1, got 'nowhere'"):
        MultiDeviceDenoiser([Network(), Network()], ["cpu", "nowhere"])
    with pytest.raises(ValueError, match="max_rows: expected an integer of at least 1, got 0"):
        MultiDeviceDenoiser([Network()], max_rows=0)
    other = Network()
    other.layer.weight.data.mul_(2)
    with pytest.raises(WorkersDisagreeError, match="those at 0 and 1 differ in shapes, dtypes or weights"):
        solve(MultiDeviceDenoiser([Network(), other]), normal(1, 8), LINEAR.timesteps(10), DDIM(LINEAR))
    with pytest.raises(TypeError, match="x_T: several devices need a torch tensor"):
        MultiDeviceDenoiser([Network()])([1.0], torch.zeros(1))  # type: ignore[arg-type]
