"""A network's calls as CUDA graphs: hundreds of kernels are launched as one, for a few row counts.

Small networks, and large ones with few rows, spend more time on launching kernels than on running them. A round has
any number of rows, and a graph has one: calls are filled up to the next of a few.

Example::

    network = GraphedDenoiser(unet, rows=(1, 4, 8, 16))
    solution = solve(network, x_T, timesteps, DDIM(schedule), window=16)
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from parasolver_core.denoiser.contract import predicted_by, takes_rows
from parasolver_core.validation import check_count

__all__ = ["GraphCaptureWarning", "GraphedDenoiser", "captured"]

Capture = Callable[[Callable[[], Any]], tuple[Callable[[], Any], Any]]

_WARM_UP = 2  # calls before the capture: they choose kernels, find memory and compile what is compiled
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)  # values that a graph may be captured with
_CLOSE = 1e-2  # replayed outputs this near are the network's own, in half precision too


class GraphCaptureWarning(RuntimeWarning):
    """A network could not be captured and is called plainly; the message says why."""


def captured(call: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    """What replays a CUDA graph of the call, and what the call returned, which a replay writes anew.

    Raises:
        RuntimeError: the call waits for the device or copies from the host's memory, as ``.item()`` and
            ``torch.tensor(...)`` do.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the default stream cannot be captured
        for _ in range(_WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the card
        output = call()
    return graph.replay, output


@dataclass(frozen=True)
class _Graph:
    """A captured call: what it reads, what replays it, and what it writes."""

    inputs: list[Tensor]
    replay: Callable[[], Any]
    output: Any


class GraphedDenoiser:
    """A network, or a whole denoiser, whose calls on a card are replays of CUDA graphs.

    A graph is captured at the first call of each row count, with what else the call is given. Where that fails, the
    calls are made plainly from then on, with a :class:`GraphCaptureWarning` that says why. So are calls on a CPU and
    calls of more rows than the largest graph. No gradients pass through. The weights may be changed in place only.

    Args:
        network: ``network(x, *args, **kwargs)``, the rows first in ``x`` and in every tensor of as many rows; it may
            return tensors in any structure. It has to launch the same kernels whatever the numbers are.
        rows: the row counts that are captured; calls of fewer rows are filled up to the next.

    Other arguments:
        capture: what captures a call on other devices than CUDA, in the manner of :func:`captured`.

    Raises:
        ValueError: ``network`` is a denoiser that takes rows: its samples have conditions of their own, which it finds
            on the host. Give it a network that is graphed instead.

    Example:
        >>> network = GraphedDenoiser(lambda x, t: x * t[:, None], rows=(2, 4))
        >>> network(torch.ones(3, 2), torch.arange(3)).tolist()
        [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
    """

    def __init__(
        self, network: Callable[..., Any], rows: Sequence[int] = (1, 2, 4, 8, 16, 32), *, capture: Capture | None = None
    ) -> None:
        if not callable(network):
            raise TypeError(f"network: expected network(x, *args, **kwargs), got {type(network).__name__}")
        if isinstance(rows, int):
            raise TypeError(f"rows: expected row counts such as (1, 4, 16), got {rows}")
        if takes_rows(network):
            raise ValueError(
                "network: it takes rows, whose samples it looks up on the host; graph the network inside it, for "
                "example ModelDenoiser(GraphedDenoiser(unet), ...)"
            )
        if not rows:
            raise ValueError("rows: expected at least one row count, got none")
        for count in rows:
            check_count("rows", count)
        self._network, self.rows = network, tuple(sorted(set(rows)))
        self._anywhere, self._captures = capture is not None, _Captures(network, capture or captured)

    @property
    def prediction_type(self) -> str | None:
        return predicted_by(self._network)

    @property
    def failure(self) -> str:
        """Why a call could not be captured; empty if none failed."""
        return self._captures.failure

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The network's output, in memory of its own."""
        leaves, spec = tree_flatten(((x, *args), kwargs))
        count = x.shape[0]
        size = next((size for size in self.rows if size >= count > 0), None)
        if size is not None and self._fits(leaves):
            with torch.no_grad():
                given = [_filled_up(leaf, count, size) for leaf in leaves]
                outputs = self._captures.replayed(given, spec)
                if outputs is not None:
                    return tree_map_only(Tensor, functools.partial(_first_rows, count=count, size=size), outputs)
        return self._network(x, *args, **kwargs)

    def _fits(self, leaves: Sequence[Any]) -> bool:
        """Whether a call of these arguments may be a graph: everything is on one card, or a plain value."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        plain = all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves)
        return plain and len({tensor.device for tensor in tensors}) == 1 and (self._anywhere or tensors[0].is_cuda)


class _Captures:
    """The graphs of a network, by the kinds of their arguments."""

    __slots__ = ("_busy", "_capture", "_graphs", "_network", "failure")  # no part of what the network is

    def __init__(self, network: Callable[..., Any], capture: Capture) -> None:
        self._network, self._capture = network, capture
        self._graphs: dict[Any, _Graph | None] = {}  # None: it cannot be captured
        self._busy = threading.Lock()  # a graph has one place for its inputs
        self.failure = ""

    def replayed(self, given: Sequence[Any], spec: Any) -> Any:
        """The outputs of a call, in memory of their own; None if it cannot be captured."""
        key = (spec, *map(_kind, given), torch.is_autocast_enabled("cuda"), torch.is_inference_mode_enabled())
        with self._busy:
            if key not in self._graphs:
                self._graphs[key] = self._made(given, spec)
            graph = self._graphs[key]
            if graph is None:
                return None
            _write(graph.inputs, given)
            graph.replay()
            return tree_map_only(Tensor, torch.clone, graph.output)  # before the next replay writes over it

    def _made(self, given: Sequence[Any], spec: Any) -> _Graph | None:
        """The graph of a call, or None with a warning. The network's own exception is the caller's."""
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in given]
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

        def call() -> Any:
            args, kwargs = tree_unflatten(leaves, spec)
            return self._network(*args, **kwargs)

        expected = call()
        try:
            _write(inputs, given)  # the network may have worked in place
            graph = _Graph(inputs, *self._capture(call))
            _write(inputs, given)
            graph.replay()
            if not _alike(graph.output, expected):
                raise RuntimeError("a replay gives other numbers than a call: the network keeps something back")
        except Exception as error:
            self.failure = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            warnings.warn(
                f"GraphedDenoiser: {type(self._network).__name__} cannot be captured as a CUDA graph and is called "
                f"plainly ({self.failure}). Keep tables on the device, and leave out .item(), .cpu(), "
                "torch.tensor(...) and decisions that depend on numbers",
                GraphCaptureWarning,
                stacklevel=4,
            )
            return None
        return graph


def _filled_up(leaf: Any, count: int, size: int) -> Any:
    """A tensor of ``count`` rows with its last row repeated up to ``size``; anything else as it is."""
    if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] != count or count == size:
        return leaf
    return torch.cat([leaf, leaf[-1:].expand(size - count, *leaf.shape[1:])])


def _first_rows(output: Tensor, count: int, size: int) -> Tensor:
    return output[:count] if output.ndim and len(output) == size else output


def _kind(leaf: Any) -> Any:
    """What has to be the same for a graph to serve; numbers of tensors may be others."""
    return (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf)


def _write(inputs: Sequence[Tensor], given: Sequence[Any]) -> None:
    tensors = [leaf for leaf in given if isinstance(leaf, Tensor)]
    for kept, tensor in zip(inputs, tensors, strict=True):
        kept.copy_(tensor)


def _alike(output: Any, expected: Any) -> bool:
    got, want = tree_flatten(output)[0], tree_flatten(expected)[0]
    return len(got) == len(want) and all(
        not isinstance(b, Tensor) or (a.shape == b.shape and bool(_near(a, b))) for a, b in zip(got, want, strict=True)
    )


def _near(got: Tensor, want: Tensor) -> Tensor:
    difference, size = (got - want).abs().amax(), want.abs().amax()
    return (difference <= _CLOSE * size) | ~torch.isfinite(difference)
