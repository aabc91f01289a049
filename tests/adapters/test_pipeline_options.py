"""What parallel sampling of a pipeline is asked for and reports, by themselves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from parasolver_adapters.diffusers.options import ByNode, Choices, ParallelRun, batch_of
from parasolver_core import DDIM, NoiseSchedule, Status, solve
from parasolver_core.solution import Stats

SCHEDULE = NoiseSchedule.linear()


def test_a_run_before_its_first_call() -> None:
    run = ParallelRun()
    assert (run.stats, run.status, run.reason, run.latents) == (Stats(), None, None, None)
    assert (run.steps, run.error_estimate) == (0, 0.0)
    assert run.so_far(Status.FAILED) is None


def test_what_a_call_that_ended_early_leaves() -> None:
    run, latents = ParallelRun(stats=Stats(rounds=3)), [torch.zeros(2, 4), torch.ones(2, 4)]
    for one in latents:
        run.stepped(one)
    assert run.latents is latents[1]
    solution = run.so_far(Status.INTERRUPTED)
    assert solution is not None
    assert solution.sample is solution.states is latents[1]
    assert solution.status is Status.INTERRUPTED
    assert solution.statuses == (Status.INTERRUPTED,) * 2
    assert solution.steps == (2, 2)
    assert solution.trajectory is None
    assert solution.stats is run.stats
    assert solution.error_estimate.shape == (2,)
    assert np.isnan(solution.error_estimate).all()
    assert "ended after 2 steps" in solution.message


@pytest.mark.parametrize("save", ["sample", "trajectory"])
def test_the_solvers_one_sample_is_a_batch_of_latents(save: Any) -> None:
    """Its error is that of each: no more is known."""
    x_T = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = solve(lambda x, t: torch.tanh(x), x_T, SCHEDULE.timesteps(12), DDIM(SCHEDULE), window=4, save=save)
    stats = Stats(rounds=7)
    several = batch_of(one, stats)
    assert torch.equal(several.sample, one.sample[0])
    assert torch.equal(several.states, one.states[0])
    assert several.statuses == one.statuses * 3
    assert several.steps == (12, 12, 12)
    assert several.error_estimate.tolist() == [one.error_estimate[0]] * 3
    assert several.stats is stats
    if save == "trajectory":
        assert several.trajectory is not None
        assert one.trajectory is not None
        assert torch.equal(several.trajectory, one.trajectory[:, 0])
    else:
        assert several.trajectory is None


def test_the_first_steps_of_a_table_by_node() -> None:
    table = DDIM(SCHEDULE, eta=0.5).recurrence(SCHEDULE.timesteps(10))
    short = ByNode(table).recurrence(np.arange(4))
    assert short.timesteps.tolist() == [0, 1, 2, 3]
    assert short.input_scale is None
    for name in ("a", "b", "c", "held", "slope", "identity_slope", "signal"):
        assert np.array_equal(getattr(short, name), getattr(table, name)[:4])


def test_choices_as_they_are_by_default() -> None:
    """As the documentation of ``parallel_sampling`` says."""
    choices = Choices.checked()
    assert (choices.solver.window, choices.solver.tolerance, choices.solver.warmup_steps) == (5, 1e-2, 0)
    assert (choices.max_rows, choices.preview, choices.fallback) == (None, None, "error")
    assert (choices.sequential, choices.group, choices.timeout, choices.max_seconds) == (False, None, 120.0, None)
    assert choices.processes == 1
    assert choices.solver.check is False  # batches are compared with the pipeline's own call instead


@pytest.mark.parametrize(
    ("given", "sequential"),
    [({"window": 1}, True), ({"window": 2}, False), ({"method": "sequential"}, True), ({"method": "paradigms"}, False)],
)
def test_what_leaves_a_pipeline_to_itself(given: dict[str, Any], sequential: bool) -> None:
    assert Choices.checked(**given).sequential is sequential


def test_choices_are_kept() -> None:
    def preview(round: int, latents: torch.Tensor) -> None:
        pass

    choices = Choices.checked(7, max_rows=4, preview=preview, fallback="sequential", timeout=3.0, max_seconds=2.5)
    assert (choices.solver.window, choices.max_rows, choices.preview) == (7, 4, preview)
    assert (choices.fallback, choices.timeout, choices.max_seconds) == ("sequential", 3.0, 2.5)


def test_processes_of_a_group_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from parasolver_adapters import distributed

    seen: list[Any] = []
    shared: Any = SimpleNamespace(size=lambda: 3)
    monkeypatch.setattr(distributed, "check_group", lambda *given: (seen.append(given), shared)[1])
    choices = Choices.checked(group="group", timeout=7.0)  # type: ignore[arg-type]
    assert seen == [("group", 7.0)]
    assert choices.group is shared
    assert choices.processes == 3


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"fallback": "other"}, ValueError, 'fallback: expected "error" or "sequential"'),
        ({"preview": 1}, TypeError, "preview: expected a function"),
        ({"max_rows": 0}, ValueError, "max_rows: expected an integer of at least 1"),
        ({"max_seconds": 0}, ValueError, "max_seconds"),
    ],
)
def test_choices_that_cannot_be(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Choices.checked(**given)
