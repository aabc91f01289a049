"""Pipelines and schedulers on another device than the default, and on one without float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch

from parasolver_adapters.checkpoints import read_state_dict
from parasolver_adapters.diffusers import parallel_sampling, step_rule_from_scheduler
from parasolver_adapters.embedded import EmbeddedDenoiser
from parasolver_adapters.epsilon_models import starting_noise
from parasolver_adapters.vector_field import odeint
from parasolver_adapters.wrapping import ModelDenoiser
from parasolver_core import NoiseSchedule, Status, solve, solve_sequential
from tests.adapters.tiny_pipelines import ddim, distance, generator, stable_diffusion, text
from tests.adapters.weights import saved
from tests.away import Away, away

pytestmark = pytest.mark.usefixtures("quiet_diffusers")


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """Tensors that are made without a device hold no numbers."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def pipeline(name: str) -> Any:
    pipe = here(lambda: stable_diffusion(scheduler=getattr(diffusers, name).from_config(ddim().config)))
    if name == "DDPMScheduler":
        pipe.scheduler.register_to_config(clip_sample=True)
    return pipe.to(torch.float32)


def here(make: Any, **options: Any) -> Any:
    """Made on the CPU, and with numbers."""
    with torch.device("cpu"):
        return make(**options)


def there(module: torch.nn.Module) -> None:
    """Move a network to the emulated device."""
    for part in module.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            setattr(part, name, torch.nn.Parameter(Away(value.data), requires_grad=False))


def sample(pipe: Any, given: Any, generator: Any) -> torch.Tensor:
    torch.manual_seed(0)
    return pipe(**given, generator=generator, num_inference_steps=6, output_type="latent").images


def embeddings() -> dict[str, torch.Tensor]:
    with torch.device("cpu"):
        return {key: value.float() for key, value in text().items()}


@pytest.mark.parametrize("name", ["DDIMScheduler", "HeunDiscreteScheduler"])
def test_a_pipeline_on_another_device_than_the_default(name: str, elsewhere: None) -> None:
    pipe, given = pipeline(name), embeddings()
    with torch.device("cpu"):
        want = sample(pipe, given, generator())
    with parallel_sampling(pipe, tolerance=0.0) as run:
        got = sample(pipe, given, torch.Generator("cpu").manual_seed(0))
    assert run.status is Status.CONVERGED
    assert distance(got, want) < 2e-6


@pytest.mark.parametrize(
    ("name", "seeded"), [("DDPMScheduler", True), ("DDPMScheduler", False), ("UniPCMultistepScheduler", True)]
)
def test_a_pipeline_on_a_device_without_float64(name: str, seeded: bool) -> None:
    """With a generator of the CPU, and from the device's own stream."""
    with away() as device:
        pipe, given = pipeline(name), {key: value.to(device) for key, value in embeddings().items()}
        there(pipe.unet)
        there(pipe.vae)
        want = sample(pipe, given, generator() if seeded else None).cpu()
        with parallel_sampling(pipe, tolerance=0.0) as run:
            got = sample(pipe, given, generator() if seeded else None)
        assert type(got) is Away
        assert run.status is Status.CONVERGED
        assert distance(got.cpu(), want) < 1e-5


def test_noise_without_a_generator_is_drawn_on_the_device_of_the_sample(elsewhere: None) -> None:
    rule = step_rule_from_scheduler(here(diffusers.DDPMScheduler, clip_sample=False), 5)
    torch.manual_seed(3)
    drawn = rule.noise(None, (2, 1, 4), device="cpu")
    with torch.device("cpu"):
        assert torch.equal(drawn, rule.noise(torch.Generator("cpu").manual_seed(3), (2, 1, 4)))
    assert drawn[0].std() > 0.5
    with away() as device:
        torch.manual_seed(3)
        away_from_here = rule.noise(None, (2, 1, 4), device=device)
        assert type(away_from_here) is Away
        assert torch.equal(away_from_here.cpu(), drawn)


def test_adapters_of_networks_with_another_default_device(elsewhere: None, tmp_path: Any) -> None:
    schedule, x_T = NoiseSchedule.linear(), starting_noise(2, (1, 28, 28), seed=1)
    assert x_T.device.type == "cpu"
    rule = step_rule_from_scheduler(here(diffusers.DDPMScheduler), 6, clipping="denoiser")
    noise = rule.noise(torch.Generator("cpu").manual_seed(0), x_T.shape)
    denoiser = rule.wrap_denoiser(EmbeddedDenoiser(labels=3, guidance_scale=2.0))
    arguments = denoiser, x_T, rule.timesteps, rule
    parallel = solve(*arguments, window=3, tolerance=0, noise=noise).sample
    assert distance(parallel, solve_sequential(*arguments, noise=noise).sample) < 1e-4
    wrapped = ModelDenoiser(lambda x, t: x * t[:, None, None, None], schedule, "epsilon", time="unit")
    assert torch.equal(wrapped(x_T, torch.tensor([999, 0], device="cpu"))[0], x_T[0])
    state = {"weight": torch.ones(3, device="cpu")}
    assert torch.equal(read_state_dict(saved(state, tmp_path / "weights.pt"))["weight"], state["weight"])
    times = torch.linspace(0, 1, 101, dtype=torch.float64, device="cpu")
    ended = odeint(lambda t, y: -y, torch.ones(2, dtype=torch.float64, device="cpu"), times)
    assert torch.allclose(ended[-1], (-times[-1:]).exp(), rtol=1e-8)


def test_clipping_and_conditions_on_a_device_without_float64() -> None:
    rule = step_rule_from_scheduler(diffusers.DDPMScheduler(), 12, clipping="denoiser")
    x_T = torch.randn(2, 5, generator=generator())
    noise = rule.noise(generator(), x_T.shape)

    def run(x: torch.Tensor, c: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        inner = ModelDenoiser(lambda x, t, c: torch.tanh(x - c), NoiseSchedule.linear(), "epsilon", conditions={"c": c})
        return solve(rule.wrap_denoiser(inner), x, rule.timesteps, rule, window=4, tolerance=0, noise=z).sample

    means = torch.tensor([[-0.5], [0.5]])
    with away() as device:
        got = run(x_T.to(device), means.to(device), noise.to(device)).cpu()
    assert distance(got, run(x_T, means, noise)) < 2e-5
