"""One call of a pipeline as a session: what its callbacks changed, what it leaves, and the error that it ends in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("diffusers")
import torch

from parasolver_adapters.diffusers import PipelineNotParallelError
from parasolver_adapters.diffusers.options import Choices, ParallelRun
from parasolver_adapters.diffusers.passes import second_pass
from parasolver_adapters.diffusers.passes.second_pass import Replay
from parasolver_adapters.diffusers.pipelines import Session, _Counter, _leave, _without_bars
from parasolver_core import Status
from parasolver_core.errors import attach, has_solution
from tests.adapters.test_second_pass import TABLE, part_of


class Scheduler:
    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        return (sample + model_output,)


def session(call: Any, **members: Any) -> Session:
    """A call that is left to the pipeline."""
    pipe = SimpleNamespace(components={}, scheduler=Scheduler(), **members)
    return Session(pipe, lambda **given: call(pipe, **given), Choices.checked(1), ParallelRun(), [])


X = torch.ones(2, 3)


def steps(pipe: Any, count: int, error: BaseException | None = None) -> Any:
    x = X
    for at in range(count):
        (x,) = pipe.scheduler.step(X, at, x)
    if error is not None:
        raise error
    return x


def test_a_call_that_is_left_to_the_pipeline_is_counted() -> None:
    one = session(steps)
    for _ in range(2):  # each call anew
        assert one.sample({"count": 3}).tolist() == [[4.0] * 3] * 2
        stats = one.run.stats
        assert (stats.rounds, stats.calls, stats.evaluations) == (3, 3, 6)
        assert (one.run.status, one.run.reason, one.run.steps) == (Status.CONVERGED, None, 3)
        assert one.run.latents.tolist() == [[4.0] * 3] * 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("boom"), Status.FAILED), (KeyboardInterrupt(), Status.INTERRUPTED)]
)
def test_an_exception_has_what_was_reached(error: BaseException, status: Status) -> None:
    one = session(steps)
    with pytest.raises(type(error)):
        one.sample({"count": 2, "error": error})
    assert one.run.status is status
    solution: Any = error.solution  # type: ignore[attr-defined]
    assert solution.sample.tolist() == [[3.0] * 3] * 2
    assert solution.status is status
    early = RuntimeError("before the first step")
    with pytest.raises(RuntimeError):
        one.sample({"count": 0, "error": early})
    assert not has_solution(early)
    own = RuntimeError("with one of its own")
    attach(own, lambda: "solution")  # type: ignore[arg-type, return-value]
    with pytest.raises(RuntimeError):
        one.sample({"count": 2, "error": own})
    assert own.solution == "solution"  # type: ignore[attr-defined]


def test_previews_of_a_sequential_run() -> None:
    seen: list[Any] = []
    counter = _Counter(ParallelRun(), lambda round, latents: seen.append((round, float(latents[0, 0]))))
    for _ in range(2):
        counter.step(None, lambda **given: (given["sample"] + 1,), {"sample": X})
    assert seen == [(1, 2.0), (2, 2.0)]


def test_bars_are_hidden_for_a_while() -> None:
    class Owner:
        def set_progress_bar_config(self, **config: Any) -> None:
            self._progress_bar_config = config

    plain, set_before = Owner(), Owner()
    set_before.set_progress_bar_config(desc="mine")
    with _without_bars([plain, set_before]):
        assert plain._progress_bar_config == {"disable": True}
        assert set_before._progress_bar_config == {"desc": "mine", "disable": True}
    assert "_progress_bar_config" not in vars(plain)
    assert set_before._progress_bar_config == {"desc": "mine"}


def test_a_guider_or_a_cache_that_depends_on_the_order_is_refused() -> None:
    cached = torch.nn.Identity()
    one = session(steps)
    one.pipe.components["unet"] = cached
    one._refuse()
    cached.is_cache_enabled = False  # type: ignore[assignment]
    one._refuse()
    cached.is_cache_enabled = True  # type: ignore[assignment]
    with pytest.raises(PipelineNotParallelError, match=r"unet has a step cache enabled.*pipe\.unet\.disable_cache"):
        one._refuse()


def test_prompts_are_encoded_once_for_both_passes() -> None:
    one, made = session(steps), list[int]()

    def encode() -> int:
        made.append(len(made))
        return made[-1]

    one._capturing = SimpleNamespace(prelude=["before"])  # type: ignore[assignment]
    assert one.remember(lambda: (one._capturing.prelude.append("text"), encode())[1]) == 0  # type: ignore[union-attr]
    assert one._capturing.prelude == ["before"]  # type: ignore[union-attr]
    one._capturing = None
    assert one.remember(encode) == 1
    one._replayed = iter(one._remembered)
    assert [one.remember(encode), one.remember(encode), made] == [0, 1, [0, 1]]


def test_blocks_are_left_one_by_one() -> None:
    class Own:
        pass

    class Outer(Own):
        pass

    class Inner(Outer):
        pass

    pipe, other = Inner(), Inner()
    entries = [(pipe, Own), (pipe, Outer), (other, Own), (other, Outer), (pipe, Inner)]
    blocks = list(entries)
    _leave(entries[1], blocks)
    assert type(pipe) is Inner
    _leave(entries[4], blocks)
    assert type(pipe) is Own
    assert blocks == [(other, Own), (other, Outer)]  # another pipeline's stay


def watched(callback: Any, part: Any = None) -> tuple[Any, Any]:
    part = part or part_of()
    part._pipe.components = {}
    return part, part.watched({"callback_on_step_end": callback, "n": 1})["callback_on_step_end"]


@pytest.mark.parametrize("name", ["latents", "mask"])
@pytest.mark.parametrize("how", ["written", "replaced"])
def test_a_callback_that_changes_one_of_several_tensors(name: str, how: str) -> None:
    def callback(pipe: Any, at: int, t: Any, given: dict[str, Any]) -> Any:
        assert part._calling_back
        if how == "written":
            given[name].add_(1)
            return {}
        return given | {name: given[name].clone()}

    part, watching = watched(callback)
    given = {"latents": torch.zeros(2), "mask": torch.zeros(2)}
    with pytest.warns(UserWarning, match="callback_on_step_end changed what the pipeline goes on with"):
        watching(part._pipe, 0, 1, given)
    assert part._plain
    assert part.called_back
    assert not part._calling_back


def test_a_callback_that_only_looks() -> None:
    def callback(pipe: Any, at: int, t: Any, given: Any) -> Any:
        pipe._interrupt = True  # stops the pipeline, and changes nothing that it goes on with
        return given

    part, watching = watched(callback)
    given = {"latents": torch.zeros(2), "mask": torch.zeros(2)}
    assert watching(part._pipe, 0, 1, given) is given
    assert watched(lambda *args: None)[1](part._pipe, 0, 1, torch.zeros(2)) is None
    assert not part._plain

    def setting(pipe: Any, at: int, t: Any, given: Any) -> Any:
        pipe.setting = at

    part, watching = watched(setting)
    with pytest.warns(UserWarning, match="changed what the pipeline goes on with"):
        watching(part._pipe, 0, 1, given)
    watching(part._pipe, 1, 1, given)  # told once
    latents = torch.zeros(2)
    part, watching = watched(lambda at, t, latents: latents.add_(1))  # the older kind
    with pytest.warns(UserWarning, match="changed what the pipeline goes on with"):
        watching(0, torch.tensor(1), latents)


def test_callbacks_of_a_class_say_which_tensors_they_want() -> None:
    part = part_of()
    part._pipe.components = {}
    assert part.watched({"n": 1, "callback": None}) == {"n": 1, "callback": None}

    class Callback:
        tensor_inputs = ("latents", "mask")

        def __call__(self, *given: Any) -> Any:
            return {}

    got = part.watched({"callback_on_step_end": Callback(), "n": 1})
    assert got["callback_on_step_end_tensor_inputs"] == ("latents", "mask")
    assert got["n"] == 1


@pytest.mark.parametrize(
    ("max_rows", "processes", "expected"), [(None, 1, None), (7, 1, 3), (1, 1, 1), (7, 4, 12), (2, 1, 1)]
)
def test_rows_are_those_of_latents(
    max_rows: int | None, processes: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = Choices.checked(3, max_rows=max_rows)
    monkeypatch.setattr(Choices, "processes", property(lambda self: processes))
    monkeypatch.setattr(second_pass, "_denoiser", lambda capture, choices: lambda x, nodes: x)
    noise = torch.randn(4, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    capture: Any = SimpleNamespace(
        start=X, timesteps=[0, 1, 2, 3], rule=SimpleNamespace(table=TABLE), noise=lambda: noise, prelude=[1]
    )
    replay = Replay(None, ParallelRun(), choices, capture, None)  # type: ignore[arg-type]
    assert replay._solver.max_rows == expected
    assert (replay._step, replay._plain, replay.called_back, replay._shared) == (0, False, False, None)
    assert replay._calling_back is False
    assert capture.prelude == []
    assert replay._state.final(0).tolist() == X[None].tolist()
