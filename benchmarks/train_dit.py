"""Train the small class-conditional diffusion transformer that the comparison with step caches uses.

A ``DiTTransformer2DModel`` of diffusers, whose blocks the caches of diffusers know. It predicts the velocity
``v = alpha eps - sigma x_0`` on the embedded model's schedule. The pictures are Fashion-MNIST (Xiao et al. 2017), in
Debian's package ``dataset-fashion-mnist``.

The weights that ship, ``weights/dit.safetensors`` in float16, are the average after 3500 steps with seed 0 (112,000
pictures of 32 a step, less than two passes), when the running loss was 0.159. The run was resumed once: the first 711
steps had the learning rate of a run of 9000 steps, the others that of one of 3500. So it is no run that this command
repeats exactly.

Example:
    python -m benchmarks.train_dit --data /usr/share/datasets/fashion-mnist --out DIR --steps 3500 --seed 0
"""

from collections.abc import Mapping
from typing import Any

from diffusers import DiTTransformer2DModel
from torch import Tensor

from benchmarks.fashion_mnist import load_split
from benchmarks.training import Trainer, run

CLASSES = 10  # the label after the last is "no class"
MODEL_CONFIG: dict[str, Any] = {
    "sample_size": 28,
    "patch_size": 4,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 8,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "norm_num_groups": 8,
    "num_embeds_ada_norm": CLASSES,
    "num_class_embeds": CLASSES + 1,
}


def network_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the network is made with: its number of labels follows from that of the classes."""
    return {name: value for name, value in config.items() if name != "num_class_embeds"}


class DiTTrainer(Trainer):
    """Trains by the velocity: ``eps = alpha v + sigma x_t``."""

    def network(self, config: Mapping[str, Any]) -> DiTTransformer2DModel:
        return DiTTransformer2DModel(**network_options(config))

    def predicted_noise(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        a = self.schedule[t].view(-1, 1, 1, 1)
        return a.sqrt() * self.model(x_t, t, class_labels=y).sample + (1.0 - a).sqrt() * x_t


if __name__ == "__main__":
    run(MODEL_CONFIG, lambda data: load_split(data, "train"), "Train the small diffusion transformer.", DiTTrainer)
