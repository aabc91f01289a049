"""The benchmark of the adapter runs and counts; nothing here depends on time."""

import pytest

pytest.importorskip("typer")
pytest.importorskip("diffusers")

from benchmarks import pipelines

pytestmark = pytest.mark.usefixtures("quiet_diffusers")


def test_measures_rounds_and_the_rest() -> None:
    line = pipelines.measure(window=8, runs=1, size=8)
    assert 1 < line.rounds < pipelines.STEPS
    assert line.loop > 0
    assert line.round_passes == pytest.approx(line.round / line.loop)
    assert line.rest_passes == pytest.approx(line.rest / line.loop)


def test_memory_of_conditioning_does_not_grow_with_rounds() -> None:
    (few, some), (many, more) = (pipelines.peak_bytes(steps, size=8) for steps in (25, 200))
    assert more > 4 * some
    assert many < 2 * few  # it moves by some copies of the conditions, as garbage is collected now or later
