"""The exact score of blurred pictures, for arrays of any library, and pictures to blur."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from array_api_compat import array_namespace, device
from torch import Tensor

from parasolver_core.samplers.schedules import DiscreteSchedule

BLUR = 0.2


class Score:
    """The noise prediction for data that are K pictures, each blurred: known exactly, and as hard as real ones.

    Args:
        pictures: (K, size), in [-1, 1], on the device and in the dtype of the states.
        schedule: of the noise.
    """

    def __init__(self, pictures: Any, schedule: DiscreteSchedule) -> None:
        xp = self._xp = array_namespace(pictures)
        self._pictures, self._squares = pictures, xp.sum(pictures**2, axis=1)[None, :] / 2
        self._kept = xp.asarray(np.array(schedule.alphas_cumprod), dtype=pictures.dtype, device=device(pictures))

    def __call__(self, x: Any, t: Any) -> Any:
        """For x (rows, *event) and t (rows,)."""
        xp, rows = self._xp, self._xp.reshape(x, (x.shape[0], -1))
        kept = xp.take(self._kept, t, axis=0)[:, None]
        alpha, variance = xp.sqrt(kept), 1 - kept
        total = kept * BLUR**2 + variance
        logits = (alpha * (rows @ self._pictures.T) - kept * self._squares) / total
        weights = xp.exp(logits - xp.max(logits, axis=1, keepdims=True))
        mean = (weights / xp.sum(weights, axis=1, keepdims=True)) @ self._pictures
        clean = mean + alpha * BLUR**2 / total * (rows - alpha * mean)
        return xp.reshape((rows - alpha * clean) / xp.sqrt(variance), x.shape)


def pictures(count: int, event: tuple[int, ...]) -> Tensor:
    """Crops of scikit-learn's two photographs, (count, size), for events (channels, side, side).

    Four channels stand for latents: crops of eight times the side, shrunk, with a difference of colours as the fourth.
    """
    from sklearn.datasets import load_sample_images

    channels, side, draw = event[0], event[1], np.random.default_rng(0)
    shrink = 8 if channels == 4 else 1
    photographs, big, crops = load_sample_images().images, side * shrink, []
    for i in range(count):
        photograph = photographs[i % 2]
        y, x = (int(draw.integers(0, length - big + 1)) for length in photograph.shape[:2])
        crop = photograph[y : y + big, x : x + big].astype(np.float32)[:, :: draw.choice([-1, 1])].transpose(2, 0, 1)
        crop = crop.reshape(3, side, shrink, side, shrink).mean((2, 4)) / 127.5 - 1
        crops.append(np.concatenate([crop, crop[:1] - crop[1:2]])[:channels])
    return torch.from_numpy(np.stack(crops).reshape(count, -1))
