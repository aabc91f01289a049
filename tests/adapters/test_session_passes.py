"""The passes of one call of a pipeline, each in the place of the real ones: what follows what, and what is left."""

from __future__ import annotations

import functools
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("diffusers")
import torch

from parasolver_adapters.diffusers import PipelineNotParallelError, pipelines
from parasolver_adapters.diffusers.options import Choices, ParallelRun
from parasolver_adapters.diffusers.passes.changes import SchedulerState
from parasolver_adapters.diffusers.passes.first_pass import CaptureDone
from parasolver_adapters.diffusers.pipelines import Session, _parallel_class
from parasolver_adapters.diffusers.schedulers.rule import UnsupportedSchedulerError
from parasolver_core import SolverError, Status
from parasolver_core.solution import Stats

X = torch.ones(2, 3)


class Scheduler:
    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        return (sample + model_output,)


def session(call: Any = None, fallback: Any = "error", **members: Any) -> Session:
    pipe = SimpleNamespace(components={}, scheduler=Scheduler(), **members)
    made = Session(pipe, call or (lambda **given: given), Choices.checked(4, fallback=fallback), ParallelRun(), [])
    made._scheduler = SchedulerState(pipe.scheduler)
    return made


@pytest.mark.parametrize("kind", [PipelineNotParallelError, UnsupportedSchedulerError])
@pytest.mark.parametrize(
    ("fallback", "too_late", "refused"),
    [("error", False, True), ("error", True, True), ("sequential", True, True), ("sequential", False, False)],
)
def test_what_cannot_be_parallel_is_refused_or_left(
    kind: Any, fallback: Any, too_late: bool, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    drawn: list[float] = []

    def call(generator: torch.Generator) -> Any:
        assert (one._remembered, one._replayed) == ([], None)
        assert (one.run.stats.rounds, one.run.status, one.run.latents, one.run.steps) == (0, None, None, 0)
        drawn.append(float(torch.rand(1, generator=generator)))
        return one.pipe.scheduler.step(X, 0, X)

    def parallel(self: Session, kwargs: Any, streams: Any) -> Any:
        drawn.append(float(torch.rand(1, generator=generator)))
        run.stats, run.status, run.latents, run.steps = Stats(), Status.FAILED, X, 5
        run.stats.rounds = 7
        self._remembered, self._replayed, self._too_late = [1], iter([1]), too_late
        raise kind("for a reason")

    one = session(call, fallback)
    run, run.error_estimate, run.reason = one.run, 5.0, "of the call before"
    monkeypatch.setattr(Session, "_parallel", parallel)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if refused:
            with pytest.raises(PipelineNotParallelError, match="for a reason") as caught:
                one.sample({"generator": generator})
            assert type(caught.value.__cause__) is kind
            assert len(drawn) == 1
        else:
            assert one.sample({"generator": generator})[0].tolist() == (X + X).tolist()
            assert drawn[0] == drawn[1]  # the same noise again
            assert (run.stats.rounds, run.steps, run.status) == (1, 1, Status.CONVERGED)
    assert [str(one.message) for one in told] == ([] if refused else ["sampled sequentially: for a reason"])
    assert (run.reason, run.error_estimate) == ("for a reason", 0.0)


def test_the_warning_is_of_the_line_that_calls_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipe:
        scheduler, components = Scheduler(), {}

        def __call__(self) -> Any:
            return self.scheduler.step(X, 0, X)

    def parallel(self: Session, kwargs: Any, streams: Any) -> Any:
        raise PipelineNotParallelError("no")

    monkeypatch.setattr(Session, "_parallel", parallel)
    runs = [ParallelRun()]
    pipe = _parallel_class(Pipe, Choices.checked(4, fallback="sequential"), runs, [])()
    with pytest.warns(UserWarning, match="sampled sequentially: no") as told:
        pipe()
    assert told[0].filename == __file__
    assert runs[0].status is Status.CONVERGED


class Listener:
    """Breaks off where it is told to."""

    def __init__(self, begun: bool = False) -> None:
        self.begun = begun


def failing(error: BaseException | None, **given: Any) -> None:
    if error is not None:
        raise error


@pytest.mark.parametrize(
    ("error", "begun", "raised"),
    [
        (None, True, None),
        (CaptureDone(), True, None),
        (ValueError("boom"), False, ValueError),
        (ValueError("boom"), True, PipelineNotParallelError),
        (PipelineNotParallelError("so"), True, PipelineNotParallelError),
        (SolverError("so"), True, SolverError),
        (torch.OutOfMemoryError("so"), True, torch.OutOfMemoryError),
        (KeyboardInterrupt(), True, KeyboardInterrupt),
    ],
    ids=repr,
)
def test_a_pass_that_is_only_watched(error: Any, begun: bool, raised: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    back: list[Any] = []
    one = session(functools.partial(failing, error))
    one._processors = ["processors"]  # type: ignore[assignment]
    monkeypatch.setattr(pipelines, "put_back", back.append)
    monkeypatch.setattr(pipelines, "causes", lambda pipe: "look there")
    if raised is None:
        one._silently({}, Listener(begun))  # type: ignore[arg-type]
    else:
        with pytest.raises(raised) as caught:
            one._silently({}, Listener(begun))  # type: ignore[arg-type]
        if raised is type(error):
            assert caught.value is error
        else:
            assert str(caught.value) == (
                "the loop fails where the networks' outputs are not known yet (ValueError: boom); look there"
            )
    assert back == [["processors"]]


def test_a_pass_that_is_only_watched_calls_nobody_back() -> None:
    given: list[Any] = []
    one = session(lambda **kwargs: given.append(kwargs))
    one._processors = []
    one._silently({"n": 1, "callback": print, "callback_on_step_end": None}, Listener())  # type: ignore[arg-type]
    one._silently({"callback_on_step_end": print}, Listener())  # type: ignore[arg-type]
    assert given == [{"n": 1, "callback": None, "callback_on_step_end": None}, {"callback_on_step_end": None}]


@pytest.mark.parametrize(
    ("programs", "checked", "looked"), [([1], False, True), ([1], True, False), ([], False, False)]
)
def test_steps_are_looked_at_once_for_a_kind_of_call(
    programs: list[int], checked: bool, looked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    one = session()
    one._remembered = [4, 5]
    capture, streams = SimpleNamespace(programs=programs), SimpleNamespace(restore=lambda: done.append("restore"))
    monkeypatch.setattr(pipelines, "kind_of_call", lambda pipe, capture, kwargs: "kind")
    monkeypatch.setattr(pipelines, "was_checked", lambda pipe, kind: checked)
    monkeypatch.setattr(pipelines, "keep_checked", lambda pipe, kind: done.append((pipe, kind)))
    monkeypatch.setattr(pipelines, "Check", lambda pipe, capture: (pipe, capture))
    silently = lambda self, kwargs, check: done.append((kwargs, check, list(self._replayed)))  # noqa: E731
    monkeypatch.setattr(Session, "_silently", silently)
    one._look({"n": 1}, capture, streams)  # type: ignore[arg-type]
    whole = [({"n": 1}, (one.pipe, capture), [4, 5]), "restore", (one.pipe, "kind")]
    assert done == (whole if looked else [])


class Replaying:
    """In the place of the second pass."""

    def __init__(self, done: list[Any], status: Any = None, solution: Any = None, called_back: bool = False) -> None:
        self.done, self.status, self.solution, self.called_back = done, status, solution, called_back

    def watched(self, kwargs: Any) -> Any:
        return kwargs | {"watched": True}

    def end(self, error: Any = None) -> None:
        self.done.append(error)

    def reached(self, status: Status) -> Any:
        self.done.append(status)
        return self.solution


def parallel(replay: Replaying, call: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Session, list[str]]:
    one, order = session(call), list[str]()
    one._deadline = None  # type: ignore[assignment]
    monkeypatch.setattr(pipelines, "refuse_what_is_not_followed", lambda capture: None)
    monkeypatch.setattr(pipelines, "Replay", lambda *given: replay)
    monkeypatch.setattr(Session, "_capture", lambda self, kwargs: order.append("capture"))
    monkeypatch.setattr(Session, "_look", lambda self, kwargs, capture, streams: order.append("look"))
    return one, order


@pytest.mark.parametrize(("status", "told"), [(None, Status.STOPPED), (Status.MAX_SECONDS, Status.MAX_SECONDS)])
def test_the_second_pass_is_the_real_one(status: Any, told: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    one, order = parallel(Replaying(done, status), lambda **given: given, monkeypatch)
    one._remembered = [1]
    streams: Any = SimpleNamespace(restore=lambda: order.append("restore"))
    assert one._parallel({"n": 1}, streams) == {"n": 1, "watched": True}
    assert order == ["capture", "restore", "look"]
    assert done == [None]
    assert one.run.status is told
    assert list(one._replayed or ()) == [1]


@pytest.mark.parametrize("called_back", [False, True])
@pytest.mark.parametrize("solution", [None, SimpleNamespace(status=Status.MAX_ROUNDS)])
@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("boom"), Status.FAILED), (KeyboardInterrupt(), Status.INTERRUPTED)]
)
def test_a_second_pass_that_ends_early_has_what_was_reached(
    error: Any, status: Status, solution: Any, called_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    error = type(error)(*error.args)
    replay = Replaying(done, None, solution, called_back)
    one, _ = parallel(replay, lambda **given: failing(error), monkeypatch)
    with pytest.raises(type(error)):
        one._parallel({}, SimpleNamespace(restore=lambda: None))  # type: ignore[arg-type]
    assert done == [status, error]
    assert one._too_late is called_back
    assert one.run.status is (None if solution is None else Status.MAX_ROUNDS)
    assert getattr(error, "solution", None) is solution


def test_guiders_that_change_the_network_are_refused() -> None:
    class BaseGuidance:
        def prepare_models(self) -> None: ...

    BaseGuidance.__module__ = "diffusers.guiders"
    BaseGuidance.prepare_models.__qualname__ = "BaseGuidance.prepare_models"

    class Plain(BaseGuidance): ...

    class Changing(BaseGuidance):
        def prepare_models(self) -> None: ...

    for guider in (None, Plain()):
        session(guider=guider)._refuse()
    with pytest.raises(PipelineNotParallelError, match="the guider Changing changes the network"):
        session(guider=Changing())._refuse()


def test_a_pipeline_that_calls_itself_or_outlives_its_block_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Inner:
        def set_progress_bar_config(self) -> None: ...

    class Pipe:
        def __init__(self) -> None:
            self.inner, self.other = Inner(), object()

        def __call__(self, n: int, again: bool = False) -> Any:
            return self(n + 1) if again else (n, self.encode_prompt(n))

        def encode_prompt(self, text: int) -> str:
            return f"text {text}"

    def sample(self: Session, given: dict[str, Any]) -> Any:
        told.append((given, self.bars))
        return self.call(**given)

    def remember(self: Session, encode: Any) -> Any:
        told.append(self)
        return encode()

    monkeypatch.setattr(Session, "sample", sample)
    monkeypatch.setattr(Session, "remember", remember)
    runs = [ParallelRun(), ParallelRun()]
    pipe = _parallel_class(Pipe, Choices.checked(4), runs, [])()
    assert pipe.encode_prompt(3) == "text 3"
    assert told == []
    assert pipe(1, again=True) == (2, "text 2")
    assert told[0] == ({"n": 1, "again": True}, [pipe, pipe.inner])
    assert len(told) == 2  # one session, in which a prompt was encoded
    assert told[1].run is runs[0]
    told.clear()
    runs.clear()
    assert pipe(5) == (5, "text 5")
    assert told == []
