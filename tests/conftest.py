"""What all tests share: one thread a process, hypothesis profiles, and the array libraries."""

import os
from collections.abc import Iterator

os.environ["OMP_NUM_THREADS"] = "1"  # before NumPy or PyTorch is loaded; both obey it

from types import ModuleType

import pytest
from hypothesis import settings

from tests.arrays import LIBRARIES, jax_in_64_bits, load

settings.register_profile("ci", derandomize=True, max_examples=25, deadline=None)
settings.register_profile("thorough", max_examples=500, deadline=None)
settings.load_profile("ci")

# JAX compiles each operation for each shape that it meets, which takes most of a test's time, and minutes of some.
_SLOW_LIBRARY = pytest.param("jax", marks=[pytest.mark.slow, pytest.mark.timeout(600)])


# Session scope, so that hypothesis accepts it next to @given.
@pytest.fixture(scope="session", params=[_SLOW_LIBRARY if name == "jax" else name for name in LIBRARIES])
def xp(request: pytest.FixtureRequest) -> ModuleType:
    """Each test that takes `xp` runs once on every array library."""
    return load(request.param)


@pytest.fixture(autouse=True)
def ways_of_jax(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """During each test whose `xp` JAX is, and no other: 64 bits, as other libraries have, and not many examples.

    What it has compiled is kept in memory, gigabytes after hundreds of examples.
    """
    callspec = getattr(request.node, "callspec", None)
    if callspec is None or callspec.params.get("xp") != "jax":
        yield
        return
    if hasattr(request.function, "hypothesis"):
        monkeypatch.setattr(request.function, "_hypothesis_internal_use_settings", settings.get_profile("ci"))
    with jax_in_64_bits():
        yield


@pytest.fixture
def quiet_diffusers() -> Iterator[None]:
    """diffusers tells of every dtype and every option through its logger."""
    from diffusers import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)
