"""What follows from the changes of a sample whose nodes are spread, step by step."""

import numpy as np
import pytest

from parasolver_core import DDIM, DDPM, NoiseSchedule, StepRule
from parasolver_core.methods.levels import Levels, interpolation
from parasolver_core.methods.refinement import Aims, Refinement, Verdict

SCHEDULE = NoiseSchedule.linear()
WANTED, TOLERANCE = 0.05, 0.08


def sweep(sample: Refinement, change: float, midpoints: float = 0.0) -> Verdict:
    """All nodes are evaluated, in one round, and all have moved since."""
    sample.picked = np.arange(len(sample.level.nodes))
    return sample.after(np.ones(len(sample.picked)), change, midpoints)


def measured(rule: StepRule, change: float, midpoints: float) -> tuple[Refinement, Verdict]:
    """A sample after the first sweep over the level of the first midpoints, which moved all nodes and changed it so."""
    recurrence = rule.recurrence(SCHEDULE.timesteps(400))
    aims, levels = Aims(recurrence, 200, WANTED, TOLERANCE, rounding=1e-16), Levels(recurrence)
    sample = Refinement(aims, levels.opening(aims.first))
    sweep(sample, 0.5)
    for level in (levels.first(aims.first), levels.finer(levels.first(aims.first))):
        known = np.isin(level.nodes, sample.level.nodes)
        sample.refine(level, interpolation(level.nodes, sample.level.nodes), known)
        verdict = sweep(sample, change, midpoints)
    return sample, verdict


@pytest.mark.parametrize("rule", [DDIM(SCHEDULE), DDPM(SCHEDULE)], ids=["without noise", "with noise"])
def test_all_further_levels_together_add_what_the_midpoints_tell(rule: StepRule) -> None:
    """A third of it, a ninth, .. without noise, of which twice as much is feared; a half, a quarter, .. with noise."""
    sample, verdict = measured(rule, change=0.001, midpoints=0.06)
    assert verdict is Verdict.CONVERGED
    assert sample.error == pytest.approx(0.06 * WANTED / TOLERANCE)


def test_a_change_counts_five_times() -> None:
    sample, verdict = measured(DDIM(SCHEDULE), change=0.015, midpoints=0.06)
    assert verdict is Verdict.CONVERGED
    assert sample.error == pytest.approx(5 * 0.015 * WANTED / TOLERANCE)
    sample, verdict = measured(DDIM(SCHEDULE), change=0.0161, midpoints=0.06)  # a fifth of the tolerance is 0.016
    assert verdict is Verdict.GO_ON


def test_midpoints_that_tell_more_than_the_tolerance_ask_for_a_finer_level() -> None:
    _, verdict = measured(DDIM(SCHEDULE), change=0.001, midpoints=1.01 * TOLERANCE)
    assert verdict is Verdict.REFINE


def test_an_effect_that_grows_is_told_larger() -> None:
    """The changes after a level's first sweep were three times that sweep's: so is what is left."""
    sample, verdict = measured(DDIM(SCHEDULE), change=0.03, midpoints=0.02)
    assert verdict is Verdict.GO_ON
    for change, growth in ((0.09, 3.0), (0.015, 3.5)):
        verdict = sweep(sample, change)
        assert sample.error == pytest.approx(max(5 * change, 0.02 * growth) * WANTED / TOLERANCE)
    assert verdict is Verdict.CONVERGED
