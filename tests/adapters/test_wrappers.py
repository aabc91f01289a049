"""Denoisers around denoisers: each passes on which row is of which sample."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, distributed

import parasolver_adapters
import parasolver_core
from parasolver_adapters.diffusers import step_rule_from_scheduler
from parasolver_adapters.diffusers.schedulers.clipping import ClippingDenoiser
from parasolver_adapters.distributed import DistributedDenoiser
from parasolver_adapters.epsilon_models import EpsilonModel, LearnedVariance
from parasolver_adapters.wrapping import ModelDenoiser
from parasolver_core import DDIM, DDPM, NoiseSchedule, clip_sample, solve
from parasolver_core.denoiser.clipping import ClippedDenoiser
from tests.adapters.weights import relative

SCHEDULE = NoiseSchedule.linear()
MEANS = [[-0.9], [0.1], [0.6]]  # of each sample


def network(x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
    return torch.tanh(x - mean) + 0.2 * torch.cos(0.01 * t.to(x.dtype))[:, None]


def with_conditions(means: list[list[float]]) -> ModelDenoiser:
    conditions = {"mean": torch.tensor(means, dtype=torch.float64)}
    return ModelDenoiser(network, SCHEDULE, "epsilon", conditions=conditions)


def with_labels(means: list[list[float]]) -> EpsilonModel:
    def labelled(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        eps = network(x, t, torch.tensor(MEANS, dtype=x.dtype)[y])
        return torch.cat([eps, torch.tanh(eps)], dim=1)

    return EpsilonModel(labelled, SCHEDULE, [MEANS.index(mean) for mean in means], num_classes=len(MEANS))


@contextmanager
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def of_scheduler(scheduler: Any, inner: Any) -> Any:
    rule = step_rule_from_scheduler(scheduler, 20, clipping="denoiser")
    return rule.wrap_denoiser(inner), rule.timesteps, rule


def around(name: str, means: list[list[float]]) -> tuple[Any, Any, Any]:
    """A denoiser in its wrapper, timesteps and a step rule that go with it."""
    inner, timesteps, ddim = with_conditions(means), SCHEDULE.timesteps(20), DDIM(SCHEDULE)
    if name == "nothing":
        return inner, timesteps, ddim
    if name == "ClippedDenoiser":
        return clip_sample(inner, SCHEDULE), timesteps, ddim
    if name == "DistributedDenoiser":
        return DistributedDenoiser(inner), timesteps, ddim
    if name == "two":
        return DistributedDenoiser(clip_sample(inner, SCHEDULE)), timesteps, ddim
    if name == "LearnedVariance":
        return LearnedVariance(with_labels(means)), timesteps, DDPM(SCHEDULE)
    scheduler = DDIMScheduler(clip_sample=False) if name == "no clipping" else DDPMScheduler()
    return of_scheduler(scheduler, inner)


WRAPPERS = {ClippedDenoiser, ClippingDenoiser, DistributedDenoiser}  # of any denoiser; LearnedVariance is of one kind
NAMES = ["nothing", "no clipping", "two", "LearnedVariance", *sorted(one.__name__ for one in WRAPPERS)]


@pytest.mark.parametrize("name", NAMES)
def test_each_sample_has_its_own_condition_in_any_wrapper(name: str) -> None:
    x_T = torch.randn(3, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run(samples: list[int]) -> Tensor:
        denoiser, timesteps, rule = around(name, [MEANS[i] for i in samples])
        return solve(denoiser, x_T[samples], timesteps, rule, window=4, tolerance=0, seed=samples).sample

    with one_process():
        together, alone = run([0, 1, 2]), torch.cat([run([i]) for i in range(3)])
    assert relative(together, alone) < 1e-12
    assert len({round(float(one), 6) for one in together}) == 3


def is_wrapper(node: ast.AST) -> bool:
    """Whether a class is made with a denoiser and called like one, or a function that returns one of its own."""
    if isinstance(node, ast.ClassDef):
        members = {one.name: one for one in node.body if isinstance(one, ast.FunctionDef)}
        fields = [one.target for one in node.body if isinstance(one, ast.AnnAssign)]
        names = [one.id for one in fields[:1] if isinstance(one, ast.Name)]
        names += [one.arg for one in members["__init__"].args.args[1:2]] if "__init__" in members else []
        return "__call__" in members and "denoiser" in names
    if not isinstance(node, ast.FunctionDef) or "denoiser" not in [one.arg for one in node.args.args]:
        return False
    inner = {one.name for one in node.body if isinstance(one, ast.FunctionDef)}
    returned = [one.value for one in ast.walk(node) if isinstance(one, ast.Return)]
    return any(isinstance(one, ast.Name) and one.id in inner for one in returned)


def test_no_wrapper_is_forgotten() -> None:
    """Those that call the network for the solver are none."""
    roots = [Path(package.__path__[0]) for package in (parasolver_core, parasolver_adapters)]
    nodes = [node for root in roots for file in root.rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))]
    found = {node.name for node in nodes if is_wrapper(node)}  # type: ignore[attr-defined]
    assert found - {"BatchedCall", "Evaluator", "SubintervalEvaluator"} == {one.__name__ for one in WRAPPERS}


def test_a_function_around_a_denoiser_is_told_what_it_has_to_pass_on() -> None:
    denoiser, timesteps, rule = around("nothing", MEANS)
    x_T = torch.zeros(3, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"conditions\['mean'\]: got 3 for .* needs takes_rows = True"):
        solve(lambda x, t: denoiser(x, t), x_T, timesteps, rule, window=4)
