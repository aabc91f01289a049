"""Train the small diffusion model of 32 x 32 emoji that the benchmarks compare methods on.

The pictures are Twemoji, (c) Twitter and other contributors, CC BY 4.0, from the npm package
``emoji-datasource-twitter``, whose unpacked folder is the data set.

Example:
    npm pack emoji-datasource-twitter && tar xf emoji-datasource-twitter-*.tgz
    python -m benchmarks.train_emoji --data package --out DIR --steps 10000 --seed 0
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.training import run

CATEGORIES = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)
SIZE = 32
MODEL_CONFIG: dict[str, Any] = {
    "sample_size": SIZE,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (16, 32, 48),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "attention_head_dim": 16,
    "norm_num_groups": 8,
    "num_class_embeds": len(CATEGORIES) + 1,
    "dropout": 0.0,
}


def load_emoji(package: Path) -> tuple[Tensor, Tensor]:
    """Pictures on white, float32 (n, 3, 32, 32) in [-1, 1], and categories, int64 (n,)."""
    images, labels = [], []
    for entry in json.loads((package / "emoji.json").read_text()):
        if entry["category"] not in CATEGORIES:
            continue
        file = package / "img" / "twitter" / "64" / entry["image"]
        if not file.exists():
            continue
        picture = Image.open(file).convert("RGBA")
        white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        images.append(np.asarray(white.resize((SIZE, SIZE), Image.Resampling.BOX)))
        labels.append(CATEGORIES.index(entry["category"]))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    return pixels / 127.5 - 1.0, torch.tensor(labels)


if __name__ == "__main__":
    run(MODEL_CONFIG, load_emoji, "Train the emoji model.")
