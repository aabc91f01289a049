"""Train the small diffusion policy that the benchmarks use; a few minutes on one core.

Example:
    python -m benchmarks.train_policy --out policy.safetensors --steps 12000
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from tqdm import trange

from benchmarks.policy import SCHEDULE, Policy, demonstrations


def main(out: Annotated[Path, typer.Option()], steps: int = 12000, batch: int = 256, seed: int = 0) -> None:
    """Train and write the averaged weights."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    table = torch.tensor(SCHEDULE.alphas_cumprod).float()
    policy = Policy()
    average = {name: weight.detach().clone() for name, weight in policy.state_dict().items()}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    with trange(steps) as meter:
        for step in meter:
            x0, obstacle = demonstrations(batch, generator)
            t = torch.randint(0, len(table), (batch,), generator=generator)
            eps = torch.randn(x0.shape, generator=generator)
            a, s = (level.sqrt()[t].view(-1, 1, 1) for level in (table, 1 - table))
            loss = (policy(a * x0 + s * eps, t, obstacle) - (a * eps - s * x0)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            decay = min(0.999, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.values()), [w.detach() for w in policy.state_dict().values()], 1 - decay)
            if step % 200 == 0:
                meter.set_postfix(loss=f"{loss.item():.4f}")
    save_file(average, out)


if __name__ == "__main__":
    typer.run(main)
