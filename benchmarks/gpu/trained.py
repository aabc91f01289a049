"""A larger network trained on the card in a minute or two, and whole runs of it: 32 x 32 colour pictures."""

from __future__ import annotations

import time
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from benchmarks.gpu.device import Lab
from benchmarks.gpu.runs import Problem, in_small, raced
from benchmarks.problems import emoji_denoiser
from benchmarks.training import add_noise, learning_rate_factor, loss_weight, update_ema
from parasolver_adapters.embedded import SCHEDULE
from parasolver_core import DDIM, solve_sequential

PART = "trained"
SHARE = 0.7  # of the part's time that training may take
BATCH, LEARNING_RATE, WARM_UP, DECAY, CAP = 256, 4e-4, 200, 0.998, 5.0
EVENT = (3, 32, 32)


def pictures(lab: Lab, count: int) -> Tensor:
    """What the emoji network draws, (count, 3, 32, 32): the pictures themselves do not come with the project."""
    network, drawn = emoji_denoiser(lab.device), []
    steps = SCHEDULE.timesteps(3 if lab.tiny else 50)
    draw = torch.Generator().manual_seed(0)
    while sum(map(len, drawn)) < count:
        start = torch.randn(min(count, 512), *EVENT, generator=draw).to(lab.device)
        drawn.append(solve_sequential(network, start, steps, DDIM(SCHEDULE)).sample.clamp(-1, 1))
    return torch.cat(drawn)[:count]


def untrained(lab: Lab) -> UNet2DModel:
    """The U-Net of DDPM for CIFAR-10, 36 million weights; in small, thousands."""
    widths = (16, 16) if lab.tiny else (128, 256, 256, 256)
    blocks = len(widths)
    return UNet2DModel(
        sample_size=EVENT[1],
        layers_per_block=1 if lab.tiny else 2,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", *["DownBlock2D"] * blocks)[:blocks],
        up_block_types=(*["UpBlock2D"] * blocks, "AttnUpBlock2D", "UpBlock2D")[-blocks:],
        norm_num_groups=8 if lab.tiny else 32,
        attention_head_dim=None,
    ).to(lab.device)


def train(lab: Lab, data: Tensor, seconds: float) -> tuple[UNet2DModel, dict[str, Any]]:
    """The network with averaged weights, which predicts v, and how training went."""
    torch.manual_seed(0)
    model = untrained(lab)
    table = torch.tensor(SCHEDULE.alphas_cumprod, dtype=torch.float32, device=lab.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    averaged = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    started, step, batch = time.monotonic(), 0, 4 if lab.tiny else BATCH
    while (progress := (time.monotonic() - started) / seconds) < 1 and not (lab.tiny and step == 2):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * learning_rate_factor(step, progress, WARM_UP)
        x_0 = data[torch.randint(len(data), (batch,), device=lab.device)]
        eps, t = torch.randn_like(x_0), torch.randint(0, SCHEDULE.train_steps, (batch,), device=lab.device)
        kept = table[t].view(-1, 1, 1, 1)
        with torch.autocast(lab.device.type, torch.bfloat16):
            v = model(add_noise(x_0, eps, t, table), t, return_dict=False)[0].float()
        wrong = (v - (kept.sqrt() * eps - (1 - kept).sqrt() * x_0)).square().mean(dim=(1, 2, 3))
        loss = (loss_weight(t, table, CAP) * table[t] * wrong).mean()  # weighted as an error of eps
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_ema(averaged, model, step, DECAY)
        step += 1
        if step % 16 == 0:
            lab.wait()  # the clock sees what was done, not what was asked for
    model.load_state_dict(averaged, strict=False)
    weights = sum(weight.numel() for weight in model.parameters())
    about = {"steps": step, "seconds": time.monotonic() - started, "loss": float(loss.detach()), "parameters": weights}
    return model.eval().requires_grad_(False), about


def run(lab: Lab) -> None:
    """Train, and race."""
    models: list[UNet2DModel] = []

    def trained() -> dict[str, Any]:
        with torch.no_grad():
            data = pictures(lab, 8 if lab.tiny else 4096)
        model, about = train(lab, data, SHARE * lab.left)
        models.append(model)
        return {"ok": True, "pictures": len(data), **about}

    lab.measure(PART, "training", trained)
    if not models:
        return
    x_T = torch.randn(1, *EVENT, generator=torch.Generator().manual_seed(1)).to(lab.device)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return models[0](x, t, return_dict=False)[0]

    for sampler, steps, windows in (("DDIM", 50, (8, 16)), ("DDPM", 250, (32,))):
        name = f"32x32 colour pictures, {sampler}-{steps}"
        shown = in_small(lab, steps)
        problem = Problem(name, network, network, SCHEDULE, "v_prediction", x_T, shown, windows, sampler)
        with torch.no_grad():
            raced(lab, PART, problem, lab.left / (2 if sampler == "DDIM" else 1))
