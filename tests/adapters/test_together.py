"""The recorded steps of a round, run at once: what a device is asked for, and that each step's numbers come of it."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parasolver_adapters.diffusers import PipelineNotParallelError, parallel_sampling
from parasolver_adapters.diffusers.recording import together
from parasolver_adapters.diffusers.recording.agreement import apart
from parasolver_adapters.diffusers.recording.batching import Networks, RecordedDenoiser, _split
from parasolver_adapters.diffusers.recording.programs import Operation, Program, Ref
from parasolver_adapters.diffusers.recording.together import Together
from parasolver_core import NonFiniteError
from tests.adapters.tiny_pipelines import SINGLE, ddim, distance, generator, stable_diffusion, text
from tests.traffic import VIEWS

pytestmark = pytest.mark.usefixtures("quiet_diffusers")


class Launches(TorchDispatchMode):
    """Counts operations that are no views, but for those of networks."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        self.seen[name] += not self.inside and name not in VIEWS.split()
        return func(*args, **(kwargs or {}))


def pipeline(name: str, **options: Any) -> Any:
    return stable_diffusion(scheduler=getattr(diffusers, name).from_config(ddim().config, **options))


def sampled(pipe: Any) -> torch.Tensor:
    return pipe(**text(), generator=generator(), num_inference_steps=40, output_type="latent").images


def launches_of(pipe: Any, window: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, launches) of each call of the recorded steps."""
    found: list[tuple[int, int]] = []
    call, init = RecordedDenoiser.__call__, Networks.__init__

    def counted(self: Any, x: Any, *rest: Any) -> Any:
        with Launches() as launches:
            self._networks.launches = launches
            result = call(self, x, *rest)
        found.append((len(x), launches.seen.total()))
        return result

    def quiet(self: Any, forwards: dict[int, Any], references: Any) -> None:
        def around(forward: Any) -> Any:
            def called(*args: Any, **kwargs: Any) -> Any:
                launches = getattr(self, "launches", Launches())
                launches.inside = True
                try:
                    return forward(*args, **kwargs)
                finally:
                    launches.inside = False

            return called

        init(self, {key: around(forward) for key, forward in forwards.items()}, references)

    with monkeypatch.context() as patched:
        patched.setattr(RecordedDenoiser, "__call__", counted)
        patched.setattr(Networks, "__init__", quiet)
        with parallel_sampling(pipe, window=window):
            sampled(pipe)
    return found


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("DDIMScheduler", 8),
        ("DPMSolverMultistepScheduler", 8),
        (
            "EulerDiscreteScheduler",
            11,
        ),  # whose input scale is another at each step: stacked, in float64, and divided by
        ("DDPMScheduler", 8),
    ],
)
def test_a_round_launches_as_much_as_a_step_for_any_window(
    name: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for window in (8, 16):
        found = launches_of(pipeline(name), window, monkeypatch)
        full = [launches for rows, launches in found[2:] if rows == window]
        assert full
        assert max(full) <= most


def test_clipping_is_done_for_all_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline("DDPMScheduler")
    pipe.scheduler.register_to_config(clip_sample=True)
    for window in (8, 16):
        full = [launches for rows, launches in launches_of(pipe, window, monkeypatch)[2:] if rows == window]
        assert max(full) <= 8 + 8


def fails(*given: Any) -> Any:
    raise RuntimeError("no batching rule")


def is_off(*given: Any) -> Any:
    return [value * 1.01 for value in RUN(*given)]


def mixes(*given: Any) -> Any:
    return [value.flip(0) for value in RUN(*given)]


RUN = together._run_at_once


@pytest.mark.parametrize("wrong", [fails, is_off, mixes])
def test_steps_that_cannot_be_run_at_once_are_run_one_by_one(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline("EulerDiscreteScheduler")
    want = sampled(pipe)
    calls: list[int] = []
    monkeypatch.setattr(together, "_run_at_once", lambda *given: (calls.append(1), wrong(*given))[1])
    with parallel_sampling(pipe, window=8, tolerance=0.0):
        got = sampled(pipe)
    assert distance(got, want) < SINGLE
    assert len(calls) == 2  # once before and once after the network's call


def steps_of(*operations: tuple[Any, Any], dtype: torch.dtype) -> Together:
    """Steps of one operation each, on the state and a number or tensor of the step's own."""
    programs = []
    for function, number in operations:
        made = Operation(function, (Ref(0), number), {}, (0,), 1)
        programs.append(Program([made], dtype, size=2, m=1))
    return Together(programs)


def run(steps: Together, numbers: list[int], states: torch.Tensor) -> torch.Tensor:
    try:
        next(steps.run(numbers, states))
    except StopIteration as end:
        x, m = end.value
        assert x is None
        return m
    raise AssertionError("a network is called")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor, torch.ops.aten.add.Tensor])
def test_numbers_in_which_steps_differ_are_read_as_by_one_step(function: Any, dtype: torch.dtype) -> None:
    """Also in half precision, which a number of the host is not rounded to."""
    numbers = torch.linspace(0.3, 1.7, 6, dtype=torch.float32)
    steps = steps_of(*((function, number) for number in numbers), dtype=dtype)
    states = torch.randn(6, 2, 3, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert len({steps.kind(step) for step in range(6)}) == 1
    got = run(steps, [*range(6)], states)
    assert list(steps._at_once.values()) == [True]
    want = torch.stack([function(states[step], numbers[step]) for step in range(6)])
    again = run(steps, [5, 0], states[[5, 0]])
    if function is torch.ops.aten.add.Tensor and dtype.itemsize == 2:  # torch rounds it, on a CPU and for sums only
        assert apart(got, want) < torch.finfo(dtype).eps
    else:
        assert torch.equal(got, want)
    assert torch.equal(again, got[[5, 0]])


def test_other_operations_and_numbers_in_the_program_are_another_kind() -> None:
    mul, add, power = torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor, torch.ops.aten.pow.Tensor_Scalar
    one = torch.ones(3)
    steps = steps_of(
        (mul, one), (mul, 2 * one), (add, one), (mul, torch.ones(1)), (power, 2), (power, 3), dtype=torch.float32
    )
    assert [steps.kind(0) == steps.kind(other) for other in range(1, 6)] == [True, False, False, False, False]
    assert steps.kind(4) != steps.kind(5)


def test_what_a_network_returns_is_shared_out_among_the_steps() -> None:
    """Rows to their steps; what is no tensor, as the flag of some networks, is the same for all."""
    call: Any = SimpleNamespace(module=torch.nn.Identity())
    first, second = _split(call, torch.arange(6.0).reshape(6, 1), 2)
    assert (first[:, 0].tolist(), second[:, 0].tolist()) == ([0.0, 1.0, 2.0], [3.0, 4.0, 5.0])
    assert list(_split(call, None, 3)) == [None] * 3
    with pytest.raises(PipelineNotParallelError, match=r"Identity returns a tensor of shape \(5, 1\) for a batch of 2"):
        _split(call, torch.zeros(5, 1), 2)


@pytest.mark.parametrize(
    ("error", "known", "seen"),
    [
        (ValueError("boom"), False, PipelineNotParallelError),  # before any batch has gone well, the batch is to blame
        (ValueError("boom"), True, ValueError),
        (torch.OutOfMemoryError("no room"), False, torch.OutOfMemoryError),  # a smaller batch will do
        (NonFiniteError("of another process"), False, NonFiniteError),
    ],
)
def test_an_error_of_a_batch_is_the_networks_own_or_the_batchs(
    error: Exception, known: bool, seen: type[Exception]
) -> None:
    def fails(call: Any, nodes: list[Any]) -> Any:
        raise error

    call: Any = SimpleNamespace(module=torch.nn.Identity(), signature="signature")
    networks: Any = SimpleNamespace(_checked={"signature"} if known else set(), _batch=fails)
    networks.reference = lambda call: SimpleNamespace(leaves=[], outputs=[])
    with pytest.raises(seen, match=str(error)):
        Networks._group(networks, call, [[], []])
