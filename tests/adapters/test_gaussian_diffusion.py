"""The GaussianDiffusion object of guided-diffusion and its forks, in parallel through its own loops."""

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from torch import Tensor

from benchmarks.guided_loops import ModelMeanType, ModelVarType, SpacedDiffusion
from parasolver_adapters.epsilon_models import space_timesteps
from parasolver_adapters.gaussian_diffusion import UnsupportedDiffusionError, parallel_gaussian_diffusion
from parasolver_core import CoupledRowsError, NonFiniteError
from tests.adapters.weights import relative

SHAPE = (2, 3, 4, 4)
KWARGS = {"y": {"label": {"id": torch.tensor([3, 5])}, "scale": 0.7}}


class Network(torch.nn.Module):
    """eps, or the clean sample, and perhaps v; with labels in nested dictionaries, as of text-to-motion models."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.labels = torch.nn.Linear(48, 16 * channels), torch.nn.Embedding(10, 48)
        self.rows: list[int] = []

    def forward(self, x: Tensor, t: Tensor, y: dict[str, Any]) -> Tensor:
        self.rows.append(len(x))
        shift = y["scale"] * self.labels(y["label"]["id"]) + torch.sin(t[:, None] / 200)
        hidden = torch.tanh(self.layer(x.flatten(1) + shift)).view(len(x), -1, 4, 4)
        return 0.6 * x.repeat(1, hidden.shape[1] // 3, 1, 1) + 0.6 * hidden


def towards(x: Tensor, t: Tensor, y: dict[str, Any]) -> Tensor:
    """A classifier's gradient."""
    goal = y["label"]["id"][:, None, None, None] / 10
    return -0.3 * (x - goal * torch.tanh(1 + t / 1000)[:, None, None, None])


def diffusion(
    steps: int | str, variance: str = "LEARNED_RANGE", mean: str = "EPSILON", **options: Any
) -> SpacedDiffusion:
    return options.pop("cls", SpacedDiffusion)(
        space_timesteps(1000, steps).tolist(),
        betas=np.linspace(1e-4, 0.02, 1000),
        model_mean_type=ModelMeanType[mean],
        model_var_type=ModelVarType[variance],
    )


def both(
    own: Any, loop: str, network: Any, tolerance: float = 0, window: int = 16, **options: Any
) -> tuple[Any, Any, Any]:
    """The sequential and the parallel result from the same random numbers, and the parallel object."""
    parallel = parallel_gaussian_diffusion(own, window, tolerance=tolerance)
    results, following = [], []
    for one in (own, parallel):
        torch.manual_seed(1)
        made = getattr(one, loop)(network, SHAPE, model_kwargs=KWARGS, **options)
        results.append(list(made) if inspect.isgenerator(made) else made)
        following.append(torch.rand(1))
    assert torch.equal(*following), "the global stream is where the loop would have left it"
    return *results, parallel


@pytest.mark.parametrize("variance", ["LEARNED_RANGE", "FIXED_SMALL", "FIXED_LARGE"])
@pytest.mark.parametrize(
    ("loop", "options"),
    [
        ("p_sample_loop", {}),
        ("p_sample_loop", {"cond_fn": towards, "denoised_fn": lambda x: 0.95 * x}),
        ("p_sample_loop", {"clip_denoised": False, "noise": torch.full(SHAPE, 0.5), "device": "cpu"}),
        ("ddim_sample_loop", {}),
        ("ddim_sample_loop", {"eta": 0.5, "cond_fn": towards}),
    ],
)
def test_each_loop_gives_its_own_sample(variance: str, loop: str, options: dict[str, Any]) -> None:
    network = Network(6 if "LEARNED" in variance else 3)
    want, got, parallel = both(diffusion("ddim25", variance), loop, network, **options)
    assert relative(got, want) < 3e-6
    assert parallel.solution.stats.rounds < 25


@pytest.mark.parametrize(("loop", "most"), [("p_sample_loop", 20), ("ddim_sample_loop", 10)])
def test_within_the_tolerance_in_far_fewer_rounds(loop: str, most: int) -> None:
    want, got, parallel = both(diffusion(100), loop, Network(6), tolerance=1e-2, window=32)
    assert relative(got, want) < 1e-2
    assert parallel.solution.stats.rounds <= most


class Quiet(SpacedDiffusion):
    """Makes its steps as DDIM does, and draws nothing."""

    def p_sample(self, model: Any, x: Tensor, t: Tensor, model_kwargs: Any = None) -> dict[str, Tensor]:
        _, _, clean = self.p_mean_variance(model, x, t, True, None, model_kwargs)
        bar, prev = self._at(self.alphas_cumprod, t, x), self._at(self.alphas_cumprod_prev, t, x)
        eps = (x - bar.sqrt() * clean) / (1 - bar).sqrt()
        return {"sample": prev.sqrt() * clean + (1 - prev).sqrt() * eps, "pred_xstart": clean}


def test_steps_that_draw_no_noise() -> None:
    want, got, parallel = both(diffusion(40, cls=Quiet), "p_sample_loop", Network(6), tolerance=1e-3)
    assert relative(got, want) < 1e-3
    assert parallel.solution.stats.rounds <= 15


def test_networks_that_predict_the_clean_sample() -> None:
    want, got, _ = both(diffusion("20", "FIXED_SMALL", "START_X"), "p_sample_loop", Network(3))
    assert relative(got, want) < 3e-6


@pytest.mark.parametrize("loop", ["p_sample_loop_progressive", "ddim_sample_loop_progressive"])
@pytest.mark.parametrize("tolerance", [0, 1e-2])
def test_progressive_loops_give_every_step_in_order(loop: str, tolerance: float) -> None:
    want, got, _ = both(diffusion(60), loop, Network(6), tolerance)
    assert len(got) == len(want) == 60
    for one, other in zip(got, want, strict=True):
        for key in ("sample", "pred_xstart"):
            assert relative(one[key], other[key]) < max(1e-5, 3 * tolerance)


def test_progressive_loops_give_a_step_as_soon_as_it_is_known() -> None:
    network = Network(6)
    steps = parallel_gaussian_diffusion(diffusion(60), 8).p_sample_loop_progressive(network, SHAPE, model_kwargs=KWARGS)
    assert network.rows == []
    next(steps)
    assert sum(network.rows) < 60


def test_the_object_stays_as_it_is_and_the_copy_is_of_its_class() -> None:
    own = diffusion(20)
    before = dict(vars(own))
    parallel = parallel_gaussian_diffusion(own, 8)
    assert isinstance(parallel, SpacedDiffusion)
    assert parallel.solution is None
    for name in ("p_sample_loop", "ddim_sample_loop_progressive"):
        assert inspect.signature(getattr(parallel, name)) == inspect.signature(getattr(own, name))
    parallel.p_sample_loop(Network(6), SHAPE, model_kwargs=KWARGS)
    assert vars(own) == before
    sequential = parallel_gaussian_diffusion(own, 1)
    network = Network(6)
    sequential.p_sample_loop(network, SHAPE, model_kwargs=KWARGS)
    assert network.rows == [2] * 20


def test_what_is_set_on_the_copy_is_what_its_loops_read() -> None:
    own = diffusion(20)
    parallel, network, samples = parallel_gaussian_diffusion(own, 8, tolerance=0), Network(6), []
    for one in (parallel, own):  # the copy first: what is set on it is its own
        one.model_mean_type = ModelMeanType.START_X
        torch.manual_seed(1)
        samples.append(one.p_sample_loop(network, SHAPE, model_kwargs=KWARGS))
    assert relative(*samples) < 3e-6


def test_progress_shows_one_bar(capsys: pytest.CaptureFixture[str]) -> None:
    parallel_gaussian_diffusion(diffusion(20), 8).p_sample_loop(Network(6), SHAPE, model_kwargs=KWARGS, progress=True)
    assert capsys.readouterr().err.count(" 0/20 [") == 1


class AddsNoiseAgain(SpacedDiffusion):
    """Goes back in time, as resampling for inpainting does."""

    def _loop(self, step: Any, model: Any, shape: Any, **options: Any) -> Any:
        x = torch.randn(*shape)
        for i in (3, 2, 3, 2, 1, 0):
            out = step(model, x, torch.tensor([i] * shape[0]), **options)
            yield out
            x = out["sample"]


class SameNoise(SpacedDiffusion):
    """Gives all samples of a batch the first one's noise, which rows of other steps then would have too."""

    def p_sample(self, model: Any, x: Tensor, t: Tensor, **options: Any) -> dict[str, Tensor]:
        out = super().p_sample(model, x, t, **options)
        return out | {"sample": out["sample"] + 0.1 * torch.randn_like(x)[:1]}


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (AddsNoiseAgain, r"expected timesteps that fall at every step.* got \[3, 2, 3\]"),
        (SameNoise, "p_sample is not made row by row: timestep 19 of sample 1 comes out"),
    ],
)
def test_what_cannot_be_sampled_in_parallel_is_refused(cls: Any, message: str) -> None:
    with pytest.raises(UnsupportedDiffusionError, match=message):
        parallel_gaussian_diffusion(diffusion(20, cls=cls), 8).p_sample_loop(Network(6), SHAPE, model_kwargs=KWARGS)


class Between(SpacedDiffusion):
    """Does something between two steps."""

    between = "known"

    def _loop(self, step: Any, model: Any, shape: Any, model_kwargs: Any = None, **options: Any) -> Any:
        x, clean, buffer = torch.randn(*shape), torch.zeros(*shape), torch.zeros(shape[0], 1, 1, 1)
        for i in reversed(range(self.num_timesteps)):
            buffer.fill_(0.1 * i)
            if self.between == "known":
                x[:, :, :2] = 0.5
            shift = {"clean": clean, "buffer": buffer, "known": buffer * 0}[self.between]
            t = torch.tensor([i] * shape[0])
            out = step(model, x, t, model_kwargs=model_kwargs | {"shift": shift}, **options)
            yield out
            x, clean = out["sample"], out["pred_xstart"]


class Shifted(Network):
    def forward(self, x: Tensor, t: Tensor, y: dict[str, Any], shift: Tensor) -> Tensor:
        return super().forward(x, t, y) + 0.3 * shift[:, :1]


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
@pytest.mark.parametrize(
    ("between", "message"),
    [
        ("known", "the loop changes the state before step 1, as inpainting does"),
        ("clean", r"step 1 is called with other arguments than when .* zero, .*self-conditioning"),
    ],
)
def test_loops_that_do_more_between_two_steps_are_refused(loop: str, between: str, message: str) -> None:
    own = diffusion(20, cls=Between)
    own.between = between
    with torch.no_grad(), pytest.raises(UnsupportedDiffusionError, match=message):
        getattr(parallel_gaussian_diffusion(own, 8), loop)(Shifted(6), SHAPE, model_kwargs=KWARGS)


def test_arguments_that_the_loop_writes_anew_in_place_are_each_steps_own() -> None:
    own = diffusion(20, cls=Between)
    own.between = "buffer"
    with torch.no_grad():
        want, got, _ = both(own, "ddim_sample_loop", Shifted(6))
    assert relative(got, want) < 3e-6


class WritesIntoItsInput(Network):
    def forward(self, x: Tensor, t: Tensor, y: dict[str, Any]) -> Tensor:
        x *= 0.97
        return super().forward(x, t, y)


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_a_step_goes_on_from_what_its_network_has_made_of_the_state(loop: str) -> None:
    want, got, _ = both(diffusion(20), loop, WritesIntoItsInput(6))
    assert relative(got, want) < 3e-6


class InDtypeOfState(Network):
    def forward(self, x: Tensor, t: Tensor, y: dict[str, Any]) -> Tensor:
        return super().forward(x.float(), t, y).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_states_have_the_dtype_that_the_steps_give_them(dtype: torch.dtype) -> None:
    """The tables of the object make float32 of noise in half precision, in the first step."""
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)).to(dtype)
    want, got, _ = both(diffusion(20), "p_sample_loop_progressive", InDtypeOfState(6), noise=noise)
    assert [one["sample"].dtype for one in got] == [one["sample"].dtype for one in want]
    assert [one["pred_xstart"].dtype for one in got] == [one["pred_xstart"].dtype for one in want]
    assert relative(got[-1]["sample"], want[-1]["sample"]) < 1e-5


def test_bad_arguments_and_networks() -> None:
    with pytest.raises(
        TypeError, match=r"diffusion: expected a GaussianDiffusion .* got Network without alphas_cumprod"
    ):
        parallel_gaussian_diffusion(Network(3))
    keeps_its_model = SimpleNamespace(alphas_cumprod=[1.0], p_sample=lambda x, t: x)
    with pytest.raises(TypeError, match=r"p_sample of SimpleNamespace takes no model; .*parallel_denoising_diffusion"):
        parallel_gaussian_diffusion(keeps_its_model)
    with pytest.raises(ValueError, match="window: expected an integer of at least 1"):
        parallel_gaussian_diffusion(diffusion(20), 0)
    with pytest.raises(NonFiniteError, match="gave NaN or infinity") as caught:
        parallel_gaussian_diffusion(diffusion(20), 8).p_sample_loop(
            lambda x, t, y: torch.cat([x, x], dim=1) * torch.where(t < 500, torch.nan, 1.0)[:, None, None, None],
            SHAPE,
            model_kwargs=KWARGS,
            device="cpu",
            clip_denoised=False,
        )
    assert caught.value.solution is not None


class Guided(Network):
    """Guided in pairs, as DiT's ``forward_with_cfg``: the second half's states are not looked at."""

    def forward(self, x: Tensor, t: Tensor, y: dict[str, Any]) -> Tensor:
        half = x.chunk(2)[0]
        out = super().forward(torch.cat([half, half]), t, y)
        given, null = out[:, :3].chunk(2)
        eps = null + 4 * (given - null)
        return torch.cat([torch.cat([eps, eps]), out[:, 3:]], dim=1)


@pytest.mark.parametrize(
    ("loop", "eta"), [("p_sample_loop", None), ("ddim_sample_loop", 0.0), ("ddim_sample_loop", 0.6)]
)
def test_a_network_that_guides_in_pairs(loop: str, eta: float | None) -> None:
    network, own, half = Guided(6), diffusion("40"), torch.randn(3, 3, 4, 4)
    labels = {"label": {"id": torch.tensor([3, 5, 2, 9, 9, 9])}, "scale": 0.7}
    options: dict[str, Any] = {"noise": torch.cat([half, half]), "model_kwargs": {"y": labels}}
    options |= {} if eta is None else {"eta": eta}
    torch.manual_seed(1)
    want, after = getattr(own, loop)(network, (6, 3, 4, 4), **options), torch.rand(1)
    paired = parallel_gaussian_diffusion(own, 16, tolerance=0, pairs=True)
    torch.manual_seed(1)
    got = getattr(paired, loop)(network, (6, 3, 4, 4), **options)
    assert torch.equal(torch.rand(1), after)
    assert relative(got, want) < 1e-5
    assert relative(got[3:], got[:3]) > 1e-3 or eta == 0  # the other half draws noise of its own
    assert paired.solution.stats.rounds < 30
    assert paired.solution.sample.shape == (3, 2, 3, 4, 4)
    with pytest.raises(UnsupportedDiffusionError, match=r"pairs: expected a batch .* got 3 samples"):
        paired.p_sample_loop(
            Network(6), (3, 3, 4, 4), model_kwargs={"y": {"label": {"id": torch.arange(3)}, "scale": 1}}
        )
    with pytest.raises(CoupledRowsError) as raised:
        getattr(parallel_gaussian_diffusion(own, 16), loop)(network, (6, 3, 4, 4), **options)
    assert any("needs pairs=True" in told for told in raised.value.__notes__)
