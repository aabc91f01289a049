"""The steps of a ``GaussianDiffusion``'s loop, for rows of any steps: what :mod:`.gaussian_diffusion` asks of them.

A row is a sample at a step; where a network guides in pairs, it is two samples, with a condition and without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parasolver_adapters.arguments import StepArguments
from parasolver_adapters.draws import Played, Unheard
from parasolver_core import Rows


class UnsupportedDiffusionError(ValueError):
    """The object's loop cannot be sampled in parallel; the message says why."""


@dataclass(frozen=True)
class Step:
    """One call of ``p_sample`` or ``ddim_sample``, as the loop made it.

    Args:
        name: of the method.
        arguments: all of them but x and t, by name.
        quiet: the same with functions of zeros in the place of networks.
        t: (batch,).
        draws: the normal draws made in it.
        generators: what each was drawn from; None: the global stream.
        dtype: of the sample that it gives.
    """

    name: str
    arguments: dict[str, Any]
    quiet: dict[str, Any]
    t: Tensor
    draws: list[Tensor]
    generators: list[torch.Generator | None]
    dtype: torch.dtype


class RowStep:
    """``p_sample`` or ``ddim_sample`` for rows of any steps, with the noise that the loop drew for them.

    Args:
        step: the method.
        steps: as the loop made them.
        batch: number of samples.
        arguments: of each step.
    """

    def __init__(
        self, step: Callable[..., Any], steps: list[Step], batch: int, arguments: list[dict[str, Any]]
    ) -> None:
        counts = {len(step.draws) for step in steps}
        if len(counts) != 1:
            raise UnsupportedDiffusionError(f"diffusion: expected as many draws of noise in every step, got {counts}")
        try:
            self._arguments = StepArguments(arguments, batch, f"arguments of {steps[0].name}")
        except ValueError as error:
            raise UnsupportedDiffusionError(f"diffusion: {error}") from None
        self._step, self._steps, self.batch = step, steps, batch
        self._t = torch.stack([step.t for step in steps])

    def __call__(self, x: Tensor, steps: np.ndarray, samples: np.ndarray) -> Any:
        """What the step returns for these rows."""
        rows = Rows(steps, samples, None, _no_noise, self.batch)  # type: ignore[arg-type]
        arguments = self._arguments(rows, x.device)
        draws = [torch.stack(row_draws).to(x) for row_draws in zip(*map(self.draws_of, steps, samples), strict=True)]
        called = {name: arguments.get(name) for name in ("model", "cond_fn", "denoised_fn")}
        arguments |= {name: Unheard(value) for name, value in called.items() if callable(value)}
        t = self._t.to(x.device)[torch.as_tensor(steps, device=x.device), torch.as_tensor(samples, device=x.device)]
        with Played(draws):
            return self._step(x=x, t=t, **arguments)

    def draws_of(self, step: int, sample: int) -> list[Tensor]:
        """The draws of one step of one sample."""
        return [draw[sample] for draw in self._steps[step].draws]


class PairStep:
    """A step of pairs, (2, *event): their two rows, which a network looks at together, are one."""

    def __init__(self, rows: RowStep) -> None:
        if rows.batch % 2:
            raise UnsupportedDiffusionError(
                "pairs: expected a batch of which one half has conditions and the other has none, got "
                f"{rows.batch} samples"
            )
        self._rows, self.batch = rows, rows.batch // 2

    def __call__(self, x: Tensor, steps: np.ndarray, samples: np.ndarray) -> dict[str, Tensor]:
        halves = np.concatenate([samples, samples + self.batch])
        out = self._rows(in_halves(x), np.tile(steps, 2), halves)
        return {name: in_pairs(out[name]) for name in ("sample", "pred_xstart")}

    def draws_of(self, step: int, sample: int) -> list[Tensor]:
        first, second = (self._rows.draws_of(step, number) for number in (sample, sample + self.batch))
        return [torch.stack(pair) for pair in zip(first, second, strict=True)]


def in_pairs(x: Tensor) -> Tensor:
    """Both halves of a batch, (2 n, *event), side by side: (n, 2, *event)."""
    return torch.stack(x.chunk(2), dim=1)


def in_halves(x: Tensor) -> Tensor:
    """Pairs, (n, 2, *event), as the halves of a batch, (2 n, *event)."""
    return torch.cat([x[:, 0], x[:, 1]])


class StepDenoiser:
    """``m`` of the module's equation, and the clean samples that were predicted on the way."""

    takes_rows = True

    def __init__(self, rows: RowStep | PairStep, steps: int) -> None:
        self._rows = rows
        self._predictions: list[dict[int, Tensor]] = [{} for _ in range(steps)]

    def __call__(self, x: Tensor, t: Tensor, rows: Rows) -> Tensor:
        table, kind = rows.recurrence, torch.promote_types(x.dtype, torch.float32)
        columns = np.stack([table.a[rows.steps, 0], table.b[rows.steps, 0], table.c[rows.steps]])
        a, b, c = torch.as_tensor(columns, dtype=kind, device=x.device).view(3, -1, *[1] * (x.ndim - 1))
        moved = a * x.to(kind)  # before the step, as the network may write into x
        out = self._rows(x, rows.steps, rows.samples)
        for step, sample, predicted in zip(rows.steps, rows.samples, out["pred_xstart"], strict=True):
            self._predictions[step][sample] = predicted
        change = out["sample"].to(kind) - moved
        if table.stochastic:
            z = torch.stack([rows.noise(*at) for at in zip(rows.steps, rows.samples, strict=True)])
            change = change - c * z.to(change)
        return (change / b).to(x.dtype)

    def noise(self, step: int, sample: int) -> Tensor:
        """The first draw of a step; asked for only where there is one."""
        return self._rows.draws_of(step, sample)[0]

    def predicted(self, i: int) -> Tensor:
        """The predicted clean samples of step i, asked for in order; interpolated where it was not evaluated."""
        rows = [self._predicted(i, sample) for sample in range(self._rows.batch)]
        if i:
            self._predictions[i - 1].clear()
        self._predictions[i] = dict(enumerate(rows))
        return torch.stack(rows)

    def _predicted(self, i: int, sample: int) -> Tensor:
        if sample in self._predictions[i]:
            return self._predictions[i][sample]
        after = next((j for j in range(i, len(self._predictions)) if sample in self._predictions[j]), None)
        before = self._predictions[i - 1][sample]
        return before if after is None else torch.lerp(before, self._predictions[after][sample], 1 / (after - i + 1))


def _no_noise(step: int, sample: int) -> Tensor:
    raise AssertionError("the noise of a step is played to it")
