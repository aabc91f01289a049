"""The problems that methods are compared on: networks of different character, each with its own schedule."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

import torch
from safetensors.torch import load
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks.policy import SCHEDULE as POLICY_SCHEDULE
from benchmarks.policy import WAYPOINTS, demonstrations, load_policy
from benchmarks.train_emoji import MODEL_CONFIG as EMOJI_CONFIG
from parasolver_adapters.embedded import SCHEDULE, EmbeddedDenoiser, NoiseUNet2DModel
from parasolver_core import NoiseSchedule
from parasolver_core.samplers.sample_form import predicted_sample_coefficients
from parasolver_core.samplers.schedules import DiscreteSchedule

Denoiser = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """A network to sample from.

    Args:
        name: in tables.
        about: one line on it.
        shape: of one sample.
        schedule: its noise schedule.
        prediction_type: what it predicts.
        make: makes the denoiser.
        dtype: of the states.
    """

    name: str
    about: str
    shape: tuple[int, ...]
    schedule: DiscreteSchedule
    make: Callable[[], Denoiser]
    prediction_type: str = "epsilon"
    dtype: torch.dtype = torch.float32

    def starts(self, count: int, seed: int = 0) -> Tensor:
        """``x_T`` of ``count`` samples, the same however many there are."""
        rows = [
            torch.randn(self.shape, generator=torch.Generator().manual_seed(seed + i), dtype=torch.float64)
            for i in range(count)
        ]
        return torch.stack(rows).to(self.dtype)


def emoji_denoiser(device: torch.device | str = "cpu") -> Denoiser:
    """The U-Net trained by ``benchmarks.train_emoji``, without a class."""
    model = NoiseUNet2DModel(**EMOJI_CONFIG)
    model.load_state_dict(load(resources.files("benchmarks").joinpath("weights/emoji.safetensors").read_bytes()))
    torch.nn.Module.to(model, device=device).eval().requires_grad_(False)
    no_class = EMOJI_CONFIG["num_class_embeds"] - 1
    return lambda x, t: model(x, t, class_labels=torch.full_like(t, no_class)).sample


def policy_denoiser(dtype: torch.dtype = torch.float32) -> Denoiser:
    """The diffusion policy, told one obstacle."""
    policy = load_policy(dtype)
    obstacle = demonstrations(1, torch.Generator().manual_seed(7))[1].to(dtype)
    return lambda x, t: policy(x, t, obstacle.expand(len(x), -1))


def flow_denoiser(denoiser: Denoiser, problem: Problem) -> Denoiser:
    """The problem's network as one of flow matching: the velocity ``eps - x_0`` on the linear path, t from 1 to 0.

    A state of the linear path, divided by ``sqrt((1 - t)^2 + t^2)``, is one of the network's own path; the network is
    told the timestep whose share of noise is the nearest.
    """
    alpha = torch.tensor(problem.schedule.alphas_cumprod).sqrt()
    sigma = (1 - alpha**2).sqrt()
    shares = sigma / (alpha + sigma)  # of noise: t of the linear path
    p, q = (
        torch.from_numpy(one)
        for one in predicted_sample_coefficients(problem.prediction_type, alpha.numpy(), sigma.numpy())
    )

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        steps = (t.to(shares)[:, None] - shares).abs().argmin(dim=1)
        weights = (
            one.reshape(-1, *[1] * (x.ndim - 1)).to(x)
            for one in (((1 - t) ** 2 + t**2).sqrt(), p[steps], q[steps], alpha[steps], sigma[steps])
        )
        n, from_state, from_output, a, s = weights
        own = x / n
        x_0 = from_state * own + from_output * denoiser(own, steps)
        return (own - a * x_0) / s - x_0

    return velocity


def epsilon_denoiser(problem: Problem) -> Denoiser:
    """The problem's network as one that predicts the noise, whatever it predicts."""
    denoiser = problem.make()
    alpha = torch.tensor(problem.schedule.alphas_cumprod).sqrt()
    sigma = (1 - alpha**2).sqrt()
    p, q = predicted_sample_coefficients(problem.prediction_type, alpha.numpy(), sigma.numpy())
    of_state, of_output = (1 - alpha * torch.from_numpy(p)) / sigma, -alpha * torch.from_numpy(q) / sigma

    def network(x: Tensor, t: Tensor) -> Tensor:
        a, b = (one[t.long()].view(-1, *[1] * (x.ndim - 1)).to(x) for one in (of_state, of_output))
        return a * x + b * denoiser(x, t)

    return network


MIXTURE_SCHEDULE = NoiseSchedule.scaled_linear()


def mixture_denoiser(std: float = 0.2, label: int | None = None, guidance_scale: float = 1.0) -> Denoiser:
    """The exact noise prediction for data that are scikit-learn's 1797 digits, 8 x 8, each blurred by ``std``.

    With a label, that of this digit, guided away from that of all: as hard as guidance makes real networks.
    """
    pictures, classes = load_digits(return_X_y=True)
    digits = torch.from_numpy(pictures / 8.0 - 1.0)
    own = digits if label is None else digits[torch.from_numpy(classes == label)]
    table = torch.tensor(MIXTURE_SCHEDULE.alphas_cumprod)

    def clean(x: Tensor, kept: Tensor, data: Tensor) -> Tensor:
        a, variance = kept.sqrt(), 1 - kept
        total = a**2 * std**2 + variance
        distance = (x**2).sum(1, keepdim=True) - 2 * a * x @ data.T + a**2 * (data**2).sum(1)
        mean = torch.softmax(-distance / (2 * total), dim=1) @ data
        return mean + a * std**2 / total * (x - a * mean)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        kept = table[t.long()][:, None]
        x_0 = clean(x, kept, own)
        if label is not None:
            free = clean(x, kept, digits)
            x_0 = free + guidance_scale * (x_0 - free)
        return (x - kept.sqrt() * x_0) / (1 - kept).sqrt()

    return denoiser


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem(
            "policy",
            "diffusion policy, paths of 16 waypoints",
            (WAYPOINTS, 2),
            POLICY_SCHEDULE,
            policy_denoiser,
            "v_prediction",
        ),
        Problem(
            "mixture",
            "exact score of 1797 digits of 8 x 8",
            (64,),
            MIXTURE_SCHEDULE,
            mixture_denoiser,
            dtype=torch.float64,
        ),
        Problem(
            "mixture, guided",
            "the same, digit 3, guidance scale 7.5",
            (64,),
            MIXTURE_SCHEDULE,
            lambda: mixture_denoiser(label=3, guidance_scale=7.5),
            dtype=torch.float64,
        ),
        Problem("clothes", "embedded U-Net, Fashion-MNIST 28 x 28", (1, 28, 28), SCHEDULE, EmbeddedDenoiser),
        Problem(
            "clothes, guided",
            "the same, class 3, guidance scale 7.5",
            (1, 28, 28),
            SCHEDULE,
            lambda: EmbeddedDenoiser(labels=3, guidance_scale=7.5),
        ),
        Problem("emoji", "U-Net, emoji 3 x 32 x 32", (3, 32, 32), SCHEDULE, emoji_denoiser),
    )
}
