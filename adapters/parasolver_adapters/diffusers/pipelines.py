"""Parallel sampling of unmodified diffusers pipelines.

The pipeline's own ``__call__`` runs twice. The first pass is broken off after the loop: its networks answer with zeros
after the first step, and it is only watched (:mod:`~parasolver_adapters.diffusers.passes.first_pass`). That gives each
step as a program and the scheduler's steps as a table, all that the core's solver needs. The second pass is the real
one (:mod:`~parasolver_adapters.diffusers.passes.second_pass`). Where it calls ``scheduler.step``, the solver goes on
until that step is final, so that progress, callbacks and interrupts happen as in a sequential run, and decoding follows
as ever.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import OutOfMemoryError
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves

from parasolver_adapters.diffusers.options import Choices, ParallelRun, Preview
from parasolver_adapters.diffusers.passes.changes import SchedulerState
from parasolver_adapters.diffusers.passes.checking import Check, causes, keep_checked, kind_of_call, was_checked
from parasolver_adapters.diffusers.passes.first_pass import Capture, CaptureDone
from parasolver_adapters.diffusers.passes.following import refuse_what_is_not_followed
from parasolver_adapters.diffusers.passes.listening import (
    Listener,
    by_name,
    called,
    decoders_of,
    is_a,
    listening,
    networks_of,
    processors_of,
    put_back,
    subclass,
)
from parasolver_adapters.diffusers.passes.second_pass import Replay
from parasolver_adapters.diffusers.refusal import PipelineNotParallelError
from parasolver_adapters.diffusers.schedulers.rule import UnsupportedSchedulerError
from parasolver_adapters.given import Given
from parasolver_core import SolverError, Status
from parasolver_core.errors import attach, has_solution
from parasolver_core.methods.method import Method
from parasolver_core.solution import Stats
from parasolver_core.solver.deadline import Deadline


@contextmanager
def parallel_sampling(
    pipe: Any,
    window: int = 5,
    *,
    tolerance: float = 1e-2,
    method: str | Method = "secant",
    max_rounds: int | None = None,
    max_seconds: float | None = None,
    max_rows: int | None = None,
    warmup_steps: int = 0,
    subintervals: int | None = None,
    preview: Preview | None = None,
    fallback: Literal["error", "sequential"] = "error",
    group: dist.ProcessGroup | DeviceMesh | None = None,
    timeout: float = 120.0,
) -> Iterator[ParallelRun]:
    """Calls of ``pipe`` inside the block sample in parallel; the pipeline itself is not changed.

    Preparation, progress bar, callbacks, decoding and outputs are the pipeline's own. The result is that of the
    untouched pipeline within the tolerance, for the same generator. A batch converges together: its error is the RMS
    over all samples. Of nested blocks of one pipeline the inner one counts.

    Args:
        pipe: a diffusers pipeline with a ``scheduler``.
        window: steps evaluated in one round. 1 leaves the pipeline to itself.
        tolerance, method, max_rounds, warmup_steps, subintervals: as in :func:`parasolver_core.solve`.
        max_seconds: a deadline, from the start of a call to the end of its rounds. Steps that are not final then have
            the best estimate of the last latents for their result, and ``run.error_estimate`` says how far that may be
            off. One round is always made; a call that is left to the pipeline has no deadline.
        max_rows: the most rows of latents in one call of a network (guidance may double them), a multiple of the batch.
        preview: ``preview(round, latents)`` after each round, with the current estimate of the final latents, which
            is computed for it; after each step, with its result, where the pipeline is left to itself.
        fallback: what to do with a call that cannot be sampled in parallel. "error": raise. "sequential": warn, and
            leave the pipeline to itself; ``run.reason`` says why.
        group: processes that share the rows of a round, each of which makes the same call of the pipeline: a process
            group, ``torch.distributed.group.WORLD`` for all of them, or one dimension of a device mesh. ``max_rows``
            then counts the rows of one process. None: this process alone.
        timeout: seconds that a process of the group waits for the others, in each round.

    Yields:
        A :class:`ParallelRun`.

    Raises:
        PipelineNotParallelError: from the pipeline's call, with the reason.
        ConvergenceError, NonFiniteError: as :func:`parasolver_core.solve`, from the pipeline's call.
        WorkerError: in all processes of the group, if one of them failed, died or was called otherwise.

    Example::

        with parallel_sampling(pipe, window=16) as run:
            image = pipe(prompt, num_inference_steps=50).images[0]
        run.stats.rounds
    """
    for name in ("scheduler", "components"):
        if not hasattr(pipe, name):
            raise TypeError(
                f"pipe: expected a diffusers pipeline with {name}, got {type(pipe).__name__}; for a loop of another "
                "kind take parasolver_adapters.diffusers.parallel_loop"
            )
    if is_a(pipe, "ModularPipeline"):
        raise TypeError(
            f"pipe: {type(pipe).__name__} is a modular pipeline; put its denoise block into a "
            "parasolver_adapters.diffusers.modular.ParallelDenoiseStep instead"
        )
    choices = Choices.checked(
        window,
        tolerance=tolerance,
        method=method,
        max_rounds=max_rounds,
        max_seconds=max_seconds,
        max_rows=max_rows,
        warmup_steps=warmup_steps,
        subintervals=subintervals,
        preview=preview,
        fallback=fallback,
        group=group,
        timeout=timeout,
    )
    run, kind = ParallelRun(), type(pipe)
    runs, blocks = [run], getattr(kind, _BLOCKS, [])
    if not any(known is pipe for known, _ in blocks):  # copies of a pipeline have its class
        blocks.append((pipe, kind))
    entered = pipe, _parallel_class(getattr(kind, _UNTOUCHED, kind), choices, runs, blocks)
    blocks.append(entered)
    pipe.__class__ = entered[1]
    try:
        yield run
    finally:
        _leave(entered, blocks)
        runs.clear()  # the class lives on until garbage is collected


_UNTOUCHED, _BLOCKS = "_outside_parallel_sampling", "_blocks_of_parallel_sampling"
_Blocks = list[tuple[Any, type]]  # pipelines, and the classes that they got, the innermost last; the first is their own


def _leave(entered: tuple[Any, type], blocks: _Blocks) -> None:
    """Give a pipeline the class of the block that was entered last of those that are left, in any order."""
    pipe = entered[0]
    left = [block for block in blocks if block[0] is pipe and block is not entered]
    gone = [*left, entered] if len(left) == 1 else [entered]
    blocks[:] = [block for block in blocks if not any(block is other for other in gone)]
    pipe.__class__ = left[-1][1]


def _parallel_class(parent: type, choices: Choices, runs: list[ParallelRun], blocks: _Blocks) -> type:
    """The pipeline's class, with calls that sample in parallel; prompts are encoded once for both passes."""
    active: list[Session] = []

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if active or not runs:  # a pipeline that calls itself, or a copy that outlives the block
            return parent.__call__(self, *args, **kwargs)
        parts = vars(self).values()
        inner = [part for part in parts if hasattr(type(part), "set_progress_bar_config")]  # of combined pipelines
        session = Session(self, functools.partial(parent.__call__, self), choices, runs[0], [self, *inner])
        given = by_name(inspect.signature(session.call), args, kwargs)
        active.append(session)
        try:
            return session.sample(given)
        finally:
            active.clear()

    members: dict[str, Any] = {"__call__": functools.wraps(parent.__call__)(call), _UNTOUCHED: parent, _BLOCKS: blocks}
    if hasattr(parent, "encode_prompt"):

        def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
            encode = functools.partial(parent.encode_prompt, self, *args, **kwargs)
            return active[0].remember(encode) if active else encode()

        members["encode_prompt"] = functools.wraps(parent.encode_prompt)(encode_prompt)
    return subclass(parent, members)


class Session:
    """One call of a pipeline, or of a block of a modular one.

    Args:
        pipe: has the ``scheduler`` and the ``components``.
        call: runs the loop, once for each pass, with what :meth:`sample` is given.
        choices, run: what was asked for, and what is reported.
        bars: whose progress bars the first pass must not show.
    """

    def __init__(
        self, pipe: Any, call: Callable[..., Any], choices: Choices, run: ParallelRun, bars: list[Any]
    ) -> None:
        self.pipe, self.call, self.choices, self.run, self.bars = pipe, call, choices, run, bars
        self._remembered: list[Any] = []
        self._replayed: Iterator[Any] | None = None
        self._capturing: Capture | None = None
        self._too_late = False  # to leave a call to the pipeline: callbacks have been made

    def sample(self, kwargs: dict[str, Any]) -> Any:
        """Both passes, or the pipeline left to itself."""
        run, self._processors, self._scheduler = self.run, processors_of(self.pipe), SchedulerState(self.pipe.scheduler)
        run.stats, run.status, run.reason, run.latents, run.steps = Stats(), None, None, None, 0
        run.error_estimate, self._deadline = 0.0, Deadline(self.choices.max_seconds)
        try:
            return self._sequential(kwargs) if self.choices.sequential else self._parallel_or_refuse(kwargs)
        except BaseException as error:
            run.status = run.status or _ended_by(error)
            put_back(self._processors)
            solution = run.so_far(run.status)
            if solution is not None and not has_solution(error):
                attach(error, lambda: solution)
            raise

    def _parallel_or_refuse(self, kwargs: dict[str, Any]) -> Any:
        run, given = self.run, Given(kwargs)
        try:
            return self._parallel(kwargs, given)
        except (PipelineNotParallelError, UnsupportedSchedulerError) as error:
            run.reason = str(error)
            self._scheduler.put_back(self.pipe)
            if not self._too_late:
                given.restore()
            if self.choices.fallback == "error" or self._too_late:
                raise PipelineNotParallelError(run.reason) from error
        warnings.warn(f"sampled sequentially: {run.reason}", stacklevel=4)
        run.stats, run.status, run.latents, run.steps = Stats(), None, None, 0
        self._remembered, self._replayed = [], None
        return self._sequential(kwargs)

    def _looked_at(self, kwargs: dict[str, Any], given: Given) -> Capture:
        """The recorded steps, which are what the loop does; other processes are told of what ends the run here."""
        try:
            self._refuse()
            capture = self._capture(kwargs)
            given.restore()
            refuse_what_is_not_followed(capture)
            self._look(kwargs, capture, given)
        except BaseException as error:
            if self.choices.group is not None:
                from parasolver_adapters.distributed import DistributedDenoiser

                DistributedDenoiser(self.call, self.choices.group, timeout=self.choices.timeout).end(error)
            raise
        return capture

    def _parallel(self, kwargs: dict[str, Any], given: Given) -> Any:
        capture = self._looked_at(kwargs, given)
        self._replayed = iter(self._remembered)
        replay = Replay(self.pipe, self.run, self.choices, capture, self._deadline)
        try:
            with listening(self.pipe, replay):
                result = called(self.call, replay.watched(kwargs))
            replay.end()
        except BaseException as error:
            self._too_late = replay.called_back
            solution = replay.reached(_ended_by(error))
            if solution is not None:
                self.run.status = solution.status
                attach(error, lambda: solution)
            replay.end(error)
            raise
        self.run.status = replay.status or Status.STOPPED
        return result

    def remember(self, encode: Callable[[], Any]) -> Any:
        """The same prompt embeddings in the second pass as in the first."""
        if self._replayed is not None:
            return next(self._replayed)
        prelude = [] if self._capturing is None else self._capturing.prelude
        before = len(prelude)
        self._remembered.append(encode())
        del prelude[before:]  # not asked for again
        return self._remembered[-1]

    def _capture(self, kwargs: dict[str, Any]) -> Capture:
        capture = self._capturing = Capture(self.pipe)
        hooks = [decoder.register_forward_pre_hook(capture.over) for decoder in decoders_of(self.pipe)]
        try:
            self._silently(kwargs, capture)
        finally:
            capture.recorder.close()
            self._capturing = None
            for hook in hooks:
                hook.remove()
        capture.finish(kwargs)
        return capture

    def _look(self, kwargs: dict[str, Any], capture: Capture, given: Given) -> None:
        """Once for a kind of call: whether the recorded steps are what the loop does."""
        kind = kind_of_call(self.pipe, capture, kwargs)
        if not capture.programs or was_checked(self.pipe, kind):
            return
        self._replayed = iter(self._remembered)
        self._silently(kwargs, Check(self.pipe, capture))
        given.restore()
        keep_checked(self.pipe, kind)

    def _silently(self, kwargs: dict[str, Any], listener: Capture | Check) -> None:
        """A pass without callbacks and progress bars, which the listener breaks off."""
        silent = {name: None for name in ("callback_on_step_end", "callback") if kwargs.get(name) is not None}
        try:
            with listening(self.pipe, listener), _without_bars(self.bars):
                called(self.call, kwargs | silent)
        except CaptureDone:
            pass
        except Exception as error:
            if not listener.begun or isinstance(error, (PipelineNotParallelError, SolverError, OutOfMemoryError)):
                raise
            raise PipelineNotParallelError(
                f"the loop fails where the networks' outputs are not known yet ({type(error).__name__}: {error}); "
                f"{causes(self.pipe)}"
            ) from error
        finally:
            put_back(self._processors)  # a pipeline that sets some for its loop takes them back after it
            self._scheduler.put_back(self.pipe)

    def _sequential(self, kwargs: dict[str, Any]) -> Any:
        counter = _Counter(self.run, self.choices.preview)
        with listening(self.pipe, counter):
            result = called(self.call, kwargs)
        self.run.status = Status.CONVERGED
        return result

    def _refuse(self) -> None:
        """What cannot be seen from the calls of a network."""
        for name, module in networks_of(self.pipe).items():
            if getattr(module, "is_cache_enabled", False):
                raise PipelineNotParallelError(
                    f"{name} has a step cache enabled, whose state depends on the order of the steps; call "
                    f"pipe.{name}.disable_cache() first"
                )
        guider: Any = getattr(self.pipe, "guider", None)
        if is_a(guider, "BaseGuidance") and type(guider).prepare_models.__qualname__ != "BaseGuidance.prepare_models":
            raise PipelineNotParallelError(
                f"the guider {type(guider).__name__} changes the network between two calls of one step, so they cannot "
                "be made later; take ClassifierFreeGuidance"
            )


@contextmanager
def _without_bars(owners: list[Any]) -> Iterator[None]:
    """While active: the progress bars of these pipelines or blocks are not shown."""
    shown = [vars(owner).get("_progress_bar_config", _UNSET) for owner in owners]
    for owner, config in zip(owners, shown, strict=True):
        owner.set_progress_bar_config(**{**(config if isinstance(config, dict) else {}), "disable": True})
    try:
        yield
    finally:
        for owner, config in zip(owners, shown, strict=True):
            if config is _UNSET:
                vars(owner).pop("_progress_bar_config", None)
            else:
                owner._progress_bar_config = config


_UNSET = object()


def _ended_by(error: BaseException) -> Status:
    return Status.INTERRUPTED if isinstance(error, KeyboardInterrupt) else Status.FAILED


class _Counter(Listener):
    """Counts a sequential run."""

    def __init__(self, run: ParallelRun, preview: Preview | None) -> None:
        self._run, self._preview = run, preview

    def step(self, scheduler: Any, step: Callable[..., Any], given: dict[str, Any]) -> Any:
        stats = self._run.stats
        stats.rounds, stats.calls = stats.rounds + 1, stats.calls + 1
        stats.evaluations += given["sample"].shape[0]
        output = super().step(scheduler, step, given)
        self._run.stepped(latents := tree_leaves(output)[0])
        if self._preview is not None:
            self._preview(stats.rounds, latents)
        return output
