"""What all tests share: one thread a process, hypothesis profiles, and the array libraries."""

import os
from collections.abc import Iterator

os.environ["OMP_NUM_THREADS"] = "1"  # before NumPy or PyTorch is loaded; both obey it

from types import ModuleType

import pytest
from hypothesis import settings

from tests.arrays import LIBRARIES, load

settings.register_profile("ci", derandomize=True, max_examples=25, deadline=None)
settings.register_profile("thorough", max_examples=500, deadline=None)
settings.load_profile("ci")


# Session scope, so that hypothesis accepts it next to @given.
@pytest.fixture(scope="session", params=LIBRARIES)
def xp(request: pytest.FixtureRequest) -> ModuleType:
    """Each test that takes `xp` runs once on every array library."""
    return load(request.param)


@pytest.fixture
def quiet_diffusers() -> Iterator[None]:
    """diffusers tells of every dtype and every option through its logger."""
    from diffusers import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)
