"""One picture from a diffusers pipeline, sequentially and in parallel."""

import argparse
import time

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline

from parasolver_adapters.diffusers import parallel_sampling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="stabilityai/stable-diffusion-xl-base-1.0")
    parser.add_argument("--prompt", default="a lighthouse on a cliff")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--tolerance", type=float, default=0.05)
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe = StableDiffusionXLPipeline.from_pretrained(options.model, dtype=dtype).to(
        device
    )
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing"
    )

    def picture() -> np.ndarray:
        generator = torch.Generator().manual_seed(42)
        called = pipe(
            options.prompt,
            num_inference_steps=options.steps,
            generator=generator,
            output_type="np",
        )
        return called.images[0]

    start = time.perf_counter()
    sequential = picture()
    between = time.perf_counter()
    with parallel_sampling(
        pipe, window=options.window, tolerance=options.tolerance
    ) as run:
        parallel = picture()
    end = time.perf_counter()

    print(f"sequential: {options.steps} calls, {between - start:.2f} s")
    print(f"parallel:   {run.stats.rounds} rounds, {end - between:.2f} s")
    print(
        f"largest difference of a pixel: {np.abs(parallel - sequential).max():.3f} of 1"
    )


if __name__ == "__main__":
    main()
