"""Train a small diffusion model: a ``NoiseUNet2DModel`` whose result is the noise ``eps`` in

    x_t = sqrt(alphas_cumprod[t]) x_0 + sqrt(1 - alphas_cumprod[t]) eps,   t = 0 .. 999,

for a linear ``beta`` schedule. It is conditioned on the class; in one picture of ten the class is replaced by the last
label, "no class", so that classifier-free guidance is possible. The loss is the squared error of the velocity with a
limited weight at high signal-to-noise ratios, after Hang et al. 2023 (https://arxiv.org/abs/2303.09556).
"""

import argparse
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from parasolver_adapters.embedded import SCHEDULE, NoiseUNet2DModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingOptions:
    """Settings of one training run.

    Args:
        steps: Number of optimiser steps; the learning rate reaches zero at the last one.
        minutes: Budget of time; the run ends, with a learning rate of zero, at ``steps`` or at the end of the
            budget, whichever comes first. Only runs that end by ``steps`` can be repeated exactly.
        batch_size: Pictures per step.
        learning_rate: Peak learning rate, reached after ``warmup`` steps.
        warmup: Steps of linear warm-up.
        ema_decay: Limit of the decay of the averaged weights.
        label_dropout: Probability that a label is replaced by "no class".
        snr_cap: Largest signal-to-noise ratio at which the loss has full weight.
        save_minutes: Minutes between two checkpoints.
        seed: Seed of the weights, the order of the pictures and the noise.
    """

    steps: int
    minutes: float = math.inf
    batch_size: int = 32
    learning_rate: float = 1.2e-3
    warmup: int = 200
    ema_decay: float = 0.998
    label_dropout: float = 0.1
    snr_cap: float = 5.0
    save_minutes: float = 5.0
    seed: int = 0


def add_noise(x0: Tensor, eps: Tensor, t: Tensor, schedule: Tensor) -> Tensor:
    """Draw ``x_t`` given ``x_0`` and the noise; ``x0`` and ``eps`` (n, channels, height, width), ``t`` int64 (n,)."""
    a = schedule[t].view(-1, 1, 1, 1)
    return a.sqrt() * x0 + (1.0 - a).sqrt() * eps


def loss_weight(t: Tensor, schedule: Tensor, cap: float) -> Tensor:
    """Weight ``(min(snr, cap) + 1) / snr`` of the squared error of ``eps`` at timesteps ``t``, shape (n,).

    It is 1 in units of the squared error of ``v`` where the signal-to-noise ratio ``snr`` is below ``cap``.
    """
    snr = schedule[t] / (1.0 - schedule[t])
    return (snr.clamp(max=cap) + 1.0) / snr


def spread_timesteps(n: int, generator: torch.Generator) -> Tensor:
    """Draw ``n`` timesteps, uniform over 0 .. 999, evenly spread in the batch to lower the variance."""
    offset = torch.rand((), generator=generator)
    u = (torch.arange(n) + offset) / n
    return (u * SCHEDULE.train_steps).long().clamp(max=SCHEDULE.train_steps - 1)


def learning_rate_factor(step: int, progress: float, warmup: int) -> float:
    """Linear warm-up over the first steps, then cosine decay to zero as ``progress`` goes from 0 to 1."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


class Batches:
    """Endless shuffled minibatches with random horizontal flips and dropped labels.

    Args:
        images: Pictures (n, channels, height, width).
        labels: Labels (n,).
        no_class: The label that takes the place of a dropped one.
        options: Batch size and label dropout.
        generator: Source of randomness.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, no_class: int, options: TrainingOptions, generator: torch.Generator
    ) -> None:
        self.images, self.labels, self.no_class = images, labels, no_class
        self.options, self.generator = options, generator
        self.order = torch.empty(0, dtype=torch.int64)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Return pictures (batch, channels, height, width) and labels (batch,) in 0 .. no_class."""
        size = self.options.batch_size
        if len(self.order) < size:
            self.order = torch.randperm(len(self.images), generator=self.generator)
        index, self.order = self.order[:size], self.order[size:]
        flip = torch.rand(size, generator=self.generator) < 0.5
        images = torch.where(flip.view(-1, 1, 1, 1), self.images[index].flip(-1), self.images[index])
        drop = torch.rand(size, generator=self.generator) < self.options.label_dropout
        return images, torch.where(drop, self.no_class, self.labels[index])


def update_ema(ema: dict[str, Tensor], model: nn.Module, step: int, limit: float) -> None:
    """Move the averaged weights towards the model's; the decay grows to ``limit`` with the step number."""
    decay = min(limit, (1.0 + step) / (10.0 + step))
    torch._foreach_lerp_(list(ema.values()), [p.detach() for p in model.parameters()], 1.0 - decay)


def save_weights(ema: Mapping[str, Tensor], config: Mapping[str, Any], out: Path, name: str) -> None:
    """Write float32 weights and ``config.json`` into ``out``; each file appears complete or not at all."""
    temporary = out / f".{name}.tmp"
    save_file({key: value.contiguous() for key, value in ema.items()}, temporary)
    temporary.replace(out / name)
    temporary = out / ".config.json.tmp"
    temporary.write_text(json.dumps(config, indent=2) + "\n")
    temporary.replace(out / "config.json")


class Trainer:
    """The state of a run: weights, their average, optimiser and random numbers.

    Args:
        config: Of the network, a ``UNet2DModel``; the last of its ``num_class_embeds`` is "no class".
        images: Pictures (n, channels, height, width) in [-1, 1].
        labels: Labels (n,), below that of "no class".
        options: Settings of the run.
    """

    def __init__(self, config: Mapping[str, Any], images: Tensor, labels: Tensor, options: TrainingOptions) -> None:
        torch.manual_seed(options.seed)
        self.config, self.options = config, options
        self.generator = torch.Generator().manual_seed(options.seed)
        self.batches = Batches(images, labels, config["num_class_embeds"] - 1, options, self.generator)
        self.schedule = torch.tensor(SCHEDULE.alphas_cumprod).float()
        self.model = self.network(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=0.01, fused=True)
        self.ema = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        self.step = 0
        self.seconds = 0.0
        self.average_loss = 0.0

    def network(self, config: Mapping[str, Any]) -> Any:
        """The network to be trained, whose result's ``sample`` is the noise."""
        return NoiseUNet2DModel(**config)

    @property
    def progress(self) -> float:
        """Part of the run that is done, 1 at its end."""
        return max(self.step / self.options.steps, self.seconds / (60.0 * self.options.minutes))

    def advance(self) -> None:
        """Take one optimiser step and move the averaged weights."""
        begin = time.monotonic()
        factor = learning_rate_factor(self.step, self.progress, self.options.warmup)
        self.optimizer.param_groups[0]["lr"] = self.options.learning_rate * factor
        loss = self.draw_loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        update_ema(self.ema, self.model, self.step, self.options.ema_decay)
        self.step += 1
        self.average_loss += (loss.item() - self.average_loss) * max(0.005, 1.0 / self.step)
        self.seconds += time.monotonic() - begin

    def draw_loss(self) -> Tensor:
        """Draw a batch with its noise and return the weighted loss, a scalar."""
        x0, y = self.batches.draw()
        eps = torch.randn(x0.shape, generator=self.generator)
        t = spread_timesteps(len(x0), self.generator)
        x_t = add_noise(x0, eps, t, self.schedule)
        squared_error = (self.predicted_noise(x_t, t, y) - eps).square().mean(dim=(1, 2, 3))
        return (loss_weight(t, self.schedule, self.options.snr_cap) * squared_error).mean()

    def predicted_noise(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """What the network takes for the noise in ``x_t``."""
        return self.model(x_t, t, class_labels=y).sample

    def save(self, out: Path) -> None:
        """Write the averaged weights, ``config.json`` and the state from which a run resumes."""
        save_weights(self.ema, self.config, out, "latest.safetensors")
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema,
            "generator": self.generator.get_state(),
            "order": self.batches.order,
            "step": self.step,
            "seconds": self.seconds,
            "average_loss": self.average_loss,
        }
        temporary = out / ".state.tmp"
        torch.save(state, temporary)
        temporary.replace(out / "state.pt")
        logger.info("step %d after %.0f s: running loss %.5f", self.step, self.seconds, self.average_loss)

    def resume(self, out: Path) -> None:
        """Continue from ``out / "state.pt"``."""
        state = torch.load(out / "state.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.ema, self.batches.order = state["ema"], state["order"]
        self.step, self.seconds, self.average_loss = state["step"], state["seconds"], state["average_loss"]


def train(trainer: Trainer, out: Path) -> None:
    """Run to the end, writing into the folder ``out`` now and then."""
    if (out / "state.pt").exists():
        trainer.resume(out)
    save_after = trainer.seconds
    with tqdm(initial=trainer.step, total=trainer.options.steps, mininterval=20.0) as meter:
        while trainer.progress < 1.0:
            trainer.advance()
            meter.set_postfix(loss=f"{trainer.average_loss:.5f}", refresh=False)
            meter.update()
            if trainer.seconds > save_after + 60.0 * trainer.options.save_minutes:
                trainer.save(out)
                save_after = trainer.seconds
    trainer.save(out)


def run(
    config: Mapping[str, Any],
    load: Callable[[Path], tuple[Tensor, Tensor]],
    description: str,
    trainer: type[Trainer] = Trainer,
) -> None:
    """Read the command line and train ``config`` on the pictures and labels that ``load(folder)`` gives."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data set")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, config and state")
    parser.add_argument("--steps", type=int, default=10000, help="optimiser steps")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end earlier, after this much time")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures per step")
    parser.add_argument("--save-minutes", type=float, default=5.0, help="minutes between checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, order and noise")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments.out.mkdir(parents=True, exist_ok=True)
    options = TrainingOptions(
        steps=arguments.steps,
        minutes=arguments.minutes,
        batch_size=arguments.batch_size,
        save_minutes=arguments.save_minutes,
        seed=arguments.seed,
    )
    train(trainer(config, *load(arguments.data), options), arguments.out)
