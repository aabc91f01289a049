"""What is around a run: graphs of torch, progress bars, devices, what is printed."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import parasolver_core
from parasolver_core import (
    solve,
    solve_sequential,
)
from tests.core.problems import TanhNetwork, normal
from tests.core.wrong_runs import BOTH, GRID, NETWORK, RULE, never

# torch


@BOTH
def test_no_graph_is_kept(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 3)
    x_T = torch.randn(2, 3, requires_grad=True)
    seen = []

    def callback(state: Any) -> None:
        seen.extend([state.estimate().requires_grad, state.states.requires_grad])

    got = solve(lambda x, t: torch.tanh(network(x)), x_T, GRID, RULE, callback=callback, save="trajectory", **options)
    for array in (got.sample, got.states, got.trajectory):
        assert not array.requires_grad
        assert array.grad_fn is None
    assert x_T.grad is None
    assert x_T.requires_grad
    assert torch.is_grad_enabled()
    assert not any(seen)


@pytest.mark.filterwarnings("ignore:torch.asarray:UserWarning")
@BOTH
def test_results_of_a_start_that_requires_gradients(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 3)
    x_T = torch.randn(1, 3, requires_grad=True)
    recorded = []

    def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        recorded.append((x.requires_grad, torch.is_grad_enabled()))
        return torch.tanh(network(x))

    got = solve(denoiser, x_T, GRID, RULE, save="trajectory", **options)
    assert set(recorded) == {(False, False)}
    assert not any(array.requires_grad for array in (got.sample, got.states, got.trajectory))
    plain = solve(denoiser, x_T.detach(), GRID, RULE, **options)
    assert torch.equal(plain.sample, got.sample)
    assert torch.is_grad_enabled()


def test_a_progress_bar_is_closed_by_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    from tqdm import tqdm

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        if np.any(t == GRID[10]):
            raise ValueError("boom")
        return NETWORK(x, t)

    with pytest.raises(ValueError, match="boom"):
        solve(network, normal((1, 3)), GRID, RULE, progress=True)
    assert not tqdm._instances
    solve(NETWORK, normal((2, 3)), GRID, RULE, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "40/40" in captured.err


class BrokenPipe(io.StringIO):
    """Takes a few words, then nothing more."""

    words = 0

    def write(self, text: str) -> int:
        self.words += 1
        if self.words > 4:
            raise BrokenPipeError("nobody listens")
        return super().write(text)


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("make", [lambda: None, closed, BrokenPipe], ids=["none", "closed", "breaks"])
def test_a_progress_bar_with_nowhere_to_show_it(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", make())
    shown = solve(NETWORK, normal((2, 3)), GRID, RULE, progress=True)
    np.testing.assert_array_equal(shown.sample, solve(NETWORK, normal((2, 3)), GRID, RULE).sample)


def test_a_progress_bar_whose_stream_is_closed_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert solve(NETWORK, normal((2, 3)), GRID, RULE, progress=True, callback=lambda state: stream.close()).success


def test_a_device_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("it is there")
    with pytest.raises(ValueError, match=r"^state_device: .*got 'cuda' \((AssertionError|RuntimeError): "):
        solve(never, torch.ones(2, 3), GRID, RULE, state_device="cuda")


def test_a_start_without_a_batch_is_understood() -> None:
    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        return np.ones((len(x), 8))

    with pytest.raises(ValueError, match=r"x_T of shape \(n,\) is n samples of one number each; .*x_T\[None\]"):
        solve(network, np.ones(8), GRID, RULE, 1)


def test_results_say_what_they_are_in_a_line() -> None:
    got = solve(NETWORK, normal((2, 3), dtype="float32"), GRID, RULE, 6)
    rounds, evaluations = got.stats.rounds, got.stats.evaluations
    assert repr(got) == f"Solution(converged, {rounds} rounds, {evaluations} evaluations, sample float32 (2, 3))"
    record = got.stats.history[1]
    assert repr(record).startswith(
        f"RoundRecord(round=2, evaluations={record.evaluations}, accepted={record.accepted}, "
    )
    assert "array" not in repr(record)
    assert len(repr(record.samples[0])) < 120
    assert got.message == f"Converged in {rounds} rounds instead of 20, with {evaluations / 2:g} evaluations a sample."
    plain = solve_sequential(NETWORK, normal((1, 3)), GRID, RULE)
    assert plain.message == "Converged in 20 rounds, with 20 evaluations."


def test_the_core_prints_and_logs_nothing() -> None:
    code = """
import numpy as np
from parasolver_core import *
schedule = NoiseSchedule.linear()
solve(lambda x, t: np.tanh(x), np.ones((1, 2)), schedule.timesteps(9), DDIM(schedule))
"""
    root = Path(parasolver_core.__file__).parents[1]
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_network_of_tanh_is_what_the_others_are_compared_with() -> None:
    """The shared network itself: of the promised norm, and the same in NumPy and torch."""
    network = TanhNetwork(size=6, gain=1.5)
    assert np.prod([np.linalg.norm(w, 2) for w in network.weights]) == pytest.approx(1.5)
    x, t = normal((4, 6)), np.arange(4)
    np.testing.assert_allclose(network(torch.asarray(x), torch.asarray(t)).numpy(), network(x, t), rtol=1e-13)
