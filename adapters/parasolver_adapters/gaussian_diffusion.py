"""The ``GaussianDiffusion`` object of guided-diffusion and of its forks, with its own loops, in parallel.

One node is one call of the object's own ``p_sample`` or ``ddim_sample``, with all that happens in it: what the network
predicts, clipping, ``denoised_fn``, the learned variance, guidance, and the noise, which is known in advance. Whatever
the step makes of a state, ``F(x_i)``, the solver is given

.. math::
    m(x_i) = \\bigl(F(x_i) - a_i x_i - c_i z_i\\bigr) / b_i

with the coefficients of DDPM or DDIM on the same schedule. So no formula of the object is written down a second time.

Example::

    diffusion = parallel_gaussian_diffusion(diffusion, window=32)
    sample = diffusion.p_sample_loop(model, shape, model_kwargs={"y": labels})
    print(diffusion.solution.message)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from parasolver_adapters.arguments import Kept, by_name, equal, parameters_of
from parasolver_adapters.draws import Listener
from parasolver_adapters.drop_in import as_it_is_now, copied, with_methods
from parasolver_adapters.gaussian_steps import (
    PairStep,
    RowStep,
    Step,
    StepDenoiser,
    UnsupportedDiffusionError,
    in_halves,
    in_pairs,
)
from parasolver_adapters.given import streams_left_alone
from parasolver_adapters.samplers.calls import same_draws
from parasolver_adapters.stepwise import Choices, Stepwise
from parasolver_core import DDIM, DDPM, CoupledRowsError, NoiseSchedule, Solution, StepRule
from parasolver_core.errors import note

LOOPS = ("p_sample_loop", "p_sample_loop_progressive", "ddim_sample_loop", "ddim_sample_loop_progressive")
STEPS = ("p_sample", "ddim_sample")


def parallel_gaussian_diffusion(
    diffusion: Any, window: int | Literal["auto"] = 16, *, pairs: bool = False, **options: Any
) -> Any:
    """A copy of a ``GaussianDiffusion`` or ``SpacedDiffusion`` object whose loops find their samples in parallel.

    ``p_sample_loop``, ``ddim_sample_loop`` and their ``_progressive`` forms have their own arguments and results:
    ``noise``, ``clip_denoised``, ``denoised_fn``, ``cond_fn``, ``model_kwargs``, ``device``, ``progress``, ``eta``, and
    those that a fork has added. Random numbers are drawn as the loop draws them. ``solution`` is that of the last loop.

    Args:
        diffusion: of openai/guided-diffusion or of code derived from it, such as facebookresearch/DiT; not changed.
        window: as in :func:`parasolver_core.solve`; 1 leaves the loops as they are.

    Other arguments:
        pairs: whether the network guides in pairs, as DiT's ``forward_with_cfg`` and GLIDE's ``model_fn`` do: the first
            half of the batch has conditions and the second has none, and both are given the first half's states. Two
            such rows are then one sample of two, which counts as one row of ``max_rows``.
        options: further arguments of :func:`parasolver_core.solve`: ``tolerance``, ``method``, ``max_rounds``,
            ``max_rows``, ``buckets``, ``state_device``, ``warmup_steps``, ``check``.

    The network and ``cond_fn`` are called with rows of many steps: tensors in ``model_kwargs`` that have one entry for
    each sample along their first axis, also inside dictionaries, are dealt out to them. ``denoised_fn`` has to work on
    each row by itself.

    Raises:
        TypeError: it is no such object.
        UnsupportedDiffusionError: when a loop is called that goes back in time, or mixes the samples of a batch.
        CoupledRowsError: when a loop is called with a network that mixes them, other than in ``pairs``.
    """
    missing = [name for name in ("alphas_cumprod", *STEPS[:1]) if not hasattr(diffusion, name)]
    if missing:
        raise TypeError(
            f"diffusion: expected a GaussianDiffusion of guided-diffusion or its forks, got {type(diffusion).__name__} "
            f"without {missing[0]}"
        )
    if "model" not in parameters_of(diffusion, "p_sample"):
        raise TypeError(
            f"diffusion: p_sample of {type(diffusion).__name__} takes no model; of denoising-diffusion-pytorch? Take "
            "parasolver_adapters.denoising_diffusion.parallel_denoising_diffusion"
        )
    choices, loops = Choices.checked(window, **options), [name for name in LOOPS if hasattr(diffusion, name)]
    chosen = () if choices.sequential else loops
    return with_methods(
        "diffusion", diffusion, {name: _loop(getattr(diffusion, name), name, choices, pairs) for name in chosen}
    )


def _loop(original: Callable[..., Any], name: str, choices: Choices, pairs: bool) -> Callable[..., Any]:
    """One of the loops, over steps of ours."""

    def loop(drop_in: Any, *args: Any, **kwargs: Any) -> Any:
        drop_in.solution = None

        def done(solution: Solution) -> None:
            drop_in.solution = solution

        try:
            live = functools.partial(_Live, choices=choices, pairs=pairs, done=done)
            return _run(as_it_is_now(drop_in), name, live, args, kwargs)
        except CoupledRowsError as error:
            if not pairs:
                note(error, "a network that guides in pairs, as DiT's forward_with_cfg does, needs pairs=True")
            raise

    def progressive(drop_in: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        yield from loop(drop_in, *args, **kwargs)

    return progressive if inspect.isgeneratorfunction(original) else loop


def _run(diffusion: Any, name: str, made: Callable[[Draft], _Live], args: Any, kwargs: Any) -> Any:
    given = by_name(diffusion, name, args, kwargs)
    quiet = given | ({"progress": False} if "progress" in given else {})
    draft = Draft(diffusion)
    device = next((device for device in (given.get("device"), _device(given.get("model"))) if device), "cpu")
    generators = [given, vars(diffusion)]
    with streams_left_alone(), same_draws(torch.empty(0, device=device), generators):
        result = getattr(draft.object, name)(**quiet)
        if inspect.isgenerator(result):
            for _ in result:
                pass
    live = made(draft)
    return getattr(live.object, name)(*args, **kwargs)


def _device(model: Any) -> torch.device | None:
    parameters = getattr(model, "parameters", None)
    first = next(iter(parameters()), None) if parameters is not None else None
    return None if first is None else first.device


class _Stepped:
    """A copy of the object, with other steps; its loops are its own."""

    def __init__(self, diffusion: Any) -> None:
        self.object = copied(diffusion)
        for name in STEPS:
            if hasattr(diffusion, name):
                setattr(self.object, name, functools.partial(self._called, diffusion, name))

    def _called(self, diffusion: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        arguments = by_name(diffusion, name, args, kwargs)
        if unnamed := sorted({"x", "t"} - arguments.keys()):
            raise UnsupportedDiffusionError(
                f"diffusion: expected {name}(model, x, t, ...), got one without an argument {unnamed[0]}; rename it"
            )
        x, t = arguments.pop("x"), arguments.pop("t")
        return self.step(name, getattr(diffusion, name), x, t, arguments)

    def step(self, name: str, step: Callable[..., Any], x: Tensor, t: Tensor, arguments: dict[str, Any]) -> Any:
        raise NotImplementedError


class Draft(_Stepped):
    """The loop, run once with a network of zeros, for what it asks and draws."""

    def __init__(self, diffusion: Any) -> None:
        super().__init__(diffusion)
        self.diffusion = diffusion
        self.steps: list[Step] = []
        self._kept = Kept()
        channels = 2 if "LEARNED" in str(getattr(diffusion, "model_var_type", "")) else 1
        self._silenced: dict[str, Callable[..., Tensor]] = {
            "model": lambda x, t, *args, **kwargs: torch.cat([x] * channels, dim=1) * 0,
            "cond_fn": lambda x, t, *args, **kwargs: x * 0,
            "denoised_fn": lambda x, *args, **kwargs: x,
        }

    def step(self, name: str, step: Callable[..., Any], x: Tensor, t: Tensor, arguments: dict[str, Any]) -> Any:
        arguments, t = self._kept(arguments), self._kept(t)
        quiet = {key: self._silenced.get(key, value) if value is not None else None for key, value in arguments.items()}
        with Listener() as listener, torch.no_grad():
            out = step(x=torch.zeros_like(x), t=t, **quiet)
        if not isinstance(out, Mapping) or not {"sample", "pred_xstart"} <= out.keys():
            got = sorted(map(str, out)) if isinstance(out, Mapping) else type(out).__name__
            raise UnsupportedDiffusionError(
                f"diffusion: expected {name} to return a dictionary with sample and pred_xstart, got {got}"
            )
        if any(draw.shape != x.shape for draw in listener.draws):
            shapes = {tuple(draw.shape) for draw in listener.draws}
            raise UnsupportedDiffusionError(
                f"diffusion: {name} draws noise of other shapes than its state's, {tuple(x.shape)}: {shapes}"
            )
        self.steps.append(Step(name, arguments, quiet, t, listener.draws, listener.generators, out["sample"].dtype))
        return out

    def check_rows(self, step: Callable[..., Any], x: Tensor) -> None:
        """Rows of different steps in one call have to come out as they do alone; tried without the network."""
        last, batch = len(self.steps) - 1, len(x)
        steps, samples = np.repeat([0, last // 2, last], batch), np.tile(np.arange(batch), 3)
        rows = RowStep(step, self.steps, batch, [made.quiet for made in self.steps])
        states = torch.cat([x * 0.5, x, x * 2])
        together = rows(states, steps, samples)["sample"]
        for i in range(len(states)):
            alone = rows(states[i : i + 1], steps[i : i + 1], samples[i : i + 1])["sample"]
            if not torch.allclose(together[i : i + 1], alone, rtol=1e-4, atol=1e-4):
                raise UnsupportedDiffusionError(
                    f"diffusion: {self.steps[0].name} is not made row by row: timestep {self._t(steps[i])} of sample "
                    f"{samples[i]} comes out differently beside other timesteps"
                )

    def _t(self, step: int) -> int:
        return int(self.steps[step].t[0])

    def table(self) -> tuple[StepRule, np.ndarray]:
        """The rule of DDPM or DDIM on the loop's timesteps, in terms of the predicted clean sample."""
        names = {step.name for step in self.steps}
        if len(names) != 1:
            raise UnsupportedDiffusionError(f"diffusion: expected a loop over one kind of step, got {names or 'none'}")
        if any(bool((step.t != step.t[0]).any()) for step in self.steps):
            raise UnsupportedDiffusionError("diffusion: expected the samples of a batch at one timestep in each step")
        timesteps = np.array([int(step.t[0]) for step in self.steps])
        if np.any(np.diff(timesteps) >= 0):
            raise UnsupportedDiffusionError(
                "diffusion: expected timesteps that fall at every step, as noise that is added again is no part of a "
                f"sampler's steps; got {timesteps[:3].tolist()}..."
            )
        alphas_cumprod = torch.as_tensor(self.diffusion.alphas_cumprod).double().cpu().numpy()
        schedule = NoiseSchedule.from_alphas_cumprod(alphas_cumprod, default_prediction_type="sample")
        if not self.steps[0].draws:
            return DDIM(schedule), timesteps
        if names == {"ddim_sample"}:
            return DDIM(schedule, eta=float(self.steps[0].arguments.get("eta", 0.0))), timesteps
        large = "FIXED_LARGE" in str(getattr(self.diffusion, "model_var_type", ""))
        return DDPM(schedule, variance_type="fixed_large" if large else "fixed_small"), timesteps


class _Live(_Stepped):
    """The loop, whose steps are the solver's."""

    def __init__(self, draft: Draft, choices: Choices, pairs: bool, done: Callable[[Solution], None]) -> None:
        super().__init__(draft.diffusion)
        self._draft, self._choices, self._pairs, self._done = draft, choices, pairs, done
        self._rule, self._timesteps = draft.table()
        self._run: Stepwise | None = None
        self._nodes: Any = None
        self._count = 0

    def step(self, name: str, step: Callable[..., Any], x: Tensor, t: Tensor, arguments: dict[str, Any]) -> Any:
        i, steps = self._count, self._draft.steps
        if i >= len(steps) or int(t[0]) != self._timesteps[i]:
            raise UnsupportedDiffusionError(f"diffusion: step {i} of the loop is another than when it was tried out")
        if self._run is None:
            self._draft.check_rows(step, x)
            rows = RowStep(step, steps, len(x), [made.arguments for made in steps])
            self._nodes = StepDenoiser(PairStep(rows) if self._pairs else rows, len(steps))
            x_T = x.to(steps[-1].dtype)  # the object's own tables may be wider than the noise
            x_T = in_pairs(x_T) if self._pairs else x_T
            self._run = self._choices.begin(self._nodes, x_T, self._rule, self._timesteps, self._nodes.noise)
        self._check_call(i, x, arguments)
        for draw, generator in zip(steps[i].draws, steps[i].generators, strict=True):
            # leaves the random numbers where the step would have left them
            torch.randn(draw.shape, generator=generator, dtype=draw.dtype, device=draw.device)
        self._count = i + 1
        sample, clean = self._after(i + 1), self._batch(self._nodes.predicted(i))
        out = _Found(sample=sample.to(x.device, steps[i].dtype, copy=True), pred_xstart=clean.to(x.device))
        if self._count == len(steps):
            self._done(self._run.solution)
        return out

    def _after(self, i: int) -> Tensor:
        """The states after so many steps, as the loop has them."""
        assert self._run is not None
        return self._batch(self._run.after(i))

    def _batch(self, values: Tensor) -> Tensor:
        return in_halves(values) if self._pairs else values

    def _check_call(self, i: int, x: Tensor, arguments: dict[str, Any]) -> None:
        """The loop has to go on from the state that it was given, with what the network's outputs do not change."""
        if i and not equal(self._after(i).to(x.device, self._draft.steps[i - 1].dtype), x):
            raise UnsupportedDiffusionError(
                f"diffusion: the loop changes the state before step {i}, as inpainting does between steps; sample "
                "sequentially, or change it inside the step"
            )
        if not equal(self._draft.steps[i].arguments, arguments):
            raise UnsupportedDiffusionError(
                f"diffusion: step {i} is called with other arguments than when the loop was tried with outputs of "
                "zero, so they depend on what the network says (as with self-conditioning); sample sequentially"
            )


class _Found(dict[str, Any]):
    """What a step of ours returns."""

    def __missing__(self, key: str) -> Any:
        raise UnsupportedDiffusionError(
            f"diffusion: the loop reads {key!r} of what a step returns; in parallel there are sample and pred_xstart "
            "only, so sample sequentially"
        )
