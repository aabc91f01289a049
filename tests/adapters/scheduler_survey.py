"""Every scheduler of the installed diffusers, in the configurations that the tests replay; and the table of the docs.

``python -m tests.adapters.scheduler_survey --write`` brings docs/schedulers.md up to date.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
from diffusers import schedulers
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from parasolver_adapters.diffusers import SchedulerRule, UnsupportedSchedulerError, step_rule_from_scheduler

PAGE = Path(__file__).parents[2] / "docs" / "schedulers.md"
STEPS = 6

diffusers.utils.logging.set_verbosity_error()  # configurations that a scheduler changes are tried, too

REQUIRED: dict[str, dict[str, Any]] = {
    "KDPM2DiscreteScheduler": {"num_train_timesteps": 100},  # takes a second to make with 1000
    "KDPM2AncestralDiscreteScheduler": {"num_train_timesteps": 100},
    "AmusedScheduler": {"mask_token_id": 0},
    "VQDiffusionScheduler": {"num_vec_classes": 4},
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "1/t", "tsr_k": 1.0, "tsr_sigma": 1.0},
}
NEED_TORCHSDE = ("CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler")
CLIPPING = {"clip_sample": False, "clip_denoised": False}
SPACINGS = ("linspace", "leading", "trailing")
PREDICTIONS = ("epsilon", "sample", "v_prediction")

ALL_PAIRS = {  # of spacing and prediction type; elsewhere they are tried one at a time
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "UniPCMultistepScheduler",
}

COPIES = {"DDIMParallelScheduler", "DDPMParallelScheduler"}  # their step is that of DDIM and DDPM, word for word

# Options tried one at a time, where the scheduler has them.
OPTIONS: tuple[dict[str, Any], ...] = (
    {"clip_sample": True},
    {"clip_denoised": True},
    {"thresholding": True, "clip_sample": False},
    {"set_alpha_to_one": False, "clip_sample": False},
    {"steps_offset": 1, "timestep_spacing": "leading"},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"use_lu_lambdas": True},
    {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    {"final_sigmas_type": "sigma_min"},
    {"solver_order": 1},
    {"solver_order": 3},
    {"solver_type": "heun"},
    {"solver_type": "bh1"},
    {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
    {"solver_type": "midpoint"},
    {"algorithm_type": "dpmsolver"},
    {"algorithm_type": "dpmsolver++", "solver_order": 3},
    {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
    {"algorithm_type": "sde-dpmsolver++"},
    {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
    {"euler_at_final": True},
    {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
    {"predict_x0": False, "final_sigmas_type": "sigma_min"},
    {"disable_corrector": (0, 1)},
    {"predictor_order": 3, "corrector_order": 3},
    {"algorithm_type": "noise_prediction"},
    {"interpolation_type": "log_linear"},
    {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True},
    {"sigma_schedule": "exponential"},
    {"shift": 3.0},
    {"shift_terminal": 0.1},
    {"stochastic_sampling": True},
    {"invert_sigmas": True},
    {"skip_prk_steps": True},
    {"variance_type": "fixed_large"},
    {"variance_type": "fixed_small_log"},
    {"variance_type": "fixed_large_log"},
    {"variance_type": "learned"},
    {"variance_type": "learned_range"},
    {"snr_shift_scale": 1.0},
    {"scheduler_type": "euler"},
    {"stages": 1, "stage_range": (0, 1)},
)
# Arguments of `step`, likewise.
STEP_OPTIONS: tuple[dict[str, Any], ...] = (
    {"eta": 0.5},
    {"eta": 1.0},
    {"s_churn": 2.0},
    {"use_clipped_model_output": True},
)


@dataclass(frozen=True)
class Case:
    """One configuration of a scheduler."""

    cls: type[Any]
    config: dict[str, Any]
    step_options: dict[str, Any] = field(default_factory=dict)
    _made: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in (self.config | self.step_options).items())
        return f"{self.cls.__name__}({options})"

    def scheduler(self) -> Any:
        """The scheduler with its timesteps set; raises what diffusers raises."""
        if "scheduler" not in self._made:  # some take a second to make
            self._made["scheduler"] = self._make()
        return copy.deepcopy(self._made["scheduler"])

    def _make(self) -> Any:
        scheduler = self.cls(**REQUIRED.get(self.cls.__name__, {}) | self.config)
        arguments: dict[str, Any] = {
            "ConsistencyDecoderScheduler": {"num_inference_steps": 2},
            "SCMScheduler": {"intermediate_timesteps": None},
            "HeliosScheduler": {"stage_index": 0},
            "RFD4ProteinaScheduler": {"num_inference_steps": 400},
            "HeliosDMDScheduler": {"stage_index": 0},
        }.get(self.cls.__name__, {})
        scheduler.set_timesteps(**{"num_inference_steps": STEPS} | arguments)
        return scheduler

    def rule(self) -> SchedulerRule:
        return step_rule_from_scheduler(self.scheduler(), clipping="denoiser", **self.step_options)


def classes() -> dict[str, type[Any]]:
    """All schedulers of the installed diffusers, but for those that need torchsde where that is missing."""
    found = {}
    for module in pkgutil.iter_modules(schedulers.__path__, "diffusers.schedulers."):
        if ".scheduling_" in module.name:
            try:
                members = vars(importlib.import_module(module.name)).values()
            except ModuleNotFoundError:
                continue
            for member in members:
                if (
                    inspect.isclass(member)
                    and issubclass(member, SchedulerMixin)
                    and member.__module__ == module.name
                    and member is not SchedulerMixin
                ):
                    found[member.__name__] = member
    return dict(sorted(found.items()))


def cases(cls: type[Any]) -> Iterator[Case]:
    """The default, spacings and prediction types, and each option of the scheduler that diffusers accepts."""
    accepted = inspect.signature(cls.__init__).parameters
    linear = {key: value for key, value in CLIPPING.items() if key in accepted}
    spacings = [{"timestep_spacing": one} for one in SPACINGS if "timestep_spacing" in accepted]
    predictions = [{"prediction_type": one} for one in PREDICTIONS if "prediction_type" in accepted]
    yield Case(cls, linear)
    if cls.__name__ in COPIES:
        return
    if cls.__name__ in ALL_PAIRS:
        yield from (Case(cls, linear | spacing | kind) for spacing in spacings for kind in predictions)
    else:
        yield from (Case(cls, linear | options) for options in spacings + predictions)
    for options in OPTIONS:
        known = {key: value for key, value in options.items() if key in accepted or key in CLIPPING}
        if known == options and any(key in accepted for key in options):
            yield Case(cls, linear | {key: value for key, value in options.items() if key in accepted})
    for options in STEP_OPTIONS:
        if hasattr(cls, "step") and set(options) <= set(inspect.signature(cls.step).parameters):
            clip = {"clip_sample": True} if "use_clipped_model_output" in options else {}
            yield Case(cls, linear | clip, options)


def survey(cls: type[Any]) -> Iterator[tuple[Case, SchedulerRule | UnsupportedSchedulerError]]:
    """Each case of a scheduler with its rule, or why there is none."""
    for case in cases(cls):
        try:
            case.scheduler()
        except Exception:  # diffusers itself refuses these options
            continue
        try:
            yield case, case.rule()
        except UnsupportedSchedulerError as error:
            yield case, error


HEADER = """# Schedulers of diffusers

`step_rule_from_scheduler` turns a scheduler, as configured, into a step rule by running its own `step`. This page lists
every scheduler of diffusers {version} and is written by `python -m tests.adapters.scheduler_survey --write`; the tests
replay each configuration against the scheduler's own sequential loop.

*States* and *outputs*: how many past states and network outputs a step reads, at most. *Calls*: network calls for
{steps} inference steps. *Configurations*: how many of those tried are supported; the others are listed below.

| Scheduler | States | Outputs | Calls | Noise | Scales input | Configurations |
|---|---|---|---|---|---|---|
"""


Results = list[tuple[Case, SchedulerRule | UnsupportedSchedulerError]]


def page(found: dict[str, Results]) -> str:
    """The page of the documentation, from what :func:`survey` gave for each class."""
    rows = [row(name, found.get(name, [])) for name in sorted({*found, *NEED_TORCHSDE})]
    reasons = [line for results in found.values() for line in refusals(results)]
    header = HEADER.format(version=diffusers.__version__, steps=STEPS)
    upstream = [line for line in reasons if "own sequential run" in line]
    ours = [line for line in reasons if line not in upstream]
    lines = [*rows, "", "## Not linear", "", *ours, "", "## Failing in diffusers itself", "", *upstream, ""]
    return header + "\n".join(lines)


def row(name: str, results: Results) -> str:
    """The line of the table for one class."""
    rules = [rule for _, rule in results if isinstance(rule, SchedulerRule)]
    if name in NEED_TORCHSDE:
        return f"| {name} | | | | correlated | yes | needs torchsde |"
    if not rules:
        return f"| {name} | | | | | | not supported |"
    states, outputs = (max(rule.band[k] for rule in rules) for k in (0, 1))
    noise = sum(rule.table.stochastic for rule in rules)
    drawn = "yes" if noise == len(rules) else "some options" if noise else "no"
    scales = "yes" if rules[0].table.input_scale is not None else "no"
    tried = f"{len(rules)} of {len(results)}"
    return f"| {name} | {states} | {outputs} | {len(rules[0].timesteps)} | {drawn} | {scales} | {tried} |"


def refusals(results: Results) -> list[str]:
    """A line for each configuration that is not supported; one for all of a class that has nothing supported."""
    lines = []
    for case, error in results:
        if isinstance(error, UnsupportedSchedulerError):
            text = str(error).removeprefix("scheduler: ").replace("`", "'").replace("*", r"\*")
            whole = not any(isinstance(rule, SchedulerRule) for _, rule in results)
            lines.append(f"- `{case.cls.__name__ if whole else case}`: {text}")
    return list(dict.fromkeys(lines))


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("usage: python -m tests.adapters.scheduler_survey --write")
    PAGE.write_text(page({name: list(survey(cls)) for name, cls in classes().items() if name not in NEED_TORCHSDE}))
