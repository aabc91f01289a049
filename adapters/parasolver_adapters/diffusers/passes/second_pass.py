"""The second pass over a pipeline's loop, the real one: each step waits until the solver has its result."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_unflatten

from parasolver_adapters.diffusers.options import ByNode, Choices, ParallelRun, batch_of
from parasolver_adapters.diffusers.passes.callbacks import watched
from parasolver_adapters.diffusers.passes.first_pass import Capture, Prelude
from parasolver_adapters.diffusers.passes.following import worth
from parasolver_adapters.diffusers.passes.listening import Listener, with_state
from parasolver_adapters.diffusers.recording.batching import Networks, RecordedDenoiser
from parasolver_adapters.diffusers.recording.capture import form_of_call
from parasolver_adapters.diffusers.recording.standins import zeros
from parasolver_adapters.diffusers.refusal import PipelineNotParallelError
from parasolver_adapters.diffusers.schedulers.rule import SchedulerRule
from parasolver_core import ConvergenceError, NonFiniteError, Status
from parasolver_core.arrays import uploaded
from parasolver_core.denoiser.contract import SharedDenoiser
from parasolver_core.solution import RoundRecord, Solution
from parasolver_core.solver.deadline import Deadline


class Replay(Listener):
    """The second pass: each step waits until the solver has its result."""

    def __init__(self, pipe: Any, run: ParallelRun, choices: Choices, capture: Capture, deadline: Deadline) -> None:
        self._pipe, self._run, self._choices = pipe, run, choices
        self._capture, self._rule, self._deadline = capture, capture.rule, deadline
        self._estimate: torch.Tensor | None = None  # of the last state, once time is up
        self._batch = capture.start.shape[0]
        self._denoiser = _denoiser(capture, self._choices)
        max_rows, n = self._choices.max_rows, len(capture.timesteps)
        self._solver = replace(
            self._choices.solver,
            step_rule=ByNode(self._rule.table),
            max_rows=None if max_rows is None else max(max_rows // self._batch, 1) * self._choices.processes,
        )
        self._noise = capture.noise()
        self._state = self._solver.init(
            self._denoiser, capture.start[None], np.arange(n), noise=self._noise, save="trajectory"
        )
        self._step, self._plain, self._calling_back = 0, False, False
        self.called_back = False  # too late to begin again
        self._shared = self._denoiser if isinstance(self._denoiser, SharedDenoiser) else None
        self._target: tuple[int, torch.Tensor] = -1, capture.start  # a step, and what it leads to
        self._prelude = Prelude(capture.prelude)
        capture.prelude.clear()
        self._history: list[RoundRecord] = []

    def network(self, module: torch.nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._plain or self._calling_back or self._step == len(self._capture.timesteps):
            return forward(*args, **kwargs)
        return self._answer(module, forward, args, kwargs)

    def step(self, scheduler: Any, step: Callable[..., Any], given: dict[str, Any]) -> Any:
        if self._calling_back:
            return step(**given)
        i, self._step = self._step, self._step + 1
        if i == len(self._capture.timesteps) and not self._plain:
            self._give_up("the pipeline has more than one loop, and the first is over")
        if self._plain:
            stats = self._state.stats
            stats.rounds, stats.calls, stats.evaluations = stats.rounds + 1, stats.calls + 1, stats.evaluations + 1
            self._publish()
            output = step(**given)
            self._run.stepped(latents := tree_leaves(output)[0])
            if self._choices.preview is not None:
                self._choices.preview(stats.rounds, latents)
            return output
        if i == 0 and not torch.equal(given["sample"].to(self._capture.start.dtype), self._capture.start):
            raise PipelineNotParallelError(
                "two calls of the pipeline start from different latents; pass generator=..., and no function that "
                "draws random numbers of its own"
            )
        target = self._reach(i)
        if i == 0 and not self._over():
            self._round()  # the first batch: a pipeline that is refused for it is refused before its first callback
        self._denoiser.answers.pop(i, None)
        known = i in self._denoiser.outputs
        given["model_output"] = self._denoiser.outputs.pop(i) if known else self._expected(i, given)
        output = step(**given)
        compared = known and self._estimate is None
        fault = self._fault(scheduler, i, given, tree_leaves(output)[0], target) if compared else None
        if fault is not None and i == 0:
            raise PipelineNotParallelError(fault)
        if fault is not None:  # too late to refuse: callbacks have been made
            self._give_up(fault)
            self._run.stepped(tree_leaves(output)[0])
            return output
        if compared and self._is_last_of_parts(i):
            target = tree_leaves(output)[0]
        self._run.stepped(target)
        return with_state(output, target)

    def _is_last_of_parts(self, i: int) -> bool:
        """Whether what the loop has kept of the state at its last step is known to the scheduler only."""
        last = i == len(self._capture.timesteps) - 1
        return last and not self._capture.unchanged and self._rule.table.memory > 1

    def _expected(self, i: int, given: dict[str, Any]) -> torch.Tensor:
        """The network's output at a node that was not evaluated, as interpolated: schedulers keep what they are given.

        The recurrence is that of the state; where the loop has changed it since, the pipeline's output differs.
        """
        m = self._state.expected(0, i)
        if m is None:
            return given["model_output"]
        x, state = given["sample"], self._state.final(i)[0]
        m, state = m.reshape(x.shape), state.reshape(x.shape)
        if not self._capture.unchanged:
            m = m - (x.to(m.dtype) - state) * worth(self._rule, i)
        return m.to(given["model_output"].dtype)

    def _fault(
        self, scheduler: Any, i: int, given: dict[str, Any], reached: torch.Tensor, target: torch.Tensor
    ) -> str | None:
        """What is wrong if the scheduler's own step does not lead where the table leads.

        From the same state and output of the network, if a step reads no more than these; else, as the scheduler has
        seen other states before than the solver, only about where the solver came to, as far as the loop goes on with
        that: what it keeps as it was (inpainting) is not followed.
        """
        eps = max(torch.finfo(one.dtype).eps for one in (reached, given["model_output"]))  # the latter's by autocast
        want, limit = target, max(2 * self._choices.solver.tolerance, 0.1 if eps > 1e-4 else 1e-3)  # steps enlarge it
        if self._rule.table.memory == 1:
            x = given["sample"].to(target.dtype)
            m = _correct(self._rule, [i], x[None], None, given["model_output"].to(target.dtype)[None])[0]
            z = None if self._noise is None else self._noise[i, 0]
            want, limit = self._rule.table.advance(i, [x], [m], z), max(eps**0.5, 1e-3)
        elif self._is_last_of_parts(i):
            return None
        elif not self._capture.unchanged:
            read = [self._capture.programs[i].sample(state) for state in (reached, target)]
            reached, want = (state if x is None else x for state, x in zip((reached, target), read, strict=True))
        error = float((reached.to(want.dtype) - want).norm() / want.norm().clamp_min(torch.finfo(want.dtype).tiny))
        return None if error <= limit else _off(scheduler, i, error, self._capture.unchanged)

    def _answer(self, module: torch.nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What the network has said at this step, as the loop may keep it; zeros at a node that was not evaluated.

        Calls that no step of the scheduler reads are made.
        """
        i = self._step
        if i == 0:
            return self._prelude.answer(module, forward, args, kwargs)
        key = form_of_call(module, kwargs, tree_leaves((args, kwargs)))
        reference = self._capture.recorder.references.get(key)
        if reference is None or not self._capture.programs[i - 1].calls(key):
            return forward(*args, **kwargs)
        self._reach(i)
        answers = self._denoiser.answers.get(i, [])
        at = next((at for at, (known, _) in enumerate(answers) if known == key), None)
        outputs = [zeros(output) for output in reference.outputs] if at is None else answers.pop(at)[1]
        return tree_unflatten(outputs, reference.spec)

    def watched(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments, with callbacks that tell us when they change what the pipeline goes on with."""
        return watched(self._pipe, kwargs, self._called_back, self._changed)

    @contextmanager
    def _called_back(self) -> Iterator[None]:
        self._calling_back = self.called_back = True
        try:
            yield
        finally:
            self._calling_back = False

    def _changed(self, name: str) -> None:
        if not self._plain:
            self._give_up(f"{name} changed what the pipeline goes on with")

    @property
    def status(self) -> Status | None:
        """How the solver ended; None if it has not."""
        status = Status.CONVERGED if self._plain else self._state.halted or self._state.statuses[0]
        return None if status is Status.RUNNING else status

    def reached(self, status: Status) -> Solution | None:
        """What is left when the pipeline's call ends with an exception: the last final latents, and an estimate."""
        if self._plain:
            return self._run.so_far(status)
        if self.status is None:
            self._state.halt(status)
        try:
            return batch_of(self._solver.result(self._state), self._run.stats)
        except Exception:  # the estimate is made from what the exception has interrupted
            return self._run.so_far(status)

    def _reach(self, i: int) -> torch.Tensor:
        """What step i leads to; rounds are made when its networks are called, or at the step itself."""
        if self._target[0] != i:
            self._target = i, self._until(i + 1)
        return self._target[1]

    def _until(self, steps: int) -> torch.Tensor:
        """Rounds until so many steps are final; the state after them, ``(batch, *event)``."""
        state = self._state
        while state.steps[0] < steps and not self._over():
            self._round()
            if getattr(self._pipe, "interrupt", False) and state.steps[0] < steps:
                return state.estimate()[0]
        if state.steps[0] < steps and self._estimate is not None:
            return self._estimate.clone()
        if state.steps[0] < steps:
            solution = self._solver.result(state)
            error = ConvergenceError if solution.status is Status.MAX_ROUNDS else NonFiniteError
            raise error(solution.message, batch_of(solution, self._run.stats))
        return state.final(steps)[0].clone()

    def _over(self) -> bool:
        """Whether no more rounds are to be made."""
        if self._solver.done(self._state):
            return True
        if self._deadline.halts(self._state):
            solution = self._deadline.told(self._solver.result(self._state))
            self._estimate, self._run.error_estimate = solution.sample[0], float(solution.error_estimate[0])
            return True
        return False

    def _round(self) -> None:
        self._solver.step(self._state)
        self._publish()
        if self._choices.preview is not None:
            self._choices.preview(self._state.stats.rounds, self._state.estimate()[0])

    def end(self, error: BaseException | None = None) -> None:
        """Once: tell the processes that share the networks that this one goes on alone, for what reason, or is done."""
        shared, self._shared = self._shared, None
        if shared is not None:
            shared.end(error)

    def _give_up(self, reason: str) -> None:
        self._plain, self._run.reason = True, reason
        self.end(PipelineNotParallelError(reason))
        warnings.warn(f"the remaining steps are sampled sequentially: {reason}", stacklevel=4)

    def _publish(self) -> None:
        stats, batch = self._state.stats, self._batch
        for record in stats.history[len(self._history) :]:
            self._history.append(replace(record, evaluations=record.evaluations * batch))
        self._run.stats = replace(stats, evaluations=stats.evaluations * batch, history=self._history)
        self._run.error_estimate = float(self._state.errors()[0])


def _off(scheduler: Any, i: int, error: float, unchanged: bool) -> str:
    causes = "its steps depend on more than the state, the network's output and its noise"
    if not unchanged:
        causes += "; the loop changes the state between them, which a scheduler of one step allows (DDIM, Euler)"
    return f"step {i} of {type(scheduler).__name__} is off its own table by {error:.2g}; {causes}"


def _denoiser(capture: Capture, choices: Choices) -> RecordedDenoiser:
    """The recorded steps, with networks that are called here or by all processes of the group."""
    recorded, correct = capture.recorder.references, functools.partial(_correct, capture.rule)
    if choices.group is None:
        return RecordedDenoiser(capture.programs, capture.first, Networks(capture.forwards, recorded), correct)
    from parasolver_adapters.diffusers.recording.sharing import SharedNetworks, SharedSteps, modules_of

    modules = modules_of(capture.programs)
    networks = SharedNetworks(capture.forwards, recorded, modules, choices.group, choices.timeout)
    return SharedSteps(capture.programs, capture.first, networks, correct)


def _correct(
    rule: SchedulerRule, nodes: list[int], states: torch.Tensor, x: torch.Tensor | None, m: torch.Tensor
) -> torch.Tensor:
    """What the recurrence of the state needs instead of m, where the scheduler clips or the loop changes x; of rows."""
    if rule.clip is not None:
        m = rule.clip.correct_all(nodes, states if x is None else x.to(m.dtype), m)
    if x is None:
        return m
    weights = uploaded(torch, np.array([worth(rule, node) for node in nodes]), m.device, m.dtype)
    return m + (x.to(m.dtype) - states) * weights.view(-1, *[1] * (m.ndim - 1))
