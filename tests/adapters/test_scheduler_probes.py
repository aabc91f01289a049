"""What is read of a scheduler that was probed: what it predicts, and the advice where it is not linear."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers")
import torch

from parasolver_adapters.bands import PROBES
from parasolver_adapters.diffusers.schedulers.probing import _prediction, _ratio, _refine, _start_size, _suspects


def loop(**config: Any) -> Any:
    return SimpleNamespace(scheduler=SimpleNamespace(config=config))


@pytest.mark.parametrize(
    ("config", "advice"),
    [
        ({}, ""),
        ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, ""),
        ({"rescale_betas_zero_snr": False, "prediction_type": "epsilon"}, ""),
        ({"variance_type": None}, ""),
        ({"variance_type": "fixed_small"}, ""),
        ({"solver_type": "bh1", "final_sigmas_type": "sigma_min"}, ""),
        ({"solver_type": "bh2", "final_sigmas_type": "zero"}, ""),
        ({"solver_type": "bh1", "final_sigmas_type": "zero"}, "; set solver_type='bh2' or final_sigmas_type="),
        ({"variance_type": "learned_range"}, "; with variance_type='learned_range' the network's output sets"),
        (
            {"rescale_betas_zero_snr": True, "prediction_type": "epsilon", "variance_type": "learned"},
            "; with rescale_betas_zero_snr the first alpha is 0: use prediction_type='v_prediction'; "
            "with variance_type='learned' the network's output sets",
        ),
    ],
    ids=str,
)
def test_advice_is_of_what_is_set(config: dict[str, Any], advice: str) -> None:
    got = _suspects(loop(**config))
    assert got.startswith(advice)
    assert bool(got) == bool(advice)


def test_the_size_of_a_start_is_at_least_that_of_noise() -> None:
    for sigma, size in ((14.6, 14.6), (0.5, 1.0), (torch.tensor(2.5), 2.5)):
        assert _start_size(SimpleNamespace(scheduler=SimpleNamespace(init_noise_sigma=sigma))) == size  # type: ignore[arg-type]
    assert _start_size(loop()) == 1.0


def test_a_scaled_input_is_a_number_times_the_state() -> None:
    x = torch.tensor([[1.0, -2.0], [3.0, 0.5]], dtype=torch.float64)
    assert _ratio(x, x) == 1.0
    assert _ratio(0.25 * x, x) == pytest.approx(0.25, rel=1e-12)
    beside = torch.tensor([[2.0, 1.0], [0.0, 0.0]], dtype=torch.float64)  # of which x has nothing
    assert _ratio(3 * x + beside, x) == pytest.approx(3.0, rel=1e-12)
    assert _ratio(x.clone(), x) == pytest.approx(1.0, rel=1e-12)


class Output:
    def __init__(self, clean: Any = None) -> None:
        self.pred_original_sample = clean


def test_the_clean_sample_is_as_the_step_itself_has_it() -> None:
    x, m = torch.randn(2, *PROBES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    node: Any = SimpleNamespace(x=x, m=m, index=1, scheduler=SimpleNamespace())
    before = (0.8, 0.6, 9.0, 9.0)
    assert _refine(before, node, m, Output()) == before
    assert _refine(before, node, m, object()) == before
    assert _refine(before, node, m, Output(torch.zeros(5, dtype=torch.float64))) == before  # of another shape
    assert _refine(before, node, m, Output(torch.clamp(3 * x, -1, 1))) == before  # not linear
    assert _refine(before, node, m, Output(1.25 * x - 0.75 * m)) == pytest.approx((0.8, 0.6, 1.25, -0.75), rel=1e-9)
    node.scheduler = SimpleNamespace(
        sigmas=[5.0, 2.0, 1.0], precondition_outputs=lambda x, m, sigma: x / sigma + sigma * m
    )
    assert _refine(before, node, m, Output()) == pytest.approx((0.8, 0.6, 0.5, 2.0), rel=1e-9)
    assert _refine(before, node, m, Output(x - m)) == pytest.approx((0.8, 0.6, 1.0, -1.0), rel=1e-9)


@pytest.mark.parametrize(
    ("config", "alpha", "sigma", "expected"),
    [
        ({"prediction_type": "epsilon"}, 0.8, 0.6, (1 / 0.8, -0.6 / 0.8)),
        ({"prediction_type": "sample"}, 0.8, 0.6, (0.0, 1.0)),
        ({"prediction_type": "v_prediction"}, 0.8, 0.6, (0.8, -0.6)),
        ({"prediction_type": "flow_prediction"}, 0.75, 0.25, (1.0, -0.25)),
        ({}, 0.75, 0.25, (1.0, -0.25)),  # a linear path tells a velocity
        ({}, 0.75, 0.25 + 1e-7, (1.0, -0.25)),
        ({}, 0.75, 0.25 + 1e-5, (np.nan, np.nan)),
        ({}, 0.75, 0.25 - 1e-5, (np.nan, np.nan)),
        ({"prediction_type": "other"}, 0.75, 0.25, (np.nan, np.nan)),
    ],
    ids=str,
)
def test_what_the_network_predicts_by_configuration(config: Any, alpha: float, sigma: float, expected: Any) -> None:
    got = _prediction(loop(**config).scheduler, alpha, sigma)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
