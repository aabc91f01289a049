"""Train the classifier behind ``benchmarks.frechet`` and store the statistics of the real pictures.

Example:
    python -m benchmarks.train_frechet --data DIR
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.fashion_mnist import load_split
from benchmarks.frechet import REFERENCE, WEIGHTS, ClothesClassifier, extract_features, fit_gaussian

logger = logging.getLogger(__name__)


def train_classifier(
    images: Tensor, labels: Tensor, epochs: int, seed: int, batch_size: int = 100
) -> ClothesClassifier:
    """Train by AdamW with a one-cycle learning rate and random horizontal flips.

    Args:
        images: Pictures (n, 1, 28, 28) in [-1, 1].
        labels: Labels (n,) in 0 .. 9.
        epochs: Passes over the pictures.
        seed: Seed of weights, order and flips.
        batch_size: Pictures per step.

    Returns:
        The classifier in evaluation mode.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    classifier = ClothesClassifier().train()
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.01)
    per_epoch = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=epochs * per_epoch)
    for _ in tqdm(range(epochs), desc="epochs"):
        order = torch.randperm(len(images), generator=generator)[: per_epoch * batch_size]
        for index in order.split(batch_size):
            flip = torch.rand(batch_size, generator=generator) < 0.5
            x = torch.where(flip.view(-1, 1, 1, 1), images[index].flip(-1), images[index])
            loss = nn.functional.cross_entropy(classifier(x), labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.eval().requires_grad_(False)


def accuracy(classifier: ClothesClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of pictures (n, 1, 28, 28) that are classified as ``labels`` (n,), in 0 .. 1."""
    with torch.inference_mode():
        guesses = torch.cat([classifier(batch).argmax(dim=1) for batch in images.split(500)])
    return (guesses == labels).float().mean().item()


def reference_statistics(classifier: ClothesClassifier, splits: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Mean and covariance of each split's features, float32, keyed ``split.mean``, ``split.covariance``."""
    arrays: dict[str, np.ndarray] = {}
    for name, images in splits.items():
        gaussian = fit_gaussian(extract_features(classifier, images))
        arrays[f"{name}.mean"] = gaussian.mean.astype(np.float32)
        arrays[f"{name}.covariance"] = gaussian.covariance.astype(np.float32)
    return arrays


def main() -> None:
    """Read the command line, train, and write the two safetensors files beside ``frechet.py``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the Fashion-MNIST *.gz files")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the training pictures")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, order and flips")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    images, labels = load_split(arguments.data, "train")
    test_images, test_labels = load_split(arguments.data, "t10k")
    classifier = train_classifier(images, labels, arguments.epochs, arguments.seed)
    logger.info("test accuracy %.4f", accuracy(classifier, test_images, test_labels))
    save_file(classifier.state_dict(), WEIGHTS)
    save_arrays(reference_statistics(classifier, {"train": images, "test": test_images}), REFERENCE)


if __name__ == "__main__":
    main()
