"""What an error in a state becomes in the sample, by the table and on networks whose answer is known."""

import numpy as np
import pytest

from parasolver_core import DDIM, DDPM, DPMSolver, Euler, NoiseSchedule, StepRule, solve, solve_sequential
from parasolver_core.rounds.acceptance import RelativeMove, RoundView
from parasolver_core.rounds.margins import Margins
from tests.core.problems import TanhNetwork, normal, relative

SCHEDULE = NoiseSchedule.linear()


@pytest.mark.parametrize("eta", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("steps", [15, 100])
def test_the_share_of_added_noise_is_eta_squared(eta: float, steps: int) -> None:
    table = DDIM(SCHEDULE, eta=eta).recurrence(SCHEDULE.timesteps(steps))
    assert table.noise_share == pytest.approx(eta**2, abs=1e-12)


@pytest.mark.parametrize(
    ("rule", "share"),
    [(DDPM(SCHEDULE), 1.0), (DPMSolver(SCHEDULE, 2, stochastic=True), 1.0), (DPMSolver(SCHEDULE), 0.0)],
)
def test_the_share_of_other_samplers(rule: StepRule, share: float) -> None:
    assert rule.recurrence(SCHEDULE.timesteps(50)).noise_share == pytest.approx(share, abs=1e-9)


def test_influence_of_flow_and_diffusion() -> None:
    """1 / alpha without noise, 1 with all of it, a power in between."""
    timesteps = SCHEDULE.timesteps(50)
    alpha = np.maximum(np.sqrt(SCHEDULE.alphas_cumprod[timesteps]), 0.01)
    np.testing.assert_allclose(DDIM(SCHEDULE).recurrence(timesteps).influence, 1 / alpha)
    np.testing.assert_allclose(DDPM(SCHEDULE).recurrence(timesteps).influence, 1.0)
    np.testing.assert_allclose(DDIM(SCHEDULE, eta=0.5).recurrence(timesteps).influence, alpha**-0.75)
    assert np.all(Euler(NoiseSchedule.flow_matching()).recurrence(np.linspace(1, 0.1, 10)).influence >= 1)


def test_accepted_moves_are_weighed_by_the_root_of_the_influence() -> None:
    timesteps = SCHEDULE.timesteps(50)
    alpha = np.sqrt(SCHEDULE.alphas_cumprod[timesteps])
    accept = RelativeMove(Margins(factor=0.15, noisy_factor=0.05))
    bounds = accept.bounds(DDIM(SCHEDULE).recurrence(timesteps))
    np.testing.assert_allclose(bounds[alpha > 0.01], 0.15 * np.sqrt(alpha[alpha > 0.01]))
    np.testing.assert_allclose(accept.bounds(DDPM(SCHEDULE).recurrence(timesteps)), 0.05)


def test_margins_shrink_at_loose_tolerances() -> None:
    recurrence = DDIM(SCHEDULE).recurrence(SCHEDULE.timesteps(50))
    accept = RelativeMove(Margins(factor=0.2, spread=3.0, loosest=0.1))
    for tolerance, trusted in ((1e-7, 1.0), (0.3, 0.5), (0.8, 1 / 3)):
        moves = np.array([0.0, 1.0, 1.0]) * tolerance * trusted
        for grown, count in ((0.999, 3), (1.001, 1)):
            view = RoundView(
                lo=0, move=grown * moves, size=np.ones(3), bound=np.ones(3), rounding=0.0, smallness=np.ones(3)
            )
            assert accept.accept(view, tolerance)[0] == pytest.approx(count)
        assert accept.spread_tolerance(recurrence, tolerance) == pytest.approx(3 * tolerance)


@pytest.mark.parametrize("wrong", [{"factor": 0.0}, {"spread": -1.0}, {"loosest": float("nan")}])
def test_wrong_margins_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        Margins(**wrong)


@pytest.mark.parametrize("eta", [0.1, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("window", [8, 40])
def test_little_noise_is_not_taken_for_much(eta: float, window: int) -> None:
    """Early errors are forgotten only as far as noise is added."""
    arguments = (TanhNetwork(), normal((8, 6)), SCHEDULE.timesteps(60), DDIM(SCHEDULE, eta=eta))
    exact = solve_sequential(*arguments, seed=2).sample
    got = solve(*arguments, window, tolerance=1e-2, seed=2).sample
    assert max(relative(one, other) for one, other in zip(got, exact, strict=True)) < 1e-2
