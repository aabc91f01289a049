"""Memory that runs out, few sizes of calls, states on another device, half precision, and waiting for the device."""

import tracemalloc
from typing import Any

import array_api_strict
import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from parasolver_core import DDIM, DDPM, NoiseSchedule, solve, solve_sequential
from parasolver_core.arrays import host_view
from parasolver_core.denoiser.calls import BatchedCall, out_of_memory
from parasolver_core.methods import sliding, spread
from parasolver_core.methods import window_batch as batch
from parasolver_core.rounds import shared
from parasolver_core.samplers import noise
from tests.arrays import to_numpy
from tests.core.problems import Counted, Mixture, Rational, TanhNetwork, normal, relative

SCHEDULE = NoiseSchedule.linear()
TIMESTEPS = SCHEDULE.timesteps(30)


class Small:
    """``Rational`` on a device with memory for so many rows; a larger call spoils its input before it fails."""

    def __init__(self, rows: int, error: Exception) -> None:
        self.inner, self.rows, self.error, self.seen = Rational(), rows, error, []

    def __call__(self, x: Any, t: Any) -> Any:
        self.seen.append(x.shape[0])
        if x.shape[0] > self.rows:
            x[...] = 0.0
            raise self.error
        return self.inner(x, t)


@pytest.mark.parametrize("batch", [1, 3])
def test_half_precision_rows_that_a_network_spoils_are_made_anew(batch: int) -> None:
    x_T, network = normal((batch, 4)).astype(np.float16), Small(3, MemoryError("no room"))
    network.inner = TanhNetwork(4)
    for options in ({"check": False}, {"method": "sequential"}):
        problem = x_T, TIMESTEPS, DDIM(SCHEDULE, prediction_type="sample"), 9
        got, expected = (solve(model, *problem, **options) for model in (network, network.inner))
        assert np.array_equal(got.sample, expected.sample)


class OutOfMemoryError(Exception):
    """As CuPy names it."""


def test_tensors_on_a_cpu_are_worked_on_as_arrays_of_numpy_in_the_same_memory() -> None:
    """Those of half precision are not: NumPy's arithmetic of them is slow, and bfloat16 is unknown to it."""
    for dtype in (torch.float32, torch.float64):
        tensor = torch.zeros(3, dtype=dtype)
        view = host_view(tensor)
        assert isinstance(view, np.ndarray)
        view[1] = 2.0
        assert tensor.tolist() == [0.0, 2.0, 0.0]
    for dtype in (torch.float16, torch.bfloat16):
        tensor = torch.zeros(3, dtype=dtype)
        assert host_view(tensor) is tensor
    assert host_view(away := torch.zeros(3, device="meta")) is away


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        OutOfMemoryError("no room"),
        torch.OutOfMemoryError("no room"),
        RuntimeError("RESOURCE_EXHAUSTED: no room"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:30],
)
@pytest.mark.parametrize("options", [{"window": 9}, {"window": 9, "check": False}, {"method": "sequential"}], ids=str)
def test_memory_that_runs_out_halves_the_calls(error: Exception, options: dict[str, Any]) -> None:
    x_T = normal((5, 4))
    network = Small(3, error)
    got = solve(network, x_T, TIMESTEPS, DDIM(SCHEDULE), **options)
    expected = solve(Rational(), x_T, TIMESTEPS, DDIM(SCHEDULE), **options)
    assert np.array_equal(got.sample, expected.sample)
    assert got.stats.rounds == expected.stats.rounds
    assert got.stats.max_rows is not None
    assert 1 < got.stats.max_rows <= 3
    assert f"at most {got.stats.max_rows} rows" in got.message
    assert expected.stats.max_rows is None
    assert "Memory" not in expected.message
    assert sum(rows > 3 for rows in network.seen) <= 4  # remembered: one failure a halving


@pytest.mark.parametrize("options", [{"window": 9}, {"method": "sequential"}, {"window": 4, "check": False}], ids=str)
def test_memory_for_a_single_row_is_enough(options: dict[str, Any]) -> None:
    x_T = normal((3, 4))
    got = solve(Small(1, MemoryError("no room")), x_T, TIMESTEPS, DDIM(SCHEDULE), **options)
    assert np.array_equal(got.sample, solve(Rational(), x_T, TIMESTEPS, DDIM(SCHEDULE), **options).sample)
    assert got.stats.max_rows == 1
    assert got.stats.calls >= got.stats.evaluations


@pytest.mark.parametrize("given", ["seed", "function"])
def test_the_noise_of_final_steps_is_freed(given: str) -> None:
    """The noise of 150 steps takes five times what a window of 3 and its rounds need."""
    size, steps = 10_000, 150
    timesteps, whole = SCHEDULE.timesteps(steps), steps * size * 8
    noise = {"seed": 1} if given == "seed" else {"noise": lambda step, sample: np.full(size, 0.1 * step)}
    tracemalloc.start()
    try:
        solve(Rational(), normal((1, size)), timesteps, DDPM(SCHEDULE), 3, tolerance=1e-3, check=False, **noise)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 0.5 * whole


def test_memory_for_no_row_at_all() -> None:
    with pytest.raises(MemoryError, match="no room") as caught:
        solve(Small(0, MemoryError("no room")), normal((1, 4)), TIMESTEPS, DDIM(SCHEDULE), window=4)
    assert any("state_device" in note for note in caught.value.__notes__)
    assert caught.value.solution.steps == (0,)  # type: ignore[attr-defined]


def test_other_errors_are_not_memory() -> None:
    assert not out_of_memory(RuntimeError("shapes do not match"))
    assert not out_of_memory(ValueError("out of memory of what was said"))


@pytest.mark.parametrize("max_rows", [None, 6])
def test_buckets_bound_the_sizes_of_calls_and_change_nothing(max_rows: int | None, xp: Any) -> None:
    x_T, network = normal((3, 4), xp), Counted(Rational())
    got = solve(network, x_T, TIMESTEPS, DDIM(SCHEDULE), 9, buckets=[1, 4, 16], max_rows=max_rows)
    expected = solve(Rational(), x_T, TIMESTEPS, DDIM(SCHEDULE), 9)
    assert np.array_equal(to_numpy(got.sample), to_numpy(expected.sample))
    assert set(network.rows) <= ({1, 4, 16} if max_rows is None else {1, 4})
    assert got.stats.evaluations == expected.stats.evaluations  # padding is not counted


@pytest.mark.parametrize(
    ("rows", "calls"), [(1, [1]), (3, [4]), (4, [4]), (5, [16]), (16, [16]), (17, [16, 1]), (35, [16, 16, 4])]
)
def test_how_rows_are_put_into_buckets(rows: int, calls: list[int]) -> None:
    network = Counted(lambda x, t: x + t[:, None])
    x, t = normal((rows, 2)), np.arange(rows)
    got = BatchedCall(network, None, [16, 1, 4])(x, t)
    assert network.rows == calls
    assert np.array_equal(got, x + t[:, None])


def test_a_compiled_network_is_compiled_once_a_bucket() -> None:
    shapes: list[int] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        shapes.append(inputs[0].shape[0])
        return graph.forward

    torch._dynamo.reset()
    network = torch.compile(lambda x, t: torch.tanh(x) + t[:, None] * 1e-3, backend=backend, dynamic=False)
    got = solve(network, torch.from_numpy(normal((1, 4))), TIMESTEPS, DDIM(SCHEDULE), 12, buckets=(1, 4, 16))
    assert got.success
    assert len(shapes) == len(set(shapes)) <= 3


@pytest.mark.parametrize("options", [{"window": 7}, {"method": "sequential"}, {"window": 7, "max_rows": 3}])
@pytest.mark.parametrize("rule", [DDIM(SCHEDULE), DDPM(SCHEDULE)])
def test_states_on_another_device(rule: Any, options: dict[str, Any]) -> None:
    """The strict library has several devices and refuses to mix them."""
    xp, main, other = array_api_strict, array_api_strict.Device("device1"), array_api_strict.Device("CPU_DEVICE")
    x_T = xp.asarray(normal((2, 4)), device=main)
    seen = set()

    def network(x: Any, t: Any) -> Any:
        seen.add((x.device, t.device, x.shape[0]))
        phase = xp.reshape(xp.astype(t, x.dtype) * 1e-3, (-1, 1))
        return x / (1 + x * x) + phase

    expected = solve(Rational(), xp.asarray(normal((2, 4))), TIMESTEPS, rule, **options)
    got = solve(network, x_T, TIMESTEPS, rule, state_device=other, save="trajectory", **options)
    assert got.sample.device == got.states.device == main
    assert got.trajectory.device == other  # type: ignore[union-attr]
    assert {(x, t) for x, t, _ in seen} == {(main, main)}
    back = to_numpy(xp.asarray(got.sample, device=other))
    assert np.array_equal(back, to_numpy(expected.sample))
    assert max(rows for _, _, rows in seen) <= options.get("max_rows", 100)


def test_a_state_device_that_is_none() -> None:
    with pytest.raises(ValueError, match="state_device"):
        solve(Rational(), normal((1, 4)), TIMESTEPS, DDIM(SCHEDULE), state_device="nowhere")
    with pytest.raises(TypeError, match="buckets"):
        solve(Rational(), normal((1, 4)), TIMESTEPS, DDIM(SCHEDULE), buckets=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="buckets"):
        solve(Rational(), normal((1, 4)), TIMESTEPS, DDIM(SCHEDULE), buckets=[4, 0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_as_near_as_its_sequential_run(dtype: str) -> None:
    """Both stray from float64 by the network's own rounding, which the solver must not add to."""
    exact = Mixture(SCHEDULE, "epsilon")
    half = getattr(torch, dtype)

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return exact(x.double(), t).to(half)

    x_T = torch.from_numpy(normal((2, 200))).to(half)
    truth = solve_sequential(exact, x_T.double(), TIMESTEPS, DDIM(SCHEDULE)).sample
    sequential = solve_sequential(network, x_T, TIMESTEPS, DDIM(SCHEDULE)).sample.double()
    parallel = solve(network, x_T, TIMESTEPS, DDIM(SCHEDULE), 8, tolerance=1e-3).sample.double()
    rounding = relative(sequential, truth)
    assert relative(parallel, sequential) < max(1.5 * rounding, float(torch.finfo(half).eps))
    assert relative(parallel, truth) < 1.5 * rounding + 1e-3


class Waits(TorchFunctionMode):
    """Counts what makes the host wait for a device, were the tensors on one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in (
            {"cpu", "item", "tolist", "__bool__", "__float__", "__int__", "__index__", "__array__", "nonzero", "equal"}
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [{"window": 6}, {"window": 6, "method": "identity"}, {"method": "sequential"}, {"window": 8, "steps": 300}],
    ids=str,
)
@pytest.mark.parametrize("rule", [DDIM(SCHEDULE), DDPM(SCHEDULE)])
def test_a_round_waits_for_the_device_once(rule: Any, options: dict[str, Any], monkeypatch: Any) -> None:
    for module in (batch, spread, sliding, noise, shared):
        monkeypatch.setattr(module, "host_view", lambda array: array)  # as for an array that is not on the CPU
    options = dict(options)
    timesteps = SCHEDULE.timesteps(options.pop("steps", 20))
    counts = []
    with Waits() as waits:

        def callback(state: Any) -> None:
            ended = sum(status.name != "RUNNING" for status in state.statuses)
            counts.append((waits.count, ended))
            waits.count = 0

        x_T = torch.from_numpy(normal((2, 4)))
        solve(Rational(), x_T, timesteps, rule, tolerance=0.03, callback=callback, check=False, **options)
    assert len(counts) > 5
    others = counts[1:]
    assert all(count <= 1 + ended for count, ended in others)  # each sample's last state is looked at once more
    assert sum(count == 1 for count, _ in others) >= len(others) - 2
