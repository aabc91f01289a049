"""The objects of denoising-diffusion-pytorch: their own loops in parallel, against the same loops as they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("torch")
import torch
from torch import Tensor, nn

from benchmarks import published
from parasolver_adapters.denoising_diffusion import parallel_denoising_diffusion
from parasolver_adapters.samplers import UnsupportedSamplerError
from parasolver_core import NonFiniteError
from tests.adapters.weights import relative


def package(module: str = "denoising_diffusion_pytorch") -> Any:
    pytest.importorskip("einops")
    found = published.denoising_diffusion(module)
    return found or pytest.skip("needs denoising-diffusion-pytorch, as make installs it")


class Net(nn.Module):
    """Nonlinear, other at every place and time, and so large that its clean samples are clipped."""

    channels = out_dim = 1
    random_or_learned_sinusoidal_cond = False

    def __init__(self, self_condition: bool = False, outputs: int = 1) -> None:
        super().__init__()
        self.self_condition, self._outputs = self_condition, outputs
        self.out_dim = outputs
        self.size = nn.Parameter(torch.tensor(0.9))

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        shift = torch.linspace(-1, 1, x[0].numel()).reshape(x[:1].shape)
        wide = t.reshape(-1, *[1] * (x.ndim - 1)).float()
        out = self.size * torch.tanh(0.7 * x + shift) + 0.2 * torch.cos(0.01 * wide + 2 * shift)
        return torch.cat([out] * self._outputs, dim=1)


def gaussian(**options: Any) -> Any:
    own = {"image_size": 8, "timesteps": 100, "sampling_timesteps": 20} | options
    if own["timesteps"] == own["sampling_timesteps"]:
        own["timesteps"] = own["sampling_timesteps"] = 40
    return package().GaussianDiffusion(Net(), **own).eval()


def one_dimension() -> Any:
    package()
    module = package("denoising_diffusion_pytorch_1d")
    return module.GaussianDiffusion1D(
        Net(), seq_length=16, timesteps=100, sampling_timesteps=20, objective="pred_v"
    ).eval()


def elucidated() -> Any:
    net = Net()
    net.random_or_learned_sinusoidal_cond = True
    module = package("elucidated_diffusion")
    return module.ElucidatedDiffusion(net, image_size=8, channels=1, num_sample_steps=16).eval()


CASES = [
    (lambda: gaussian(objective="pred_noise"), "sample", {}, 20),
    (lambda: gaussian(objective="pred_v", ddim_sampling_eta=0.7), "sample", {}, 20),
    (lambda: gaussian(objective="pred_x0", sampling_timesteps=100), "sample", {"return_all_timesteps": True}, 40),
    (one_dimension, "sample", {}, 20),
    (elucidated, "sample", {}, 31),
    (elucidated, "sample_using_dpmpp", {}, 16),
]


@pytest.mark.parametrize(("make", "loop", "options", "calls"), CASES)
def test_loops_give_the_sample_of_their_own(make: Any, loop: str, options: dict[str, Any], calls: int) -> None:
    diffusion = make()
    torch.manual_seed(3)
    want = getattr(diffusion, loop)(batch_size=3, **options)
    after = torch.rand(1)
    for tolerance, limit in ((0.0, 1e-5), (1e-2, 1e-2)):
        own = parallel_denoising_diffusion(diffusion, 8, tolerance=tolerance)
        torch.manual_seed(3)
        got = getattr(own, loop)(batch_size=3, **options)
        assert torch.equal(torch.rand(1), after)
        assert got.shape == want.shape
        assert relative(got, want) < limit
        assert own.solution.stats.rounds < calls
        assert f"rounds instead of {calls}," in own.solution.message
    assert not hasattr(diffusion, "solution")


@pytest.mark.parametrize(
    ("make", "changed"),
    [
        (gaussian, {"sampling_timesteps": 10, "ddim_sampling_eta": 1.0}),
        (gaussian, {"objective": "pred_v"}),
        (elucidated, {"num_sample_steps": 10}),
    ],
)
def test_what_is_set_on_the_copy_is_what_its_loops_read(make: Any, changed: dict[str, Any]) -> None:
    diffusion, own = make(), parallel_denoising_diffusion(make(), 8, tolerance=0)
    samples = []
    for one in (diffusion, own):
        for name, value in changed.items():
            setattr(one, name, value)
        torch.manual_seed(3)
        samples.append(one.sample(batch_size=2))
    assert relative(samples[1], samples[0]) < 1e-5


def test_a_window_of_one_leaves_the_loop_as_it_is() -> None:
    diffusion = gaussian()
    torch.manual_seed(3)
    want = diffusion.sample(2)
    torch.manual_seed(3)
    assert torch.equal(parallel_denoising_diffusion(diffusion, 1).sample(2), want)


def test_classes_meet_their_own_sample() -> None:
    """The variant with guidance takes classes, and its DDPM loop is linear in the clean sample."""

    class Guided(Net):
        def forward_with_cond_scale(self, x: Tensor, t: Tensor, classes: Tensor, **scales: float) -> Any:
            out = self(x, t) + 0.1 * classes.reshape(-1, 1, 1, 1)
            return out, out

    module = package("classifier_free_guidance")
    diffusion = module.GaussianDiffusion(Guided(), image_size=8, timesteps=40).eval()
    classes = torch.tensor([0, 3, 1])
    torch.manual_seed(3)
    want = diffusion.sample(classes)
    torch.manual_seed(3)
    assert relative(parallel_denoising_diffusion(diffusion, 8, tolerance=0).sample(classes), want) < 1e-5


def unclipped_noise() -> Any:
    """Noise as it was before clipping, which the step reads too."""

    class Own(package().GaussianDiffusion):
        def model_predictions(self, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().model_predictions(x, t, clip_x_start=True, rederive_pred_noise=False)

    return Own(Net(), image_size=8, timesteps=100, sampling_timesteps=20, objective="pred_noise").eval()


def learned_variance() -> Any:
    package()
    module = package("learned_gaussian_diffusion")
    return module.LearnedGaussianDiffusion(Net(outputs=2), image_size=8, timesteps=40).eval()


@pytest.mark.parametrize("make", [unclipped_noise, learned_variance])
def test_steps_that_read_more_than_the_clean_sample_are_refused(make: Any) -> None:
    diffusion = make()
    with pytest.raises(UnsupportedSamplerError, match="gives its step more than the clean sample"):
        parallel_denoising_diffusion(diffusion, 8).sample(2)


def test_a_network_that_gives_nan_is_named() -> None:
    diffusion = gaussian()
    diffusion.model.size.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="gave NaN or infinity"):
        parallel_denoising_diffusion(diffusion, 8).sample(2)


def test_what_cannot_be_is_refused() -> None:
    module = package()
    with pytest.raises(UnsupportedSamplerError, match="diffusion: self_condition=True gives the network"):
        parallel_denoising_diffusion(module.GaussianDiffusion(Net(self_condition=True), image_size=8).eval())
    with pytest.raises(ValueError, match=r"diffusion: it is in training mode, got .training=True; call .eval\(\)"):
        parallel_denoising_diffusion(module.GaussianDiffusion(Net(), image_size=8))
    with pytest.raises(TypeError, match=r"diffusion: expected a GaussianDiffusion or Elucidated.*, got Linear"):
        parallel_denoising_diffusion(nn.Linear(1, 1))


def test_a_deep_copy_samples_with_its_own_weights() -> None:
    """Averages of weights are kept in a deep copy: it asked the first one's network, without a word."""
    own = parallel_denoising_diffusion(gaussian(), 8, tolerance=0)
    averaged, plain = copy.deepcopy(own), gaussian()
    for one in (averaged, plain):
        one.model.size.data.mul_(0.5)
    torch.manual_seed(3)
    got = averaged.sample(batch_size=2)
    torch.manual_seed(3)
    want = plain.sample(batch_size=2)
    assert relative(got, want) < 1e-5
    torch.manual_seed(3)
    assert relative(own.sample(batch_size=2), want) > 1e-2
    assert averaged.solution.stats.rounds < 20


class FromGenerator:
    """A loop of DDIM that begins with what a generator gives, as forks let one be named."""

    bar = torch.cumprod(1 - torch.linspace(1e-3, 0.2, 30), 0)

    def predict_noise_from_start(self, x: Tensor, t: Tensor, clean: Tensor) -> Tensor:
        level = self.bar[t][:, None]
        return (x - level.sqrt() * clean) / (1 - level).sqrt()

    def model_predictions(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        clean = torch.tanh(x - 0.3).clamp(-0.7, 0.7)
        return self.predict_noise_from_start(x, t, clean), clean

    def ddim_sample(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        x = torch.randn(shape, generator=generator)
        for i in reversed(range(30)):
            eps, clean = self.model_predictions(x, torch.full(shape[:1], i))
            after = self.bar[i - 1] if i else torch.tensor(1.0)
            x = after.sqrt() * clean + (1 - after).sqrt() * eps
        return x


def test_a_generator_among_the_arguments_goes_on_from_sample_to_sample() -> None:
    """The first draw was looked for with torch.empty, which takes no generator. The object is wrapped twice, too."""
    own, found = FromGenerator(), []
    parallel = parallel_denoising_diffusion(parallel_denoising_diffusion(own, 4), 8, tolerance=0)
    for one in (own, parallel):
        generator = torch.Generator().manual_seed(5)
        found.append([one.ddim_sample((2, 8), generator=generator) for _ in range(2)])
    for want, got in zip(*found, strict=True):
        assert relative(got, want) < 1e-5
    assert parallel.solution.stats.rounds < 30
