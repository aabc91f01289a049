"""What the tests of the adapters share."""

from collections.abc import Iterator

import pytest


@pytest.fixture
def quiet_diffusers() -> Iterator[None]:
    """diffusers tells of every dtype and every option through its logger."""
    from diffusers import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)
