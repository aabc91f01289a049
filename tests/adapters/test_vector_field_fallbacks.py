"""What cannot be integrated in parallel is found and told, and what was reached is kept."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from parasolver_adapters.vector_field import SequentialFallbackWarning, integrate, odeint, solve_ivp
from parasolver_core.errors import NonFiniteError
from parasolver_core.solution import Status
from tests.adapters.vector_fields import START, TIMES, close, pendulum


def test_field_that_branches_on_time_is_integrated_one_step_after_another() -> None:
    def field(t: Any, y: Any) -> Any:
        return -y if float(t) < 3 else y

    with pytest.warns(SequentialFallbackWarning, match="at many times at once"):
        found = integrate(field, START, TIMES)
    assert found.batching == "loop"
    assert found.linearization == "sequential"
    close(found.states, odeint(field, START, TIMES, linearization="sequential"), 1e-15)


def test_batching_by_a_loop_is_what_was_asked_for() -> None:
    """It once was tried out, and the field blamed for it without a reason."""
    found = integrate(pendulum, START, TIMES, batching="loop")
    assert (found.batching, found.linearization, found.calls) == ("loop", "sequential", 1200)
    np.testing.assert_array_equal(found.states, odeint(pendulum, START, TIMES, linearization="sequential"))


def test_chaos_falls_back_exactly_and_says_so() -> None:
    def lorenz(t: Any, y: Any) -> Any:
        return np.stack([10 * (y[1] - y[0]), y[0] * (28 - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]])

    y0, t = np.array([1.0, 1.0, 1.0]), np.linspace(0, 20, 1001)
    with pytest.warns(SequentialFallbackWarning, match="one after another"):
        found = integrate(lorenz, y0, t)
    expected = integrate(lorenz, y0, t, linearization="sequential")
    assert found.success
    assert "one after another" in found.message
    assert found.calls <= 1.2 * expected.calls
    close(found.states, expected.states, 1e-6)  # an error of 1e-16 grows by about 1e8 in 20 units


@pytest.mark.parametrize("field", [lambda t, y: -y * float(t), lambda t, y: -300.0 * (y - np.cos(t))])
@pytest.mark.parametrize(
    "call",
    [
        lambda f: odeint(f, np.array([0.1]), np.linspace(0, 1, 201), method="euler"),
        lambda f: integrate(f, np.array([0.1]), np.linspace(0, 1, 201), method="euler"),
        lambda f: solve_ivp(f, (0, 1), [0.1], "euler", steps=200),
    ],
)
def test_warnings_name_the_line_of_the_caller(call: Any, field: Any) -> None:
    """Some once named lines of the library, where Python shows only the first of all warnings."""
    with pytest.warns(SequentialFallbackWarning) as seen:
        call(field)
    assert [(one.filename, one.lineno) for one in seen] == [(__file__, call.__code__.co_firstlineno)]


@pytest.mark.parametrize("window", [None, 750])
def test_windows_where_newton_leaves_its_basin(window: int | None) -> None:
    def lorenz(t: Any, y: Any) -> Any:
        return np.stack([10 * (y[1] - y[0]), y[0] * (28 - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]])

    y0, t = np.array([1.0, 1.0, 1.0]), np.linspace(0, 20, 3001)
    found = integrate(lorenz, y0, t, window=window)
    assert found.windows > 2
    assert found.sequential_steps == 0
    close(found.states, odeint(lorenz, y0, t, linearization="sequential"), 1e-8)


def test_explicit_method_on_a_stiff_field_gives_what_the_method_gives() -> None:
    t = np.linspace(0, 1, 201)
    with pytest.warns(SequentialFallbackWarning, match="one after another"):
        found = odeint(lambda t, y: -300.0 * (y - np.cos(t)), np.array([0.0]), t, method="euler")
    expected = odeint(
        lambda t, y: -300.0 * (y - np.cos(t)), np.array([0.0]), t, method="euler", linearization="sequential"
    )
    close(found, expected)


def test_nan_names_time_and_sample() -> None:
    def field(t: Any, y: Any) -> Any:
        return np.where((t > 4) & (np.arange(6).reshape(3, 2) == 3), np.nan, -y)

    with (
        pytest.warns(SequentialFallbackWarning),
        pytest.raises(NonFiniteError, match=r"t = 4\.\d+ for sample 1") as info,
    ):
        odeint(field, np.ones((3, 2)), TIMES)
    assert np.all(np.isfinite(info.value.solution.states[:201]))  # type: ignore[union-attr]
    with pytest.warns(SequentialFallbackWarning):
        found = integrate(field, np.ones((3, 2)), TIMES, throw=False)
    assert found.status is Status.NONFINITE_MODEL
    assert not found.success


def test_overflow_of_the_solution_is_told_apart_from_nan_of_the_field() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SequentialFallbackWarning)
        found = integrate(lambda t, y: y**2, np.array([10.0]), TIMES, throw=False)
    assert found.status in (Status.NONFINITE_SOLVER, Status.NONFINITE_MODEL)
    assert "t = " in found.message


class RefusingError(Exception):
    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "solution":
            raise AttributeError(name)
        super().__setattr__(name, value)


@pytest.mark.parametrize("linearization", ["auto", "sequential"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError, StopIteration, RefusingError])
def test_what_was_reached_is_there_after_an_exception(linearization: Any, kind: type[BaseException]) -> None:
    """All states found before the field raised once were lost."""
    expected = odeint(pendulum, START, TIMES, linearization="sequential")
    options: dict[str, Any] = {"linearization": linearization, "window": 100}
    calls = integrate(pendulum, START, TIMES, **options).calls
    reached = []
    for fatal in (1, 3, calls // 3, calls // 2, calls - 7):
        count = 0

        def field(t: Any, y: Any, fatal: int = fatal) -> Any:
            nonlocal count
            count += 1
            if count == fatal:
                raise kind("stop")
            return pendulum(t, y)

        with pytest.raises(kind, match="stop") as info:
            integrate(field, START, TIMES, **options)
        if kind is RefusingError:
            assert not hasattr(info.value, "solution")
            continue
        solution = info.value.solution  # type: ignore[attr-defined]
        assert solution.status is (Status.INTERRUPTED if kind is KeyboardInterrupt else Status.FAILED)
        assert len(solution.t) == len(solution.states)
        assert f"after {len(solution.t) - 1} of 300 steps" in solution.message
        np.testing.assert_array_equal(solution.t, TIMES[: len(solution.t)])
        close(solution.states, expected[: len(solution.t)])
        reached.append(len(solution.t))
    if kind is not RefusingError:
        assert reached[:2] == [1, 1]
        assert reached == sorted(reached)
        assert reached[-1] >= 298 if linearization == "sequential" else reached[-1] > 200


def test_what_was_reached_on_a_grid_with_substeps() -> None:
    count = 0

    def field(t: Any, y: Any) -> Any:
        nonlocal count
        count += 1
        if count > 4 * 25:
            raise KeyboardInterrupt
        return pendulum(t, y)

    with pytest.raises(KeyboardInterrupt) as info:
        integrate(field, START, TIMES, substeps=10, linearization="sequential")
    solution = info.value.solution  # type: ignore[attr-defined]
    np.testing.assert_array_equal(solution.t, TIMES[:3])
    whole = integrate(pendulum, START, TIMES, substeps=10, linearization="sequential")
    np.testing.assert_array_equal(solution.states, whole.states[:3])


def test_rounding_that_grows_is_announced() -> None:
    """Multistep methods have modes of their own, which nobody looked at: 1e-3 off, without a word."""

    def field(t: Any, y: Any) -> Any:
        return 60 * np.cos(0.7 * t) * y + np.sin(t)

    t, y0 = np.linspace(0, 15, 900), np.array([1.9, 2.5])
    with pytest.warns(SequentialFallbackWarning, match=r"rounding may grow to .* two ways to a trajectory differ"):
        found = integrate(field, y0, t, method="ab2")
    np.testing.assert_array_equal(found.states, odeint(field, y0, t, method="ab2", linearization="sequential"))


def test_wide_chaotic_state_in_windows_is_announced() -> None:
    """Every window was right, and the end was not: small errors of the first windows had grown."""

    def field(t: Any, y: Any) -> Any:
        return (np.roll(y, -1, -1) - np.roll(y, 2, -1)) * np.roll(y, 1, -1) - y + 8.0

    y0, t = 8 + np.random.default_rng(0).standard_normal(40), np.linspace(0, 12, 1801)
    with pytest.warns(SequentialFallbackWarning, match="one after another"):
        found = integrate(field, y0, t, window=100, method="heun3")
    expected = odeint(field, y0, t, linearization="sequential", method="heun3")
    np.testing.assert_array_equal(found.states, expected)


@pytest.mark.parametrize("steps", [200, 300])
@pytest.mark.parametrize("method", ["heun", "ab3"])
def test_field_that_acts_on_all_times_at_once(xp: Any, steps: int, method: str) -> None:
    """A norm over all that is given, too small to matter where it was tried: 0.168 was accepted for -0.168."""

    def field(t: Any, y: Any) -> Any:
        norm = xp.sqrt(xp.sum(y * y))
        turned = xp.stack([0.3 * y[..., 0] + 2 * y[..., 1], 0.3 * y[..., 1] - 2 * y[..., 0]], axis=-1)
        return turned / xp.where(norm > 3, norm, 3 + 0 * norm)

    y0, t = xp.asarray([0.5, 0.2], dtype=xp.float64), np.linspace(0, 1, steps + 1)
    with pytest.warns(SequentialFallbackWarning, match="f gave something else .* among other times than alone"):
        found = integrate(field, y0, t, method=method)
    assert found.sequential_steps == steps
    growth, angle = np.exp(0.1), 2 / 3
    exact = growth * np.array([0.5 * np.cos(angle) + 0.2 * np.sin(angle), 0.2 * np.cos(angle) - 0.5 * np.sin(angle)])
    np.testing.assert_allclose(np.from_dlpack(found.states)[-1], exact, rtol=2e-4)


@pytest.mark.parametrize("over", ["min", "mean"])
@pytest.mark.parametrize("sign", [1, -1])
def test_field_that_acts_on_all_times_at_once_in_one_stage(xp: Any, over: str, sign: int) -> None:
    """Beyond a threshold that only the end of the last step is behind: 1 was accepted for 1.125."""
    threshold = 0.9965  # the last step begins at 0.995

    def field(t: Any, y: Any) -> Any:
        value = getattr(xp, over)(sign * y)
        return sign * xp.where(value > threshold, 51.0 + 0 * y, 1.0 + 0 * y)

    y0, t = xp.zeros(3, dtype=xp.float64), np.linspace(0, 1, 201)
    with pytest.warns(SequentialFallbackWarning, match="f gave something else for t = 1 among other times than alone"):
        found = integrate(field, y0, t, method="heun")
    np.testing.assert_allclose(np.from_dlpack(found.states)[-1], sign * 1.125, rtol=1e-12)


def test_field_that_is_slow_and_acts_on_all_times_at_once(xp: Any) -> None:
    """In float32 what it changes is as small as rounding in each step, and in 600 of them 0.2 % of the answer."""

    def field(t: Any, y: Any) -> Any:
        norm = xp.sqrt(xp.sum(y * y))
        return -0.01 * y / xp.where(norm > 3, norm, 3 + 0 * norm)

    y0, t = 0.25 * xp.ones(3, dtype=xp.float32), np.linspace(0, 1, 601)
    with pytest.warns(SequentialFallbackWarning, match="f gave something else for t = 0 among other times than alone"):
        found = integrate(field, y0, t, method="euler")
    np.testing.assert_allclose(np.from_dlpack(found.states)[-1], 0.25 * np.exp(-0.01 / 3), rtol=1e-5)


def test_gradient_of_a_field_that_acts_on_all_times_at_once() -> None:
    y0 = torch.tensor([0.5, 0.2], dtype=torch.float64, requires_grad=True)

    def gradient(linearization: Any) -> Any:
        y = odeint(lambda t, y: -y / torch.clamp(y.norm(), min=3.0), y0, TIMES, linearization=linearization)
        return torch.autograd.grad(y[-1].sum(), y0)[0]

    with pytest.warns(SequentialFallbackWarning, match="among other times than alone"):
        found = gradient("auto")
    torch.testing.assert_close(found, gradient("sequential"))
    torch.testing.assert_close(found, torch.full((2,), np.exp(-2.0), dtype=torch.float64), rtol=1e-8, atol=0)
