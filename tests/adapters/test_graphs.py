"""Networks as graphs, on a stand-in for a card that refuses what a capture refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from parasolver_adapters.embedded import EmbeddedDenoiser, load_embedded_model
from parasolver_adapters.epsilon_models import ClassifierGuidance, EpsilonModel
from parasolver_adapters.graphs import GraphCaptureWarning, GraphedDenoiser, _alike, captured
from parasolver_adapters.wrapping import ModelDenoiser
from parasolver_core import DDIM, NoiseSchedule, clip_sample, solve, solve_sequential
from parasolver_core.planning.costs import describe
from tests.adapters.test_devices import there
from tests.away import Away, away
from tests.recording import record

SCHEDULE = NoiseSchedule.linear()
STEPS = SCHEDULE.timesteps(40)


@pytest.fixture
def card() -> Iterator[torch.device]:
    with away() as device:
        yield device


class Network(torch.nn.Module):
    """Counts its calls, which replays do not make."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.eval()

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
        self.calls += 1
        out = torch.tanh(x) * 0.7 + 0.1 * torch.cos(0.01 * t.to(x.dtype))[:, None]
        return out if shift is None else out + shift


def start(rows: int, *event: int) -> Tensor:
    return torch.randn(rows, *(event or (5,)), generator=torch.Generator().manual_seed(0))


def test_calls_are_replayed_with_their_own_numbers(card: torch.device) -> None:
    network = Network()
    graphed = GraphedDenoiser(network, rows=(2, 4), capture=record)
    for rows in (1, 2, 3, 4, 2, 3):
        x, t = start(rows) + rows, torch.arange(rows) * 10
        got = graphed(x.to(card), t.to(card))
        assert torch.equal(got.cpu(), Network()(x, t))
        assert got.shape == x.shape
    assert network.calls == 4  # of each row count: one call, and the capture
    graphed(start(5).to(card), torch.arange(5).to(card))
    assert network.calls == 5  # more rows than the largest: plainly
    assert graphed.failure == ""


def test_an_output_is_not_written_over(card: torch.device) -> None:
    graphed = GraphedDenoiser(Network(), rows=(2,), capture=record)
    t = torch.arange(2).to(card)
    first = graphed(start(2).to(card), t)
    before = first.cpu().clone()
    graphed(start(2).to(card) + 1, t)
    assert torch.equal(first.cpu(), before)


def test_a_run_with_graphs_is_the_run_without(card: torch.device) -> None:
    network, x_T = Network(), start(2).to(card)
    graphed = GraphedDenoiser(network, rows=(1, 4, 20), capture=record)
    solution = solve(graphed, x_T, STEPS, DDIM(SCHEDULE), window=8, tolerance=0)
    expected = solve_sequential(Network(), x_T, STEPS, DDIM(SCHEDULE)).sample
    assert float((solution.sample - expected).norm() / expected.norm()) < 1e-5
    assert network.calls <= 2 * 3


BROKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "item": lambda x: x * float(x.abs().max().item()),
    "tensor": lambda x: x * torch.tensor([2.0]).to(x.device),
    "cpu": lambda x: x + x.cpu().mean().item(),
    "decision": lambda x: x if bool((x > 0).all()) else 2 * x,
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_captured_is_called_plainly_with_a_word(name: str, card: torch.device) -> None:
    graphed = GraphedDenoiser(lambda x, t: BROKEN[name](x), rows=(2,), capture=record)
    x, t = start(2), torch.arange(2)
    with pytest.warns(GraphCaptureWarning, match=r"called plainly \(RuntimeError: operation not permitted"):
        got = graphed(x.to(card), t.to(card))
    assert torch.equal(got.cpu(), BROKEN[name](x))
    assert "not permitted" in graphed.failure
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = graphed(x.to(card) + 1, t.to(card))
    assert torch.equal(again.cpu(), BROKEN[name](x + 1))


def test_a_network_that_keeps_something_back_is_found(card: torch.device) -> None:
    calls: list[int] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(calls))
        return x + float(len(calls))

    with pytest.warns(GraphCaptureWarning, match="keeps something back"):
        GraphedDenoiser(network, rows=(2,), capture=record)(start(2).to(card), torch.arange(2).to(card))


def test_a_network_that_works_in_place(card: torch.device) -> None:
    graphed = GraphedDenoiser(lambda x, t: x.mul_(2).add_(1), rows=(2,), capture=record)
    x = start(2)
    for _ in range(2):
        assert torch.equal(graphed(x.to(card), torch.arange(2).to(card)).cpu(), 2 * x + 1)


def test_the_networks_own_exception_comes_out(card: torch.device) -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError, match="full"):
        GraphedDenoiser(network, rows=(2,), capture=record)(start(2).to(card), torch.arange(2).to(card))


def test_on_a_cpu_and_for_other_arguments_calls_are_plain() -> None:
    network = Network()
    graphed = GraphedDenoiser(network, rows=(4,))
    x, t = start(3), torch.arange(3)
    assert torch.equal(graphed(x, t), Network()(x, t))
    assert network.calls == 1
    odd = GraphedDenoiser(lambda x, t, given: x + given.shift, rows=(4,), capture=record)
    given = type("Given", (), {"shift": 1.0})
    assert torch.equal(odd(x, t, given=given), x + 1)
    given.shift = 2.0  # type: ignore[attr-defined]
    assert torch.equal(odd(x, t, given=given), x + 2)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least one row count"):
        GraphedDenoiser(Network(), rows=())
    with pytest.raises(ValueError, match="rows: expected an integer of at least 1"):
        GraphedDenoiser(Network(), rows=(0,))
    with pytest.raises(TypeError, match=r"rows: expected row counts such as \(1, 4, 16\), got 4"):
        GraphedDenoiser(Network(), rows=4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"network: expected network.*got int"):
        GraphedDenoiser(3)  # type: ignore[arg-type]
    each = ModelDenoiser(Network(), SCHEDULE, "epsilon", conditions={"shift": torch.zeros(2, 1)})
    with pytest.raises(ValueError, match=r"network: it takes rows.*ModelDenoiser\(GraphedDenoiser"):
        GraphedDenoiser(each)


def test_a_graphed_network_inside_a_wrapper_with_a_condition_for_each_sample(card: torch.device) -> None:
    shift, x_T = torch.tensor([[-1.0], [1.0]]), start(2)

    def run(network: Any, there: Any) -> Tensor:
        denoiser = ModelDenoiser(network, SCHEDULE, "epsilon", conditions={"shift": there(shift)})
        return solve(denoiser, there(x_T), STEPS, DDIM(SCHEDULE), window=8, tolerance=0).sample

    graphed = GraphedDenoiser(network := Network(), rows=(2, 8, 20), capture=record)
    got = run(graphed, lambda one: one.to(card)).cpu()
    assert float((got - run(Network(), lambda one: one)).norm() / got.norm()) < 1e-5
    assert network.calls <= 2 * 3


def test_what_was_captured_is_no_part_of_the_key_of_its_costs(card: torch.device) -> None:
    graphed = GraphedDenoiser(Network(), rows=(2,), capture=record)
    before = describe(graphed, start(2))
    graphed(start(2).to(card), torch.arange(2).to(card))
    assert describe(graphed, start(2)) == before


def wrapped() -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Denoisers of the project with tables and labels of their own, and the shape of a sample."""
    model = load_embedded_model()
    there(model)
    classifier = ClassifierGuidance(lambda x, t: torch.stack([x.flatten(1).sum(1), 0 * x.flatten(1).sum(1)], 1), 0.5)
    plain: dict[str, Any] = {"num_classes": 3, "learn_sigma": False}
    labelled = lambda x, t, y: torch.tanh(x + y[:, None])  # noqa: E731
    null = {"guidance_scale": 2.0, "null_label": 2}
    shift = {"shift": torch.ones(1, 1).to("meta")}
    unit = {"time": "unit", "conditions": shift, "null_conditions": shift, "guidance_scale": 2.0}
    return {
        "embedded": (EmbeddedDenoiser(labels=3, guidance_scale=2.0, model=model), (1, 28, 28)),
        "labels and guidance": (EpsilonModel(labelled, SCHEDULE, 1, **plain, **null), (5,)),
        "classifier": (EpsilonModel(labelled, SCHEDULE, 1, **plain, classifier=classifier), (5,)),
        "clipped": (EpsilonModel(labelled, SCHEDULE, 1, **plain, clip_denoised=True), (5,)),
        "model": (ModelDenoiser(Network(), SCHEDULE, "epsilon", **unit), (5,)),
        "clip_sample": (clip_sample(Network(), SCHEDULE), (5,)),
        "clip_sample of noise levels": (clip_sample(Network(), NoiseSchedule.karras()), (5,)),
        "clip_sample of flow matching": (clip_sample(Network(), NoiseSchedule.flow_matching()), (5,)),
    }


TIMES = {"clip_sample of noise levels": [80.0, 0.5], "clip_sample of flow matching": [1.0, 0.2]}


@pytest.mark.parametrize(
    "name", ["embedded", "labels and guidance", "classifier", "clipped", "model", "clip_sample", *TIMES]
)
def test_the_projects_own_denoisers_can_be_captured(name: str, card: torch.device) -> None:
    denoiser, event = wrapped()[name]
    x, t = start(2, *event).to(card), torch.tensor(TIMES.get(name, [999, 10])).to(card)
    expected = denoiser(x, t)
    assert type(expected) is Away
    graphed = GraphedDenoiser(denoiser, rows=(2,), capture=record)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = graphed(x, t)
    assert np.allclose(got.tolist(), expected.tolist(), rtol=1e-5, atol=1e-6)
    assert graphed.failure == ""


@pytest.mark.parametrize(
    ("factor", "change", "captured"),
    [
        (1.0, 0.009, True),  # a hundredth of the largest number, as half precision may be off
        (1.0, 0.011, False),
        (1e4, 0.009, True),
        (1e4, 0.011, False),
        (1e-4, 0.009, True),
        (1e-4, 0.011, False),
        (0.0, 0.0, True),  # a last layer that is zero to begin with
    ],
)
def test_a_replay_is_compared_with_the_call_by_size(factor: float, change: float, captured: bool) -> None:
    want = {"sample": factor * torch.tensor([1.0, -0.5]), "flag": True}
    got = {"sample": want["sample"] + factor * torch.tensor([0.0, change]), "flag": True}
    assert _alike(got, want) is captured
    assert _alike(want, want)
    assert not _alike([want["sample"]], [want["sample"]] * 2)
    assert not _alike([want["sample"], torch.ones(3)], [want["sample"], torch.ones(4)])
    assert not _alike([want["sample"], torch.ones(3)], [want["sample"], 2 * torch.ones(3)])
    assert not _alike([2 * torch.ones(3), want["sample"]], [torch.ones(3), want["sample"]])


def test_only_what_has_a_row_for_each_is_filled_up_and_cut(card: torch.device) -> None:
    """With its last row, so that no row is a number that the network has not been made for."""
    seen: list[tuple[int, ...]] = []

    def network(x: Tensor, scale: Tensor, table: Tensor, gain: float) -> dict[str, Tensor]:
        seen.append((len(x), len(table), scale.ndim))
        return {"out": x * scale * gain, "table": table + 1, "sum": x.sum(), "last": x[3:]}

    graphed = GraphedDenoiser(network, rows=(4,), capture=record)
    x, table = start(3), torch.arange(5.0)
    got = graphed(x.to(card), torch.tensor(2.0).to(card), table.to(card), 3.0)
    assert set(seen) == {(4, 5, 0)}
    assert torch.equal(got["out"].cpu(), 6 * x)
    assert torch.equal(got["table"].cpu(), table + 1)
    assert torch.allclose(got["sum"].cpu(), x.sum() + x[2].sum())
    assert torch.equal(got["last"].cpu(), x[2:])
    whole = graphed(start(4).to(card), torch.tensor(2.0).to(card), table.to(card), 3.0)
    assert torch.equal(whole["out"].cpu(), 6 * start(4))


def test_a_network_of_one_tensor_is_captured(card: torch.device) -> None:
    calls: list[int] = []
    graphed = GraphedDenoiser(lambda x: (calls.append(1), 2 * x)[1], rows=(2,), capture=record)
    for _ in range(3):
        assert torch.equal(graphed(start(2).to(card)).cpu(), 2 * start(2))
    assert len(calls) == 2


def test_calls_without_rows_are_plain(card: torch.device) -> None:
    graphed = GraphedDenoiser(lambda x: 2 * x, rows=(2,), capture=lambda call: pytest.fail("captured"))
    assert graphed(start(2)[:0].to(card)).shape == (0, 5)


def test_the_rows_by_themselves_and_what_the_network_predicts() -> None:
    network = Network()
    graphed = GraphedDenoiser(network)
    assert graphed.rows == (1, 2, 4, 8, 16, 32)  # so that a call is filled up to less than twice its rows
    assert GraphedDenoiser(network, rows=(8, 2, 8)).rows == (2, 8)
    assert graphed.prediction_type is None
    network.prediction_type = "epsilon"  # type: ignore[assignment]
    assert graphed.prediction_type == "epsilon"


def test_the_warning_is_of_the_line_that_calls(card: torch.device) -> None:
    graphed = GraphedDenoiser(lambda x: x * x.max().item(), rows=(2,), capture=record)
    with pytest.warns(GraphCaptureWarning) as told:
        graphed(start(2).to(card))
    assert told[0].filename == __file__


def test_cuda_captures_a_call_that_has_been_warmed_up_on_another_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for CUDA's streams and graphs: the default stream waits for the other before the capture."""
    order: list[str] = []

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            order.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def within(what: str) -> Iterator[None]:
        order.append(f"into {what}")
        yield
        order.append("out")

    graph = SimpleNamespace(replay=lambda: "replayed")
    default = Stream("default")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: default)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: within(stream.name))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, capture_error_mode: within(capture_error_mode))
    replay, output = captured(lambda: order.append("call") or len(order))
    warm, caught = order[: order.index("out") + 1], order[order.index("out") + 1 :]
    assert warm[:2] == ["side waits for default", "into side"]
    assert set(warm[2:-1]) == {"call"}
    assert caught == ["default waits for side", "into thread_local", "call", "out"]
    assert replay() == "replayed"
    assert output == len(order) - 1
