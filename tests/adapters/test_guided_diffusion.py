"""Networks of guided-diffusion: the published tensors, outputs and samples."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from safetensors.torch import save_file

from parasolver_adapters.checkpoints import CheckpointError, check_weights, read_state_dict
from parasolver_adapters.guided_diffusion import (
    PRESETS,
    Classifier,
    GuidedDiffusionDenoiser,
    LearnedVariance,
    Preset,
    UNet,
    UNetConfig,
    load_unet,
    starting_noise,
)
from parasolver_adapters.guided_diffusion.unet import timestep_embedding
from parasolver_core import DDIM, DDPM, NoiseSchedule, check_denoiser, solve, solve_sequential
from tests.adapters.weights import expanded, fill, relative, saved, shapes

# Of the published networks: tensors, numbers, and a hash of names and shapes (see ``shapes``).
PUBLISHED = {
    "adm-64": (541, 295904454, "b879ba9ed4fe94bb"),
    "adm-128": (493, 421529606, "d91b9be2449a697e"),
    "adm-256": (567, 553838086, "408c4d65687d2b6d"),
    "adm-256-uncond": (566, 552814086, "b9c90be1570d1541"),
    "adm-512": (645, 558997638, "f95458c996170da9"),
    "lsun-bedroom": (566, 552814086, "b9c90be1570d1541"),
    "lsun-cat": (566, 552814086, "b9c90be1570d1541"),
    "lsun-horse": (566, 552814086, "b9c90be1570d1541"),
    "lsun-horse-nodropout": (566, 552814086, "b9c90be1570d1541"),
}
CLASSIFIERS = {
    "adm-64": (307, 65438568, "1f101795c34a2e14"),
    "adm-128": (221, 42568040, "d574aa664c511e87"),
    "adm-256": (249, 54096360, "80623bcac5ce31ac"),
    "adm-256-uncond": (249, 54096360, "80623bcac5ce31ac"),
    "adm-512": (281, 54448360, "14a2ce08b1e153d1"),
}
# Some tensors of the 256-pixel network, by hand.
ADM_256 = {
    "time_embed.0.weight": (1024, 256),
    "label_emb.weight": (1000, 1024),
    "input_blocks.0.0.weight": (256, 3, 3, 3),
    "input_blocks.3.0.emb_layers.1.weight": (512, 1024),
    "input_blocks.7.0.skip_connection.weight": (512, 256, 1, 1),
    "input_blocks.10.1.qkv.weight": (1536, 512, 1),
    "middle_block.1.proj_out.weight": (1024, 1024, 1),
    "output_blocks.0.0.in_layers.0.weight": (2048,),
    "output_blocks.17.0.out_layers.3.weight": (256, 256, 3, 3),
    "out.2.weight": (6, 256, 3, 3),
}
COMMON: dict[str, Any] = {
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": (1, 2),
    "attention_resolutions": (8,),
    "learn_sigma": True,
    "dropout": 0.1,
}
NEW = UNetConfig(16, num_head_channels=16, num_classes=5, resblock_updown=True, use_new_attention_order=True, **COMMON)
OLD = UNetConfig(16, num_head_channels=16, num_classes=5, resblock_updown=True, **COMMON)
PLAIN = UNetConfig(16, num_heads=2, num_heads_upsample=4, use_scale_shift_norm=False, **COMMON)
# Outputs of the published code on the weights of ``fill``: mean, RMS, and every 512th number.
FROZEN = {
    "new": (NEW, 0.1197410, 0.3386417, [0.1148513, 0.2671910, -0.1615807, 0.1268383, 0.2726648, -0.1806746]),
    "old": (OLD, 0.1195121, 0.3388141, [0.1162507, 0.2735443, -0.1690878, 0.1262637, 0.2804714, -0.1900488]),
    "plain": (PLAIN, -0.1156882, 0.3700849, [-0.2146344, -0.2943977, -0.0136951, -0.2140749, -0.2980740, -0.0027596]),
}
SMALL = Preset(NEW, classifier=UNetConfig(16, num_head_channels=16, num_classes=5, resblock_updown=True, **COMMON))


def test_what_a_network_is_unless_told() -> None:
    """As by ``model_and_diffusion_defaults`` of the published code."""
    own = UNetConfig(64)
    assert (own.num_channels, own.num_res_blocks, own.num_heads, own.attention_resolutions) == (128, 2, 4, (16, 8))
    assert own.num_head_channels is own.num_heads_upsample is own.num_classes is own.channel_mult is None
    assert (own.use_scale_shift_norm, own.in_channels, own.dropout) == (True, 3, 0.0)
    assert not any((own.learn_sigma, own.resblock_updown, own.use_fp16, own.use_new_attention_order))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_was_published(name: str) -> None:
    """What no tensor shows, as in the published command lines."""
    preset, small = PRESETS[name], name == "adm-64"
    own = preset.unet
    assert (own.num_heads, own.num_head_channels) == (4, None if name == "adm-128" else 64)
    assert own.heads(512) == (4 if name == "adm-128" else 8)
    assert own.use_new_attention_order is small
    assert own.use_scale_shift_norm
    assert own.resblock_updown
    assert not own.use_fp16
    assert own.dropout == (0.1 if small or name in ("lsun-bedroom", "lsun-cat", "lsun-horse") else 0.0)
    schedule = NoiseSchedule.squared_cosine() if small else NoiseSchedule.linear()
    np.testing.assert_array_equal(preset.schedule.alphas_cumprod, schedule.alphas_cumprod)
    if name.startswith("adm"):
        assert preset.classifier is not None
        assert preset.classifier.heads(512) == 8
        assert preset.classifier.num_res_blocks == (4 if small else 2)
        assert not preset.classifier.use_new_attention_order
        assert preset.classifier.use_scale_shift_norm
    else:
        assert preset.classifier is None


def test_times_are_embedded_by_cosines_and_sines() -> None:
    t = torch.tensor([0.0, 3.0])
    cosines = torch.stack([torch.ones(2), (0.01 * t).cos(), (0.01 * t).sin()], 1)
    got = timestep_embedding(t, 5)
    assert got.shape == (2, 5)
    np.testing.assert_allclose(got[:, [1, 3]], cosines[:, 1:], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(got[:, [0, 2, 4]], torch.stack([t.cos(), t.sin(), 0 * t], 1), rtol=1e-6)
    assert timestep_embedding(torch.tensor([7]), 4).shape == (1, 4)
    assert timestep_embedding(torch.tensor([7]), 4).dtype == torch.float32


def test_labels_are_given_where_the_network_has_classes() -> None:
    t = torch.tensor([20, 900])
    for config, labels, said in ((NEW, None, r"takes labels in 0\.\.4, got none"), (PLAIN, t, "no labels, got labels")):
        with pytest.raises(ValueError, match=said), torch.no_grad():
            UNet(config)(pictures(), t, labels)
    with pytest.raises(ValueError, match="a classifier needs classes"):
        Classifier(PLAIN)


def test_a_classifier_in_half_precision_is_close() -> None:
    assert SMALL.classifier is not None
    logits = []
    for use_fp16 in (False, True):
        network = Classifier(replace(SMALL.classifier, use_fp16=use_fp16))
        fill(network)
        network.finish()
        assert not network.training
        assert network.out[2].qkv_proj.weight.dtype is torch.float32
        assert network.input_blocks[0][0].weight.dtype is (torch.float16 if use_fp16 else torch.float32)
        with torch.no_grad():
            logits.append(network(pictures(), torch.tensor([20, 900])))
    assert logits[1].dtype is torch.float32
    assert 0 < relative(logits[1], logits[0]) < 5e-3


def pictures() -> torch.Tensor:
    return (1.5 * torch.sin(0.9 * torch.arange(2 * 3 * 16 * 16, dtype=torch.float64))).float().view(2, 3, 16, 16)


def filled(config: UNetConfig) -> UNet:
    network = UNet(config)
    fill(network)
    return network.finish()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(filled(NEW).state_dict(), tmp_path_factory.mktemp("adm") / "small.pt")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_tensors(name: str) -> None:
    preset = PRESETS[name]
    with torch.device("meta"):
        assert shapes(UNet(preset.unet)) == PUBLISHED[name]
        if preset.classifier is not None:
            assert shapes(Classifier(preset.classifier)) == CLASSIFIERS[name]


def test_some_tensors_of_the_256_pixel_network() -> None:
    with torch.device("meta"):
        state = UNet(PRESETS["adm-256"].unet).state_dict()
    assert {key: tuple(state[key].shape) for key in ADM_256} == ADM_256


@pytest.mark.parametrize("name", ["adm-64", "adm-256", "lsun-bedroom"])
def test_full_size_files_are_matched_key_by_key(tmp_path: Path, name: str) -> None:
    with torch.device("meta"):
        network = UNet(PRESETS[name].unet)
    state = expanded(network, torch.float16)
    check_weights(network, read_state_dict(saved(state, tmp_path / "full.pt")), name)
    state.pop("middle_block.1.qkv.weight")
    with pytest.raises(CheckpointError, match=r"1 missing \(middle_block\.1\.qkv\.weight\)"):
        load_unet(saved(state, tmp_path / "full.pt"), PRESETS[name].unet)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adm-64", "adm-256", "lsun-bedroom"])
def test_full_size_files_load(tmp_path: Path, name: str) -> None:
    with torch.device("meta"):
        state = expanded(UNet(PRESETS[name].unet), torch.float16)
    network = load_unet(saved(state, tmp_path / "full.pt"), PRESETS[name].unet)
    assert sum(value.numel() for value in network.state_dict().values()) == PUBLISHED[name][1]
    assert not any(value.is_meta for value in network.state_dict().values())


@pytest.mark.parametrize("name", FROZEN)
def test_outputs_are_those_of_the_published_code(name: str) -> None:
    config, mean, rms, some = FROZEN[name]
    with torch.no_grad():
        out = filled(config)(pictures(), torch.tensor([20, 900]), torch.tensor([1, 4]) if config.num_classes else None)
    assert out.shape == (2, 6, 16, 16)
    assert float(out.mean()) == pytest.approx(mean, abs=1e-6)
    assert float(out.pow(2).mean().sqrt()) == pytest.approx(rms, abs=1e-6)
    np.testing.assert_allclose(out.flatten()[::512].numpy(), some, atol=2e-6)


def test_a_classifier_gives_the_logits_of_the_published_code() -> None:
    assert SMALL.classifier is not None
    network = Classifier(SMALL.classifier)
    fill(network)
    with torch.no_grad():
        logits = network.finish()(pictures(), torch.tensor([20, 900]))
    expected = [[-0.4573103, -0.2869535, -0.1799946, -0.6741980, -0.1252717]]
    np.testing.assert_allclose(logits[:1].numpy(), expected, atol=2e-6)


def test_half_precision_is_close_and_keeps_norms_and_times_wide(checkpoint: Path) -> None:
    wide = GuidedDiffusionDenoiser.load(checkpoint, SMALL, labels=[1, 4])
    half = GuidedDiffusionDenoiser.load(checkpoint, SMALL, labels=[1, 4], use_fp16=True)
    assert isinstance(half.network, UNet)
    kinds = {key: value.dtype for key, value in half.network.state_dict().items()}
    assert kinds["input_blocks.1.0.in_layers.2.weight"] is torch.float16
    assert kinds["input_blocks.1.0.in_layers.0.weight"] is torch.float32
    assert kinds["time_embed.0.weight"] is torch.float32
    got, expected = (one(pictures(), torch.tensor([20, 900])) for one in (half, wide))
    assert got.dtype is torch.float32
    assert 0 < relative(got, expected) < 2e-3


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_five_lines_from_a_file_to_a_sample(tmp_path: Path, checkpoint: Path, suffix: str) -> None:
    path = checkpoint
    if suffix == ".safetensors":
        path = tmp_path / "small.safetensors"
        save_file(dict(read_state_dict(checkpoint)), path)
    model = GuidedDiffusionDenoiser.load(path, SMALL, labels=[1, 4])
    x_T = starting_noise(2, model.event, seed=0)
    arguments = model, x_T, model.timesteps("ddim10"), DDIM(model.schedule)
    solution, expected = solve(*arguments, window=5), solve_sequential(*arguments)
    assert relative(solution.sample, expected.sample) < 1e-2
    assert float(expected.sample.abs().max()) <= 1 + 1e-5


@pytest.mark.parametrize("guided", [False, True])
def test_ddpm_in_parallel_is_ddpm(tmp_path: Path, checkpoint: Path, guided: bool) -> None:
    options: dict[str, Any] = {}
    if guided:
        assert SMALL.classifier is not None
        classifier = Classifier(SMALL.classifier)
        fill(classifier)
        path = saved(classifier.state_dict(), tmp_path / "classifier.pt")
        options = {"classifier": path, "classifier_scale": 3.0}
    model = GuidedDiffusionDenoiser.load(checkpoint, SMALL, labels=[1, 4], **options)
    denoiser, rule = LearnedVariance(model), DDPM(model.schedule)
    x_T, timesteps = starting_noise(2, model.event, seed=0), model.timesteps("12")
    assert check_denoiser(denoiser, x_T, timesteps, step_rule=rule).ok
    expected = solve_sequential(denoiser, x_T, timesteps, rule, seed=3).sample
    exact = solve(denoiser, x_T, timesteps, rule, window=5, tolerance=0, seed=3)
    assert relative(exact.sample, expected) < 1e-5
    assert relative(solve(denoiser, x_T, timesteps, rule, window=5, seed=3).sample, expected) < 1e-2


def test_a_file_of_another_network_is_refused_with_its_first_keys(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing \(label_emb\.weight\)|missing \(.*\)") as caught:
        GuidedDiffusionDenoiser.load(checkpoint, "adm-64", labels=1)
    assert "input_blocks" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"1 unexpected \(label_emb\.weight\)"):
        load_unet(checkpoint, UNetConfig(**(vars(NEW) | {"num_classes": None})))


def test_bad_choices_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="preset: expected one of adm-64, "):
        GuidedDiffusionDenoiser.load(checkpoint, "adm-1024")
    with pytest.raises(ValueError, match="labels: the network needs them"):
        GuidedDiffusionDenoiser.load(checkpoint, SMALL)
    with pytest.raises(ValueError, match="classifier: the preset 'lsun-cat' has none"):
        GuidedDiffusionDenoiser.load(checkpoint, "lsun-cat", classifier=checkpoint)
    with pytest.raises(ValueError, match="channel_mult: expected one multiplier a level for image_size=96"):
        UNetConfig(96)
    with pytest.raises(ValueError, match=r"image_size: expected a multiple of 2 \*\* 1"):
        UNetConfig(15, channel_mult=(1, 2))
    with pytest.raises(ValueError, match="num_channels: each level needs a multiple of 32"):
        UNetConfig(64, num_channels=48)
    with pytest.raises(ValueError, match="num_head_channels: 48 does not divide a layer of 64"):
        UNet(UNetConfig(**(vars(NEW) | {"num_head_channels": 48})))
