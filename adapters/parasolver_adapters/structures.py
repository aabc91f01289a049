"""Structure heads of the AlphaFold3 kind: EDM with churn and a random rigid frame at each step.

Such a sampler turns and shifts the structure at random before each call of its network, and turns it onto the network's
answer after it. In the frame that undoes this, the steps are those of EDM, linear in states, answers and noise:

``D_i(x) = align(R_i^T net(R_i (x - mean x) + b_i), x)``

with the rotations R_i and shifts b_i drawn beforehand. Sources: Abramson et al. 2024 (AlphaFold 3, algorithms 18, 19
and 28), https://doi.org/10.1038/s41586-024-07487-w; Karras et al. 2022, https://arxiv.org/abs/2206.00364, algorithm 2.

Example::

    model = RigidFrames(network, atom_mask)  # network(x, sigma): (batch, atoms, 3), (batch,)
    x = sigmas[0] * centred_noise(samples, atoms)
    coordinates = parallel(sample_structure, window=64, sigma_data=16.0)(model, x, sigmas)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from parasolver_adapters.drop_in import with_methods
from parasolver_adapters.samplers import ParallelSampler, UnsupportedSamplerError, parallel


def sample_structure(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    gamma_0: float = 0.8,
    gamma_min: float = 1.0,
    noise_scale: float = 1.003,
    step_scale: float = 1.5,
    atom_mask: Tensor | None = None,
    seed: int = 0,
    noise_sampler: Callable[..., Tensor] | None = None,
    steering: None = None,
) -> Tensor:
    """The plain loop, in the frame that undoes the rotations; see :mod:`parasolver_adapters.structures`.

    Args:
        model: ``model(x, sigma, rotation, shift, churn, **extra_args)``, see :class:`RigidFrames`.
        x: (batch, atoms, 3): ``sigmas[0] * centred_noise(batch, atoms)``.
        sigmas: (N + 1,), falling.
        extra_args: further arguments of the model.
        callback: called once a step with a dictionary of ``x``, ``i``, ``sigma``, ``sigma_hat`` and ``denoised``.
        gamma_0, gamma_min: the level is raised by the factor ``1 + gamma_0`` before a step that ends above
            ``gamma_min``.
        noise_scale: of the noise added with it.
        step_scale: of each step.
        atom_mask: (atoms,), of which atoms the mean is taken off the noise; None: all.
        seed: of frames and noise.
        noise_sampler: ``noise_sampler(sigma, after)``, centred noise like ``x``, instead of the seed's.
        steering: has to be None.

    Raises:
        UnsupportedSamplerError: with ``steering``.
        ValueError: ``sigmas`` or ``atom_mask`` are not as described.
    """
    if steering is not None:
        raise UnsupportedSamplerError(
            "steering: particles are resampled among the samples of a batch in the middle of a run, so no later state "
            "has a fixed past; sample without steering, or put a potential's gradient into the network"
        )
    _check_levels(sigmas)
    generator = torch.Generator().manual_seed(seed)

    def drawn(sigma: Tensor, after: Tensor) -> Tensor:
        return centred_noise(len(x), x.shape[1], atom_mask, generator).to(x)

    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        # not torch.randn: frames do not enter linearly, and who reads the loop takes its randn for noise
        frame = torch.empty(len(x), 7).normal_(generator=generator).to(x)
        rotation, shift = rotations(frame[:, :4]), frame[:, None, 4:]
        sigma_hat = sigma * (1 + gamma_0) if after > gamma_min else sigma
        churn = noise_scale * (sigma_hat**2 - sigma**2).clamp_min(0).sqrt()
        x = x + churn * (noise_sampler or drawn)(sigma, after)
        level = sigma_hat.expand(len(x))
        denoised = model(x, level, rotation, shift, churn.expand(len(x)), **(extra_args or {}))
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma_hat, "denoised": denoised})
        x = x + step_scale * (after - sigma_hat) / sigma_hat * (x - denoised)
    return x


def _check_levels(sigmas: Any) -> None:
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1 or len(sigmas) < 2:
        got = f"shape {tuple(sigmas.shape)}" if isinstance(sigmas, Tensor) else type(sigmas).__name__
        raise ValueError(f"sigmas: expected a tensor of at least two levels, (N + 1,), got {got}")
    before, after = sigmas[:-1], sigmas[1:]
    if not bool(((before >= after) & (before > 0)).all() and after[-1] >= 0 and before[0] < torch.inf):
        raise ValueError(f"sigmas: expected finite levels above 0 that fall, the last perhaps to 0, got {sigmas}")


def _check_mask(atom_mask: Tensor | None) -> None:
    if atom_mask is None:
        return
    if atom_mask.ndim != 1:
        raise ValueError(
            f"atom_mask: expected (atoms,), the same in all samples of a batch, got {tuple(atom_mask.shape)}; "
            "sample structures of other sizes in runs of their own"
        )
    weights = atom_mask.double()
    if not bool((weights >= 0).all() and 0 < weights.sum() < torch.inf):
        raise ValueError("atom_mask: expected weights of at least 0, not all of them 0, got others")


def _check_length(atom_mask: Tensor | None, atoms: int) -> None:
    if atom_mask is not None and atom_mask.shape != (atoms,):
        raise ValueError(
            f"atom_mask: expected ({atoms},), one for each atom and the same in all samples of a batch, got "
            f"{tuple(atom_mask.shape)}; sample structures of other sizes in runs of their own"
        )


def centred_noise(
    batch: int, atoms: int, atom_mask: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Normal numbers (batch, atoms, 3) less their mean over the atoms that are there.

    The mean would be no part of the structure, and far larger: the state's distances are relative to its size.

    Args:
        batch, atoms: the shape.
        atom_mask: (atoms,); None: all.
        generator: on the CPU; None: the global one.
    """
    _check_length(atom_mask, atoms)
    _check_mask(atom_mask)
    noise = torch.randn(batch, atoms, 3, generator=generator)
    return noise - centre(noise, noise.new_ones(atoms) if atom_mask is None else atom_mask.to(noise))


class RigidFrames:
    """A structure network in random rigid frames, as a network of the state in the frame that undoes them.

    Args:
        network: ``network(x, sigma, **extra_args)``, the denoised coordinates (rows, atoms, 3); sigma is (rows,).
        atom_mask: (atoms,): which atoms are there, the weight of the alignment; None: all.
    """

    def __init__(self, network: Callable[..., Tensor], atom_mask: Tensor | None = None) -> None:
        self._network = network
        self._mask = None if atom_mask is None else atom_mask.float()
        _check_mask(self._mask)

    def __call__(
        self, x: Tensor, sigma: Tensor, rotation: Tensor, shift: Tensor, churn: Tensor, **conditions: Any
    ) -> Tensor:
        if x.ndim != 3 or x.shape[2] != 3:
            raise ValueError(f"x: expected coordinates (batch, atoms, 3), got shape {tuple(x.shape)}")
        _check_length(self._mask, x.shape[1])
        weights = x.new_ones(x.shape[1]) if self._mask is None else self._mask.to(x)
        # the mean of the noise is no part of the state; the network sees it as a part of the shift
        wide = (1 + churn.to(x.dtype) ** 2 / weights.sum()).sqrt()[:, None, None]
        seen = (x - centre(x, weights)) @ rotation.to(x.dtype) + wide * shift.to(x.dtype)
        denoised = self._network(seen, sigma, **conditions).to(x.dtype)
        return align(denoised, x, weights)


def rotations(quaternions: Tensor) -> Tensor:
    """Rotation matrices (batch, 3, 3), uniform for normal quaternions (batch, 4)."""
    w, x, y, z = (quaternions / quaternions.norm(dim=1, keepdim=True)).unbind(1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def centre(x: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of the atoms, (batch, 1, 3)."""
    return (x * weights[:, None]).sum(1, keepdim=True) / weights.sum()


def align(x: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """``x`` turned and shifted onto ``target`` with the least weighted squares, without mirroring (Kabsch).

    Args:
        x, target: (batch, atoms, 3).
        weights: (atoms,), at least 0; None: all alike.
    """
    weights = x.new_ones(x.shape[1]) if weights is None else weights
    moved, origin = x - centre(x, weights), centre(target, weights)
    products = (moved * weights[:, None]).mT.double() @ (target - origin).double()
    known = torch.isfinite(products).flatten(1).all(1)[:, None, None]  # the rest stays as it is, and is told of there
    u, _, vh = torch.linalg.svd(torch.where(known, products, torch.eye(3).to(products)))
    signs = torch.ones_like(u[:, 0])
    signs[:, 2] = torch.linalg.det(u @ vh)
    return moved @ (u * signs[:, None] @ vh).to(x.dtype) + origin


def aligned_distance(x: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """The weighted root mean square distance of atoms after the best rigid motion, (batch,), in the unit of ``x``."""
    weights = x.new_ones(x.shape[1]) if weights is None else weights
    off = (align(x, target, weights) - target).pow(2).sum(-1)
    return ((off * weights).sum(1) / weights.sum()).sqrt()


def parallel_esmfold2(model: Any, window: int = 64, **options: Any) -> Any:
    """An ``EsmFold2Model`` of transformers whose structures are sampled in parallel; otherwise as the given one.

    Args:
        model: it is left as it is; weights are shared.
        window: steps in a round; 1: the plain loop.
        options: of :func:`parasolver_adapters.samplers.parallel`: ``tolerance``, ``max_rows``, ...

    Returns:
        A model whose ``fold``, ``infer_protein`` and ``infer_protein_as_pdb`` are its own around this sampler, with
        the attribute ``solution`` of the last structure.

    Raises:
        TypeError: the model has no such head.

    Example::

        fold = parallel_esmfold2(model, window=64)
        output = fold.infer_protein("MKTAYIAKQRQISFVKSHFSRQ", num_sampling_steps=68)
    """
    for name in ("_sample_structure", "_build_noise_schedule", "structure_head"):
        if not hasattr(model, name):
            raise TypeError(
                f"model: expected an EsmFold2Model of transformers, with {name}, got {type(model).__name__}; for other "
                "structure heads use parallel(sample_structure) with RigidFrames"
            )
    made = functools.partial(parallel, sample_structure, window, sigma_data=16.0, **options)
    made()  # refuses options that do not fit before a structure is asked for
    return with_methods("model", model, {"_sample_structure": _esmfold2(made)})


def _esmfold2(made: Callable[[], ParallelSampler]) -> Callable[..., Tensor]:
    """In the place of ESMFold2's own sampling loop, with its arguments."""

    def sample(
        model: Any,
        pair_trunk: Tensor,
        single_inputs: Tensor,
        relative_position_encoding: Tensor,
        atom_inputs: Any,
        attention_mask: Tensor | None = None,
        num_diffusion_samples: int = 1,
        num_sampling_steps: int | None = None,
    ) -> Tensor:
        head, config, sampler = model.structure_head, model.config.structure_head, made()
        if len(single_inputs) != 1:
            raise ValueError(f"sequences: expected one in a run, got {len(single_inputs)}; fold them one by one")
        # for one sample, and then for as many rows as a call has
        conditioning = head.prepare_conditioning(
            atom_inputs=atom_inputs,
            pair_trunk=pair_trunk,
            relative_position_encoding=relative_position_encoding,
            single_inputs=single_inputs,
            attention_mask=attention_mask,
            num_diffusion_samples=1,
        )
        kind = type(conditioning)
        parts = {field.name: getattr(conditioning, field.name) for field in dataclasses.fields(conditioning)}

        def network(x: Tensor, sigma: Tensor) -> Tensor:
            expanded = tree_map_only(Tensor, lambda part: part.expand(len(x), *part.shape[1:]), parts)
            return head(noisy_coords=x, noise_level=sigma, conditioning=kind(**expanded))

        mask = atom_inputs.atom_attention_mask[0].float()
        sigmas, _ = model._build_noise_schedule(num_sampling_steps, torch.device("cpu"))
        noise = centred_noise(num_diffusion_samples, len(mask), mask.cpu())
        with torch.no_grad():
            coordinates = sampler(
                RigidFrames(network, mask),
                (sigmas[0] * noise).to(single_inputs.device),
                sigmas,
                gamma_0=config.gamma_0,
                gamma_min=config.gamma_min,
                noise_scale=config.noise_scale,
                step_scale=config.step_scale,
                atom_mask=mask.cpu(),
                seed=int(torch.randint(2**31, ())),
            )
        model.solution = sampler.solution
        return coordinates

    return sample
