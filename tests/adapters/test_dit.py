"""Diffusion transformers: the published tensors, outputs and samples."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("timm", reason="DiT is built from timm's layers; pip install 'parasolver[timm]'")
import torch

from parasolver_adapters.checkpoints import CheckpointError, check_weights, read_state_dict
from parasolver_adapters.dit import (
    PRESETS,
    DiT,
    DiTConfig,
    DiTDenoiser,
    LearnedVariance,
    _modulated,
    load_dit,
    starting_noise,
)
from parasolver_core import DDIM, DDPM, check_denoiser, solve, solve_sequential
from tests.adapters.weights import expanded, fill, relative, saved, shapes

# Of the published networks: tensors, numbers, and a hash of names and shapes (see ``shapes``).
PUBLISHED = {
    "dit-xl-2-256": (292, 675129632, "af6f07b0d6cf8bb4"),
    "dit-xl-2-512": (292, 676014368, "4ee12bdf2bce8ddc"),
    "dit-xl-4-256": (292, 675074432, "9db00112ec1654ce"),
    "dit-xl-4-512": (292, 675295616, "9034fa656b9177a0"),
    "dit-xl-8-256": (292, 675683072, "ef3212403a091a85"),
    "dit-xl-8-512": (292, 675738368, "4b6625232ae4457e"),
    "dit-l-2-256": (252, 458102816, "42a769a9578a25e2"),
    "dit-l-2-512": (252, 458889248, "b11b521b35777247"),
    "dit-l-4-256": (252, 458053760, "046f41ecbf9dd97c"),
    "dit-l-4-512": (252, 458250368, "e6d0174eeea05f13"),
    "dit-l-8-256": (252, 458594816, "47f25e707d3ed931"),
    "dit-l-8-512": (252, 458643968, "b6b2908a0ffab8b2"),
    "dit-b-2-256": (132, 130512416, "e60eb788d83f36ba"),
    "dit-b-2-512": (132, 131102240, "8f712c545480c5a0"),
    "dit-b-4-256": (132, 130475648, "b802d2b95630b021"),
    "dit-b-4-512": (132, 130623104, "b0b3852a5b4fce22"),
    "dit-b-8-256": (132, 130881536, "18840641a56b5ec1"),
    "dit-b-8-512": (132, 130918400, "612d10364f2ec918"),
    "dit-s-2-256": (132, 32963360, "eb04642885731fca"),
    "dit-s-2-512": (132, 33258272, "44a4e9b132d99ff6"),
    "dit-s-4-256": (132, 32945024, "396b181cb28fcfcf"),
    "dit-s-4-512": (132, 33018752, "ca2fdc28933086c0"),
    "dit-s-8-256": (132, 33148160, "c7d7140d03da2b78"),
    "dit-s-8-512": (132, 33166592, "f85489c9313fff00"),
}
# Some tensors of the published network, by hand.
XL_2 = {
    "pos_embed": (1, 256, 1152),
    "x_embedder.proj.weight": (1152, 4, 2, 2),
    "t_embedder.mlp.0.weight": (1152, 256),
    "y_embedder.embedding_table.weight": (1001, 1152),
    "blocks.27.attn.qkv.weight": (3456, 1152),
    "blocks.0.mlp.fc1.weight": (4608, 1152),
    "blocks.0.adaLN_modulation.1.bias": (6912,),
    "final_layer.linear.weight": (32, 1152),
    "final_layer.adaLN_modulation.1.weight": (2304, 1152),
}
SMALL = DiTConfig(48, 2, 4, patch_size=2, input_size=8, num_classes=5)
COARSE = DiTConfig(48, 2, 4, patch_size=4, input_size=8, num_classes=5, learn_sigma=False)
# Outputs of the published code on the weights of ``fill``: mean, RMS, and six numbers evenly spread.
FROZEN = {
    "patches of 2, with variance": (
        SMALL,
        (-0.0014354, 0.8240081),
        [-0.3297433, -0.3487138, -0.0622216, 0.4031364, 3.0150146, 0.2958270],
    ),
    "patches of 4": (
        COARSE,
        (0.0056740, 0.7970595),
        [-1.2186906, 0.6297560, 1.2983092, -0.8438846, 0.5254900, 0.3400656],
    ),
}


def test_heads_of_the_presets() -> None:
    """What no tensor shows, table 1 of the paper; and what a network is unless told."""
    heads = {"s": 6, "b": 12, "l": 16, "xl": 16}
    assert {name: own.num_heads for name, own in PRESETS.items()} == {
        name: heads[name.split("-")[1]] for name in PRESETS
    }
    own = DiTConfig(48, 2, 4)
    assert (own.patch_size, own.input_size, own.in_channels, own.num_classes, own.labels) == (2, 32, 4, 1000, 1001)
    assert own.learn_sigma
    assert own.null_class
    assert DiTConfig(48, 2, 4, null_class=False).labels == 1000


def test_tokens_are_normalised_scaled_and_shifted() -> None:
    tokens = torch.tensor([[[1.0, 3.0], [2.0, 2.0]]]) * 1e-3
    got = _modulated(tokens, torch.tensor([[[5.0, 6.0]]]), torch.tensor([[[1.0, -0.5]]]))
    unit = 1e-3 / (1e-6 + 1e-6) ** 0.5
    torch.testing.assert_close(got, torch.tensor([[[5 - 2 * unit, 6 + 0.5 * unit], [5.0, 6.0]]]))


def test_a_network_needs_labels() -> None:
    with pytest.raises(ValueError, match=r"labels: this network takes labels in 0\.\.5, got none"):
        filled(SMALL)(latents(), torch.tensor([20, 900]), None)


def latents(batch: int = 2) -> torch.Tensor:
    return (1.5 * torch.sin(0.9 * torch.arange(batch * 4 * 8 * 8, dtype=torch.float64))).float().view(batch, 4, 8, 8)


def filled(config: DiTConfig) -> DiT:
    network = DiT(config)
    fill(network)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(filled(SMALL).state_dict(), tmp_path_factory.mktemp("dit") / "small.pt")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_tensors(name: str) -> None:
    with torch.device("meta"):
        assert shapes(DiT(PRESETS[name])) == PUBLISHED[name]


def test_some_tensors_of_the_published_network() -> None:
    with torch.device("meta"):
        state = DiT(PRESETS["dit-xl-2-256"]).state_dict()
    assert {key: tuple(state[key].shape) for key in XL_2} == XL_2


def test_a_full_size_file_is_matched_key_by_key(tmp_path: Path) -> None:
    with torch.device("meta"):
        network = DiT(PRESETS["dit-xl-2-256"])
    state = expanded(network, torch.bfloat16)
    check_weights(network, read_state_dict(saved(state, tmp_path / "full.pt")), "full")
    with pytest.raises(
        CheckpointError, match=r"of another shape \(pos_embed is \(1, 256, 1152\) for \(1, 1024, 1152\)\)"
    ):
        load_dit(tmp_path / "full.pt", PRESETS["dit-xl-2-512"])


@pytest.mark.slow
def test_a_full_size_file_loads(tmp_path: Path) -> None:
    with torch.device("meta"):
        state = expanded(DiT(PRESETS["dit-xl-2-256"]))
    model = DiTDenoiser.load(saved(state, tmp_path / "full.pt"), "dit-xl-2-256", 207, 4.0, dtype=torch.bfloat16)
    assert isinstance(model.network, DiT)
    assert sum(value.numel() for value in model.network.state_dict().values()) == PUBLISHED["dit-xl-2-256"][1]
    assert model.event == (4, 32, 32)


@pytest.mark.parametrize("name", FROZEN)
def test_outputs_are_those_of_the_published_code(name: str) -> None:
    config, (mean, rms), some = FROZEN[name]
    with torch.no_grad():
        out = filled(config)(latents(), torch.tensor([20, 900]), torch.tensor([1, 5]))
    assert out.shape == (2, 8 if config.learn_sigma else 4, 8, 8)
    assert float(out.mean()) == pytest.approx(mean, abs=1e-6)
    assert float(out.pow(2).mean().sqrt()) == pytest.approx(rms, abs=1e-6)
    np.testing.assert_allclose(out.flatten()[:: out.numel() // 6][:6].numpy(), some, atol=5e-6)


def test_a_training_checkpoint_gives_its_averaged_weights(tmp_path: Path) -> None:
    state = filled(SMALL).state_dict()
    content = {"model": {key: 0 * value for key, value in state.items()}, "ema": state, "opt": {}}
    torch.save(content | {"args": argparse.Namespace(model="DiT-S/2")}, tmp_path / "0050000.pt")
    network = load_dit(tmp_path / "0050000.pt", SMALL)
    assert torch.equal(network.state_dict()["pos_embed"], state["pos_embed"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_and_networks(tmp_path: Path, checkpoint: Path, dtype: Any) -> None:
    state = {key: value.to(dtype) for key, value in read_state_dict(checkpoint).items()}
    path = saved(state, tmp_path / "half.pt")
    wide, narrow = (DiTDenoiser.load(path, SMALL, labels=1, dtype=one) for one in (torch.float32, dtype))
    got, expected = (one(latents(), torch.tensor([20, 900])) for one in (narrow, wide))
    assert got.dtype is torch.float32
    assert 0 < relative(got, expected) < (0.05 if dtype is torch.bfloat16 else 0.01)


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 4.0}, {"guidance_scale": 4.0, "guided_channels": None}])
def test_ddim_in_parallel_is_ddim(checkpoint: Path, options: dict[str, Any]) -> None:
    model = DiTDenoiser.load(checkpoint, SMALL, labels=[1, 4], **options)
    x_T, timesteps, rule = starting_noise(2, model.event, seed=0), model.timesteps(15), DDIM(model.schedule)
    assert check_denoiser(model, x_T, timesteps).ok
    expected = solve_sequential(model, x_T, timesteps, rule).sample
    assert relative(solve(model, x_T, timesteps, rule, window=5, tolerance=0).sample, expected) < 1e-5
    assert relative(solve(model, x_T, timesteps, rule, window=5).sample, expected) < 1e-2


def test_ddpm_in_parallel_is_ddpm(checkpoint: Path) -> None:
    model = DiTDenoiser.load(checkpoint, SMALL, labels=[1, 4], guidance_scale=4.0)
    denoiser, rule = LearnedVariance(model), DDPM(model.schedule)
    x_T, timesteps = starting_noise(2, model.event, seed=0), model.timesteps("25")
    expected = solve_sequential(denoiser, x_T, timesteps, rule, seed=3).sample
    assert relative(solve(denoiser, x_T, timesteps, rule, window=8, tolerance=0, seed=3).sample, expected) < 1e-5
    assert relative(solve(denoiser, x_T, timesteps, rule, window=8, seed=3).sample, expected) < 1e-2


def test_three_channels_are_guided_unless_asked_otherwise() -> None:
    x, t = latents(), torch.tensor([500, 500])
    network = filled(SMALL)
    labelled, null = (DiTDenoiser.of(network, label)(x, t) for label in (2, 5))
    published, plain = (DiTDenoiser.of(network, 2, 4.0, **options)(x, t) for options in ({}, {"guided_channels": None}))
    assert relative(plain, null + 4 * (labelled - null)) < 1e-5
    assert relative(published[:, :3], plain[:, :3]) < 1e-6
    assert relative(published[:, 3:], labelled[:, 3:]) < 1e-6


def test_latents_are_decoded_one_by_one_and_unscaled() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4, scaling_factor=0.2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    pictures = DiTDenoiser.decode(latents(), vae)
    assert pictures.shape == (2, 3, 16, 16)
    with torch.no_grad():
        assert relative(pictures, vae.decode(latents() / 0.2).sample) < 1e-5


def test_bad_choices_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="preset: expected one of dit-s-2-256, "):
        DiTDenoiser.load(checkpoint, "dit-xxl-2-256", 0)
    with pytest.raises(ValueError, match=r"labels: expected classes in 0\.\.5, got 6"):
        DiTDenoiser.load(checkpoint, SMALL, 6)
    with pytest.raises(ValueError, match="input_size: expected a multiple of patch_size=8, got 36"):
        DiTConfig(48, 2, 4, patch_size=8, input_size=36)
    with pytest.raises(ValueError, match="hidden_size: expected a multiple of num_heads=5, got 48"):
        DiTConfig(48, 2, 5)
    with pytest.raises(CheckpointError, match=r"missing \(blocks\.2\.attn\.qkv\.weight"):
        load_dit(checkpoint, DiTConfig(48, 3, 4, patch_size=2, input_size=8, num_classes=5))
    with pytest.raises(ValueError, match=r"guidance_scale: got 4\.0, which needs"):
        DiTDenoiser.of(filled(DiTConfig(48, 2, 4, input_size=8, num_classes=5, null_class=False)), 1, 4.0)
