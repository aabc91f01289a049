"""ESMFold2 of transformers in small, with random weights: its head, its loop and everything around them."""

from __future__ import annotations

from typing import Any

import torch

SEQUENCE, ATOMS = "MKTAYIAKQR", 83  # the rest of the model's atoms is padding


def small_esmfold2(**head: Any) -> Any:
    """The model.

    Args:
        head: options of its sampler; with AlphaFold3's own by default.
    """
    from transformers import EsmFold2Config, EsmFold2Model  # imports much, and is not in every installation

    def atoms(width: int) -> dict[str, int]:
        return {"hidden_size": 64, "output_dim": width, "num_hidden_layers": 1, "num_attention_heads": 2}

    network = {
        "hidden_size": 32,
        "fourier_dim": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "pair_intermediate_size": 16,
        "atom_encoder": atoms(32),
    }
    one = {"num_hidden_layers": 1}
    sampler = {"gamma_0": 0.8, "gamma_min": 1.0, "noise_scale": 1.003, "step_scale": 1.5}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = EsmFold2Config(
            hidden_size=24,
            pairwise_hidden_size=16,
            single_inputs_size=16 + 67,
            pair_transition_intermediate_size=32,
            folding_trunk_num_hidden_layers=1,
            parcae_num_coda_layers=1,
            num_loops=1,
            atom_encoder=atoms(16),
            structure_head={**sampler, **head, "diffusion_module": network},
            confidence_head=one,
            msa_encoder={"enabled": False},
            lm_encoder=one,
            esmc_config={
                "model_type": "esmc",
                "hidden_size": 16,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                **one,
            },
        )
        model = EsmFold2Model(config).eval().requires_grad_(False)
        for weight in model.structure_head.parameters():
            noise = torch.randn_like(weight)
            weight.copy_(noise / weight[0].numel() ** 0.5 if weight.ndim > 1 else weight + 0.1 * noise)
    return model


def structures(model: Any, steps: int, samples: int = 2) -> torch.Tensor:
    """Coordinates (samples, atoms, 3) of the sequence, without padding, from one seed."""
    torch.manual_seed(0)
    output = model.infer_protein(SEQUENCE, num_diffusion_samples=samples, num_sampling_steps=steps)
    return output.sample_atom_coords.reshape(samples, -1, 3)[:, :ATOMS]
