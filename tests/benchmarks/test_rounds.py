"""The benchmark of rounds counts, and loads a checkout beside the one at hand; nothing here depends on time."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("torch")
import parasolver_core
from benchmarks import rounds

ROOT = Path(parasolver_core.__file__).parents[1]


@pytest.mark.parametrize(("sampler", "uploads"), [("DDIM", 3), ("2M", 3), ("DDPM", 4)])
def test_counts_do_not_depend_on_window_and_batch(sampler: str, uploads: int) -> None:
    now = rounds.Release("now")
    assert rounds.operations(now, sampler, 8, 1) == (16, uploads)
    assert rounds.operations(now, sampler, 8, 5) == rounds.operations(now, sampler, 16, 2) == (16, uploads)


def test_memory_on_the_accelerator_path_keeps_to_its_windows() -> None:
    assert 4 < rounds.memory(rounds.Release("now"), "DDIM", 16, 1) < 8


def test_another_checkout_is_loaded_beside_this_one() -> None:
    names = {name for name in sys.modules if name.startswith("parasolver_core")}
    other = rounds.Release("other", ROOT)
    assert other.core is not parasolver_core
    assert other.core.DDIM is not parasolver_core.DDIM
    assert sys.modules["parasolver_core"] is parasolver_core
    assert {name for name in sys.modules if name.startswith("parasolver_core")} == names
    found = rounds.own_times([other, rounds.Release("now")], 2, 1)
    assert found["other"][1:] == found["now"][1:]
    assert found["now"][0] > 0
