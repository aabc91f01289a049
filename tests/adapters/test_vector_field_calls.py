"""How fields, states and Jacobians may be given, and what is refused."""

from __future__ import annotations

from typing import Any

import array_api_compat
import numpy as np
import pytest
import torch

from parasolver_adapters.vector_field import integrate, odeint, solve_ivp
from parasolver_adapters.vector_field.methods import METHODS
from tests.adapters.vector_fields import START, TIMES, close, logistic, lotka_volterra, pendulum


def test_field_with_arguments_the_other_way_round() -> None:
    close(odeint(lambda y, t: pendulum(t, y), START, TIMES, signature="yt"), odeint(pendulum, START, TIMES), 1e-13)


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
        if way == "same array" and not array_api_compat.is_jax_array(y):  # whose arrays nobody writes into
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


def test_jacobian_by_torch_func() -> None:
    y0, t = torch.tensor([1.0, 1.0], dtype=torch.float64), TIMES / 2
    jacobian = torch.func.vmap(torch.func.jacrev(lotka_volterra, argnums=1))
    found = integrate(lotka_volterra, y0, t, jacobian=jacobian)
    assert found.linearization == "full"
    assert found.sequential_steps == 0
    close(found.states, odeint(lotka_volterra, y0, t, linearization="sequential"))


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
