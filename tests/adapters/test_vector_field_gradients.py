"""Gradients of a trajectory found in parallel are those of the sequential method."""

import gc
import warnings
import weakref
from typing import Any

import numpy as np
import pytest

from parasolver_adapters.vector_field import SequentialFallbackWarning, integrate, odeint, solve_ivp
from parasolver_adapters.vector_field.newton import ParallelIntegrator
from parasolver_core.solution import Status

torch = pytest.importorskip("torch")

DTYPE = torch.float64


def times(n: int = 200, end: float = 4.0) -> Any:
    return torch.linspace(0, end**0.5, n + 1, dtype=DTYPE) ** 2


def network(size: int, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(size, 16), torch.nn.Tanh(), torch.nn.Linear(16, size)).to(DTYPE)
    for parameter in net.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator, dtype=DTYPE)
    return net


def gradients(f: Any, y0: Any, t: Any, inputs: list[Any], **options: Any) -> list[Any]:
    y = odeint(f, y0, t, **options)
    weights = torch.linspace(-1, 2, y.numel(), dtype=DTYPE).reshape(y.shape)
    return list(torch.autograd.grad((weights * y.cos()).sum(), inputs))


@pytest.mark.parametrize("method", ["euler", "heun3", "rk4", "ab4", "etdrk2"])
@pytest.mark.parametrize("linearization", ["full", "secant", "identity", "diagonal"])
@pytest.mark.parametrize("shape", [(3,), (4, 3)])
def test_equal_to_sequential(method: str, linearization: Any, shape: tuple[int, ...]) -> None:
    net, y0 = network(3), torch.linspace(-1, 1, int(np.prod(shape)), dtype=DTYPE).reshape(shape).requires_grad_()
    options: dict[str, Any] = {"method": method, "linear": -0.7 if method.startswith("etd") else None}

    def field(t: Any, y: Any) -> Any:
        return net(y) + torch.sin(t)

    inputs = [y0, *net.parameters()]
    expected = gradients(field, y0, times(), inputs, linearization="sequential", **options)
    with warnings.catch_warnings():
        if method == "ab4":  # one call a step: the loop is soon cheaper than more rounds
            warnings.simplefilter("ignore", SequentialFallbackWarning)
        found = gradients(field, y0, times(), inputs, linearization=linearization, **options)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * float(b.abs().max()))


def test_memory_of_the_backward_pass_does_not_grow_with_rounds() -> None:
    a = torch.tensor(1.3, dtype=DTYPE, requires_grad=True)
    kept: dict[str, int] = {}
    rounds = []
    names: tuple[Any, ...] = ("full", "secant")
    for name in names:

        def pack(values: Any, name: str = name) -> Any:
            kept[name] = kept.get(name, 0) + values.numel()
            return values

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda values: values):
            found = integrate(
                lambda t, y: torch.stack([y[1], -a * torch.sin(y[0])]),
                torch.tensor([1.0, 0.2], dtype=DTYPE),
                times(400),
                linearization=name,
            )
        rounds.append(found.rounds)
    assert rounds[1] > 3 * rounds[0]
    assert kept["full"] == kept["secant"] > 0


def test_trajectory_is_freed_with_its_last_reference() -> None:
    """The trajectory and what differentiates it once held each other until the garbage collector came by."""
    a = torch.tensor(1.3, dtype=DTYPE, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        freed = []
        for backward in (False, True):
            graph = torch.ones(1, dtype=DTYPE)
            freed.append(weakref.ref(graph))
            y = odeint(lambda t, y, graph=graph: -a * y * graph, torch.ones(2, dtype=DTYPE), times(100))
            if backward:
                y[-1].sum().backward()
            del y, graph
        assert [reference() for reference in freed] == [None, None]
    finally:
        gc.enable()


def test_trajectory_may_be_changed_in_place() -> None:
    """As that of the plain loop, which no one needs for the backward pass."""
    y0 = torch.tensor([1.0, 0.2], dtype=DTYPE, requires_grad=True)

    def gradient(linearization: Any) -> Any:
        y = odeint(lambda t, y: -(y**2), y0, times(), linearization=linearization)
        y *= 2
        return torch.autograd.grad(y.sum(), y0)[0]

    torch.testing.assert_close(gradient("full"), gradient("sequential"), rtol=1e-10, atol=0)


def test_gradcheck() -> None:
    t = times(80, 2.0)

    def final(y0: Any, a: Any) -> Any:
        return odeint(lambda t, y: torch.stack([y[1], -a * torch.sin(y[0])]), y0, t)[::40]

    y0, a = (torch.tensor(v, dtype=DTYPE, requires_grad=True) for v in ([1.0, 0.2], 1.3))
    assert torch.autograd.gradcheck(final, (y0, a))


@pytest.mark.parametrize("wanted", ["state", "parameters"])
def test_only_one_side_needs_gradients(wanted: str) -> None:
    net, y0 = network(2), torch.ones(2, dtype=DTYPE, requires_grad=wanted == "state")
    net.requires_grad_(wanted == "parameters")
    inputs = [y0] if wanted == "state" else list(net.parameters())
    found, expected = (
        gradients(lambda t, y: net(y), y0, times(), inputs, linearization=name) for name in ("full", "sequential")
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_parameter_that_is_used_after_a_while_only() -> None:
    a = torch.tensor(0.4, dtype=DTYPE, requires_grad=True)

    def field(t: Any, y: Any) -> Any:
        late = torch.as_tensor(t) > 1
        return torch.where(late, a, 0.0) - y if bool(late.any()) else -y

    y0 = torch.ones(1, dtype=DTYPE)
    found, expected = (
        gradients(field, y0, times(200, 2.0), [a], linearization=name)[0] for name in ("full", "sequential")
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    assert float(found.abs()) > 1


def test_trajectory_that_ran_away_has_no_gradient() -> None:
    y0 = torch.tensor([1.0], dtype=DTYPE, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SequentialFallbackWarning)
        found = integrate(lambda t, y: y**3, y0, times(), throw=False)
    assert found.status in (Status.NONFINITE_SOLVER, Status.NONFINITE_MODEL)
    assert not found.states.requires_grad


def test_gradient_that_decays_to_nothing_and_grows_again() -> None:
    """The gradient at the end passes through 1e-27 on its way to the beginning."""
    y0, t = torch.tensor([1.0], dtype=DTYPE, requires_grad=True), torch.linspace(0, 10, 1001, dtype=DTYPE)

    def gradient(linearization: Any) -> Any:
        y = odeint(lambda t, y: 5.0 * (t - 5) * torch.sin(y), y0, t, linearization=linearization)
        return torch.autograd.grad(y[-1].sum(), y0)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SequentialFallbackWarning)
        torch.testing.assert_close(gradient("auto"), gradient("sequential"), rtol=1e-8, atol=0)


@pytest.mark.parametrize("linearization", ["full", "sequential"])
def test_start_that_is_a_parameter(linearization: Any) -> None:
    """The field gives plain tensors, which once were refused for not being parameters like ``y0``."""
    y0 = torch.nn.Parameter(torch.tensor([1.0, 0.2], dtype=DTYPE))
    odeint(lambda t, y: -0.5 * y, y0, times(), linearization=linearization)[-1].sum().backward()
    torch.testing.assert_close(y0.grad, torch.full((2,), np.exp(-2.0), dtype=DTYPE), rtol=1e-8, atol=0)


def test_no_graph_where_none_is_needed() -> None:
    y0 = torch.ones(2, dtype=DTYPE)
    assert not odeint(lambda t, y: -y, y0, times()).requires_grad
    with torch.no_grad():
        assert not odeint(lambda t, y: network(2)(y), y0, times()).requires_grad


def test_chaotic_field_has_the_sequential_gradient() -> None:
    rho = torch.tensor(28.0, dtype=DTYPE, requires_grad=True)

    def lorenz(t: Any, y: Any) -> Any:
        return torch.stack([10 * (y[1] - y[0]), y[0] * (rho - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]])

    y0, t = torch.tensor([1.0, 1.0, 1.0], dtype=DTYPE, requires_grad=True), torch.linspace(0, 3, 601, dtype=DTYPE)
    expected = gradients(lorenz, y0, t, [y0, rho], linearization="sequential")
    found = gradients(lorenz, y0, t, [y0, rho], linearization="full")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=0)


def test_fall_back_is_differentiable() -> None:
    a = torch.tensor(0.7, dtype=DTYPE, requires_grad=True)

    def field(t: Any, y: Any) -> Any:
        return -a * y if float(t) < 1 else a * y

    with pytest.warns(SequentialFallbackWarning):
        y = odeint(field, torch.ones(1, dtype=DTYPE), times(100, 2.0))
    (slope,) = torch.autograd.grad(y[-1, 0], a)
    assert float(slope) == pytest.approx(float((y[-1, 0] * 0).detach()), abs=2e-2)  # the two halves cancel


def test_backward_falls_back_to_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    from parasolver_adapters.vector_field import adjoint

    y0 = torch.tensor([1.0, 0.2], dtype=DTYPE, requires_grad=True)
    arguments = (lambda t, y: torch.stack([y[1], -torch.sin(y[0])]), y0, times(), [y0])
    (expected,) = gradients(*arguments)
    monkeypatch.setattr(adjoint, "_MOST_ROUNDS", 0)
    (found,) = gradients(*arguments, method="rk4")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("linearization", "most"), [("full", 4), ("diagonal", 20), ("secant", 20), ("identity", 25)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_backward_pass_is_made_in_rounds(
    monkeypatch: pytest.MonkeyPatch, linearization: Any, most: int, dtype: Any
) -> None:
    """Of two calls of a batch of all steps at least, and not of the plain loop."""
    from parasolver_adapters.vector_field import adjoint

    rounds: list[int] = []
    back = adjoint._Adjoint._back
    monkeypatch.setattr(adjoint._Adjoint, "_back", lambda self, g: rounds.append(len(g)) or back(self, g))
    monkeypatch.setattr(adjoint._Adjoint, "_sequential", None)
    y0, t = torch.tensor([1.0, 0.2], dtype=dtype, requires_grad=True), times(200, 2.0)
    y = odeint(lambda t, y: torch.stack([y[1], -torch.sin(y[0])]), y0, t, linearization=linearization)
    weights = torch.linspace(-1, 2, y.numel(), dtype=dtype).reshape(y.shape)
    (found,) = torch.autograd.grad((weights * y.cos()).sum(), y0)
    assert rounds == [200] * len(rounds)
    assert 2 <= len(rounds) <= most
    wide = y0.detach().double().requires_grad_()
    (expected,) = gradients(
        lambda t, y: torch.stack([y[1], -torch.sin(y[0])]), wide, t, [wide], linearization="sequential"
    )
    limit = 1e-11 if dtype is DTYPE else 2e-5
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=limit * float(expected.abs().max()))


@pytest.mark.parametrize(("row_cost", "rounds"), [(0.0, 40), (0.002, 40), (0.05, 19), (0.5, 2), (1000.0, 1)])
def test_rounds_of_the_backward_pass_cost_no_more_than_the_plain_loop(row_cost: float, rounds: int) -> None:
    """200 (1 + c) over 1 + 200 c calls, whatever the stages of a step, and forty at most."""
    from parasolver_adapters.vector_field.adjoint import _Adjoint
    from parasolver_adapters.vector_field.field import Field
    from parasolver_adapters.vector_field.grid import Grid
    from parasolver_adapters.vector_field.methods import METHODS
    from parasolver_adapters.vector_field.problem import Problem

    y0 = torch.ones(2, dtype=DTYPE)
    for method in ("euler", "rk4"):
        grid = Grid(times().numpy(), y0, 1)
        problem = Problem(Field(lambda t, y: -y, y0, "ty", "column"), grid, METHODS[method], 0)
        problem.field.row_cost = row_cost
        nothing: Any = None
        assert _Adjoint(problem, nothing, y0, y0, y0, y0)._rounds_that_pay() == rounds


def test_training_step_twice() -> None:
    """The graph is made anew in each call; a second backward through one graph is refused as usual."""
    net = network(2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = odeint(lambda t, y: net(y), torch.ones(2, dtype=DTYPE), times(100, 1.0))[-1].square().sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("wanted", ["state", "parameters"])
def test_second_derivatives_are_refused(wanted: str) -> None:
    """Where the loss is linear in the trajectory, they once were taken for zero."""
    net, y0 = network(2), torch.ones(2, dtype=DTYPE, requires_grad=wanted == "state")
    net.requires_grad_(wanted == "parameters")
    inputs = [y0] if wanted == "state" else list(net.parameters())
    y = odeint(lambda t, y: net(y), y0, times())
    first = torch.autograd.grad(y[-1].sum(), inputs, create_graph=True)
    for a, b in zip(first, torch.autograd.grad(y[-1].sum(), inputs, retain_graph=True), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError, match=r"second derivatives .* linearization='sequential'"):
        torch.autograd.grad(y.sum() + sum(a.square().sum() for a in first), inputs)


def test_gradient_with_respect_to_times_is_refused() -> None:
    with pytest.raises(ValueError, match="t: gradients with respect to times"):
        integrate(lambda t, y: -y, torch.ones(1, dtype=DTYPE), times().requires_grad_())
    with pytest.raises(ValueError, match="t: gradients with respect to times"):
        solve_ivp(lambda t, y: -y, (0, 4), torch.ones(1, dtype=DTYPE), t_eval=times().requires_grad_())


def test_gradient_with_respect_to_the_linear_part_is_refused() -> None:
    """It once was left out without a word."""
    linear = torch.tensor(-1.0, dtype=DTYPE, requires_grad=True)
    with pytest.raises(ValueError, match="linear: gradients with respect to it"):
        integrate(lambda t, y: 0 * y, torch.ones(1, dtype=DTYPE), times(), method="etd1", linear=linear)


def test_gradients_of_steps_that_the_loop_made_are_the_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows act on each other beyond a size; Newton's method did not come so far as to let that be seen."""

    def field(t: Any, y: Any) -> Any:
        return torch.sin(t) + 0.3 * y + torch.where(y.mean() > 2, y.mean(), 0.0) * torch.ones_like(y)

    y0 = torch.tensor([1.0, 0.5], dtype=DTYPE, requires_grad=True)
    (want,) = gradients(field, y0, times(), [y0], linearization="sequential")
    monkeypatch.setattr(ParallelIntegrator, "_window", lambda self, problem, lo, hi, y, effort: (y[-1][:0], False))
    with pytest.warns(SequentialFallbackWarning, match="do not end where they do one after another"):
        (found,) = gradients(field, y0, times(), [y0])
    torch.testing.assert_close(found, want, rtol=1e-12, atol=0)
