r"""Networks of diffusers as denoisers for :func:`parasolver_core.solve`, without a pipeline.

A denoiser holds the conditions of a run and is called with any number of rows. Classifier-free guidance (Ho and
Salimans 2022, https://arxiv.org/abs/2207.12598) combines two predictions,

.. math:: m = m_\text{negative} + w (m_\text{positive} - m_\text{negative}) ,

and its rescaling (Lin et al. 2024, https://arxiv.org/abs/2305.08891) mixes ``m`` with a copy of the standard deviation
of ``m_positive``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Conditions = Mapping[str, Any]


class UNetDenoiser:
    """A ``UNet2DModel`` or ``UNet2DConditionModel`` as ``denoiser(x, t)``.

    Conditions are expanded to the rows of the largest round once; smaller rounds use a part of them. Where the network
    also predicts a variance, in a second half of its channels, that half is dropped.

    Args:
        model: the network, in evaluation mode.
        conditions: what else its ``forward`` is given, by name; tensors, or dictionaries of tensors such as
            ``added_cond_kwargs``, with a first dimension of ``batch`` or 1. With ``batch`` = 1 the denoiser takes x
            ``(rows, *event)``, and all rows have the one condition. Otherwise it takes ``(rows, batch, *event)``: give
            ``x_T[None]`` to ``solve``, so that the samples, each with a condition of its own, are one state.

    Other arguments:
        negative: those of the conditions that differ in the other prediction of guidance.
        guidance_scale: w above, needs ``negative``; None for no guidance.
        guidance_rescale: share of the rescaled prediction in the result, 0..1.
        batched: make both predictions in one call of twice the rows, or in two calls, which also takes conditions of
            different lengths.
        constants: arguments of ``forward`` that are the same for any number of rows, such as ``img_ids``.

    Raises:
        ValueError: the arguments do not fit together.

    Example:
        >>> from diffusers import UNet2DConditionModel
        >>> size = {"block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 16}
        >>> blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        >>> unet = UNet2DConditionModel(**size, **blocks).eval()
        >>> prompt, empty = ({"encoder_hidden_states": torch.randn(1, 5, 16)} for _ in range(2))
        >>> denoiser = UNetDenoiser(unet, prompt, negative=empty, guidance_scale=7.5)
        >>> denoiser(torch.randn(3, 4, 8, 8), torch.tensor([900, 500, 100])).shape
        torch.Size([3, 4, 8, 8])
    """

    def __init__(
        self,
        model: torch.nn.Module,
        conditions: Conditions | None = None,
        *,
        negative: Conditions | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        batched: bool = True,
        constants: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model: expected a network of diffusers, got {type(model).__name__}")
        if guidance_scale is not None and not negative:
            raise ValueError("guidance_scale: needs negative, the conditions that differ in the other prediction")
        if negative and guidance_scale is None:
            raise ValueError("negative: without guidance_scale it is of no use; pass a guidance_scale")
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale: expected a number in 0..1, got {guidance_rescale}")
        self.model, self.guidance_scale, self.guidance_rescale = model, guidance_scale, guidance_rescale
        self._constants = dict(constants or {})
        positive = dict(conditions or {})
        self.batch = _batch({"conditions": positive, "negative": dict(negative or {})})
        self._branches = [tree_map(lambda leaf: _rows(leaf, self.batch), positive)]
        if negative:
            other = positive | dict(negative)
            self._branches.insert(0, tree_map(lambda leaf: _rows(leaf, self.batch), other))
        if negative and batched:
            self._branches = [_stack(*self._branches)]
        self._parts = 2 if negative and batched else 1  # branches that are evaluated in one call
        self._expanded: list[Conditions | None] = [None] * len(self._branches)
        self._capacity = [0] * len(self._branches)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The prediction for each row.

        Args:
            x: ``(rows, *event)``, or ``(rows, batch, *event)`` with conditions for a batch; in the network's dtype.
            t: (rows,).

        Returns:
            Like x.
        """
        if self.batch > 1 and x.shape[1] != self.batch:
            raise ValueError(
                f"x: expected (rows, {self.batch}, *event), as the conditions are for {self.batch} samples, got "
                f"{tuple(x.shape)}; give solve x_T[None], so that the samples are one state"
            )
        event = x.shape[1:] if self.batch == 1 else x.shape[2:]
        inputs = x.reshape(len(x), 1, self.batch, *event).expand(-1, self._parts, -1, *event).flatten(0, 2)
        times = t.repeat_interleave(self._parts * self.batch)
        predictions: list[Tensor] = []
        for branch in range(len(self._branches)):
            m = self._call(inputs, times, self._conditions(branch, len(x)))
            m = _without_variance(m, inputs).unflatten(0, (len(x), self._parts, self.batch))
            predictions += m.unbind(1)
        return self._guide(predictions).reshape(x.shape)

    def _call(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        return self.model(x, t, **conditions, **self._constants, return_dict=False)[0]

    def _conditions(self, branch: int, rows: int) -> Conditions:
        """The conditions of one branch for so many rows."""
        expanded, per_row = self._expanded[branch], self._parts * self.batch
        if expanded is None or self._capacity[branch] < rows:
            expanded = tree_map(lambda leaf: leaf.repeat(rows, *[1] * (leaf.ndim - 1)), self._branches[branch])
            self._expanded[branch], self._capacity[branch] = expanded, rows
        return tree_map(lambda leaf: leaf[: rows * per_row], expanded)

    def _guide(self, predictions: list[Tensor]) -> Tensor:
        if self.guidance_scale is None:
            return predictions[0]
        other, positive = (branch.flatten(0, 1) for branch in predictions)
        guided = other + self.guidance_scale * (positive - other)
        if not self.guidance_rescale:
            return guided
        from diffusers.guiders.guider_utils import rescale_noise_cfg  # takes seconds to import

        return rescale_noise_cfg(guided, positive, self.guidance_rescale)


class TransformerDenoiser(UNetDenoiser):
    """A transformer of diffusers (DiT, SD3, Flux, PixArt, Sana, Wan and others) as ``denoiser(x, t)``.

    Arguments as for :class:`UNetDenoiser`, and two more. x is what it is given: packed latents for Flux.

    Args:
        timestep_scale: what timesteps are multiplied with for the network; 1e-3 for Flux.
        embedded_guidance: guidance scale that the network takes as an input, ``guidance``, as distilled models do.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        conditions: Conditions | None = None,
        *,
        timestep_scale: float = 1.0,
        embedded_guidance: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, conditions, **options)
        self._timestep_scale, self._embedded_guidance = timestep_scale, embedded_guidance

    def _call(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        if self._timestep_scale != 1:
            t = t * self._timestep_scale
        if self._embedded_guidance is not None:
            conditions = {**conditions, "guidance": t.new_full(t.shape, self._embedded_guidance, dtype=x.dtype)}
        return self.model(hidden_states=x, timestep=t, **conditions, **self._constants, return_dict=False)[0]


def _batch(given: Conditions) -> int:
    """The number of samples that the conditions are for."""
    leaves = tree_leaves(given)
    wrong = [leaf for leaf in leaves if not isinstance(leaf, Tensor) or leaf.ndim == 0]
    if wrong:
        raise TypeError(
            f"conditions: expected tensors with a first dimension of the batch, got {type(wrong[0]).__name__}; pass "
            "what is the same for any number of rows as constants"
        )
    sizes = {leaf.shape[0] for leaf in leaves} - {1}
    if len(sizes) > 1 or 0 in sizes:
        raise ValueError(f"conditions: expected one number of samples, got first dimensions of {sorted(sizes)}")
    return sizes.pop() if sizes else 1


def _rows(leaf: Tensor, batch: int) -> Tensor:
    return leaf if leaf.shape[0] == batch else leaf.repeat(batch, *[1] * (leaf.ndim - 1))


def _stack(negative: Conditions, positive: Conditions) -> Conditions:
    """Both branches of guidance for one call, the negative first."""

    def together(null: Tensor, given: Tensor) -> Tensor:
        if null.shape != given.shape:
            raise ValueError(
                f"negative: expected conditions of the same shapes, got {tuple(null.shape)} and {tuple(given.shape)}; "
                "pass batched=False for two calls"
            )
        return torch.cat([null, given])

    return tree_map(together, negative, positive)


def _without_variance(m: Tensor, x: Tensor) -> Tensor:
    return m.chunk(2, dim=1)[0] if m.ndim > 1 and m.shape[1] == 2 * x.shape[1] else m
