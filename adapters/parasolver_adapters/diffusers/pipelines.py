"""Parallel sampling of unmodified diffusers pipelines.

The pipeline's own ``__call__`` runs twice. The first pass is broken off after the loop: its networks answer with zeros
after the first step, and it is only watched (:mod:`~parasolver_adapters.diffusers.capture`). That gives each step as a
program and the scheduler's steps as a table, all that the core's solver needs. The second pass is the real one. Where
it calls ``scheduler.step``, the solver goes on until that step is final, so that progress, callbacks and interrupts
happen as in a sequential run, and decoding follows as ever.
"""

from __future__ import annotations

import collections
import copy
import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves, tree_unflatten

from parasolver_adapters.diffusers.batching import Networks, RecordedDenoiser
from parasolver_adapters.diffusers.capture import PipelineNotParallelError, Program, Recorder, form_of_call
from parasolver_adapters.diffusers.schedulers import (
    GIVEN_BY_THE_LOOP,
    SchedulerRule,
    UnsupportedSchedulerError,
    step_rule_from_scheduler,
)
from parasolver_adapters.diffusers.stepping import ENDS_WITH_ZERO, SPECIAL_ARGUMENTS
from parasolver_core import ConvergenceError, NonFiniteError, ParallelIntegralSolver, Status, StepRule
from parasolver_core.methods import Method
from parasolver_core.recurrence import Recurrence
from parasolver_core.solution import RoundRecord, Stats
from parasolver_core.validation import check_count

Preview = Callable[[int, torch.Tensor], Any]

_ONCE_A_STEP = {"prev_timestep"}  # an argument of UnCLIPScheduler.step that follows from the timesteps
_RULES: dict[tuple[Any, ...], SchedulerRule] = {}
_MOST_RULES = 16


@dataclass(frozen=True, eq=False)
class _ByNode(StepRule):
    """The first steps of a scheduler's table, with the nodes' numbers for timesteps: recorded steps know their own."""

    table: Recurrence | None = field(repr=False)

    def recurrence(self, timesteps: NDArray[Any]) -> Recurrence:
        table, n = self.table, len(timesteps)
        assert table is not None
        tables = {
            name: getattr(table, name)[:n] for name in ("a", "b", "c", "held", "slope", "identity_slope", "signal")
        }
        return Recurrence(timesteps=timesteps, noise_share=table.noise_share, **tables)


@dataclass
class ParallelRun:
    """What happens inside a :func:`parallel_sampling` block.

    Args:
        stats: what the last call of the pipeline cost; evaluations count each sample of the batch.
        status: how it ended: CONVERGED also for a call that was left to the pipeline, STOPPED if it was interrupted,
            FAILED by an exception; None before the first call.
        reason: why it was not sampled in parallel, if it was not.
        latents: the last state that the scheduler returned, ``(batch, *event)``, before decoding.
    """

    stats: Stats = field(default_factory=Stats)
    status: Status | None = None
    reason: str | None = None
    latents: torch.Tensor | None = field(default=None, repr=False)


@contextmanager
def parallel_sampling(
    pipe: Any,
    window: int = 5,
    *,
    tolerance: float = 1e-2,
    method: str | Method = "secant",
    max_rounds: int | None = None,
    max_rows: int | None = None,
    warmup_steps: int = 0,
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
        tolerance, method, max_rounds, warmup_steps: as in :func:`parasolver_core.solve`.
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
            raise TypeError(f"pipe: expected a diffusers pipeline with {name}, got {type(pipe).__name__}")
    if _is_a(pipe, "ModularPipeline"):
        raise TypeError(
            f"pipe: {type(pipe).__name__} is a modular pipeline; put its denoise block into a "
            "parasolver_adapters.diffusers.modular.ParallelDenoiseStep instead"
        )
    choices = Choices.checked(
        window,
        tolerance=tolerance,
        method=method,
        max_rounds=max_rounds,
        max_rows=max_rows,
        warmup_steps=warmup_steps,
        preview=preview,
        fallback=fallback,
        group=group,
        timeout=timeout,
    )
    run, own = ParallelRun(), type(pipe)
    runs = [run]
    pipe.__class__ = _parallel_class(getattr(own, _UNTOUCHED, own), choices, runs)
    try:
        yield run
    finally:
        pipe.__class__ = own
        runs.clear()  # the class lives on until garbage is collected


@dataclass(frozen=True)
class Choices:
    """What :func:`parallel_sampling` was asked for, checked; its arguments are explained there."""

    solver: ParallelIntegralSolver
    max_rows: int | None
    preview: Preview | None
    fallback: str
    sequential: bool
    group: dist.ProcessGroup | None
    timeout: float

    @property
    def processes(self) -> int:
        """How many share the rows."""
        return 1 if self.group is None else self.group.size()

    @classmethod
    def checked(
        cls,
        window: int = 5,
        *,
        method: str | Method = "secant",
        max_rows: int | None = None,
        preview: Preview | None = None,
        fallback: str = "error",
        group: dist.ProcessGroup | DeviceMesh | None = None,
        timeout: float = 120.0,
        **options: Any,
    ) -> Choices:
        """Raise a ValueError or TypeError for what cannot be; ``options`` are the solver's."""
        if fallback not in ("error", "sequential"):
            raise ValueError(f'fallback: expected "error" or "sequential", got {fallback!r}')
        if preview is not None and not callable(preview):
            raise TypeError(f"preview: expected a function preview(round, latents), got {type(preview).__name__}")
        check_count("max_rows", max_rows, optional=True)
        sequential = isinstance(method, str) and method == "sequential"
        solver = ParallelIntegralSolver(
            _ByNode(None),  # each call of the pipeline brings its own table
            window,
            method="secant" if sequential else method,
            check=False,  # batches are compared with the pipeline's own call instead
            **options,
        )
        shared = None
        if group is not None:
            from parasolver_adapters.distributed import check_group  # imports much that few need

            shared = check_group(group, timeout)
        return cls(solver, max_rows, preview, fallback, sequential or window == 1, shared, timeout)


_UNTOUCHED = "_outside_parallel_sampling"


def _parallel_class(own: type, choices: Choices, runs: list[ParallelRun]) -> type:
    """The pipeline's class, with calls that sample in parallel; prompts are encoded once for both passes."""
    active: list[Session] = []

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if active or not runs:  # a pipeline that calls itself, or a copy that outlives the block
            return own.__call__(self, *args, **kwargs)
        inner = [one for one in vars(self).values() if hasattr(type(one), "set_progress_bar_config")]  # combined ones
        session = Session(self, functools.partial(own.__call__, self), choices, runs[0], [self, *inner])
        given = _named(inspect.signature(own.__call__), (self, *args), kwargs)
        del given["self"]
        active.append(session)
        try:
            return session.sample(given)
        finally:
            active.clear()

    members: dict[str, Any] = {"__call__": functools.wraps(own.__call__)(call), _UNTOUCHED: own}
    if hasattr(own, "encode_prompt"):

        def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
            encode = functools.partial(own.encode_prompt, self, *args, **kwargs)
            return active[0].remember(encode) if active else encode()

        members["encode_prompt"] = functools.wraps(own.encode_prompt)(encode_prompt)
    return _subclass(own, members)


def _is_a(value: Any, name: str) -> bool:
    """Whether a class of diffusers is among the value's; importing those would take seconds that few need."""
    return any(one.__name__ == name and one.__module__.startswith("diffusers.") for one in type(value).__mro__)


def _subclass(own: type, members: dict[str, Any]) -> type:
    """A subclass that passes for the class itself."""
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    kind = type(own)

    def equal(cls: type, other: object) -> bool:  # BriaPipeline asks whether type(scheduler) != a class
        return other is own or kind.__eq__(cls, other)

    passing = type(kind.__name__, (kind,), {"__eq__": equal, "__hash__": lambda cls: hash(own)})
    return passing(own.__name__, (own,), names | members)


class _CaptureDone(BaseException):
    """Leaves the first pass after its loop; not an error, and not to be caught by the pipeline."""


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
        self._capturing: _Capture | None = None

    def sample(self, kwargs: dict[str, Any]) -> Any:
        """Both passes, or the pipeline left to itself."""
        run, self._processors = self.run, _processors(self.pipe)
        run.stats, run.status, run.reason, run.latents = Stats(), None, None, None
        try:
            return self._sequential(kwargs) if self.choices.sequential else self._parallel_or_refuse(kwargs)
        except BaseException:
            run.status = run.status or Status.FAILED
            _put_back(self._processors)
            raise

    def _parallel_or_refuse(self, kwargs: dict[str, Any]) -> Any:
        run, streams = self.run, _Streams(kwargs)
        try:
            return self._parallel(kwargs, streams)
        except (PipelineNotParallelError, UnsupportedSchedulerError) as error:
            run.reason = str(error)
            if self.choices.fallback == "error":
                raise PipelineNotParallelError(run.reason) from error
        warnings.warn(f"sampled sequentially: {run.reason}", stacklevel=5)
        streams.restore()
        run.stats, run.status = Stats(), None
        self._remembered, self._replayed = [], None
        return self._sequential(kwargs)

    def _parallel(self, kwargs: dict[str, Any], streams: _Streams) -> Any:
        self._refuse()
        capture = self._capture(kwargs)
        streams.restore()
        self._replayed = iter(self._remembered)
        replay = _Replay(self, capture)
        try:
            with _listening(self.pipe, replay):
                result = self.call(**replay.watched(kwargs))
        except BaseException:
            self.run.status = replay.status
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

    def _capture(self, kwargs: dict[str, Any]) -> _Capture:
        capture = self._capturing = _Capture(self.pipe)
        silent = {name: None for name in ("callback_on_step_end", "callback") if kwargs.get(name) is not None}
        hooks = [decoder.register_forward_pre_hook(capture.over) for decoder in _decoders(self.pipe)]
        try:
            with _listening(self.pipe, capture), _without_bars(self.bars):
                self.call(**kwargs | silent)
        except _CaptureDone:
            pass
        finally:
            capture.recorder.close()
            self._capturing = None
            for hook in hooks:
                hook.remove()
            _put_back(self._processors)  # a pipeline that sets some for its loop takes them back after it
        capture.finish()
        return capture

    def _sequential(self, kwargs: dict[str, Any]) -> Any:
        counter = _Counter(self.run, self.choices.preview)
        with _listening(self.pipe, counter):
            result = self.call(**kwargs)
        self.run.status = Status.CONVERGED
        return result

    def _refuse(self) -> None:
        """What cannot be seen from the calls of a network."""
        for name, module in _networks(self.pipe).items():
            if getattr(module, "is_cache_enabled", False):
                raise PipelineNotParallelError(
                    f"{name} has a step cache enabled, whose state depends on the order of the steps; call "
                    f"pipe.{name}.disable_cache() first"
                )
        guider: Any = getattr(self.pipe, "guider", None)
        if _is_a(guider, "BaseGuidance") and type(guider).prepare_models.__qualname__ != "BaseGuidance.prepare_models":
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


class _Listener:
    """Sees the calls of networks and of ``scheduler.step`` in one pass."""

    def network(self, module: torch.nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    def step(self, scheduler: Any, step: Callable[..., Any], given: dict[str, Any]) -> Any:
        return step(**given)


class _Counter(_Listener):
    """Counts a sequential run."""

    def __init__(self, run: ParallelRun, preview: Preview | None) -> None:
        self._run, self._preview = run, preview

    def step(self, scheduler: Any, step: Callable[..., Any], given: dict[str, Any]) -> Any:
        stats = self._run.stats
        stats.rounds, stats.calls = stats.rounds + 1, stats.calls + 1
        stats.evaluations += given["sample"].shape[0]
        output = super().step(scheduler, step, given)
        self._run.latents = latents = tree_leaves(output)[0]
        if self._preview is not None:
            self._preview(stats.rounds, latents)
        return output


class _Capture(_Listener):
    """The first pass: records the steps, and what the scheduler is."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.recorder = Recorder()
        self.programs: list[Program] = []
        self.prelude: list[tuple[Any, Any, list[Any]]] = []  # what networks gave before the first step
        self.forwards: dict[int, Callable[..., Any]] = {}
        self.timesteps: list[Any] = []
        self.options: dict[str, Any] = {}
        self.start: Any = None
        self.first: Any = None

    def network(self, module: torch.nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.forwards[id(module)] = forward
        if self.start is not None and (moved := _moved(self._switches, self._positions)):
            raise PipelineNotParallelError(
                f"the loop changes the networks between two of their calls ({', '.join(sorted(moved))}), so these "
                "cannot be made later; for GLIGEN pass gligen_scheduled_sampling_beta=1"
            )
        output = self.recorder.call(module, forward, args, kwargs)
        if self.start is None:
            versions = [_version(leaf) for leaf in tree_leaves(output)]
            self.prelude.append((form_of_call(module, kwargs, tree_leaves((args, kwargs))), output, versions))
        return output

    def step(self, scheduler: Any, step: Callable[..., Any], given: dict[str, Any]) -> Any:
        x, m = given["sample"], given["model_output"]
        if self.start is None:
            known = inspect.signature(type(scheduler).step).parameters
            self._defaults = {name: one.default for name, one in known.items()}
        options = _options(given, scheduler, self._defaults)
        if self.start is None:
            self._refuse()
            self._switches = _switches(self.pipe)
            self._positions = _positions(self._switches)
            self.start, self.first = x.detach().clone(), m.detach().clone()
            self.options, self.generator = options, given.get("generator")
            self._keep_scheduler(scheduler, given)
            self.streams = _Streams({"generator": self.generator})
        else:
            if scheduler is not self.driven:
                raise PipelineNotParallelError("the pipeline steps two schedulers in one loop")
            if not _same(options, self.options):
                raise PipelineNotParallelError(
                    f"arguments of scheduler.step change from step to step: {', '.join(options) or 'none given'}"
                )
            if x.shape != self.start.shape:
                raise PipelineNotParallelError(
                    f"the state changes its shape on the way, from {tuple(self.start.shape)} to {tuple(x.shape)}"
                )
            self.programs.append(self.recorder.finish(x, m))
        self._narrow(given["timestep"])
        self.timesteps.append(given["timestep"])
        given["model_output"] = self.first  # finite, unlike what zeros may have been turned into
        output = step(**given)
        if len(self.timesteps) == self.expected:
            raise _CaptureDone
        state, *others = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.start = self.start.to(torch.promote_types(self.start.dtype, state.dtype))
        self.recorder.begin(state, others)
        return output

    def over(self, *_: Any) -> None:
        """Decoding means that the loop is over, also if it has left out the scheduler's last steps."""
        if self.start is not None:
            raise _CaptureDone

    def finish(self) -> None:
        """After the pass: the scheduler's steps as a table."""
        if self.start is None:
            raise PipelineNotParallelError("the pipeline never called scheduler.step(model_output, timestep, sample)")
        if not self.start.is_floating_point():
            raise PipelineNotParallelError(f"the state is of {self.start.dtype}, not of floating point")
        self.rule = _rule(self.scheduler, self.begin, self.options)

    def _refuse(self) -> None:
        """What the pipeline has set for its loop; in half precision the comparison of a batch could miss it."""
        for network, processors in _processors(self.pipe):
            splitting = {type(one).__name__ for one in processors.values() if type(one).__name__.startswith("PAG")}
            if splitting:
                raise PipelineNotParallelError(
                    f"perturbed-attention guidance tells the rows of {type(network).__name__}'s batch apart by their "
                    f"place ({', '.join(sorted(splitting))}), which another batch size changes; pass pag_scale=0"
                )

    @functools.cached_property
    def unchanged(self) -> bool:
        """Whether the loop gives the scheduler the very states that it returned."""
        return all(program.x == 0 for program in self.programs)

    def noise(self) -> torch.Tensor | None:
        """The noise of the pipeline's own steps, ``(N, 1, batch, *event)``."""
        if not self.rule.table.stochastic:
            return None
        now = _Streams({"generator": self.generator})
        self.streams.restore()
        noise = self.rule.noise(self.generator, tuple(self.start.shape), self.start.dtype)
        now.restore()
        return noise[: len(self.timesteps)].unsqueeze(1)

    def _keep_scheduler(self, scheduler: Any, given: dict[str, Any]) -> None:
        """A copy as it was at the start of the loop, and where in its timesteps that was."""
        self.driven = scheduler
        self.scheduler = own = copy.deepcopy(scheduler)
        own.__class__ = type(scheduler).__mro__[1]
        timesteps = getattr(own, "timesteps", None)
        if timesteps is None or isinstance(timesteps, (list, tuple)):
            raise PipelineNotParallelError(f"{type(own).__name__} has no timesteps of its own")
        begin = getattr(own, "_begin_index", None)
        self._begins = _places(timesteps, given["timestep"]) or [0] if begin is None else [begin]
        for name in ("_step_index", "_begin_index"):
            if hasattr(own, name):
                setattr(own, name, None)

    def _narrow(self, timestep: Any) -> None:
        """Where the loop began, if its first timestep occurs twice among the scheduler's: the next ones tell."""
        if len(self._begins) > 1:
            places, done = _places(self.scheduler.timesteps, timestep), len(self.timesteps)
            self._begins = [begin for begin in self._begins if begin + done in places] or self._begins[:1]

    @property
    def begin(self) -> int:
        """The number of the first step among all of the scheduler's."""
        return self._begins[0]

    @property
    def expected(self) -> int:
        """How many steps the loop has."""
        return len(self.scheduler.timesteps) - self.begin - (type(self.scheduler).__name__ in ENDS_WITH_ZERO)


def _places(timesteps: torch.Tensor, timestep: Any) -> list[int]:
    """Where among the scheduler's timesteps this one is."""
    same = timesteps.cpu() == torch.as_tensor(timestep).flatten()[0].cpu()
    return torch.nonzero(same).flatten().tolist()


class _Replay(_Listener):
    """The second pass: each step waits until the solver has its result."""

    def __init__(self, session: Session, capture: _Capture) -> None:
        self._pipe, self._run, self._choices = session.pipe, session.run, session.choices
        self._capture, self._rule = capture, capture.rule
        self._batch = capture.start.shape[0]
        self._denoiser = _denoiser(capture, self._choices)
        max_rows, n = self._choices.max_rows, len(capture.timesteps)
        self._solver = replace(
            self._choices.solver,
            step_rule=_ByNode(self._rule.table),
            max_rows=None if max_rows is None else max(max_rows // self._batch, 1) * self._choices.processes,
        )
        self._noise = capture.noise()
        self._state = self._solver.init(
            self._denoiser, capture.start[None], np.arange(n), noise=self._noise, save="trajectory"
        )
        self._step, self._plain = 0, False
        self._blanks: dict[tuple[Any, ...], Any] = {}
        self._prelude = collections.deque(capture.prelude)
        capture.prelude.clear()
        self._history: list[RoundRecord] = []

    def network(self, module: torch.nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._plain or self._step == len(self._capture.timesteps):
            return forward(*args, **kwargs)
        return self._blank(module, forward, args, kwargs)

    def step(self, scheduler: Any, step: Callable[..., Any], given: dict[str, Any]) -> Any:
        i, self._step = self._step, self._step + 1
        if i == len(self._capture.timesteps) and not self._plain:
            self._give_up("the pipeline has more than one loop, and the first is over")
        if self._plain:
            stats = self._state.stats
            stats.rounds, stats.calls, stats.evaluations = stats.rounds + 1, stats.calls + 1, stats.evaluations + 1
            self._publish()
            output = step(**given)
            self._run.latents = latents = tree_leaves(output)[0]
            if self._choices.preview is not None:
                self._choices.preview(stats.rounds, latents)
            return output
        if i == 0 and not torch.equal(given["sample"].to(self._capture.start.dtype), self._capture.start):
            raise PipelineNotParallelError(
                "two calls of the pipeline start from different latents; pass generator=..., and no function that "
                "draws random numbers of its own"
            )
        target = self._until(i + 1)
        if i == 0 and not self._solver.done(self._state):
            self._round()  # the first batch: a pipeline that is refused for it is refused before its first callback
        known = i in self._denoiser.outputs
        given["model_output"] = self._denoiser.outputs.pop(i, given["model_output"])
        output = step(**given)
        if known and self._capture.unchanged:
            self._check(scheduler, i, given, tree_leaves(output)[0], target)
        self._run.latents = target
        return _with_state(output, target)

    def _check(self, scheduler: Any, i: int, given: dict[str, Any], own: torch.Tensor, target: torch.Tensor) -> None:
        """The scheduler's own step has to lead where the table leads.

        From the same state and output of the network, if a step reads no more than these; else, as the scheduler has
        seen other states before than the solver, only about where the solver came to.
        """
        want, limit = target, max(self._choices.solver.tolerance, 0.1)
        if self._rule.table.memory == 1:
            x = given["sample"].to(target.dtype)
            m = _correct(self._rule, i, x, None, given["model_output"].to(target.dtype))
            z = None if self._noise is None else self._noise[i, 0]
            want, limit = self._rule.table.advance(i, [x], [m], z), max(torch.finfo(own.dtype).eps ** 0.5, 1e-3)
        error = float((own.to(want.dtype) - want).norm() / want.norm().clamp_min(torch.finfo(want.dtype).tiny))
        if not error <= limit:
            raise PipelineNotParallelError(
                f"step {i} of {type(scheduler).__name__} is off its own table by {error:.2g}; its steps depend on more "
                "than the state, the network's output and its noise"
            )

    def _blank(self, module: torch.nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Zeros in the form of the network's output, as nobody will look at it; calls of other kinds are made.

        Before the first step it is what the first pass got, as the state may begin with it, and outputs hold it.
        """
        key = form_of_call(module, kwargs, tree_leaves((args, kwargs)))
        if self._step == 0:
            known, output, versions = self._prelude.popleft() if self._prelude else (None, None, [])
            written = any(map(_written, tree_leaves(output), versions))
            return output if known == key and not written else forward(*args, **kwargs)
        if key not in self._blanks:
            reference = self._capture.recorder.references.get(key)
            if reference is None:
                return forward(*args, **kwargs)
            zeros = [torch.zeros_like(one) if isinstance(one, torch.Tensor) else one for one in reference.outputs]
            self._blanks[key] = tree_unflatten(zeros, reference.spec)
        return self._blanks[key]

    def watched(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments, with callbacks that tell us when they change what the pipeline goes on with."""
        inputs = getattr(kwargs.get("callback_on_step_end"), "tensor_inputs", None)
        if inputs is not None:
            kwargs = kwargs | {"callback_on_step_end_tensor_inputs": inputs}
        switches = _switches(self._pipe)

        def watch(name: str, callback: Callable[..., Any]) -> Callable[..., Any]:
            def watching(*args: Any) -> Any:
                given = args[-1] if isinstance(args[-1], dict) else {"latents": args[-1]}
                versions = {key: (value, _version(value)) for key, value in given.items()}
                settings, positions = dict(vars(self._pipe)), _positions(switches)
                returned = callback(*args)
                changed = isinstance(returned, dict) and _replaced(versions, returned)
                if not self._plain and (
                    changed
                    or any(_written(value, version) for value, version in versions.values())
                    or not _same(settings, vars(self._pipe), "_interrupt")
                    or _moved(switches, positions)
                ):
                    self._give_up(f"{name} changed what the pipeline goes on with")
                return returned

            return watching

        callbacks = {name: kwargs[name] for name in ("callback_on_step_end", "callback") if kwargs.get(name)}
        return kwargs | {name: watch(name, callback) for name, callback in callbacks.items()}

    @property
    def status(self) -> Status | None:
        """How the solver ended; None if it has not."""
        status = Status.CONVERGED if self._plain else self._state.halted or self._state.statuses[0]
        return None if status is Status.RUNNING else status

    def _until(self, steps: int) -> torch.Tensor:
        """Rounds until so many steps are final; the state after them, ``(batch, *event)``."""
        state, window = self._state, self._state.windows
        while state.steps[0] < steps and not self._solver.done(state):
            self._round()
            if getattr(self._pipe, "interrupt", False) and state.steps[0] < steps:
                return state.estimate()[0]
        if state.steps[0] < steps:
            solution = self._solver.result(state)
            error = ConvergenceError if solution.status is Status.MAX_ROUNDS else NonFiniteError
            raise error(solution.message, solution)
        kept = window[0].kept
        assert kept is not None
        return kept[steps].reshape(state.x_T.shape[1:]).to(state.x_T.dtype, copy=True)

    def _round(self) -> None:
        self._solver.step(self._state)
        self._publish()
        if self._choices.preview is not None:
            self._choices.preview(self._state.stats.rounds, self._state.estimate()[0])

    def _give_up(self, reason: str) -> None:
        self._plain, self._run.reason = True, reason
        warnings.warn(f"the remaining steps are sampled sequentially: {reason}", stacklevel=4)

    def _publish(self) -> None:
        stats, batch = self._state.stats, self._batch
        for record in stats.history[len(self._history) :]:
            self._history.append(replace(record, evaluations=record.evaluations * batch))
        self._run.stats = replace(stats, evaluations=stats.evaluations * batch, history=self._history)


def _denoiser(capture: _Capture, choices: Choices) -> RecordedDenoiser:
    """The recorded steps, with networks that are called here or by all processes of the group."""
    recorded, correct = capture.recorder.references, functools.partial(_correct, capture.rule)
    if choices.group is None:
        return RecordedDenoiser(capture.programs, capture.first, Networks(capture.forwards, recorded), correct)
    from parasolver_adapters.diffusers.sharing import SharedNetworks, SharedSteps, modules_of

    modules = modules_of(capture.programs)
    networks = SharedNetworks(capture.forwards, recorded, modules, choices.group, choices.timeout)
    return SharedSteps(capture.programs, capture.first, networks, correct)


def _correct(
    rule: SchedulerRule, node: int, state: torch.Tensor, x: torch.Tensor | None, m: torch.Tensor
) -> torch.Tensor:
    """What the recurrence of the state needs instead of m, where the scheduler clips or the loop changes x."""
    if rule.clip is not None:
        m = rule.clip.correct(node, state if x is None else x.to(m.dtype), m)
    if x is None:
        return m
    table = rule.table
    one_step = table.memory == 1 and table.b[node, 0] != 0
    weight = table.a[node, 0] / table.b[node, 0] if one_step else table.held[node, 0] / table.held[node, 1]
    return m + (x.to(m.dtype) - state) * float(weight)


class _Streams:
    """The state of all random generators among the arguments, and of the global ones."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        leaves = tree_leaves(dict(arguments))
        self._own = [(leaf, leaf.get_state()) for leaf in leaves if isinstance(leaf, torch.Generator)]
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def restore(self) -> None:
        for generator, state in self._own:
            generator.set_state(state)
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)


@contextmanager
def _listening(pipe: Any, listener: _Listener) -> Iterator[None]:
    """While active: the pipeline's networks and its scheduler's steps go through the listener.

    The scheduler gets a subclass and not an attribute, so that a pipeline that copies it drives the same; signatures
    are kept, as pipelines look at them.
    """
    scheduler, networks = pipe.scheduler, _networks(pipe)
    own, signature = type(scheduler), inspect.signature(type(scheduler).step)
    active = [listener]  # emptied at the end, as the class lives on until garbage is collected

    @functools.wraps(own.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not active:  # a copy that outlives the block
            return own.step(self, *args, **kwargs)
        return active[0].step(self, own.step, _named(signature, (self, *args), kwargs))

    try:
        with _FORWARDS:
            for module in networks.values():
                module.forward = _listened(module, module.forward, active)
        scheduler.__class__ = _subclass(own, {"step": step})
        yield
    finally:
        active.clear()
        scheduler.__class__ = own
        with _FORWARDS:
            for module in networks.values():
                _take_back(module)


_FORWARDS = threading.Lock()


def _listened(module: torch.nn.Module, forward: Callable[..., Any], active: list[_Listener]) -> Callable[..., Any]:
    """The forward of a network, which other threads may call, too: pipelines may share one."""
    thread = threading.get_ident()

    @functools.wraps(forward)
    def listened(*args: Any, **kwargs: Any) -> Any:
        if active and threading.get_ident() == thread:
            return active[0].network(module, forward, args, kwargs)
        return forward(*args, **kwargs)

    listened.before = active, vars(module).get("forward")  # type: ignore[attr-defined]
    return listened


def _take_back(module: torch.nn.Module) -> None:
    """The forwards that nobody listens to any more, down to one of another thread that does."""
    while (forward := vars(module).get("forward")) is not None:
        active, before = getattr(forward, "before", (True, None))
        if active:
            return
        del module.forward
        if before is not None:
            module.forward = before


def _networks(pipe: Any) -> dict[str, torch.nn.Module]:
    components = pipe.components
    networks = {name: module for name, module in components.items() if isinstance(module, torch.nn.Module)}
    return {name: module for name, module in networks.items() if "vae" not in name}


def _decoders(pipe: Any) -> list[torch.nn.Module]:
    decoders = [getattr(module, "decoder", None) for name, module in pipe.components.items() if "vae" in name]
    return [decoder for decoder in decoders if isinstance(decoder, torch.nn.Module)]


def _processors(pipe: Any) -> list[tuple[Any, dict[str, Any]]]:
    """The networks with their attention processors."""
    networks: list[Any] = list(_networks(pipe).values())
    return [(one, dict(one.attn_processors)) for one in networks if hasattr(one, "attn_processors")]


def _put_back(processors: list[tuple[Any, dict[str, Any]]]) -> None:
    """Set these again where the networks have others."""
    for network, own in processors:
        if network.attn_processors != own:
            network.set_attn_processor(dict(own))


def _options(given: dict[str, Any], scheduler: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``step`` that are choices, without those left at their default."""
    name = type(scheduler).__name__
    others = GIVEN_BY_THE_LOOP | SPECIAL_ARGUMENTS.get(name, set()) | _ONCE_A_STEP | {"self"}
    named = {key: value for key, value in given.items() if key not in others}
    return {key: value for key, value in named.items() if key not in defaults or value is not defaults[key]}


def _named(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by their names."""
    names = list(signature.parameters)[: len(args)]
    if len(names) < len(args) or not kwargs.keys().isdisjoint(names):
        signature.bind(*args, **kwargs)  # raises what the call itself would
    return dict(zip(names, args, strict=True)) | kwargs


def _rule(scheduler: Any, begin: int, options: dict[str, Any]) -> SchedulerRule:
    """The scheduler's steps; kept for the next call with the same schedule."""
    tables = [
        np.asarray(value.cpu()).tobytes() for value in vars(scheduler).values() if isinstance(value, torch.Tensor)
    ]
    key = (type(scheduler), repr(sorted(scheduler.config.items())), *tables, begin, repr(options))
    rule = _RULES.get(key)
    if rule is None:
        rule = step_rule_from_scheduler(scheduler, begin_index=begin, clipping="denoiser", **options)
        if len(_RULES) >= _MOST_RULES:
            _RULES.pop(next(iter(_RULES)), None)
        _RULES[key] = rule
    return rule


def _with_state(output: Any, state: torch.Tensor) -> Any:
    """The output of ``step`` with another ``prev_sample``, of the same dtype."""
    if isinstance(output, tuple):
        return type(output)((state.to(output[0].dtype), *output[1:]))
    output["prev_sample"] = state.to(output.prev_sample.dtype)
    return output


def _version(value: Any) -> Any:
    """For :func:`_written`; tensors of inference mode keep no count."""
    if not isinstance(value, torch.Tensor):
        return None
    return value.clone() if value.is_inference() else value._version


def _written(value: Any, version: Any) -> bool:
    """Whether something was written into a tensor since it had this version."""
    return not torch.equal(value, version) if isinstance(version, torch.Tensor) else _version(value) != version


def _replaced(given: dict[str, tuple[Any, Any]], returned: dict[str, Any]) -> bool:
    """Whether a callback gave back other tensors than it got."""
    return any(name not in given or given[name][0] is not value for name, value in returned.items())


_SWITCHES = ("processor", "scale", "scaling", "enabled", "_active_adapter", "_disable_adapters")


def _switches(pipe: Any) -> list[tuple[dict[str, Any], str]]:
    """Where the networks keep what pipelines and callbacks change between steps: IP-Adapter's scale, LoRA, GLIGEN."""
    modules = [module for network in _networks(pipe).values() for module in network.modules()]
    places = [place for module in modules for place in (vars(module), vars(module)["_modules"])]
    return [(place, name) for place in places for name in _SWITCHES if name in place]


def _positions(switches: list[tuple[dict[str, Any], str]]) -> list[Any]:
    """Their values now."""
    values = [place.get(name) for place, name in switches]
    return [copy.copy(value) if isinstance(value, (list, dict)) else value for value in values]


def _moved(switches: list[tuple[dict[str, Any], str]], before: list[Any]) -> set[str]:
    """The names of those whose values have changed."""
    pairs = zip(before, _positions(switches), switches, strict=True)
    return {name for one, other, (_, name) in pairs if not _equal(one, other) and not _alike(one, other)}


def _alike(one: Any, other: Any) -> bool:
    return isinstance(one, (list, dict)) and one == other


def _same(one: Mapping[str, Any], other: Mapping[str, Any], ignore: str = "") -> bool:
    names = (one.keys() | other.keys()) - {ignore}
    return all(name in one and name in other and _equal(one[name], other[name]) for name in names)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, (bool, int, float, str)):
        return one == other
    return one is other
