"""Denoisers of diffusers' networks with a network of one formula: what each row is called with, and its guidance."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("diffusers")
import torch
from torch import Tensor

from parasolver_adapters.diffusers import TransformerDenoiser, UNetDenoiser
from parasolver_adapters.diffusers.denoisers import _batch, _without_variance


class Model(torch.nn.Module):
    """``c x + t``, and what it was called with."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.channels, self.seen = channels, list[dict[str, Any]]()

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None, *, return_dict: bool, **given: Any) -> Any:
        self.seen.append({"x": x, "t": t, "c": c, **given})
        assert return_dict is False
        gain = torch.ones(len(x)) if c is None else c.flatten(1).mean(1)
        gain, t = (one.reshape(-1, *[1] * (x.ndim - 1)) for one in (gain, t))
        return (torch.cat([gain * x + t] * self.channels, dim=1), "more")


class Transformer(Model):
    def forward(self, *, hidden_states: Tensor, timestep: Tensor, **given: Any) -> Any:  # type: ignore[override]
        return super().forward(hidden_states, timestep, **given)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def conditions(*numbers: float) -> dict[str, Tensor]:
    return {"c": torch.tensor(numbers)[:, None].repeat(1, 2)}


X, T = normal(3, 2, 4), torch.tensor([5.0, 3.0, 1.0])


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("scale", [0.0, 2.5])
def test_guidance_of_one_condition_for_all_rows(scale: float, batched: bool) -> None:
    model = Model()
    denoiser = UNetDenoiser(
        model, conditions(3.0), negative=conditions(2.0), guidance_scale=scale, batched=batched, constants={"k": 7}
    )
    for rows in (2, 3, 1):
        got = denoiser(X[:rows], T[:rows])
        want = (2 + scale * (3 - 2)) * X[:rows] + T[:rows, None, None]
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert all(one["k"] == 7 for one in model.seen)
    assert [len(one["x"]) for one in model.seen] == ([4, 6, 2] if batched else [2, 2, 3, 3, 1, 1])


@pytest.mark.parametrize("batched", [True, False])
def test_a_batch_of_conditions_each_sample_with_its_own(batched: bool) -> None:
    model = Model()
    shared = torch.full((1, 2), 9.0)
    denoiser = UNetDenoiser(
        model,
        conditions(3.0, 4.0) | {"shared": shared},
        negative=conditions(2.0),  # one for both
        guidance_scale=2.0,
        batched=batched,
    )
    assert denoiser.batch == 2
    x = normal(3, 2, 2, 4)
    got = denoiser(x, T)
    gain = 2 + 2.0 * (torch.tensor([3.0, 4.0]) - 2)
    torch.testing.assert_close(got, gain[None, :, None, None] * x + T[:, None, None, None], rtol=1e-6, atol=1e-6)
    assert model.seen[0]["shared"].shape == ((12, 2) if batched else (6, 2))
    with pytest.raises(ValueError, match=r"expected \(rows, 2, \*event\)"):
        denoiser(normal(3, 3, 2, 4), T)


class Curved(Model):
    """``sin(c x)``, whose deviation depends on c."""

    def forward(self, x: Tensor, t: Tensor, c: Tensor, *, return_dict: bool) -> Any:  # type: ignore[override]
        return (torch.sin(c.flatten(1).mean(1).reshape(-1, *[1] * (x.ndim - 1)) * x),)


@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize("positive", [(3.0,), (3.0, 4.0)])
def test_rescaled_guidance_has_the_deviation_of_the_positive_prediction(positive: Any, share: float) -> None:
    """A share of it, over each sample of each row by itself."""
    x = X if len(positive) == 1 else normal(3, 2, 2, 4)
    given = {"negative": conditions(2.0), "guidance_scale": 3.0, "guidance_rescale": share}
    got = UNetDenoiser(Curved(), conditions(*positive), **given)(x, T)
    gain = torch.tensor(positive).reshape(-1, 1, 1)
    wanted = torch.sin(gain * x)
    guided = torch.sin(2 * x) + 3.0 * (wanted - torch.sin(2 * x))
    deviation = wanted.std((-2, -1), keepdim=True) / guided.std((-2, -1), keepdim=True)
    torch.testing.assert_close(got, guided * (share * deviation + 1 - share), rtol=1e-5, atol=1e-6)


def test_without_guidance_there_is_one_call_of_each_row() -> None:
    model = Model()
    torch.testing.assert_close(UNetDenoiser(model)(X, T), X + T[:, None, None])
    assert [len(one["x"]) for one in model.seen] == [3]
    torch.testing.assert_close(UNetDenoiser(model, conditions(4.0))(X, T), 4 * X + T[:, None, None])


def test_conditions_that_the_negative_leaves_out_are_those_of_the_positive() -> None:
    model = Model()
    more = {"added": {"text": torch.tensor([[7.0]])}}
    UNetDenoiser(model, conditions(3.0) | more, negative=conditions(2.0), guidance_scale=2.0)(X, T)
    assert model.seen[0]["added"]["text"].tolist() == [[7.0]] * 6
    assert model.seen[0]["c"][:, 0].tolist() == [2.0, 3.0] * 3
    assert model.seen[0]["t"].tolist() == [5.0, 5.0, 3.0, 3.0, 1.0, 1.0]


def test_conditions_are_expanded_for_the_largest_round_so_far() -> None:
    model = Model()
    denoiser = UNetDenoiser(model, conditions(3.0))
    places = []
    for rows in (2, 1, 2, 3, 2):
        denoiser(X[:rows], T[:rows])
        places.append(model.seen[-1]["c"].data_ptr())
        assert len(model.seen[-1]["c"]) == rows
    assert places[0] == places[1] == places[2] != places[3] == places[4]


@pytest.mark.parametrize(("channels", "dropped"), [(1, False), (2, True), (3, False)])
def test_a_variance_predicted_beside_is_dropped(channels: int, dropped: bool) -> None:
    x, m = normal(3, 2, 4), normal(3, 2 * channels, 4)
    got = _without_variance(m, x)
    assert torch.equal(got, m[:, :2] if dropped else m)
    assert torch.equal(_without_variance(normal(4), normal(2)), normal(4))
    assert torch.equal(_without_variance(normal(3, 12), normal(3, 6)), normal(3, 12)[:, :6])
    if channels < 3:
        torch.testing.assert_close(UNetDenoiser(Model(channels))(x, T), x + T[:, None, None])


@pytest.mark.parametrize("scale", [1.0, 2.0, 1e-3])
@pytest.mark.parametrize("guidance", [None, 3.5])
def test_a_transformer_is_given_what_it_calls_the_same(scale: float, guidance: float | None) -> None:
    model = Transformer()
    denoiser = TransformerDenoiser(
        model,
        conditions(3.0),
        negative=conditions(2.0),
        guidance_scale=2.0,
        timestep_scale=scale,
        embedded_guidance=guidance,
        constants={"k": 7},
    )
    x = X.double()
    got = denoiser(x, T)
    torch.testing.assert_close(got, 4 * x + scale * T[:, None, None], rtol=1e-6, atol=1e-6)
    (seen,) = model.seen
    assert seen["k"] == 7
    assert ("guidance" in seen) is (guidance is not None)
    if guidance is not None:
        assert seen["guidance"].tolist() == [3.5] * 6
        assert seen["guidance"].dtype == torch.float64
    plain = Transformer()
    torch.testing.assert_close(TransformerDenoiser(plain)(X, T), X + T[:, None, None])
    assert "guidance" not in plain.seen[0]
    TransformerDenoiser(plain)(X, T.long())
    assert plain.seen[1]["t"].dtype == torch.int64  # as it is given


@pytest.mark.parametrize(("sizes", "batch"), [((), 1), ((1,), 1), ((1, 1), 1), ((3,), 3), ((1, 3, 3, 1), 3)])
def test_the_number_of_samples_that_conditions_are_for(sizes: tuple[int, ...], batch: int) -> None:
    given = {str(at): {"inner": torch.zeros(size, 2)} for at, size in enumerate(sizes)}
    assert _batch(given) == batch


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"a": torch.zeros(2), "b": torch.zeros(3)}, ValueError, r"first dimensions of \[2, 3\]"),
        ({"a": torch.zeros(0, 2)}, ValueError, r"first dimensions of \[0\]"),
        ({"a": torch.tensor(1.0)}, TypeError, "got Tensor"),
        ({"a": torch.zeros(2), "b": 3.0}, TypeError, "got float"),
    ],
)
def test_conditions_that_are_for_no_number_of_samples(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _batch(given)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_is_between_none_and_all(share: float) -> None:
    with pytest.raises(ValueError, match=r"guidance_rescale: expected a number in 0\.\.1"):
        UNetDenoiser(Model(), guidance_rescale=share)
