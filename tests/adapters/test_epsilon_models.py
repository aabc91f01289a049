"""Respaced timesteps, learned variance, labels and guidance, on small functions in the place of networks."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from torch import Tensor

from parasolver_adapters.epsilon_models import (
    ClassifierGuidance,
    EpsilonModel,
    LearnedVariance,
    space_timesteps,
    starting_noise,
)
from parasolver_core import (
    DDIM,
    DDPM,
    NoiseSchedule,
    ParallelIntegralSolver,
    Rows,
    check_denoiser,
    solve,
    solve_sequential,
)
from tests.adapters.weights import relative
from tests.away import away
from tests.traffic import Traffic

SCHEDULES = {"linear": NoiseSchedule.linear(), "cosine": NoiseSchedule.squared_cosine(1000)}
SCHEDULE = SCHEDULES["linear"]
EVENT = (3, 2, 2)
CLASSES = 5


def network(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    """eps of data near a level of the class, and v that depends on everything."""
    abar = torch.tensor(SCHEDULE.alphas_cumprod, dtype=x.dtype)[t].view(-1, 1, 1, 1)
    level = (torch.zeros(len(x), dtype=x.dtype) if y is None else y.to(x.dtype) / 5).view(-1, 1, 1, 1)
    eps = (x - abar.sqrt() * level) * (1 - abar).sqrt() / (1 - 0.8 * abar) + 0.05 * torch.sin(3 * x)
    return torch.cat([eps, torch.tanh(x + level)], dim=1)


def model(labels: Any = (0, 4), **options: Any) -> EpsilonModel:
    return EpsilonModel(network, SCHEDULE, labels, num_classes=CLASSES, **options)


def noise_of(steps: int, batch: int = 2) -> Tensor:
    return torch.randn(steps, batch, *EVENT, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def x_T(batch: int = 2) -> Tensor:
    return starting_noise(batch, EVENT).double()


def classifier(x: Tensor, t: Tensor) -> Tensor:
    """Logits (rows, 5), not linear in x."""
    at = torch.linspace(-1, 1, CLASSES, dtype=x.dtype)
    return -((x.flatten(1).mean(dim=1, keepdim=True) - at) ** 2) * (1 + t.to(x.dtype)[:, None] / 1000)


def ddpm(one: EpsilonModel, timesteps: Any, noise: Tensor, labels: Any, scale: float = 0.0) -> Tensor:
    """The plain loop, from the definitions: respaced betas, the mean through x_0, variance between its bounds."""
    abar = one.schedule.alphas_cumprod[np.asarray(timesteps)]
    before = np.append(abar[1:], 1.0)
    betas = 1 - abar / before
    posterior = betas * (1 - before) / (1 - abar)
    posterior[-1] = posterior[-2]
    x, y = x_T(len(labels)), torch.as_tensor(labels)
    for i, timestep in enumerate(timesteps):
        t = torch.full((len(x),), int(timestep))
        eps, v = network(x, t, y if one.num_classes else None).chunk(2, dim=1)
        clean = (x - np.sqrt(1 - abar[i]) * eps) / np.sqrt(abar[i])
        if one.clip_denoised:
            clean = clean.clamp(-1, 1)
        mean = np.sqrt(before[i]) * betas[i] / (1 - abar[i]) * clean
        mean = mean + np.sqrt(1 - betas[i]) * (1 - before[i]) / (1 - abar[i]) * x
        weight = (v + 1) / 2
        variance = torch.exp(weight * np.log(betas[i]) + (1 - weight) * np.log(posterior[i]))
        if scale:
            mean = mean + variance * ClassifierGuidance(classifier, scale)(x, t, y)
        x = mean + (variance.sqrt() * noise[i] if i < len(timesteps) - 1 else 0)
    return x


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ("ddim25", list(range(960, -1, -40))),
        ("ddim4", [750, 500, 250, 0]),
        (5, [999, 749, 500, 250, 0]),
        ("1", [0]),
        ("2,3", [999, 750, 500, 499, 0]),
        (" 1000 ", list(range(999, -1, -1))),
    ],
)
def test_timesteps_are_spaced_as_published(spacing: Any, expected: list[int]) -> None:
    assert space_timesteps(1000, spacing).tolist() == expected


@pytest.mark.parametrize("spacing", ["ddim", "ddim999", "0", "-3", "ten", "10,", 1001, "600,10", "", 2.5])
def test_bad_spacings_are_refused(spacing: Any) -> None:
    with pytest.raises(ValueError, match="spacing"):
        space_timesteps(1000, spacing)


def test_starting_noise_of_a_sample_does_not_depend_on_the_others() -> None:
    assert torch.equal(starting_noise(3, EVENT, seed=5)[:2], starting_noise(2, EVENT, seed=5))
    assert not torch.equal(starting_noise(1, EVENT, seed=5), starting_noise(1, EVENT, seed=6))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("options", [{}, {"clip_denoised": True}, {"scale": 2.0}])
@pytest.mark.parametrize("spacing", ["ddim10", "30", "10,5"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_ddpm_with_learned_variance(schedule: str, options: Any, spacing: str, variance_type: Any) -> None:
    scale = options.get("scale", 0.0)
    one = EpsilonModel(
        network,
        SCHEDULES[schedule],
        (0, 4),
        num_classes=CLASSES,
        clip_denoised=options.get("clip_denoised", False),
        classifier=ClassifierGuidance(classifier, scale) if scale else None,
    )
    timesteps = one.timesteps(spacing)
    noise = noise_of(len(timesteps))
    rule = DDPM(one.schedule, variance_type=variance_type)
    expected = ddpm(one, timesteps, noise, (0, 4), scale)
    arguments = LearnedVariance(one), x_T(), timesteps, rule
    assert relative(solve_sequential(*arguments, noise=noise).sample, expected) < 1e-11
    assert relative(solve(*arguments, window=5, tolerance=0, noise=noise).sample, expected) < 1e-11
    assert relative(solve(*arguments, window=5, tolerance=1e-2, noise=noise).sample, expected) < 1e-2


@pytest.mark.parametrize("options", [{}, {"clip_denoised": True}])
def test_a_round_with_learned_variance_waits_once(options: Any) -> None:
    def tables_there(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return torch.cat([0.3 * torch.sin(x), torch.tanh(x)], dim=1)

    with away() as device:
        one = EpsilonModel(tables_there, SCHEDULE, (0, 4), num_classes=CLASSES, **options)
        solver = ParallelIntegralSolver(DDPM(SCHEDULE), 4)
        state = solver.init(LearnedVariance(one), starting_noise(2, EVENT).to(device), one.timesteps(60))
        for _ in range(3):
            solver.step(state)
        assert not solver.done(state)
        with Traffic() as traffic:
            solver.step(state)
    assert traffic.seen["to the host"] == 1


def test_one_step_of_ddpm_gives_the_predicted_sample() -> None:
    eps, _ = network(x_T(), torch.tensor([0, 0]), torch.tensor([0, 4])).chunk(2, dim=1)
    abar = SCHEDULE.alphas_cumprod[0]
    got = solve_sequential(LearnedVariance(model()), x_T(), [0], DDPM(SCHEDULE)).sample
    assert relative(got, (x_T() - np.sqrt(1 - abar) * eps) / np.sqrt(abar)) < 1e-12


@pytest.mark.parametrize("spacing", ["1", "2"])
def test_the_last_of_few_steps_is_guided_by_the_variance_it_has(spacing: str) -> None:
    """It adds no noise, and what the classifier says counts by its own variance; a single step has one bound only."""
    one = EpsilonModel(network, SCHEDULE, (0, 4), num_classes=CLASSES, classifier=ClassifierGuidance(classifier, 2.0))
    timesteps = one.timesteps(spacing)
    noise = noise_of(len(timesteps))
    got = solve_sequential(LearnedVariance(one), x_T(), timesteps, DDPM(SCHEDULE), noise=noise)
    if spacing == "2":
        expected = ddpm(one, timesteps, noise, (0, 4), 2.0)
    else:
        abar, t, y = SCHEDULE.alphas_cumprod[0], torch.tensor([0, 0]), torch.tensor([0, 4])
        clean = (x_T() - np.sqrt(1 - abar) * network(x_T(), t, y)[:, :3]) / np.sqrt(abar)
        expected = clean + (1 - abar) * ClassifierGuidance(classifier, 2.0)(x_T(), t, y)
    assert relative(got.sample, expected) < 1e-12


def test_a_table_that_is_not_ddpms_is_refused_by_learned_variance() -> None:
    timesteps = space_timesteps(1000, 5)
    small, large = (DDPM(SCHEDULE, variance_type=kind).recurrence(timesteps) for kind in ("fixed_small", "fixed_large"))

    def called(recurrence: Any) -> Tensor:
        rows = Rows(np.array([1, 2]), np.array([0, 1]), recurrence, lambda i, k: torch.zeros(EVENT).double(), 2)
        return LearnedVariance(model())(x_T(), torch.tensor([749, 500]), rows)

    for recurrence in (small, large):
        assert torch.equal(called(recurrence), network(x_T(), torch.tensor([749, 500]), torch.tensor([0, 4]))[:, :3])
    for name in ("a", "b", "c"):
        with pytest.raises(ValueError, match="got another sampler or schedule"):
            called(replace(small, **{name: 0.9 * getattr(small, name)}))


def test_what_a_model_is_unless_told() -> None:
    own = EpsilonModel(network, SCHEDULE)
    assert own.learn_sigma
    assert not own.clip_denoised
    assert not own.takes_rows
    assert own.labels is own.num_classes is own.guidance_scale is own.null_label is own.guided_channels is None
    assert ClassifierGuidance(classifier).scale == 1
    assert ClassifierGuidance(classifier, 0.0)(x_T(), torch.tensor([1, 2]), torch.tensor([0, 4])).abs().max() == 0


def test_a_classifier_of_scale_0_is_not_asked() -> None:
    def never(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError

    t = torch.tensor([10, 900])
    assert torch.equal(model(classifier=ClassifierGuidance(never, 0.0))(x_T(), t), model()(x_T(), t))


@pytest.mark.parametrize("label", [4, np.int64(4)])
def test_one_label_is_that_of_any_row(label: Any) -> None:
    one, t = model(label), torch.tensor([10, 900, 10])
    assert not one.takes_rows
    assert torch.equal(one(x_T(3), t), network(x_T(3), t, torch.tensor([4, 4, 4]))[:, :3])


def test_rows_take_the_labels_of_their_samples() -> None:
    rows = Rows(
        np.array([0, 0, 1]), np.array([1, 0, 1]), DDIM(SCHEDULE).recurrence(np.array([9, 5])), lambda i, k: i, 2
    )
    t = torch.tensor([9, 9, 5])
    assert torch.equal(model()(x_T(3), t, rows), network(x_T(3), t, torch.tensor([4, 0, 4]))[:, :3])
    for batch in (1, 3):  # a pair of guidance given as labels is not one label for each sample, say
        with pytest.raises(ValueError, match=f"expected one for each of the {batch} samples, got 2"):
            model()(x_T(3), t, replace(rows, batch=batch))


def test_labels_of_a_classifier_alone_may_be_any() -> None:
    EpsilonModel(network, SCHEDULE, 10**6, classifier=ClassifierGuidance(classifier))
    with pytest.raises(TypeError, match="labels: expected one integer"):
        model(labels=[[0, 1]])


def test_other_samplers_are_refused_by_learned_variance() -> None:
    for rule in (DDIM(SCHEDULE), DDPM(SCHEDULES["cosine"])):
        with pytest.raises(ValueError, match="step_rule: LearnedVariance is for DDPM"):
            solve(LearnedVariance(model()), x_T(), space_timesteps(1000, 5), rule)
    with pytest.raises(ValueError, match="learn_sigma=False"):
        LearnedVariance(model(learn_sigma=False))


@pytest.mark.parametrize("method", ["secant", "identity", "sequential"])
def test_each_sample_has_its_own_label(method: str) -> None:
    timesteps = space_timesteps(1000, 10)
    together = solve(model((0, 3, 4)), x_T(3), timesteps, DDIM(SCHEDULE), 4, method=method, tolerance=0).sample
    for sample, label in enumerate((0, 3, 4)):
        alone = solve(model(label), x_T(3)[sample : sample + 1], timesteps, DDIM(SCHEDULE), 4, tolerance=0).sample
        assert relative(together[sample], alone[0]) < 1e-12


def test_classifier_guidance_shifts_eps() -> None:
    t, y = torch.tensor([10, 900]), torch.tensor([0, 4])
    guided = model(classifier=ClassifierGuidance(classifier, 3.0))
    x = x_T().requires_grad_(True)
    (gradient,) = torch.autograd.grad(classifier(x, t).log_softmax(1)[[0, 1], y].sum(), x)
    sigma = torch.as_tensor(np.sqrt(1 - SCHEDULE.alphas_cumprod))[t].view(-1, 1, 1, 1)
    expected = network(x_T(), t, y)[:, :3] - 3.0 * sigma * gradient
    with torch.no_grad():  # as inside the solver
        assert relative(guided(x_T(), t), expected) < 1e-14


def test_a_classifier_guides_a_network_without_labels() -> None:
    def unlabelled(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        assert y is None
        return network(x, t, y)

    guide = ClassifierGuidance(classifier, 200.0)
    guided = EpsilonModel(unlabelled, SCHEDULE, (0, 4), classifier=guide)
    samples = solve(guided, x_T(), guided.timesteps(20), DDIM(SCHEDULE), window=5).sample.flatten(1).mean(1)
    assert samples[0] < -0.2
    assert samples[1] > 0.2


@pytest.mark.parametrize("channels", [None, 2])
def test_classifier_free_guidance(channels: int | None) -> None:
    x, t, y = x_T(), torch.tensor([10, 900]), torch.tensor([0, 3])
    one = model((0, 3), guidance_scale=4.0, null_label=4, guided_channels=channels)
    labelled, plain = network(x, t, y), network(x, t, torch.tensor([4, 4]))
    eps, v = one.predict(x, t)
    part = slice(0, channels or 3)
    assert relative(eps[:, part], plain[:, part] + 4 * (labelled[:, part] - plain[:, part])) < 1e-14
    assert torch.equal(eps[:, part.stop :], labelled[:, part.stop : 3])
    assert v is not None
    assert torch.equal(v, labelled[:, 3:])
    assert torch.equal(model((0, 3), guidance_scale=1.0)(x, t), labelled[:, :3])


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.0, "null_label": 4}])
def test_the_conformance_check_passes(options: dict[str, Any]) -> None:
    timesteps = space_timesteps(1000, 20)
    report = check_denoiser(model(**options), x_T(), timesteps)
    assert report.ok, report
    report = check_denoiser(LearnedVariance(model(**options)), x_T(), timesteps, step_rule=DDPM(SCHEDULE))
    assert report.ok, report


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"labels": None}, "labels: the network needs them"),
        ({"labels": 5}, r"labels: expected classes in 0\.\.4, got 5"),
        ({"labels": [0, -1]}, "got -1"),
        ({"labels": 1, "num_classes": None}, "labels: this network takes none"),
        ({"labels": None, "num_classes": None, "classifier": ClassifierGuidance(classifier)}, "labels: classifier"),
        ({"guidance_scale": 2.0}, "guidance_scale: got 2.0, which needs"),
        ({"guidance_scale": math.nan, "null_label": 4}, "guidance_scale: expected a finite number, got nan"),
        ({"null_label": 5}, r"null_label: expected a class in 0\.\.4, got 5"),
        ({"null_label": -1}, r"null_label: expected a class in 0\.\.4, got -1"),
        ({"guided_channels": -1}, "guided_channels: expected an integer of at least 1, got -1"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        EpsilonModel(network, SCHEDULE, **({"labels": 0, "num_classes": CLASSES} | options))


def test_a_classifier_scale_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="scale: expected a finite number, got inf"):
        ClassifierGuidance(classifier, math.inf)


@pytest.mark.parametrize("label", [np.int64(3), np.array(3), torch.tensor(3)])
def test_one_label_is_that_of_all_samples_in_any_form(label: Any) -> None:
    """In an array without axes it was one for each sample, of which there were not enough."""
    one = model(labels=label)
    assert not one.takes_rows
    t = torch.tensor([3, 500, 999])
    assert torch.equal(one(x_T(3), t), model(labels=3)(x_T(3), t))


def test_labels_of_another_kind_are_refused() -> None:
    with pytest.raises(TypeError, match="labels: expected one integer"):
        model(labels=1.5)


def test_fewer_or_more_labels_than_samples_are_refused() -> None:
    for batch in (1, 3):
        with pytest.raises(ValueError, match=f"labels: expected one for each of the {batch} samples, got 2"):
            solve(model(), x_T(batch), space_timesteps(1000, 5), DDIM(SCHEDULE))
    with pytest.raises(ValueError, match="labels: got 2 for 3 rows"):
        model()(x_T(3), torch.tensor([1, 2, 3]))


def test_wrong_learn_sigma_is_told() -> None:
    with pytest.raises(ValueError, match="learn_sigma: with False the network should give 3 channels for 3, got 6"):
        model(learn_sigma=False)(x_T(), torch.tensor([1, 2]))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_trained_network_with_labels_guidance_and_a_variance(sampler: str) -> None:
    """The embedded model, given a second half of channels that stands for a learned variance."""
    pytest.importorskip("diffusers")
    from parasolver_adapters import embedded

    unet = embedded.load_embedded_model()

    def with_variance(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        eps = unet(x, t, class_labels=y, return_dict=False)[0]
        return torch.cat([eps, torch.tanh(eps)], dim=1)

    options: dict[str, Any] = {"num_classes": 11, "guidance_scale": 2.0, "null_label": embedded.NO_CLASS}
    one = EpsilonModel(with_variance, embedded.SCHEDULE, (3, 7), clip_denoised=True, **options)
    rule, denoiser = (DDIM(one.schedule), one) if sampler == "ddim" else (DDPM(one.schedule), LearnedVariance(one))
    arguments = denoiser, starting_noise(2, embedded.SAMPLE_SHAPE), one.timesteps("15"), rule
    expected = solve_sequential(*arguments, seed=1).sample
    exact, near = (solve(*arguments, window=5, tolerance=tolerance, seed=1) for tolerance in (0, 1e-2))
    assert near.stats.rounds < 15
    assert relative(exact.sample, expected) < 1e-4
    assert relative(near.sample, expected) < 1e-2
