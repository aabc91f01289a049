"""Draw samples from the embedded model, write a picture of them, and measure their Frechet distance.

The sampler is sequential DDIM (Song et al. 2021, https://arxiv.org/abs/2010.02502),

    x_s = sqrt(a_s) x_0 + sqrt(1 - a_s - sigma^2) eps + sigma z,
    sigma = eta sqrt((1 - a_s) / (1 - a_t)) sqrt(1 - a_t / a_s),

where ``a = alphas_cumprod`` and ``x_0 = (x_t - sqrt(1 - a_t) eps) / sqrt(a_t)``; ``eta = 1`` is the ancestral
step of DDPM.

Example:
    python -m benchmarks.evaluate_embedded --data DIR --out DIR
"""

import argparse
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import UNet2DModel
from torch import Tensor
from tqdm import tqdm

from benchmarks.fashion_mnist import load_split
from benchmarks.frechet import (
    Gaussian,
    extract_features,
    fit_gaussian,
    gaussian_distance,
    load_feature_extractor,
    load_reference,
)
from benchmarks.train_embedded import add_noise
from parasolver_adapters.embedded import (
    CLASS_NAMES,
    NO_CLASS,
    SCHEDULE,
    load_embedded_model,
)
from parasolver_core import DDIM, solve_sequential

logger = logging.getLogger(__name__)


def sample_ddim(
    model: UNet2DModel,
    x: Tensor,
    labels: Tensor,
    steps: int,
    eta: float = 0.0,
    guidance_scale: float | None = None,
    seed: int = 0,
) -> Tensor:
    """Sample sequentially.

    Args:
        model: The embedded model.
        x: Starting noise (n, 1, 28, 28), standard normal.
        labels: Labels (n,) in 0 .. 10; 10 is "no class". Sequential sampling keeps the rows in their order.
        steps: Number of timesteps, 1 .. 1000.
        eta: Share of fresh noise, 0 (deterministic) .. 1 (DDPM).
        guidance_scale: Classifier-free guidance, None for none.
        seed: Of the fresh noise.

    Returns:
        Samples (n, 1, 28, 28), about [-1, 1].
    """

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return predict(model, x, t, labels, guidance_scale)

    return solve_sequential(denoiser, x, SCHEDULE.timesteps(steps), DDIM(SCHEDULE, eta=eta), seed=seed).sample


def predict(model: UNet2DModel, x: Tensor, t: Tensor, labels: Tensor, guidance_scale: float | None) -> Tensor:
    """Predict the noise in ``x`` (n, 1, 28, 28), with guidance unless ``guidance_scale`` is None."""
    if guidance_scale is None:
        return model(x, t, class_labels=labels).sample
    pairs = torch.cat([torch.full_like(labels, NO_CLASS), labels])
    eps_uncond, eps_cond = model(torch.cat([x, x]), torch.cat([t, t]), class_labels=pairs).sample.chunk(2)
    return eps_uncond + guidance_scale * (eps_cond - eps_uncond)


def draw_samples(
    model: UNet2DModel, labels: Tensor, steps: int, eta: float, guidance_scale: float | None, seed: int
) -> Tensor:
    """Sample one picture per label in batches of 100; returns (n, 1, 28, 28)."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    with torch.inference_mode():
        for y in tqdm(labels.split(100), desc=f"{steps} steps", mininterval=20.0):
            x = torch.randn(len(y), 1, 28, 28, generator=generator)
            samples.append(sample_ddim(model, x, y, steps, eta, guidance_scale, seed + len(samples)))
    return torch.cat(samples)


@dataclass(frozen=True)
class SampleSet:
    """How the samples of one measurement are drawn.

    Args:
        steps: Timesteps of the sampler.
        eta: 0 for DDIM .. 1 for DDPM.
        classes: Whether the ten classes have equal shares, instead of all pictures having no class.
        guidance_scale: Classifier-free guidance, None for none.
        seed: Seed of the noise.
    """

    steps: int
    eta: float
    classes: bool
    guidance_scale: float | None
    seed: int

    def draw(self, model: UNet2DModel, n: int) -> Tensor:
        """Draw ``n`` samples, (n, 1, 28, 28)."""
        labels = torch.arange(n) % NO_CLASS if self.classes else torch.full((n,), NO_CLASS)
        return draw_samples(model, labels, self.steps, self.eta, self.guidance_scale, self.seed)


SAMPLE_SETS = {
    "ddim50-no-class": SampleSet(steps=50, eta=0.0, classes=False, guidance_scale=None, seed=2),
    "ddim50-classes": SampleSet(steps=50, eta=0.0, classes=True, guidance_scale=None, seed=3),
    "ddim50-guided": SampleSet(steps=50, eta=0.0, classes=True, guidance_scale=2.0, seed=4),
    "ddpm100-classes": SampleSet(steps=100, eta=1.0, classes=True, guidance_scale=None, seed=5),
    "ddpm250-classes": SampleSet(steps=250, eta=1.0, classes=True, guidance_scale=None, seed=5),
}


def write_grid(path: Path, rows: list[Tensor], titles: list[str]) -> None:
    """Write a PNG with one row of pictures (k, 1, 28, 28) per title."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(0.7 * len(rows[0]) + 1.6, 0.7 * len(rows)))
    for axis, row, title in zip(axes, rows, titles, strict=True):
        strip = row.clamp(-1.0, 1.0)[:, 0].permute(1, 0, 2).reshape(28, -1)
        axis.imshow(strip.numpy(), cmap="gray", vmin=-1.0, vmax=1.0)
        axis.set_axis_off()
        axis.text(-3.0, 14.0, title, ha="right", va="center", fontsize=8)
    figure.tight_layout(pad=0.3, h_pad=0.1)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def class_grid(model: UNet2DModel, path: Path, columns: int = 8, guidance_scale: float | None = None) -> None:
    """Write a grid of DDIM-50 samples, one row per class and one of "no class"."""
    titles = [*CLASS_NAMES, "no class"]
    labels = torch.arange(NO_CLASS + 1).repeat_interleave(columns)
    samples = draw_samples(model, labels, steps=50, eta=0.0, guidance_scale=guidance_scale, seed=1)
    write_grid(path, list(samples.split(columns)), titles)


def blur(images: Tensor, sigma: float) -> Tensor:
    """Blur pictures (n, 1, 28, 28) with a Gaussian of ``sigma`` pixels; the border is background."""
    offsets = torch.arange(-8.0, 9.0)
    kernel = torch.softmax(-0.5 * (offsets / sigma).square(), dim=0)
    padded = torch.nn.functional.pad(images, (8, 8, 8, 8), value=-1.0)
    padded = torch.nn.functional.conv2d(padded, kernel.view(1, 1, 1, -1))
    return torch.nn.functional.conv2d(padded, kernel.view(1, 1, -1, 1))


def yardsticks(data: Path, n: int) -> dict[str, Tensor]:
    """Pictures whose distance is a floor or a ceiling; ``n`` of each except the whole test split."""
    test, labels = load_split(data, "t10k")
    generator = torch.Generator().manual_seed(0)
    subset = test[torch.randperm(len(test), generator=generator)[:n]]
    noise = torch.randn(subset.shape, generator=generator)
    return {
        "real test pictures, all": test,
        "real test pictures": subset,
        "real, noise of deviation 0.1 added": subset + 0.1 * noise,
        "real, noise of deviation 0.3 added": subset + 0.3 * noise,
        "real, blurred by 0.5 pixels": blur(subset, 0.5),
        "real, blurred by 1 pixel": blur(subset, 1.0),
        "real, blurred by 2 pixels": blur(subset, 2.0),
        "real, one class only (dress)": test[labels == CLASS_NAMES.index("dress")],
        "pure noise": noise,
    }


def distance(images: Tensor, reference: Gaussian) -> float:
    """Squared Frechet distance of pictures (n, 1, 28, 28) from the reference."""
    return gaussian_distance(fit_gaussian(extract_features(load_feature_extractor(), images)), reference)


def noise_error(model: UNet2DModel, data: Path, n: int) -> float:
    """Mean squared error of ``eps`` on ``n`` test pictures with their classes, over evenly spread timesteps."""
    images, labels = load_split(data, "t10k")
    generator = torch.Generator().manual_seed(0)
    index = torch.randperm(len(images), generator=generator)[:n]
    eps = torch.randn(images[index].shape, generator=generator)
    t = torch.arange(n) * SCHEDULE.train_steps // n
    x = add_noise(images[index], eps, t, torch.tensor(SCHEDULE.alphas_cumprod).float())
    with torch.inference_mode():
        batches = zip(x.split(100), t.split(100), labels[index].split(100), strict=True)
        prediction = torch.cat([model(x, t, class_labels=y).sample for x, t, y in batches])
    return (prediction - eps).square().mean().item()


def seconds_per_call(model: UNet2DModel, rows: int, repeats: int = 15) -> float:
    """Median seconds of one network call on ``rows`` rows, with the number of threads torch has now."""
    x = torch.randn(rows, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    t, y = torch.full((rows,), 500), torch.full((rows,), NO_CLASS)
    seconds = []
    with torch.inference_mode():
        model(x, t, class_labels=y)
        for _ in range(repeats):
            begin = time.perf_counter()
            model(x, t, class_labels=y)
            seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds))


def time_calls(model: UNet2DModel) -> dict[str, float]:
    """Seconds per network call for 1, 8, 16 and 64 rows on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = {f"{rows} rows": seconds_per_call(model, rows) for rows in (1, 8, 16, 64)}
    torch.set_num_threads(threads)
    return seconds


def measure(data: Path, out: Path, n: int, names: list[str]) -> dict[str, float]:
    """Frechet distance of the yardsticks and of the named sample sets, which are drawn and kept in ``out``."""
    model = load_embedded_model()
    reference = load_reference("train")
    distances = {name: distance(images, reference) for name, images in yardsticks(data, n).items()}
    for name in names:
        images = SAMPLE_SETS[name].draw(model, n)
        np.save(out / f"{name}.npy", images.numpy())
        distances[name] = distance(images, reference)
        logger.info("%s: %.3f", name, distances[name])
    return distances


def main() -> None:
    """Read the command line, write the grids, the samples and ``figures.json``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the Fashion-MNIST *.gz files")
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures, samples and figures")
    parser.add_argument("--samples", type=int, default=2000, help="pictures per sample set")
    parser.add_argument("--sets", nargs="*", choices=list(SAMPLE_SETS), default=["ddim50-no-class"])
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments.out.mkdir(parents=True, exist_ok=True)
    model = load_embedded_model()
    class_grid(model, arguments.out / "grid.png")
    class_grid(model, arguments.out / "grid_guided.png", guidance_scale=2.0)
    distances = measure(arguments.data, arguments.out, arguments.samples, arguments.sets)
    figures = {
        "frechet": distances,
        "noise_error": noise_error(model, arguments.data, arguments.samples),
        "seconds_per_call": time_calls(model),
    }
    (arguments.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
