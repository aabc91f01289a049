r"""Frechet distance between sets of 28 x 28 clothes, in the features of a small classifier.

For features with means ``m`` and covariances ``C`` the squared distance is

    d^2 = |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^{1/2} C_b C_a^{1/2})^{1/2}).

Like the FID of Heusel et al. 2017 (https://arxiv.org/abs/1706.08500) the figure reported is ``d^2``. The 64
features have about mean 0 and variance 1 over real pictures, so that its unit is the variance of one feature.
Values do not compare with an FID from Inception features.

Example:
    python -m benchmarks.frechet --samples samples.npy
"""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file
from torch import Tensor, nn

logger = logging.getLogger(__name__)

FEATURES = 64
WEIGHTS = Path(__file__).with_name("frechet_classifier.safetensors")
REFERENCE = Path(__file__).with_name("frechet_reference.safetensors")


@dataclass(frozen=True)
class Gaussian:
    """Mean (d,) and covariance (d, d) of a set of features."""

    mean: np.ndarray
    covariance: np.ndarray


class ClothesClassifier(nn.Module):
    """Convolutional classifier of Fashion-MNIST; its 64 penultimate values are the Frechet features."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *_convolution(1, 32, stride=2),
            *_convolution(32, 32, stride=1),
            *_convolution(32, 64, stride=2),
            *_convolution(64, 64, stride=1),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 3 * 3, FEATURES),
            nn.BatchNorm1d(FEATURES, affine=False),
        )
        self.head = nn.Linear(FEATURES, 10)

    def features(self, x: Tensor) -> Tensor:
        """Map pictures (n, 1, 28, 28) in [-1, 1] to features (n, 64)."""
        return self.trunk(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map pictures (n, 1, 28, 28) in [-1, 1] to class logits (n, 10)."""
        return self.head(self.features(x).relu())


def _convolution(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


def load_feature_extractor() -> ClothesClassifier:
    """Load the trained classifier, in evaluation mode with gradients of the weights switched off."""
    classifier = ClothesClassifier()
    classifier.load_state_dict(load_file(WEIGHTS))
    return classifier.eval().requires_grad_(False)


def extract_features(classifier: ClothesClassifier, images: Tensor, batch_size: int = 500) -> np.ndarray:
    """Compute the Frechet features.

    Args:
        classifier: The trained classifier.
        images: Pictures (n, 1, 28, 28), float32; values outside [-1, 1] are clipped, as on any screen.
        batch_size: Pictures per network call.

    Returns:
        Features, float64 (n, 64).
    """
    batches = images.clamp(-1.0, 1.0).split(batch_size)
    with torch.inference_mode():
        return torch.cat([classifier.features(batch) for batch in batches]).double().numpy()


def fit_gaussian(features: np.ndarray) -> Gaussian:
    """Fit mean and covariance to features (n, d), n >= 2."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must have shape (n, d) with n >= 2; got {features.shape}")
    features = features.astype(np.float64)
    return Gaussian(features.mean(axis=0), np.cov(features, rowvar=False))


def gaussian_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet distance of two Gaussians, >= 0.

    The trace of the matrix root is the sum of the singular values of ``C_a^{1/2} C_b^{1/2}``, with symmetric
    roots by eigen-decomposition; unlike a root of ``C_a C_b`` this stays real for singular covariances.
    """
    cross = np.linalg.svd(_symmetric_root(a.covariance) @ _symmetric_root(b.covariance), compute_uv=False).sum()
    shift = np.square(a.mean - b.mean).sum()
    return float(max(0.0, shift + np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * cross))


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Squared Frechet distance between two sets of features.

    Args:
        features_a: Features (n, d). Few pictures bias the distance upwards: compare at equal ``n`` only.
        features_b: Features (m, d).

    Returns:
        ``d^2`` of the module's equation, >= 0.
    """
    return gaussian_distance(fit_gaussian(features_a), fit_gaussian(features_b))


def load_reference(split: str = "train") -> Gaussian:
    """Load the statistics of real pictures, ``split`` being ``"train"`` (60,000) or ``"test"`` (10,000)."""
    arrays = load_arrays(REFERENCE)
    return Gaussian(arrays[f"{split}.mean"].astype(np.float64), arrays[f"{split}.covariance"].astype(np.float64))


def distance_to_reference(images: Tensor, split: str = "train") -> float:
    """Squared Frechet distance of pictures (n, 1, 28, 28) in [-1, 1] from the real ones of ``split``."""
    features = extract_features(load_feature_extractor(), images)
    return gaussian_distance(fit_gaussian(features), load_reference(split))


def main() -> None:
    """Read the command line and log the distance of a file of samples."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=Path, required=True, help=".npy file, (n, 1, 28, 28) in [-1, 1]")
    parser.add_argument("--split", choices=("train", "test"), default="train", help="real pictures to compare with")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    images = torch.from_numpy(np.load(arguments.samples)).float()
    if images.shape[1:] != (1, 28, 28):
        parser.error(f"--samples must hold an array of shape (n, 1, 28, 28); got {tuple(images.shape)}")
    distance = distance_to_reference(images, arguments.split)
    logger.info("Frechet distance of %d samples to %s: %.3f", len(images), arguments.split, distance)


if __name__ == "__main__":
    main()
