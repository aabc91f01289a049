"""What parallel sampling of a diffusers pipeline costs besides the network: ``python -m benchmarks.pipelines``.

Stable Diffusion's pipeline, 50 steps of DDIM with guidance at 512 pixels, and in the place of the U-Net a function that
is nearly free. Everything is counted in passes: the time of the pipeline's own sequential loop with the same function,
measured in turn with the parallel run.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from rich.console import Console
from rich.progress import track

from benchmarks.tables import show
from benchmarks.torch_memory import TorchMemory
from parasolver_adapters.diffusers import parallel_sampling

STEPS = 50
WINDOWS = (8, 16, 50)
TOKENS, WIDTH = 77, 1024  # of Stable Diffusion 2


class FreeUNet(UNet2DConditionModel):
    """Predicts a nonlinear function of the state alone, as fast as PyTorch can."""

    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        out = sample * 0.9
        return (out,) if kwargs.get("return_dict") is False else UNet2DConditionOutput(sample=out)


def pipeline(size: int = 64) -> Any:
    """Stable Diffusion with latents of ``(4, size, size)`` and a free network."""
    small = {"block_out_channels": (4,), "norm_num_groups": 2, "layers_per_block": 1}
    unet = FreeUNet(
        sample_size=size,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        cross_attention_dim=WIDTH,
        **small,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(**small),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.vae_scale_factor = 8
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Setting:
    """The pipeline and its arguments."""

    def __init__(self, size: int = 64, steps: int = STEPS) -> None:
        self.pipe = pipeline(size)
        random = torch.Generator().manual_seed(0)
        self.given = {
            "prompt_embeds": torch.randn(1, TOKENS, WIDTH, generator=random),
            "negative_prompt_embeds": torch.randn(1, TOKENS, WIDTH, generator=random),
            "num_inference_steps": steps,
            "output_type": "latent",
        }

    def call(self) -> float:
        """Seconds of a call of the pipeline, as it is now."""
        began = time.perf_counter()
        self.pipe(**self.given, generator=torch.Generator().manual_seed(1))
        return time.perf_counter() - began

    def parallel(self, window: int) -> tuple[float, list[float]]:
        """Seconds of a call in parallel, entering and leaving the block included, and those of its rounds."""
        began = time.perf_counter()
        with parallel_sampling(self.pipe, window=window) as run:
            self.call()
        return time.perf_counter() - began, [record.seconds for record in run.stats.history]


@dataclass(frozen=True)
class Line:
    """One window; medians over the runs.

    Args:
        window, rounds: what was measured.
        loop: seconds of the pipeline's own loop: one pass.
        round: seconds of a round, of the median round of each run.
        rest: seconds of the run without its rounds: entering, watching, replaying and leaving.
        round_passes, rest_passes: the same in passes, each run against the loop before it.
    """

    window: int
    rounds: int
    loop: float
    round: float
    rest: float
    round_passes: float
    rest_passes: float

    def row(self) -> dict[str, str]:
        return {
            "window": str(self.window),
            "rounds": str(self.rounds),
            "the pipeline's own loop, ms": f"{1e3 * self.loop:.1f}",
            "round, ms": f"{1e3 * self.round:.1f}",
            "round, passes": f"{self.round_passes:.2f}",
            "entering and leaving, ms": f"{1e3 * self.rest:.1f}",
            "entering and leaving, passes": f"{self.rest_passes:.2f}",
        }


def measure(window: int, runs: int, size: int = 64) -> Line:
    """Time of one window."""
    setting = Setting(size)
    setting.call()
    setting.parallel(window)
    found = []
    for _ in range(runs):
        loop = setting.call()
        total, rounds = setting.parallel(window)
        found.append((loop, float(np.median(rounds)), total - sum(rounds), len(rounds)))
    loop, middle, rest, rounds = np.array(found).T
    return Line(
        window=window,
        rounds=int(np.median(rounds)),
        loop=float(np.median(loop)),
        round=float(np.median(middle)),
        rest=float(np.median(rest)),
        round_passes=float(np.median(middle / loop)),
        rest_passes=float(np.median(rest / loop)),
    )


def peak_bytes(steps: int, window: int = 8, size: int = 64) -> tuple[int, int]:
    """The peak of what a run allocates, and its rounds; more steps make more rounds."""
    setting = Setting(size, steps)
    setting.call()
    with TorchMemory() as memory, parallel_sampling(setting.pipe, window=window, tolerance=0.0) as run:
        setting.call()
    return memory.peak, run.stats.rounds


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the lines to this file.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each window.")] = 21,
) -> None:
    """Time and memory of the adapter itself, in passes of the pipeline's own loop."""
    torch.set_num_threads(1)
    console = Console()
    lines = [measure(window, runs) for window in track(WINDOWS, "Measuring", console=console)]
    show(console, f"Besides the network, {STEPS} steps", [line.row() for line in lines])
    for steps in (25, 100):
        peak, rounds = peak_bytes(steps)
        console.print(f"Peak memory of a run of {steps} steps in {rounds} rounds: {peak / 2**20:.1f} MiB")
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(line) for line in lines], indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
