"""A scheduler's clipping as a correction of the network's output: its weights, and what cannot be corrected."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers")
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from parasolver_adapters.bands import PROBES
from parasolver_adapters.diffusers import UnsupportedSchedulerError, step_rule_from_scheduler
from parasolver_adapters.diffusers.schedulers import clipping
from parasolver_adapters.diffusers.schedulers.clipping import Clip, ClippingDenoiser
from parasolver_adapters.diffusers.schedulers.stepping import Loop, Node


def clip_of(p: Any, q: Any, w: Any, scale: Any = None, timesteps: Any = (9, 5, 2)) -> Clip:
    scale = np.ones(len(p)) if scale is None else scale
    return Clip(lambda h: h.clamp(-1, 1), np.array(p), np.array(q), np.array(w), np.array(scale), np.array(timesteps))


def test_an_output_is_corrected_by_what_is_clipped() -> None:
    clip = clip_of([2.0, 1.0, 0.5], [3.0, 4.0, -1.0], [0.5, 0.25, 2.0], [1.0, 2.0, 4.0])
    x, m = torch.tensor([[0.1, 1.0]]), torch.tensor([[0.2, -1.5]])
    # h = 2 x + 3 m = 0.8, -2.5 at the first node: the second is clipped by 1.5, of which half counts
    torch.testing.assert_close(clip.correct(0, x, m), torch.tensor([[0.2, -0.75]]))
    # h = x + 4 m = 0.9, -5
    torch.testing.assert_close(clip.correct(1, x, m), torch.tensor([[0.2, -0.5]]))
    # h = x / 2 - m = -0.15, 2
    torch.testing.assert_close(clip.correct(2, x, m), torch.tensor([[0.2, -3.5]]))
    want = torch.stack([clip.correct(node, x, m) for node in (2, 0)])
    torch.testing.assert_close(clip.correct_all([2, 0], torch.stack([x, x]), torch.stack([m, m])), want)
    denoiser = ClippingDenoiser(lambda x, t, *rows: m.expand(len(x), 2), clip)
    scaled = torch.cat([x * clip.scale[node] for node in (2, 0, 1)])  # as the network sees the states
    got = denoiser(scaled, torch.tensor([2, 9, 5]))
    torch.testing.assert_close(got, torch.cat([clip.correct(node, x, m) for node in (2, 0, 1)]))


def test_a_clipping_denoiser_is_like_its_network() -> None:
    class Network:
        takes_rows = True
        prediction_type = "epsilon"

        def __call__(self, x: torch.Tensor, t: torch.Tensor, /, *rows: Any) -> torch.Tensor:
            assert rows == ("rows",)
            return x

    clip = clip_of([1.0], [1.0], [1.0], timesteps=[5])
    denoiser = ClippingDenoiser(Network(), clip)
    assert denoiser.takes_rows
    assert denoiser.prediction_type == "epsilon"
    x = torch.tensor([[3.0]])
    assert denoiser(x, torch.tensor([5]), "rows").tolist() == [[-2.0]]  # type: ignore[arg-type]
    plain = ClippingDenoiser(lambda x, t: x, clip)
    assert (plain.takes_rows, plain.prediction_type) == (False, None)


@pytest.mark.parametrize("clipped_output", [False, True])
@pytest.mark.parametrize("limit", [1.0, 2.5])
def test_the_weight_of_clipping_is_what_the_step_makes_of_the_clipped_sample(
    clipped_output: bool, limit: float
) -> None:
    """DDIM steps to ``alpha' h + sigma' eps``; its eps is that before clipping, or, by an option, that after it."""
    scheduler = DDIMScheduler(clip_sample=True, clip_sample_range=limit, timestep_spacing="trailing")
    read = step_rule_from_scheduler(scheduler, 10, clipping="denoiser", use_clipped_model_output=clipped_output)
    assert read.clip is not None
    products = scheduler.alphas_cumprod.double().numpy()
    now = products[read.timesteps]
    after = np.append(now[1:], 1.0)
    q = -np.sqrt(1 - now) / np.sqrt(now)
    want = 1 / q if clipped_output else np.sqrt(after) / (np.sqrt(after) * q + np.sqrt(1 - after))
    np.testing.assert_allclose(read.clip.p, 1 / np.sqrt(now), rtol=1e-5)
    np.testing.assert_allclose(read.clip.q, q, rtol=1e-5)
    np.testing.assert_allclose(read.clip.w, want, rtol=1e-4)
    assert read.clip.scale.tolist() == [1.0] * 10
    assert read.clip.function(torch.tensor([-9.0, 0.5, 9.0])).tolist() == [-limit, 0.5, limit]


def test_thresholding_is_the_schedulers_own() -> None:
    scheduler = DDPMScheduler(clip_sample=False, thresholding=True, sample_max_value=1.5)
    read = step_rule_from_scheduler(scheduler, 5, clipping="denoiser")
    assert read.clip is not None
    sample = torch.linspace(-3, 3, 60).reshape(1, 1, 6, 10)
    assert torch.equal(read.clip.function(sample), scheduler._threshold_sample(sample))
    assert read.clip.function(2 * sample).abs().max() <= 1


def test_clipping_is_switched_off_in_a_copy() -> None:
    scheduler = DDIMScheduler(clip_sample=True, thresholding=False)
    assert clipping.clips(scheduler) == ["clip_sample"]
    both = DDIMScheduler(clip_sample=True, thresholding=True)
    assert clipping.clips(both) == ["clip_sample", "thresholding"]
    step_rule_from_scheduler(both, 4, clipping="denoiser")
    assert clipping.clips(both) == ["clip_sample", "thresholding"]
    clipping.switch_off(both)
    assert clipping.clips(both) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"p": [2.0, 1.0, 2.0]}, None),
        ({"p": [2.0, 1.0, 2.0 + 1e-11]}, "visits a timestep twice"),
        ({"q": [1.0, 1.0, 3.0]}, "visits a timestep twice"),
        ({"w": [1.0, 1.0, 3.0]}, "visits a timestep twice"),
        ({"scale": [1.0, 1.0, 3.0]}, "visits a timestep twice"),
    ],
)
def test_nodes_of_one_timestep_have_to_clip_alike(changes: dict[str, Any], message: str | None) -> None:
    given: dict[str, Any] = {"p": [2.0, 1.0, 2.0], "q": [1.0] * 3, "w": [1.0] * 3, "scale": [1.0] * 3} | changes
    clip = clip_of(*given.values(), timesteps=[9, 5, 9])
    if message is None:
        clipping._check_unique(clip)
    else:
        with pytest.raises(UnsupportedSchedulerError, match=message):
            clipping._check_unique(clip)


@pytest.mark.parametrize(
    ("p", "q"), [([1.0, np.nan], [1.0, 1.0]), ([1.0, 1.0], [1.0, np.nan]), ([1.0, 1.0], [2.0, 0.0])]
)
def test_clipping_of_what_is_not_known_cannot_be_moved(p: Any, q: Any) -> None:
    loop = Loop(DDIMScheduler(clip_sample=True), (), {})
    read = step_rule_from_scheduler(DDIMScheduler(clip_sample=False), 2)
    path: Any = SimpleNamespace(p=np.array(p), q=np.array(q))
    with pytest.raises(UnsupportedSchedulerError, match=r"clip_sample of DDIMScheduler cannot be moved .* not known"):
        clipping.clip_of(loop, read.table, path)


def test_a_network_beyond_the_limits() -> None:
    """Its predicted clean samples are clipped, however far off the limits are."""
    clip = replace(clip_of([2.0, 1.0], [3.0, -4.0], [1.0, 1.0]), function=lambda h: h.clamp(-100, 100))
    network = clipping._beyond_the_limits(clip)
    for index in (0, 1):
        x = torch.linspace(-1, 2, 64, dtype=torch.float64).reshape(PROBES)
        node = Node(index, torch.tensor(3), x, 2 * x, None)
        h = float(clip.p[index]) * node.x + float(clip.q[index]) * network(node)
        assert 100 < h.abs().max() <= 200
        simple = replace(clip, p=np.zeros(2), q=np.ones(2))
        torch.testing.assert_close(h, clipping._beyond_the_limits(simple)(node))  # whatever makes it of the output
    free = clipping._beyond_the_limits(replace(clip, function=lambda h: h))(node)
    assert free.isfinite().all()


def test_all_rows_are_clipped_by_themselves() -> None:
    """As thresholding is, by the values of each sample."""
    by_sample = replace(
        clip_of([2.0, 1.0], [3.0, 4.0], [0.5, 0.25], timesteps=[9, 5]),
        function=lambda h: h / h.flatten(1).abs().amax(1).view(-1, 1, 1),
    )
    x, m = (torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    want = torch.stack([by_sample.correct(node, x[row], m[row]) for row, node in enumerate((1, 0))])
    torch.testing.assert_close(by_sample.correct_all([1, 0], x, m), want)


def test_clipping_where_nothing_is_clipped_leads_to_the_clipped_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step tells the weight, so it is that of a step that reads the clean sample only."""
    monkeypatch.setattr(clipping, "_function", lambda scheduler: lambda h: h)
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(4)
    read = step_rule_from_scheduler(scheduler)
    path: Any = SimpleNamespace(p=read.table.held[:, 0], q=read.table.held[:, 1])
    clip = clipping.clip_of(Loop(scheduler, tuple(scheduler.timesteps), {}), read.table, path)
    np.testing.assert_allclose(clip.w, 1 / read.table.held[:, 1], rtol=1e-12)


def test_clipping_that_decides_a_step_by_itself_cannot_be_moved() -> None:
    """The last step of this one leads from a level to the same one, so that its output counts only where it clips."""
    scheduler = DDIMScheduler(clip_sample=True, set_alpha_to_one=False)
    with pytest.raises(
        UnsupportedSchedulerError, match=r"cannot be moved into the denoiser.*step 5 .* is off its own fit"
    ):
        step_rule_from_scheduler(scheduler, 6, clipping="denoiser")


def test_a_step_of_several_outputs_that_reads_clean_samples_only() -> None:
    scheduler = DPMSolverMultistepScheduler(thresholding=True, solver_order=2)
    read = step_rule_from_scheduler(scheduler, 6, clipping="denoiser")
    assert read.clip is not None
    assert read.band[1] == 2
    np.testing.assert_allclose(read.clip.w * read.clip.q, np.ones(6), rtol=1e-6)


def test_limits_are_one_where_a_scheduler_names_none() -> None:
    function = clipping._function(SimpleNamespace(config={"clip_sample": True}))
    assert function(torch.tensor([-3.0, 0.5, 3.0])).tolist() == [-1.0, 0.5, 1.0]


class Thresholding:
    """Hands ``2 x + 3 m`` to its thresholding, but for the second step, whose sample is not linear, and the last."""

    def __init__(self, thresholding: bool) -> None:
        self.config, self.at = {"thresholding": thresholding}, -1

    def _threshold_sample(self, sample: torch.Tensor) -> torch.Tensor:
        return sample.clamp(-1, 1)

    def step(self, m: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> Any:
        self.at += 1
        if self.at == 2:
            return SimpleNamespace(prev_sample=x)
        clean = 2 * x + 3 * m
        return SimpleNamespace(prev_sample=self._threshold_sample(clean**2 if self.at == 1 else clean))


@pytest.mark.parametrize("thresholding", [True, False])
def test_the_clean_sample_is_what_is_handed_to_thresholding(thresholding: bool) -> None:
    loop = Loop(Thresholding(thresholding), tuple(torch.tensor([3, 2, 1])), {})
    path: Any = SimpleNamespace(p=np.array([7.0, 8.0, 9.0]), q=np.array([4.0, 5.0, 6.0]))
    p, q = clipping._before_thresholding(loop, path)
    np.testing.assert_allclose(p, [2.0 if thresholding else 7.0, 8.0, 9.0])
    np.testing.assert_allclose(q, [3.0 if thresholding else 4.0, 5.0, 6.0])
    assert path.p.tolist() == [7.0, 8.0, 9.0]
