r"""What the networks of guided-diffusion and of DiT share: they predict the noise and how uncertain a step is.

Both were trained as in "Improved Denoising Diffusion Probabilistic Models" (Nichol and Dhariwal, 2021,
https://arxiv.org/abs/2102.09672). Half of the output channels is the noise ``eps``; the other half, ``v``, sets the
variance of a step of DDPM between its two bounds (section 3.1 there),

.. math::
    \sigma^2 = \exp\bigl(w \log\beta + (1 - w) \log\tilde\beta\bigr) , \qquad w = (v + 1) / 2 .
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, repeat
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parasolver_core import DDPM, Recurrence, Rows
from parasolver_core.arrays import DeviceTable, take_rows, uploaded
from parasolver_core.denoiser.clipping import Clipping
from parasolver_core.samplers.schedules import DiscreteSchedule
from parasolver_core.validation import check_count

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Labels = int | Sequence[int]

NEEDS_ROWS = (
    "call with rows, which name each row's sample (a function around this denoiser needs takes_rows = True and an "
    "argument rows, to be passed on)"
)


def space_timesteps(train_steps: int, spacing: int | str) -> NDArray[np.int64]:
    """The timesteps that a sampler visits, from noise to data, as the published code chooses them.

    Args:
        train_steps: number of timesteps of the training schedule.
        spacing: a number of steps, spread evenly from the first to the last timestep; "ddim25": every 40th timestep
            from 0, for schedules of which 25 is such a part; "10,20,30": the schedule cut into equal parts, from data
            to noise, with so many steps in each.

    Raises:
        ValueError: the schedule cannot be divided like that.

    Example:
        >>> space_timesteps(1000, "ddim25")[:3]
        array([960, 920, 880])
        >>> space_timesteps(1000, 5)
        array([999, 749, 500, 250,   0])
    """
    text = str(spacing).strip()
    if text.startswith("ddim") and text[4:].isdecimal():
        strides = [stride for stride in range(1, train_steps) if len(range(0, train_steps, stride)) == int(text[4:])]
        if not strides:
            raise ValueError(f"spacing: no stride takes {text[4:]} of {train_steps} timesteps, got {spacing!r}")
        return np.arange(0, train_steps, strides[0])[::-1].copy()
    counts = text.split(",")
    if not all(count.strip().isdecimal() and int(count) > 0 for count in counts):
        raise ValueError(f'spacing: expected a number of steps such as 250, "ddim25" or "10,20,30", got {spacing!r}')
    parts = np.array_split(np.arange(train_steps), len(counts))
    return np.concatenate([_spread(part, int(count)) for part, count in zip(parts, counts, strict=True)])[::-1].copy()


def _spread(part: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """``count`` of the timesteps, the first and the last among them."""
    if count > len(part):
        raise ValueError(f"spacing: {count} steps were asked for where there are {len(part)} timesteps")
    stride = (len(part) - 1) / (count - 1) if count > 1 else 0.0
    return part[[round(position) for position in accumulate(repeat(stride, count - 1), initial=0.0)]]


def starting_noise(batch: int, event: tuple[int, ...], seed: int = 0, device: Any = "cpu") -> Tensor:
    """Standard normal ``x_T``, ``(batch, *event)``, float32; a sample's noise does not depend on how many follow it."""
    check_count("batch", batch)
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.stack([torch.randn(event, generator=generator, device="cpu") for _ in range(batch)]).to(device)


def guided(null: Tensor, given: Tensor, scale: float) -> Tensor:
    """``null + scale (given - null)``: classifier-free guidance of predictions without and with a condition."""
    return null + scale * (given - null)


def check_scale(name: str, value: float | None) -> None:
    """A finite number, or None."""
    try:
        finite = value is None or math.isfinite(value)
    except (TypeError, ValueError):  # a tensor of one for each sample, for example
        raise TypeError(f"{name}: expected one finite number, got {value!r}") from None
    if not finite:
        raise ValueError(f"{name}: expected a finite number, got {value}")


@dataclass(frozen=True)
class ClassifierGuidance:
    """``scale * d log p(y | x_t) / dx_t`` of a classifier of noisy pictures (Dhariwal and Nichol, 2021, section 4).

    Args:
        classifier: ``classifier(x, t)``, (rows, classes) logits.
        scale: of the gradient; 0 switches guidance off.
    """

    classifier: Callable[[Tensor, Tensor], Tensor]
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_scale("scale", self.scale)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The gradient of each row, like ``x``."""
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            chosen = self.classifier(x, t).log_softmax(dim=1).gather(1, y[:, None])
            return self.scale * torch.autograd.grad(chosen.sum(), x)[0]


@dataclass(frozen=True, eq=False)
class EpsilonModel:
    """``eps = model(x, t)`` of a network that predicts the noise, and perhaps a variance, for DDIM and DPM-Solver.

    These samplers have no use for the variance; for DDPM see :class:`LearnedVariance`.

    Args:
        network: ``network(x, t, y)``, (rows, channels or twice as many, ...); y is (rows,) or None. In evaluation
            mode: it repeats itself and keeps rows apart.
        schedule: the schedule it was trained with.
        labels: the class of all samples, or one of each sample of the batch; None for a network without.
        num_classes: how many classes the network knows (a label for "no class" included); None: it takes no labels.
        learn_sigma: whether the network gives ``v`` behind ``eps``.
        guidance_scale: w of classifier-free guidance, ``eps = eps_null + w (eps_y - eps_null)`` (Ho and Salimans, 2022,
            https://arxiv.org/abs/2207.12598), from one call of twice as many rows; None or 1: none.
        null_label: the label that stands for no class.
        guided_channels: guidance changes the first so many channels only; None: all of eps. ``v`` is the labelled
            row's.
        classifier: guidance by a classifier; needs labels, which the network need not know.
        clip_denoised: whether to clip the predicted clean sample to [-1, 1], as for pictures.
    """

    network: Network = field(repr=False)
    schedule: DiscreteSchedule = field(repr=False)
    labels: Labels | None = None
    num_classes: int | None = None
    learn_sigma: bool = True
    guidance_scale: float | None = None
    null_label: int | None = None
    guided_channels: int | None = None
    classifier: ClassifierGuidance | None = None
    clip_denoised: bool = False
    _classes: DeviceTable = field(init=False, repr=False)
    _sigmas: DeviceTable = field(init=False, repr=False)
    _clipping: Clipping = field(init=False, repr=False)

    prediction_type: ClassVar[str] = "epsilon"

    def __post_init__(self) -> None:
        needed = [name for name, used in self._uses_of_labels().items() if used]
        if needed and self.labels is None:
            raise ValueError(f"labels: {needed[0]} needs them, got None; give one integer, or one for each sample")
        if not needed and self.labels is not None:
            raise ValueError(f"labels: this network takes none, got {self.labels!r}")
        self._check_labels()
        if self.labels is not None and np.ndim(self.labels) == 0:
            object.__setattr__(self, "labels", int(self.labels))  # type: ignore[arg-type]
        labels = np.atleast_1d(np.asarray([] if self.labels is None else self.labels, dtype=np.int64))
        object.__setattr__(self, "_classes", DeviceTable(labels))
        object.__setattr__(self, "_clipping", Clipping(self.schedule, "epsilon"))
        levels = self.schedule.levels(np.arange(self.schedule.train_steps))
        object.__setattr__(self, "_sigmas", DeviceTable(levels[1]))
        check_scale("guidance_scale", self.guidance_scale)
        check_count("guided_channels", self.guided_channels, optional=True)
        if self._guided and (self.num_classes is None or self.null_label is None):
            raise ValueError(
                f"guidance_scale: got {self.guidance_scale}, which needs a network with labels and a null_label that "
                "it was trained with"
            )

    @property
    def takes_rows(self) -> bool:
        """Whether the samples have labels of their own, so that it must know whose each row is."""
        return self.labels is not None and not isinstance(self.labels, int)

    def __call__(self, x: Tensor, t: Tensor, rows: Rows | None = None) -> Tensor:
        """``eps`` of each row, like ``x``.

        Args:
            x: (rows, channels, ...), noisy samples.
            t: (rows,), timesteps of the training schedule.
            rows: which sample each row belongs to; not needed with a single label.
        """
        eps, _ = self.predict(x, t, rows)
        gradient = self.guidance(x, t, rows)
        return eps if gradient is None else eps - self._sigma(x, t) * gradient

    def predict(self, x: Tensor, t: Tensor, rows: Rows | None = None) -> tuple[Tensor, Tensor | None]:
        """``(eps, v)`` without the classifier's guidance; clipped if so wanted. ``v`` is None if it is not learned."""
        y = self._labels_of(x, rows) if self.num_classes is not None else None
        output, channels = self._call(x, t, y), x.shape[1]
        expected = channels * (2 if self.learn_sigma else 1)
        if output.shape[1] != expected:
            raise ValueError(
                f"learn_sigma: with {self.learn_sigma} the network should give {expected} channels for {channels}, got "
                f"{output.shape[1]}"
            )
        eps, v = output[:, :channels], output[:, channels:] if self.learn_sigma else None
        if self.clip_denoised:
            eps = self._clipping(x, t, eps)
        return eps, v

    def guidance(self, x: Tensor, t: Tensor, rows: Rows | None = None) -> Tensor | None:
        """The classifier's gradient, if there is one."""
        if self.classifier is None or self.classifier.scale == 0:
            return None
        return self.classifier(x, t, self._labels_of(x, rows))

    def timesteps(self, spacing: int | str) -> NDArray[np.int64]:
        """Timesteps of this schedule from noise to data; see :func:`space_timesteps`."""
        return space_timesteps(self.schedule.train_steps, spacing)

    @property
    def _guided(self) -> bool:
        return self.guidance_scale is not None and self.guidance_scale != 1

    def _call(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        if not self._guided or y is None:
            return self.network(x, t, y)
        null = torch.full_like(y, self.null_label)  # type: ignore[arg-type]
        both = self.network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
        labelled, unlabelled = both.chunk(2)
        first = x.shape[1] if self.guided_channels is None else self.guided_channels
        changed = guided(unlabelled[:, :first], labelled[:, :first], self.guidance_scale)  # type: ignore[arg-type]
        return torch.cat([changed, labelled[:, first:]], dim=1)

    def _labels_of(self, x: Tensor, rows: Rows | None) -> Tensor:
        classes = self._classes.like(x, torch.int64)
        if not self.takes_rows:
            return classes.expand(len(x))
        if rows is not None:
            if len(classes) != rows.batch:
                raise ValueError(f"labels: expected one for each of the {rows.batch} samples, got {len(classes)}")
            return take_rows(classes, rows.samples)
        if len(classes) != len(x):
            raise ValueError(f"labels: got {len(classes)} for {len(x)} rows; {NEEDS_ROWS}")
        return classes

    def _check_labels(self) -> None:
        labels = np.atleast_1d(np.asarray([] if self.labels is None else self.labels))
        if labels.ndim != 1 or (labels.size and not np.issubdtype(labels.dtype, np.integer)):
            raise TypeError(f"labels: expected one integer, or one for each sample, got {self.labels!r}")
        null = self.null_label
        if null is not None and self.num_classes is not None and not 0 <= null < self.num_classes:
            raise ValueError(f"null_label: expected a class in 0..{self.num_classes - 1}, got {null}")
        limit = self.num_classes if self.num_classes is not None else np.iinfo(np.int64).max
        outside = labels[(labels < 0) | (labels >= limit)]
        if outside.size:
            raise ValueError(f"labels: expected classes in 0..{limit - 1}, got {outside[0]}")

    def _uses_of_labels(self) -> dict[str, bool]:
        return {"the network": self.num_classes is not None, "classifier guidance": self.classifier is not None}

    def _sigma(self, x: Tensor, t: Tensor) -> Tensor:
        return self._sigmas.like(x)[t].view(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True, eq=False)
class LearnedVariance:
    r"""A model for :class:`~parasolver_core.DDPM` with the variance that its network learned, exactly.

    A step of DDPM with the learned standard deviation :math:`\sigma(x)`, element by element, and perhaps a classifier's
    gradient g (which moves the mean by :math:`\sigma^2 g`) is

    .. math::
        x_{i+1} = a_i x_i + b_i \epsilon(x_i) + \sigma(x_i) z_i + \sigma(x_i)^2 g(x_i) .

    It is not linear around ``eps``. As the noise ``z`` is known in advance, it is linear around

    .. math::
        m(x_i) = \epsilon(x_i) + \bigl((\sigma(x_i) - c_i) z_i + \sigma(x_i)^2 g(x_i)\bigr) / b_i

    with the fixed noise scale :math:`c_i` of the step rule, and that is what this denoiser returns. The last step adds
    no noise.

    Args:
        model: an :class:`EpsilonModel` that learned its variance.

    Example::

        denoiser, timesteps = LearnedVariance(model), model.timesteps(250)
        solution = solve(denoiser, x_T, timesteps, DDPM(model.schedule), window=32, seed=0)
    """

    model: EpsilonModel
    _tables: WeakKeyDictionary[Recurrence, NDArray[np.float64]] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False
    )

    takes_rows: ClassVar[bool] = True
    prediction_type: ClassVar[str] = "epsilon"

    def __post_init__(self) -> None:
        if not self.model.learn_sigma:
            raise ValueError(
                "model: it has no learned variance (learn_sigma=False); give it to solve as it is, with "
                'DDPM(model.schedule, variance_type="fixed_large")'
            )

    def __call__(self, x: Tensor, t: Tensor, rows: Rows | None = None) -> Tensor:
        """The output ``m`` above of each row, like ``x``; the solver tells the rows."""
        if rows is None:
            raise TypeError("rows: needed for the noise of each row; give this denoiser to solve, with DDPM")
        eps, v = self.model.predict(x, t, rows)
        assert v is not None
        z = torch.stack([rows.noise(step, sample) for step, sample in zip(rows.steps, rows.samples, strict=True)])
        z = z.to(x.device)
        table = uploaded(torch, self._table(rows.recurrence)[:, rows.steps], z.device, z.dtype)
        b, c, log_small, log_large, noisy = table.view(5, -1, *[1] * (x.ndim - 1))
        weight = (v.to(z.dtype) + 1) / 2
        log_variance = weight * log_large + (1 - weight) * log_small
        change = noisy * (torch.exp(log_variance / 2) - c) * z
        gradient = self.model.guidance(x, t, rows)
        if gradient is not None:
            change = change + torch.exp(log_variance) * gradient.to(z.dtype)
        return (eps.to(z.dtype) + change / b).to(x.dtype)

    def _table(self, recurrence: Recurrence) -> NDArray[np.float64]:
        """b, c, the logarithms of both variances, and whether the step adds noise: (5, N)."""
        if recurrence not in self._tables:
            self._tables[recurrence] = self._make_table(recurrence)
        return self._tables[recurrence]

    def _make_table(self, recurrence: Recurrence) -> NDArray[np.float64]:
        schedule, timesteps = self.model.schedule, recurrence.timesteps
        small = DDPM(schedule, prediction_type="epsilon").recurrence(timesteps)
        large = DDPM(schedule, prediction_type="epsilon", variance_type="fixed_large").recurrence(timesteps)
        same = np.array_equal(recurrence.a, small.a) and np.array_equal(recurrence.b, small.b)
        if not same or not (np.array_equal(recurrence.c, small.c) or np.array_equal(recurrence.c, large.c)):
            raise ValueError(
                "step_rule: LearnedVariance is for DDPM(model.schedule), got another sampler or schedule. DDIM and "
                "DPM-Solver have no use for the variance: give them the model itself"
            )
        # The last step's small variance is 0: it takes that of the step before, as the published code does. Its
        # large one is beta, which is all the variance there is left.
        deviations = np.stack([small.c, large.c])
        deviations[:, -1] = small.c[-2] if len(timesteps) > 1 else schedule.levels(timesteps)[1][0]
        deviations[1, -1] = schedule.levels(timesteps)[1][-2]
        noisy = np.append(np.ones(len(timesteps) - 1), 0.0)
        return np.stack([small.b[:, 0], recurrence.c, *(2 * np.log(deviations)), noisy])
