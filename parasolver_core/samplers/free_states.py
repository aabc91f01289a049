"""The states that noise alone makes: what a state is made of beside ``x_T`` and the predictions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from array_api_compat import array_namespace

from parasolver_core.arrays import Array
from parasolver_core.samplers.held_form import HeldForm, Indices
from parasolver_core.samplers.noise import NoiseSource

_DRAWN = 2**24  # numbers that are drawn at once


def states_of_noise(form: HeldForm, noise: NoiseSource, samples: Indices, like: Array) -> Iterator[Array]:
    """The N + 1 states (B, size) if ``x_T`` and all predictions were 0. A state at a time: all of them may not fit.

    Args:
        form: the sampler.
        noise: its source; what it keeps of these draws is let go.
        samples: (B,), places in the batch.
        like: (B, size), gives dtype, device and library.
    """
    states = [array_namespace(like).zeros_like(like)]
    yield states[0]
    for i, z in enumerate(_draws(form, noise, samples, like.shape[1])):
        new = states[0] * float(form.a[i, 0])
        for k in range(1, min(len(states), form.reads[0])):
            new = new + states[k] * float(form.a[i, k])
        if z is not None:
            new = new + z * float(form.c[i])
        states = [new, *states][: form.reads[0]]
        yield new


def _draws(form: HeldForm, noise: NoiseSource, samples: Indices, size: int) -> Iterator[Array | None]:
    """z of each step, (B, size), or None where it adds none. Drawn for many steps at once, as memory allows."""
    count, c, owners = len(samples), form.c, samples.tolist()
    most = max(_DRAWN // (count * size), 1)
    for first in range(0, len(c), most):
        steps = range(first, min(first + most, len(c)))
        noisy = [i for i in steps if c[i] != 0]
        wanted = [(i, sample) for i in noisy for sample in owners]
        z = noise.block(wanted) if wanted else None
        for at in wanted:
            noise.release(*at)
        place = np.cumsum(c[first : first + len(steps)] != 0) - 1
        for row, i in zip(place.tolist(), steps, strict=True):
            yield None if z is None or c[i] == 0 else z[row * count : (row + 1) * count, :]
