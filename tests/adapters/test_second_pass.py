"""The pass that counts, part by part: what the loop is given at each step, and when the solver is not followed."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers")
import torch
from torch.utils._pytree import tree_flatten

from parasolver_adapters.diffusers import PipelineNotParallelError
from parasolver_adapters.diffusers.options import Choices
from parasolver_adapters.diffusers.passes import second_pass
from parasolver_adapters.diffusers.passes.following import worth
from parasolver_adapters.diffusers.passes.second_pass import _correct
from parasolver_adapters.diffusers.recording.capture import Reference, form_of_call
from parasolver_core import DDIM, ConvergenceError, NoiseSchedule, NonFiniteError, Status
from parasolver_core.solution import RoundRecord, Stats
from tests.adapters.replay_parts import part_of, rule_of

SCHEDULE = NoiseSchedule.linear()
TABLE = DDIM(SCHEDULE, eta=0.5).recurrence(SCHEDULE.timesteps(4))


def test_what_a_change_of_the_state_is_worth_in_outputs() -> None:
    """As much as leads to the same next state, if a step says; else to the same clean sample."""
    assert worth(rule_of(), 1) == 0.5
    assert worth(rule_of(memory=2), 1) == -6.0
    assert worth(rule_of(b=0.0), 1) == -6.0


def test_outputs_are_corrected_for_clipping_and_for_changed_states() -> None:
    states, x, m = torch.ones(2, 3), torch.full((2, 3), 3.0, dtype=torch.float64), torch.full((2, 3), 5.0)
    assert _correct(rule_of(), [1, 0], states, None, m) is m
    got = _correct(rule_of(), [1, 0], states, x, m)
    assert got.dtype == torch.float32
    assert got.tolist() == [[5 + 2 * 0.5] * 3, [5 + 2 * 1.0] * 3]
    clip = SimpleNamespace(correct_all=lambda nodes, x, m: x + 10 * m + nodes[0])
    assert _correct(rule_of(clip=clip), [1], states[:1], None, m[:1]).tolist() == [[52.0] * 3]
    assert _correct(rule_of(clip=clip), [1], states[:1], x[:1], m[:1]).tolist() == [[54.0 + 1] * 3]


X, M = torch.ones(2, 3), torch.full((2, 3), 2.0)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-3), (torch.float64, 1e-3), (torch.bfloat16, 2.0**-3.5)]
)
def test_a_step_that_leads_elsewhere_than_its_table(dtype: torch.dtype, limit: float, size: float) -> None:
    """From the same state, output and noise, where a step reads no more."""
    noise = size * torch.full((4, 1, 2, 3), 0.5)
    want = 2 * size * X + 3 * size * M + noise[1, 0]  # 8.5
    given = {"sample": (size * X).to(dtype), "model_output": (size * M).to(dtype)}

    def fault(off: float, **members: Any) -> str | None:
        part = part_of(_noise=noise, **members)
        return part._fault(object(), 1, given, (want * (1 + off)).to(torch.float64).to(dtype), torch.zeros(2, 3))

    inside, outside = (0.5, 2.0) if dtype == torch.bfloat16 else (0.95, 1.05)
    assert fault(inside * limit) is None
    assert fault(-inside * limit) is None
    told = fault(outside * limit)
    assert told is not None
    assert told.startswith("step 1 of object is off its own table by 0.")
    assert fault(torch.nan) is not None
    changed = SimpleNamespace(unchanged=False)
    assert fault(inside * limit, _capture=changed) is None
    told = fault(outside * limit, _capture=changed)
    assert told is not None
    assert told.endswith("the loop changes the state between them, which a scheduler of one step allows (DDIM, Euler)")


@pytest.mark.parametrize(("tolerance", "limit"), [(0.0, 1e-3), (1e-2, 0.02), (0.3, 0.6)])
def test_a_step_that_reads_more_is_compared_with_where_the_solver_came_to(tolerance: float, limit: float) -> None:
    part = part_of(_rule=rule_of(memory=2), _choices=Choices.checked(tolerance=tolerance))
    given = {"sample": X, "model_output": M}
    target = torch.tensor([3.0, -4.0])
    for off, right in ((0.95, True), (1.05, False)):
        reached = target + off * limit * 5 * torch.tensor([0.6, 0.8])
        assert (part._fault(object(), 1, given, reached, target) is None) is right
    nothing = torch.zeros(2)
    assert part._fault(object(), 1, given, nothing, nothing) is None
    half = target.to(torch.bfloat16)
    assert part._fault(object(), 1, given, half * (1 + max(limit, 0.1) - 0.02), half) is None
    assert part._fault(object(), 1, given, half * (1 + max(limit, 0.1) + 0.02), half) is not None


def test_an_output_between_spread_nodes_is_the_interpolated_one() -> None:
    expected = torch.arange(6.0)[None, None].double()
    state = SimpleNamespace(expected=lambda sample, i: None, final=lambda i: (X[None] * 2)[0][None])
    part = part_of(_state=state)
    given = {"sample": X, "model_output": M}
    assert part._expected(1, given) is M  # nothing is known of it
    state.expected = lambda sample, i: (None, expected)[(sample, i) == (0, 1)]
    got = part._expected(1, given)
    assert got.dtype == torch.float32
    assert got.tolist() == [[0, 1, 2], [3, 4, 5]]
    part._capture.unchanged = False  # the loop has changed the state by -1, which is worth half of it
    assert part._expected(1, given).tolist() == [[0.5, 1.5, 2.5], [3.5, 4.5, 5.5]]


class Rounds:
    """Three more steps are final after each round."""

    def __init__(self, **members: Any) -> None:
        self.steps, self.stats, self.statuses, self.halted = [0], Stats(), [Status.RUNNING], None
        vars(self).update(members)

    def estimate(self) -> torch.Tensor:
        return torch.full((1, 2, 3), -1.0)

    def final(self, steps: int) -> torch.Tensor:
        return torch.full((1, 2, 3), float(steps))

    def errors(self) -> list[float]:
        return [0.25]


def following(each: int = 3, most: int = 10, **members: Any) -> Any:
    """A pass whose solver makes so many steps a round."""
    state = Rounds()

    def step(state: Rounds) -> None:
        state.steps[0] += each
        state.stats.rounds += 1

    result = SimpleNamespace(status=Status.MAX_ROUNDS, message="too many rounds")
    solver = SimpleNamespace(done=lambda state: state.stats.rounds >= most, step=step, result=lambda state: result)
    deadline = SimpleNamespace(halts=lambda state: False)
    return part_of(_state=state, _solver=solver, _deadline=deadline, result=result, **members)


def test_rounds_are_made_until_a_step_is_final() -> None:
    part = following()
    for steps, rounds in ((1, 1), (3, 1), (4, 2), (6, 2)):
        assert part._until(steps).tolist() == [[float(steps)] * 3] * 2
        assert part._state.stats.rounds == rounds


@pytest.mark.parametrize(("steps", "expected"), [(3, 3.0), (4, -1.0)])
def test_an_interrupted_pipeline_gets_the_estimate_of_what_is_not_final(steps: int, expected: float) -> None:
    part = following(_pipe=SimpleNamespace(interrupt=True))
    assert part._until(steps).tolist() == [[expected] * 3] * 2
    assert part._state.stats.rounds == 1


def test_time_that_is_up_leaves_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    part = following()
    told = SimpleNamespace(sample=torch.full((1, 2, 3), 7.0), error_estimate=np.array([0.5]))
    part._deadline = SimpleNamespace(halts=lambda state: state.stats.rounds >= 2, told=lambda result: told)
    assert part._until(6).tolist() == [[6.0] * 3] * 2
    got = part._until(7)
    assert got.tolist() == [[7.0] * 3] * 2
    assert got.data_ptr() != told.sample.data_ptr()  # the loop may write into it
    assert part._run.error_estimate == 0.5
    for final in (5, 6):
        assert part._until(final).tolist() == [[final] * 3] * 2  # what is final is final


@pytest.mark.parametrize(
    ("status", "error"), [(Status.MAX_ROUNDS, ConvergenceError), (Status.NONFINITE_MODEL, NonFiniteError)]
)
def test_a_solver_that_ends_early_is_an_error(
    status: Status, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    part = following(most=1)
    part.result.status = status
    monkeypatch.setattr(second_pass, "batch_of", lambda solution, stats: (solution, stats))
    assert part._until(3).tolist() == [[3.0] * 3] * 2
    with pytest.raises(error, match="too many rounds") as told:
        part._until(4)
    assert told.value.solution == (part.result, part._run.stats)  # type: ignore[attr-defined]


def test_a_preview_of_each_round_and_what_is_published() -> None:
    seen: list[Any] = []
    choices = Choices.checked(preview=lambda round, latents: seen.append((round, latents.tolist())))
    part = following(_choices=choices)
    part._round()
    part._round()
    assert seen == [(1, [[-1.0] * 3] * 2), (2, [[-1.0] * 3] * 2)]
    assert part._run.stats.rounds == 2
    assert part._run.error_estimate == 0.25


def test_evaluations_are_counted_for_each_sample() -> None:
    part = following()
    fields = dict.fromkeys(RoundRecord.__dataclass_fields__, 0)
    history = part._state.stats.history
    for evaluations in (3, 5):
        history.append(RoundRecord(**fields | {"evaluations": evaluations}))  # type: ignore[arg-type]
        part._state.stats.evaluations += evaluations
        part._publish()
    assert [record.evaluations for record in part._run.stats.history] == [6, 10]
    assert part._run.stats.evaluations == 16
    assert [record.evaluations for record in history] == [3, 5]


class Net(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return x + 1, "flag"


@pytest.mark.parametrize(
    ("members", "real"),
    [
        ({}, False),
        ({"_step": 4}, True),  # after the loop
        ({"_step": 3}, False),
        ({"_plain": True}, True),
        ({"_calling_back": True}, True),
    ],
)
def test_networks_answer_what_they_have_said_while_the_solver_is_followed(members: dict[str, Any], real: bool) -> None:
    net = Net()
    part = part_of(**{"_step": 1} | members)
    key, called = form_of_call(net, {}, [X]), []
    part._until = lambda steps: called.append(steps) or X
    part._capture.programs = [SimpleNamespace(calls=lambda form: form == key)] * 3
    part._capture.recorder.references[key] = Reference([X], [X.T + 5, "flag"], tree_flatten((1, 2))[1])
    part._denoiser.answers[part._step] = [("other", []), (key, [X.T * 7, "flag"]), (key, [X.T * 8, "flag"])]
    got, flag = part.network(net, net.forward, (X,), {})
    assert flag == "flag"
    assert torch.equal(got, X + 1 if real else X.T * 7)
    if not real:
        assert called == [part._step + 1]
        assert part._target == (part._step, X)
        assert torch.equal(part.network(net, net.forward, (X,), {})[0], X.T * 8)
        assert torch.equal(part.network(net, net.forward, (X,), {})[0], 0 * X.T)  # it was not evaluated
        other, _ = part.network(net, net.forward, (torch.ones(5),), {})  # of another kind
        assert torch.equal(other, torch.full((5,), 2.0))


def test_networks_before_the_first_step_answer_as_they_did() -> None:
    part = part_of(_prelude=SimpleNamespace(answer=lambda *given: given))
    assert part.network("net", "forward", 1, 2) == ("net", "forward", 1, 2)  # type: ignore[arg-type]


def output_of(given: dict[str, Any]) -> tuple[torch.Tensor]:
    """A scheduler's step as its table has it."""
    return (2 * given["sample"] + 3 * given["model_output"],)


def test_each_step_gets_its_output_and_its_target() -> None:
    part = following()
    seen: list[Any] = []

    def step(**given: Any) -> Any:
        seen.append(given["model_output"])
        return output_of(given)

    part._denoiser.outputs |= {0: M, 2: 2 * M}
    part._state.expected = lambda sample, i: None
    part._capture.start = X
    part._fault = lambda *told: None
    for i in range(3):
        (got,) = part.step(object(), step, {"sample": X, "model_output": torch.full((2, 3), 9.0)})
        assert got.tolist() == [[i + 1.0] * 3] * 2
        assert part._run.steps == i + 1
        assert part._run.latents.tolist() == got.tolist()  # type: ignore[union-attr]
        assert part._state.stats.rounds == (1 if i else 2) + (
            1 if i else 0
        )  # the first batch before the first callback
    assert [float(m[0, 0]) for m in seen] == [2.0, 9.0, 4.0]
    assert part._denoiser.outputs == {}


def test_no_round_more_for_the_first_step_than_there_are() -> None:
    part = following(each=4, most=1)
    part._capture.start, part._capture.unchanged = X, False
    part._state.expected = lambda sample, i: None
    part.step(object(), lambda **given: output_of(given), {"sample": X, "model_output": M})
    assert part._state.stats.rounds == 1


def test_a_loop_that_starts_elsewhere_is_refused() -> None:
    part = following()
    part._capture.start = X.double()
    with pytest.raises(PipelineNotParallelError, match="start from different latents"):
        part.step(object(), lambda **given: output_of(given), {"sample": X + 1e-3, "model_output": M})


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("estimate", [False, True])
def test_a_step_off_its_table_is_refused_or_goes_on_alone(at: int, estimate: bool) -> None:
    part = following()
    part._capture.start, part._step = X, at
    part._denoiser.outputs[at] = M
    part._estimate = torch.full((2, 3), 5.0) if estimate else None

    def step() -> Any:
        return part.step(object(), lambda **given: (X * 20,), {"sample": X, "model_output": 0 * M})[0]

    if estimate:  # the table is not followed any more
        assert step().tolist() == [[at + 1.0] * 3] * 2
    elif at == 0:
        with pytest.raises(PipelineNotParallelError, match=r"step 0 of object is off its own table by 1\.5"):
            step()
    else:
        with pytest.warns(UserWarning, match="the remaining steps are sampled sequentially: step 1 of object is off"):
            assert step().tolist() == [[20.0] * 3] * 2
        assert part._plain
        assert part._run.latents.tolist() == [[20.0] * 3] * 2  # type: ignore[union-attr]


def test_steps_that_are_left_to_the_pipeline_are_counted() -> None:
    seen: list[Any] = []
    part = following(_plain=True, _choices=Choices.checked(preview=lambda *given: seen.append(given[0])))
    for i in range(2):
        (got,) = part.step(object(), lambda **given: output_of(given), {"sample": X, "model_output": M})
        assert got.tolist() == [[8.0] * 3] * 2
        assert part._run.steps == i + 1
    stats = part._run.stats
    assert (stats.rounds, stats.calls, stats.evaluations) == (2, 2, 4)
    assert seen == [1, 2]
    assert part.status is Status.CONVERGED


def test_a_callback_may_step_and_a_second_loop_is_left_to_the_pipeline() -> None:
    part = following(_step=2, _calling_back=True)
    (got,) = part.step(object(), lambda **given: output_of(given), {"sample": X, "model_output": M})
    assert got.tolist() == [[8.0] * 3] * 2
    assert (part._step, part._state.stats.rounds) == (2, 0)
    part = following(_step=4)
    with pytest.warns(UserWarning, match="more than one loop"):
        part.step(object(), lambda **given: output_of(given), {"sample": X, "model_output": M})
    assert part._step == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        part.step(object(), lambda **given: output_of(given), {"sample": X, "model_output": M})


def test_other_processes_are_told_once() -> None:
    told: list[Any] = []
    part = part_of(_shared=SimpleNamespace(end=told.append))
    error = ValueError("boom")
    part.end(error)
    part.end()
    assert told == [error]


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"statuses": [Status.RUNNING], "halted": None}, None),
        ({"statuses": [Status.CONVERGED], "halted": None}, Status.CONVERGED),
        ({"statuses": [Status.RUNNING], "halted": Status.MAX_SECONDS}, Status.MAX_SECONDS),
    ],
)
def test_how_a_solver_ended(members: dict[str, Any], expected: Status | None) -> None:
    assert part_of(_state=SimpleNamespace(**members)).status is expected


def test_what_an_exception_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_pass, "batch_of", lambda solution, stats: (solution, stats))
    halted: list[Status] = []
    part = following()
    part._state.halt = halted.append
    assert part.reached(Status.FAILED) == (part.result, part._run.stats)
    assert halted == [Status.FAILED]
    part._state.statuses = [Status.CONVERGED]
    part.reached(Status.FAILED)
    assert halted == [Status.FAILED]

    def fails(state: Any) -> Any:
        raise RuntimeError("interrupted")

    part._solver.result = fails
    assert part.reached(Status.FAILED) is None  # no step has been made
    part._run.stepped(X)
    assert part.reached(Status.FAILED).sample is X  # type: ignore[union-attr]
    part._plain = True
    assert part.reached(Status.INTERRUPTED).status is Status.INTERRUPTED  # type: ignore[union-attr]
