"""Integration in parallel over time gives what the same method gives one step after another."""

import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parasolver_adapters.vector_field import SequentialFallbackWarning, integrate, odeint, solve_ivp
from parasolver_adapters.vector_field.grid import Grid
from parasolver_adapters.vector_field.methods import EXPONENTIAL, METHODS, RungeKutta, phi_functions
from parasolver_core.errors import NonFiniteError
from parasolver_core.solution import Status

torch = pytest.importorskip("torch")

TIMES = np.linspace(0.0, 6.0, 301)


def pendulum(t: Any, y: Any) -> Any:
    return np.stack([y[1], -np.sin(y[0]) - 0.1 * y[1] + 0.2 * np.cos(t)])


def torch_pendulum(t: Any, y: Any) -> Any:
    return torch.stack([y[1], -torch.sin(y[0]) - 0.1 * y[1] + 0.2 * torch.cos(t)])


def lotka_volterra(t: Any, y: Any) -> Any:
    return torch.stack([1.5 * y[0] - y[0] * y[1], y[0] * y[1] - 3 * y[1]])


def logistic(t: Any, y: Any) -> Any:
    return y * (1 - y) * (2 + np.sin(t))


def wave(t: Any, y: Any) -> Any:
    """A wide, weakly coupled state without a batch: 64 oscillators in a ring."""
    return np.roll(y, 1, axis=-1) * 0.3 - np.sin(y)


def batched_oscillators(t: Any, y: Any) -> Any:
    """States (batch, 2), time with axes that broadcast."""
    return torch.stack([y[..., 1], -torch.sin(y[..., 0])], dim=-1) * (1 + 0.1 * torch.sin(t))


START = np.array([1.0, 0.3])


def close(a: Any, b: Any, limit: float = 1e-11) -> None:
    a, b = np.asarray(a), np.asarray(b)
    assert np.all(np.isfinite(a))
    np.testing.assert_allclose(a, b, rtol=0, atol=limit * np.max(np.abs(b)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("linearization", ["full", "secant", "identity"])
def test_parallel_equals_sequential(method: str, linearization: Any) -> None:
    options: dict[str, Any] = {"method": method}
    expected = integrate(pendulum, START, TIMES, linearization="sequential", **options)
    found = integrate(pendulum, START, TIMES, linearization=linearization, **options)
    assert found.success
    assert found.sequential_steps == 0
    assert found.rounds > 0
    close(found.states, expected.states)


@pytest.mark.parametrize("method", EXPONENTIAL)
@pytest.mark.parametrize("linear", [-3.0, [-1.0, -40.0], [[0.0, 1.0], [-9.0, -0.5]]])
def test_exponential_methods(method: str, linear: Any) -> None:
    options: dict[str, Any] = {"method": method, "linear": linear}
    expected = integrate(pendulum, START, TIMES, linearization="sequential", **options)
    found = integrate(pendulum, START, TIMES, **options)
    assert found.sequential_steps == 0
    close(found.states, expected.states)


def test_stiff_elements_leave_the_others_accurate() -> None:
    """All elements once were squared as often as the stiffest, which left others right to eight digits only."""
    h, linear = np.array([0.01, 0.5]), np.array([-1e8, -1.0, 0.3])
    exp, phi_1, _ = phi_functions(h, linear)
    z = h[:, None] * linear
    np.testing.assert_allclose(exp, np.exp(z), rtol=1e-14, atol=0)
    np.testing.assert_allclose(phi_1, np.expm1(z) / linear, rtol=1e-13, atol=0)


def elementwise(t: Any, y: Any) -> Any:
    return np.cos(t) - 0.2 * y**2


def coupled_samples(t: Any, y: Any) -> Any:
    return np.sin(y).mean(axis=(-2, -1), keepdims=True) - y**3 / 9


@pytest.mark.parametrize("field", [elementwise, coupled_samples])
@pytest.mark.parametrize("linear", [[-30.0, -1.0], [[-30.0, 0.5], [-0.5, -1.0]]])
@pytest.mark.parametrize("linearization", ["full", "diagonal"])
def test_linear_part_of_states_in_a_batch(field: Any, linear: Any, linearization: Any) -> None:
    """The linear part once was added to Jacobians of another shape, and left out of what couples samples."""
    y0 = np.array([[1.0, -0.5], [0.2, 0.8], [-1.0, 0.4]])
    options: dict[str, Any] = {"method": "etdrk2", "linear": linear}
    found = integrate(field, y0, TIMES / 2, linearization=linearization, **options)
    assert found.sequential_steps == 0
    close(found.states, integrate(field, y0, TIMES / 2, linearization="sequential", **options).states)


@pytest.mark.parametrize("name", ["euler", "midpoint", "heun", "heun3", "rk4"])
def test_equals_torchdiffeq(name: str) -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    y0 = torch.tensor([1.0, 1.0], dtype=torch.float64)
    t = torch.linspace(0, 5, 401, dtype=torch.float64) ** 1.2
    expected = torchdiffeq.odeint(lotka_volterra, y0, t, method={"heun": "heun2"}.get(name, name))
    close(odeint(lotka_volterra, y0, t, method=name), expected, 1e-10)
    backwards = torchdiffeq.odeint(torch_pendulum, y0, t.flip(0), method={"heun": "heun2"}.get(name, name))
    close(odeint(torch_pendulum, y0, t.flip(0), method=name), backwards, 1e-10)


ORDERS = [*[(name, None) for name in METHODS], *[(name, -1.0) for name in EXPONENTIAL]]


@pytest.mark.parametrize(("method", "linear"), ORDERS)
def test_order_is_the_declared_one(method: str, linear: float | None) -> None:
    """y' = -y + cos(t) y^2 / 2 from 1: 1/y = u obeys u' = u - cos(t) / 2."""
    declared = EXPONENTIAL[method] if linear is not None else METHODS[method].order

    def field(t: Any, y: Any) -> Any:
        return np.cos(t) * y**2 / 2 - (y if linear is None else 0.0)

    end = 3.0
    u = (np.cos(end) - np.sin(end)) / 4 + 0.75 * np.exp(end)
    counts = np.array([128, 256, 512] if not method.startswith("rk4") else [64, 96, 128])
    errors = []
    for n in counts:
        t = np.linspace(0, end, n + 1)
        y = odeint(field, np.array([1.0]), t, method=method, linear=linear)
        errors.append(abs(y[-1, 0] - 1 / u))
    slopes = [np.log(a / b) / np.log(m / n) for (a, b), (n, m) in zip(pairwise(errors), pairwise(counts), strict=True)]
    assert slopes[-1] == pytest.approx(declared, abs=0.15)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_grid_size_and_method(data: st.DataObject) -> None:
    n = data.draw(st.integers(0, 260))
    backwards, size = data.draw(st.booleans()), data.draw(st.integers(1, 3))
    method = data.draw(st.sampled_from(sorted(METHODS)))
    window = data.draw(st.sampled_from([None, 70, 128]))
    steps = data.draw(st.lists(st.floats(0.5, 2.0), min_size=n, max_size=n))
    t = 0.02 * np.cumsum([0.0, *steps])
    if backwards:
        t = -t
    rng = np.random.default_rng(data.draw(st.integers(0, 100)))
    y0, A = rng.standard_normal(size), 0.5 * rng.standard_normal((size, size))

    def field(t: Any, y: Any) -> Any:
        return np.tanh(y @ A) - 0.3 * y + np.sin(t)

    expected = odeint(field, y0, t, method=method, linearization="sequential")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(odeint(field, y0, t, method=method, window=window, few_steps="sequential"), expected)


def test_field_stays_inside_the_interval_and_y0_is_not_changed() -> None:
    seen: list[Any] = []

    def field(t: Any, y: Any) -> Any:
        seen.append(np.ravel(t))
        return logistic(t, y)

    y0 = np.array([0.3, 0.2, 0.9])
    for t in (np.linspace(1.0, 7.3, 413), np.linspace(7.3, 1.0, 413)):
        for method in METHODS:
            odeint(field, y0, t, method=method)
    times = np.concatenate(seen)
    assert times.min() >= 1.0
    assert times.max() <= 7.3
    np.testing.assert_array_equal(y0, [0.3, 0.2, 0.9])


@pytest.mark.parametrize(
    ("field", "y0", "batching", "linearization"),
    [
        (torch_pendulum, torch.tensor([1.0, 0.0]), "trailing", "full"),
        (batched_oscillators, torch.linspace(-1, 1, 8).reshape(4, 2), "column", "full"),
        (
            lambda t, y: torch.tanh(y @ torch.ones(3, 3) / 3) - y,
            torch.linspace(-1, 1, 15).reshape(5, 3),
            "column",
            "full",
        ),
        (lambda t, y: y * torch.sin(t), torch.linspace(-1, 1, 50), "column", "diagonal"),
        (lambda t, y: -torch.nn.functional.linear(y, torch.eye(2)).flatten(1), torch.ones(3, 2), "merged", "diagonal"),
        (lambda t, y: -torch.sin(y).mean() - y, torch.linspace(-1, 2, 40), "vmap", "secant"),
    ],
)
def test_batching_and_linearization_are_found(field: Any, y0: Any, batching: str, linearization: str) -> None:
    y0 = y0.double()
    with torch.no_grad():
        typed = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            found = integrate(field, y0, TIMES)
            expected = odeint(field, y0, TIMES, linearization="sequential")
        finally:
            torch.set_default_dtype(typed)
    assert (found.batching, found.linearization) == (batching, linearization)
    assert found.sequential_steps == 0
    close(found.states, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strength", [1e-2, 1e-3])
def test_weak_coupling_of_elements_is_not_mistaken_for_rounding(dtype: Any, strength: float) -> None:
    """A mean over the state once was taken over all times at once, since single precision hid it where it was tried."""
    y0, t = torch.ones(10, dtype=dtype), TIMES / 2
    found = integrate(lambda t, y: strength * y.mean() - y, y0, t)
    assert found.batching == "vmap"
    close(found.states, torch.exp((strength - 1) * torch.from_numpy(t))[:, None].expand(-1, 10), 1e-5)


@pytest.mark.parametrize("linearization", ["full", "diagonal", "secant", "identity"])
def test_every_array_library(xp: Any, linearization: Any) -> None:
    def field(t: Any, y: Any) -> Any:
        return xp.stack([y[1, ...], -xp.sin(y[0, ...])])

    y0 = xp.asarray(START, dtype=xp.float64)
    found = integrate(field, y0, TIMES, linearization=linearization)
    assert found.sequential_steps == 0
    close(np.from_dlpack(found.states), odeint(pendulum_free, START, TIMES, linearization="sequential"))


def pendulum_free(t: Any, y: Any) -> Any:
    return np.stack([y[1], -np.sin(y[0])])


def test_runaway_states_do_not_make_earlier_ones_seem_accurate() -> None:
    """A coarse start that explodes once gave a scale of 1e51, next to which every defect was small."""
    t = np.linspace(0, 1, 201)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SequentialFallbackWarning)
        y = odeint(lambda t, y: -300.0 * (y - np.cos(t)), np.array([0.0]), t, method="euler")
    assert np.max(np.abs(y)) < 2


def test_wide_coupled_state() -> None:
    y0 = np.random.default_rng(0).standard_normal(64)
    found = integrate(wave, y0, TIMES / 3)
    assert found.linearization == "secant"
    assert found.sequential_steps == 0
    close(found.states, odeint(wave, y0, TIMES / 3, linearization="sequential"))


def test_field_with_arguments_the_other_way_round() -> None:
    close(odeint(lambda y, t: pendulum(t, y), START, TIMES, signature="yt"), odeint(pendulum, START, TIMES), 1e-13)


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


@pytest.mark.parametrize("steps", [100, 200])
def test_linear_field_backwards_in_time(steps: int) -> None:
    """A ratio of two corrections was trusted although neither was small: -2e226 was accepted for 1.9e138."""
    t, h = np.linspace(5.15, 0, steps + 1), 5.15 / steps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SequentialFallbackWarning)
        y = odeint(lambda t, y: -155.0 * y + np.sin(t), np.array([0.0375]), t, method="euler")[:, 0]
    expected = [0.0375]
    for now in t[:-1]:
        expected.append((1 + 155 * h) * expected[-1] - h * np.sin(now))
    np.testing.assert_allclose(y, expected, rtol=1e-11)


@pytest.mark.parametrize("rate", [6, 10, 15])
@pytest.mark.parametrize("field", [np.tanh, lambda y: y * (1 - y)])
@pytest.mark.parametrize("other", [False, True])
def test_element_that_decays_to_nothing_and_grows_again(rate: float, field: Any, other: bool) -> None:
    """Defects once were held against the largest value so far: 19.7 was accepted for 1.0004, or NaN told of."""
    t = np.linspace(0, 10, 2001)

    def f(t: Any, y: Any) -> Any:
        if not other:
            return rate * (t - 5) * field(y)
        return np.stack([rate * (t - 5) * field(y[0]), np.cos(t) + 0 * y[1]])

    y0 = np.array([0.5, 1.0]) if other else np.array([0.5])
    found = integrate(f, y0, t)
    assert found.sequential_steps == 0
    assert found.states[1000, 0] < 1e-25
    np.testing.assert_allclose(found.states, odeint(f, y0, t, linearization="sequential"), rtol=1e-10)


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


def test_gradient_of_a_field_that_acts_on_all_times_at_once() -> None:
    y0 = torch.tensor([0.5, 0.2], dtype=torch.float64, requires_grad=True)

    def gradient(linearization: Any) -> Any:
        y = odeint(lambda t, y: -y / torch.clamp(y.norm(), min=3.0), y0, TIMES, linearization=linearization)
        return torch.autograd.grad(y[-1].sum(), y0)[0]

    with pytest.warns(SequentialFallbackWarning, match="among other times than alone"):
        found = gradient("auto")
    torch.testing.assert_close(found, gradient("sequential"))
    torch.testing.assert_close(found, torch.full((2,), np.exp(-2.0), dtype=torch.float64), rtol=1e-8, atol=0)


def test_substeps_refine_the_grid() -> None:
    coarse, fine = TIMES[::10], TIMES
    close(odeint(pendulum, START, coarse, substeps=10), odeint(pendulum, START, fine)[::10], 1e-12)


def test_single_time_and_scalar_state() -> None:
    np.testing.assert_array_equal(odeint(pendulum, START, [2.0]), START[None])
    y = odeint(lambda t, y: -y, torch.tensor(1.0, dtype=torch.float64), TIMES)
    assert y.shape == (301,)
    assert float(y[-1]) == pytest.approx(np.exp(-6), rel=1e-7)


@pytest.mark.parametrize("linearization", ["auto", "sequential"])
@pytest.mark.parametrize("way", ["same array", "in place", "in place, time too"])
def test_field_that_works_in_place(xp: Any, linearization: Any, way: str) -> None:
    """All stages once were the last one, with torch also where it had been mended for NumPy; ``y0`` was changed."""
    kept: dict[Any, Any] = {}

    def field(t: Any, y: Any) -> Any:
        f = -0.5 * y
        if way == "same array":
            out = kept.setdefault(tuple(y.shape), xp.empty_like(y))
            out[...] = f
            return out
        if way == "in place, time too" and t.ndim:
            t *= 2
        y *= -0.5
        return y

    y0 = xp.asarray(START, dtype=xp.float64)
    found = integrate(field, y0, TIMES, linearization=linearization)
    assert (found.sequential_steps == 0) == (linearization == "auto")
    close(np.from_dlpack(found.states), odeint(lambda t, y: -0.5 * y, START, TIMES, linearization="sequential"))
    np.testing.assert_array_equal(np.from_dlpack(y0), START)


def test_jacobian_that_works_in_place() -> None:
    out = np.empty((3, 1, 1))

    def jacobian(t: Any, y: Any) -> Any:
        nonlocal out
        out = out if len(out) == len(y) else np.empty((len(y), 1, 1))
        y *= -1
        out[...] = y[..., None]
        return out

    options: dict[str, Any] = {"jacobian": jacobian, "linearization": "full", "batch_dims": 0}
    y0 = np.array([0.7])
    found = odeint(lambda t, y: -(y**2) / 2, y0, TIMES, **options)
    close(found[:, 0], 1 / (1 / 0.7 + TIMES / 2), 1e-8)


def test_numpy_number_as_state() -> None:
    """What f gives for many times is an array; it once was held against the type of the number."""
    found = integrate(lambda t, y: -y, np.float64(1.0), TIMES)
    assert found.sequential_steps == 0
    close(found.states, odeint(lambda t, y: -y, np.array(1.0), TIMES))


def test_float32() -> None:
    y0 = torch.tensor([1.0, 0.3])
    found = integrate(torch_pendulum, y0, TIMES)
    assert found.states.dtype == torch.float32
    assert found.sequential_steps == 0
    close(found.states, odeint(torch_pendulum, y0, TIMES, linearization="sequential"), 2e-5)


@pytest.mark.parametrize("dense", [True, False])
def test_users_jacobian(dense: bool) -> None:
    shapes = []

    def jacobian(t: Any, y: Any) -> Any:
        shapes.append((t.shape, y.shape))
        slope = (1 - 2 * y) * (2 + np.sin(t))
        return slope[..., None] * np.eye(3) if dense else slope

    y0 = np.array([0.3, 0.2, 0.9])
    linearization: Any = "full" if dense else "diagonal"
    options: dict[str, Any] = {} if dense else {"batch_dims": 0}
    found = integrate(logistic, y0, TIMES, jacobian=jacobian, linearization=linearization, batch_dims=0)
    assert shapes[0][0][1:] == (1,)
    assert found.rounds < 12, options
    close(found.states, odeint(logistic, y0, TIMES, linearization="sequential"))
    with pytest.raises(ValueError, match="jacobian: expected shape"):
        integrate(logistic, y0, TIMES, jacobian=lambda t, y: y[:1], linearization="full")


def test_users_jacobian_of_another_dtype() -> None:
    def jacobian(t: Any, y: Any) -> Any:
        return np.zeros((len(y), 3, 3), dtype=np.float32)

    options: dict[str, Any] = {"linearization": "full", "batch_dims": 0}
    with pytest.raises(ValueError, match=r"jacobian: expected shape .* and dtype float64 .* got .* dtype float32"):
        integrate(logistic, np.array([0.3, 0.2, 0.9]), TIMES, jacobian=jacobian, **options)


@pytest.mark.parametrize("linearization", ["full", "diagonal"])
def test_state_that_rests_at_zero(linearization: Any) -> None:
    """Differences are taken there as well; a step of zero length would give NaN."""
    y0 = np.array([[0.0, 0.0], [1.0, -2.0]])
    found = integrate(lambda t, y: -np.sin(y) * (2 + np.cos(t)), y0, TIMES / 2, linearization=linearization)
    assert found.sequential_steps == 0
    assert found.rounds < 12
    np.testing.assert_array_equal(found.states[:, 0], 0)
    expected = 2 * np.arctan(np.tan(np.array([0.5, -1.0])) * np.exp(-2 * 3.0 - np.sin(3.0)))
    np.testing.assert_allclose(found.states[-1, 1], expected, rtol=1e-6)


def test_steps_end_where_the_next_begin() -> None:
    """To the last bit, which ``t + (t' - t)`` is not."""
    t = np.linspace(-1.0, 1.0, 413) ** 3
    grid = Grid(t, START, 1)
    assert np.any(t[:-1] + np.diff(t) != t[1:])
    np.testing.assert_array_equal(grid.times(0, 412, 1.0), t[1:])
    np.testing.assert_array_equal(grid.times(0, 412, 0.0), t[:-1])


def test_jacobian_by_torch_func() -> None:
    y0, t = torch.tensor([1.0, 1.0], dtype=torch.float64), TIMES / 2
    jacobian = torch.func.vmap(torch.func.jacrev(lotka_volterra, argnums=1))
    found = integrate(lotka_volterra, y0, t, jacobian=jacobian)
    assert found.linearization == "full"
    assert found.sequential_steps == 0
    close(found.states, odeint(lotka_volterra, y0, t, linearization="sequential"))


def test_own_method() -> None:
    ralston = RungeKutta(2, ((), (2 / 3,)), (1 / 4, 3 / 4))
    close(
        odeint(pendulum, START, TIMES, method=ralston),
        odeint(pendulum, START, TIMES, method=ralston, linearization="sequential"),
    )


def test_solve_ivp_has_the_shape_of_scipys() -> None:
    scipy = pytest.importorskip("scipy.integrate")
    expected = scipy.solve_ivp(pendulum, (0, 6), [1.0, 0.3], t_eval=TIMES, rtol=1e-10, atol=1e-12)
    found = solve_ivp(pendulum, (0, 6), [1.0, 0.3], steps=300)
    assert found.y.shape == expected.y.shape
    np.testing.assert_allclose(found.t, expected.t)
    np.testing.assert_allclose(found.y, expected.y, atol=1e-7)
    assert (found.success, found.status) == (True, 0)
    assert found.nfev > 300
    with pytest.raises(ValueError, match="steps: give either"):
        solve_ivp(pendulum, (0, 6), [1.0, 0.3])
    for t_span, y0 in [((0, 6, 7), [1.0, 0.3]), (6, [1.0, 0.3]), ((0, 6), [1.0 + 1j, 0.3])]:
        with pytest.raises(TypeError, match="expected two times, and a state of real numbers"):
            solve_ivp(pendulum, t_span, y0, steps=300)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "dopri5"}, "method: expected one of"),
        ({"t": [0.0, 1.0, 1.0]}, "t: expected strictly increasing"),
        ({"t": [0.0, np.nan]}, "t: expected finite"),
        ({"t": []}, "t: expected a 1-D sequence"),
        ({"t": [[0.0, 1.0], [2.0]]}, "t: expected a 1-D sequence of real numbers"),
        ({"t": torch.arange(3).bfloat16()}, "t: expected a 1-D sequence of real numbers"),
        ({"y0": np.array([1, 2])}, "y0: expected float32 or float64"),
        ({"y0": (START, START)}, "y0: expected an array"),
        ({"y0": np.array([np.inf, 0])}, "y0: holds NaN"),
        ({"f": 3}, "f: expected a function"),
        ({"f": lambda t, y: y[:1]}, "f: expected the derivative as shape"),
        ({"f": lambda t, y: None}, "f: expected"),
        ({"linearization": "newton"}, "linearization: expected one of"),
        ({"signature": "tx"}, "signature: expected"),
        ({"batching": "rows_first"}, "batching: expected one of"),
        ({"batching": "column"}, "f: called with 5 times at once"),
        ({"linear": 1.0}, "linear: the linear part"),
        ({"linear": 1.0, "method": METHODS["rk4"]}, "linear: goes with the name of a method"),
        ({"method": "etd1", "linear": [1.0, 2.0, 3.0]}, "linear: expected a number"),
        ({"method": "etd1", "linear": 1j}, "linear: expected real numbers"),
        ({"jacobian": np.eye(2)}, "jacobian: expected a function"),
        (
            {"f": lambda t, y: -y, "y0": np.array(1.0), "method": "etd1", "linear": [1.0]},
            "linear: expected a number, got",
        ),
        ({"tolerance": -1.0}, "tolerance: expected"),
        ({"window": 0}, "window: expected"),
        ({"substeps": 0}, "substeps: expected"),
        ({"batch_dims": 4}, "batch_dims: got 4"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    arguments = {"f": pendulum, "y0": START, "t": TIMES} | change
    with pytest.raises((ValueError, TypeError), match=message):
        integrate(**arguments)
