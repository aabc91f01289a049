"""Train the small Fashion-MNIST diffusion model that ships with the adapters; ``benchmarks.training`` says how.

Example:
    python -m benchmarks.train_embedded --data DIR --out DIR --steps 10000 --seed 0
"""

from typing import Any

from benchmarks.fashion_mnist import load_split
from benchmarks.training import run
from parasolver_adapters.embedded import NO_CLASS

MODEL_CONFIG: dict[str, Any] = {
    "sample_size": 28,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (16, 32, 64),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "UpBlock2D"),
    "attention_head_dim": 32,
    "norm_num_groups": 8,
    "num_class_embeds": NO_CLASS + 1,
    "dropout": 0.0,
}


if __name__ == "__main__":
    run(MODEL_CONFIG, lambda data: load_split(data, "train"), "Train the embedded model on Fashion-MNIST.")
