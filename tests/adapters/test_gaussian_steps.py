"""The steps of a GaussianDiffusion object: what a loop is read as, and what is played to its steps."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from torch import Tensor

from parasolver_adapters.draws import Played, Unheard
from parasolver_adapters.gaussian_diffusion import (
    Draft,
    UnsupportedDiffusionError,
    _device,
    parallel_gaussian_diffusion,
)
from parasolver_adapters.gaussian_steps import StepDenoiser
from parasolver_core import DDIM, DDPM, NondeterministicDenoiserError
from tests.adapters.test_gaussian_diffusion import KWARGS, SHAPE, Network, Quiet, SpacedDiffusion, diffusion
from tests.adapters.weights import relative


def table(own: Any, loop: str = "p_sample_loop", **options: Any) -> Any:
    draft = Draft(own)
    getattr(draft.object, loop)(Network(6), SHAPE, model_kwargs=KWARGS, **options)
    return draft.table()


@pytest.mark.parametrize(
    ("variance", "loop", "options", "kind", "told"),
    [
        ("FIXED_SMALL", "p_sample_loop", {}, DDPM, {"variance_type": "fixed_small"}),
        ("FIXED_LARGE", "p_sample_loop", {}, DDPM, {"variance_type": "fixed_large"}),
        ("LEARNED_RANGE", "p_sample_loop", {}, DDPM, {"variance_type": "fixed_small"}),
        ("FIXED_LARGE", "ddim_sample_loop", {}, DDIM, {"eta": 0.0}),
        ("LEARNED_RANGE", "ddim_sample_loop", {"eta": 0.5}, DDIM, {"eta": 0.5}),
    ],
)
def test_a_loop_is_read_as_its_sampler(variance: str, loop: str, options: Any, kind: Any, told: Any) -> None:
    own = diffusion(10, variance)
    rule, timesteps = table(own, loop, **options)
    assert type(rule) is kind
    assert {name: getattr(rule, name) for name in told} == told
    assert rule.predicts == "sample"
    np.testing.assert_array_equal(timesteps, np.arange(9, -1, -1))
    np.testing.assert_array_equal(rule.schedule.alphas_cumprod, own.alphas_cumprod)


def test_steps_that_draw_nothing_are_those_of_ddim() -> None:
    rule, _ = table(diffusion(10, cls=Quiet))
    assert type(rule) is DDIM
    assert rule.eta == 0


class Made(SpacedDiffusion):
    """A loop over timesteps of ours; in its second run over others."""

    runs: Any = ()
    names: Any = ()

    def _loop(self, step: Any, model: Any, shape: Any, **options: Any) -> Any:
        x, run = torch.randn(*shape), type(self).runs.pop(0)
        for k, i in enumerate(run):
            t = torch.tensor(i if isinstance(i, list) else [i] * shape[0])
            made = getattr(self, self.names[k]) if self.names else step
            out = made(model, x, t, **options)
            yield out
            x = out["sample"]


def run(*runs: Any, names: Any = (), cls: Any = Made) -> None:
    made = type("Own", (cls,), {"runs": list(runs), "names": names})
    parallel = parallel_gaussian_diffusion(diffusion(20, cls=made), 8)
    list(parallel.p_sample_loop_progressive(Network(6), SHAPE, model_kwargs=KWARGS))


class OddDraws(Made):
    def p_sample(self, model: Any, x: Tensor, t: Tensor, **options: Any) -> dict[str, Tensor]:
        torch.randn(3)
        return super().p_sample(model, x, t, **options)


class AnotherDraw(Made):
    """Draws once more at the last step."""

    def p_sample(self, model: Any, x: Tensor, t: Tensor, **options: Any) -> dict[str, Tensor]:
        if int(t[0]) == 0:
            torch.randn_like(x)
        return super().p_sample(model, x, t, **options)


def test_loops_that_are_no_sampler_are_refused() -> None:
    falls = "expected timesteps that fall at every step"
    run([3, 2, 1, 0], [3, 2, 1, 0])
    for runs, names, cls, said in (
        ([[3, 2, 1], [3, 2, 1, 0]], (), Made, "step 3 of the loop is another than when it was tried out"),
        ([[3, 2, 1], [3, 1, 0]], (), Made, "step 1 of the loop is another than when it was tried out"),
        ([[3, 2, 2, 0]], (), Made, falls),
        ([[3, 2, 3]], (), Made, falls),
        ([[3, [2, 1], 0]], (), Made, "expected the samples of a batch at one timestep"),
        ([[]], (), Made, "expected a loop over one kind of step, got none"),
        ([[3, 2]], ("p_sample", "ddim_sample"), Made, "expected a loop over one kind of step, got {"),
        ([[3, 2]], (), OddDraws, r"p_sample draws noise of other shapes than its state's, \(2, 3, 4, 4\)"),
        ([[2, 1, 0]] * 2, (), AnotherDraw, "expected as many draws of noise in every step"),
    ):
        with pytest.raises(UnsupportedDiffusionError, match=said):
            run(*runs, names=names, cls=cls)


def test_one_step_is_a_loop() -> None:
    run([0], [0])
    run([0], [0], names=("ddim_sample",))


def test_one_sample_is_a_batch() -> None:
    own, kwargs = diffusion(10, "FIXED_SMALL"), {"y": {"label": {"id": torch.tensor([3])}, "scale": 0.7}}
    samples = []
    for one in (own, parallel_gaussian_diffusion(own, 4, tolerance=0)):
        torch.manual_seed(1)
        samples.append(one.p_sample_loop(Network(3), (1, 3, 4, 4), model_kwargs=kwargs))
    assert relative(*samples) < 1e-5


def test_an_object_may_have_one_kind_of_step() -> None:
    one = SimpleNamespace(alphas_cumprod=[1.0], p_sample=lambda model, x, t: x)
    assert parallel_gaussian_diffusion(one).p_sample is one.p_sample


def test_the_device_of_a_network() -> None:
    assert _device(lambda x: x) is None
    assert _device(torch.nn.Identity()) is None
    assert _device(torch.nn.Linear(1, 1, device="meta")) == torch.device("meta")


def test_draws_are_played_in_their_order_and_the_networks_own_are_not() -> None:
    draws = [torch.full((2,), float(k)) for k in range(2)]
    network = Unheard(SimpleNamespace(size=7, __call__=None))
    assert network.size == 7
    torch.manual_seed(0)
    own = torch.randn(2)
    torch.manual_seed(0)
    with Played(draws):
        assert torch.equal(Unheard(lambda: torch.randn(2))(), own)
        assert torch.equal(torch.randn(2), draws[0])
        assert torch.equal(torch.zeros(2), torch.tensor([0.0, 0.0]))
        assert torch.equal(torch.randn_like(own), draws[1])


def test_clean_samples_that_were_not_predicted_are_interpolated() -> None:
    """Between that of the step before and the next that is known; where none is, it stays."""
    rows: Any = SimpleNamespace(batch=2, draws_of=lambda step, sample: [step + 10 * sample, "another"])
    denoiser = StepDenoiser(rows, 4)
    one = torch.ones(1)
    denoiser._predictions = [{0: 0 * one, 1: 4 * one}, {}, {}, {0: 3 * one}]
    assert [denoiser.predicted(i).tolist() for i in range(4)] == [
        [[0.0], [4.0]], [[1.0], [4.0]], [[2.0], [4.0]], [[3.0], [4.0]],
    ]  # fmt: skip
    assert [len(known) for known in denoiser._predictions] == [0, 0, 0, 2]
    assert denoiser.noise(2, 1) == 12


class Handing(SpacedDiffusion):
    """Overrides that hand on what they are given."""

    def p_sample_loop(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().p_sample_loop(*args, **kwargs)

    def p_sample(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        out = super().p_sample(model, *args, **kwargs)
        return out | {"sample": 0.98 * out["sample"]}


def test_overrides_that_hand_on_their_arguments() -> None:
    """Their ``*args`` were taken for an argument of that name; p_sample, for one that takes no model."""
    own = diffusion(20, cls=Handing)
    parallel, results = parallel_gaussian_diffusion(own, 8, tolerance=0), []
    for one in (own, parallel):
        torch.manual_seed(1)
        results.append(one.p_sample_loop(Network(6), SHAPE, model_kwargs=KWARGS))
    assert relative(results[1], results[0]) < 3e-6
    assert parallel.solution.stats.rounds < 20


def test_a_step_without_a_state_of_that_name_is_refused() -> None:
    class Named(SpacedDiffusion):
        def p_sample(self, model: Any, img: Tensor, t: Tensor, **kwargs: Any) -> dict[str, Tensor]:
            return super().p_sample(model, img, t, **kwargs)

    with pytest.raises(UnsupportedDiffusionError, match=r"expected p_sample\(model, x, t, ...\), got one without .* x"):
        parallel_gaussian_diffusion(diffusion(5, cls=Named)).p_sample_loop(Network(6), SHAPE, model_kwargs=KWARGS)


class Generated(SpacedDiffusion):
    """Draws from a generator of its own, or from one that it is given, and the first state from NumPy."""

    generator: Any = None

    def p_sample(
        self, model: Any, x: Tensor, t: Tensor, model_kwargs: Any = None, generator: Any = None
    ) -> dict[str, Tensor]:
        mean, log_variance, clean = self.p_mean_variance(model, x, t, True, None, model_kwargs)
        noise = torch.randn(x.shape, generator=generator or self.generator)
        noisy = (t != 0).float().view(-1, 1, 1, 1)
        return {"sample": mean + noisy * (log_variance / 2).exp() * noise, "pred_xstart": clean}

    @torch.no_grad()
    def p_sample_loop(self, model: Any, shape: Any, model_kwargs: Any = None, generator: Any = None) -> Tensor:  # type: ignore[override]
        x = torch.from_numpy(np.random.standard_normal(shape)).float()  # noqa: NPY002
        x = x + torch.randn(shape, generator=generator or self.generator)
        for i in reversed(range(self.num_timesteps)):
            x = self.p_sample(model, x, torch.tensor([i] * shape[0]), model_kwargs, generator)["sample"]
        return x


@pytest.mark.parametrize("given", [False, True])
def test_streams_are_where_the_loop_would_have_left_them(given: bool) -> None:
    """A second sample began with numbers that the first one's steps had drawn."""
    own, network, found = diffusion(15, cls=Generated), Network(6), []
    for make in (lambda one: one, lambda one: parallel_gaussian_diffusion(one, 8, tolerance=0)):
        np.random.seed(3)  # noqa: NPY002
        torch.manual_seed(2)
        generator = torch.Generator().manual_seed(1)
        own.generator = None if given else generator
        options, one = {"generator": generator} if given else {}, make(own)
        samples = [one.p_sample_loop(network, SHAPE, model_kwargs=KWARGS, **options) for _ in range(2)]
        found.append((*samples, torch.rand(1), torch.rand(1, generator=generator)))
    want, got = found
    assert relative(got[0], want[0]) < 3e-6
    assert relative(got[1], want[1]) < 3e-6
    assert torch.equal(got[2], want[2])
    assert torch.equal(got[3], want[3])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda out: (out["sample"], out["pred_xstart"]), "expected p_sample to return a dictionary .* got tuple"),
        (lambda out: {"sample": out["sample"]}, r"expected p_sample to return a dictionary .* got \['sample'\]"),
        (lambda out: out | {"more": 1}, "the loop reads 'more' of what a step returns"),
    ],
)
def test_what_a_step_returns_besides_is_refused(change: Any, said: str) -> None:
    class Changed(SpacedDiffusion):
        def p_sample(self, *args: Any, **kwargs: Any) -> Any:
            return change(super().p_sample(*args, **kwargs))

        def p_sample_loop(self, *args: Any, **kwargs: Any) -> Any:
            return list(self.p_sample_loop_progressive(*args, **kwargs))[-1]["more"]

    with pytest.raises(UnsupportedDiffusionError, match=f"^diffusion: {said}"):
        parallel_gaussian_diffusion(diffusion(5, cls=Changed)).p_sample_loop(Network(6), SHAPE, model_kwargs=KWARGS)


def test_a_clean_sample_that_is_changed_at_random_is_found() -> None:
    def shaken(x: Tensor) -> Tensor:
        return x + 0.3 * torch.randn_like(x)

    options = {"model_kwargs": KWARGS, "denoised_fn": shaken}
    with pytest.raises(NondeterministicDenoiserError, match="differ by"):
        parallel_gaussian_diffusion(diffusion(10)).p_sample_loop(Network(6), SHAPE, **options)


def test_draws_that_run_out_are_refused() -> None:
    with Played([torch.zeros(2)]), pytest.raises(ValueError, match=r"^noise: a step draws more often"):
        torch.randn(2) + torch.randn(2)
