"""The noise of stochastic step rules: known in advance, so that parallel and sequential sampling follow one path."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, TypeAlias

import array_api_compat
import numpy as np
from numpy.typing import NDArray

from parasolver_core.arrays import Array, given_back, host_view, is_array, to_host, uploaded
from parasolver_core.samplers.seeded import SeededNoise
from parasolver_core.samplers.seeded import draw as draw
from parasolver_core.validation import check_plain, check_width

NoiseFn: TypeAlias = Callable[[int, int], Array]
Seed: TypeAlias = int | Sequence[int]


class NoiseSource:
    """Standard normal noise ``z`` of every (step, sample), each drawn once and kept until it is no longer needed.

    Args:
        like: ``x_T``, ``(batch, *event)``: gives shape, device and array library.
        dtype: dtype of the noise handed out.
        steps: number of steps of the recurrence.
        seed: one integer, or one for each sample; see :func:`draw`.
        noise: instead of a seed, an array ``(steps, batch, *event)`` or a function ``noise(step, sample) -> (*event)``,
            which may be called in any order and gives the same numbers each time.
    """

    def __init__(self, like: Array, dtype: Any, steps: int, seed: Seed | None, noise: Array | NoiseFn | None) -> None:
        self._xp = array_api_compat.array_namespace(like)
        self._like, self._dtype = like, dtype
        batch = like.shape[0]
        if seed is not None and noise is not None:
            raise ValueError("noise: give either seed or noise, not both; noise already fixes every draw")
        if noise is not None and not callable(noise):
            check_plain("noise", noise, native=False)
            expected = (steps, batch, *like.shape[1:])
            got = tuple(noise.shape) if is_array(noise) else type(noise).__name__
            if got != expected:
                raise ValueError(
                    f"noise: expected an array of shape (steps, batch, *event) = {expected}, got {got}; for random "
                    "numbers give a seed, or a function noise(step, sample)"
                )
            _check_numbers("noise:", noise)
        self._noise: Any = noise
        self._first: tuple[tuple[int, int], Array] | None = None  # what a function gave first, until it is asked again
        self._asked_again = False
        self._keys = _sample_keys(0 if seed is None else seed, batch)
        self._event, self._device = tuple(like.shape[1:]), array_api_compat.device(like)
        self._size = math.prod(self._event)
        self._seeded = SeededNoise(self._keys, self._size, _host_dtype(self._xp, dtype))
        self._host = host_view(self._xp.zeros(0, dtype=dtype, device=self._device))  # as states of a window will be
        self._kept: dict[tuple[int, int], Array] = {}

    def __call__(self, step: int, sample: int) -> Array:
        """``z`` of one step and sample, shape ``(*event)``."""
        return self._xp.reshape(given_back(self._xp, self.flat(step, sample)), self._event)

    def flat(self, step: int, sample: int) -> Array:
        """The same numbers, (size,), as :func:`~parasolver_core.arrays.host_view` gives them; read in every round."""
        at = (step, sample)
        if at not in self._kept:
            self._kept[at] = self._draw(step, sample)
        return self._kept[at]

    def block(self, wanted: Sequence[tuple[int, int] | None]) -> Array:
        """The draws of these (step, sample) as rows, (len(wanted), size); zeros for None; one upload."""
        if self._noise is None:
            drawn = np.zeros((len(wanted), self._size), dtype=_host_dtype(self._xp, self._dtype))
            self._seeded.fill(drawn, [(row, *at) for row, at in enumerate(wanted) if at is not None])
            on_host = isinstance(self._host, np.ndarray)
            return drawn if on_host else uploaded(self._xp, drawn, self._device)
        known = [None if at is None else self.flat(*at) for at in wanted]
        rows = [self._nothing if row is None else row for row in known]
        return array_api_compat.array_namespace(rows[0]).stack(rows)

    @cached_property
    def _nothing(self) -> Array:
        return host_view(self._xp.zeros(self._size, dtype=self._dtype, device=self._device))

    def fingerprint(self, steps: Sequence[int]) -> str:
        """What tells two sources apart, short: the seeds, or a hash of the array, or of what a function gives.

        Args:
            steps: of which steps a function is asked, for every sample; it is not asked again.
        """
        if self._noise is None:
            keys = ", ".join(f"{seed}/{sample}" for seed, sample in self._keys)
            return f"seeds {keys}" if len(keys) < 100 else hashlib.sha256(keys.encode()).hexdigest()[:16]
        if not callable(self._noise):
            return hashlib.sha256(np.ascontiguousarray(to_host(self._noise)).tobytes()).hexdigest()[:16]
        digest, batch = hashlib.sha256(), self._like.shape[0]
        for step, sample in itertools.product(steps, range(batch)):
            digest.update(np.ascontiguousarray(to_host(self.flat(step, sample))).tobytes())
        name = getattr(self._noise, "__qualname__", type(self._noise).__qualname__)
        return f"function {name} {digest.hexdigest()[:16]}"

    def forget(self, step: int, sample: int) -> None:
        """Free the noise of a step that is final."""
        self._kept.pop((step, sample), None)
        self._seeded.forget(step, sample)

    @property
    def held(self) -> list[tuple[int, int]]:
        """The (step, sample) of all noise that takes memory."""
        return [*self._kept, *self._seeded.drawn]

    def forget_before(self, steps: NDArray[np.int64]) -> None:
        """Free the noise of all final steps: of each sample, (batch,), how many are."""
        final = steps.tolist()
        for step, sample in [at for at in self.held if at[0] < final[at[1]]]:
            self.forget(step, sample)

    def release(self, step: int, sample: int) -> None:
        """Free the noise of a step if it can be had again; what a user's function gave cannot."""
        if not callable(self._noise):
            self.forget(step, sample)

    @property
    def slow(self) -> bool:
        """Whether draws are worth to be made :meth:`ahead`; a user's function is only called where it is asked for."""
        return self._noise is None and self._seeded.slow

    def ahead(self, wanted: Sequence[tuple[int, int]]) -> AbstractContextManager[None]:
        """As :meth:`SeededNoise.ahead <parasolver_core.samplers.seeded.SeededNoise.ahead>`."""
        return self._seeded.ahead(wanted)

    def _draw(self, step: int, sample: int) -> Array:
        z = self._noise
        if z is None:
            z = self._seeded(step, sample)
            return z.astype(self._host.dtype) if isinstance(self._host, np.ndarray) else self._converted(z)
        return self._asked(step, sample) if callable(z) else self._converted(z[step, sample, ...])

    def _converted(self, z: Array) -> Array:
        """A copy, (size,), as the solver reads it."""
        if type(z) is type(self._like):
            z = array_api_compat.to_device(self._xp.astype(z, self._dtype), self._device)
        else:
            z = uploaded(self._xp, _own(z), self._device, self._dtype)
        return host_view(self._xp.reshape(z, (-1,)))

    def _asked(self, step: int, sample: int) -> Array:
        """What the user's function gives; the first is asked for again after the second, and has to be the same."""
        z = self._converted(self._called(step, sample))
        if self._first is None:
            self._first = (step, sample), z
        elif not self._asked_again:
            self._asked_again, (at, known) = True, self._first
            xp: Any = array_api_compat.array_namespace(known)
            if not bool(xp.all(self._converted(self._called(*at)) == known)):
                raise ValueError(
                    f"noise: noise{at} gave other numbers when it was called again. It has to depend on (step, sample) "
                    "alone, as it is called in another order than in the plain loop; for example "
                    "np.random.default_rng((seed, step, sample)).standard_normal(shape)"
                )
        return z

    def _called(self, step: int, sample: int) -> Array:
        """What the user's function returns, if it is noise."""
        try:
            z = self._noise(step, sample)
        except StopIteration as error:  # it would end a loop of ours in silence
            raise RuntimeError(
                f"noise: noise({step}, {sample}) raised StopIteration. It is called once or more for any step and "
                "sample in any order; give a function of (step, sample), or the array of all noise"
            ) from error
        got = tuple(z.shape) if is_array(z) else type(z).__name__
        if got != self._event:
            raise ValueError(f"noise: noise({step}, {sample}) must return an array of shape {self._event}, got {got}")
        check_plain(f"noise: noise({step}, {sample})", z, native=False)
        _check_numbers(f"noise: noise({step}, {sample})", z)
        return z


def _check_numbers(name: str, z: Array) -> None:
    """Noise is real and finite."""
    xp: Any = array_api_compat.array_namespace(z)
    if xp.isdtype(z.dtype, "complex floating"):
        raise TypeError(f"{name} holds complex numbers, dtype {z.dtype}; expected real ones")
    if not xp.isdtype(z.dtype, ("bool", "integral", "real floating")):
        raise TypeError(f"{name} holds {z.dtype}; expected real numbers")
    if xp.isdtype(z.dtype, "real floating"):
        check_width(name, z)
    if not bool(xp.all(xp.isfinite(z))):
        raise ValueError(f"{name} holds NaN or infinity")


def _own(z: Array) -> np.ndarray:
    """Noise of another library than ``x_T``'s; a copy, as a user's function may write the next into the same memory."""
    try:
        return np.array(to_host(z), dtype=np.float64)
    except TypeError as error:
        raise TypeError(f"noise: expected numbers that NumPy has, got {z.dtype} ({error}); pass float32") from error


def _sample_keys(seed: Seed, batch: int) -> list[tuple[int, int]]:
    """(seed, sample) of each sample: one seed numbers the samples, a list gives each sample a stream of its own."""
    numbers: list[Any] = [seed] if isinstance(seed, (int, np.integer)) else list(seed) if _is_list(seed) else [None]
    if any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) for n in numbers):
        raise TypeError(f"seed: expected an integer, or one for each sample, got {seed!r}")
    if not _is_list(seed):
        keys = [(int(numbers[0]), sample) for sample in range(batch)]
    elif len(numbers) == batch:
        keys = [(int(n), 0) for n in numbers]
    else:
        raise ValueError(f"seed: expected one integer, or {batch} of them (one for each sample), got {len(numbers)}")
    if any(not 0 <= key < 2**64 for key, _ in keys):
        raise ValueError(f"seed: expected integers in [0, 2**64), got {seed}")
    return keys


def _host_dtype(xp: Any, dtype: Any) -> Any:
    return np.dtype(f"f{xp.finfo(dtype).bits // 8}")


def _is_list(seed: Any) -> bool:
    if isinstance(seed, np.ndarray):
        return seed.ndim > 0
    return isinstance(seed, Sequence) and not isinstance(seed, str)
