"""The first pass over a pipeline's loop, which is only watched and broken off after its last step."""

from __future__ import annotations

import collections
import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from parasolver_adapters.diffusers.passes.changes import (
    SchedulerState,
    are_same,
    positions_of,
    switches_of,
    what_moved,
)
from parasolver_adapters.diffusers.passes.listening import Listener, processors_of, with_state
from parasolver_adapters.diffusers.recording.capture import Recorder, form_of_call
from parasolver_adapters.diffusers.recording.programs import Call, Program
from parasolver_adapters.diffusers.refusal import PipelineNotParallelError
from parasolver_adapters.diffusers.schedulers.rule import GIVEN_BY_THE_LOOP, SchedulerRule, read_scheduler
from parasolver_adapters.diffusers.schedulers.stepping import ENDS_WITH_ZERO, SPECIAL_ARGUMENTS
from parasolver_adapters.given import Streams, version_of, was_written

_RULES: dict[tuple[Any, ...], SchedulerRule] = {}
_MOST_RULES = 16
_ONCE_A_STEP = {"prev_timestep"}  # an argument of UnCLIPScheduler.step that follows from the timesteps


class CaptureDone(BaseException):
    """Leaves a pass that is only watched; not an error, and not to be caught by the pipeline."""


class Capture(Listener):
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
        if self.start is not None and (moved := what_moved(self._switches, self._positions)):
            raise PipelineNotParallelError(
                f"the loop changes the networks between two of their calls ({', '.join(sorted(moved))}), so these "
                "cannot be made later; for GLIGEN pass gligen_scheduled_sampling_beta=1"
            )
        output = self.recorder.call(module, forward, args, kwargs)
        if self.start is None:
            versions = [version_of(leaf) for leaf in tree_leaves(output)]
            self.prelude.append((form_of_call(module, kwargs, tree_leaves((args, kwargs))), output, versions))
        return output

    def step(self, scheduler: Any, step: Callable[..., Any], given: dict[str, Any]) -> Any:
        x, m = given["sample"], given["model_output"]
        if self.start is None:
            known = inspect.signature(type(scheduler).step).parameters
            self._defaults = {name: parameter.default for name, parameter in known.items()}
        options = _options(given, scheduler, self._defaults)
        if self.start is None:
            self._refuse(options)
            self._switches = switches_of(self.pipe)
            self._positions = positions_of(self._switches)
            self.start, self.first = x.detach().clone(), m.detach().clone()
            self.options, self.generator = options, given.get("generator")
            self._keep_scheduler(scheduler, given)
            self.streams = Streams({"generator": self.generator})
        else:
            if scheduler is not self.driven:
                raise PipelineNotParallelError("the pipeline steps two schedulers in one loop")
            if not are_same(options, self.options):
                raise PipelineNotParallelError(
                    f"arguments of scheduler.step change from step to step: {', '.join(options) or 'none given'}"
                )
            if x.shape != self.start.shape:
                raise PipelineNotParallelError(
                    f"the state changes its shape on the way, from {tuple(self.start.shape)} to {tuple(x.shape)}"
                )
            if changed := self._tables.changed_tables():
                raise PipelineNotParallelError(
                    f"the loop changes the scheduler between two steps ({', '.join(changed)}); set it before the loop"
                )
            self.programs.append(self.recorder.finish(x, m))
        self._narrow(given["timestep"])
        self.timesteps.append(given["timestep"])
        given["model_output"] = self.first  # finite, unlike what zeros may have been turned into
        output = step(**given)
        self._tables = SchedulerState(scheduler)
        if len(self.timesteps) == self.expected:
            raise CaptureDone
        state, *others = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        if not state.is_contiguous():
            output = with_state(output, state := state.contiguous())
        self.start = self.start.to(torch.promote_types(self.start.dtype, state.dtype))
        self.recorder.begin(state, others)
        return output

    def over(self, *_: Any) -> None:
        """Decoding means that the loop is over, also if it has left out the scheduler's last steps."""
        if self.start is not None:
            raise CaptureDone

    def finish(self, given: Mapping[str, Any]) -> None:
        """After the pass, a call with these arguments: the scheduler's steps as a table."""
        if self.start is None:
            strength = given.get("strength")
            raise PipelineNotParallelError(
                "the pipeline never called scheduler.step(model_output, timestep, sample)"
                if strength is None
                else f"strength={strength} leaves no steps of the loop; pass a larger one, or more num_inference_steps"
            )
        if not self.start.is_floating_point():
            raise PipelineNotParallelError(f"the state is of {self.start.dtype}, not of floating point")
        if self.programs and not any(
            isinstance(operation, Call) for program in self.programs for operation in program.operations
        ):
            raise PipelineNotParallelError(
                "the loop never calls one of the networks that are known; it has to be a component of the pipeline, or "
                "among networks=[...], and called by its forward"
            )
        self.rule = _rule(self.scheduler, self.begin, self.options)

    def _refuse(self, options: Mapping[str, Any]) -> None:
        """What the pipeline has set for its loop; in half precision the comparison of a batch could miss it."""
        if "variance_noise" in options:
            raise PipelineNotParallelError(
                "the loop gives scheduler.step the noise of each step (variance_noise); pass generator=... instead"
            )
        for network, processors in processors_of(self.pipe):
            kinds = {type(processor).__name__ for processor in processors.values()}
            splitting = {kind for kind in kinds if kind.startswith("PAG")}
            if splitting:
                raise PipelineNotParallelError(
                    f"perturbed-attention guidance tells the rows of {type(network).__name__}'s batch apart by their "
                    f"place ({', '.join(sorted(splitting))}), which another batch size changes; pass pag_scale=0"
                )

    @property
    def begun(self) -> bool:
        """Whether the loop has begun."""
        return self.start is not None

    @functools.cached_property
    def unchanged(self) -> bool:
        """Whether the loop gives the scheduler the very states that it returned."""
        return all(program.x == 0 for program in self.programs)

    def noise(self) -> torch.Tensor | None:
        """The noise of the pipeline's own steps, ``(N, 1, batch, *event)``."""
        if not self.rule.table.stochastic:
            return None
        now = Streams({"generator": self.generator})
        self.streams.restore()
        try:
            noise = self.rule.noise(self.generator, tuple(self.start.shape), self.start.dtype, self.start.device)
        except ValueError as error:
            raise PipelineNotParallelError(str(error)) from error
        finally:
            now.restore()
        return noise[: len(self.timesteps)].unsqueeze(1)

    def _keep_scheduler(self, scheduler: Any, given: dict[str, Any]) -> None:
        """A copy as it was at the start of the loop, and where in its timesteps that was."""
        self.driven = scheduler
        self.scheduler = kept = copy.deepcopy(scheduler)
        kept.__class__ = type(scheduler).__mro__[1]
        timesteps = getattr(kept, "timesteps", None)
        if not isinstance(timesteps, torch.Tensor):
            raise PipelineNotParallelError(
                f"{type(kept).__name__} has no tensor of timesteps, got {type(timesteps).__name__}"
            )
        begin = getattr(kept, "_begin_index", None)
        self._begins = _places(timesteps, given["timestep"]) or [0] if begin is None else [begin]
        for name in ("_step_index", "_begin_index"):
            if hasattr(kept, name):
                setattr(kept, name, None)

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


class Prelude:
    """Answers the calls that networks get before the first step as they were answered in the first pass.

    The state may begin with these outputs, and the loop may hold them. Another call, or one whose output was written to
    since, is made.
    """

    def __init__(self, known: list[tuple[Any, Any, list[Any]]]) -> None:
        self._known = collections.deque(known)

    def answer(self, module: torch.nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._known:
            form, output, versions = self._known.popleft()
            written = any(map(was_written, tree_leaves(output), versions))
            if form == form_of_call(module, kwargs, tree_leaves((args, kwargs))) and not written:
                return output
        return forward(*args, **kwargs)


def _places(timesteps: torch.Tensor, timestep: Any) -> list[int]:
    """Where among the scheduler's timesteps this one is."""
    same = timesteps.cpu() == torch.as_tensor(timestep, device="cpu").flatten()[0]
    return torch.nonzero(same).flatten().tolist()


def _options(given: dict[str, Any], scheduler: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``step`` that are choices, without those left at their default."""
    name = type(scheduler).__name__
    others = GIVEN_BY_THE_LOOP | SPECIAL_ARGUMENTS.get(name, set()) | _ONCE_A_STEP | {"self"}
    named = {key: value for key, value in given.items() if key not in others}
    return {key: value for key, value in named.items() if key not in defaults or value is not defaults[key]}


def _rule(scheduler: Any, begin: int, options: dict[str, Any]) -> SchedulerRule:
    """The scheduler's steps; kept for the next call with the same schedule."""
    attributes = vars(scheduler)
    tables = [_bytes(value) for value in attributes.values() if isinstance(value, torch.Tensor) and _is_table(value)]
    counted = attributes.get("num_inference_steps"), attributes.get("custom_timesteps")
    key = (type(scheduler), repr(sorted(scheduler.config.items())), *tables, counted, begin, repr(options))
    rule = _RULES.get(key)
    if rule is None:
        rule = read_scheduler(scheduler, begin_index=begin, **options)
        if len(_RULES) >= _MOST_RULES:
            _RULES.pop(next(iter(_RULES)), None)
        _RULES[key] = rule
    return rule


def _is_table(value: torch.Tensor) -> bool:
    """Whether it is of the schedule, and not a state that an earlier run has left behind (Heun, PNDM, SASolver)."""
    return value.ndim <= 1


def _bytes(value: torch.Tensor) -> bytes:
    return bytes(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())  # NumPy has no bfloat16
