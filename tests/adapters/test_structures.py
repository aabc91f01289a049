"""Structure heads of the AlphaFold3 kind, in the frame that undoes their random rotations."""

from typing import Any

import pytest

pytest.importorskip("torch")
import numpy as np
import torch
from torch import Tensor

from parasolver_adapters.arguments import same
from parasolver_adapters.samplers import UnsupportedSamplerError, parallel
from parasolver_adapters.structures import (
    RigidFrames,
    align,
    aligned_distance,
    centre,
    centred_noise,
    parallel_esmfold2,
    rotations,
    sample_structure,
)
from parasolver_core import NonFiniteError
from tests.adapters.weights import relative

SIGMAS = torch.cat([16.0 * torch.linspace(160.0 ** (1 / 7), 4e-4 ** (1 / 7), 40) ** 7, torch.zeros(1)])
ATOMS = 12
MASK = torch.ones(ATOMS)
MASK[-2:] = 0


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(x: Tensor, sigma: Tensor) -> Tensor:
    """A head that cares for the frame: its answer does not turn with its input."""
    s = sigma[:, None, None].to(x.dtype)
    flat = (x / (256 + s**2).sqrt()).flatten(1)
    update = torch.tanh(flat @ (normal(3 * ATOMS, 3 * ATOMS) / 5).to(x.dtype)).reshape(x.shape)
    return 256 / (256 + s**2) * x + 16 * s / (256 + s**2).sqrt() * update


def test_rotations_are_rotations_and_uniform() -> None:
    turned = rotations(normal(4000, 4))
    assert torch.allclose(turned @ turned.mT, torch.eye(3).expand_as(turned), atol=1e-5)
    assert torch.allclose(torch.linalg.det(turned), torch.ones(4000), atol=1e-5)
    assert float(turned.mean(0).abs().max()) < 0.05
    assert float(((turned**2).mean(0) - 1 / 3).abs().max()) < 0.03


def test_align_undoes_a_rigid_motion_and_mirrors_nothing() -> None:
    x, weights = normal(2, ATOMS, 3), normal(ATOMS, seed=1).abs()
    moved = x @ rotations(normal(2, 4, seed=2)) + normal(2, 1, 3, seed=3)
    assert torch.allclose(align(moved, x, weights), x, atol=1e-5)
    assert float(aligned_distance(moved, x).max()) < 1e-5
    assert float(aligned_distance(x * torch.tensor([1.0, 1.0, -1.0]), x).min()) > 0.3


@pytest.mark.parametrize("options", [{}, {"noise_scale": 0.0, "step_scale": 1.0, "gamma_0": 0.605}])
def test_parallel_structure_is_the_sequential_one(options: dict[str, Any]) -> None:
    model, x = RigidFrames(network, MASK), SIGMAS[0] * centred_noise(3, ATOMS, MASK, torch.Generator().manual_seed(0))
    options = options | {"atom_mask": MASK}
    want = sample_structure(model, x, SIGMAS, **options)
    run = parallel(sample_structure, 40, sigma_data=16.0, tolerance=0)
    got = run(model, x, SIGMAS, **options)
    assert relative(got, want) < 1e-4
    assert float(centre(want, MASK).abs().max()) < 1e-3
    assert run.solution is not None
    assert run.solution.stats.rounds < 34


def test_tolerance_is_of_the_structure_not_of_where_it_is() -> None:
    model, x = RigidFrames(network), SIGMAS[0] * centred_noise(8, ATOMS, generator=torch.Generator().manual_seed(0))
    want = sample_structure(model, x, SIGMAS)
    got = parallel(sample_structure, 40, sigma_data=16.0, tolerance=0.01)(model, x, SIGMAS)
    size = want.pow(2).sum(-1).mean(1).sqrt()
    assert float((aligned_distance(got, want) / size).median()) < 0.01


LEVELS = torch.tensor([8.0, 4.0, 1.0, 0.5, 0.0])


def test_each_step_is_that_of_edm_with_churn() -> None:
    """The level is raised before steps that end above 1, by the factor 1.8; noise counts 1.003 times, a step 1.5."""
    x, noise, told, given = normal(2, ATOMS, 3), normal(4, 2, ATOMS, 3, seed=1), [], []
    frames = torch.Generator().manual_seed(0)

    def model(x: Tensor, *arguments: Tensor, scale: float) -> Tensor:
        given.append(arguments)
        return scale * torch.tanh(x)

    def sampler(sigma: Tensor, after: Tensor) -> Tensor:
        return noise[LEVELS.tolist().index(float(sigma))]

    options: dict[str, Any] = {"extra_args": {"scale": 0.7}, "callback": told.append, "noise_sampler": sampler}
    got = sample_structure(model, x, LEVELS, **options)
    for i, raised in enumerate((14.4, 4.0, 1.0, 0.5)):
        level, churn = float(LEVELS[i]), 1.003 * (raised**2 - float(LEVELS[i]) ** 2) ** 0.5
        x = x + churn * noise[i]
        assert torch.allclose(told[i]["x"], x, rtol=1e-5, atol=1e-5)
        assert (told[i]["i"], float(told[i]["sigma"])) == (i, level)
        assert float(told[i]["sigma_hat"]) == pytest.approx(raised)
        assert torch.allclose(told[i]["denoised"], 0.7 * torch.tanh(x), rtol=1e-4, atol=1e-5)
        sigma_hat, rotation, shift, churned = given[i]
        frame = torch.empty(2, 7).normal_(generator=frames)
        assert torch.allclose(sigma_hat, torch.full((2,), raised))
        assert torch.allclose(churned, torch.full((2,), churn), atol=1e-6)
        assert torch.equal(rotation, rotations(frame[:, :4]))
        assert torch.equal(shift, frame[:, None, 4:])
        x = x + 1.5 * (float(LEVELS[i + 1]) - raised) / raised * (x - 0.7 * torch.tanh(x))
    assert torch.allclose(got, x, rtol=1e-4, atol=1e-4)


def test_noise_is_drawn_behind_each_frame_and_centred() -> None:
    told: list[dict[str, Any]] = []
    sample_structure(lambda x, *rest: x, torch.zeros(2, ATOMS, 3), LEVELS, callback=told.append, atom_mask=MASK, seed=3)
    generator, x = torch.Generator().manual_seed(3), torch.zeros(2, ATOMS, 3)
    for one in told:
        torch.empty(2, 7).normal_(generator=generator)
        churn = 1.003 * (one["sigma_hat"] ** 2 - one["sigma"] ** 2).sqrt()
        x = x + churn * centred_noise(2, ATOMS, MASK, generator)
        assert torch.allclose(one["x"], x, atol=1e-5)


def test_means_are_of_the_atoms_that_are_there() -> None:
    x = torch.tensor([[[1.0, 0, 0], [3.0, 6.0, 0], [50.0, 50.0, 50.0]]])
    assert centre(x, torch.tensor([1.0, 3.0, 0.0])).tolist() == [[[2.5, 4.5, 0.0]]]
    for mask in (None, MASK):
        noise = centred_noise(2, ATOMS, mask, torch.Generator().manual_seed(0))
        weights = torch.ones(ATOMS) if mask is None else mask
        assert float(centre(noise, weights).abs().max()) < 1e-6
        assert torch.allclose(noise - noise[:, :1], normal(2, ATOMS, 3) - normal(2, ATOMS, 3)[:, :1], atol=1e-6)


def test_distances_are_weighted_means_after_the_best_motion() -> None:
    line, wide = (
        torch.tensor([[[-1.0, 0, 0], [0, 0, 0], [1, 0, 0]]]),
        torch.tensor([[[-2.0, 0, 0], [0, 0, 0], [2, 0, 0]]]),
    )
    assert float(aligned_distance(line, wide)) == pytest.approx((2 / 3) ** 0.5, rel=1e-6)
    assert float(aligned_distance(line, wide, torch.tensor([1.0, 2.0, 1.0]))) == pytest.approx(0.5**0.5, rel=1e-6)
    x = normal(2, ATOMS, 3)
    apart = x + (1 - MASK)[:, None] * 10 * normal(2, ATOMS, 3, seed=1)
    turned = apart @ rotations(normal(2, 4, seed=2)) + 5
    assert float(aligned_distance(turned, x, MASK).max()) < 1e-5  # of atoms that are there
    assert float(aligned_distance(turned, x).min()) > 1


def test_a_network_is_seen_in_its_frame_and_answers_in_the_states() -> None:
    """Without a mask, and with conditions: a network that gives what it sees gives the state, turned back."""
    seen: list[tuple[Tensor, Tensor]] = []

    def listening(x: Tensor, sigma: Tensor, gain: float) -> Tensor:
        seen.append((x, sigma))
        return gain * x

    x, rotation, shift = normal(2, ATOMS, 3), rotations(normal(2, 4, seed=1)), normal(2, 1, 3, seed=2)
    churn, sigma = torch.tensor([0.0, 6.0]), torch.tensor([1.0, 2.0])
    got = RigidFrames(listening)(x, sigma, rotation, shift, churn, gain=2.0)
    centred = x - x.mean(1, keepdim=True)
    wide = torch.tensor([1.0, 2.0])[:, None, None]  # the root of 1 + 36 / 12
    assert torch.allclose(seen[0][0], centred @ rotation + wide * shift, atol=1e-5)
    assert torch.equal(seen[0][1], sigma)
    assert torch.allclose(got, 2 * centred + x.mean(1, keepdim=True), atol=1e-5)


def test_other_seeds_are_other_structures_of_the_same_noise() -> None:
    model, x = RigidFrames(network), normal(2, ATOMS, 3) * SIGMAS[0]
    one, other = (sample_structure(model, x, SIGMAS, seed=seed) for seed in (1, 2))
    assert float(aligned_distance(one, other).min()) > 1


def test_the_loop_is_that_of_a_head_that_turns_its_structure() -> None:
    """Centred, turned, shifted and churned; called; turned onto the answer; one step: with the same draws."""
    seen: list[dict[str, Any]] = []
    calls: list[tuple[Tensor, Tensor]] = []

    def listening(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append((x, network(x, sigma)))
        return calls[-1][1]

    x = normal(2, ATOMS, 3) * SIGMAS[0]
    end = sample_structure(RigidFrames(listening, MASK), x, SIGMAS, callback=seen.append)
    for i, ((noisy, answer), told) in enumerate(zip(calls, seen, strict=True)):
        theirs = align(noisy, answer, MASK)
        theirs = theirs + 1.5 * (SIGMAS[i + 1] - told["sigma_hat"]) * (theirs - answer) / told["sigma_hat"]
        following = seen[i + 1]["x"] if i + 1 < len(seen) else end
        if i + 1 < len(seen):  # what churn added is the same in both frames, so it is taken off
            ours = told["x"] + 1.5 * (SIGMAS[i + 1] / told["sigma_hat"] - 1) * (told["x"] - told["denoised"])
        else:
            ours = following
        assert float((aligned_distance(theirs, ours, MASK) / told["sigma"].clamp_min(1)).max()) < 1e-3


def test_the_network_sees_its_structure_centred_but_for_the_shift() -> None:
    means: list[Tensor] = []

    def listening(x: Tensor, sigma: Tensor) -> Tensor:
        means.append(centre(x, MASK).flatten())
        return network(x, sigma)

    x = normal(64, ATOMS, 3) * 2560
    churn, shift = torch.full((64,), 30.0), normal(64, 1, 3, seed=5)
    RigidFrames(listening, MASK)(x, torch.full((64,), 2560.0), rotations(normal(64, 4)), shift, churn)
    assert torch.allclose(means[0], (shift * (1 + 900 / 10) ** 0.5).flatten(), atol=1e-2)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UnsupportedSamplerError, match="steering: particles are resampled among the samples"):
        parallel(sample_structure)(RigidFrames(network), normal(2, ATOMS, 3), SIGMAS, steering={"num_particles": 3})
    with pytest.raises(ValueError, match=r"atom_mask: expected \(atoms,\), the same in all samples"):
        RigidFrames(network, torch.stack([MASK, torch.ones(ATOMS)]))
    with pytest.raises(
        TypeError, match="model: expected an EsmFold2Model of transformers, with _sample_structure, got Lin"
    ):
        parallel_esmfold2(torch.nn.Linear(2, 2))


@pytest.fixture(scope="module")
def esmfold2() -> Any:
    pytest.importorskip("transformers.models.esmfold2")
    from benchmarks.structure_head import small_esmfold2

    return small_esmfold2()


def test_esmfold2_folds_in_parallel(esmfold2: Any) -> None:
    from benchmarks.structure_head import structures

    fold = parallel_esmfold2(esmfold2, 24, tolerance=0)
    want = structures(parallel_esmfold2(esmfold2, 1), 24)
    got = structures(fold, 24)
    assert float((aligned_distance(got, want) / (want - want.mean(1, True)).pow(2).sum(-1).mean(1).sqrt()).max()) < 1e-4
    assert fold.solution.stats.rounds < 20
    assert "_sample_structure" not in vars(esmfold2)


def test_steps_are_those_of_esmfold2_itself(esmfold2: Any) -> None:
    """From what its own loop gives its network to what it gives it next, without churn: one step of ours."""
    from benchmarks.structure_head import ATOMS, structures

    inputs, answers, levels = [], [], []
    head = esmfold2.config.structure_head
    own = head.noise_scale

    def listen(module: Any, args: Any, kwargs: dict[str, Tensor], out: Tensor) -> None:
        inputs.append(kwargs["noisy_coords"][:, :ATOMS])
        levels.append(kwargs["noise_level"][0])
        answers.append(out[:, :ATOMS])

    handle = esmfold2.structure_head.register_forward_hook(listen, with_kwargs=True)
    try:
        head.noise_scale = 0.0
        end = structures(esmfold2, 12)
    finally:
        handle.remove()
        head.noise_scale = own
    sigmas, _ = esmfold2._build_noise_schedule(12, torch.device("cpu"))
    told: list[dict[str, Any]] = []
    sample_structure(
        lambda x, *rest: x,
        end,
        sigmas,
        callback=told.append,
        **{name: getattr(head, name) for name in ("gamma_0", "gamma_min", "step_scale")},
    )
    assert [float(one["sigma_hat"]) for one in told] == pytest.approx([float(one) for one in levels], rel=1e-5)
    for i, (x, answer) in enumerate(zip(inputs, answers, strict=True)):
        ours = x + 1.5 * (sigmas[i + 1] / levels[i] - 1) * (x - align(answer, x))
        following = inputs[i + 1] if i + 1 < len(inputs) else end
        assert float((aligned_distance(ours, following) / sigmas[i].clamp_min(1)).max()) < 1e-3


def test_what_is_the_same_in_every_call_of_a_network() -> None:
    """Equal, or one object where a comparison says neither yes nor no."""
    numbers = np.ones(2)
    assert same("".join(["no", "thing"]), "nothing")
    assert same(numbers, numbers)
    assert not same(numbers, numbers.copy())
    assert not same("nothing", "something")


def test_a_network_that_gives_nan_is_told_of_and_other_samples_go_on() -> None:
    """The alignment failed with all samples, in the words of a decomposition."""
    x = SIGMAS[0] * centred_noise(2, ATOMS, generator=torch.Generator().manual_seed(0))
    broken = torch.zeros(2, ATOMS, 3)
    broken[1, 2] = torch.nan
    assert torch.equal(align(x + broken, x)[0], align(x, x)[0])
    assert align(x + broken, x)[1].isnan().all()
    assert align(x, x + broken)[1].isnan().all()

    def failing(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.where(((sigma > 0.5) & (sigma < 1))[:, None, None], torch.nan, network(x, sigma))

    with pytest.raises(NonFiniteError, match="The denoiser gave NaN or infinity for sample 0 at step"):
        parallel(sample_structure, 8, sigma_data=16.0)(RigidFrames(failing), x, SIGMAS)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (MASK[:1], r"\(12,\), one for each atom .* got \(1,\)"),
        (MASK[None], r"\(12,\), one for each atom .* got \(1, 12\)"),
        (0 * MASK, "weights of at least 0, not all of them 0"),
        (MASK - 0.5, "weights of at least 0, not all of them 0"),
        (MASK * torch.nan, "weights of at least 0, not all of them 0"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask: Tensor, said: str) -> None:
    """A mask of length 1 is spread over the atoms, but counts as one: the mean was twelve times too large."""
    with pytest.raises(ValueError, match=f"^atom_mask: expected {said}"):
        centred_noise(1, ATOMS, mask)
    one = torch.ones(1)
    with pytest.raises(ValueError, match=r"^atom_mask: expected "):
        RigidFrames(network, mask)(normal(1, ATOMS, 3), one, torch.eye(3)[None], torch.zeros(1, 1, 3), one)


@pytest.mark.parametrize(
    ("sigmas", "said"),
    [
        ([2.0, 1.0], "a tensor of at least two levels, .* got list"),
        (torch.ones(1), r"a tensor of at least two levels, .* got shape \(1,\)"),
        (torch.tensor([1.0, 2.0]), "finite levels above 0 that fall"),
        (torch.tensor([1.0, 0.0, 0.0]), "finite levels above 0 that fall"),
        (torch.tensor([1.0, -1.0]), "finite levels above 0 that fall"),
        (torch.tensor([torch.inf, 1.0]), "finite levels above 0 that fall"),
        (torch.tensor([torch.nan, 1.0]), "finite levels above 0 that fall"),
    ],
)
def test_levels_that_do_not_fall_are_refused(sigmas: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"^sigmas: expected {said}"):
        sample_structure(RigidFrames(network), normal(1, ATOMS, 3), sigmas)


def test_coordinates_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^x: expected coordinates \(batch, atoms, 3\), got shape \(12, 3\)"):
        RigidFrames(network)(normal(ATOMS, 3), torch.ones(1), torch.eye(3)[None], torch.zeros(1, 1, 3), torch.ones(1))
